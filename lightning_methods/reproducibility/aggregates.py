"""Aggregates over runs and tasks: interquartile mean, profiles, stratified bootstrap, the best of n trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lightning_methods.errors import InvalidArgument
from lightning_methods.reproducibility.functional import (
    Array,
    Interval,
    bootstrap_counts,
    bootstrap_unpaired,
    check_level,
    check_positive,
    run_matrix,
    scores,
)

# what one block of repetitions may hold
_ELEMENTS = 2**22


class Profile(NamedTuple):
    """The share of runs above each threshold, with pointwise bounds."""

    thresholds: Array
    fraction: Array
    low: Array
    high: Array


def interquartile_mean(x: ArrayLike, *, axis: int | tuple[int, ...] | None = None) -> Any:
    """Return the mean of the middle half of all scores (Agarwal et al. 2021), which outliers do not move.

    Args:
        x: scores of any shape, runs and tasks together.
        axis: over which axes, default all.

    Example:
        >>> float(interquartile_mean([[0.1, 0.5], [0.2, 0.6], [0.3, 0.7], [0.4, 0.8], [0.9, 0.0]]))
        0.45
    """
    values = np.asarray(x, dtype=np.float64)
    axes = tuple(range(values.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = tuple(i % values.ndim for i in axes)
    kept = [i for i in range(values.ndim) if i not in axes]
    rows = values.transpose(*kept, *axes).reshape(*(values.shape[i] for i in kept), -1)
    if rows.shape[-1] == 0:
        raise InvalidArgument("There is no score to average.")
    cut = rows.shape[-1] // 4  # as scipy.stats.trim_mean, of which the sort is the slow part
    ordered = np.partition(rows, [cut, rows.shape[-1] - cut - 1], axis=-1) if cut else rows
    result = ordered[..., cut : rows.shape[-1] - cut].mean(-1)
    return float(result) if result.ndim == 0 else result


def optimality_gap(x: ArrayLike, *, gamma: float = 1.0) -> float:
    """Return by how much the scores fall short of `gamma` on average, what lies above it not counted.

    Args:
        x: scores of any shape.
        gamma: the desired score.

    Example:
        >>> optimality_gap([0.5, 1.5])
        0.25
    """
    return float(gamma - np.minimum(np.asarray(x, dtype=np.float64), gamma).mean())


def stratified_bootstrap(
    x: ArrayLike,
    statistic: Callable[..., Any] = interquartile_mean,
    *,
    alpha: float = 0.05,
    resamples: int = 2000,
    resample_tasks: bool = False,
    rng: np.random.Generator | int | None = 0,
) -> Interval:
    """Return a statistic of runs by tasks with its percentile interval; runs are resampled within each task.

    Args:
        x: scores, `(runs, tasks)` or `(runs,)`.
        statistic: of a matrix; with a keyword `axis` (a pair of axes) all repetitions are computed at once, otherwise
            one after the other.
        alpha: one minus the confidence.
        resamples: repetitions.
        resample_tasks: resample also the tasks, for a statement about other tasks of their kind.
        rng: generator or seed.

    Raises:
        ShapeMismatch: if it is no matrix.
        InvalidArgument: for NaN, a wrong level, or without repetitions.

    Example:
        >>> stratified_bootstrap([[1.0, 2.0], [1.0, 2.0]])
        Interval(estimate=1.5, low=1.5, high=1.5)
    """
    scores_ = run_matrix("x", x)
    check_level("alpha", alpha)
    check_positive("resamples", resamples)
    generator = np.random.default_rng(rng)
    values = []
    for count in _blocks(resamples, scores_.size):
        sample = _resampled(scores_, count, generator, resample_tasks)
        values.append(_each(statistic, sample))
    low, high = np.quantile(np.concatenate(values), [alpha / 2, 1 - alpha / 2])
    return Interval(float(statistic(scores_)), float(low), float(high))


def probability_of_improvement(
    x: ArrayLike,
    y: ArrayLike,
    *,
    alpha: float = 0.05,
    resamples: int = 2000,
    rng: np.random.Generator | int | None = 0,
) -> Interval:
    """Return the unpaired P(X>Y), averaged over tasks, with its stratified bootstrap interval (Agarwal et al. 2021).

    Args:
        x: scores `(n, tasks)`.
        y: scores `(m, tasks)`.
        alpha: one minus the confidence.
        resamples: repetitions.
        rng: generator or seed.

    Example:
        >>> probability_of_improvement([[2.0], [3.0]], [[0.0], [1.0]])
        Interval(estimate=1.0, low=1.0, high=1.0)
    """
    check_level("alpha", alpha)
    values = bootstrap_unpaired(x, y, resamples=resamples, rng=rng)
    a, b = run_matrix("x", x), run_matrix("y", y)
    wins = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2])
    return Interval(float(wins.mean((0, 1)).mean()), float(low), float(high))


def performance_profile(
    x: ArrayLike,
    thresholds: ArrayLike | None = None,
    *,
    alpha: float = 0.05,
    resamples: int = 2000,
    rng: np.random.Generator | int | None = 0,
) -> Profile:
    """Return the share of runs, over all tasks, that score above each threshold, with a pointwise bootstrap band.

    Args:
        x: scores `(runs, tasks)` or `(runs,)`.
        thresholds: increasing; default 101 from the lowest to the highest score.
        alpha: one minus the confidence of the band.
        resamples: repetitions.
        rng: generator or seed.

    Example:
        >>> performance_profile([[0.2, 0.4], [0.6, 0.8]], [0.3, 0.7]).fraction
        array([0.75, 0.25])
    """
    values = run_matrix("x", x)
    check_level("alpha", alpha)
    check_positive("resamples", resamples)
    tau = np.linspace(values.min(), values.max(), 101) if thresholds is None else scores("thresholds", thresholds)
    above = values[:, :, None] > tau
    generator = np.random.default_rng(rng)
    fractions = np.zeros((resamples, len(tau)))
    for task in range(values.shape[1]):
        fractions += bootstrap_counts(len(values), resamples, generator) @ above[:, task] / values.size
    low, high = np.quantile(fractions, [alpha / 2, 1 - alpha / 2], axis=0)
    return Profile(tau, above.mean((0, 1)), low, high)


def expected_validation_performance(values: ArrayLike, n: int | None = None, *, unbiased: bool = True) -> Any:
    r"""Return the expected best of n trials, from N trials (Dodge et al. 2019).

    .. math:: \text{unbiased:}\; \sum_{i=n}^{N} v_{(i)} \frac{\binom{i-1}{n-1}}{\binom Nn} \qquad
        \text{their V-statistic:}\; \sum_i v_{(i)} \left( (i/N)^n - ((i-1)/N)^n \right)

    Args:
        values: the score of each trial, higher is better.
        n: of how many; default an array for 1 to N.
        unbiased: draw without replacement (Tang et al. 2020); otherwise with, which is too low.

    Raises:
        InvalidArgument: if n is not between 1 and the number of trials (for the V-statistic, below 1).

    Example:
        >>> print(f"{expected_validation_performance([0.7, 0.8, 0.8, 0.9, 0.95], 2):.4f}")
        0.8900
    """
    v = np.sort(scores("values", values))
    total = len(v)
    if n is None:
        return np.array([expected_validation_performance(v, i, unbiased=unbiased) for i in range(1, total + 1)])
    if n < 1 or (unbiased and n > total):
        raise InvalidArgument(f"n={n} of {total} trials: a number from 1 to {total} is needed.")
    i = np.arange(1, total + 1)
    if unbiased:
        # ratios of binomials through logarithms, which do not overflow; 0 below n
        with np.errstate(divide="ignore"):
            log_weight = _log_binomial(i - 1, n - 1) - _log_binomial(total, n)
        weight = np.where(i >= n, np.exp(log_weight), 0.0)
    else:
        weight = (i / total) ** n - ((i - 1) / total) ** n
    return float(v @ weight)


def _log_binomial(n: ArrayLike, k: int) -> Array:
    n = np.maximum(n, k).astype(np.float64)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _blocks(total: int, size: int) -> list[int]:
    step = max(1, _ELEMENTS // max(size, 1))
    return [min(step, total - start) for start in range(0, total, step)]


def _resampled(x: Array, count: int, generator: np.random.Generator, tasks: bool) -> Array:
    n, t = x.shape
    columns = generator.integers(t, size=(count, 1, t)) if tasks else np.arange(t)[None, None]
    return x[generator.integers(n, size=(count, n, t)), columns]


def _each(statistic: Callable[..., Any], sample: Array) -> Array:
    try:
        values = np.asarray(statistic(sample, axis=(1, 2)), dtype=np.float64)
        if values.shape == (len(sample),):
            return values
    except TypeError:
        pass  # it knows no axis
    return np.array([float(statistic(one)) for one in sample])


def t_interval(x: ArrayLike, *, alpha: float = 0.05) -> Interval:
    """Return the mean with its t-interval; of one score, or of equal ones, the interval has no width.

    Args:
        x: scores or differences.
        alpha: one minus the confidence.

    Example:
        >>> t_interval([1.0, 1.0])
        Interval(estimate=1.0, low=1.0, high=1.0)
    """
    values = scores("x", x)
    mean, n = float(values.mean()), len(values)
    if n == 1 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    half = float(stats.t.isf(alpha / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)
