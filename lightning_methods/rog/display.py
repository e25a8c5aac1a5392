"""The figures and tables of what was found: in the loggers at the end of a fit, or as files."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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
    paths += log_table(trainer, f"{key}/classes", *audit.by_class())
    paths += log_table(trainer, f"{key}/layers", *layers_of(ensemble))
    paths += log_figure(trainer, f"{key}/weights", layers_figure(ensemble))
    if len(next(iter(history.values()), [])) > 1:
        lines = {_SHOWN_AS[name]: ([e for e, _ in s], [v for _, v in s]) for name, s in history.items()}
        meter = curves(lines, title="Memorisation", x_label="epoch", y_label="agreement with validation labels")
        paths += log_figure(trainer, f"{key}/memorisation", meter)
    return paths


def write_audit(audit: LabelAudit, folder: Path, ensemble: LayerEnsemble | None = None) -> list[Path]:
    """Write what was found of the labels as CSV and pictures, and return the files.

    Args:
        audit: what was found.
        folder: where to; it is made if need be.
        ensemble: whose layers and weights to write too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = [str(c) for c in range(audit.num_classes)]
    shares = [[c, *row] for c, row in zip(classes, audit.transition.tolist(), strict=True)]
    tables = {"suspects": audit.table(), "samples": audit.samples(), "classes": audit.by_class()}
    tables["transition"] = (["class", *classes], shares)
    figures = {"transition": audit.transition_figure(), "distances": audit.distance_figure()}
    if ensemble is not None:
        tables["layers"], figures["layers"] = layers_of(ensemble), layers_figure(ensemble)
    paths = []
    for name, (columns, rows) in tables.items():
        paths.append(folder / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def layers_of(ensemble: LayerEnsemble) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the layers with their weights."""
    return ["layer", "weight"], [[n, w] for n, w in zip(ensemble.names, ensemble.weights.tolist(), strict=True)]


def layers_figure(ensemble: LayerEnsemble) -> Figure:
    """Draw the weights of the layers."""
    return heatmap([ensemble.weights.tolist()], ["weight"], ensemble.names, title="Layer weights", vmin=0.0, vmax=1.0)
