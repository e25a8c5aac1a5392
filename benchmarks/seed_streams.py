"""What SeedStreams adds to a training step.

    python benchmarks/seed_streams.py
    python benchmarks/seed_streams.py --device cuda --markdown benchmarks/results/seed_streams_cuda.md

No other implementation is known: the peer is the plain Trainer, whose step is timed in the same process.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import lightning.pytorch as pl
import torch
from timing import Table, environment, gate, write_markdown
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import Classifier, SeedStreams
from lightning_methods.models import MLP, ConvNet
from lightning_methods.reproducibility import loading

BATCH = 64


class Watched(SeedStreams):
    """Adds up the time that is spent in it while training, the drawing of indices included."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.spent: list[float] = []
        self._now = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_start(*args)
        self._now += time.perf_counter() - start

    def on_train_batch_end(self, *args: Any) -> None:
        """Time the hook, and close the step."""
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        self.spent.append(1e6 * (self._now + time.perf_counter() - start))
        self._now = 0.0

    def _training_step(self, trainer: Any, original: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = super()._training_step(trainer, partial(self.others, original), *args)
        self._now += time.perf_counter() - start
        return result

    def others(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what would be done without it as well, untimed: the step, the sampler's drawing."""
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self._now -= time.perf_counter() - start

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the drawing of indices too."""
        begin, drawn = loading._Batches._begin, loading._Batches.__next__

        def untimed(batches: Any) -> None:
            begin(batches)
            batches.indices = map(self.others, repeat(batches.indices.__next__))

        def timed(batches: Any) -> Any:
            start = time.perf_counter()
            try:
                return drawn(batches)
            finally:
                self._now += time.perf_counter() - start

        loading._Batches._begin, loading._Batches.__next__ = untimed, timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            loading._Batches._begin, loading._Batches.__next__ = begin, drawn  # type: ignore[method-assign]


class Steps(pl.Callback):
    """Times whole steps, from one batch's end to the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(1e6 * time.perf_counter())


def fit(network: Any, data: DataLoader[Any], callbacks: list[Any], device: str) -> None:
    """Train for an epoch with nothing beside."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    accelerator = "gpu" if device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, accelerator=accelerator, devices=1, default_root_dir=folder, callbacks=callbacks, **quiet
        )
        trainer.fit(Classifier(network), data)


def steps(network: Any, shape: tuple[int, ...], count: int, device: str) -> tuple[Table, float, float]:
    """Return a table, and for light fingerprints the microseconds a step and the share of a plain one."""
    data = DataLoader(TensorDataset(torch.randn(BATCH * count, *shape), torch.arange(BATCH * count) % 10), BATCH, True)
    whole = Steps()
    fit(network, data, [whole], device)
    plain = statistics.median(b - a for a, b in pairwise(whole.ends))
    title = (
        f"{type(network).__name__}, {tuple(shape)}, batch {BATCH}: a plain step takes {1e-3 * plain:.2f} ms (median)"
    )
    table = Table(title, ["fingerprint", "in SeedStreams, median microseconds a step", "IQR", "share of a step"])
    light = 0.0
    for form in ("off", "light", "full"):
        streams = Watched(fingerprint=form)
        with streams.watching():
            fit(network, data, [streams], device)
        low, median, high = statistics.quantiles(streams.spent[5:], n=4)
        table.rows.append([form, f"{median:.0f}", f"{high - low:.0f}", f"{median / plain:.4f}"])
        light = median if form == "light" else light
    return table, light, light / plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--markdown", help="file to write the tables to")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    small, _, _ = steps(MLP(64, hidden=[8]), (64,), 400, args.device)
    conv, added, share = steps(ConvNet((1, 28, 28), width=0.25), (1, 28, 28), 100, args.device)
    limits = Table("Limits, ConvNet, light fingerprints", ["", "measured", "limit", ""])
    limits.rows.append(["microseconds a step", f"{added:.0f}", "50", gate(added, 50)])
    limits.rows.append(["share of a step", f"{share:.4f}", "0.01", gate(share, 0.01)])
    tables = (small, conv, limits)
    for table in tables:
        table.show()
    if args.markdown:
        command = f"- `python benchmarks/seed_streams.py --device {args.device} --markdown {args.markdown}`"
        about = [*environment(args.device, ("torch", "lightning")), command]
        write_markdown(args.markdown, "Seed streams: what they cost", about, tables)


if __name__ == "__main__":
    main()
