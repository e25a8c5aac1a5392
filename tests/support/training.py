"""A small module, small made data and a quiet Trainer: what the tests of core and the contract train with."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate

# `lightning.pytorch` and `pytorch_lightning` are two copies; a process of its own trains with the other one
pl = importlib.import_module(os.environ.get("LIGHTNING_FAMILY", "lightning.pytorch"))

SAMPLES, FEATURES, WIDTH, CLASSES, BATCH = 40, 8, 16, 3, 8


@dataclass
class Settings:
    """What a case asks of a module; every module of a recipe takes these."""

    stochastic: bool = False  # dropout and batch norm
    checkpointing: bool = False
    manual: bool = False
    divisor: float | None = None  # the sum of the losses over this, which DDP averages exactly, instead of their mean
    during_step: Callable[[pl.LightningModule], Any] | None = None
    during_validation: Callable[[pl.LightningModule], Any] | None = None


class TinyModule(pl.LightningModule):
    """Two hidden layers, `first` and `second`, and a `head`; subclasses change `total_loss`."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or Settings()
        self.automatic_optimization = not settings.manual
        noise = [nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)] if settings.stochastic else []
        self.first = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), *noise)
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        if self.settings.checkpointing and torch.is_grad_enabled():
            second = checkpoint(self.second, first, use_reentrant=False)
        else:
            second = self.second(first)
        return {"first": first, "second": second, "head": self.head(second)}

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)["head"]

    def own_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.settings.divisor is None:
            return F.cross_entropy(logits, y)
        return F.cross_entropy(logits, y, reduction="sum") / self.settings.divisor

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        return self.own_loss(layers["head"], y)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Return what the layers take, and the labels."""
        x, y = batch
        return x, y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.split(batch)
        layers = self.layers(x)
        loss = self.total_loss(layers, y)
        if self.settings.during_step is not None:
            self.settings.during_step(self)
        self.log("train_loss", loss, batch_size=len(y))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.split(batch)
        if self.settings.during_validation is not None:
            self.settings.during_validation(self)
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def made_data(samples: int = SAMPLES) -> TensorDataset:
    """Return three noisy clusters, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    x = torch.randn(samples, FEATURES, generator=generator) + F.one_hot(y, FEATURES)
    return TensorDataset(x, y)


@dataclass(frozen=True)
class Samples:
    """What modules are trained on: a data set of so many samples, how they become a batch, and what a module takes."""

    dataset: Callable[[int], Any] = made_data
    collate: Callable[[list[Any]], Any] = default_collate
    example: Callable[[], Any] = lambda: torch.zeros(2, FEATURES)


ROWS = Samples()


def loader(
    samples: int = SAMPLES, *, batch_size: int = BATCH, shuffle: bool = False, kind: Samples = ROWS
) -> DataLoader:
    return DataLoader(kind.dataset(samples), batch_size=batch_size, shuffle=shuffle, collate_fn=kind.collate)


class ResumableLoader:
    """A loader whose position goes into Lightning's checkpoints, so that a resumed epoch goes on where it stopped."""

    def __init__(self, samples: int = SAMPLES, batch_size: int = BATCH, kind: Samples = ROWS) -> None:
        self.batches = list(loader(samples, batch_size=batch_size, kind=kind))
        self.position = self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for i in range(start, len(self.batches)):
            self.position = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self.batches)


def quiet_trainer(folder: Path | str, **settings: Any) -> pl.Trainer:
    """Return a Trainer for two epochs on one CPU that shows, logs and saves nothing unless asked to."""
    if settings.get("barebones"):
        return pl.Trainer(accelerator="cpu", devices=1, **{"max_epochs": 2, **settings})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 2, "devices": 1}
    return pl.Trainer(**{"accelerator": "cpu", "default_root_dir": folder, **quiet, **settings})


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    train: Any = None,
    *,
    seed: int = 3,
    kind: Samples = ROWS,
    **kwargs: Any,
) -> None:
    """Fit on the made data from a fixed random state."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(kind=kind) if train is None else train, loader(BATCH, kind=kind), **kwargs)


class At(pl.Callback):
    """Do something after one training batch, or at the first epoch's end, as a neighbour in the callback list would."""

    def __init__(self, when: int | str, action: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.when = when
        self.action = action

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.when:
            self.action(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "epoch end" and trainer.current_epoch == 0:
            self.action(trainer, pl_module)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of a parameter or buffer, relative to the largest magnitude (at least 1)."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    pairs = [(x.double(), right[key].double()) for key, x in left.items()]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1)) for x, y in pairs)


def assert_identical(a: nn.Module, b: nn.Module) -> None:
    """Check that two modules are equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    unequal = [key for key, x in left.items() if not torch.equal(x, right[key])]
    assert unequal == []


def same_state(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Tell whether two nested states are equal: tensors and floats within a relative tolerance, all else exactly."""
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same_state(v, b[k], tolerance) for k, v in a.items())
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Tensor, float)):
        x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        return torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
    return bool(a == b)


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Return all that a method must leave as it was: attributes, classes, hooks and keys."""
    hooks = [name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs"))]
    return {
        "attributes": sorted(vars(module)),
        "classes": {name: type(m) for name, m in module.named_modules()},
        "methods": {n: type(m).forward for n, m in module.named_modules()},
        "overridden": {
            n: [k for k in vars(m) if callable(getattr(type(m), k, None))] for n, m in module.named_modules()
        },
        "hooks": {f"{n}.{k}": len(getattr(m, k)) for n, m in module.named_modules() for k in hooks if getattr(m, k)},
        "keys": list(module.state_dict()),
        "training": {name: m.training for name, m in module.named_modules()},
    }
