"""What the DataModules over torchvision datasets share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_methods.data._checks import check_at_least
from lightning_methods.data._strata import draw_stratified
from lightning_methods.data.base import ImageDataModule
from lightning_methods.data.images import ImageItems, Images, ImageTensors
from lightning_methods.data.labels import find_labels
from lightning_methods.errors import InvalidArgument, require

Part = Literal["train", "val", "test"]


class TorchvisionDataModule(ImageDataModule):
    """Base of the DataModules over torchvision datasets: opens, splits and keeps the images in memory or not.

    Args:
        root: the folder.
        in_memory: whether the images are decoded once into one uint8 tensor.
        device: where that tensor lies; None for the main memory.
        train_size: how many training images to use, a stratified draw; None for all.
        kwargs: as `ImageDataModule`.
    """

    def __init__(
        self, root: str, *, in_memory: bool, device: str | None, train_size: int | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if train_size is not None:
            check_at_least("train_size", train_size, 1)
        if device is not None and not in_memory:
            raise InvalidArgument(f"device={device!r} needs the images in memory: set in_memory=True, or device=None.")
        if device is not None and self.num_workers > 0:
            raise InvalidArgument(
                f"device={device!r} with num_workers={self.num_workers}: images that lie on a device are needed in the "
                "main process. Set num_workers=0, or device=None."
            )
        self.root = root
        self.in_memory = in_memory
        self.train_size = train_size
        self._device = device

    @abstractmethod
    def _open(self, part: Part) -> Any:
        """Return the torchvision dataset of `part`, or None where there is no validation part of its own."""

    def _pixels(self, source: Any, indices: NDArray[np.int64]) -> Tensor:
        pixels = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        for place, i in enumerate(indices):
            pixels[place] = self._decode(source[int(i)][0])
        return pixels

    def _decode(self, image: Any) -> Tensor:
        functional = require("torchvision.transforms.functional", extra="vision", why=type(self).__name__)
        return functional.pil_to_tensor(image)

    def _images(self, source: Any, indices: NDArray[np.int64] | None = None) -> Images:
        indices = np.arange(len(source), dtype=np.int64) if indices is None else indices
        targets = find_labels(source)[torch.from_numpy(indices)]
        if self.in_memory:
            return ImageTensors(self._pixels(source, indices), targets, self._device)
        return ImageItems(source, indices, targets, self._decode)

    def _load_fit(self) -> tuple[Images, Images | None]:
        source, own_val = self._open("train"), self._open("val")
        labels = find_labels(source).numpy()
        held_out = round(self.val_fraction * len(labels)) if own_val is None else 0
        val, train = draw_stratified(labels, held_out, self.seed)
        if self.train_size is not None:
            if self.train_size > len(train):
                raise InvalidArgument(
                    f"train_size={self.train_size}: {len(train)} images are left after validation. "
                    "Lower train_size or val_fraction."
                )
            train = train[draw_stratified(labels[train], self.train_size, self.seed)[0]]
        if own_val is not None:
            return self._images(source, train), self._images(own_val)
        return self._images(source, train), self._images(source, val) if held_out else None

    def _load_test(self) -> Images:
        return self._images(self._open("test"))


class DownloadableDataModule(TorchvisionDataModule):
    """Base of the DataModules whose files torchvision can download.

    Args:
        root: the folder, as torchvision's dataset takes it.
        download: whether to download missing files.
        kwargs: as `TorchvisionDataModule`.
    """

    # the class in torchvision.datasets, and where it looks under root
    _dataset: str
    _folder: str

    def __init__(self, root: str, *, download: bool, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files where `download` asks for it and they are missing."""
        if self.download:
            for train in (True, False):
                self._torchvision_class()(self.root, train=train, download=True)

    def _torchvision_class(self) -> Callable[..., Any]:
        datasets = require("torchvision.datasets", extra="vision", why=type(self).__name__)
        return getattr(datasets, self._dataset)

    def _open(self, part: Part) -> Any:
        if part == "val":
            return None
        try:
            return self._torchvision_class()(self.root, train=part == "train", download=False)
        except RuntimeError as error:
            raise InvalidArgument(
                f"root={self.root!r} does not hold {self._dataset} (looked in {self.root}/{self._folder}: {error}) "
                "Set download=True, or name the folder that holds it."
            ) from error
