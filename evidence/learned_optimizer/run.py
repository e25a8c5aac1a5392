"""Learned against tuned optimizers: each training by itself, paired by seed; results are appended a row at a time.

    python evidence/learned_optimizer/run.py --root data             # goes on where it stopped
    python evidence/learned_optimizer/run.py --show                  # the tables alone

Learning rates of the baselines are the best of the mean validation loss on two tuning seeds, for each task and length.
The learned optimizers are not tuned. Inputs are standardised and cut at 6 deviations; batches of 32.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods import LearnedOptimizer
from lightning_methods.learned_optimizer import ModuleTask

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runs.csv"
FIELDS = [
    "task",
    "steps",
    "optimizer",
    "lr",
    "seed",
    "mean_val",
    "final_val",
    "test",
    "accuracy",
    "ms_per_step",
    "trust",
]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING = (1000, 1001)
BASELINES: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "SGD momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
}
LEARNED: dict[str, dict[str, Any]] = {
    "lm-small": {},
    "lm-small, no guard": {"guard": False},
    "metz19": {"weights": "metz19"},
    "metz19, no guard": {"weights": "metz19", "guard": False},
}


class Data(NamedTuple):
    """Training, validation and test samples."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(x: np.ndarray, y: np.ndarray, *, parts: tuple[float, float] = (0.6, 0.8), limit: int = 10**9) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit]
    inputs, targets = torch.from_numpy(np.asarray(x, dtype=np.float32))[order], torch.from_numpy(y).long()[order]
    a, b = (round(share * len(inputs)) for share in parts)
    inputs = ((inputs - inputs[:a].mean(0)) / (inputs[:a].std(0) + 1e-3)).clamp(-6, 6)
    cuts = (slice(0, a), slice(a, b), slice(b, None))
    return Data(*((inputs[c], targets[c]) for c in cuts))


def digits(classes: range = range(10)) -> Data:
    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, list(classes))
    return split(x[kept], y[kept] - min(classes))


def mnist(root: str) -> Data:
    """Return 6,000 training, 2,000 validation and 2,000 test images, averaged to 14 by 14 pixels."""
    from torchvision.datasets import MNIST

    own = MNIST(root, train=True, download=False)
    pixels = F.avg_pool2d(own.data[:10_000].float().unsqueeze(1), 2).flatten(1)
    return split(pixels.numpy(), own.targets[:10_000].numpy())


def mlp(*sizes: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


class Task(NamedTuple):
    """A network on data, and the numbers of steps that are of interest."""

    data: Callable[[str], Data]
    net: Callable[[], nn.Module]
    steps: tuple[int, ...]


TASKS = {
    "digits, MLP 32": Task(lambda root: digits(), mlp(64, 32, 10), (200,)),
    "digits, conv net": Task(lambda root: digits(), conv, (200,)),
    "digits, MLP 128-128-128": Task(lambda root: digits(), mlp(64, 128, 128, 128, 10), (200,)),
    "wine": Task(lambda root: split(*load_wine(return_X_y=True)), mlp(13, 32, 3), (200, 2000)),
    "breast cancer": Task(lambda root: split(*load_breast_cancer(return_X_y=True)), mlp(30, 32, 2), (200, 2000)),
    "iris": Task(lambda root: split(*load_iris(return_X_y=True)), mlp(4, 32, 3), (200,)),
    "MNIST 14x14, MLP 64": Task(mnist, mlp(196, 64, 10), (200, 2000)),
    "digits 5-9": Task(lambda root: digits(range(5, 10)), mlp(64, 32, 5), (200, 2000)),
}


def train(task: Task, data: Data, make: Callable[[Any], Any], steps: int, seed: int) -> dict[str, float]:
    """Train once; the seed decides first weights and batches."""
    torch.manual_seed(seed)
    net = task.net()
    optimizer = make(net.parameters())
    (x, y), val, spent = data.train, [], 0.0
    rows = torch.randint(len(x), (steps, 32))
    every = max(1, steps // 40)
    for t in range(steps):
        start = time.perf_counter()

        def closure(own: Tensor = rows[t]) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[own]), y[own])
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        spent += time.perf_counter() - start
        if (t + 1) % every == 0:
            val.append(loss_of(net, data.val))
    guard = getattr(optimizer, "guard", None)
    return {
        "mean_val": float(np.mean(val)),
        "final_val": val[-1],
        "test": loss_of(net, data.test),
        "accuracy": accuracy_of(net, data.test),
        "ms_per_step": 1000 * spent / steps,
        "trust": math.nan if guard is None else guard.trust,
    }


