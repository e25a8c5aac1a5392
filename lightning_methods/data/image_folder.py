"""Images in one folder a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.data._checks import check_at_least
from lightning_methods.data.torchvision_base import Part, TorchvisionDataModule
from lightning_methods.errors import InvalidArgument, require


class ImageFolderDataModule(TorchvisionDataModule):
    """Own images, laid out as `root/train/<class>/*` and `root/test/<class>/*`.

    Validation images are those of `root/val/<class>/*` where that folder exists, and else a stratified part of the
    training images. Every image is read as RGB, its shorter side resized to `image_size`, and the centre cut out.

    Shapes: inputs (B, 3, image_size, image_size) float32; targets (B,) int64, classes in alphabetical order.

    Args:
        root: the folder. Default "data".
        image_size: side of the images that are handed out. Default 224.
        batch_size: examples a batch. Default 64; the last, smaller batch is kept.
        augment: whether training images are shifted by up to an eighth of the side (black border) and mirrored at
            random, drawn from PyTorch's generator. Default False.
        mean: mean of the three channels, from 0 to 1. Default None: measured on the training part, in one pass.
        std: standard deviation, likewise; give both or neither.
        train_size: how many training images to use, a stratified draw. Default None, all.
        val_fraction: share of the training images held out when there is no `root/val`. Default 0.1; 0 for none.
        seed: decides split and draw. Default 0.
        in_memory: whether to decode every image once into one uint8 tensor (for small sets). Default False.
        device: where that tensor lies, as "cuda" for batches that are made on the GPU (of each process). Default
            None, main memory.
        num_workers: worker processes of every loader. Default 0; more help when images are decoded again and again.
        wrap_train: from the training dataset to the one that is trained on, as `NoisyLabels`. Default None.

    Raises:
        InvalidArgument: if an argument is out of range, a folder is missing, or the parts have different classes.
        MissingDependency: at `setup`, without torchvision.

    Example:
        >>> ImageFolderDataModule("data/cifar10", image_size=32, in_memory=True).shape
        (3, 32, 32)
    """

    def __init__(
        self,
        root: str = "data",
        *,
        image_size: int = 224,
        batch_size: int = 64,
        augment: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_size: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        in_memory: bool = False,
        device: str | None = None,
        num_workers: int = 0,
        wrap_train: Callable[[Dataset], Dataset] | None = None,
    ) -> None:
        check_at_least("image_size", image_size, 1)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise InvalidArgument(f"{name}={list(values)}: three numbers are needed, one for each of R, G and B.")
        super().__init__(
            root,
            batch_size=batch_size,
            augment=augment,
            mean=mean,
            std=std,
            train_size=train_size,
            val_fraction=val_fraction,
            seed=seed,
            in_memory=in_memory,
            device=device,
            num_workers=num_workers,
            wrap_train=wrap_train,
        )
        self.image_size = image_size
        self.image_shape = (3, image_size, image_size)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, the folders of `root/train`; known before `setup`."""
        return self._class_folders("train")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of the classes; known before `setup`."""
        return len(self.classes)

    def _class_folders(self, part: Part) -> list[str]:
        folder = Path(self.root, part)
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not names:
            raise InvalidArgument(
                f"root={self.root!r}: {folder} is no folder with one folder a class. Images are needed as "
                f"{folder}/<class>/<image>; is root the folder above?"
            )
        return names

    def _open(self, part: Part) -> Any:
        if part == "val" and not Path(self.root, "val").is_dir():
            return None
        names = self._class_folders(part)
        if names != self.classes:
            differ = sorted(set(names) ^ set(self.classes))
            raise InvalidArgument(
                f"{self.root}/{part} and {self.root}/train hold different classes ({', '.join(differ[:5])}). The same "
                "folders are needed in both, since a class is known by its place in the alphabetical order."
            )
        datasets = require("torchvision.datasets", extra="vision", why="ImageFolderDataModule")
        try:
            return datasets.ImageFolder(str(Path(self.root, part)))
        except FileNotFoundError as error:
            raise InvalidArgument(f"A class of {self.root}/{part} holds no image: {error}") from error

    def _decode(self, image: Any) -> Tensor:
        functional = require("torchvision.transforms.functional", extra="vision", why="ImageFolderDataModule")
        if image.size != (self.image_size, self.image_size):
            image = functional.center_crop(functional.resize(image, self.image_size), self.image_size)
        return functional.pil_to_tensor(image)
