"""What methods share while showing: figures, tables and text to any logger or to files, and the pictures themselves."""

from __future__ import annotations

from lightning_methods.report.fanout import attempt, is_reporting, log_figure, log_table, log_text
from lightning_methods.report.figures import curves, heatmap, histograms, reliability_diagram
from lightning_methods.report.style import BACKGROUND, PALETTE, color_cycle, new_figure, short_names, shorten

__all__ = [
    "BACKGROUND",
    "PALETTE",
    "attempt",
    "color_cycle",
    "curves",
    "heatmap",
    "histograms",
    "is_reporting",
    "log_figure",
    "log_table",
    "log_text",
    "new_figure",
    "reliability_diagram",
    "short_names",
    "shorten",
]
