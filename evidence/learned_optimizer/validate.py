"""Compare weights on validation tasks: draws and sets that meta-training does not use.

Nothing that run.py reports is among them. The guard's clock, its width and its limit of a step are applied; what it
does where the training loss rises is not.
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
SHORT, LONG, WIDE = 200, 2000, 100  # steps; wide networks are slow
SEEDS = 2
CLIP = 5.0
DIGITS, SYNTHETIC = (1, 5, 7, 8), (2, 5, 7, 9)  # draws, and sets; of each kind small and large ones


def tasks() -> list[ModuleTask]:
    """Return the validation tasks: digits and synthetic sets, small and large networks, half with clean labels."""
    from meta_train import families

    found = []
    for k, settings in enumerate(({}, {"label_noise": 0.0})):
        every, first = families("broad", 3000, random_state=200 + k, **settings), 1_000_000 * (k + 1)
        half = len(every) // 2
        found += [every[0].sample(first + i) for i in DIGITS] + [every[half + i].sample(first + i) for i in SYNTHETIC]
    return found


def wide_tasks() -> list[ModuleTask]:
    """Return networks with two layers of 128 and of 512 units, wider than those of the meta-training."""
    from meta_train import families

    found = []
    for k, width in enumerate((128, 512)):
        settings = {"label_noise": 0.0, "conv": 0.0, "widths": [width, width], "depths": [2, 2]}
        every, first = families("broad", 10**9, random_state=202 + k, **settings), 1_000_000 * (k + 3)
        found += [every[i].sample(first + i) for i in (0, 1, -4, -6)]
    return found


@torch.no_grad()
def curves(task: ModuleTask, weights: Sequence[Path | str], guard: dict[str, int], steps: int) -> Tensor:
    """Return the validation losses `(weights, SEEDS, steps)` of weights of one architecture, on the same batches."""
    loaded = [load_weights(path) for path in weights]
    loaded += loaded[len(loaded) - len(loaded) % 2 :]  # particles come in pairs
    problem = InnerTraining(loaded[0].architecture, task, **guard)
    seeds = [seed_of("validation", i) for i in range(SEEDS)] * (len(loaded) // 2)
    theta = torch.stack([w.theta for w in loaded]).repeat_interleave(SEEDS, 0)
    losses, _ = problem.unroll(theta, problem.begin(theta, seeds), 0, steps, seeds, differentiable=False)
    return torch.where(losses <= CLIP, losses, CLIP).view(len(loaded), SEEDS, steps)[: len(weights)]


def compare(
    given: Sequence[ModuleTask], weights: Sequence[Path | str], guard: dict[str, int], steps: int
) -> list[list[dict[str, Any]]]:
    """Return for each of the weights a row a task: mean losses of the first 200 steps, of all, and of the last tenth.

    Args:
        given: tasks.
        weights: names or files, all of one architecture.
        guard: its `clock` and `width`.
        steps: of the trainings.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in weights]
    for task in given:
        for rows, own in zip(found, curves(task, weights, guard, steps), strict=True):
            parts = {"first": own[:, :SHORT], "mean": own, "last": own[:, -steps // 10 :]}
            rows.append({"task": task.name, "steps": steps, **{k: float(v.mean()) for k, v in parts.items()}})
    return found


def overall(rows: list[dict[str, Any]], column: str) -> float:
    """Return the geometric mean over tasks: each counts by ratios, however hard it is."""
    return math.exp(sum(math.log(row[column]) for row in rows) / len(rows))


def write(target: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows.

    Raises:
        ValueError: if the file has other columns.
    """
    new = not target.is_file()
    target.parent.mkdir(exist_ok=True)
    if not new and next(csv.reader(target.open())) != list(rows[0]):
        raise ValueError(f"{target} has other columns than {list(rows[0])}. Move it away.")
    with target.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
