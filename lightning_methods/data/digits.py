"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_methods.data._checks import check_fraction
from lightning_methods.data._strata import draw_stratified
from lightning_methods.data.base import ImageDataModule
from lightning_methods.data.images import Images, ImageTensors
from lightning_methods.errors import InvalidArgument, require


class DigitsDataModule(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: no download, a training takes seconds.

    The split is stratified and decided by `seed` alone; by default 1,258 train, 180 validation and 359 test images.
    Inputs are standardised with the mean and standard deviation of the training part.

    Shapes: inputs (B, 1, 8, 8) float32, or (B, 64) when `flat`; targets (B,) int64.

    Args:
        batch_size: examples a batch. Default 64; the last, smaller batch is kept.
        flat: whether to hand out vectors of 64. Default False.
        seed: decides the split. Default 0.
        val_fraction: share of all images held out for validation. Default 0.1; 0 for none.
        test_fraction: share of all images held out for the test. Default 0.2.
        num_workers: worker processes of every loader. Default 0, the fastest for these data.
        wrap_train: from the training dataset to the one that is trained on, as `NoisyLabels`. Default None.

    Raises:
        InvalidArgument: if an argument is out of range.
        MissingDependency: at `setup`, without scikit-learn.

    Example:
        >>> digits = DigitsDataModule(flat=True)
        >>> digits.shape, digits.num_classes
        ((64,), 10)
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    _white = 16.0

    def __init__(
        self,
        batch_size: int = 64,
        *,
        flat: bool = False,
        seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        num_workers: int = 0,
        wrap_train: Callable[[Dataset], Dataset] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            flat=flat,
            wrap_train=wrap_train,
        )
        check_fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise InvalidArgument(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on. "
                "A sum below 1 is needed."
            )
        self.test_fraction = test_fraction

    def _load_fit(self) -> tuple[Images, Images | None]:
        train, val, _ = self._load()
        return train, val if len(val) else None

    def _load_test(self) -> Images:
        return self._load()[2]

    def _load(self) -> list[ImageTensors]:
        sklearn_datasets = require("sklearn.datasets", extra="digits", why="DigitsDataModule")
        pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
        pixels = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
        labels = labels.astype(np.int64)
        test, rest = draw_stratified(labels, round(self.test_fraction * len(labels)), self.seed)
        val, train = draw_stratified(labels[rest], round(self.val_fraction * len(labels)), self.seed)
        return [ImageTensors(pixels[part], torch.from_numpy(labels[part])) for part in (rest[train], rest[val], test)]
