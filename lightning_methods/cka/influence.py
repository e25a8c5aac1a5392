"""How much single samples drive a CKA value, and how certain the value is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch

#: below this, leaving one out leaves too few for an unbiased estimate
FEWEST = 5
_RESAMPLES, _CONFIDENCE = 200, 0.95


class Certainty(NamedTuple):
    """What the samples say about one value of the debiased linear CKA: NaN and -1 where it is not defined.

    Attributes:
        low: lower end of the bootstrap interval.
        high: upper end.
        influence: the largest change when one sample is left out.
        sample: which one that is.
    """

    low: float
    high: float
    influence: float
    sample: int


def certainty(x: Tensor, y: Tensor) -> Certainty:
    """Return interval and most influential sample of two representations at once, see the functions below.

    Shapes:
        x `(n, ...)`, y `(n, ...)` with `n` at least 5.

    Args:
        x: features of `n` samples.
        y: features of the same samples.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 5.

    Example:
        >>> import torch
        >>> x = torch.arange(30.0)[:, None] % 5
        >>> y = x.clone()
        >>> y[7] = 50.0
        >>> certainty(x, y).sample
        7
    """
    k, m = _grams(x, y)
    changes = (_left_out_ratio(k, m) - _ratio(*(_song_of(a, b) for a, b in ((k, m), (k, k), (m, m))))).abs()
    low, high = _interval(k, m, _RESAMPLES, _CONFIDENCE, seed=0)
    if not changes.isfinite().any():
        return Certainty(float(low), float(high), math.nan, -1)
    sample = int(changes.nan_to_num(nan=-1.0, posinf=-1.0).argmax())
    return Certainty(float(low), float(high), float(changes[sample]), sample)


def leave_one_out_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the debiased linear CKA of two representations without each sample in turn, exactly.

    Linear CKA is known to follow a few far samples (Davari et al. 2023). Samples without which the value changes much
    are those; removing one changes every sum in HSIC by a row, so that all `n` values cost as much as one.

    Shapes:
        x `(n, ...)`, y `(n, ...)` with `n` at least 5; returns `(n,)` in float64, NaN where one does not vary.

    Args:
        x: features of `n` samples.
        y: features of the same samples.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 5.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> leave_one_out_cka(x, x).round(decimals=6)
        tensor([1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    return _left_out_ratio(*_grams(x, y))


def bootstrap_cka(
    x: Tensor, y: Tensor, *, resamples: int = _RESAMPLES, confidence: float = _CONFIDENCE, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Return a bootstrap interval over samples for the debiased linear CKA of two representations.

    Samples are drawn with replacement; pairs of a sample with itself stay out of every sum, as in any U-statistic,
    since duplicates would pass for similarity. All resamples are computed in a few matrix products.

    Shapes:
        x `(n, ...)`, y `(n, ...)` with `n` at least 5; returns two scalars in float64, the lower and the upper end.

    Args:
        x: features of `n` samples.
        y: features of the same samples.
        resamples: number of bootstrap draws.
        confidence: share of the draws that lie within.
        seed: of the draws; the global random state is not touched.

    Raises:
        InvalidArgument: for less than 10 resamples or a confidence outside (0, 1).
        ShapeMismatch: if the numbers of samples differ, or there are less than 5.

    Example:
        >>> import torch
        >>> x = torch.arange(60.0).reshape(30, 2) ** 2
        >>> low, high = bootstrap_cka(x, x)
        >>> print(f"{low:.3f} {high:.3f}")
        1.000 1.000
    """
    if resamples < 10:
        raise InvalidArgument(f"resamples={resamples}: at least 10 draws are needed for an interval.")
    if not 0 < confidence < 1:
        raise InvalidArgument(f"confidence={confidence!r}: a share between 0 and 1 is needed.")
    k, m = _grams(x, y)
    return _interval(k, m, resamples, confidence, seed)


def _grams(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Grams of the centred features without their diagonals, in float64."""
    if x.ndim < 2 or y.ndim < 2 or len(x) != len(y) or len(x) < FEWEST:
        raise ShapeMismatch(
            f"The representations have the shapes {tuple(x.shape)} and {tuple(y.shape)}; features (n, ...) of the same "
            f"n samples are needed, n at least {FEWEST}."
        )
    grams = []
    for z in (x, y):
        z = z.detach().flatten(1)
        # centred in float64, or a large mean would use up the digits of the product
        z = (z.double() - z.double().mean(0)).to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        largest = z.abs().amax().clamp(min=torch.finfo(z.dtype).tiny)
        z = z / largest  # CKA does not see the scale, and squares of large features would overflow
        with torch.autocast(z.device.type, enabled=False):
            grams.append((z @ z.T).double().fill_diagonal_(0))
    return grams[0], grams[1]


def _song(products: Tensor, sum_k: Tensor, sum_m: Tensor, rows: Tensor, n: float | Tensor) -> Tensor:
    """Return the unbiased HSIC from its sums (Song et al. 2012, equation 5)."""
    return (products + sum_k * sum_m / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))


def _song_of(k: Tensor, m: Tensor) -> Tensor:
    return _song((k * m).sum(), k.sum(), m.sum(), k.sum(1) @ m.sum(1), len(k))


def _left_out(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    a, b = k.sum(1), m.sum(1)
    shared = (k * m).sum(1)
    products = shared.sum() - 2 * shared
    rows = (a @ b) - a * b - m @ a - k @ b + shared
    return _song(products, a.sum() - 2 * a, b.sum() - 2 * b, rows, n - 1)


def _left_out_ratio(k: Tensor, m: Tensor) -> Tensor:
    return _ratio(*(_left_out(a, b) for a, b in ((k, m), (k, k), (m, m))))


def _interval(k: Tensor, m: Tensor, resamples: int, confidence: float, seed: int) -> tuple[Tensor, Tensor]:
    n = len(k)
    # drawn on the CPU, so that every device has the same draws
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones_like(drawn, dtype=torch.float64)
    counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones).to(k.device)
    values = _ratio(*(_resampled(a, b, counts) for a, b in ((k, m), (k, k), (m, m))))
    values = values[values.isfinite()]
    if not len(values):
        nan = torch.tensor(math.nan, dtype=torch.float64)
        return nan, nan
    tail = (1 - confidence) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=values.device))
    return low, high


def _resampled(k: Tensor, m: Tensor, counts: Tensor) -> Tensor:
    a, b = counts @ k, counts @ m
    products = ((counts @ (k * m)) * counts).sum(1)
    return _song(products, (a * counts).sum(1), (b * counts).sum(1), (a * b * counts).sum(1), len(k))


def _ratio(cross: Tensor, self_x: Tensor, self_y: Tensor) -> Tensor:
    # the estimate of a self term can fall below 0 on few samples, where the ratio means nothing
    scale = (self_x.clamp(min=0) * self_y.clamp(min=0)).sqrt()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), math.nan)
