"""What a study's report says, as blocks that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_methods.reproducibility.analysis import Analysis, Comparison

_SHOWN_RUNS = 400


@dataclass(frozen=True)
class Table:
    """Columns and rows, numbers already as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """A part of the report: a heading, and below it what there is of paragraphs, a list, a table, figures and code."""

    title: str
    paragraphs: Sequence[str] = ()
    items: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[str] = ()
    code: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Content:
    """The report: a title, the answers as decision and sentence, and its parts."""

    title: str
    answers: list[tuple[str, str]]
    blocks: list[Block] = field(default_factory=list)


def content_of(analysis: Analysis, figures: Sequence[str]) -> Content:
    """Return what the report says.

    Args:
        analysis: of the study.
        figures: names of the figures there are.
    """
    s = analysis.settings
    blocks = [
        Block("Verdict", _verdict_paragraphs(analysis), figures=_named(figures, "scores", "differences")),
        Block("Pipelines", table=_summary_table(analysis), figures=_named(figures, "profiles", "ranks")),
    ]
    if analysis.problems:
        blocks.insert(1, Block("Problems", items=analysis.problems))
    if analysis.components or any(analysis.sobol.values()) or s.design == "sobol":
        blocks.append(_sources_block(analysis, figures))
    blocks.append(Block("How many runs", _power_paragraphs(analysis), figures=_named(figures, "power")))
    blocks.append(Block("What was varied, and what was not", _design_paragraphs(analysis), items=analysis.notices))
    blocks.append(Block("What was reproduced", items=_levels(analysis)))
    if analysis.comparisons:
        blocks.append(Block("How to report it", [reporting_paragraph(analysis)], code=latex_table(analysis)))
    blocks.append(Block("Checklist", items=_checklist(analysis)))
    blocks.append(Block("Environment", table=_environment_table(analysis)))
    if analysis.stale:
        rows = [[name, key, str(count)] for name, key, count in analysis.stale]
        blocks.append(Block("Runs of earlier configurations", table=Table(["pipeline", "hash", "runs"], rows)))
    blocks.append(Block("Runs", _omitted(analysis), table=_runs_table(analysis), folded=True))
    answers = [(c.decision, c.sentence(s.metric)) for c in analysis.comparisons]
    return Content(f"Study: {s.name}", answers or [(analysis.decision, _alone(analysis))], blocks)


def reporting_paragraph(analysis: Analysis) -> str:
    """Return a paragraph for a paper's section on experiments."""
    s = analysis.settings
    varied = ", ".join(s.vary)
    parts = []
    for c in analysis.comparisons:
        if c.verdict is None or c.difference is None:
            continue
        v, d = c.verdict, c.difference
        level = f"{100 * (1 - v.alpha):g}%"
        parts.append(
            f"We trained {c.a} and {c.b} {v.runs} times each, in pairs that share the seeds of {varied}. {c.a} was "
            f"better in {v.wins} pairs, worse in {v.losses} and equal in {v.ties}: paired P({c.a}>{c.b}) = "
            f"{v.probability:.3f} ({level} percentile bootstrap interval {v.low:.3f} to {v.high:.3f}; "
            f"{v.unpaired_probability:.3f} over all combinations of runs), mean difference {d.estimate:+.4g} "
            f"(t-interval {d.low:+.4g} to {d.high:+.4g}). By the procedure of Bouthillier et al. (2021) with gamma "
            f"= {v.gamma:g}: {c.decision}."
        )
    return " ".join(parts) or "No pair of runs is finished."


def latex_table(analysis: Analysis) -> str:
    """Return the comparison as a LaTeX table."""
    rows = []
    for name in analysis.names:
        m = analysis.summary[name]
        if not m["runs"]:
            continue
        c = next((c for c in analysis.comparisons if c.a == name), None)
        found = (
            "--"
            if c is None or c.verdict is None
            else f"{c.verdict.probability:.2f} [{c.verdict.low:.2f}, {c.verdict.high:.2f}]"
        )
        rows.append(f"{_tex(name)} & ${m['mean']:.4f} \\pm {m['std']:.4f}$ & {int(m['runs'])} & {found} \\\\")
    reference = f"$P(\\cdot > \\mathrm{{{_tex(analysis.names[-1])}}})$"
    head = f"pipeline & {_tex(analysis.settings.metric)} & runs & {reference} \\\\"
    return "\n".join(["\\begin{tabular}{lccc}", "\\hline", head, "\\hline", *rows, "\\hline", "\\end{tabular}"])


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "_&%#$" else c for c in text)


