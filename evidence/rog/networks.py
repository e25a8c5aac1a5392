"""Data with wrong labels, and networks that memorise them; a network that was trained once is kept."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_methods import CIFAR10DataModule, Classifier, MNISTDataModule, NoisyLabels
from lightning_methods.models import MLP, CIFARResNet

CHOSEN: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 250, "batch": 256, "lr": 2e-3},
    "mnist": {"epochs": 60, "batch": 128, "lr": 1e-3},
    "cifar10": {"epochs": 120, "batch": 128, "lr": 0.1},
}
TRAIN = 5000  # training images of MNIST
VALIDATION = 1000  # noisy ones
TEST = {"mnist": 2000}  # of the test images, the first so many


class BestEpoch(Callback):
    """The test accuracy after every epoch, which nobody could choose by: an oracle."""

    def __init__(self, test: TensorDataset) -> None:
        self.x, self.y = test.tensors
        self.seen: list[float] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        pl_module.eval()
        parts = [pl_module(x.to(pl_module.device)).argmax(1).cpu() for x in self.x.split(2000)]
        pl_module.train()
        self.seen.append(float((torch.cat(parts) == self.y).double().mean()))


def digits(seed: int) -> list[TensorDataset]:
    """Return train, validation and test: images are split before each is also shifted down and right by a pixel."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = []
    for own, copies in ((order[630:], 3), (order[500:630], 3), (order[:500], 1)):
        right, down = torch.zeros(2, len(own), 8, 8)
        right[:, :, 1:], down[:, 1:] = x[own, :, :-1], x[own, :-1]
        images = torch.cat([x[own], right, down][:copies]).flatten(1)
        parts.append(TensorDataset(images, y[own].repeat(copies)))
    return parts


def from_module(data: Any, test: int | None = None) -> list[TensorDataset]:
    """Return train, validation (the first so many) and test (likewise) of a data module, standardised."""
    data.prepare_data()
    data.setup()
    found = []
    for dataset, most in ((data.train_dataset, None), (data.val_dataset, VALIDATION), (data.test_dataset, test)):
        batches = [dataset.__getitems__(list(own)) for own in BatchSampler(range(len(dataset)), 1000, False)]
        x, y = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
        found.append(TensorDataset(x[:most], y[:most]))
    return found


def noisy(args: argparse.Namespace, seed: int, kind: str, rate: float) -> tuple[list[TensorDataset], list[Tensor]]:
    """Return train and validation with wrong labels and a clean test, and the right labels of the first two."""
    if args.data == "digits":
        parts = digits(seed)
    elif args.data == "mnist":
        parts = from_module(MNISTDataModule(args.root, flat=True, train_size=TRAIN, seed=seed), TEST["mnist"])
    else:
        parts = from_module(CIFAR10DataModule(args.root, seed=seed, augment=False))
    right = [part.tensors[1] for part in parts[:2]]
    for i in range(2):
        wrong = NoisyLabels(parts[i], seed=seed + i, rate=rate, kind=kind, num_classes=10)  # type: ignore[arg-type]
        parts[i] = TensorDataset(parts[i].tensors[0], wrong.targets)
    return parts, right


def untrained(args: argparse.Namespace) -> Classifier:
    """Return the network before the training."""
    if args.data == "cifar10":
        sgd = partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=5e-4)
        steps = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[args.epochs // 3, 2 * args.epochs // 3])
        return Classifier(CIFARResNet(depth=32), sgd, steps)
    adam = partial(torch.optim.Adam, lr=args.lr)
    if args.data == "digits":
        return Classifier(MLP(64, (256, 64, 64)), adam)
    # with a constant rate the last epoch does not know all labels by heart
    falling = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs)
    return Classifier(MLP(784, (256, 128, 64)), adam, falling)


def quiet(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of a Trainer that writes nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return {**dict.fromkeys(off, False), "accelerator": args.device, "devices": 1, "default_root_dir": "runs"}


def trained(args: argparse.Namespace, seed: int, kind: str, rate: float, parts: list[TensorDataset]) -> Any:
    """Return the network with `best_epoch` and `seconds`, from the file under `runs/` if it was trained before."""
    path = Path("runs/rog") / args.data / f"{kind}_{rate}_{seed}_{args.epochs}_epochs.pt"
    seed_everything(seed, verbose=False)
    model = untrained(args)
    if not path.exists():
        start, train = time.monotonic(), parts[0]
        oracle = BestEpoch(parts[2])
        trainer = Trainer(max_epochs=args.epochs, callbacks=oracle, precision=args.precision, **quiet(args))
        # whole batches are cut from the tensors at once
        sampler = BatchSampler(RandomSampler(train), args.batch, drop_last=False)
        trainer.fit(model, DataLoader(train, sampler=sampler, batch_size=None))
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"best_epoch": max(oracle.seen), "seconds": time.monotonic() - start}
        torch.save({"state": model.state_dict(), **kept}, path)
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["state"])
    return model, found["best_epoch"], found["seconds"]
