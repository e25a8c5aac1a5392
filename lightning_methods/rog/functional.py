"""What trimming does to the covariance of a normal distribution, and where its outliers begin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import chi2

from lightning_methods.errors import InvalidArgument


def consistency_factor(alpha: float | Sequence[float], dim: int) -> float | list[float]:
    r"""Return by what the covariance of the innermost share `alpha` of a normal distribution is too small.

    .. math:: c(\alpha, d) = \frac{\alpha}{F_{\chi^2_{d+2}}(\chi^2_{d, \alpha})}

    (Croux and Haesbroeck 1999.)

    Args:
        alpha: share kept, above 0, at most 1; one or several.
        dim: dimension `d`, at least 1.

    Raises:
        InvalidArgument: for a share or a dimension outside.

    Example:
        >>> round(consistency_factor(0.5, 64), 6)
        1.16338
    """
    shares = np.asarray(alpha, dtype=np.float64)
    if dim < 1 or not ((shares > 0) & (shares <= 1)).all():
        raise InvalidArgument(f"alpha={alpha}, dim={dim}: shares above 0 and at most 1, and a dimension of at least 1.")
    inside = chi2.cdf(chi2.ppf(shares, dim), dim + 2)
    factors = np.where(shares < 1, shares / np.where(shares < 1, inside, 1.0), 1.0)
    return float(factors) if factors.ndim == 0 else factors.tolist()


@lru_cache(maxsize=64)
def inlier_bound(share: float, dim: int) -> float:
    """Return the squared distance within which a share of a `dim`-dimensional normal distribution lies."""
    return float(chi2.ppf(share, dim))
