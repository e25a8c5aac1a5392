"""Standardisation of features by the statistics of a training split, kept with the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_methods.core.gather import all_sum
from lightning_methods.errors import InvalidArgument, ShapeMismatch

# a feature that varies by less than so much of its size is the same everywhere but for rounding
_CONSTANT = 1e-12


class Standardize(nn.Module):
    r"""Subtract the mean of each feature and divide by its standard deviation; features that do not vary become 0.

    .. math:: z = (x - \mu) / \sigma

    The statistics are buffers, so that checkpoints hold them.

    Shapes:
        `(B, F)`; returns `(B, F)`.

    Args:
        features: number of features F.

    Raises:
        InvalidArgument: if it is used before `fit`, or fitted on nothing or on features that are not finite.
        ShapeMismatch: for another number of features.

    Example:
        >>> import torch
        >>> scaler = Standardize(2).fit([torch.tensor([[1.0, 5.0], [3.0, 5.0]])])
        >>> scaler(torch.tensor([[3.0, 7.0]]))
        tensor([[1., 0.]])
    """

    mean: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("scale", torch.zeros(features, dtype=torch.float64))  # 0 of what does not vary
        self.register_buffer("fitted", torch.tensor(False))
        # beside the buffers: averages of the weights, copied before the fit, are swapped in to validate
        self._latest: tuple[Tensor, Tensor] | None = None

    def fit(self, batches: Iterable[Tensor]) -> Standardize:
        """Take the statistics of batches `(B, F)`, of all ranks together."""
        count = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        total, squares = torch.zeros_like(self.mean).double(), torch.zeros_like(self.mean).double()
        shift: Tensor | None = None
        for x in batches:
            x = self._checked(x).double()
            if shift is None:  # the same on all ranks, near the mean: squares do not cancel then
                shift = all_sum(x.mean(0) if len(x) else torch.zeros_like(total))
            count += len(x)
            total += (x - shift).sum(0)
            squares += (x - shift).square().sum(0)
        if shift is None:
            shift = all_sum(torch.zeros_like(total))
        count, total, squares = all_sum(count), all_sum(total), all_sum(squares)
        if not count:
            raise InvalidArgument("There is no graph to take the statistics of the features from.")
        offset = total / count
        mean = shift + offset
        deviation = (squares / count - offset.square()).clamp(min=0).sqrt()
        if not bool(deviation.isfinite().all()):
            bad = int((~deviation.isfinite()).nonzero()[0])
            raise InvalidArgument(f"Feature {bad} is not finite in the training data. Are the signals?")
        varies = deviation > _CONSTANT * mean.abs().clamp(min=torch.finfo(torch.float64).tiny)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, 1 / deviation.where(varies, 1.0), 0.0))
        self.fitted.fill_(True)
        self._latest = (self.mean.clone(), self.scale.clone())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return standardised features, in the precision of the given ones."""
        if not self.fitted and self._latest is None:
            raise InvalidArgument(
                "The statistics of the features are not known yet: fit the module, or load the checkpoint of a fit."
            )
        mean, scale = (self.mean, self.scale) if self.fitted or self._latest is None else self._latest
        return ((self._checked(x).double() - mean.to(x.device)) * scale.to(x.device)).to(x.dtype)

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ShapeMismatch(f"The features have the shape {tuple(x.shape)}; (B, {len(self.mean)}) is needed.")
        return x

    def _apply(self, fn: object, recurse: bool = True) -> Standardize:
        """Move to other devices, but keep the statistics in float64 whatever the module is cast to."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
