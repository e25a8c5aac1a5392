"""Speed and memory of augmented dropout beside standard dropout, in the same process.

    python benchmarks/augmented_dropout.py
    python benchmarks/augmented_dropout.py --device cuda --markdown benchmarks/results/augmented_dropout_cuda.md

There is no other implementation to compare with: the peers are `F.dropout`, `F.dropout` before the layer, and the
two-pass form of the definition.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from timing import (
    TIMING_COLUMNS,
    Table,
    compare,
    environment,
    gate,
    synchronize,
    timing_of,
    timing_rows,
    write_markdown,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_methods import AugmentedDropout, Classifier
from lightning_methods.augmented_dropout import dual_conv, dual_dropout, dual_linear
from lightning_methods.models import MLP

FORWARD, BACKWARD = 0.5, 0.3


def forward_backward(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        gradient = torch.ones_like(function(*leaves))

    def work() -> object:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    return work


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return how many bytes an element a function keeps for its backward pass, beyond its input."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
    saved.pop(x.untyped_storage().data_ptr(), None)
    return sum(saved.values()) / y.numel()


# -- 1. dropout alone --------------------------------------------------------------------------------------------------


def local(device: str, rounds: int, gates: Table) -> list[Table]:
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "F.dropout": lambda x: F.dropout(x, FORWARD),
        "dual_dropout, nested": lambda x: dual_dropout(x, FORWARD, BACKWARD),
        "dual_dropout, independent": lambda x: dual_dropout(x, FORWARD, BACKWARD, coupling="independent"),
        "dual_dropout, backward pass only": lambda x: dual_dropout(x, 0.0, BACKWARD),
    }
    gated = "dual_dropout, nested"
    if device == "cuda":
        gated = "dual_dropout, nested, compiled"
        forms[gated] = torch.compile(lambda x: dual_dropout(x, FORWARD, BACKWARD))
        forms["F.dropout, compiled"] = torch.compile(lambda x: F.dropout(x, FORWARD))
    tables = []
    for power in (18, 20, 22, 24) if device == "cuda" else (18, 20, 22):
        x = torch.randn(2 ** (power - 10), 1024, device=device, requires_grad=True)
        timings = compare({n: forward_backward(f, x) for n, f in forms.items()}, device=device, rounds=rounds)
        table = Table(
            f"1. Dropout alone, forward and backward, 2^{power} elements",
            ["", *TIMING_COLUMNS, "bytes kept an element"],
        )
        for name, row in timing_rows(timings).items():
            table.rows.append([name, *row, f"{saved_bytes(forms[name], x):.2f}"])
        tables.append(table)
        limit = 1.15 if device == "cuda" else 1.10
        ratio = timings[gated].median / timings["F.dropout"].median
        if device == "cpu" or power == 24:
            gates.rows.append([f"{gated} / F.dropout, 2^{power}", f"{ratio:.2f}", f"{limit}", gate(ratio, limit)])
        kept = saved_bytes(forms["dual_dropout, nested"], x)
        gates.rows.append([f"bytes kept an element, 2^{power}", f"{kept:.2f}", "1", gate(kept, 1.0)])
    return tables


# -- 2. dropout and the layer after it ---------------------------------------------------------------------------------


class _UseValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, with_graph: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def two_passes(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the value at one mask and the gradients at the other, for any layer, at the cost of a second pass."""
    u = torch.rand_like(x, dtype=torch.float32)
    with torch.no_grad():
        value = layer(x * (u >= FORWARD) / (1 - FORWARD))
    return _UseValue.apply(layer(x * (u >= BACKWARD) / (1 - BACKWARD)), value)


