"""Images in poses: a range of them to train on, and one test set a pose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_methods.core._lightning import LightningDataModule
from lightning_methods.data._checks import check_at_least
from lightning_methods.data._strata import draw_stratified
from lightning_methods.data._warping import AFFNIST, Level, PoseRange, draw, level, on_canvas, warp
from lightning_methods.data.base import ImageDataModule
from lightning_methods.data.cifar10 import CIFAR10DataModule
from lightning_methods.data.digits import DigitsDataModule
from lightning_methods.data.image_folder import ImageFolderDataModule
from lightning_methods.data.images import Images, TensorBatch, collate
from lightning_methods.data.mnist import MNISTDataModule
from lightning_methods.errors import InvalidArgument, check_choice

Source = Literal["mnist", "digits", "cifar10", "image_folder"]


class PosedImages(Dataset):
    """Images, each in a pose of its own that its number decides.

    Item `i + n * epoch` of n images is image i in the pose of that epoch, so that workers need not know the epoch.

    Args:
        images: the images.
        poses: what poses are drawn from.
        seed: of the draws.
        canvas: side of the black square the images are laid in the middle of.
        white: the pixel value that becomes 1.
        rows: which of the images; all by default.
    """

    def __init__(
        self,
        images: Images,
        poses: PoseRange,
        *,
        seed: int,
        canvas: int | None,
        white: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._images, self._poses, self._seed, self._canvas, self._white = images, poses, seed, canvas, white
        self._rows = np.arange(len(images)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.targets = images.targets[torch.from_numpy(self._rows)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> TensorBatch:
        numbers = np.asarray(indices, dtype=np.int64)
        places = numbers % len(self)
        pixels = on_canvas(self._images.pixels(self._rows[places].tolist()).float() / self._white, self._canvas)
        moved = warp(pixels, draw(self._poses, self._seed, numbers, pixels))
        return TensorBatch(moved, self.targets[torch.from_numpy(places)])


class _Epochs(Sampler[int]):
    """Shuffle the images, and number them so that each epoch has poses of its own.

    The order follows from seed and epoch, whatever else draws random numbers: workers do, in their own number.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._size, self._seed, self._epoch = size, seed, epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        epoch = self._epoch()
        order = np.random.default_rng((self._seed, epoch)).permutation(self._size)
        return iter((order + self._size * epoch).tolist())


