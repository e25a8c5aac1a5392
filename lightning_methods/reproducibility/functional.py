"""Does A beat B? The decision procedure of Bouthillier et al. (MLSys 2021, appendix C) on paired or unpaired runs.

All functions take scores of runs, one number a run, and are computed in float64. Randomness comes from the given
`numpy.random.Generator` alone; NumPy's global state is never read or changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

Array = NDArray[np.float64]
Mode = Literal["max", "min"]
Decision = Literal["not enough runs", "not significant", "significant, not meaningful", "significant and meaningful"]

# draws that are held at a time
_BLOCK = 2**22


class Interval(NamedTuple):
    """An estimate with the bounds of its interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Whether A outperforms B, and by what.

    Attributes:
        decision: what may be said.
        probability: P(A>B), ties counted half; of pairs if `paired`, else of all combinations of runs.
        low, high: percentile bootstrap interval of it.
        wilson: score interval of the wins among the pairs without a tie; None if not paired.
        paired: which of the two parameters `probability` is.
        unpaired_probability: P(A>B) over all combinations of a run of A with a run of B.
        correlation: of the scores of pairs; None if not paired, or where A or B does not vary.
        wins, ties, losses: of pairs, or of combinations of runs if not paired.
        runs: number of pairs, or of the runs of the smaller side.
        needed: runs of which the paper's sample size (Noether) asks for `gamma`.
        gamma: from which P(A>B) on a difference is meaningful.
        alpha: one minus the confidence of the intervals.
    """

    decision: Decision
    probability: float
    low: float
    high: float
    wilson: tuple[float, float] | None
    paired: bool
    unpaired_probability: float
    correlation: float | None
    wins: int
    ties: int
    losses: int
    runs: int
    needed: int
    gamma: float
    alpha: float

    def __str__(self) -> str:
        level = f"{100 * (1 - self.alpha):g}%"
        what = "paired" if self.paired else "unpaired"
        if self.decision == "not enough runs":
            return f"not enough runs ({self.runs}; need {self.needed} for gamma={self.gamma:g})"
        if self.low == self.high == 0.5:
            return f"no difference measured: all {self.runs} pairs are ties"
        numbers = f"{what} P(A>B) = {self.probability:.3f}, {level} interval [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.decision} at gamma={self.gamma:g}: {numbers}"


def probability_of_outperforming(a: ArrayLike, b: ArrayLike, *, paired: bool = True, mode: Mode = "max") -> float:
    r"""Return P(A>B), the probability that a run of A is better than a run of B; ties count half.

    .. math:: P = \frac1k \sum_i [A_i > B_i] + \tfrac12 [A_i = B_i] \qquad \text{or, unpaired,} \qquad
        P = \frac{1}{nm} \sum_{i,j} [A_i > B_j] + \tfrac12 [A_i = B_j]

    The two are different parameters: where pairs correlate, the paired one is farther from 1/2. So
    P(A>B) + P(B>A) = 1.

    Shapes:
        a `(n,)`, b `(m,)`, with n = m if paired.

    Args:
        a: scores of the runs of A.
        b: scores of the runs of B, in the same order of seeds if paired.
        paired: whether run i of both shares its seeds and split.
        mode: `"max"` if higher is better.

    Raises:
        ShapeMismatch: if there are no scores, or paired ones differ in number.
        InvalidArgument: if a score is NaN.

    Example:
        >>> probability_of_outperforming([0.9, 0.8, 0.7], [0.8, 0.8, 0.8])
        0.5

    Deviations from the paper: it is silent about ties, and draws random pairs where runs are not paired.
    """
    x, y = two_sides(a, b, paired, mode)
    return float(np.mean(_wins(x, y, paired)))


def paired_outcomes(a: ArrayLike, b: ArrayLike, *, mode: Mode = "max") -> tuple[int, int, int]:
    """Return how many pairs A wins, ties and loses.

    Args:
        a: scores of A.
        b: scores of B in the same order.
        mode: `"max"` if higher is better.

    Example:
        >>> paired_outcomes([3, 2, 1], [2, 2, 2])
        (1, 1, 1)
    """
    x, y = two_sides(a, b, True, mode)
    return int((x > y).sum()), int((x == y).sum()), int((x < y).sum())


def bootstrap_interval(
    a: ArrayLike,
    b: ArrayLike,
    *,
    paired: bool = True,
    alpha: float = 0.05,
    mode: Mode = "max",
    resamples: int = 10_000,
    rng: np.random.Generator | int | None = 0,
) -> Interval:
    """Return P(A>B) with its percentile bootstrap interval.

    Pairs are resampled together; the distribution of that bootstrap is known (a sum of draws of 0, 1/2 and 1) and its
    quantiles are computed exactly, without resampling. Unpaired, the runs of A and B are resampled independently.

    Args:
        a: scores of A, `(n,)`.
        b: scores of B, `(m,)`.
        paired: whether run i of both belongs together.
        alpha: one minus the confidence.
        mode: `"max"` if higher is better.
        resamples: repetitions, if not paired.
        rng: generator or seed of these.

    Example:
        >>> bootstrap_interval([1.0] * 23 + [0.0] * 6, [0.5] * 29)
        Interval(estimate=0.793..., low=0.620..., high=0.931...)
    """
    check_level("alpha", alpha)
    x, y = two_sides(a, b, paired, mode)
    if paired:
        wins, ties = int((x > y).sum()), int((x == y).sum())
        low, high = _exact_interval(wins, ties, len(x), alpha)
    else:
        values = bootstrap_unpaired(x, y, resamples=resamples, rng=rng)
        low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2])
    return Interval(float(np.mean(_wins(x, y, paired))), float(low), float(high))


def bootstrap_unpaired(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 2000, rng: np.random.Generator | int | None = 0
) -> Array:
    r"""Return bootstrap repetitions of the unpaired P(A>B), averaged over tasks.

    With the matrix of wins W and multinomial counts c of the runs, a repetition is :math:`c_A^T W c_B / (nm)`: no
    resampled scores are compared anew.

    Shapes:
        a `(n,)` or `(n, tasks)`, b `(m,)` or `(m, tasks)`, higher is better; returns `(resamples,)`.

    Args:
        a: scores of A, runs by tasks.
        b: scores of B, runs by tasks.
        resamples: repetitions.
        rng: generator or seed.

    Raises:
        ShapeMismatch: if the tasks differ.
        InvalidArgument: for NaN, or without repetitions.

    Example:
        >>> bootstrap_unpaired([2.0, 3.0], [0.0, 1.0], resamples=3)
        array([1., 1., 1.])
    """
    x, y = run_matrix("a", a), run_matrix("b", b)
    if x.shape[1] != y.shape[1]:
        raise ShapeMismatch(f"a has {x.shape[1]} tasks and b has {y.shape[1]}; the same tasks are needed.")
    check_positive("resamples", resamples)
    generator = np.random.default_rng(rng)
    total = np.zeros(resamples)
    for left, right in zip(x.T, y.T, strict=True):
        n, m = len(left), len(right)
        wins = _wins(left, right, False)
        counts_a = bootstrap_counts(n, resamples, generator)
        counts_b = bootstrap_counts(m, resamples, generator)
        total += ((counts_a @ wins) * counts_b).sum(1) / (n * m)
    return total / x.shape[1]


def wilson_interval(wins: float, total: int, *, alpha: float = 0.05) -> tuple[float, float]:
    """Return the score interval of a share, which keeps its width where all or none are wins.

    Args:
        wins: how many of them.
        total: of how many, at least one.
        alpha: one minus the confidence.

    Raises:
        InvalidArgument: if `wins` is not between 0 and `total`.

    Example:
        >>> tuple(round(bound, 4) for bound in wilson_interval(23, 29))
        (0.6161, 0.9015)
    """
    check_level("alpha", alpha)
    if total < 1 or not 0 <= wins <= total:
        raise InvalidArgument(f"wins={wins} of total={total}: between 0 and total, of at least one, is needed.")
    z = float(stats.norm.isf(alpha / 2))
    p, scale = wins / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # at the ends the bounds are 0 and 1, which rounding may miss
    return (0.0 if wins == 0 else max(centre - half, 0.0)), (1.0 if wins == total else min(centre + half, 1.0))


def verdict(
    a: ArrayLike,
    b: ArrayLike,
    *,
    gamma: float = 0.75,
    alpha: float = 0.05,
    beta: float = 0.05,
    paired: bool = True,
    mode: Mode = "max",
    resamples: int = 10_000,
    rng: np.random.Generator | int | None = 0,
) -> Verdict:
    """Decide whether A outperforms B: not significant; significant, not meaningful; significant and meaningful.

    Significant if the interval of P(A>B) lies above 1/2, and meaningful if besides it reaches above `gamma`
    (MLSys 2021, appendix C.6).

    Args:
        a: scores of A, `(n,)`.
        b: scores of B, `(m,)`.
        gamma: from which P(A>B) on a difference matters, in (1/2, 1); the paper's 0.75.
        alpha: one minus the confidence of the intervals, in (0, 1/2).
        beta: of the needed number of runs, in (0, 1/2).
        paired: whether run i of both shares its seeds.
        mode: `"max"` if higher is better.
        resamples: repetitions of the unpaired bootstrap.
        rng: generator or seed of these.

    Raises:
        InvalidArgument: for a bound out of range or a NaN score.
        ShapeMismatch: if paired scores differ in number.

    Example:
        >>> print(verdict([1.0] * 23 + [0.0] * 6, [0.5] * 29))
        significant and meaningful at gamma=0.75: paired P(A>B) = 0.793, 95% interval [0.621, 0.931]

    Deviations from the paper: with few runs the percentile bootstrap claims too much (two wins of two give [1, 1]), so
    a claim also needs the score interval of the wins among untied pairs above 1/2 (unpaired: the rank-sum test) and so
    many runs that they could show it at this level, six pairs at 0.05. With 15 pairs or more that hardly changes a
    verdict. Of two equal pipelines at most 4% of studies claim that A is better, whatever the number of pairs (3.1% at
    29).
    """
    needed = required_runs(gamma, alpha, beta)
    x, y = two_sides(a, b, paired, mode)
    found = bootstrap_interval(x, y, paired=paired, alpha=alpha, resamples=resamples, rng=rng)
    table = _wins(x, y, paired)
    wins, ties = int((table == 1).sum()), int((table == 0.5).sum())
    losses = table.size - wins - ties
    wilson = None
    if paired:
        enough = len(x) >= fewest_pairs(alpha)
        wilson = wilson_interval(wins, wins + losses, alpha=alpha) if wins + losses else (0.0, 1.0)
        agrees = wilson[0] > 0.5
    else:
        # the most extreme of all orders must be rare enough to show anything
        enough = math.comb(len(x) + len(y), len(x)) * alpha / 2 >= 1
        agrees = enough and ties < table.size and stats.mannwhitneyu(x, y).pvalue <= alpha
    return Verdict(
        decision=_decide(enough, agrees and found.low > 0.5, found.high > gamma),
        probability=found.estimate,
        low=found.low,
        high=found.high,
        wilson=wilson,
        paired=paired,
        unpaired_probability=float(np.mean(_wins(x, y, False))),
        correlation=correlation(x, y) if paired else None,
        wins=wins,
        ties=ties,
        losses=losses,
        runs=min(len(x), len(y)),
        needed=needed,
        gamma=gamma,
        alpha=alpha,
    )


def _decide(enough: bool, significant: bool, meaningful: bool) -> Decision:
    if not enough:
        return "not enough runs"
    if not significant:
        return "not significant"
    return "significant and meaningful" if meaningful else "significant, not meaningful"


def fewest_pairs(alpha: float = 0.05) -> int:
    """Return how many pairs could show anything at all: that many wins in a row have chance alpha/2.

    Args:
        alpha: one minus the confidence.

    Example:
        >>> fewest_pairs()
        6
    """
    check_level("alpha", alpha)
    return math.ceil(math.log2(2 / alpha))


def required_runs(
    gamma: float = 0.75,
    alpha: float = 0.05,
    beta: float = 0.05,
    *,
    rule: Literal["noether", "paired", "unpaired"] = "noether",
    largest: int = 2000,
    repetitions: int = 2000,
    rng: np.random.Generator | int | None = 0,
) -> int:
    r"""Return how many runs of each find a true P(A>B) of `gamma` with probability 1 - beta.

    .. math:: N \ge \left( \frac{\Phi^{-1}(1 - \alpha) - \Phi^{-1}(\beta)}{\sqrt 6 (1/2 - \gamma)} \right)^2
        \qquad \text{(Noether 1987; appendix C)}

    Noether's number is derived for the one-sided test of all combinations of runs. `verdict` on pairs needs more: ask
    for `rule="paired"`, which evaluates that rule itself, or `"unpaired"`, which simulates it on normal scores.

    Args:
        gamma: the true P(A>B), in (1/2, 1).
        alpha: level, in (0, 1/2); of a two-sided interval for the rules other than Noether's.
        beta: the chance to miss it, in (0, 1/2).
        rule: whose number.
        largest: where to give up, for the rules other than Noether's.
        repetitions: of the simulation, if unpaired.
        rng: generator or seed of these.

    Raises:
        InvalidArgument: for a bound out of range, or where more than `largest` runs are needed.

    Example:
        >>> required_runs(0.75, 0.05, 0.05), required_runs(0.75, 0.05, 0.05, rule="paired")
        (29, 51)
    """
    _check_gamma(gamma)
    check_level("alpha", alpha)
    check_level("beta", beta)
    check_choice("rule", rule, ("noether", "paired", "unpaired"))
    if rule == "noether":
        numerator = stats.norm.isf(alpha) + stats.norm.isf(beta)
        return math.ceil((numerator / (math.sqrt(6) * (gamma - 0.5))) ** 2)
    if rule == "paired":
        return _first_that_stays(
            lambda n: power_of_pairs(gamma, n, alpha=alpha) >= 1 - beta, fewest_pairs(alpha), largest
        )
    shift = math.sqrt(2) * stats.norm.ppf(gamma)
    generator = np.random.default_rng(rng)
    return _bisect(
        lambda n: power_of_unpaired(shift, n, alpha=alpha, repetitions=repetitions, rng=generator) >= 1 - beta, largest
    )


def _first_that_stays(holds: Any, first: int, largest: int) -> int:
    """Return the first n from which on it holds; counts make the power a saw, so a few ahead are looked at."""
    ahead, run = 12, 0
    for n in range(first, largest + ahead):
        run = run + 1 if holds(n) else 0
        if run == ahead:
            return n - ahead + 1
    raise InvalidArgument(f"More than {largest} runs are needed; raise gamma, alpha or beta, or `largest`.")


def _bisect(holds: Any, largest: int) -> int:
    low, high = 3, 4
    while not holds(high):
        low, high = high, 2 * high
        if low >= largest:
            raise InvalidArgument(f"More than {largest} runs are needed; raise gamma, alpha or beta, or `largest`.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def power_of_pairs(probability: float, runs: int, *, alpha: float = 0.05) -> float:
    """Return how often `verdict` on pairs finds A significantly better, exactly, where no pair ties.

    Args:
        probability: the true paired P(A>B), in [0, 1].
        runs: number of pairs.
        alpha: one minus the confidence of the intervals.

    Example:
        >>> round(power_of_pairs(0.75, 29), 2), round(power_of_pairs(0.5, 29), 3)
        (0.83, 0.031)
    """
    if not 0 <= probability <= 1:
        raise InvalidArgument(f"probability={probability} is none.")
    return float(stats.binom.sf(critical_wins(runs, alpha) - 1, runs, probability))


@lru_cache(maxsize=4096)
def critical_wins(runs: int, alpha: float = 0.05) -> int:
    """Return the smallest number of wins in `runs` pairs without ties that `verdict` calls significant.

    It is `runs + 1` where no number is enough.

    Args:
        runs: number of pairs.
        alpha: one minus the confidence of the intervals.

    Example:
        >>> critical_wins(29), critical_wins(10), critical_wins(5)
        (20, 9, 6)
    """
    if runs < fewest_pairs(alpha):
        return runs + 1
    # the score interval lies above 1/2 from here on, and the bootstrap's at the same number or one or two later
    wins = math.floor((runs + stats.norm.isf(alpha / 2) * math.sqrt(runs)) / 2) + 1
    while wins < runs and _exact_interval(wins, 0, runs, alpha)[0] <= 0.5:
        wins += 1
    return wins


def power_of_unpaired(
    shift: float,
    runs: int,
    *,
    alpha: float = 0.05,
    repetitions: int = 1000,
    resamples: int = 400,
    rng: np.random.Generator | int | None = 0,
) -> float:
    """Return how often `verdict` on unpaired runs finds A better, by simulation of that rule on normal scores.

    Args:
        shift: difference of the means in standard deviations of one run.
        runs: of each side.
        alpha: one minus the confidence.
        repetitions: simulated studies.
        resamples: repetitions of the bootstrap in each.
        rng: generator or seed.

    Example:
        >>> power_of_unpaired(3.0, 10, repetitions=50)
        1.0
    """
    check_positive("repetitions", repetitions)
    generator = np.random.default_rng(rng)
    if math.comb(2 * runs, runs) * alpha / 2 < 1:
        return 0.0
    a = generator.normal(shift, 1.0, (repetitions, runs))
    b = generator.normal(0.0, 1.0, (repetitions, runs))
    # the rank test first: it is cheap, and the bootstrap need only be looked at where it is passed
    passed = np.flatnonzero(stats.mannwhitneyu(a, b, axis=1).pvalue <= alpha)
    claims = 0
    for i in passed:
        values = bootstrap_unpaired(a[i], b[i], resamples=resamples, rng=generator)
        claims += bool(np.quantile(values, alpha / 2) > 0.5)
    return claims / repetitions


def correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return Pearson's correlation of paired scores, None where one of them does not vary.

    Args:
        a: scores of A.
        b: scores of B in the same order.

    Example:
        >>> correlation([0, 1], [2, 4]), correlation([1, 1], [2, 3])
        (1.0, None)
    """
    x, y = two_sides(a, b, True, "max")
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip((x @ y) / scale, -1, 1)) if scale > 0 else None