def layers(device: str, rounds: int, gates: Table) -> list[Table]:
    tables = []
    for batch, width in ((64, 512), (256, 1024), (1024, 1024)):
        x = torch.randn(batch, width, device=device, requires_grad=True)
        layer = nn.Linear(width, width, device=device)
        forms: dict[str, Callable[..., Tensor]] = {
            "F.dropout, F.linear": lambda x, w, b: F.linear(F.dropout(x, FORWARD), w, b),
            "dual_linear": lambda x, w, b: dual_linear(x, w, b, FORWARD, BACKWARD),
            "dual_linear, errors only": lambda x, w, b: dual_linear(x, w, b, FORWARD, BACKWARD, weight_grad="forward"),
            "two passes": lambda x, w, b: two_passes(lambda t: F.linear(t, w, b), x),
        }
        leaves = (x, layer.weight, layer.bias)
        timings = compare({n: forward_backward(f, *leaves) for n, f in forms.items()}, device=device, rounds=rounds)
        table = Table(f"2. Dropout and Linear({width}, {width}), batch {batch}", ["", *TIMING_COLUMNS])
        table.rows += [[name, *row] for name, row in timing_rows(timings).items()]
        tables.append(table)
        ratio = timings["dual_linear"].median / timings["F.dropout, F.linear"].median
        limit = 1.25
        name = f"dual_linear / dropout and Linear, {batch} x {width}"
        gates.rows.append([name, f"{ratio:.2f}", f"{limit}", gate(ratio, limit)])
    x = torch.randn(16, 64, 32, 32, device=device, requires_grad=True)
    conv = nn.Conv2d(64, 64, 3, padding=1, device=device)
    forms = {
        "F.dropout, F.conv2d": lambda x, w, b: F.conv2d(F.dropout(x, FORWARD), w, b, padding=1),
        "dual_conv": lambda x, w, b: dual_conv(x, w, b, FORWARD, BACKWARD, padding=1),
        "two passes": lambda x, w, b: two_passes(lambda t: F.conv2d(t, w, b, padding=1), x),
    }
    leaves = (x, conv.weight, conv.bias)
    timings = compare({n: forward_backward(f, *leaves) for n, f in forms.items()}, device=device, rounds=rounds)
    table = Table("2. Dropout and Conv2d(64, 64, 3), 16 maps of 32 x 32", ["", *TIMING_COLUMNS])
    table.rows += [[name, *row] for name, row in timing_rows(timings).items()]
    return [*tables, table]


# -- 3. the callback ---------------------------------------------------------------------------------------------------


class StepTimes(pl.Callback):
    """Collect the time from the end of one training batch to that of the next."""

    def __init__(self, device: str, skipped: int = 20) -> None:
        self.device = device
        self.skipped = skipped
        self.milliseconds: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Take the time."""
        synchronize(self.device)
        now = time.perf_counter()
        if args[-1] > self.skipped:
            self.milliseconds.append(1e3 * (now - self.last))
        self.last = now


SETTINGS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "equal rates": {},
    "0.5 / 0.3": {"p_forward": FORWARD, "p_backward": BACKWARD},
    "0.5 / 0.3, errors only": {"p_forward": FORWARD, "p_backward": BACKWARD, "weight_grad": "forward"},
    "0.5 / 0.3, F.dropout patched": {"p_forward": FORWARD, "p_backward": BACKWARD, "functional": "patch"},
    "0.5 / 0.3, compared in every batch": {
        "p_forward": FORWARD,
        "p_backward": BACKWARD,
        "compare_every_n_steps": 1,
    },
}


def overhead(device: str, rounds: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(100, 784, generator=generator), torch.randint(10, (100,), generator=generator)) for _ in range(120)
    ]
    loader = DataLoader(batches, batch_size=None)
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, settings in SETTINGS.items():
            found[name].append(timing_of(step_times(settings, loader, device)).median)
    table = Table(
        "3. The callback: MLP(784, (512, 512)) with two dropouts, batch 100",
        ["", "ms/step", "added"],
        note=f"A whole training step of a Trainer: the median over 99 steps, of which the smallest of {rounds} "
        "trainings that took turns.",
    )
    for name, medians in found.items():
        table.rows.append([name, f"{min(medians):.2f}", f"{min(medians) - min(found['without']):+.2f}"])
    return table


def step_times(settings: dict[str, Any] | None, loader: DataLoader, device: str) -> list[float]:
    torch.manual_seed(0)
    timer = StepTimes(device)
    callbacks: list[pl.Callback] = [timer]
    if settings is not None:
        callbacks.append(AugmentedDropout(**settings))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(MLP(784, (512, 512), dropout=0.5)), loader)
    return timer.milliseconds


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--markdown", help="also write the tables to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    gates = Table("Limits", ["", "measured", "limit", ""])
    tables = [*local(options.device, options.rounds, gates), *layers(options.device, options.rounds, gates)]
    tables += [overhead(options.device, rounds=3), gates]
    for table in tables:
        table.show()
    if options.markdown:
        command = f"python benchmarks/augmented_dropout.py --device {options.device} --markdown {options.markdown}"
        about = environment(options.device, ["torch", "lightning"])
        other = "cuda" if options.device == "cpu" else "cpu"
        about += [f"- `{command}`", f"- rows for `--device {other}` are not part of this run"]
        write_markdown(options.markdown, "Augmented dropout: speed and memory", about, tables)


if __name__ == "__main__":
    main()
