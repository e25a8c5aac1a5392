"""The minimum covariance determinant of many classes at once, by concentration steps from robust starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice, did_you_mean
from lightning_methods.rog.search import Search, Selection, Settings
from lightning_methods.rog.starts import DETERMINISTIC


class MCDResult(NamedTuple):
    """Robust location and scatter of each class; without labels there is no class dimension.

    Attributes:
        location: `(C, d)` robust means.
        covariance: `(C, d, d)` robust covariances, of the inliers where they were reweighted.
        support: `(n,)` bool, the `h` points of each class whose covariance has the smallest determinant found.
        logdet: `(C,)` log-determinant of the uncorrected covariance of the support (with the ridge, if there is one).
        n_steps: `(C,)` concentration steps that led there.
        h: `(C,)` number of points in the support; 0 for a class without points, whose location is 0.
        inliers: `(n,)` bool, the support and every point within the 97.5% quantile of chi-squared.
        distances: `(n,)` squared Mahalanobis distance of each point to its own class; NaN for points without a class.
        ridge: `(C,)` what was added to the diagonal to invert a singular covariance, 0 for a regular one.
    """

    location: Tensor
    covariance: Tensor
    support: Tensor
    logdet: Tensor
    n_steps: Tensor
    h: Tensor
    inliers: Tensor
    distances: Tensor
    ridge: Tensor


@torch.no_grad()
def fast_mcd(
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_classes: int | None = None,
    support_fraction: float | None = None,
    starts: Sequence[str] = ("median", "random:2"),
    selection: Selection = "robust",
    max_steps: int = 100,
    reweight: bool = True,
    consistency: bool = True,
    shrinkage: float | Literal["auto"] = "auto",
    ridge: float = 1e-6,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    max_bytes: int = 512 << 20,
) -> MCDResult:
    r"""Estimate location and scatter of each class from the `h` points whose covariance has the smallest determinant.

    .. math:: \min_{|S| = h} \det \hat\Sigma_S, \qquad h = \lfloor (n + d + 1) / 2 \rfloor

    From several starts, concentration steps keep the `h` points of least Mahalanobis distance and estimate again, until
    the support no longer changes; no step raises the determinant (Rousseeuw and Van Driessen 1999). All classes step
    together. The result stays the same whatever the order of the points and, but for rounding, the chunks.

    **Which start wins.** In many dimensions the smallest determinant itself is not robust: at 40% outliers two standard
    deviations away in each of 64 features, a subset that mixes both clusters has a *smaller* determinant than one
    without outliers, only because trimming half of all points shrinks the volume more. So the starts are compared by
    the covariance of all their inliers (`selection="robust"`), which trimming does not shrink, and the determinant
    decides between those that are equal within three standard errors. `"determinant"` is the textbook's rule.

    Shapes:
        `x (n, d)`, `y (n,)` whole numbers -> see `MCDResult`. Points with a label below 0 are left out.

    Args:
        x: points of any floating type; nothing but finite numbers.
        y: their classes; `None` for a single one.
        num_classes: number of classes `C`, by default the largest label + 1.
        support_fraction: `None` keeps `(n + d + 1) / 2` points of each class, which withstands most outliers (the
            paper); a number from 0.5 to 1 keeps that share, 1 all.
        starts: any of "median", "spatial_sign", "rank", "normal_scores", "tanh", "ogk", and "random:k" for `k` random
            supports.
        selection: how the best start is chosen.
        max_steps: most concentration steps.
        reweight: estimate once more from all inliers, for classes that were trimmed.
        consistency: multiply covariances by `consistency_factor`.
        shrinkage: how far the covariance is drawn towards the pooled one (a single class: its diagonal), from 0 to 1;
            `"auto"`: `d / n` for classes of fewer than `5 d` points if there are several classes, else 0.
        ridge: share of the mean variance that is added to a singular covariance, ten times more until it is regular.
        dtype: float64, or float32 for speed.
        generator: of the random starts, on the CPU; by default one with seed 0. The global one is never used.
        max_bytes: memory for the points that are worked on at once, in bytes.

    Raises:
        InvalidArgument: for settings outside of their range, labels that are no classes, or points that are not finite.
        ShapeMismatch: if `x` is not `(n, d)` with at least one of each, or `y` does not fit.

    Example:
        >>> x = torch.randn(500, 8, generator=torch.manual_seed(0), dtype=torch.float64)
        >>> x[:150] += 3.0
        >>> found = fast_mcd(x)
        >>> int(found.support[:150].sum()), bool(found.location.norm() < 0.5)
        (0, True)

    Deviations from the paper: robust starts and the choice among them (random starts alone break down at 30% clustered
    outliers in 64 dimensions); consistency factor; reweighting, which the paper does not use.
    """
    _check_settings(support_fraction, starts, selection, max_steps, shrinkage, ridge, dtype, max_bytes)
    labels, count = _checked_points(x, y, num_classes)
    settings = Settings(support_fraction, tuple(starts), selection, max_steps, reweight, consistency, shrinkage, ridge)
    search = Search(x, labels, count, settings, dtype, max_bytes)
    found = search.run(generator if generator is not None else torch.Generator().manual_seed(0))
    if y is None:
        found.update({name: found[name][0] for name in ("location", "covariance", "logdet", "n_steps", "h", "ridge")})
    return MCDResult(**found)


def _check_settings(
    support_fraction: float | None,
    starts: Sequence[str],
    selection: str,
    max_steps: int,
    shrinkage: float | str,
    ridge: float,
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    check_choice("selection", selection, ("robust", "determinant"))
    if dtype not in (torch.float64, torch.float32):
        raise InvalidArgument(f"dtype={dtype}: torch.float64 or torch.float32 is needed.")
    check_support_fraction(support_fraction)
    check_starts(starts)
    if max_steps < 1 or max_bytes < 1:
        raise InvalidArgument(f"max_steps={max_steps}, max_bytes={max_bytes}: at least 1 is needed.")
    if shrinkage != "auto" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise InvalidArgument(f"shrinkage={shrinkage!r}: 'auto' or a share from 0 to 1 is needed.")
    if not 0 < ridge < 1:
        raise InvalidArgument(f"ridge={ridge}: a share of the variance above 0 and below 1 is needed.")


def check_support_fraction(share: object) -> None:
    """Raise `InvalidArgument` for what is no share of a support."""
    if share is None or (isinstance(share, (int, float)) and not isinstance(share, bool) and 0.5 <= share <= 1):
        return
    raise InvalidArgument(
        f"support_fraction={share!r}: a share from 0.5 (most robust) to 1 (all points) is needed, or None."
    )


def check_starts(starts: Sequence[str]) -> None:
    """Raise `InvalidArgument` unless every start is known."""
    if isinstance(starts, str) or not starts:
        raise InvalidArgument(
            f"starts={starts!r}: a sequence of at least one name is needed, as ('median', 'random:2')."
        )
    for start in starts:
        kind, colon, number = start.partition(":")
        if kind == "random" and (not colon or (number.isdecimal() and int(number) > 0)):
            continue
        if start not in DETERMINISTIC:
            hint = did_you_mean(start, [*DETERMINISTIC, "random:2"])
            raise InvalidArgument(f"starts={tuple(starts)} name {start!r}, which is not known. {hint}")


def _checked_points(x: Tensor, y: Tensor | None, num_classes: int | None) -> tuple[Tensor, int]:
    """Return the labels and the number of classes."""
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeMismatch(f"x has shape {tuple(x.shape)}; (n, d) with at least one point and feature is needed.")
    if not x.is_floating_point():
        raise InvalidArgument(f"x is of type {x.dtype}; floating point numbers are needed.")
    unusable = int((~x.isfinite()).any(1).sum())
    if unusable:
        raise InvalidArgument(f"{unusable} of {len(x)} points hold NaN or infinity. Leave them out, or mend them.")
    if y is None:
        return torch.zeros(len(x), dtype=torch.int64, device=x.device), 1
    if y.shape != (len(x),):
        raise ShapeMismatch(f"y has shape {tuple(y.shape)} for {len(x)} points; ({len(x)},) is needed.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InvalidArgument(f"y is of type {y.dtype}; whole numbers are needed.")
    labels = y.to(x.device, torch.int64)
    largest = int(labels.max())
    count = max(largest + 1, 1) if num_classes is None else num_classes
    if largest >= count or largest < 0:
        raise InvalidArgument(
            f"The largest label is {largest} with num_classes={num_classes}. Whole numbers from 0 to num_classes - 1 "
            f"are needed; points with a label below 0 are left out, but not all."
        )
    return labels, count
