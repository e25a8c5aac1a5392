"""Fading of the weights on small data: 2-D logistic regression, digits 3 against 5, MNIST 3 against 5."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_methods.importance_weighting.sweep import Fading, HeadSettings, ratio_weights, sweep_heads

RATIOS = [256, 16, 1, 1 / 16, 1 / 256]
STRONG, WEAK = ("16:1", "1:16")

# -- two dimensions ----------------------------------------------------------------------------------------------------

STEPS = [10, 100, 1_000, 10_000, 100_000]
LOGISTIC = {"plain": (0.0, "ce"), "L2 1e-2": (1e-2, "ce"), "poly tail": (0.0, "poly")}


def separable(seed: int, samples: int = 100) -> tuple[Tensor, Tensor]:
    """Return two Gaussian clouds that a line separates, the first cloud drawn for which this holds."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % 2
    while True:
        x = torch.randn(samples, 2, generator=generator, dtype=torch.float64) + (2.0 * y - 1)[:, None] * 1.8
        if (x.sum(1).sign() == 2 * y - 1).all():
            return x, y


def logistic(seeds: int) -> dict[str, Any]:
    """Angle in degrees between the weighted (100:1) and the unweighted (w, b), by full-batch gradient descent."""
    data = [separable(seed) for seed in range(seeds)]
    x = torch.stack([torch.cat([x, torch.ones(len(x), 1)], 1) for x, _ in data]).repeat(2, 1, 1)
    sign = torch.stack([2.0 * y - 1 for _, y in data]).repeat(2, 1).double()
    weights = torch.ones_like(sign)
    weights[:seeds] = torch.where(sign[:seeds] > 0, 100.0, 1.0)
    weights /= weights.mean(1, keepdim=True)
    found: dict[str, Any] = {}
    for name, (decay, loss) in LOGISTIC.items():
        theta, rows = torch.zeros(2 * seeds, 3, dtype=torch.float64), []
        for step in range(1, STEPS[-1] + 1):
            margin = sign * torch.bmm(x, theta[:, :, None])[:, :, 0]
            pull = torch.sigmoid(-margin)
            if loss == "poly":
                pull = torch.where(margin <= 1, pull / np.log1p(np.exp(-1)), margin.clamp(min=1) ** -2)
            gradient = -torch.bmm((weights * pull * sign)[:, None], x)[:, 0] / x.shape[1] + decay * theta
            theta = theta - 0.1 * gradient
            if step in STEPS:
                cosine = torch.cosine_similarity(theta[:seeds], theta[seeds:])
                rows.append(torch.rad2deg(torch.arccos(cosine)).tolist())
        found[name] = {"steps": STEPS, "angle": rows}
        print("logistic", name, np.round(np.mean(rows, 1), 1), flush=True)
    return found


# -- images ------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return 120 + 120 training images of 3 and 5, 50 + 50 held-out ones, the other digits, and noise."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _task(torch.from_numpy(x).float(), torch.from_numpy(y).long(), train=120, test=50)


