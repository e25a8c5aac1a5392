"""Measure on real data what different noise in the two passes does, over a grid of both rates.

    python evidence/augmented_dropout/run.py --data digits                     # some ten minutes of one core
    python evidence/augmented_dropout/run.py --data mnist                      # 1,000 images; about an hour of one core
    python evidence/augmented_dropout/run.py --data cifar10 --device cuda      # meant for a GPU
    python evidence/augmented_dropout/report.py                                # tables and figures of README.md

One run is a Trainer with `AugmentedDropout(p_forward, p_backward)` on a module whose dropouts are otherwise untouched.
Runs of one seed share the training images, the validation images, the initial weights and the batch order, hence their
differences are paired. Rows that `results/<data>.csv` already has are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_methods import AugmentedDropout, Classifier, DigitsDataModule
from lightning_methods.data import CIFAR10DataModule, MNISTDataModule
from lightning_methods.models import MLP

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIELDS = ["seed", "p_forward", "p_backward", "val_error", "val_nll", "test_error", "test_nll", "test_ece", "train_nll"]
FIELDS += ["seconds"]


@dataclass(frozen=True)
class Setup:
    """What is trained on what, and for how long."""

    data: Callable[[int], Any]
    net: Callable[[], nn.Module]
    lr: float
    epochs: int
    seeds: int
    rates: tuple[float, ...]


def small_conv() -> nn.Module:
    """Return six convolutions in three stages, each stage with a dropout before its second convolution."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 128, 256):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(before, 10))


def setup_of(options: argparse.Namespace) -> Setup:
    gpu = "cuda" if options.device == "cuda" else None
    grid = (0.0, 0.2, 0.4, 0.6, 0.8)
    setups = {
        "digits": Setup(
            lambda seed: DigitsDataModule(flat=True, batch_size=64, seed=seed, val_fraction=0.2, test_fraction=0.2),
            lambda: MLP(64, (256, 256), dropout=0.5),
            lr=0.05,
            epochs=30,
            seeds=20,
            rates=grid,
        ),
        # 1,000 training and 1,000 validation images of the 60,000, the whole test set
        "mnist": Setup(
            lambda seed: MNISTDataModule(
                options.root, train_size=1000, val_fraction=1 / 60, flat=True, batch_size=100, seed=seed, device=gpu
            ),
            lambda: MLP(784, (512, 512), dropout=0.5),
            lr=0.05,
            epochs=60,
            seeds=10,
            rates=grid,
        ),
        "cifar10": Setup(
            lambda seed: CIFAR10DataModule(options.root, batch_size=128, seed=seed, augment=True, device=gpu),
            small_conv,
            lr=0.1,
            epochs=30,
            seeds=3,
            rates=(0.0, 0.1, 0.3, 0.5),
        ),
    }
    setup = setups[options.data]
    changed = {name: value for name in ("epochs", "seeds") if (value := getattr(options, name)) is not None}
    return Setup(**{**setup.__dict__, **changed})


def train(setup: Setup, data: Any, p_forward: float, p_backward: float, seed: int, device: str) -> Classifier:
    """Train from one seed."""
    torch.manual_seed(seed)
    module = Classifier(
        setup.net(),
        partial(torch.optim.SGD, lr=setup.lr, momentum=0.9),
        partial(CosineAnnealingLR, T_max=setup.epochs),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=setup.epochs,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            callbacks=[AugmentedDropout(p_forward, p_backward, functional="ignore")],
            limit_val_batches=0,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, train_dataloaders=data.train_dataloader())
    return module


@torch.no_grad()
def measure(module: Classifier, loader: Any, device: str) -> dict[str, float]:
    """Return error in percent, negative log likelihood and calibration error on a loader, in evaluation mode."""
    module = module.to(device).eval()
    logits, targets = [], []
    for x, y in loader:
        logits.append(module(x.to(device)).float().cpu())
        targets.append(y.cpu())
    scores, labels = torch.cat(logits), torch.cat(targets)
    if not bool(scores.isfinite().all()):  # diverged
        return {"error": 90.0, "nll": float("inf"), "ece": float("nan")}
    error = 100 * float((scores.argmax(1) != labels).double().mean())
    return {"error": error, "nll": float(F.cross_entropy(scores, labels)), "ece": calibration_error(scores, labels)}


def calibration_error(scores: Tensor, labels: Tensor) -> float:
    return float(multiclass_calibration_error(scores.softmax(1), labels, scores.shape[1], n_bins=15))


def run(options: argparse.Namespace) -> None:
    setup = setup_of(options)
    path = RESULTS / f"{options.data}.csv"
    RESULTS.mkdir(exist_ok=True)
    done = {tuple(row[k] for k in FIELDS[:3]) for row in read(path)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for seed in range(setup.seeds):
            cells = [c for c in itertools.product(setup.rates, repeat=2) if (str(seed), *map(str, c)) not in done]
            if not cells:
                continue
            data = setup.data(seed)
            data.setup()
            for p_forward, p_backward in cells:
                start = time.perf_counter()
                module = train(setup, data, p_forward, p_backward, seed, options.device)
                parts = {"val": data.val_dataloader(), "test": data.test_dataloader(), "train": data.train_dataloader()}
                found = {part: measure(module, loader, options.device) for part, loader in parts.items()}
                values = {f"{part}_{k}": f"{v:.5g}" for part, values in found.items() for k, v in values.items()}
                row = {"seed": seed, "p_forward": p_forward, "p_backward": p_backward, **values}
                row["seconds"] = f"{time.perf_counter() - start:.1f}"
                writer.writerow({k: row[k] for k in FIELDS})
                file.flush()
                print(*(row[k] for k in FIELDS), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist", "cifar10"], default="digits")
    parser.add_argument("--root", default="data", help="where MNIST and CIFAR-10 are, or are downloaded to")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--epochs", type=int, help="instead of the setup's")
    parser.add_argument("--seeds", type=int, help="instead of the setup's")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    run(parsed())
