"""Train on a limited range of poses, test beyond it: CNN, CapsNet and the ladder capsule network, faithful and shared.

    python evidence/ladder_capsule/run.py                                     # reduced size; half an hour of one core
    python evidence/ladder_capsule/run.py --size long                         # longer; an hour and a half of one core
    python evidence/ladder_capsule/run.py --size official --device cuda       # the paper's size, for a GPU
    python evidence/ladder_capsule/run.py --times                             # what a step of each network takes
    python evidence/ladder_capsule/report.py                                  # tables and figures of README.md

Networks of one seed share images, poses and batches, hence their differences are paired; nothing is chosen by test
images. Runs that `results/<size>.csv` already has are left out, so that an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_methods import (
    CapsuleNetwork,
    Classifier,
    CodeOverlap,
    EquivarianceR2,
    LadderCapsuleNetwork,
    PoseDataModule,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIELDS = ["seed", "protocol", "model", "parameters", "ms_step", "train_loss", "train_accuracy", "level", "accuracy"]
FIELDS += ["r2", "identity", "shuffled", "overlap"]
UNIT = "L-CapsNet, unit maps"
CODE = "L-CapsNet, unit maps, loss of the code"
ANGLES = (-90, -60, -45, -30, -15, 0, 15, 30, 45, 60, 90)


@dataclass(frozen=True)
class Size:
    """How large networks and data are, and for how long is trained."""

    pool: int  # images are averaged over so many pixels a side before the first convolution
    kernel: int
    stride: int
    width: int
    types: int
    pose_dim: int
    k: int
    hidden: tuple[int, ...]
    rank: int
    train_size: int | None
    test_size: int | None
    batch: int
    epochs: int
    lr: float
    seeds: int
    decay: bool = False  # of the learning rate, along a cosine to 0


SIZES = {
    "reduced": Size(2, 5, 1, 24, 8, 8, 16, (12, 24, 36), 32, 1250, 400, 25, 10, 1e-3, 3),
    # the same networks: four times the images, twice the steps of twice the size, a larger rate that decays
    "long": Size(2, 5, 1, 24, 8, 8, 16, (12, 24, 36), 32, 5000, 500, 50, 10, 3e-3, 3, decay=True),
    "official": Size(1, 9, 2, 256, 32, 16, 70, (128, 256, 384), 64, None, None, 200, 30, 2e-3, 3),
}

#: learning rates of the long runs where they are not that of the size: the best of three by `choose.py`
CHOSEN = {"CNN": 1e-2, "CapsNet": 1e-2, "L-CapsNet": 1e-2}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "rotation": {"train_rotation": (-30, 30), "test_rotations": ANGLES},
    "translation": {
        "train_rotation": (0, 0),
        "train_translation": 1,
        "test_translations": (0, 1, 2, 3, 4),
    },
    "clean": {"train_rotation": (0, 0), "test_rotations": ANGLES},
}


def backbone(size: Size) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(size.pool), nn.Conv2d(1, size.width, size.kernel), nn.ReLU())


class CNN(nn.Module):
    """The convolutions of the capsule networks, a hidden layer in place of capsules, and logits.

    The hidden layer is as wide as makes as many parameters as `like` has.
    """

    def __init__(self, size: Size, like: nn.Module) -> None:
        super().__init__()
        first = backbone(size)
        second = nn.Sequential(nn.Conv2d(size.width, size.types * 8, size.kernel, size.stride), nn.ReLU(), nn.Flatten())
        flat = second(first(torch.zeros(1, 1, 28, 28))).shape[1]
        hidden = round((parameters(like) - parameters(first) - parameters(second) - 10) / (flat + 11))
        self.features = nn.Sequential(first, second, nn.Linear(flat, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.features(x))


def networks(size: Size) -> dict[str, Callable[[], pl.LightningModule]]:
    """Return how each network is made; all are optimised alike."""

    def adam(weights: Any) -> torch.optim.Optimizer:
        # fused: one pass over weights and moments in place of ten, half of the time of a step here
        return torch.optim.Adam(weights, lr=size.lr, fused=True)

    def cosine(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, size.epochs)

    scheduler = cosine if size.decay else None
    usual: dict[str, Any] = {"types": size.types, "pose_dim": size.pose_dim, "kernel_size": size.kernel}
    usual |= {"stride": size.stride, "optimizer": adam, "scheduler": scheduler}
    ladder: dict[str, Any] = {"k": size.k, "hidden": size.hidden, "rank": size.rank, **usual}

    def made(**settings: Any) -> Callable[[], pl.LightningModule]:
        return lambda: LadderCapsuleNetwork(backbone(size), **{**ladder, **settings})

    return {
        "CNN": lambda: Classifier(CNN(size, made(hyper="shared")()), adam, scheduler),
        "CNN, large": lambda: Classifier(CNN(size, made()()), adam, scheduler),
        "CapsNet": lambda: CapsuleNetwork(backbone(size), reconstruction=False, **usual),
        "L-CapsNet, shared trunk": made(hyper="shared"),
        "L-CapsNet": made(),
        UNIT: made(map_init="unit"),
        CODE: made(map_init="unit", loss="code"),
    }


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, help="the number of seeds; by default that of the size")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--times", action="store_true", help="time a training step of each network, and train none")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if options.device == "cpu":
        calm()
    size = SIZES[options.size]
    if options.times:
        time_steps(size, RESULTS / "times.csv")
        return
    path = RESULTS / f"{options.size}.csv"
    done = finished(path, "seed", "protocol", "model")
    for protocol in options.protocols:
        poses = PROTOCOLS[protocol]
        for seed in range(options.seeds or size.seeds):
            for name in networks(size):
                wanted = name not in (UNIT, CODE) or protocol == "clean"  # what the first maps and the constants do
                if not wanted or (str(seed), protocol, name) in done:
                    continue
                data = data_of(size, options.root, seed, poses)
                rate = CHOSEN.get(name, size.lr) if options.size == "long" else size.lr
                build = networks(replace(size, lr=rate))[name]
                model, about = trained(seed, build, data, size.epochs, options.device)
                data.setup("test")
                rows = list(levels(model, data, options.device))
                head = {"seed": seed, "protocol": protocol, "model": name, **about}
                add(path, [{**head, **row} for row in rows], FIELDS)
                print(seed, protocol, name, *(f"{row['level']} {row['accuracy']:.3f}" for row in rows), flush=True)


def time_steps(size: Size, path: Path, rounds: int = 40) -> None:
    """Write what a training step of each network takes, in turns, by the processor's clock."""
    x, y = torch.rand(size.batch, 1, 28, 28), torch.arange(size.batch) % 10
    work = {}
    for name, build in networks(size).items():
        pl.seed_everything(0, verbose=False)
        model: Any = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=size.lr, fused=True)
        work[name] = (model, optimizer)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (model, optimizer) in work.items():
            start = time.process_time()
            model.training_step((x, y), 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(1e3 * (time.process_time() - start))
    path.unlink(missing_ok=True)
    rows = []
    for name, values in times.items():
        low, median, _ = np.quantile(values[rounds // 8 :], [0.25, 0.5, 0.75])
        rows.append({"model": name, "batch": size.batch, "ms": round(median, 1), "fast_quarter": round(low, 1)})
    add(path, rows, list(rows[0]))


def finished(path: Path, *names: str) -> set[tuple[str, ...]]:
    """Return what the columns `names` hold of the runs that are done."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {tuple(row[name] for name in names) for row in csv.DictReader(file)}


def add(path: Path, rows: list[dict[str, Any]], fields: list[str]) -> None:
    """Append the rows of a run, all at once."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def data_of(size: Size, root: str, seed: int, poses: dict[str, Any]) -> PoseDataModule:
    """Return the images of one seed."""
    sizes = {"train_size": size.train_size, "test_size": size.test_size, "batch_size": size.batch}
    return PoseDataModule("mnist", root, seed=seed, **sizes, **poses)


def trained(
    seed: int, build: Callable[[], pl.LightningModule], data: PoseDataModule, epochs: int, device: str
) -> tuple[pl.LightningModule, dict[str, Any]]:
    """Return a network after its last epoch, and what its training took and came to."""
    pl.seed_everything(seed, verbose=False)
    model = build()
    gpu = device == "cuda"
    # nothing is logged or measured on the way: it would take a third of the time of networks of this size
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        max_epochs=epochs,
        precision="bf16-mixed" if gpu else "32-true",
        limit_val_batches=0,
        barebones=True,
    )
    start, clock = time.process_time(), time.perf_counter()
    trainer.fit(model, data)
    # of the processor, which others may have kept busy; of the wall on a GPU
    seconds = time.perf_counter() - clock if gpu else time.process_time() - start
    about = {"parameters": parameters(model), "ms_step": round(1e3 * seconds / trainer.global_step, 2)}
    loss, accuracy, _ = measured(model.eval().to(device), data.train_dataloader(), device)
    return model, {**about, "train_loss": round(loss, 5), "train_accuracy": round(accuracy, 5)}


def calm() -> None:
    """Take one thread, and no detour for numbers too small for the processor's fast path, as moments of dead units."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@torch.no_grad()
def measured(model: Any, loader: Any, device: str) -> tuple[float, float, int]:
    """Return loss, accuracy and number of the images of a loader."""
    loss = correct = count = 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        out = model(x)
        scores = out if isinstance(model, Classifier) else out.scores
        terms = cross_entropy(scores, y) if isinstance(model, Classifier) else sum(model.losses(out, y).values())
        loss, count = loss + len(y) * float(terms), count + len(y)
        correct += int((scores.argmax(1) == y).sum())
    return loss / count, correct / count, count


@torch.no_grad()
def levels(model: Any, data: PoseDataModule, device: str) -> Iterator[dict[str, Any]]:
    """Yield what each level gives, set against the images that are not moved."""
    seen = {
        level.name: _seen(model, loader, device)
        for level, loader in zip(data.levels, data.test_dataloader(), strict=True)
    }
    upright = next(seen[level.name] for level in data.levels if level.value == 0)
    for level in data.levels:
        scores, poses, codes, y = seen[level.name]
        row: dict[str, Any] = {
            "level": level.name,
            "accuracy": round(float((scores.argmax(1) == y).double().mean()), 4),
        }
        if level.axis == "rotation" and level.value:
            metric = EquivarianceR2()
            # the representation of the true class; each class has coordinates of its own
            axes = _axes(upright[1]) if poses.ndim == 2 else None
            before, after = (p @ axes if axes is not None else p[torch.arange(len(y)), y] for p in (upright[1], poses))
            metric.update(before, after, y)
            row |= {name: round(float(value), 4) for name, value in metric.compute().items()}
        if codes is not None:
            overlap = CodeOverlap()
            overlap.update(upright[2], codes)
            row["overlap"] = round(float(overlap.compute()), 4)
        yield row


def _seen(model: Any, loader: Any, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return activities, representation, code vectors and labels of a loader."""
    parts = []
    for x, y in loader:
        x = x.to(device)
        if isinstance(model, Classifier):
            hidden = model.net.features(x)
            parts.append((model.net.head(hidden), hidden, torch.zeros(len(x), 0), y))
        else:
            out = model(x)
            code = out.code if hasattr(out, "code") else torch.zeros(len(x), 0)
            parts.append((out.scores, out.poses, code, y))
    scores, poses, codes, y = (torch.cat([p.cpu() for p in column]) for column in zip(*parts, strict=True))
    return scores, poses, codes if codes.shape[1] else None, y


def _axes(hidden: Tensor, count: int = 8) -> Tensor:
    """Return the first principal axes: a hidden layer with as many dimensions as a pose."""
    return torch.linalg.svd(hidden - hidden.mean(0), full_matrices=False)[2][:count].T


if __name__ == "__main__":
    main()
