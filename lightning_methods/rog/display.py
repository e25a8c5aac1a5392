"""The figures and tables that the callback shows at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_methods.report import curves, heatmap, log_figure, log_table
from lightning_methods.rog.audit import LabelAudit
from lightning_methods.rog.ensemble import LayerEnsemble

_LISTED = 50  # suspected mislabels in the table
_SHOWN_AS = {"softmax": "softmax", "accuracy": "RoG"}


def show(
    trainer: Any,
    key: str,
    audit: LabelAudit,
    ensemble: LayerEnsemble,
    history: Mapping[str, list[tuple[int, float]]],
) -> list[Path]:
    """Send what was found to the loggers, and return the files where there is none that takes pictures."""
    paths = log_figure(trainer, f"{key}/transition", audit.transition_figure())
    paths += log_figure(trainer, f"{key}/distances", audit.distance_figure())
    columns, rows = audit.table(_LISTED)
    paths += log_table(trainer, f"{key}/suspected_mislabels", columns, rows)
    weights = dict(zip(ensemble.names, ensemble.weights.tolist(), strict=True))
    paths += log_table(trainer, f"{key}/layers", ["layer", "weight"], [list(w) for w in weights.items()])
    shares = [list(weights.values())]
    weighed = heatmap(shares, ["weight"], list(weights), title="Layer weights", vmin=0.0, vmax=1.0)
    paths += log_figure(trainer, f"{key}/weights", weighed)
    if len(next(iter(history.values()), [])) > 1:
        lines = {_SHOWN_AS[name]: ([e for e, _ in s], [v for _, v in s]) for name, s in history.items()}
        meter = curves(lines, title="Memorisation", x_label="epoch", y_label="agreement with validation labels")
        paths += log_figure(trainer, f"{key}/memorisation", meter)
    return paths