def bootstrap_counts(n: int, resamples: int, generator: np.random.Generator) -> Array:
    """Return how often each of n items is drawn in each of the repetitions of a bootstrap, `(resamples, n)`.

    Drawing indices and counting them is ten times as fast as drawing multinomial counts.

    Args:
        n: items.
        resamples: repetitions.
        generator: of the draws.

    Example:
        >>> bootstrap_counts(3, 2, np.random.default_rng(0)).sum(1)
        array([3., 3.])
    """
    counts = np.empty((resamples, n))
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        places = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n)
    return counts


# -- checks and parts --------------------------------------------------------------------------------------------------


def scores(name: str, values: ArrayLike, *, fewest: int = 1) -> Array:
    """Return scores as a vector of float64, or say what is wrong with them.

    Args:
        name: what to call them.
        values: one number a run.
        fewest: how many are needed.

    Raises:
        ShapeMismatch: if there are too few or it is no vector.
        InvalidArgument: for NaN or infinite scores.

    Example:
        >>> scores("a", [1, 2])
        array([1., 2.])
    """
    x = numbers(name, values)
    if x.ndim != 1 or len(x) < fewest:
        raise ShapeMismatch(f"{name} has the shape {x.shape}; a vector of at least {fewest} scores is needed.")
    return x


