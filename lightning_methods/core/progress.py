"""A progress phase for work outside of Lightning's own loops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lightning_methods.core._lightning import rank_zero_info

_WORTH_SHOWING = 1.0  # seconds


@contextmanager
def phase(trainer: Any, description: str, total: int | None = None) -> Iterator[Callable[[], object]]:
    """Show that extra work goes on, and yield what to call after each step of it.

    Nothing is shown for work of less than a second, on other ranks than 0, in a barebones run, or where the trainer's
    progress bar is disabled. Longer work has a bar of its own while it lasts and leaves one line.

    Args:
        trainer: the trainer whose progress bar decides.
        description: what is done, for instance "DeepKNN: reading the training set".
        total: the number of steps, if known.
    """
    bar = trainer.progress_bar_callback
    shown = bar is not None and getattr(bar, "is_enabled", True) and trainer.is_global_zero
    start = time.monotonic()
    # two live displays tear each other: beside a rich one only the line at the end is printed
    beside_rich = any("rich" in kind.__module__ for kind in type(bar).__mro__)
    with tqdm(
        desc=description, total=total, leave=False, delay=_WORTH_SHOWING, disable=not shown or beside_rich
    ) as own_bar:
        yield own_bar.update
    seconds = time.monotonic() - start
    if shown and seconds > _WORTH_SHOWING:
        rank_zero_info(f"{description}: {seconds:.1f} s")
