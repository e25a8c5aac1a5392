"""The report of a study: Markdown, one HTML page that needs no network, CSV, JSON and figures."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_methods.reproducibility.analysis import Analysis
from lightning_methods.reproducibility.content import Block, Content, Table, content_of
from lightning_methods.reproducibility.figures import study_figures

_STYLE = """
:root { color-scheme: light; --ink: #24292f; --muted: #5d6670; --line: #e3e5e8; --paper: #fbfbf9; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.25rem; margin: 0 0 14px; color: var(--muted); font-weight: 600; }
h2 { font-size: 1.15rem; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 10px 0; } ul { padding-left: 20px; } li { margin: 4px 0; overflow-wrap: anywhere; }
.answer { font-size: 1.3rem; line-height: 1.45; font-weight: 600; margin: 0 0 6px; text-wrap: pretty; }
.badge { display: inline-block; padding: 3px 12px; border-radius: 999px; font-size: .85rem; font-weight: 600;
  color: #fff; background: var(--muted); margin-bottom: 14px; }
.badge.yes { background: #007a5a; } .badge.some { background: var(--blue); } .badge.open { background: #a35200; }
figure { margin: 18px 0; } img { max-width: 100%; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
pre { background: #f1f2ef; border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: .85rem; }
summary { cursor: pointer; color: var(--blue); margin-top: 8px; }
footer { margin-top: 48px; color: var(--muted); font-size: .85rem; }
"""
_BADGES = {"significant and meaningful": "yes", "significant, not meaningful": "some", "incomplete": "open"}


def write_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Write `report.md`, `report.html`, `report.json`, `runs.csv` and the figures, and return their paths.

    Args:
        analysis: of the study.
        folder: where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = study_figures(analysis)
    content = content_of(analysis, list(pictures))
    files = [folder / name for name in ("report.md", "report.html", "report.json", "runs.csv")]
    images = {name: _png(figure) for name, figure in pictures.items()}
    for name, image in images.items():
        files.append(folder / "figures" / f"{name}.png")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_bytes(image)
    files[0].write_text(markdown(content), encoding="utf-8")
    files[1].write_text(page(content, images), encoding="utf-8")
    files[2].write_text(json.dumps(findings(analysis), indent=1), encoding="utf-8")
    _write_runs(files[3], analysis)
    return files


def markdown(content: Content) -> str:
    """Return the report as Markdown, with figures as files beside it."""
    lines = [f"# {content.title}", ""]
    for _, sentence in content.answers:
        lines += [f"**{sentence}**", ""]
    for block in content.blocks:
        lines += [f"## {block.title}", ""]
        for paragraph in block.paragraphs:
            lines += [paragraph, ""]
        lines += [*(f"- {item}" for item in block.items), *([""] if block.items else [])]
        if block.table is not None:
            lines += [*_markdown_table(block.table), ""]
        for name in block.figures:
            lines += [f"![{name}](figures/{name}.png)", ""]
        if block.code:
            lines += ["```latex", block.code, "```", ""]
    return "\n".join(lines)


def page(content: Content, images: Mapping[str, bytes]) -> str:
    """Return the report as one HTML page with its figures inside, which opens from disk without a network."""
    body = [f"<h1>{html.escape(content.title)}</h1>"]
    for decision, sentence in content.answers:
        body.append(f'<p class="answer">{html.escape(sentence)}</p>')
        body.append(f'<span class="badge {_BADGES.get(decision, "")}">{html.escape(decision)}</span>')
    for block in content.blocks:
        body += _section(block, images)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(content.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n<footer>Written by lightning-methods study.</footer></main></body></html>\n"
    )


def findings(analysis: Analysis) -> dict[str, Any]:
    """Return the study's result for machines: what was compared, how, and what came out."""
    s = analysis.settings
    return _plain(
        {
            "study": {k: v for k, v in asdict(s).items() if k not in ("engine", "wandb")},
            "decision": analysis.decision,
            "comparisons": [
                {
                    "a": c.a,
                    "b": c.b,
                    "decision": c.decision,
                    "sentence": c.sentence(s.metric),
                    "incomplete": c.incomplete,
                    "verdict": None if c.verdict is None else asdict(c.verdict),
                    "difference": None if c.difference is None else c.difference._asdict(),
                    "power": None if c.power is None else c.power._asdict(),
                    "shared": c.shared,
                    "unpaired": c.unpaired,
                    "examples": None if c.examples is None else {k: v._asdict() for k, v in c.examples.items()},
                }
                for c in analysis.comparisons
            ],
            "pipelines": analysis.summary,
            "best": analysis.best,
            "components": {n: {k: v._asdict() for k, v in d.items()} for n, d in analysis.components.items()},
            "sobol": {
                n: None if d is None else {k: v._asdict() for k, v in d.items()} for n, d in analysis.sobol.items()
            },
            "ranking": None if analysis.ranking is None else analysis.ranking._asdict(),
            "problems": analysis.problems,
            "notices": analysis.notices,
            "stale": analysis.stale,
            "environments": analysis.environments,
            "seconds": analysis.seconds,
        }
    )


def runs_table(analysis: Analysis) -> tuple[list[str], list[list[Any]]]:
    """Return all runs of the design with seeds, metrics and fingerprints, as columns and rows."""
    metrics = sorted({k for _, run in analysis.rows for k in run.metrics or {}})
    seeds = list(dict.fromkeys(k for _, run in analysis.rows for k in run.seeds))
    prints = list(dict.fromkeys(k for _, run in analysis.rows for k in run.fingerprints or {}))
    columns = ["run_id", "pipeline", "pipeline_hash", "part", "replicate", "status", "attempt", "seconds", "error"]
    columns += [f"seed.{k}" for k in seeds] + metrics + [f"fingerprint.{k}" for k in prints]
    rows = [
        [
            *(run.run_id, run.pipeline, run.pipeline_hash, part, replicate),
            *(run.status, run.attempt, run.seconds, run.error),
            *(run.seeds.get(k) for k in seeds),
            *((run.metrics or {}).get(k) for k in metrics),
            *((run.fingerprints or {}).get(k) for k in prints),
        ]
        for (part, replicate), run in analysis.rows
    ]
    return columns, rows


def _write_runs(path: Path, analysis: Analysis) -> None:
    columns, rows = runs_table(analysis)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _section(block: Block, images: Mapping[str, bytes]) -> Iterator[str]:
    yield f"<section><h2>{html.escape(block.title)}</h2>"
    if block.folded:
        yield "<details><summary>show</summary>"
    yield from (f"<p>{html.escape(text)}</p>" for text in block.paragraphs)
    if block.items:
        yield "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>"
    if block.table is not None:
        yield _html_table(block.table)
    for name in block.figures:
        data = base64.b64encode(images[name]).decode()
        yield f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></figure>'
    if block.code:
        yield f"<pre>{html.escape(block.code)}</pre>"
    yield "</details></section>" if block.folded else "</section>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    rows = ("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _markdown_table(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """Return nested values as JSON takes them; a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
