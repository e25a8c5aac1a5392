"""Cats and dogs of CIFAR-10 with a small convolutional network, through the callbacks themselves."""

from __future__ import annotations

import argparse
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import ImportanceWeighting, WeightEffectMonitor

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CAT, DOG = NAMES.index("cat"), NAMES.index("dog")
CONDITIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "L2 1e-3": {"decay": 1e-3},
    "batch norm": {"norm": 1},
    "dropout 0.2": {"dropout": 0.2},
}
LONGER = {"dropout 0.2": 1.25}  # times the epochs: it fits its training data later
RATIOS = {"16:1": [16.0, 1.0], "1:1": [1.0, 1.0], "1:16": [1.0, 16.0]}


class CatsAndDogs(LightningModule):
    """Two and three 3x3 convolutions without padding, each followed by pooling, and three linear layers."""

    def __init__(self, width: float, *, decay: float = 0.0, norm: float = 0, dropout: float = 0.0, lr: float = 0.03):
        super().__init__()
        a, b, c, d = (round(width * n) for n in (64, 128, 512, 128))
        layers: list[nn.Module] = []
        for before, after, pooled in ((3, a, False), (a, a, True), (a, b, False), (b, b, False), (b, b, True)):
            layers += [nn.Conv2d(before, after, 3), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pooled else []
        layers += [nn.Flatten()]
        for before, after in ((16 * b, c), (c, d)):
            layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        self.net = nn.Sequential(*layers, nn.Linear(d, 2))
        for layer in self.net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.lr, self.decay = lr, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return two logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a plain cross-entropy; the weights come from the callback."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count what is right."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Plain SGD, as in the paper."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.decay)


def read(root: str, split: str, per_class: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Return so many images of each class, standardised; from a folder of PNG files, or the files of CIFAR-10."""
    folder = Path(root) / "cifar10" / split
    images, labels = [], []
    if folder.is_dir():
        from PIL import Image

        for c, count in per_class.items():
            files = sorted((folder / NAMES[c]).iterdir())[:count]
            images += [np.asarray(Image.open(file).convert("RGB")) for file in files]
            labels += [c] * len(files)
        pixels, y = np.stack(images), np.array(labels)
    else:
        batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        parts = [pickle.loads((Path(root) / "cifar-10-batches-py" / b).read_bytes(), encoding="bytes") for b in batches]
        pixels = np.concatenate([p[b"data"] for p in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        y = np.concatenate([p[b"labels"] for p in parts])
        chosen = np.concatenate([np.flatnonzero(y == c)[:count] for c, count in per_class.items()])
        pixels, y = pixels[chosen], y[chosen]
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / torch.tensor([0.247, 0.2435, 0.2616]).view(3, 1, 1)
    return x, torch.from_numpy(y)


def cifar10(args: argparse.Namespace, results: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Train every condition, ratio and seed that is not among the results; save the fractions predicted as cat."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, width = (5000, 1.0) if args.full else (args.images, 0.125)
    x, y = read(args.root, "train", {CAT: size, DOG: size})
    held, truth = read(args.root, "test", {CAT: 1000, DOG: 1000} if args.full else {CAT: 250, DOG: 250})
    others = {c: 1000 if args.full else 60 for c in range(10) if c not in (CAT, DOG)}
    other, _ = read(args.root, "test", others)
    sets = TensorDataset(x, (y == DOG).long()), TensorDataset(held, (truth == DOG).long()), TensorDataset(other)
    for seed in range(args.seeds):
        for condition, settings in CONDITIONS.items():
            for ratio, weights in RATIOS.items():
                done = results.setdefault(condition, {}).setdefault(ratio, [])
                if len(done) > seed or (ratio == "1:1" and condition != "plain"):
                    continue
                changed = {**settings, "lr": args.lr}
                epochs = round(LONGER.get(condition, 1.0) * args.epochs)
                found = train(args, sets, seed, width, changed, weights, epochs)
                done.append(found)
                print("cifar10", seed, condition, ratio, {k: v[-1:] for k, v in found.items()}, flush=True)
                save(results)


def train(
    args: argparse.Namespace,
    sets: Any,
    seed: int,
    width: float,
    settings: dict[str, float],
    weights: list[float],
    epochs: int,
) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    module = CatsAndDogs(width, **settings)
    fit, held, other = sets
    monitor = WeightEffectMonitor(
        class_weights=weights,
        in_domain=DataLoader(held, batch_size=250),
        out_of_domain=DataLoader(other, batch_size=250),
        every_n_epochs=args.every,
        max_samples=4096,
        warn_below=0.0,
    )
    # equal weights are the module as it is
    callbacks = [monitor] if weights[0] == weights[1] else [ImportanceWeighting(weights), monitor]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="gpu" if args.device == "cuda" else args.device,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
        default_root_dir="runs",
    )
    trainer.fit(module, DataLoader(fit, batch_size=16, shuffle=True), DataLoader(held, batch_size=250))
    keys = ("fraction/in_domain/0", "fraction/out_of_domain/0", "fraction/noise/0", "accuracy", "effect", "margin")
    found = {key: [value for _, value in monitor.history.get(key, [])] for key in keys}
    found["epochs"] = [epoch + 1 for epoch, _ in monitor.history.get("effect", [])]
    found["test accuracy"] = [float(trainer.callback_metrics["accuracy"])]
    return found
