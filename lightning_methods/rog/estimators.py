"""Class means and one shared covariance of labelled features: plain, as in the released code, and robust."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_methods.rog.mcd import fast_mcd

Estimator = Literal["mcd", "official", "sample"]

_KEPT = 0.7  # share of each class that the released code keeps
_ROWS = 65_536  # rows that are worked on at once
_FLOOR = 1e-8  # of the variance in any direction, as a share of the largest


class TiedEstimate(NamedTuple):
    """Means `(C, d)`, shared covariance `(d, d)`, and which samples they are of, `(n,)` bool."""

    location: Tensor
    covariance: Tensor
    support: Tensor


def tied_estimate(
    x: Tensor, y: Tensor, num_classes: int, *, estimator: Estimator, generator: torch.Generator, **settings: Any
) -> TiedEstimate:
    """Return means and the pooled covariance of `x (n, d)` by classes `y`.

    Args:
        x: features in float64.
        y: classes.
        num_classes: number of classes.
        estimator: `"sample"`, `"official"` (a random 70% of each class, then once the 70% nearest by the pooled
            covariance; the released code means this, but a division inside its loop leaves it the covariance of the
            last class alone) or `"mcd"`.
        generator: of what is drawn at random.
        settings: arguments of `fast_mcd`.
    """
    if estimator == "mcd":
        found = fast_mcd(x, y, num_classes=num_classes, reweight=False, generator=generator, **settings)
        weight = found.h.to(x.dtype) / found.h.sum()
        return TiedEstimate(found.location, (found.covariance * weight[:, None, None]).sum(0), found.support)
    everything = torch.ones_like(y, dtype=torch.bool)
    if estimator == "sample":
        return _tied(x, y, num_classes, everything)
    chance = torch.rand(len(y), generator=generator).to(x.device, x.dtype)
    first = _tied(x, y, num_classes, _nearest(chance, y, num_classes))
    whitening = whiten(first.covariance, total_variance(x))
    distance = torch.cat(
        [
            ((part - first.location[own]) @ whitening.T).square().sum(1)
            for part, own in zip(x.split(_ROWS), y.split(_ROWS), strict=True)
        ]
    )
    return _tied(x, y, num_classes, _nearest(distance, y, num_classes))


def _tied(x: Tensor, y: Tensor, num_classes: int, support: Tensor) -> TiedEstimate:
    count = torch.bincount(y[support], minlength=num_classes).to(x.dtype)
    location = x.new_zeros(num_classes, x.shape[1]).index_add_(0, y[support], x[support])
    location /= count.clamp(min=1)[:, None]
    covariance = x.new_zeros(x.shape[1], x.shape[1])
    for part, own, kept in zip(x.split(_ROWS), y.split(_ROWS), support.split(_ROWS), strict=True):
        centred = part[kept] - location[own[kept]]
        covariance += centred.T @ centred
    return TiedEstimate(location, covariance / max(int(support.sum()), 1), support)


def _nearest(distance: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return which samples are among the nearest share of their class, at least one of each."""
    sizes = torch.bincount(y, minlength=num_classes)
    order = distance.argsort(stable=True)
    order = order[y[order].argsort(stable=True)]
    place = torch.arange(len(y), device=y.device) - (sizes.cumsum(0) - sizes)[y[order]]
    kept = torch.maximum((_KEPT * sizes.double() + 1e-9).floor().long(), sizes.clamp(max=1))
    support = torch.zeros_like(y, dtype=torch.bool)
    support[order] = place < kept[y[order]]
    return support


def whiten(covariance: Tensor, total: Tensor) -> Tensor:
    r"""Return `A (r, d)` with :math:`A^T A = \Sigma^{-1}` on the `r` features that vary.

    Features are first divided by their deviation over all classes, so that their scales do not matter. Directions in
    which no class varies are kept, with a floor under their variance: there the classes may lie apart all the same.

    Args:
        covariance: `(d, d)`, shared by the classes.
        total: `(d,)` variance of all samples about their common mean.
    """
    live = torch.where(total > 0)[0]
    deviation = total[live].sqrt()
    values, vectors = torch.linalg.eigh(covariance[live][:, live] / (deviation[:, None] * deviation))
    largest = values.max() if len(live) else 1.0
    values = values.clamp(min=_FLOOR * largest) if largest > 0 else torch.full_like(values, _FLOOR)
    whitening = covariance.new_zeros(len(live), len(covariance))
    # the symmetric root: it is the same for whatever signs and directions of equal variance the eigenvectors come with
    whitening[:, live] = (vectors / values.sqrt()) @ vectors.T / deviation
    return whitening


def total_variance(x: Tensor) -> Tensor:
    """Return the variance `(d,)` of each feature of `x (n, d)`, exactly 0 for one that does not vary."""
    mean = x.mean(0)
    variance = torch.stack([(part - mean).square().sum(0) for part in x.split(_ROWS)]).sum(0) / len(x)
    return torch.where(x.amax(0) == x.amin(0), 0.0, variance)


def principal_axes(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean `(d,)` and the `count` directions `(d, count)` in which `x (n, d)` varies most."""
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in x.split(_ROWS)]).sum(0) / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS):
        centred = part.double() - mean
        scatter += centred.T @ centred
    _, vectors = torch.linalg.eigh(scatter / len(x))
    directions = vectors[:, -count:].flip(1)
    # eigenvectors have no sign; the largest component of each is made positive, on every machine
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * torch.where(largest < 0, -1.0, 1.0)