def _named(figures: Sequence[str], *prefixes: str) -> list[str]:
    return [name for prefix in prefixes for name in figures if name.partition("_")[0] == prefix]


def _alone(analysis: Analysis) -> str:
    name = analysis.names[0]
    m = analysis.summary[name]
    if not m["runs"]:
        return f"{name} alone, {analysis.settings.design}: nothing to compare it with."
    return f"{name}: {analysis.settings.metric} {m['mean']:.4f} ± {m['std']:.4f} over {int(m['runs'])} runs."


def _verdict_paragraphs(analysis: Analysis) -> list[str]:
    if not analysis.comparisons:
        return []
    found = []
    for c in analysis.comparisons:
        if c.verdict is not None:
            found.append(_parameters(c))
        if c.examples is not None:
            e = c.examples
            found.append(
                f"Mean difference over runs [{e['runs'].low:+.4f}, {e['runs'].high:+.4f}], over test examples "
                f"[{e['examples'].low:+.4f}, {e['examples'].high:+.4f}], over both [{e['both'].low:+.4f}, "
                f"{e['both'].high:+.4f}]. Where that over examples is the wide one, a larger test set would help, not "
                "more seeds."
            )
    if len(analysis.comparisons) > 1:
        found.append(
            f"Levels are divided by the {len(analysis.comparisons)} comparisons (Bonferroni). Not to be told from the "
            f"best: {', '.join(analysis.best)}."
        )
    return found


def _parameters(c: Comparison) -> str:
    v = c.verdict
    assert v is not None
    rho = "not defined, as one side does not vary" if v.correlation is None else f"{v.correlation:.2f}"
    score = "" if v.wilson is None else f" Score (Wilson) interval of the wins [{v.wilson[0]:.3f}, {v.wilson[1]:.3f}]."
    other = f"P({c.b}>{c.a}) = {1 - v.probability:.3f} descriptively. " if v.probability < 0.5 else ""
    return (
        f"The verdict is about the paired P({c.a}>{c.b}) = {v.probability:.3f}; over all combinations of runs, "
        f"unpaired, it is {v.unpaired_probability:.3f}. {other}The scores of pairs correlate with rho {rho}.{score} "
        f"Wins, ties, losses: {v.wins}, {v.ties}, {v.losses}."
    )


def _summary_table(analysis: Analysis) -> Table:
    rows = []
    for name in analysis.names:
        m = analysis.summary[name]
        if not m["runs"]:
            rows.append([name, "0", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{int(m['runs'])}",
                f"{m['mean']:.4f}",
                f"{m['std']:.4f}",
                f"{m['iqm']:.4f} [{m['iqm_low']:.4f}, {m['iqm_high']:.4f}]",
                f"{m['min']:.4f} to {m['max']:.4f}",
            ]
        )
    columns = ["pipeline", "runs", "mean", "standard deviation", "interquartile mean", "range"]
    return Table(columns, rows)


def _sources_block(analysis: Analysis, figures: Sequence[str]) -> Block:
    if analysis.components:
        rows = [
            [
                name,
                source,
                f"{c.std:.5f} [{c.low:.5f}, {c.high:.5f}]",
                "n/a" if c.share is None else f"{100 * c.share:.0f}%",
                str(c.runs),
            ]
            for name, found in analysis.components.items()
            for source, c in found.items()
        ]
        columns = ["pipeline", "source", "standard deviation alone", "of that of split", "runs"]
        text = (
            "Each source varies alone, all others fixed; intervals are of chi-square, for normal scores. These do "
            "not add up: sources interact, and the fixed ones were fixed at one value."
        )
        return Block("Sources of variation", [text], table=Table(columns, rows), figures=_named(figures, "sources"))
    rows = []
    for name, indices in analysis.sobol.items():
        if indices is None:
            rows.append([name, "all", "n/a: the scores do not vary, or rows are missing", "", ""])
            continue
        rows += [
            [
                name,
                source,
                f"{i.first:.2f} [{i.first_interval[0]:.2f}, {i.first_interval[1]:.2f}]",
                f"{i.total:.2f} [{i.total_interval[0]:.2f}, {i.total_interval[1]:.2f}]",
                f"{i.interaction:.2f}",
            ]
            for source, i in indices.items()
        ]
    text = (
        "Sobol indices: what the source explains alone, and what would be left if everything else were controlled. "
        "With few rows the intervals are wide, and a first-order index can be negative."
    )
    columns = ["pipeline", "source", "first order", "total", "interaction"]
    return Block("Sources of variation", [text], table=Table(columns, rows), figures=_named(figures, "sources"))


