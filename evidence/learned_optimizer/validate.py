"""Compare weights on validation tasks: draws and sets that meta-training does not use.

Nothing that run.py reports is among them. The guard's clock and its smaller steps are applied; its Adam steps, which a
rising training loss calls, are not.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_methods.learned_optimizer import ModuleTask
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.seeding import seed_of
from lightning_methods.learned_optimizer.weights import load_weights

HERE = Path(__file__).parent
LENGTHS = (200, 2000)
SEEDS = 2
CLIP = 5.0
DIGITS, SYNTHETIC = (1, 5, 7, 8), (2, 5, 7, 9)  # draws, and sets; of each kind small and large ones


def tasks() -> list[ModuleTask]:
    """Return the validation tasks: digits and synthetic sets, small and large networks."""
    from meta_train import families

    every = families("broad", 3000, random_state=200)
    half = len(every) // 2
    return [every[0].sample(1_000_000 + i) for i in DIGITS] + [every[half + i].sample(1_000_000 + i) for i in SYNTHETIC]


@torch.no_grad()
def curves(task: ModuleTask, weights: Sequence[Path | str], clock: int, steps: int) -> Tensor:
    """Return the validation losses `(2, SEEDS, steps)` of two weights of one architecture, on the same batches."""
    loaded = [load_weights(path) for path in weights]
    problem = InnerTraining(loaded[0].architecture, task, clock=clock)
    seeds = [seed_of("validation", i) for i in range(SEEDS)]
    theta = torch.stack([w.theta for w in loaded]).repeat_interleave(SEEDS, 0)
    losses, _ = problem.unroll(theta, problem.begin(theta, seeds), 0, steps, seeds, differentiable=False)
    return torch.where(losses <= CLIP, losses, CLIP).view(2, SEEDS, steps)


def compare(weights: Sequence[Path | str], clock: int, steps: int = LENGTHS[-1]) -> list[list[dict[str, Any]]]:
    """Return for each of the weights a row a task: mean losses at every length, and the last tenth's."""
    given = list(weights) + [weights[-1]] * (len(weights) % 2)
    found: list[list[dict[str, Any]]] = [[] for _ in given]
    for i in range(0, len(given), 2):
        for task in tasks():
            for k, own in enumerate(curves(task, given[i : i + 2], clock, steps)):
                row = {"task": task.name, **{f"mean_{n}": float(own[:, :n].mean()) for n in LENGTHS if n <= steps}}
                found[i + k].append({**row, "last": float(own[:, -steps // 10 :].mean())})
    return found[: len(weights)]


def overall(rows: list[dict[str, Any]], column: str) -> float:
    """Return the geometric mean over tasks: each counts by ratios, however hard it is."""
    return math.exp(sum(math.log(row[column]) for row in rows) / len(rows))


def write(target: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows."""
    new = not target.is_file()
    target.parent.mkdir(exist_ok=True)
    with target.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
