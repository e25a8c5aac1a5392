"""MNIST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.data.torchvision_base import DownloadableDataModule


class MNISTDataModule(DownloadableDataModule):
    """MNIST (LeCun et al.): 60,000 training and 10,000 test digits of 28x28 pixels.

    A stratified part of the training images is held out for validation. Inputs are standardised with the published
    mean 0.1307 and standard deviation 0.3081.

    Shapes: inputs (B, 1, 28, 28) float32, or (B, 784) when `flat`; targets (B,) int64.

    Args:
        root: folder that holds `MNIST/raw`, as torchvision's `MNIST(root)`. Default "data".
        download: whether to download missing files. Default False.
        batch_size: examples a batch. Default 64; the last, smaller batch is kept.
        flat: whether to hand out vectors of 784. Default False.
        train_size: how many training images to use, a stratified draw. Default None, all.
        val_fraction: share of the training images held out. Default 0.1, which leaves 54,000; 0 for none.
        seed: decides split and draw. Default 0.
        in_memory: whether to standardise whole batches of one uint8 tensor (fast) or image by image. Default True.
        device: where that tensor lies, as "cuda" for batches that are made on the GPU (of each process). Default
            None, main memory.
        num_workers: worker processes of every loader. Default 0, the fastest with `in_memory`.
        wrap_train: from the training dataset to the one that is trained on, as `NoisyLabels`. Default None.

    Raises:
        InvalidArgument: if an argument is out of range; at `setup`, if the files are missing.
        MissingDependency: at `setup`, without torchvision.

    Example:
        >>> mnist = MNISTDataModule(train_size=10_000)
        >>> mnist.shape, mnist.num_classes
        ((1, 28, 28), 10)
    """

    num_classes = 10
    image_shape = (1, 28, 28)
    _dataset = "MNIST"
    _folder = "MNIST/raw"

    def __init__(
        self,
        root: str = "data",
        *,
        download: bool = False,
        batch_size: int = 64,
        flat: bool = False,
        train_size: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        in_memory: bool = True,
        device: str | None = None,
        num_workers: int = 0,
        wrap_train: Callable[[Dataset], Dataset] | None = None,
    ) -> None:
        super().__init__(
            root,
            download=download,
            batch_size=batch_size,
            flat=flat,
            train_size=train_size,
            val_fraction=val_fraction,
            seed=seed,
            in_memory=in_memory,
            device=device,
            num_workers=num_workers,
            wrap_train=wrap_train,
            mean=[0.1307],
            std=[0.3081],
        )

    def _pixels(self, source: Any, indices: NDArray[np.int64]) -> Tensor:
        return source.data[torch.from_numpy(indices)].unsqueeze(1)