def numbers(name: str, values: ArrayLike) -> Array:
    """Return values as float64, or say that one is NaN or no number.

    Args:
        name: what to call them.
        values: of any shape.
    """
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} holds something that is no number: {error}") from error
    if not np.isfinite(x).all():
        raise InvalidArgument(
            f"{name} holds {int((~np.isfinite(x)).sum())} scores that are NaN or infinite. A failed run is not left "
            "out silently: repeat it, or give it the worst score."
        )
    return x


def run_matrix(name: str, values: ArrayLike) -> Array:
    """Return scores as a matrix of runs by tasks; a vector is one task.

    Args:
        name: what to call them.
        values: `(n,)` or `(n, tasks)`.
    """
    x = numbers(name, values)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeMismatch(f"{name} has the shape {x.shape}; runs by tasks, (n, tasks), is needed.")
    return x


def two_sides(a: ArrayLike, b: ArrayLike, paired: bool, mode: str) -> tuple[Array, Array]:
    """Return the scores of both sides so that higher is better, or say what does not fit.

    Args:
        a: scores of A.
        b: scores of B.
        paired: whether there must be as many.
        mode: `"max"` if higher is better.
    """
    check_choice("mode", mode, ("max", "min"))
    x, y = scores("a", a), scores("b", b)
    if paired and len(x) != len(y):
        raise ShapeMismatch(
            f"a has {len(x)} runs and b has {len(y)}: pairs need the same runs of both. Leave out what has no partner, "
            "or pass paired=False."
        )
    return (x, y) if mode == "max" else (-x, -y)


