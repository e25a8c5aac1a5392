"""Almost stochastic order: whether the whole distribution of A lies above that of B, but for a small part."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_methods.errors import InvalidArgument
from lightning_methods.reproducibility.functional import Array, Mode, check_level, check_positive, scores

_FEWEST = 5


class StochasticOrder(NamedTuple):
    """How far A is from dominating B.

    Attributes:
        violation_ratio: share of the squared distance between the quantiles in which B is above, 0 if nowhere.
        epsilon_min: its upper confidence bound; below 0.5 A almost dominates B, below 0.2 by the stricter advice.
        alpha: the level used, divided by the number of comparisons.
    """

    violation_ratio: float
    epsilon_min: float
    alpha: float

    @property
    def dominates(self) -> bool:
        """Whether A almost stochastically dominates B."""
        return self.epsilon_min < 0.5


def violation_ratio(a: ArrayLike, b: ArrayLike, *, mode: Mode = "max") -> float:
    r"""Return the share of the distance between two distributions in which A is below B, exactly.

    .. math:: \epsilon_{W_2} = \frac{\int_{F_A^{-1} < F_B^{-1}} (F_A^{-1} - F_B^{-1})^2 dt}
        {\int_0^1 (F_A^{-1} - F_B^{-1})^2 dt}

    Empirical quantile functions are steps, so the integral is a sum over the merged grid of both.

    Args:
        a: scores of A.
        b: scores of B.
        mode: `"max"` if higher is better.

    Example:
        >>> violation_ratio([2, 3], [1, 2]), violation_ratio([1, 2], [2, 3]), violation_ratio([1, 2], [1, 2])
        (0.0, 1.0, 0.5)
    """
    sign = 1 if mode == "max" else -1
    x, y = np.sort(sign * scores("a", a)), np.sort(sign * scores("b", b))
    return float(_ratios(x[None], y[None])[0])


def almost_stochastic_order(
    a: ArrayLike,
    b: ArrayLike,
    *,
    alpha: float = 0.05,
    comparisons: int = 1,
    mode: Mode = "max",
    resamples: int = 1000,
    rng: np.random.Generator | int | None = 0,
) -> StochasticOrder:
    r"""Test whether A almost stochastically dominates B (del Barrio et al. 2018, Dror et al. 2019).

    .. math:: \epsilon_{\min} = \hat\epsilon - \sqrt{\tfrac{n+m}{nm}} \, \hat\sigma \, \Phi^{-1}(\alpha)

    Args:
        a: scores of A, at least five: with fewer a single run "wins".
        b: scores of B, at least five.
        alpha: level; divided by `comparisons` (Bonferroni).
        comparisons: how many tests are made.
        mode: `"max"` if higher is better.
        resamples: repetitions of the bootstrap of sigma.
        rng: generator or seed.

    Raises:
        InvalidArgument: with fewer than five runs a side, or NaN.

    Example:
        >>> almost_stochastic_order([5, 6, 7, 8, 9], [1, 2, 3, 4, 5]).dominates
        True
    """
    check_level("alpha", alpha)
    check_positive("comparisons", comparisons)
    check_positive("resamples", resamples)
    sign = 1 if mode == "max" else -1
    x, y = np.sort(sign * scores("a", a)), np.sort(sign * scores("b", b))
    n, m = len(x), len(y)
    if min(n, m) < _FEWEST:
        raise InvalidArgument(f"There are {n} and {m} runs; almost stochastic order needs at least {_FEWEST} of each.")
    estimate = float(_ratios(x[None], y[None])[0])
    generator = np.random.default_rng(rng)
    again = _ratios(_sorted_sample(x, resamples, generator), _sorted_sample(y, resamples, generator))
    sigma = math.sqrt(n * m / (n + m)) * float(again.std())
    level = alpha / comparisons
    bound = estimate - math.sqrt((n + m) / (n * m)) * sigma * float(stats.norm.ppf(level))
    return StochasticOrder(estimate, min(max(bound, 0.0), 1.0), level)


def _sorted_sample(x: Array, count: int, generator: np.random.Generator) -> Array:
    return np.sort(x[generator.integers(len(x), size=(count, len(x)))], axis=1)


def _ratios(x: Array, y: Array) -> Array:
    """Return the violation ratio of each row of sorted scores."""
    n, m = x.shape[1], y.shape[1]
    # in units of 1/(nm) the grid is integer, so that no point is counted twice by rounding
    grid = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    width, start = np.diff(grid), grid[:-1]
    squared = width * (difference := x[:, start // m] - y[:, start // n]) ** 2
    total, below = squared.sum(1), (squared * (difference < 0)).sum(1)
    return np.where(total > 0, below / np.where(total > 0, total, 1.0), 0.5)
