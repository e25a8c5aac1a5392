"""Speed, memory and correctness of the soft nearest neighbour loss beside its peers, in the same process.

    python benchmarks/snnl.py
    python benchmarks/snnl.py --device cuda --markdown benchmarks/results/snnl_cuda.md

Needs the `bench` and `digits` extras. Limits are reported as ok or missed; nothing fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from timing import (
    MEGABYTE,
    TIMING_COLUMNS,
    Table,
    compare,
    environment,
    extra_memory,
    gate,
    in_fresh_process,
    synchronize,
    timing_of,
    timing_rows,
    write_markdown,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_methods import SoftNearestNeighborLoss
from lightning_methods.data import DigitsDataModule
from lightning_methods.models import MLP, Classifier, SmallConvNet
from lightning_methods.snnl import median_temperature, optimal_temperature, soft_nearest_neighbor_loss

CLASSES = 10
Loss = Callable[[Tensor, Tensor, float], Tensor]


# -- the candidates ----------------------------------------------------------------------------------------------------


def ours(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    return soft_nearest_neighbor_loss(x, y, temperature)


def ours_chunked(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    return soft_nearest_neighbor_loss(x, y, temperature, chunk_size=min(512, max(len(x) // 4, 1)))


def nca(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return what pytorch-metric-learning computes, with the settings under which it is the same function."""
    return _nca(temperature)(x, y)


def _nca(temperature: float, **kwargs: Any) -> nn.Module:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import NCALoss

    distance = LpDistance(power=2, normalize_embeddings=False)
    return NCALoss(softmax_scale=1 / temperature, distance=distance, **kwargs)


def plain(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Equation 1 in logarithms, as one writes it in PyTorch, with autograd."""
    x = x - x.mean(0)
    scores = -_squared_distances(x) / temperature
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    scores = scores.masked_fill(itself, -math.inf)
    other_class = y[:, None] != y
    return (scores.logsumexp(1) - scores.masked_fill(other_class, -math.inf).logsumexp(1)).mean()


def released(x: Tensor, y: Tensor, temperature: float, eps: float = 1e-5) -> Tensor:
    """Return the formula of the released TensorFlow code: exponentials, with a small number in both sums' stead."""
    mass = torch.exp(-_squared_distances(x) / temperature) - torch.eye(len(x), device=x.device)
    share = mass / (eps + mass.sum(1, keepdim=True))
    return -torch.log(eps + (share * (y[:, None] == y)).sum(1)).mean()


def _squared_distances(x: Tensor) -> Tensor:
    lengths = (x * x).sum(1)
    return lengths[:, None] + lengths - 2 * x @ x.T


CANDIDATES: dict[str, Loss] = {
    "ours": ours,
    "ours, chunk_size": ours_chunked,
    "pytorch-metric-learning NCALoss": nca,
    "logsumexp, autograd": plain,
    "released formula (exp, eps)": released,
}


def made_batch(size: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, dim, generator=generator)
    return x.to(device), (torch.arange(size) % CLASSES).to(device)


def forward_backward(loss: Loss, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y, temperature), x)
    return gradient


# -- table 1: speed and exactness --------------------------------------------------------------------------------------


def speed(device: str, size: int, dim: int, rounds: int) -> tuple[Table, Table]:
    x, y = made_batch(size, dim, device)
    temperature = 100.0
    both = {n: (lambda f=f: forward_backward(f, x, y, temperature)) for n, f in CANDIDATES.items()}
    timings = compare(both, device=device, rounds=rounds)
    with torch.no_grad():
        forward = compare({n: (lambda f=f: f(x, y, temperature)) for n, f in CANDIDATES.items()}, device=device)
    truth = forward_backward(plain, x.double(), y, temperature)
    table = Table(
        f"1. Forward and backward, B={size:,}, d={dim}, T=100",
        ["", *TIMING_COLUMNS, "forward only ms", "gradient error"],
        note="Gradient error: norm of the difference from float64, over the norm. N(0,1) features, 10 classes; "
        "forward only under no_grad.",
    )
    errors = {}
    for name, row in timing_rows(timings).items():
        difference = forward_backward(CANDIDATES[name], x, y, temperature).double() - truth
        errors[name] = float(difference.norm() / truth.norm())
        table.rows.append([name, *row, f"{forward[name].median:.1f}", f"{errors[name]:.1e}"])
    medians = {name: timing.median for name, timing in timings.items()}
    gates = Table("Limits", ["", "measured", "limit", ""])
    for peer in ("pytorch-metric-learning NCALoss", "logsumexp, autograd"):
        ratio = medians["ours"] / medians[peer]
        gates.rows.append([f"ours / {peer}", f"{ratio:.2f}", "0.75", gate(ratio, 0.75)])
    for name in ("ours", "ours, chunk_size"):
        gates.rows.append([f"gradient error, {name}", f"{errors[name]:.1e}", "2e-6", gate(errors[name], 2e-6)])
    return table, gates


