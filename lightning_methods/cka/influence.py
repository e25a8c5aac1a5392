"""How much single samples drive a CKA value, and how certain the value is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch


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
    k, m = _grams(x, y, smallest=5)
    return _ratio(*(_left_out(a, b) for a, b in ((k, m), (k, k), (m, m))))


def bootstrap_cka(
    x: Tensor, y: Tensor, *, resamples: int = 200, confidence: float = 0.95, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Return a bootstrap interval over samples for the debiased linear CKA of two representations.

    Samples are drawn with replacement; pairs of a sample with itself stay out of every sum, as in any U-statistic, since
    duplicates would pass for similarity. All resamples are computed in a few matrix products.

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
    k, m = _grams(x, y, smallest=5)
    n = len(k)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand_as(drawn)
    )
    counts = counts.to(k.device)
    values = _ratio(*(_resampled(a, b, counts) for a, b in ((k, m), (k, k), (m, m))))
    values = values[values.isfinite()]
    if not len(values):
        nan = torch.tensor(math.nan, dtype=torch.float64)
        return nan, nan
    tail = (1 - confidence) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=values.device))
    return low, high


def _grams(x: Tensor, y: Tensor, *, smallest: int) -> tuple[Tensor, Tensor]:
    """Return the Grams of the centred features without their diagonals, in float64."""
    if x.ndim < 2 or y.ndim < 2 or len(x) != len(y) or len(x) < smallest:
        raise ShapeMismatch(
            f"The representations have the shapes {tuple(x.shape)} and {tuple(y.shape)}; features (n, ...) of the same "
            f"n samples are needed, n at least {smallest}."
        )
    grams = []
    for z in (x, y):
        z = z.detach().flatten(1).double()
        z = z - z.mean(0)
        grams.append((z @ z.T).fill_diagonal_(0))
    return grams[0], grams[1]


def _song(products: Tensor, sum_k: Tensor, sum_m: Tensor, rows: Tensor, n: float | Tensor) -> Tensor:
    """Return the unbiased HSIC from its sums (Song et al. 2012, equation 5)."""
    return (products + sum_k * sum_m / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))


def _left_out(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    a, b = k.sum(1), m.sum(1)
    shared = (k * m).sum(1)
    products = shared.sum() - 2 * shared
    rows = (a @ b) - a * b - m @ a - k @ b + shared
    return _song(products, a.sum() - 2 * a, b.sum() - 2 * b, rows, n - 1)


def _resampled(k: Tensor, m: Tensor, counts: Tensor) -> Tensor:
    a, b = counts @ k, counts @ m
    products = ((counts @ (k * m)) * counts).sum(1)
    return _song(products, (a * counts).sum(1), (b * counts).sum(1), (a * b * counts).sum(1), len(k))


def _ratio(cross: Tensor, self_x: Tensor, self_y: Tensor) -> Tensor:
    # the estimate of a self term can fall below 0 on few samples, where the ratio means nothing
    scale = (self_x.clamp(min=0) * self_y.clamp(min=0)).sqrt()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), math.nan)
