"""One small class a kind of logger: how it takes a figure, a table and a text.

Loggers are told apart by what they can do, never by their class, so that subclasses and both Lightning families work
and no logging package is imported here.
"""

from __future__ import annotations

import csv
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_methods.errors import UnsupportedTraining

Rows = Sequence[Sequence[object]]


class LoggerSink(ABC):
    """What a logger can be given; `figure`, `table` and `text` return the file they wrote, if any."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def key(self, key: str) -> str:
        """Return `key` with the logger's own prefix, as its metrics bear it."""
        prefix = getattr(self.logger, "_prefix", "")
        return f"{prefix}{getattr(self.logger, 'LOGGER_JOIN_CHAR', '-')}{key}" if prefix else key

    @abstractmethod
    def figure(self, key: str, figure: Figure, step: int) -> Path | None:
        """Show a figure."""

    @abstractmethod
    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> Path | None:
        """Show a table."""

    @abstractmethod
    def text(self, key: str, text: str, step: int) -> Path | None:
        """Show a text."""


class WandbSink(LoggerSink):
    """Weights & Biases through `WandbLogger`, which leaves W&B's own step alone."""

    def key(self, key: str) -> str:  # WandbLogger.log_metrics adds the prefix itself
        return key

    def figure(self, key: str, figure: Figure, step: int) -> None:
        # an array, since wandb imports pyplot for a figure
        self.logger.log_image(key, [render(figure)], step=step)

    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        self.logger.log_table(key, columns=list(columns), data=uniform_columns(rows), step=step)

    def text(self, key: str, text: str, step: int) -> None:
        self.logger.log_text(key, columns=["text"], data=[[text]], step=step)


class TensorBoardSink(LoggerSink):
    """TensorBoard: pictures, and Markdown for tables and texts."""

    def figure(self, key: str, figure: Figure, step: int) -> None:
        # add_figure would import pyplot
        self.logger.experiment.add_image(key, render(figure), step, dataformats="HWC")

    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        self.logger.experiment.add_text(key, markdown_table(columns, rows), step)

    def text(self, key: str, text: str, step: int) -> None:
        self.logger.experiment.add_text(key, text, step)


class MLflowSink(LoggerSink):
    """MLflow: artifacts of the run (its log_table would need pandas, a CSV artifact is previewed as a table)."""

    def figure(self, key: str, figure: Figure, step: int) -> None:
        self.logger.experiment.log_figure(self.logger.run_id, figure, artifact_name(key, step, "png"))

    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, csv_text(columns, rows), artifact_name(key, step, "csv"))

    def text(self, key: str, text: str, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, text, artifact_name(key, step, "md"))


class CometSink(LoggerSink):
    """Comet: figures, tables and texts of the experiment."""

    def figure(self, key: str, figure: Figure, step: int) -> None:
        self.logger.experiment.log_figure(figure_name=key, figure=figure, step=step)

    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        name = artifact_name(key, step, "csv")
        self.logger.experiment.log_table(name, tabular_data=[list(row) for row in rows], headers=list(columns))

    def text(self, key: str, text: str, step: int) -> None:
        self.logger.experiment.log_text(text, step=step, metadata={"key": key})


class FileSink(LoggerSink):
    """Files `<folder>/<key>_<step>.png|csv|md`, for loggers that take numbers only and for runs without a logger."""

    def __init__(self, folder: str) -> None:
        super().__init__(None)
        self.folder = folder

    def figure(self, key: str, figure: Figure, step: int) -> Path:
        path = self._path(key, step, "png")
        figure.savefig(path, dpi=DPI)
        return path

    def table(self, key: str, columns: Sequence[str], rows: Rows, step: int) -> Path:
        return self._write(self._path(key, step, "csv"), csv_text(columns, rows))

    def text(self, key: str, text: str, step: int) -> Path:
        return self._write(self._path(key, step, "md"), text if text.endswith("\n") else text + "\n")

    @staticmethod
    def _write(path: Path, text: str) -> Path:
        path.write_bytes(text.encode())  # bytes: Windows would double the line ends of CSV
        return path

    def _path(self, key: str, step: int, extension: str) -> Path:
        if "://" in self.folder:
            raise UnsupportedTraining(
                f"files cannot be written to the remote folder {self.folder!r}; add a logger that takes them, "
                "such as WandbLogger or TensorBoardLogger"
            )
        path = Path(os.path.expandvars(self.folder)).expanduser() / artifact_name(key, step, extension)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


DPI = 130


def sink_for(logger: object) -> LoggerSink | None:
    """Return how a logger takes figures, tables and texts, or None where it takes numbers only."""
    kind = type(logger)
    if all(callable(getattr(kind, name, None)) for name in ("log_image", "log_table", "log_text")):
        return WandbSink(logger)
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_image", None)) and callable(getattr(experiment, "add_text", None)):
        return TensorBoardSink(logger)
    if callable(getattr(experiment, "log_figure", None)) and callable(getattr(experiment, "log_text", None)):
        return MLflowSink(logger) if hasattr(kind, "run_id") else CometSink(logger)
    return None


def uniform_columns(rows: Rows) -> list[list[object]]:
    """Return the rows with columns that mix text and numbers turned into text, since W&B refuses these."""
    columns = list(zip(*rows, strict=True))
    kinds = [{isinstance(cell, str) for cell in column if cell is not None} for column in columns]
    mixed = [len(kind) > 1 for kind in kinds]
    return [[str(cell) if mix else cell for cell, mix in zip(row, mixed, strict=True)] for row in rows]


def render(figure: Figure) -> Any:
    """Return the figure as an `(H, W, 3)` array of bytes, drawn without pyplot."""
    own_canvas, own_dpi = figure.canvas, figure.dpi
    try:
        canvas = FigureCanvasAgg(figure)
        figure.dpi = DPI
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
    finally:
        figure.dpi = own_dpi
        figure.set_canvas(own_canvas)


def artifact_name(key: str, step: int, extension: str) -> str:
    """Return `<key>_<step>.<extension>` with every part of the key safe as a file name; `/` makes folders."""
    parts = [re.sub(r"[^\w.\-+=@]+", "_", part).strip("._ ")[:120] for part in key.split("/")]
    return f"{'/'.join(part for part in parts if part) or 'report'}_{step}.{extension}"


def csv_text(columns: Sequence[str], rows: Rows) -> str:
    """Return a table as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """Return a table as Markdown, numbers to four digits."""
    lines = [columns, ["---"] * len(columns), *([_shown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _shown(cell: object) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)
    return text.replace("\n", "<br>")