def _power_paragraphs(analysis: Analysis) -> list[str]:
    found = []
    for c in analysis.comparisons:
        if c.verdict is None:
            continue
        advice = c.advice() or f"{c.a} against {c.b} is decided with {c.verdict.runs} pairs."
        noether = None if c.power is None else c.power.noether
        formula = (
            "" if noether is None else f" Noether's formula, derived for unpaired runs, gives {noether} at this P."
        )
        found.append(advice + formula)
    found.append(
        "The number of runs is to be fixed before the study: adding runs until a verdict is significant finds "
        "differences that are not there."
    )
    return found


def _design_paragraphs(analysis: Analysis) -> list[str]:
    s = analysis.settings
    how = {
        "all": "every replicate changes all of them",
        "one_at_a_time": "each varies alone",
        "sobol": "two columns of seeds and their mixtures",
    }[s.design]
    found = [f"Varied: {', '.join(s.vary)}; {how}. {s.replicates} replicates, root seed {s.root_seed}."]
    for c in analysis.comparisons:
        same = [source for source, shared in (c.shared or {}).items() if shared]
        if same:
            found.append(f"{c.a} and {c.b} drew the same numbers, bit for bit, from: {', '.join(same)}.")
    return found


def _levels(analysis: Analysis) -> list[str]:
    unstable = [p for p in analysis.problems if "not deterministic" in p]
    checked = [r for key, r in analysis.rows if key[0] == "repeat" and r.status == "done"]
    exact = (
        "not tested"
        if not checked
        else "failed, see the problems"
        if unstable
        else "the first run, made twice, is the same"
    )
    return [
        f"Methods (the same seeds give the same numbers): {exact}.",
        f"Results (new seeds give similar values): this study, over {', '.join(analysis.settings.vary)}.",
        "Findings (another setting supports the same conclusion): not tested by one study; repeat it on other data and "
        "with other hyper-parameters.",
    ]


def _checklist(analysis: Analysis) -> list[str]:
    s = analysis.settings
    devices = sorted({e.get("device", "") for e in analysis.environments if e})
    return [
        f"Runs: {s.replicates} replicates a pipeline; seeds derived from {s.root_seed} by hashing.",
        "Error bars: percentile bootstrap over pairs for P(A>B); t-intervals for mean differences; standard deviations "
        "over runs.",
        f"Computing: {analysis.seconds / 3600:.3f} hours in all, on {', '.join(devices) or 'an unknown device'}.",
        f"Chosen by: {s.metric} after {s.stage}, of the {s.checkpoint} weights.",
    ]


def _environment_table(analysis: Analysis) -> Table:
    keys = list(dict.fromkeys(k for e in analysis.environments for k in e))
    columns = [
        "",
        *(
            f"environment {i + 1}" if len(analysis.environments) > 1 else "all runs"
            for i, _ in enumerate(analysis.environments)
        ),
    ]
    return Table(columns, [[k, *(e.get(k, "") for e in analysis.environments)] for k in keys])


def _omitted(analysis: Analysis) -> list[str]:
    count = len(analysis.rows)
    return [f"The first {_SHOWN_RUNS} of {count}; all are in runs.csv."] if count > _SHOWN_RUNS else []


def _runs_table(analysis: Analysis) -> Table:
    rows = []
    for (part, replicate), run in analysis.rows[:_SHOWN_RUNS]:
        value = (run.metrics or {}).get(analysis.settings.metric)
        rows.append(
            [
                run.pipeline,
                part,
                str(replicate),
                run.status,
                "" if value is None else f"{value:.6g}",
                "" if run.seconds is None else f"{run.seconds:.1f}",
                run.run_id,
            ]
        )
    return Table(["pipeline", "part", "replicate", "status", analysis.settings.metric, "seconds", "run"], rows)
