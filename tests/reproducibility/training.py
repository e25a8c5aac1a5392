"""A training in which every source of variation draws: split, order, augmentation, dropout and validation noise."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, random_split

from lightning_methods import SeedStreams

SIZE, FEATURES, BATCH, EPOCHS = 48, 6, 8, 3


class Noisy(Dataset):
    """Rows with noise from all three global generators."""

    def __init__(self, size: int = SIZE, quiet: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.quiet = quiet

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        if self.quiet:
            return self.x[i], self.y[i]
        noise = 0.1 * torch.randn(FEATURES) + 0.1 * np.random.randn() + 0.1 * random.gauss(0, 1)  # noqa: NPY002
        return (self.x[i] + noise).float(), self.y[i]


class Split(pl.LightningDataModule):
    """A split from the global generator, as most people write it."""

    def __init__(self, workers: int = 0, persistent: bool = False, **loader: Any) -> None:
        super().__init__()
        self.options = {"num_workers": workers, "persistent_workers": persistent}
        self.loader = loader

    def setup(self, stage: str) -> None:
        self.train, self.val = random_split(Noisy(), [SIZE - 16, 16])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, shuffle=True, **self.options, **self.loader)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, BATCH, **self.options)


class Net(pl.LightningModule):
    def __init__(self, p: float = 0.3, draws_in_validation: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 2))
        self.draws_in_validation = draws_in_validation
        self.val_noise: list[float] = []
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.batches.append((self.current_epoch, x.clone()))
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(self.draws_in_validation):
            drawn = float(torch.rand(()))
        if not self.trainer.sanity_checking:
            self.val_noise.append(drawn)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Run:
    """One training with the given seeds, and what came of it."""

    def __init__(
        self,
        folder: Path | str,
        seeds: Mapping[str, Any] | None = None,
        *,
        data: Any = None,
        net: Mapping[str, Any] | None = None,
        callbacks: Any = (),
        loaders: Any = None,
        ckpt_path: Any = None,
        before: int = 0,
        **trainer: Any,
    ) -> None:
        torch.manual_seed(before)  # whatever was drawn before changes nothing
        random.seed(before)
        np.random.seed(before)  # noqa: NPY002
        self.streams = SeedStreams(**{"fingerprint": "full", **(seeds or {})})
        self.streams.seed("init")
        self.module = Net(**(net or {}))
        self.streams.seed("split")
        if loaders is None:
            kind: dict[str, Any] = {"datamodule": Split() if data is None else data}
        else:
            kind = {"train_dataloaders": loaders}
        settings = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, "devices": 1}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        self.trainer = pl.Trainer(
            callbacks=[self.streams, *callbacks], default_root_dir=folder, **{**settings, **quiet, **trainer}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.fit(self.module, ckpt_path=ckpt_path, **kind)

    @property
    def found(self) -> dict[str, str]:
        return self.streams.fingerprints

    @property
    def final(self) -> str:
        return self.found["final"]


def changed(one: Run, other: Run) -> set[str]:
    """The sources whose fingerprints differ."""
    names = one.found.keys() | other.found.keys()
    return {name for name in names if one.found.get(name) != other.found.get(name)}
