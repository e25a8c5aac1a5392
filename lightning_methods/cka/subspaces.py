"""Indices between subspaces and shapes: CCA and its kin, linear regression, Procrustes (Kornblith et al., 2019)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_methods.cka.functional import centred, comparable, full_precision
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, check_choice


@full_precision
def cca(x: Tensor, y: Tensor, *, statistic: Literal["rho", "r2"] = "rho", center: bool = True) -> Tensor:
    r"""Return the mean canonical correlation, or the mean squared one, of two representations.

    .. math:: \bar\rho = \frac{\|Q_Y^T Q_X\|_*}{\min(r_X, r_Y)}, \qquad
        R^2_{\mathrm{CCA}} = \frac{\|Q_Y^T Q_X\|_F^2}{\min(r_X, r_Y)} \qquad \text{with orthonormal bases } Q
        \text{ of the centred columns}

    Shapes:
        x `(n, ...)`, y `(n, ...)`; returns a scalar. With at least as many features as samples it is 1 for any two
        representations, and a warning says so.

    Args:
        x: features of `n` samples.
        y: features of the same samples.
        statistic: `"rho"` or `"r2"`.
        center: the paper's demo does not centre the columns.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 2.
        InvalidArgument: for an unknown statistic.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{cca(x, x @ torch.tensor([[1.0, 2.0], [0.0, 3.0]])):.4f}")
        1.0000

    Deviations from the paper: divided by the smaller rank, not by a width, so that dead and repeated features do not
    count.
    """
    check_choice("statistic", statistic, ("rho", "r2"))
    p, q = (basis(centred(z)[0] if center else z) for z in comparable(x, y))
    warn_if_trivial("CCA", {"x": p, "y": q}, center=center)
    return correlation(p, q, statistic)


@full_precision
def svcca(x: Tensor, y: Tensor, *, statistic: Literal["rho", "r2"] = "rho", threshold: float = 0.99) -> Tensor:
    """Return CCA of the leading principal components of two representations (Raghu et al. 2017).

    Shapes:
        x `(n, ...)`, y `(n, ...)`; returns a scalar.

    Args:
        x: features of `n` samples.
        y: features of the same samples.
        statistic: `"rho"` or `"r2"`.
        threshold: share of the variance that the kept components hold, 0.99 in the paper.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 2.
        InvalidArgument: for an unknown statistic or a threshold outside (0, 1].

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{svcca(x, 2 * x):.4f}")
        1.0000
    """
    check_choice("statistic", statistic, ("rho", "r2"))
    check_share("threshold", threshold)
    p, q = (basis(centred(z)[0], threshold) for z in comparable(x, y))
    warn_if_trivial("SVCCA", {"x": p, "y": q})
    return correlation(p, q, statistic)


@full_precision
def pwcca(x: Tensor, y: Tensor) -> Tensor:
    r"""Return CCA with its directions weighted by how much of `x` they account for (Morcos et al. 2018).

    .. math:: \frac{\sum_i \alpha_i \rho_i}{\sum_i \alpha_i}, \qquad \alpha_i = \sum_j |\langle h_i, x_j \rangle|

    with the canonical directions `h_i` of `x` in sample space and the columns `x_j`. Not symmetric.

    Shapes:
        x `(n, ...)`, y `(n, ...)`; returns a scalar.

    Args:
        x: features of `n` samples, whose directions are weighted.
        y: features of the same samples.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 2.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{pwcca(x, 2 * x):.4f}")
        1.0000
    """
    a, b = (centred(z)[0] for z in comparable(x, y))
    p, q = basis(a), basis(b)
    warn_if_trivial("PWCCA", {"x": p, "y": q})
    return weighted_correlation(a, p, q)


@full_precision
def linear_regression_r2(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the share of the variance of `x` that a linear map of `y` explains.

    .. math:: R^2_{LR} = \frac{\|Q_Y^T X\|_F^2}{\|X\|_F^2}

    Shapes:
        x `(n, ...)`, y `(n, ...)`; returns a scalar.

    Args:
        x: features of `n` samples, which are predicted.
        y: features of the same samples, from which they are.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 2.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{linear_regression_r2(x[:, :1], x):.4f}")
        1.0000
    """
    a, b = (centred(z)[0] for z in comparable(x, y))
    q = basis(b)
    warn_if_trivial("Linear regression", {"y": q})
    return explained(a, q)