def temperatures(device: str, dim: int) -> Table:
    table = Table("Cost of choosing the temperature", ["", "median ms", "min", "IQR"], note=f"d={dim}, no gradient.")
    for size in (128, 1024):
        x, y = made_batch(size, dim, device)
        work = {
            f"median_temperature, B={size}": lambda x=x: median_temperature(x),
            f"optimal_temperature, B={size}": lambda x=x, y=y: optimal_temperature(x, y),
        }
        rows = timing_rows(compare(work, device=device, rounds=5, warmup=1))
        table.rows += [[name, *row[:3]] for name, row in rows.items()]
    return table


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(device: str, gates: Table) -> Table:
    table = Table(
        "Extra memory, forward and backward, d=128",
        ["", "B", "MB", "B x B floats", "seconds"],
        note="Each in a fresh process: its peak over what it held before, after imports and with the data made. "
        "The last column but one is the same in units of one B x B matrix of float32.",
    )
    cases = [(name, 4096) for name in CANDIDATES] + [("ours, chunk_size", 16_384)]
    cases += [("ours, chunk_size", 32_768)] if device == "cuda" else []
    for name, size in cases:
        taken = in_fresh_process(__file__, "--device", device, "--memory-of", name, "--batch", size)
        matrices = taken["bytes"] / (4 * size**2)
        table.rows.append(
            [name, f"{size:,}", f"{taken['bytes'] / MEGABYTE:,.0f}", f"{matrices:.2f}", f"{taken['seconds']:.1f}"]
        )
        if size == 16_384:
            used = taken["bytes"] / 1e9
            gates.rows.append(["chunked, B=16,384, d=128", f"{used:.2f} GB", "1.5 GB", gate(used, 1.5)])
        if size == 32_768:
            gates.rows.append(["chunked, B=32,768: less than one B x B", f"{matrices:.2f}", "1", gate(matrices, 0.999)])
    return table


def report_memory(device: str, name: str, size: int) -> None:
    """Print what one candidate takes, for the process that asked."""
    x, y = made_batch(size, 128, device)
    small = made_batch(64, 128, device)
    forward_backward(CANDIDATES[name], *small, 100.0)  # libraries load and open their buffers at the first call
    start = time.perf_counter()
    taken = extra_memory(lambda: forward_backward(CANDIDATES[name], x, y, 100.0), device)
    synchronize(device)
    print(json.dumps({"bytes": taken, "seconds": time.perf_counter() - start}))


# -- table 2: low temperatures -----------------------------------------------------------------------------------------


def low_temperatures(device: str, size: int, dim: int) -> Table:
    x, y = made_batch(size, dim, device)
    table = Table(
        f"2. Low temperatures, B={size:,}, d={dim}, N(0,1) features",
        ["", "value, T=0.1", "rows that count", "value, T=1", "rows that count"],
        note="Rows that count: anchors whose positives have any mass. NCALoss leaves the others out without a word; in "
        "the released formula they get a constant without gradient, and rounding on the diagonal, which it does not "
        "mask, lets some anchors be their own neighbour.",
    )
    named = {"float64": (plain, x.double())}
    named |= {name: (f, x) for name, f in CANDIDATES.items()}
    for name, (loss, features) in named.items():
        row: list[str] = [name]
        for temperature in (0.1, 1.0):
            row += [f"{float(loss(features, y, temperature)):.2f}", f"{_counting(name, x, y, temperature):,}"]
        table.rows.append(row)
    return table


def _counting(name: str, x: Tensor, y: Tensor, temperature: float) -> int:
    if name.startswith("pytorch-metric-learning"):
        from pytorch_metric_learning.reducers import DoNothingReducer

        return len(_nca(temperature, reducer=DoNothingReducer())(x, y)["loss"]["losses"])
    if name.startswith("released"):
        mass = torch.exp(-_squared_distances(x) / temperature).fill_diagonal_(0)
        return int(((mass * (y[:, None] == y)).sum(1) > 0).sum())
    return len(x)