class PoseDataModule(LightningDataModule):
    """Images turned, shifted, scaled and sheared: trained in a range of poses, tested at levels in and beyond it.

    Training images take a new order and new poses in every epoch, the same in every run of one seed, for any number of
    workers and after a resume. Validation images have poses of the training range, always the same. For the test there
    is one loader a level, with the images in one order in all of them, so that they can be compared one by one.

    Values are from 0 to 1, and black where nothing was.

    Shapes: inputs (B, C, H, W) float32; targets (B,) int64.

    Args:
        dataset: `"mnist"`, `"digits"` (scikit-learn's, nothing to download), `"cifar10"` or `"image_folder"`.
        root: folder of the data. Default "data".
        preset: `"affnist"`: digits anywhere on a canvas of 40x40 in training; tested on that, and under rotations up to
            20 degrees, shears up to 0.2 and scales from 0.8 to 1.2 of each axis. Excludes ranges and levels.
        train_rotation: range of the angles in degrees, counter-clockwise. Default (-30, 30).
        train_translation: largest shift along each axis in whole pixels. Default 0.
        train_scale: range of the size. Default (1, 1).
        train_shear: range of the slope of vertical lines. Default (0, 0).
        test_rotations: angles, a level each. Default every 15 degrees from -90 to 90.
        test_translations: lengths of a shift in a direction drawn for each image, a level each. Default none.
        test_scales: sizes, a level each. Default none.
        test_shears: slopes, a level each. Default none.
        canvas: side of a black square that images are laid into before they are moved. Default none, 40 in `preset`.
        batch_size: examples a batch. Default 64; the last, smaller batch is kept.
        train_size: how many training images to use, a stratified draw. Default all.
        test_size: how many test images to use at each level, a stratified draw, the same at all. Default all.
        val_fraction: share of the training images held out. Default 0.1; 0 for none.
        image_size: side of the images of `"image_folder"`. Default 64.
        seed: decides split, draws and poses. Default 0.
        download: whether to download missing files of MNIST and CIFAR-10. Default False.
        num_workers: worker processes of every loader. Default 0.

    Attributes:
        levels: (name, axis, value, poses) of every test loader, in their order.

    Raises:
        InvalidArgument: if an argument is out of range or contradicts another; at `setup`, if the files are missing.
        MissingDependency: at `setup`, without torchvision or scikit-learn.

    Example:
        >>> data = PoseDataModule("digits", train_rotation=(-15, 15), test_rotations=(0, 45))
        >>> data.shape, [level.name for level in data.levels]
        ((1, 8, 8), ['rotation_0', 'rotation_45'])
    """

    def __init__(
        self,
        dataset: Source = "mnist",
        root: str = "data",
        *,
        preset: Literal["affnist"] | None = None,
        train_rotation: tuple[float, float] | None = None,
        train_translation: int | None = None,
        train_scale: tuple[float, float] | None = None,
        train_shear: tuple[float, float] | None = None,
        test_rotations: Sequence[float] | None = None,
        test_translations: Sequence[float] | None = None,
        test_scales: Sequence[float] | None = None,
        test_shears: Sequence[float] | None = None,
        canvas: int | None = None,
        batch_size: int = 64,
        train_size: int | None = None,
        test_size: int | None = None,
        val_fraction: float = 0.1,
        image_size: int = 64,
        seed: int = 0,
        download: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_choice("dataset", dataset, ("mnist", "digits", "cifar10", "image_folder"))
        if preset is not None:
            check_choice("preset", preset, ("affnist",))
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        if test_size is not None:
            check_at_least("test_size", test_size, 1)
        trained: dict[str, Any] = {
            "train_rotation": train_rotation,
            "train_translation": train_translation,
            "train_scale": train_scale,
            "train_shear": train_shear,
        }
        tested: dict[str, Any] = {
            "test_rotations": test_rotations,
            "test_translations": test_translations,
            "test_scales": test_scales,
            "test_shears": test_shears,
        }
        if preset is not None:
            given = [name for name, value in {**trained, **tested}.items() if value is not None]
            if given:
                raise InvalidArgument(f"preset={preset!r} decides the poses, but {', '.join(given)} are given too.")
            self.train_poses, self.levels = _affnist()
            canvas = 40 if canvas is None else canvas
        else:
            self.train_poses, self.levels = _trained(**trained), _levels(**tested)
        self.source = _source(dataset, root, download, train_size, val_fraction, seed, image_size)
        smallest = max(self.source.image_shape[1:])
        if canvas is not None and canvas < smallest:
            raise InvalidArgument(f"canvas={canvas} is smaller than the images. At least {smallest} is needed.")
        self.canvas, self.batch_size, self.num_workers, self.seed = canvas, batch_size, num_workers, seed
        self.train_size, self.test_size = train_size, test_size
        self.train_dataset: PosedImages | None = None
        self.val_dataset: PosedImages | None = None
        self.test_datasets: list[PosedImages] = []

    @property
    def num_classes(self) -> int:
        """Number of the classes; known before `setup`."""
        return self.source.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one input; known before `setup`."""
        c, h, w = self.source.image_shape
        return (c, h, w) if self.canvas is None else (c, self.canvas, self.canvas)

    def prepare_data(self) -> None:
        """Download the files where `download` asks for it and they are missing."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Build the parts that `stage` needs, each once."""
        if stage in (None, "fit", "validate") and self.train_dataset is None:
            train, val = self.source._fit_parts()
            rows = None
            if isinstance(self.source, DigitsDataModule) and self.train_size is not None:
                rows = _subset(train, self.train_size, self.seed, "train_size")
            self.train_dataset = self._posed(train, self.train_poses, rows)
            # poses that no training image has: other draws of the same ranges
            self.val_dataset = None if val is None else self._posed(val, self.train_poses, draws=1)
        if stage in (None, "test", "predict") and not self.test_datasets:
            test = self.source._load_test()
            rows = None if self.test_size is None else _subset(test, self.test_size, self.seed, "test_size")
            self.test_datasets = [self._posed(test, one.poses, rows, draws=2) for one in self.levels]

    def _posed(
        self, images: Images, poses: PoseRange, rows: Sequence[int] | None = None, *, draws: int = 0
    ) -> PosedImages:
        white = self.source._white
        return PosedImages(images, poses, seed=3 * self.seed + draws, canvas=self.canvas, white=white, rows=rows)

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled loader of the training part."""
        dataset = self._made(self.train_dataset, "fit")
        return self._loader(dataset, sampler=_Epochs(len(dataset), self.seed, self._epoch))

    def val_dataloader(self) -> Any:
        """Return the loader of the validation part, or no loader where there is no such part."""
        if self.val_dataset is None and self.train_dataset is not None:
            return []
        return self._loader(self._made(self.val_dataset, "validate"))

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a level."""
        self._made(self.test_datasets or None, "test")
        return [self._loader(dataset) for dataset in self.test_datasets]

    def predict_dataloader(self) -> list[DataLoader]:
        """Return one loader a level."""
        return self.test_dataloader()

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    @staticmethod
    def _made(dataset: Any, stage: str) -> Any:
        if dataset is None:
            raise InvalidArgument(f"The data are not set up. Call setup({stage!r}) first; a Trainer does it by itself.")
        return dataset

    def _loader(self, dataset: PosedImages, sampler: Sampler[int] | None = None) -> DataLoader:
        strategy = getattr(self.trainer, "strategy", None)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            pin_memory=strategy is not None and strategy.root_device.type == "cuda",
        )


