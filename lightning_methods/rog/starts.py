"""Where the search for the minimum covariance determinant begins: robust starts without chance, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_methods.rog.csteps import Packed, smallest

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_FLAT = 1e-10  # share of the mean variance below which a feature does not vary


def median_start(packed: Packed) -> Tensor:
    """Return the supports of the half that is nearest to the coordinate-wise median, in units of the MAD.

    In many dimensions the squared distances of clustered outliers to the median grow with the dimension, and the ball
    leaves them out, where random subsets are all contaminated.
    """
    z = _standardised(packed)
    return smallest(_lengths(packed, z), _half(packed))


def ogk_start(packed: Packed) -> Tensor:
    """Return the supports by the orthogonalised Gnanadesikan-Kettenring estimate (Maronna and Zamar 2002).

    Robust variances of sums and differences give a correlation matrix; along its eigenvectors medians and MADs are
    taken again.
    """
    z = _standardised(packed)
    d = z.shape[2]
    correlation = torch.eye(d, dtype=z.dtype, device=z.device).repeat(len(z), 1, 1)
    for j in range(d - 1):
        plus, minus = z[:, :, j : j + 1] + z[:, :, j + 1 :], z[:, :, j : j + 1] - z[:, :, j + 1 :]
        a, b = (_mad(packed, pair, _median(packed, pair)).square() for pair in (plus, minus))
        correlation[:, j, j + 1 :] = correlation[:, j + 1 :, j] = (a - b) / 4
    return _along_eigenvectors(packed, z, correlation)


def rank_start(packed: Packed) -> Tensor:
    """Return the supports by Spearman's rank correlation, as in the deterministic MCD (Hubert et al. 2012)."""
    z = _standardised(packed)
    return _along_eigenvectors(packed, z, _correlation(packed, _ranks(packed, z)))


def normal_scores_start(packed: Packed) -> Tensor:
    """Return the supports by the correlation of the normal scores of the ranks (Hubert et al. 2012)."""
    z = _standardised(packed)
    count = packed.real.sum(1)[:, None, None].to(z.dtype)
    share = (_ranks(packed, z) - 1 / 3) / (count + 1 / 3)
    return _along_eigenvectors(packed, z, _correlation(packed, torch.special.ndtri(share.clamp(1e-12, 1 - 1e-12))))


def tanh_start(packed: Packed) -> Tensor:
    """Return the supports by the correlation of the hyperbolic tangents of the features (Hubert et al. 2012)."""
    z = _standardised(packed)
    return _along_eigenvectors(packed, z, _correlation(packed, z.tanh()))


def spatial_sign_start(packed: Packed) -> Tensor:
    """Return the supports by the scatter of the directions from the median (Hubert et al. 2012)."""
    z = _standardised(packed)
    length = z.square().sum(2, keepdim=True).sqrt()
    directions = z / length.clamp(min=torch.finfo(z.dtype).tiny)
    return _along_eigenvectors(packed, z, torch.bmm(directions.mT, directions))


def random_start(packed: Packed, priority: Tensor) -> Tensor:
    """Return the supports of the `h` points of least `priority`, a random number for each point."""
    return smallest(priority.masked_fill(~packed.real, torch.inf), packed.h)


DETERMINISTIC = {
    "median": median_start,
    "ogk": ogk_start,
    "rank": rank_start,
    "normal_scores": normal_scores_start,
    "tanh": tanh_start,
    "spatial_sign": spatial_sign_start,
}


def _half(packed: Packed) -> Tensor:
    return (packed.real.sum(1) + 1) // 2


def _median(packed: Packed, x: Tensor) -> Tensor:
    """Return the lower median `(K, 1, d)` of the points that there are."""
    return lower_median(x, packed.real)


def lower_median(x: Tensor, real: Tensor) -> Tensor:
    """Return the lower median `(K, 1, d)` of the points `(K, n, d)` where `real (K, n)`, 0 where there are none."""
    if bool(real.all()):
        return x.mT.contiguous().median(dim=2).values[:, None, :]  # without the copies of nanmedian
    gaps = x.masked_fill(~real[:, :, None], torch.nan)
    return torch.nan_to_num(gaps.nanmedian(dim=1, keepdim=True).values)


def _mad(packed: Packed, x: Tensor, center: Tensor) -> Tensor:
    return _MAD_TO_SIGMA * _median(packed, (x - center).abs())[:, 0]


def _standardised(packed: Packed) -> Tensor:
    """Return the features in units of their MAD from their median; those that do not vary become 0."""
    centred = packed.x  # the points are packed about their median
    scale = _MAD_TO_SIGMA * _median(packed, centred.abs())[:, 0]
    # a rectified feature may be 0 for more than half of the points and vary all the same
    deviation = (centred.square().sum(1) / packed.real.sum(1).clamp(min=1)[:, None]).sqrt()
    scale = torch.where(scale > 0, scale, deviation)
    flat = scale.square() <= _FLAT * deviation.square().mean(1, keepdim=True)
    return centred * torch.where(flat, 0.0, 1 / scale.masked_fill(flat, 1.0))[:, None, :]


def _lengths(packed: Packed, z: Tensor) -> Tensor:
    return z.square().sum(2).masked_fill(~packed.real, torch.inf)


def _ranks(packed: Packed, z: Tensor) -> Tensor:
    """Return the ranks from 1 within each class and feature; equal values share their mean rank."""
    filled = z.masked_fill(~packed.real[:, :, None], torch.inf).mT.contiguous()
    ordered = filled.sort(dim=2).values
    low = torch.searchsorted(ordered, filled, side="left")
    high = torch.searchsorted(ordered, filled, side="right")
    return ((low + high + 1).to(z.dtype) / 2).mT


def _correlation(packed: Packed, scores: Tensor) -> Tensor:
    weight = packed.real[:, :, None].to(scores.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centred = (scores - (scores * weight).sum(1, keepdim=True) / count) * weight
    covariance = torch.bmm(centred.mT, centred) / count
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    deviation = deviation.masked_fill(deviation == 0, 1.0)
    return covariance / (deviation[:, :, None] * deviation[:, None, :])


def _along_eigenvectors(packed: Packed, z: Tensor, scatter: Tensor) -> Tensor:
    """Return the nearest half when medians and MADs are taken along the eigenvectors of a robust scatter."""
    _, vectors = torch.linalg.eigh(scatter)
    projected = torch.bmm(z, vectors)
    first = _mad(packed, projected, _median(packed, projected))
    first = torch.where(first > 0, first, 1.0)[:, None, :]
    # the centre is the median of the whitened points (Hubert et al. 2012, section 3)
    whitened = torch.bmm(projected / first, vectors.mT)
    centre = torch.bmm(torch.bmm(_median(packed, whitened), vectors) * first, vectors.mT)
    along = torch.bmm(z - centre, vectors) / first
    return smallest(_lengths(packed, along), _half(packed))
