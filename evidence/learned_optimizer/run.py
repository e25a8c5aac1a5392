"""Learned against tuned optimizers: each training by itself, paired by seed; results are appended a row at a time.

    python evidence/learned_optimizer/run.py --root data             # goes on where it stopped
    python evidence/learned_optimizer/run.py --root data --time      # wall clock of a step
    python evidence/learned_optimizer/show.py                        # tables and figure

Learning rates of the baselines are the best of the mean validation loss on two tuning seeds, for each task and length.
The learned optimizers are not tuned. Inputs are standardised and cut at 6 deviations; batches of 32. Trainings of one
task run side by side where their optimizers let them; the wall clock is that of trainings by themselves.
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
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods import LearnedOptimizer
from lightning_methods.learned_optimizer import ModuleTask
from lightning_methods.learned_optimizer.guard import Guard
from lightning_methods.learned_optimizer.unrolled import UnrolledOptimizer
from lightning_methods.learned_optimizer.weights import load_weights

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runs.csv"
TIMES = HERE / "results" / "times.csv"
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
    """Return digits of these classes, of the parts that all digits are divided into."""
    first, last = min(classes), max(classes)
    parts = split(*load_digits(return_X_y=True))
    kept = [(y >= first) & (y <= last) for _, y in parts]
    return Data(*((x[rows], y[rows] - first) for (x, y), rows in zip(parts, kept, strict=True)))


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


class Residual(nn.Module):
    """Add to group-normalised features of 5 by 5 pixels what two convolutions make of them; classify the mean."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 5, padding=2))
        self.branch = nn.Sequential(
            *(nn.GroupNorm(3, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores of flat images."""
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


class Task(NamedTuple):
    """A network on data, and the numbers of steps that are of interest."""

    data: Callable[[str], Data]
    net: Callable[[], nn.Module]
    steps: tuple[int, ...]


TASKS = {
    "digits, MLP 32": Task(lambda root: digits(), mlp(64, 32, 10), (200,)),
    "digits, conv net": Task(lambda root: digits(), conv, (200,)),
    "digits, residual conv net": Task(lambda root: digits(), Residual, (200,)),
    "digits, MLP 128-128-128": Task(lambda root: digits(), mlp(64, 128, 128, 128, 10), (200,)),
    "digits, MLP 512-512": Task(lambda root: digits(), mlp(64, 512, 512, 10), (200,)),
    "wine": Task(lambda root: split(*load_wine(return_X_y=True)), mlp(13, 32, 3), (200, 2000)),
    "breast cancer": Task(lambda root: split(*load_breast_cancer(return_X_y=True)), mlp(30, 32, 2), (200, 2000)),
    "iris": Task(lambda root: split(*load_iris(return_X_y=True)), mlp(4, 32, 3), (200,)),
    "MNIST 14x14, MLP 64": Task(mnist, mlp(196, 64, 10), (200, 2000)),
    "digits 0-4": Task(lambda root: digits(range(5)), mlp(64, 32, 5), (200, 2000)),
    "digits 5-9": Task(lambda root: digits(range(5, 10)), mlp(64, 32, 5), (200, 2000)),
}


def train(task: Task, data: Data, make: Callable[[Any], Any], steps: int, seed: int) -> dict[str, float]:
    """Train once; the seed decides first weights and batches."""
    torch.manual_seed(seed)
    net = task.net()
    optimizer = make(net.parameters())
    (x, y), val = data.train, []
    rows = torch.randint(len(x), (steps, 32))
    for t in range(steps):
        optimizer.step(closure_of(net, optimizer, x[rows[t]], y[rows[t]]))
        if (t + 1) % max(1, steps // 40) == 0:
            val.append(loss_of(net, data.val))
    guard = getattr(optimizer, "guard", None)
    return {
        "mean_val": float(np.mean(val)),
        "final_val": val[-1],
        "test": loss_of(net, data.test),
        "accuracy": accuracy_of(net, data.test),
        "trust": math.nan if guard is None else guard.trust,
    }


def closure_of(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    return closure


class Side(NamedTuple):
    """Trainings side by side: a network for each seed, their stacked parameters, and the samples of every step."""

    task: ModuleTask
    data: Data
    nets: list[nn.Module]
    params: list[Tensor]
    rows: Tensor

    @classmethod
    def begin(cls, task: Task, data: Data, steps: int, seeds: Sequence[int]) -> Side:
        """Draw as `train` does."""
        nets, rows = [], []
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append(task.net())
            rows.append(torch.randint(len(data.train[0]), (steps, 32)))
        own = ModuleTask(nets[0], *data.train, batch_size=32)
        params = [torch.stack(p).detach().requires_grad_() for p in zip(*(n.parameters() for n in nets), strict=True)]
        return cls(own, data, nets, params, torch.stack(rows, 1))

    def train_losses(self, params: list[Tensor], t: int) -> Tensor:
        """Return the losses on the samples of a step."""
        x, y = self.data.train
        return self.task.losses(params, x[self.rows[t]], y[self.rows[t]])

    @torch.no_grad()
    def losses(self, params: list[Tensor], samples: tuple[Tensor, Tensor]) -> Tensor:
        """Return the losses on the same samples for all, those that are no number as a large one."""
        found = self.task.losses(params, *(v.expand(len(self.nets), *v.shape) for v in samples))
        return torch.where(found < 1e4, found, 1e4)

    def results(self, params: list[Tensor], val: list[Tensor]) -> list[dict[str, float]]:
        """Return what is reported of each."""
        curve, test, found = torch.stack(val), self.losses(params, self.data.test), []
        for i, net in enumerate(self.nets):
            for p, value in zip(net.parameters(), params, strict=True):
                p.data.copy_(value[i].detach())
            row = {"mean_val": float(curve[:, i].mean()), "final_val": float(curve[-1, i]), "test": float(test[i])}
            found.append({**row, "accuracy": accuracy_of(net, self.data.test), "trust": math.nan})
        return found


def train_together(task: Task, data: Data, optimizer: str, lr: float, steps: int, seeds: Sequence[int]) -> list[dict]:
    """Train once for each seed, all side by side: baselines work element by element, so that each goes its own way."""
    side, val = Side.begin(task, data, steps, seeds), []
    if not side.task.is_fast:
        return [train(task, data, lambda p: BASELINES[optimizer](p, lr), steps, seed) for seed in seeds]
    made = BASELINES[optimizer](side.params, lr)
    for t in range(steps):
        made.zero_grad()
        side.train_losses(side.params, t).sum().backward()
        made.step()
        if (t + 1) % max(1, steps // 40) == 0:
            val.append(side.losses(side.params, data.val))
    return side.results(side.params, val)


def learn_together(task: Task, data: Data, optimizer: str, steps: int, seeds: Sequence[int]) -> list[dict]:
    """Train with a learned optimizer, all seeds side by side; those whose guard steps in once more, each by itself."""
    settings = LEARNED[optimizer]
    weights = load_weights(settings.get("weights", "lm-small"))
    guarded = settings.get("guard", True)
    side, val = Side.begin(task, data, steps, seeds), []
    if not side.task.is_fast:
        return [train(task, data, lambda p: LearnedOptimizer(p, **settings), steps, seed) for seed in seeds]
    limits = (weights.clock, weights.width) if guarded else ()
    form = UnrolledOptimizer(weights.architecture, side.task.shapes, *limits)
    guards = [Guard() for _ in seeds]
    theta, params = weights.theta.expand(len(seeds), -1), side.params
    state = form.begin(params[0], len(seeds))
    for t in range(steps):
        losses = side.train_losses(params, t)
        grads = torch.autograd.grad(losses.sum(), params)
        for guard, loss in zip(guards, losses.tolist(), strict=True):
            guard.observe(loss)
        with torch.no_grad():
            moved, state = form.step(theta, params, grads, state, t)
        params = [p.requires_grad_() for p in moved]
        if (t + 1) % max(1, steps // 40) == 0:
            val.append(side.losses(params, data.val))
    found = side.results(params, val)
    if not guarded:
        return found
    return [
        {**row, "trust": 1.0}
        if guard.trust == 1
        else train(task, data, lambda p: LearnedOptimizer(p, **settings), steps, seed)
        for row, guard, seed in zip(found, guards, seeds, strict=True)
    ]


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
        """Train with a learned optimizer the seeds that have not been."""
        places = [
            {"task": self.name, "steps": self.steps, "optimizer": optimizer, "lr": "none", "seed": s} for s in seeds
        ]
        new = [place for place in places if not self.book.has(place)]
        if new:
            rows = learn_together(TASKS[self.name], self.data, optimizer, self.steps, [p["seed"] for p in new])
            for place, row in zip(new, rows, strict=True):
                self.book.add(place, row)

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


def time_steps(root: str, tasks: list[str], optimizers: list[str], steps: int = 60) -> None:
    """Time forward, backward and step of each training by itself, in turns, and write the medians."""
    rows = []
    for name in tasks:
        task, data = TASKS[name], TASKS[name].data(root)
        x, y = data.train
        nets = [task.net() for _ in optimizers]
        made = [
            LearnedOptimizer(net.parameters(), **LEARNED[o]) if o in LEARNED else BASELINES[o](net.parameters(), 1e-3)
            for net, o in zip(nets, optimizers, strict=True)
        ]
        spent = np.zeros((len(optimizers), steps))
        for t in range(steps):
            own = torch.randint(len(x), (32,))
            for i, (net, optimizer) in enumerate(zip(nets, made, strict=True)):
                closure = closure_of(net, optimizer, x[own], y[own])
                start = time.perf_counter()
                optimizer.step(closure)
                spent[i, t] = 1000 * (time.perf_counter() - start)
        for optimizer, ms in zip(optimizers, np.median(spent, 1), strict=True):
            rows.append([name, optimizer, f"{ms:.3f}"])
            print(*rows[-1], flush=True)
    with TIMES.open("w", newline="") as file:
        csv.writer(file).writerows([["task", "optimizer", "ms_per_step"], *rows])


def run(root: str, seeds: int, steps: list[int], tasks: list[str], optimizers: list[str]) -> None:
    book = Book()
    for length in steps:
        for name in tasks:
            if length not in TASKS[name].steps:
                continue
            trial = Trial(book, name, length, TASKS[name].data(root))
            for optimizer in optimizers:
                (trial.learned if optimizer in LEARNED else trial.tuned)(optimizer, range(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", nargs="*", type=int, default=[200, 2000])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--optimizers", nargs="*", default=[*LEARNED, *BASELINES])
    parser.add_argument("--time", action="store_true", help="only the wall clock of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.time:
        time_steps(args.root, args.tasks, args.optimizers)
    else:
        run(args.root, args.seeds, args.steps, args.tasks, args.optimizers)


if __name__ == "__main__":
    main()
