"""What every image DataModule of the collection does the same way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_methods.core._lightning import LightningDataModule
from lightning_methods.data._checks import check_at_least, check_fraction
from lightning_methods.data.images import Images, Preprocess, collate
from lightning_methods.errors import InvalidArgument


class ImageDataModule(LightningDataModule):
    """Base of the image DataModules: splits once, standardises with training statistics, makes the loaders.

    A subclass sets `num_classes` and `image_shape`, and gives the parts by `_load_fit` and `_load_test`.

    Args:
        batch_size: examples a batch. The last, smaller batch is kept.
        num_workers: worker processes of every loader.
        seed: decides the split.
        val_fraction: share of the training examples held out for validation, stratified; 0 for none.
        flat: whether to flatten the images.
        mean: mean of every channel as a fraction of the largest pixel value; None to measure it on the training part.
        std: standard deviation, likewise.
        augment: whether training images are randomly shifted (by up to an eighth of the side, black border) and
            mirrored.
        wrap_train: from the training dataset to the one that is trained on, as `NoisyLabels` or `ImbalancedSubset`.

    Attributes:
        train_dataset: the training part after `setup`, as `wrap_train` returned it; `val_dataset` and `test_dataset`
            likewise, never wrapped.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    # the pixel value that counts as white
    _white = 255.0

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        val_fraction: float,
        flat: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: bool = False,
        wrap_train: Callable[[Dataset], Dataset] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("seed", seed, 0)
        check_fraction("val_fraction", val_fraction)
        if (mean is None) != (std is None):
            raise InvalidArgument(f"mean={mean} and std={std}: both or neither are needed.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.flat = flat
        self.augment = augment
        self.wrap_train = wrap_train
        self._device: str | None = None
        self._statistics = None if mean is None or std is None else (list(mean), list(std))
        self._parts: tuple[Images, Images | None] | None = None
        self.train_dataset: Dataset | None = None
        self.val_dataset: Dataset | None = None
        self.test_dataset: Dataset | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, known before `setup`: (C, H, W), or (C*H*W,) when `flat`."""
        c, h, w = self.image_shape
        return (c * h * w,) if self.flat else (c, h, w)

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel that the inputs are standardised with."""
        if self._statistics is None:
            mean, std = self._fit_parts()[0].statistics()
            rescale = 255.0 / self._white
            self._statistics = ([m * rescale for m in mean], [s * rescale for s in std])
        return self._statistics

    def setup(self, stage: str | None = None) -> None:
        """Build the parts that `stage` needs, each once."""
        if stage in (None, "fit") and self.train_dataset is None:
            train = self._ready(self._fit_parts()[0], augment=self.augment)
            self.train_dataset = self._wrapped(train)
        if stage in (None, "fit", "validate") and self.val_dataset is None:
            val = self._fit_parts()[1]
            self.val_dataset = None if val is None else self._ready(val)
        if stage in (None, "test", "predict") and self.test_dataset is None:
            self.test_dataset = self._ready(self._load_test())

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled loader of the training part."""
        return self._loader(self.train_dataset, "fit", shuffle=True)

    def val_dataloader(self) -> Any:
        """Return the loader of the validation part, or no loader where there is no such part."""
        if self.val_dataset is None and self._parts is not None:
            return []
        return self._loader(self.val_dataset, "validate")

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test part."""
        return self._loader(self.test_dataset, "test")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the test part, in its order."""
        return self._loader(self.test_dataset, "predict")

    @abstractmethod
    def _load_fit(self) -> tuple[Images, Images | None]:
        """Return the training and the validation part."""

    @abstractmethod
    def _load_test(self) -> Images:
        """Return the test part."""

    def _fit_parts(self) -> tuple[Images, Images | None]:
        if self._parts is None:
            self._parts = self._load_fit()
        return self._parts

    def _ready(self, images: Images, *, augment: bool = False) -> Images:
        mean, std = self.statistics
        padding = self.image_shape[-1] // 8 if augment else 0
        images.preprocess = Preprocess(mean, std, scale=self._white, flat=self.flat, padding=padding, flip=augment)
        if self._device is not None:
            images.preprocess.to(images.pixels([0]).device)
        return images

    def _wrapped(self, train: Dataset) -> Dataset:
        if self.wrap_train is None:
            return train
        wrapped = self.wrap_train(train)
        if not (hasattr(wrapped, "__getitem__") and hasattr(wrapped, "__len__")):
            raise InvalidArgument(
                f"wrap_train returned {type(wrapped).__name__}. A map-style dataset is needed, as NoisyLabels returns."
            )
        return wrapped

    def _loader(self, dataset: Dataset | None, stage: str, *, shuffle: bool = False) -> DataLoader:
        if dataset is None:
            raise InvalidArgument(f"The data are not set up. Call setup({stage!r}) first; a Trainer does it by itself.")
        strategy = getattr(self.trainer, "strategy", None)
        on_gpu = strategy is not None and strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            pin_memory=on_gpu and self._device is None,
        )