def _wins(x: Array, y: Array, paired: bool) -> Array:
    """Return 1, 1/2 or 0 for each pair, or for each combination."""
    if not paired:
        x, y = x[:, None], y[None, :]
    return (x > y) + 0.5 * (x == y)


@lru_cache(maxsize=4096)
def _exact_interval(wins: int, ties: int, runs: int, alpha: float) -> tuple[float, float]:
    """Return the quantiles that infinitely many bootstrap repetitions of `runs` pairs would have."""
    if ties == 0:
        low, high = stats.binom.ppf([alpha / 2, 1 - alpha / 2], runs, wins / runs)
        return float(low) / runs, float(high) / runs
    one = np.array([runs - wins - ties, ties, wins], dtype=np.float64) / runs
    cumulative = np.cumsum(_power_of_polynomial(one, runs))
    # quantile: the first half-point whose cumulative probability reaches it, rounding allowed for
    low, high = (int(np.searchsorted(cumulative, q - 1e-12)) for q in (alpha / 2, 1 - alpha / 2))
    return low / (2 * runs), high / (2 * runs)


def _power_of_polynomial(coefficients: Array, exponent: int) -> Array:
    """Return the coefficients of a polynomial to a power: the distribution of a sum of independent draws."""
    result = np.ones(1)
    while exponent:
        if exponent % 2:
            result = np.convolve(result, coefficients)
        exponent //= 2
        if exponent:
            coefficients = np.convolve(coefficients, coefficients)
    return result


def _check_gamma(gamma: float) -> None:
    if not 0.5 < gamma < 1:
        raise InvalidArgument(f"gamma={gamma} must lie in (0.5, 1): a P(A>B) that would matter.")


def check_level(name: str, value: float) -> None:
    """Raise `InvalidArgument` unless `value` lies in (0, 1/2).

    Args:
        name: what to call it.
        value: alpha or beta.
    """
    if not 0 < value < 0.5:
        raise InvalidArgument(f"{name}={value} must lie in (0, 0.5).")


def check_positive(name: str, value: int) -> None:
    """Raise `InvalidArgument` unless `value` is at least one.

    Args:
        name: what to call it.
        value: how many.
    """
    if value < 1:
        raise InvalidArgument(f"{name}={value} must be at least 1.")


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down procedure.

    Args:
        pvalues: of several tests.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(pvalues, kind="stable")
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for position, i in enumerate(order):
        largest = max(largest, min(1.0, (len(pvalues) - position) * float(pvalues[i])))
        adjusted[int(i)] = largest
    return adjusted