def mnist(root: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return 1,000 + 1,000 training images of 3 and 5, 500 + 500 held-out ones, 2,000 of the other digits, and "
    "noise."""
    raw = Path(root) / "MNIST" / "raw"
    images, labels = (_idx(raw / f"train-{name}") for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return _task(torch.from_numpy(images).flatten(1).float(), torch.from_numpy(labels).long(), train=1000, test=500)


def _idx(path: Path) -> np.ndarray:
    """Read a file of the MNIST format, packed or not."""
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _task(x: Tensor, y: Tensor, *, train: int, test: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    places = [(y == c).nonzero()[:, 0] for c in (3, 5)]
    fit = torch.cat([p[:train] for p in places])
    held = torch.cat([p[train : train + test] for p in places])
    x = (x - x[fit].mean()) / x[fit].std()
    other = x[(y != 3) & (y != 5)][:2000]
    noise = torch.randn(1000, x.shape[1], generator=torch.Generator().manual_seed(0))
    probes = {"held-out 3 and 5": (x[held], (y[held] == 5).long()), "other digits": other, "noise": noise}
    return x[fit], (y[fit] == 5).long(), probes


CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "L2 1e-2": {"weight_decay": 1e-2},
    "L2 1e-3": {"weight_decay": 1e-3},
    "batch norm": {"batch_norm": True},
    "dropout 0.5": {"dropout": 0.5, "lr": 0.05},
    # its slope at margin 0 is 3.2 times that of the cross-entropy, and the learning rate so much lower
    "poly tail, alpha 1": {"loss": "poly", "lr": 0.03},
    "poly tail, alpha 2": {"loss": "poly", "alpha": 2.0, "lr": 0.03},
}


def images(data: str, root: str, seeds: int, epochs: int, device: str) -> dict[str, Any]:
    """Train every condition on every ratio and seed; return plain numbers."""
    x, y, probes = digits() if data == "digits" else mnist(root)
    moved = {k: tuple(t.to(device) for t in v) if isinstance(v, tuple) else v.to(device) for k, v in probes.items()}
    numbers = {}
    for name, changed in CONDITIONS.items():
        if data == "mnist" and changed.get("loss") == "poly":
            changed = {**changed, "lr": 0.1}  # as it was measured
        settings = HeadSettings(**{"hidden": (128, 64), "epochs": epochs, **changed})
        record = [e for e in (1, 3, 10, 30, 60, 100, 200, 300, 600) if e <= epochs]
        found = sweep_heads(
            x.to(device),
            y.to(device),
            ratio_weights(RATIOS),
            probes=moved,
            seeds=seeds,
            settings=settings,
            record=record,
        )
        numbers[name] = as_numbers(found)
        share = 100 * found.fraction["other digits"][..., 0].mean(2)
        print(data, name, found.epochs, share[:, 1].sub(share[:, 3]).numpy().round(1), flush=True)
    return numbers


EXPONENTS = [1.0, 1.5, 2.0, 3.0]
TAILS: dict[str, dict[str, Any]] = {
    "plain": {},
    "poly tail, alpha 1": {"loss": "poly", "lr": 0.03},
    "poly tail, alpha 2": {"loss": "poly", "alpha": 2.0, "lr": 0.03},
}


def exponents(seeds: int, epochs: int, device: str) -> dict[str, Any]:
    """Train digits 3 against 5 with the weights raised to a power, as the authors of the polynomial tail do."""
    x, y, probes = digits()
    moved = {k: tuple(t.to(device) for t in v) if isinstance(v, tuple) else v.to(device) for k, v in probes.items()}
    ratios = ratio_weights([256, 16, 1 / 16, 1 / 256])
    weights = {f"{name} ^ {e:g}": [w**e for w in pair] for e in EXPONENTS for name, pair in ratios.items()}
    numbers = {}
    for name, changed in TAILS.items():
        settings = HeadSettings(**{"hidden": (128, 64), "epochs": epochs, **changed})
        record = [e for e in (10, 30, 100, 300, 600) if e <= epochs]
        found = sweep_heads(
            x.to(device), y.to(device), weights, probes=moved, seeds=seeds, settings=settings, record=record
        )
        numbers[name] = as_numbers(found)
        print("exponents", name, found.epochs, flush=True)
    return numbers


def as_numbers(found: Fading) -> dict[str, Any]:
    """Return the curves as nested lists, in percent where they are shares."""
    return {
        "names": found.names,
        "epochs": found.epochs,
        "fraction of the first class": {k: v[..., 0].mul(100).tolist() for k, v in found.fraction.items()},
        "accuracy": {k: v.mul(100).tolist() for k, v in found.accuracy.items()},
        "train accuracy": found.train_accuracy.mul(100).tolist(),
        "median margin": found.margin.tolist(),
        "effect": found.effect.tolist(),
    }