def train_together(task: Task, data: Data, optimizer: str, lr: float, steps: int, seeds: Sequence[int]) -> list[dict]:
    """Train once for each seed, all side by side: baselines work element by element, so that each goes its own way."""
    nets, rows = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(task.net())
        rows.append(torch.randint(len(data.train[0]), (steps, 32)))
    own = ModuleTask(nets[0], *data.train, batch_size=32)
    params = [torch.stack(p).detach().requires_grad_() for p in zip(*(n.parameters() for n in nets), strict=True)]
    made = BASELINES[optimizer](params, lr)
    (x, y), batches, val, spent = data.train, torch.stack(rows, 1), [], 0.0

    def losses(samples: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            found = own.losses(params, *(v.expand(len(seeds), *v.shape) for v in samples))
        return torch.where(found < 1e4, found, 1e4)

    for t in range(steps):
        start = time.perf_counter()
        made.zero_grad()
        own.losses(params, x[batches[t]], y[batches[t]]).sum().backward()
        made.step()
        spent += time.perf_counter() - start
        if (t + 1) % max(1, steps // 40) == 0:
            val.append(losses(data.val))
    curve, test, found = torch.stack(val), losses(data.test), []
    for i, net in enumerate(nets):
        for p, value in zip(net.parameters(), params, strict=True):
            p.data.copy_(value[i].detach())
        row = {"mean_val": float(curve[:, i].mean()), "final_val": float(curve[-1, i]), "test": float(test[i])}
        found.append({**row, "accuracy": accuracy_of(net, data.test), "ms_per_step": math.nan, "trust": math.nan})
    return found


@torch.no_grad()
def accuracy_of(net: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    return float((net(samples[0]).argmax(1) == samples[1]).float().mean())


@torch.no_grad()
def loss_of(net: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    loss = float(F.cross_entropy(net(samples[0]), samples[1]))
    return loss if loss < 1e4 else 1e4  # also where it is no number


class Book:
    """The results so far; what is in the file is not run again."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if RESULTS.is_file():
            with RESULTS.open() as file:
                for row in csv.DictReader(file):
                    self.rows[self.key(row)] = row

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        """Return what tells a training from the others."""
        return tuple(str(row[name]) for name in FIELDS[:5])

    def has(self, place: dict[str, Any]) -> bool:
        """Tell whether a training is in the file."""
        return self.key(place) in self.rows

    def add(self, place: dict[str, Any], result: dict[str, float]) -> None:
        """Write a row."""
        row = {**place, **{k: f"{v:.6g}" for k, v in result.items()}}
        RESULTS.parent.mkdir(exist_ok=True)
        new = not RESULTS.is_file()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows[self.key(place)] = {k: str(v) for k, v in row.items()}


class Trial(NamedTuple):
    """A task at a number of steps, and the book of its results."""

    book: Book
    name: str
    steps: int
    data: Data

    def learned(self, optimizer: str, seeds: Sequence[int]) -> None:
        """Train with a learned optimizer, a seed at a time, where it has not been."""
        for seed in seeds:
            place = {"task": self.name, "steps": self.steps, "optimizer": optimizer, "lr": "none", "seed": seed}
            if not self.book.has(place):
                settings = LEARNED[optimizer]
                self.book.add(
                    place,
                    train(
                        TASKS[self.name], self.data, lambda p, s=settings: LearnedOptimizer(p, **s), self.steps, seed
                    ),
                )

    def results(self, optimizer: str, lr: float, seeds: Sequence[int]) -> list[dict[str, str]]:
        """Return the rows of a baseline, run where they have not been."""
        places = [
            {"task": self.name, "steps": self.steps, "optimizer": optimizer, "lr": lr, "seed": seed} for seed in seeds
        ]
        if not all(self.book.has(place) for place in places):
            rows = train_together(TASKS[self.name], self.data, optimizer, lr, self.steps, seeds)
            for place, row in zip(places, rows, strict=True):
                self.book.add(place, row)
        return [self.book.rows[self.book.key(place)] for place in places]

    def tuned(self, optimizer: str, seeds: Sequence[int]) -> None:
        """Choose the learning rate of the least mean validation loss on the tuning seeds, and train with it."""
        found = {
            lr: float(np.mean([float(row["mean_val"]) for row in self.results(optimizer, lr, TUNING)])) for lr in RATES
        }
        self.results(optimizer, min(found, key=lambda lr: found[lr]), seeds)


def run(root: str, seeds: int, steps: list[int], tasks: list[str], optimizers: list[str]) -> None:
    book = Book()
    for length in steps:
        for name in tasks:
            if length not in TASKS[name].steps:
                continue
            trial = Trial(book, name, length, TASKS[name].data(root))
            for optimizer in optimizers:
                (trial.learned if optimizer in LEARNED else trial.tuned)(optimizer, range(seeds))


def mean(values: list[float]) -> str:
    x = np.asarray(values)
    if len(x) < 2:
        return f"{x.mean():.3f}"
    return f"{x.mean():.3f} ± {stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)):.3f}"


def show() -> None:
    """Print a table for each task and length."""
    rows = [row for row in Book().rows.values() if int(row["seed"]) not in TUNING]
    for steps in (200, 2000):
        for task in TASKS:
            own = [r for r in rows if r["task"] == task and int(r["steps"]) == steps]
            if not own:
                continue
            adam = {int(r["seed"]): float(r["mean_val"]) for r in own if r["optimizer"] == "Adam"}
            print(f"\n### {task}, {steps} steps\n")
            columns = ["", "lr", "mean val loss", "over Adam's", "final val loss", "test loss", "accuracy", "ms a step"]
            print("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
            for name in [*LEARNED, *BASELINES]:
                runs = [r for r in own if r["optimizer"] == name]
                if not runs:
                    continue
                paired = [float(r["mean_val"]) / adam[int(r["seed"])] for r in runs if int(r["seed"]) in adam]
                cells = [name, runs[0]["lr"], mean([float(r["mean_val"]) for r in runs])]
                cells += [mean(paired) if paired and name != "Adam" else ""]
                cells += [mean([float(r[k]) for r in runs]) for k in ("final_val", "test", "accuracy")]
                cells.append(f"{np.median([float(r['ms_per_step']) for r in runs]):.2f}")
                print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", nargs="*", type=int, default=[200, 2000])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--optimizers", nargs="*", default=[*LEARNED, *BASELINES])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.show:
        run(args.root, args.seeds, args.steps, args.tasks, args.optimizers)
    show()


if __name__ == "__main__":
    main()