# -- table 3: the callback ---------------------------------------------------------------------------------------------


class StepTimes(pl.Callback):
    """Collect the time from the end of one training batch to that of the next."""

    def __init__(self, device: str, skipped: int = 20) -> None:
        self.device = device
        self.skipped = skipped  # the first ones warm up, and draw the class-pair matrices
        self.milliseconds: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Take the time."""
        synchronize(self.device)
        now = time.perf_counter()
        if args[-1] > self.skipped:
            self.milliseconds.append(1e3 * (now - self.last))
        self.last = now


def callback_settings() -> dict[str, dict[str, Any] | None]:
    kinds = {"loss": -0.03, "probe": 0.0}
    modes = ("median", 100.0, "paper", "optimal")
    settings: dict[str, dict[str, Any] | None] = {"without": None}
    for kind, weight in kinds.items():
        for mode in modes:
            settings[f"{kind}, temperature={mode!r}"] = {"weight": weight, "temperature": mode}
    return settings


def overhead(device: str, rounds: int) -> Table:
    data = DigitsDataModule(batch_size=128)
    data.setup("fit")
    x, y = data.train_dataset.__getitems__(range(len(data.train_dataset)))[:]
    batches = [(x[i : i + 128], y[i : i + 128]) for _ in range(9) for i in range(0, 1152, 128)]
    loader = DataLoader(batches, batch_size=None)
    nets: dict[str, Callable[[], nn.Module]] = {
        "MLP": lambda: MLP(64, (256, 256)),
        "ConvNet": lambda: SmallConvNet(width=0.5),
    }
    columns = ["", *(f"{net}: {what}" for net in nets for what in ("ms/step", "added"))]
    table = Table(
        "3. The callback on all hidden layers, digits, batch 128",
        columns,
        note=f"A whole training step of a Trainer, logging included: the median over {len(batches) - 21} steps, of "
        f"which the smallest of {rounds} trainings that took turns. MLP(64, (256, 256)) has 2 hidden layers, "
        "SmallConvNet(width=0.5) 3.",
    )
    columns_of_medians = []
    for make in nets.values():
        medians: dict[str, list[float]] = {name: [] for name in callback_settings()}
        for _ in range(rounds):
            for name, settings in callback_settings().items():
                medians[name].append(timing_of(step_times(make, settings, loader, device)).median)
        columns_of_medians.append({name: min(values) for name, values in medians.items()})
    for name in callback_settings():
        pairs = [(medians[name], medians[name] - medians["without"]) for medians in columns_of_medians]
        table.rows.append([name, *(f"{value:.2f}" for pair in pairs for value in pair)])
    return table


def step_times(
    make: Callable[[], nn.Module], settings: dict[str, Any] | None, loader: DataLoader, device: str
) -> list[float]:
    torch.manual_seed(0)
    timer = StepTimes(device)
    callbacks: list[pl.Callback] = [timer]
    if settings is not None:
        callback = SoftNearestNeighborLoss("net.layer?", **settings)
        callback.show = lambda trainer: None
        callbacks.append(callback)
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
        trainer.fit(Classifier(make()), loader)
    return timer.milliseconds


# -- all of it ---------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", help="also write the tables to this file")
    parser.add_argument("--memory-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    return parser.parse_args()


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    options = parsed()
    quiet()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        return report_memory(options.device, options.memory_of, options.batch)
    fast, gates = speed(options.device, options.batch, options.dim, options.rounds)
    tables = [
        fast,
        temperatures(options.device, options.dim),
        memory(options.device, gates),
        low_temperatures(options.device, options.batch, options.dim),
        overhead(options.device, rounds=3),
        gates,
    ]
    for table in tables:
        table.show()
    if options.markdown:
        command = f"python benchmarks/snnl.py --device {options.device} --markdown {options.markdown}"
        about = environment(options.device, ["torch", "lightning", "pytorch-metric-learning"])
        other = "cuda" if options.device == "cpu" else "cpu"
        about += [f"- `{command}`", f"- rows for `--device {other}` are not part of this run"]
        write_markdown(options.markdown, "Soft nearest neighbour loss: speed and memory", about, tables)
    return None


if __name__ == "__main__":
    main()
