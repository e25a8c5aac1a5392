"""What weighting costs: the interception in a training step, and the sweep of heads beside training them one by one.

    python benchmarks/importance_weighting.py --markdown benchmarks/results/importance_weighting_cpu.md
    python benchmarks/importance_weighting.py --device cuda --markdown benchmarks/results/importance_weighting_cuda.md

Limits are reported as ok or missed; nothing fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from timing import TIMING_COLUMNS, Table, compare, environment, gate, timing_rows, write_markdown
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.importance_weighting import HeadSettings, ratio_weights, sweep_heads
from lightning_methods.importance_weighting.interception import LossInterception
from lightning_methods.importance_weighting.weights import BatchWeights
from lightning_methods.models import SmallConvNet

RATIOS = (256.0, 16.0, 1.0, 1 / 16, 1 / 256)
SEEDS = 5
SETTINGS = HeadSettings(hidden=(64,), epochs=3)


def step_of(device: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a step of a small network without weights, with them written by hand, and with the interception."""
    torch.manual_seed(0)
    net = SmallConvNet().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x, y = torch.randn(64, 1, 8, 8, device=device), torch.arange(64, device=device) % 10
    table = torch.linspace(0.5, 1.5, 10, device=device)

    def update(loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    weights = BatchWeights("none", "auto", None, None, lambda w: w)
    weights.set_table(table.double().cpu(), 1.0)

    def caught() -> Tensor:
        weights.begin((x, y), first=False)
        with LossInterception(weights):
            loss = F.cross_entropy(net(x), y)
        return update(loss)

    return (
        lambda: update(F.cross_entropy(net(x), y)),
        lambda: update((table[y] * F.cross_entropy(net(x), y, reduction="none")).mean()),
        caught,
    )


def interception(device: str) -> tuple[Table, float, float]:
    plain, by_hand, caught = step_of(device)
    timings = compare({"no weights": plain, "by hand": by_hand, "caught": caught}, device=device, rounds=200, warmup=20)
    table = Table("1. A step of SmallConvNet, batch 64", ["", *TIMING_COLUMNS])
    table.rows += [[name, *row] for name, row in timing_rows(timings).items()]
    added = timings["caught"].median - timings["by hand"].median
    table.note = f"Caught beside by hand: {1e3 * added:+.0f} microseconds a step (medians)."
    return table, 1e3 * added, timings["caught"].median / timings["by hand"].median - 1


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
