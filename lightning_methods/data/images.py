"""Images as datasets that hand out whole batches: one indexing and one standardisation a batch, on any device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate


class TensorBatch(Sequence):
    """Samples that lie together in two tensors.

    A dataset returns it from `__getitems__`. It reads like the list of samples that PyTorch expects, so any collate
    function works; `collate` takes the two tensors as they are.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Any:
        return self.inputs[index], self.targets[index]


def collate(samples: Any) -> Any:
    """Collate samples as PyTorch does, and pass a `TensorBatch` through without touching its elements."""
    if isinstance(samples, TensorBatch):
        return samples.inputs, samples.targets
    return default_collate(samples)


def fetch(dataset: Any, indices: Sequence[int]) -> Any:
    """Return the samples at `indices`, as one `TensorBatch` where the dataset can."""
    if callable(getattr(dataset, "__getitems__", None)):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


class Preprocess:
    """From pixels to standardised inputs, for a whole batch.

    Shapes: (B, C, H, W) uint8 -> (B, C, H, W) float32, or (B, C*H*W) when `flat`.

    Args:
        mean: mean of every channel, as a fraction of `scale`.
        std: standard deviation of every channel, likewise.
        scale: the pixel value that counts as 1.
        flat: whether to flatten the images.
        padding: pixels of black border for a random crop; 0 for none.
        flip: whether to mirror every second image at random.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: float = 255.0,
        flat: bool = False,
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        # a channel that never changes is left at zero instead of being divided by zero
        spread = torch.tensor([s if s > 0 else 1.0 for s in std], dtype=torch.float64)
        self._factor = (1 / (scale * spread)).float().view(-1, 1, 1)
        self._shift = (torch.tensor(mean, dtype=torch.float64) / spread).float().view(-1, 1, 1)
        self._flat = flat
        self._padding = padding
        self._flip = flip

    def to(self, device: torch.device) -> Preprocess:
        """Move the statistics to `device`."""
        self._factor, self._shift = self._factor.to(device), self._shift.to(device)
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the inputs of a batch of pixels."""
        if self._padding or self._flip:
            pixels = self._augment(pixels)
        x = pixels.float().mul_(self._factor).sub_(self._shift)
        return x.flatten(1) if self._flat else x

    def _augment(self, pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        device, pad = pixels.device, self._padding
        # drawn on the CPU: one seed gives the same images on every device
        top, left = torch.randint(0, 2 * pad + 1, (2, n, 1)).to(device)
        rows = top + torch.arange(h, device=device)
        cols = left + torch.arange(w, device=device)
        if self._flip:
            cols = torch.where((torch.rand(n, 1) < 0.5).to(device), cols.flip(1), cols)
        padded = F.pad(pixels, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        image = torch.arange(n, device=device).view(n, 1, 1)
        return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


class Images(Dataset):
    """Images with their labels; a subclass says where the pixels come from.

    Args:
        targets: (N,) class of every image.
        preprocess: from a batch of pixels to inputs; set before the first item is read.
    """

    preprocess: Preprocess

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    @abstractmethod
    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return the images at `indices` as (B, C, H, W) uint8."""

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> TensorBatch:
        inputs = self.preprocess(self.pixels(indices))
        targets = self.targets[torch.as_tensor(indices, dtype=torch.long)]
        return TensorBatch(inputs, targets.to(inputs.device, non_blocking=True))

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of every channel, as fractions of 255, exact to float64."""
        counts: np.ndarray = np.zeros(())
        for start in range(0, len(self), 1024):
            chunk = self.pixels(range(start, min(start + 1024, len(self)))).transpose(0, 1).flatten(1)
            counts = counts + np.stack([torch.bincount(c, minlength=256).cpu().numpy() for c in chunk])
        value = np.arange(256) / 255
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ value
        variance = share @ value**2 - mean**2
        return mean.tolist(), np.sqrt(np.maximum(variance, 0)).tolist()


class ImageTensors(Images):
    """Images that lie in memory as one tensor.

    Args:
        pixels: (N, C, H, W) uint8.
        targets: (N,) class of every image.
        device: where to keep the pixels; None for where they are.
    """

    def __init__(self, pixels: Tensor, targets: Tensor, device: str | None = None) -> None:
        super().__init__(targets)
        self._pixels = pixels if device is None else pixels.to(device)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return the images at `indices` as (B, C, H, W) uint8."""
        return self._pixels[torch.as_tensor(indices, dtype=torch.long).to(self._pixels.device)]


class ImageItems(Images):
    """Images that are read from another dataset whenever they are needed.

    Args:
        source: items `(image, label)`.
        indices: which items.
        targets: (N,) class of every chosen item.
        decode: from an image of the source to (C, H, W) uint8.
    """

    def __init__(
        self, source: Any, indices: NDArray[np.int64], targets: Tensor, decode: Callable[[Any], Tensor]
    ) -> None:
        super().__init__(targets)
        self._source, self._indices, self._decode = source, indices, decode

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return the images at `indices` as (B, C, H, W) uint8."""
        return torch.stack([self._decode(self._source[int(self._indices[i])][0]) for i in indices])
