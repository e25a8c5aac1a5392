"""Figures that nobody looks at: to build and draw them takes longer than the tests' trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_methods.report import figures


class _Nothing:
    """Axes, and whatever their methods return."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getitem__(self, _: Any) -> _Nothing:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _subplots(figure: Figure, rows: int = 1, columns: int = 1, *, squeeze: bool = True, **_: Any) -> Any:
    axes = np.full((rows, columns), _Nothing(), dtype=object)
    return axes.squeeze()[()] if squeeze else axes


def _touch(figure: Figure, path: Path | str, **_: Any) -> None:
    Path(path).touch()


def leave_undrawn(replace: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Write empty files in place of figures from now on; `monkeypatch.setattr` ends it with the test."""
    replace(Figure, "savefig", _touch)
    replace(Figure, "subplots", _subplots)
    for owner, name in (
        (Figure, "add_subplot"),
        (Figure, "colorbar"),
        (Figure, "legend"),
        (figures, "_label_right"),  # these calculate with what the axes tell them
        (figures, "_write_values"),
    ):
        replace(owner, name, lambda *_, **__: _Nothing())
