"""What the studies of this folder train: networks with noise on the inputs as augmentation, and small data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import Classifier


class NoisyClassifier(Classifier):
    """`Classifier` that adds normal noise to training inputs where they reach the device.

    Args:
        net: the network.
        noise: standard deviation; inputs are standardised.
        lr: learning rate of Adam.
        num_classes: number of logits.
        label_smoothing: as of `Classifier`.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        noise: float = 0.3,
        lr: float = 1e-3,
        *,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(net, num_classes=num_classes, label_smoothing=label_smoothing)
        self.noise = noise
        self.lr = lr

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add the noise."""
        if not self.trainer.training or self.noise == 0:
            return batch
        x, y = batch[:2]
        return x + self.noise * torch.randn_like(x), y

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class SmallSet(LightningDataModule):
    """A data set of scikit-learn, or a part of an image set given as arrays: split anew by `seed`, standardised.

    Args:
        name: `wine`, `breast_cancer` or `digits`; or whatever `arrays` are.
        seed: of the split, 60% training, 20% validation and 20% test, stratified.
        arrays: inputs (N, D) and targets, in place of a set of scikit-learn.
        batch_size: examples a batch.
    """

    def __init__(
        self, name: str, seed: int = 0, arrays: tuple[np.ndarray, np.ndarray] | None = None, batch_size: int = 32
    ) -> None:
        super().__init__()
        x, y = arrays if arrays is not None else getattr(datasets, f"load_{name}")(return_X_y=True)
        self.batch_size = batch_size
        rest, test = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=seed)
        train, val = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=seed)
        mean, std = x[train].mean(0), x[train].std(0) + 1e-6
        x = torch.from_numpy(((x - mean) / std).astype(np.float32))
        y = torch.from_numpy(y.astype(np.int64))
        self.parts = {k: TensorDataset(x[i], y[i]) for k, i in (("train", train), ("val", val), ("test", test))}

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled training part."""
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation part."""
        return DataLoader(self.parts["val"], 4096)

    def test_dataloader(self) -> DataLoader:
        """Return the test part."""
        return DataLoader(self.parts["test"], 4096)
