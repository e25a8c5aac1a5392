"""Figures, tables and text to every logger of a trainer, and to files for the loggers that take none.

Everything here runs on rank zero only and holds no collective (`trainer.log_dir` is one), so a callback may call it
under any condition on any rank.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.report._sinks import FileSink, LoggerSink, sink_for

if TYPE_CHECKING:
    from lightning_methods.core._lightning import Trainer

_Show = Callable[[LoggerSink, str, int], "Path | None"]

# owner (a logger or a trainer) -> the kinds that have already been warned about
_WARNED: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def is_reporting(trainer: Trainer) -> bool:
    """Tell whether a figure, table or text given now would be shown, so that nobody draws one in vain.

    Args:
        trainer: the trainer that runs.

    Example:
        >>> from types import SimpleNamespace
        >>> is_reporting(SimpleNamespace(is_global_zero=False))
        False
    """
    quiet = ("sanity_checking", "fast_dev_run", "barebones")
    return trainer.is_global_zero and not any(getattr(trainer, name, False) for name in quiet)


def log_figure(trainer: Trainer, key: str, figure: Figure, *, step: int | None = None) -> list[Path]:
    """Show a figure in every logger: W&B, TensorBoard, MLflow and Comet take it, the others get a PNG file.

    Nothing is shown on other ranks than zero, while sanity checking, in `fast_dev_run` and in `barebones` mode. A
    logger that fails is warned about once and gets the file instead.

    Args:
        trainer: the trainer that runs; all its loggers are served.
        key: `<method>/<what>`, the name under which loggers group it and the file is stored.
        figure: a `matplotlib.figure.Figure`.
        step: defaults to the step under which Lightning logs metrics at this moment.

    Returns:
        The files written, at most one for each logger.

    Raises:
        InvalidArgument: if `figure` is not a matplotlib figure, or `key` is empty.

    Example:
        >>> log_figure(trainer, "snnl/layers", curves({"conv1": ([0, 1], [2.3, 2.1])}))  # doctest: +SKIP
        [PosixPath('lightning_logs/version_0/snnl/layers_300.png')]
    """
    if not isinstance(figure, Figure):
        raise InvalidArgument(f"log_figure takes a matplotlib.figure.Figure, got {type(figure).__name__}.")
    return _fan_out(trainer, "figure", key, step, lambda sink, name, at: sink.figure(name, figure, at))


def log_table(
    trainer: Trainer, key: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, step: int | None = None
) -> list[Path]:
    """Show a table in every logger: a table in W&B and Comet, Markdown in TensorBoard, otherwise a CSV file.

    Args:
        trainer: the trainer that runs; all its loggers are served.
        key: `<method>/<what>`.
        columns: the names of the columns.
        rows: one sequence a row; tensors and NumPy scalars become plain numbers.
        step: defaults to the step under which Lightning logs metrics at this moment.

    Returns:
        The files written, at most one for each logger.

    Raises:
        ShapeMismatch: if a row is longer or shorter than `columns`.
        InvalidArgument: if `key` is empty.

    Example:
        >>> log_table(trainer, "snnl/final", ["layer", "snnl"], [["conv1", 2.1]])  # doctest: +SKIP
        [PosixPath('lightning_logs/version_0/snnl/final_300.csv')]
    """
    names = [str(column) for column in columns]
    cells = [[_plain(cell) for cell in row] for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(names):
            raise ShapeMismatch(f"Row {number} of table {key!r} has {len(row)} cells for {len(names)} columns {names}.")
    return _fan_out(trainer, "table", key, step, lambda sink, name, at: sink.table(name, names, cells, at))


def log_text(trainer: Trainer, key: str, text: str, *, step: int | None = None) -> list[Path]:
    """Show a text (Markdown is welcome) in every logger that takes one, otherwise in a `.md` file.

    Args:
        trainer: the trainer that runs; all its loggers are served.
        key: `<method>/<what>`.
        text: the text.
        step: defaults to the step under which Lightning logs metrics at this moment.

    Returns:
        The files written, at most one for each logger.

    Raises:
        InvalidArgument: if `text` is not a string, or `key` is empty.

    Example:
        >>> log_text(trainer, "snnl/summary", "Layer **conv1** is the most entangled.")  # doctest: +SKIP
        [PosixPath('lightning_logs/version_0/snnl/summary_300.md')]
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"log_text takes a string, got {type(text).__name__}.")
    return _fan_out(trainer, "text", key, step, lambda sink, name, at: sink.text(name, text, at))


def attempt(owner: object, kind: str, action: Callable[[], Any]) -> tuple[bool, Any]:
    """Run something that may fail without stopping a training, and warn about it once for each owner and kind.

    Args:
        owner: the logger (or trainer) that is to blame.
        kind: what was tried, as in "could not log a <kind>".
        action: called without arguments.

    Returns:
        Whether it worked, and what it returned.

    Example:
        >>> attempt(object, "figure", lambda: 3)
        (True, 3)
    """
    try:
        return True, action()
    except Exception as error:
        told = _told(owner)
        if kind not in told:
            told.add(kind)
            warnings.warn(
                f"{type(owner).__name__} could not log a {kind}: {type(error).__name__}: {error}. "
                "The training goes on; this is said once.",
                LightningMethodsWarning,
            )
        return False, None


def _told(owner: object) -> set[str]:
    try:
        return _WARNED.setdefault(owner, set())
    except TypeError:  # neither hashable nor weakly referenced: once for all of its class
        return _WARNED.setdefault(type(owner), set())


def _fan_out(trainer: Trainer, kind: str, key: str, step: int | None, show: _Show) -> list[Path]:
    if not key.strip("/ "):
        raise InvalidArgument(f"A {kind} needs a key such as 'method/what', got {key!r}.")
    if not is_reporting(trainer):
        return []
    at = _current_step(trainer) if step is None else step
    paths: dict[Path, None] = {}
    owners: list[object | None] = [*trainer.loggers]
    for logger in owners or [None]:
        if logger is not None and _given(logger, kind, key, at, show):
            continue
        # what a logger does not show is kept as a file rather than lost
        folder = _folder(trainer, logger)
        _, path = attempt(trainer, f"{kind} file", partial(show, FileSink(folder), key, at))
        if path is not None:
            paths[path] = None
    return list(paths)


def _given(logger: object, kind: str, key: str, step: int, show: _Show) -> bool:
    """Give it to the logger; False where the logger takes none or failed."""

    def action() -> bool:
        sink = sink_for(logger)
        if sink is None:
            return False
        show(sink, sink.key(key), step)
        return True

    return bool(attempt(logger, kind, action)[1])


def _current_step(trainer: Trainer) -> int:
    """Return the step that Lightning's own metrics carry, so that pictures and curves line up in a logger."""
    # global_step counts every optimizer; Lightning logs under the number of batches that stepped
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _folder(trainer: Trainer, logger: object | None) -> str:
    """Return the run's folder without `trainer.log_dir`, which broadcasts and would hang on one rank."""
    for attribute in ("log_dir", "save_dir"):
        folder = getattr(logger, attribute, None)
        if isinstance(folder, (str, Path)) and str(folder):
            return str(folder)
    return str(trainer.default_root_dir)


def _plain(cell: object) -> object:
    """Return a cell as str, int, float, bool or None, which is what every logger's table takes."""
    if hasattr(cell, "item"):  # a tensor, an array or a NumPy scalar
        with contextlib.suppress(RuntimeError, ValueError):  # more than one element
            cell = cell.item()
    return cell if cell is None or isinstance(cell, (str, bool, int, float)) else str(cell)
