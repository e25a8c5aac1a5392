"""What weighting costs: the interception in a training step, and the sweep of heads beside training them one by one.

    python benchmarks/importance_weighting.py --markdown benchmarks/results/importance_weighting_cpu.md
    python benchmarks/importance_weighting.py --device cuda --markdown benchmarks/results/importance_weighting_cuda.md

Limits are reported as ok or missed; nothing fails.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from itertools import pairwise
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule
from timing import TIMING_COLUMNS, Table, compare, environment, gate, timed, timing_of, timing_rows, write_markdown
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods import ImportanceWeighting
from lightning_methods.importance_weighting import HeadSettings, ratio_weights, sweep_heads
from lightning_methods.models import SmallConvNet

RATIOS = (256.0, 16.0, 1.0, 1 / 16, 1 / 256)
SEEDS = 5
ROUNDS = 2000
SETTINGS = HeadSettings(hidden=(64,), epochs=3)


class Stepping(LightningModule):
    """A small network whose step notes how long everything takes that is not the network."""

    def __init__(self, device: str, table: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallConvNet().to(device)
        self.table = table
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        self.in_net = 0.0
        self.around_net: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, with the weights written by hand if there are any."""
        x, y = batch
        start = time.perf_counter()
        z = self.net(x)
        self.in_net = time.perf_counter() - start
        if self.table is None:
            return F.cross_entropy(z, y)
        return (self.table[y] * F.cross_entropy(z, y, reduction="none")).mean()

    def update(self, batch: tuple[Tensor, Tensor]) -> None:
        """Do what a Trainer does with a batch."""
        start = time.perf_counter()
        loss = self.training_step(batch, 1)
        self.around_net.append(1e6 * (time.perf_counter() - start - self.in_net))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def interception(device: str) -> tuple[Table, float, float]:
    """Time whole steps, and what they do beside the network, where the few microseconds are not lost in its noise."""
    x, y = torch.randn(64, 1, 8, 8, device=device), torch.arange(64, device=device) % 10
    weights = torch.linspace(0.5, 1.5, 10, device=device)
    modules = {"no weights": Stepping(device), "by hand": Stepping(device, weights), "caught": Stepping(device)}
    trainer = SimpleNamespace(training=True, accumulate_grad_batches=1, current_epoch=0, callbacks=[])
    modules["caught"].trainer = trainer
    callback = ImportanceWeighting(weights.tolist(), normalize="none")
    callback.on_fit_start(trainer, modules["caught"])
    callback.on_train_start(trainer, modules["caught"])
    callback.on_train_batch_start(trainer, modules["caught"], (x, y), 1)
    whole: dict[str, list[float]] = {name: [] for name in modules}
    order = random.Random(0)
    for _ in range(ROUNDS):
        # what comes second finds the code of the first in the processor's caches
        for name in order.sample(list(modules), len(modules)):
            whole[name].append(timed(functools.partial(modules[name].update, (x, y)), device))
    callback.on_fit_end(trainer, modules["caught"])
    timings = {name: timing_of(values[20:]) for name, values in whole.items()}
    beside = {name: timing_of(module.around_net[20:]) for name, module in modules.items()}
    table = Table(
        "1. A step of SmallConvNet, batch 64",
        ["", "step, median ms", "min", "beside the network, median µs", "min", "IQR"],
    )
    for name, t in timings.items():
        b = beside[name]
        table.rows.append(
            [name, f"{t.median:.2f}", f"{t.smallest:.2f}", f"{b.median:.0f}", f"{b.smallest:.0f}", f"{b.spread:.0f}"]
        )
    added = beside["caught"].median - beside["by hand"].median
    table.note = (
        f"Caught beside by hand: {added:+.0f} microseconds a step, all that the callback does in it included "
        f"({ROUNDS} steps of each in random order)."
    )
    return table, added, 1e-3 * added / timings["by hand"].median


def one_by_one(x: Tensor, y: Tensor, probe: Tensor) -> None:
    """Train the same heads as anybody would, with the same recordings."""
    for weights in ratio_weights(list(RATIOS)).values():
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            widths = [x.shape[1], *SETTINGS.hidden]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            net = nn.Sequential(*layers, nn.Linear(widths[-1], 2)).to(x.device)
            optimizer = torch.optim.SGD(net.parameters(), lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
            per_class = torch.tensor(weights, device=x.device)
            for _ in range(SETTINGS.epochs):
                for rows in torch.randperm(len(x), device=x.device).split(SETTINGS.batch_size):
                    losses = F.cross_entropy(net(x[rows]), y[rows], reduction="none")
                    optimizer.zero_grad()
                    (per_class[y[rows]] * losses).mean().backward()
                    optimizer.step()
                with torch.no_grad():
                    _ = net(probe).argmax(1).bincount(minlength=2), net(x).argmax(1).eq(y).float().mean()


def sweep(device: str) -> tuple[Table, float]:
    torch.manual_seed(0)
    x, y = torch.randn(2000, 64, device=device), torch.arange(2000, device=device) % 2
    probe = torch.randn(500, 64, device=device)
    weights = ratio_weights(list(RATIOS))
    work = {
        "one by one": lambda: one_by_one(x, y, probe),
        "sweep_heads": lambda: sweep_heads(x, y, weights, probes={"held out": probe}, seeds=SEEDS, settings=SETTINGS),
    }
    timings = compare(work, device=device, rounds=5, warmup=1)
    heads = len(RATIOS) * SEEDS
    shape = f"{heads} heads {SETTINGS.hidden} on 2,000 x 64 features, {SETTINGS.epochs} epochs"
    table = Table(f"2. {shape}, batch {SETTINGS.batch_size}", ["", *TIMING_COLUMNS])
    table.rows += [[name, *row] for name, row in timing_rows(timings).items()]
    return table, timings["sweep_heads"].median / timings["one by one"].median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--markdown", help="file to write the tables to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    step, added, share = interception(args.device)
    heads, ratio = sweep(args.device)
    limits = Table("Limits", ["", "measured", "limit", ""])
    limits.rows.append(["caught beside by hand, microseconds", f"{added:.0f}", "30", gate(added, 30)])
    limits.rows.append(["caught beside by hand, share of a step", f"{share:.3f}", "0.03", gate(share, 0.03)])
    limits.rows.append(["sweep_heads / one by one", f"{ratio:.3f}", "0.125", gate(ratio, 1 / 8)])
    tables = (step, heads, limits)
    for table in tables:
        table.show()
    if args.markdown:
        command = f"- `python benchmarks/importance_weighting.py --device {args.device} --markdown {args.markdown}`"
        about = [*environment(args.device, ("torch", "lightning")), command]
        write_markdown(args.markdown, "Importance weighting: what it costs", about, tables)


if __name__ == "__main__":
    main()
