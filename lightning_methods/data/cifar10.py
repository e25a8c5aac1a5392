"""CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.data.torchvision_base import DownloadableDataModule


class CIFAR10DataModule(DownloadableDataModule):
    """CIFAR-10 (Krizhevsky): 50,000 training and 10,000 test images of 32x32 pixels.

    A stratified part of the training images is held out for validation. Inputs are standardised with the published
    channel means (0.4914, 0.4822, 0.4465) and standard deviations (0.2470, 0.2435, 0.2616).

    Shapes: inputs (B, 3, 32, 32) float32; targets (B,) int64.

    Args:
        root: folder that holds `cifar-10-batches-py`, as torchvision's `CIFAR10(root)`. Default "data".
        download: whether to download missing files. Default False.
        batch_size: examples a batch. Default 64; the last, smaller batch is kept.
        augment: whether training images are shifted by up to 4 pixels (black border) and mirrored at random, drawn
            from PyTorch's generator. Default False.
        train_size: how many training images to use, a stratified draw. Default None, all.
        val_fraction: share of the training images held out. Default 0.1, which leaves 45,000; 0 for none.
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
        >>> cifar = CIFAR10DataModule(augment=True)
        >>> cifar.shape, cifar.num_classes
        ((3, 32, 32), 10)
    """

    num_classes = 10
    image_shape = (3, 32, 32)
    _dataset = "CIFAR10"
    _folder = "cifar-10-batches-py"

    def __init__(
        self,
        root: str = "data",
        *,
        download: bool = False,
        batch_size: int = 64,
        augment: bool = False,
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
            augment=augment,
            train_size=train_size,
            val_fraction=val_fraction,
            seed=seed,
            in_memory=in_memory,
            device=device,
            num_workers=num_workers,
            wrap_train=wrap_train,
            mean=[0.4914, 0.4822, 0.4465],
            std=[0.2470, 0.2435, 0.2616],
        )

    def _pixels(self, source: Any, indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(source.data[indices]).permute(0, 3, 1, 2).contiguous()
