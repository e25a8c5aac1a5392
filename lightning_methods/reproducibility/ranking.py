"""Which of several is best: Friedman's test with post-hoc comparisons, and how far a ranking can be relied on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_methods.errors import ShapeMismatch, check_choice
from lightning_methods.reproducibility.functional import (
    Array,
    Mode,
    bootstrap_counts,
    check_level,
    check_positive,
    holm,
    run_matrix,
)


@dataclass(frozen=True)
class RankComparison:
    """Mean ranks over data sets, and which differences between them are significant.

    Attributes:
        ranks: mean rank of each method, 1 the best, `(k,)`.
        chi_square: Friedman's statistic, corrected for ties.
        pvalue: of it.
        iman_davenport: the F statistic of Iman and Davenport, which is less conservative; None where the ranks are the
            same on all data sets, for which it is infinite.
        critical_difference: of mean ranks by Nemenyi.
        pvalues: of all pairs, adjusted, `(k, k)`, with ones on the diagonal.
        posthoc: how they were computed.
    """

    ranks: Array
    chi_square: float
    pvalue: float
    iman_davenport: float | None
    critical_difference: float
    pvalues: Array
    posthoc: str


class RankingStability(NamedTuple):
    """How a ranking by single runs compares with that of the means.

    Attributes:
        rank_probability: `(models, ranks)`, how often each model takes each rank in resampled studies.
        single_run_agrees: share of single replicates whose order is that of the means.
        single_run_winner: share of single replicates whose best model is that of the means.
        kendall_tau: mean rank correlation of pairs of single replicates; None for one replicate, or without any order.
        flip_rate: `(models, models)`, share of replicates that order a pair unlike the means (ties count half).
    """

    rank_probability: Array
    single_run_agrees: float
    single_run_winner: float
    kendall_tau: float | None
    flip_rate: Array


def critical_difference(
    x: ArrayLike,
    *,
    alpha: float = 0.05,
    mode: Mode = "max",
    posthoc: Literal["wilcoxon-holm", "nemenyi"] = "wilcoxon-holm",
) -> RankComparison:
    r"""Compare several methods on several data sets by their ranks (Demsar 2006).

    .. math:: \chi^2_F = \frac{12 N}{k(k+1)} \left( \sum_j R_j^2 - \frac{k(k+1)^2}{4} \right), \quad
        F = \frac{(N-1) \chi^2_F}{N(k-1) - \chi^2_F}, \quad CD = q_\alpha \sqrt{\frac{k(k+1)}{6N}}

    Args:
        x: `(data sets, methods)`, one score each.
        alpha: level of the critical difference.
        mode: `"max"` if higher is better.
        posthoc: pairwise Wilcoxon signed-rank tests with Holm's correction, or Nemenyi's test of mean ranks, whose
            result for two methods depends on the others (Benavoli et al. 2016).

    Raises:
        ShapeMismatch: with fewer than two data sets or methods.

    Example:
        >>> critical_difference([[0.9, 0.8, 0.7], [0.85, 0.86, 0.7], [0.9, 0.8, 0.75]]).ranks
        array([1.333..., 1.666..., 3. ])
    """
    check_choice("mode", mode, ("max", "min"))
    check_choice("posthoc", posthoc, ("wilcoxon-holm", "nemenyi"))
    check_level("alpha", alpha)
    values = run_matrix("x", x)
    n, k = values.shape
    if n < 2 or k < 2:
        raise ShapeMismatch(f"x has the shape {values.shape}; at least two data sets (rows) and methods are needed.")
    each = stats.rankdata(-values if mode == "max" else values, axis=1)
    ranks = each.mean(0)
    chi_square = _friedman(each)
    denominator = n * (k - 1) - chi_square
    compared = _wilcoxon(values) if posthoc == "wilcoxon-holm" else _nemenyi(ranks, n)
    return RankComparison(
        ranks=ranks,
        chi_square=chi_square,
        pvalue=float(stats.chi2.sf(chi_square, k - 1)),
        iman_davenport=(n - 1) * chi_square / denominator if denominator > 1e-9 * n else None,
        critical_difference=nemenyi_critical_difference(k, n, alpha=alpha),
        pvalues=compared,
        posthoc=posthoc,
    )


def nemenyi_critical_difference(methods: int, datasets: int, *, alpha: float = 0.05) -> float:
    """Return by how much the mean ranks of two methods must differ (Nemenyi).

    Args:
        methods: how many are compared.
        datasets: on how many.
        alpha: level.

    Example:
        >>> round(nemenyi_critical_difference(4, 15), 6)
        1.211053
    """
    check_level("alpha", alpha)
    check_positive("datasets", datasets)
    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(methods * (methods + 1) / (6 * datasets)))


def ranking_stability(
    x: ArrayLike, *, mode: Mode = "max", resamples: int = 2000, rng: np.random.Generator | int | None = 0
) -> RankingStability:
    """Return how often a ranking by one replicate is that of the means, and how often each model takes each rank.

    Args:
        x: `(replicates, models)`, replicates share their seeds.
        mode: `"max"` if higher is better.
        resamples: studies of as many replicates, drawn with replacement, for the distribution of ranks.
        rng: generator or seed.

    Raises:
        ShapeMismatch: with fewer than two models.

    Example:
        >>> ranking_stability([[0.9, 0.8], [0.7, 0.8], [0.9, 0.7]], resamples=10).flip_rate
        array([[0. , 0.333...], [0.333..., 0. ]])
    """
    check_choice("mode", mode, ("max", "min"))
    check_positive("resamples", resamples)
    values = run_matrix("x", x) * (1 if mode == "max" else -1)
    n, models = values.shape
    if models < 2:
        raise ShapeMismatch("At least two models are needed to rank them.")
    generator = np.random.default_rng(rng)
    means = bootstrap_counts(n, resamples, generator) @ values / n
    order = _shared_ranks(-means)
    overall = values.mean(0)
    sign = np.sign(overall[:, None] - overall[None])
    each = np.sign(values[:, :, None] - values[:, None, :])
    flips = 0.5 * np.abs(each - sign).mean(0)
    single = stats.rankdata(-values, axis=1)
    ranks = stats.rankdata(-overall)
    return RankingStability(
        rank_probability=order,
        single_run_agrees=float((single == ranks).all(1).mean()),
        single_run_winner=float((single[:, int(overall.argmax())] == 1).mean()),
        kendall_tau=_mean_tau(values),
        flip_rate=flips,
    )


def _shared_ranks(values: Array) -> Array:
    """Return the share of rows in which each column has each rank; what ties shares its ranks equally."""
    k = values.shape[1]
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    tied = (values[:, :, None] == values[:, None, :]).sum(2)
    ranks = np.arange(k)
    inside = (ranks >= below[..., None]) & (ranks < (below + tied)[..., None])
    return (inside / tied[..., None]).mean(0)


def _friedman(ranks: Array) -> float:
    n, k = ranks.shape
    ties = sum(float((c**3 - c).sum()) for row in ranks for c in [np.unique(row, return_counts=True)[1]])
    correction = 1 - ties / (n * k * (k * k - 1))
    if correction <= 0:
        return 0.0  # everything ties everywhere
    raw = 12 * n / (k * (k + 1)) * float(((ranks.mean(0) - (k + 1) / 2) ** 2).sum())
    return raw / correction


def _wilcoxon(values: Array) -> Array:
    k = values.shape[1]
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    found = []
    for i, j in pairs:
        difference = values[:, i] - values[:, j]
        found.append(1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue))
    result = np.ones((k, k))
    for (i, j), p in zip(pairs, holm(found), strict=True):
        result[i, j] = result[j, i] = p
    return result


def _nemenyi(ranks: Array, n: int) -> Array:
    k = len(ranks)
    q = np.abs(ranks[:, None] - ranks) / math.sqrt(k * (k + 1) / (6 * n)) * math.sqrt(2)
    result = np.asarray(stats.studentized_range.sf(q, k, np.inf), dtype=np.float64)
    np.fill_diagonal(result, 1.0)
    return result


def _mean_tau(values: Array) -> float | None:
    """Return Kendall's tau-b between replicates, averaged over all pairs in which both have an order."""
    i, j = np.triu_indices(values.shape[1], 1)
    signs = np.sign(values[:, i] - values[:, j])
    length = np.sqrt((signs**2).sum(1))
    signs = signs[length > 0] / length[length > 0, None]
    if len(signs) < 2:
        return None
    total = float((signs.sum(0) ** 2).sum())
    return (total - len(signs)) / (len(signs) * (len(signs) - 1))