@full_precision
def procrustes(x: Tensor, y: Tensor, *, kind: Literal["similarity", "distance", "angular"] = "similarity") -> Tensor:
    r"""Return how well one representation can be rotated onto the other.

    .. math:: s = \frac{\|X^T Y\|_*}{\|X\|_F \|Y\|_F}, \qquad d = 2 - 2 s, \qquad \theta = \arccos s

    Shapes:
        x `(n, ...)`, y `(n, ...)`, of any widths; returns a scalar.

    Args:
        x: features of `n` samples.
        y: features of the same samples.
        kind: the similarity `s` in [0, 1], the squared distance `d` (Ding et al. 2021), or the angle, a metric.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are less than 2.
        InvalidArgument: for an unknown kind.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{procrustes(x, 5 * x.flip(1)):.4f}")
        1.0000
    """
    check_choice("kind", kind, ("similarity", "distance", "angular"))
    a, b = (unit_shape(centred(z)[0]) for z in comparable(x, y))
    return procrustes_of(a, b, kind)


# -- bases -------------------------------------------------------------------------------------------------------------


def compact(x: Tensor) -> Tensor:
    """Return features of at most `n` columns with the same Gram matrix, and the same derivative of it."""
    if x.shape[1] <= len(x):
        return x
    with torch.no_grad():
        directions = torch.linalg.qr(x.detach().T).Q
    return x @ directions


def basis(x: Tensor, threshold: float | None = None) -> Tensor:
    """Return an orthonormal basis of the columns of x, or of its components that hold a share of the variance.

    Shapes:
        `(n, p)`; returns `(n, r)`, with NaN in one column if x is not finite.
    """
    if not x.isfinite().all():
        return x.new_full((len(x), 1), math.nan)
    tolerance = max(x.shape) * torch.finfo(x.dtype).eps
    x = compact(x)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
        rank = int((s > s[:1] * tolerance).sum())
        variances = s.double().cpu().square()  # on an accelerator a running sum is not deterministic
        shares = variances.cumsum(0) / variances.sum()
        kept = rank if threshold is None else min(rank, int((shares < threshold).sum()) + 1)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return u[:, :kept]
    if kept < rank:
        return torch.linalg.svd(x @ vh[:rank].T, full_matrices=False).U[:, :kept]
    # with these columns whitened there is a basis without the gradient of singular vectors, which repeated values break
    white = x @ (vh[:rank].T / s[:rank])
    return torch.linalg.solve_triangular(torch.linalg.cholesky(white.T @ white), white.T, upper=False).T


def correlation(p: Tensor, q: Tensor, statistic: str) -> Tensor:
    """Return the mean canonical correlation of two bases, or the mean squared one."""
    products = q.T @ p
    total = nuclear_norm(products) if statistic == "rho" else products.square().sum()
    return total / min(products.shape)


def weighted_correlation(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return PWCCA of features with the basis `p` and another basis."""
    products = p.T @ q
    if products.isnan().any():
        return products.sum()
    u, correlations, _ = torch.linalg.svd(products, full_matrices=False)
    weights = ((p @ u).T @ x).abs().sum(1)
    return (weights * correlations).sum() / weights.sum()


def explained(x: Tensor, q: Tensor) -> Tensor:
    """Return the share of the variance of centred features in the span of a basis."""
    return (q.T @ x).square().sum() / x.square().sum()


def unit_shape(x: Tensor) -> Tensor:
    """Return centred features of Frobenius norm 1, of at most `n` columns."""
    return compact(x / torch.linalg.vector_norm(x))


def procrustes_of(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return a Procrustes measure of two unit shapes."""
    similarity = nuclear_norm(x.T @ y)
    if kind == "similarity":
        return similarity
    return 2 - 2 * similarity if kind == "distance" else similarity.clamp(max=1).arccos()


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the singular values, NaN of what is not finite."""
    return torch.linalg.svdvals(matrix).sum() if matrix.isfinite().all() else matrix.sum() * math.nan


def check_share(name: str, value: float) -> None:
    """Raise `InvalidArgument` unless a value is in (0, 1]."""
    if isinstance(value, str) or not 0 < value <= 1:
        raise InvalidArgument(f"{name}={value!r}: a share of the variance in (0, 1] is needed.")


def warn_if_trivial(index: str, bases: Mapping[str, Tensor], *, center: bool = True, stacklevel: int = 4) -> None:
    """Warn where a representation spans all that `n` samples can: it then predicts any other perfectly."""
    full = [f"{name} ({len(q)} samples)" for name, q in bases.items() if q.shape[1] >= len(q) - center]
    if full:
        warnings.warn(
            f"{index} is 1 whatever is compared, because the rank is as large as the number of samples allows: "
            f"{', '.join(full)}. Use more samples than features, or index 'cka' or 'procrustes'.",
            LightningMethodsWarning,
            stacklevel=stacklevel,
        )
