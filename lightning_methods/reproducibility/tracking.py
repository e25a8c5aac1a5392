"""A study in W&B, also offline: one run a replicate in a group, and a summary with tables, figures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_methods.errors import require
from lightning_methods.reproducibility.analysis import Analysis
from lightning_methods.reproducibility.report import findings, runs_table
from lightning_methods.reproducibility.settings import Settings

# its service may run in another folder, so that paths are absolute;
# a tracked run is over before it is sent: there is no machine to watch and no console to keep, and asking for the
# requirements takes ten times as long as all else
_QUIET = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "disable_git": True,
    "save_code": False,
    "console": "off",
}


def track_study(analysis: Analysis, settings: Settings, files: Sequence[Path]) -> None:
    """Send a study to W&B. Run ids are those of the ledger, so that sending it again updates and does not repeat.

    Args:
        analysis: of the study.
        settings: with `wandb`: `project`, `mode` and further arguments of `wandb.init`.
        files: of the report.

    Raises:
        MissingDependency: without wandb.
    """
    wandb: Any = require("wandb", extra="wandb", why="Tracking a study")
    given: Mapping[str, Any] = {"project": "studies", "dir": str(settings.path.resolve()), **(settings.wandb or {})}
    quiet = wandb.Settings(**{k: v for k, v in _QUIET.items() if k in wandb.Settings.model_fields})
    common = {"settings": quiet, "group": settings.name, "reinit": "finish_previous", "resume": "allow", **given}
    sent: set[str] = set()
    for (part, replicate), run in analysis.rows:
        if run.status != "done" or run.run_id in sent:
            continue
        sent.add(run.run_id)
        tracked = wandb.init(
            id=run.run_id,
            name=f"{run.pipeline}/{part}/{replicate}",
            job_type=run.pipeline,
            config={"seeds": run.seeds, "part": part, "replicate": replicate, "pipeline_hash": run.pipeline_hash},
            **common,
        )
        tracked.log(dict(run.metrics or {}))
        tracked.summary["seconds"] = run.seconds
        for source, value in (run.fingerprints or {}).items():
            tracked.summary[f"fingerprint/{source}"] = value
        tracked.finish()
    summary = wandb.init(id=f"{settings.name}-summary", name="summary", job_type="summary", **common)
    columns, rows = runs_table(analysis)
    logged: dict[str, Any] = {
        "study/runs": wandb.Table(columns=columns, data=[[_cell(x) for x in row] for row in rows])
    }
    told = findings(analysis)
    names = ["a", "b", "decision", "sentence"]
    logged["study/verdicts"] = wandb.Table(columns=names, data=[[c[k] for k in names] for c in told["comparisons"]])
    for file in files:
        if file.suffix == ".png":
            logged[f"study/{file.stem}"] = wandb.Image(str(file))
        elif file.suffix == ".html":
            logged["study/report"] = wandb.Html(file.read_text(encoding="utf-8"))
    summary.log(logged)
    summary.summary["decision"] = analysis.decision
    summary.finish()


def _cell(value: Any) -> Any:
    # a column of a table has one type
    return "" if value is None else value