def _source(
    dataset: Source,
    root: str,
    download: bool,
    train_size: int | None,
    val_fraction: float,
    seed: int,
    image_size: int,
) -> ImageDataModule:
    usual: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed}
    if dataset == "digits":
        if train_size is not None:
            check_at_least("train_size", train_size, 1)
        return DigitsDataModule(**usual)
    made: dict[str, Callable[..., ImageDataModule]] = {
        "mnist": partial(MNISTDataModule, download=download),
        "cifar10": partial(CIFAR10DataModule, download=download),
        "image_folder": partial(ImageFolderDataModule, image_size=image_size),
    }
    return made[dataset](root, train_size=train_size, **usual)


def _subset(images: Images, size: int, seed: int, argument: str) -> Sequence[int]:
    if size > len(images):
        raise InvalidArgument(f"{argument}={size}: there are {len(images)} images. Lower it.")
    return draw_stratified(images.targets.numpy(), size, seed)[0].tolist()


def _trained(
    train_rotation: tuple[float, float] | None,
    train_translation: int | None,
    train_scale: tuple[float, float] | None,
    train_shear: tuple[float, float] | None,
) -> PoseRange:
    rotation = _range("train_rotation", (-30.0, 30.0) if train_rotation is None else train_rotation)
    scale = _range("train_scale", (1.0, 1.0) if train_scale is None else train_scale)
    shear = _range("train_shear", (0.0, 0.0) if train_shear is None else train_shear)
    if scale[0] <= 0:
        raise InvalidArgument(f"train_scale={scale}: positive sizes are needed.")
    shift = 0 if train_translation is None else train_translation
    check_at_least("train_translation", shift, 0)
    return PoseRange(rotation=rotation, shift=shift, scale=scale, shear=shear)


def _range(name: str, given: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(given, (list, tuple)) or len(given) != 2 or not np.isfinite(given).all() or given[0] > given[1]:
        raise InvalidArgument(f"{name}={given}: two finite numbers are needed, the lower one first.")
    return float(given[0]), float(given[1])


def _levels(
    test_rotations: Sequence[float] | None,
    test_translations: Sequence[float] | None,
    test_scales: Sequence[float] | None,
    test_shears: Sequence[float] | None,
) -> list[Level]:
    others = test_translations or test_scales or test_shears
    if test_rotations is None:
        test_rotations = () if others else range(-90, 91, 15)
    levels = [level("rotation", angle) for angle in test_rotations]
    levels += [level("translation", length) for length in test_translations or ()]
    levels += [level("scale", size) for size in test_scales or ()]
    levels += [level("shear", slope) for slope in test_shears or ()]
    names = [one.name for one in levels]
    if not levels or len(set(names)) < len(names):
        raise InvalidArgument(f"The test levels are {names}: at least one is needed, each once.")
    if not np.isfinite([one.value for one in levels]).all():
        raise InvalidArgument(f"The test levels are {names}: finite numbers are needed.")
    if any(size <= 0 for size in test_scales or ()) or any(length < 0 for length in test_translations or ()):
        raise InvalidArgument("Sizes in test_scales must be positive, lengths in test_translations not negative.")
    return levels


def _affnist() -> tuple[PoseRange, list[Level]]:
    anywhere = PoseRange(inside=True)
    return anywhere, [Level("trained", "trained", 0.0, anywhere), Level("affnist", "affnist", 0.0, AFFNIST)]
