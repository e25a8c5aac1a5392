"""Where the variance comes from: one source at a time, Sobol indices, test-set noise, and what a mean keeps of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_methods.errors import InvalidArgument, ShapeMismatch, did_you_mean
from lightning_methods.reproducibility.functional import (
    Array,
    Interval,
    Mode,
    bootstrap_counts,
    check_level,
    check_positive,
    numbers,
    scores,
)

_FEWEST_ROWS = 2


class Component(NamedTuple):
    """The standard deviation that one source of variation brings.

    Attributes:
        std: over the seeds of the source, all others fixed.
        low, high: chi-square interval of it, of normal theory.
        runs: number of seeds.
        share: `std` as a fraction of that of the reference source; None where that is zero or there is none.
        effect: whether the runs differ at all; False tells a source that the pipeline does not use.
    """

    std: float
    low: float
    high: float
    runs: int
    share: float | None
    effect: bool


class SobolIndex(NamedTuple):
    """How much of the variance a source explains.

    Attributes:
        first: explained by the source alone.
        total: left if everything but the source were controlled, interactions included.
        interaction: total minus first.
        first_interval, total_interval: percentile bootstrap over rows.
    """

    first: float
    total: float
    interaction: float
    first_interval: tuple[float, float]
    total_interval: tuple[float, float]


def variance_components(
    samples: Mapping[str, ArrayLike], *, reference: str | None = None, alpha: float = 0.05
) -> dict[str, Component]:
    r"""Return the standard deviation of each source, varied one at a time (the design of MLSys 2021, figure 1).

    The interval is :math:`s \sqrt{(n-1) / \chi^2_{q}}`. Such components do not add up to the variance of runs in which
    everything varies; see `sobol_components`.

    Args:
        samples: source -> scores of runs in which only its seed differs, at least two.
        reference: the source of which the others are fractions, as the data split.
        alpha: one minus the confidence.

    Raises:
        InvalidArgument: if the reference is no source.
        ShapeMismatch: with fewer than two runs of a source.

    Example:
        >>> found = variance_components({"init": [1.0, 2.0, 3.0], "dropout": [1.0, 1.0, 1.0]}, reference="init")
        >>> found["init"].std, found["dropout"].effect, found["dropout"].share
        (1.0, False, 0.0)
    """
    check_level("alpha", alpha)
    values = {name: scores(name, x, fewest=2) for name, x in samples.items()}
    if reference is not None and reference not in values:
        raise InvalidArgument(f"reference={reference!r} is no source. {did_you_mean(reference, values)}")
    deviations = {name: _std(x) for name, x in values.items()}
    base = deviations[reference] if reference is not None else 0.0
    found = {}
    for name, x in values.items():
        std, n = deviations[name], len(x)
        upper, lower = stats.chi2.ppf([alpha / 2, 1 - alpha / 2], n - 1)
        found[name] = Component(
            std=std,
            low=std * math.sqrt((n - 1) / lower),
            high=std * math.sqrt((n - 1) / upper),
            runs=n,
            share=std / base if base > 0 else None,
            effect=bool(np.ptp(x) > 0),
        )
    return found


def sobol_components(
    f_a: ArrayLike,
    f_b: ArrayLike,
    f_ab: Mapping[str, ArrayLike],
    *,
    alpha: float = 0.05,
    resamples: int = 1000,
    rng: np.random.Generator | int | None = 0,
) -> dict[str, SobolIndex] | None:
    r"""Return first-order and total Sobol indices of the sources (Saltelli 2010, Jansen 1999).

    .. math:: S_s = \frac{\overline{f(B) (f(A_B^s) - f(A))}}{V}, \qquad
        T_s = \frac{\overline{(f(A) - f(A_B^s))^2}}{2V}

    Args:
        f_a: scores of n runs, each source with its first seed of the row.
        f_b: scores with the second seeds.
        f_ab: source -> scores of runs with the second seed for that source and the first for all others.
        alpha: one minus the confidence.
        resamples: repetitions of the bootstrap over rows.
        rng: generator or seed.

    Returns:
        One index a source, or None where the scores do not vary at all.

    Raises:
        ShapeMismatch: if there are fewer than two rows, or different numbers of them.

    Example:
        >>> sobol_components([0, 1, 0, 1], [0, 0, 1, 1], {"init": [0, 0, 1, 1], "order": [0, 1, 0, 1]})["init"].total
        1.0
    """
    check_level("alpha", alpha)
    check_positive("resamples", resamples)
    a, b = scores("f_a", f_a, fewest=_FEWEST_ROWS), scores("f_b", f_b, fewest=_FEWEST_ROWS)
    swapped = {name: scores(name, x) for name, x in f_ab.items()}
    for name, x in {"f_b": b, **swapped}.items():
        if len(x) != len(a):
            raise ShapeMismatch(f"{name} has {len(x)} rows and f_a has {len(a)}.")
    everything = np.concatenate([a, b])
    if np.ptp(everything) == 0:
        return None
    # a constant does not change an index, and leaves the products of the first order small
    centre = everything.mean()
    a, b, swapped = a - centre, b - centre, {name: x - centre for name, x in swapped.items()}
    index = np.random.default_rng(rng).integers(len(a), size=(resamples, len(a)))
    variance = np.concatenate([a[index], b[index]], axis=1).var(axis=1)
    usable = variance > 0
    found = {}
    for name, x in swapped.items():
        products, squares = b * (x - a), (a - x) ** 2 / 2
        overall = float(np.concatenate([a, b]).var())
        first, total = float(products.mean()) / overall, float(squares.mean()) / overall
        again = [terms[index].mean(1)[usable] / variance[usable] for terms in (products, squares)]
        found[name] = SobolIndex(first, total, total - first, *(_quantiles(values, alpha) for values in again))
    return found


def variance_of_mean(sigma: float, correlation: float, runs: int) -> float:
    r"""Return the variance of a mean of k runs that share what was held fixed (MLSys 2021, equation of FixHOptEst).

    .. math:: \mathrm{Var}(\tilde\mu_{(k)} \mid \xi) = \frac{\sigma^2}{k} + \frac{k-1}{k} \rho \sigma^2

    With a correlation above 0 it does not vanish as k grows.

    Args:
        sigma: standard deviation of one run.
        correlation: mean correlation of two runs, induced by what is fixed.
        runs: k.

    Example:
        >>> round(variance_of_mean(0.02, 0.5, 100) ** 0.5, 7)
        0.0142127
    """
    check_positive("runs", runs)
    if sigma < 0 or not -1 <= correlation <= 1:
        raise InvalidArgument(
            f"sigma={sigma}, correlation={correlation}: not negative, and within [-1, 1], are needed."
        )
    return sigma**2 * (1 + (runs - 1) * correlation) / runs


def binomial_std(accuracy: float, examples: int) -> float:
    """Return the standard deviation that an accuracy has from the finite test set alone.

    Args:
        accuracy: in [0, 1].
        examples: of the test set.

    Example:
        >>> round(binomial_std(0.93, 10_000), 8)
        0.00255147
    """
    check_positive("examples", examples)
    if not 0 <= accuracy <= 1:
        raise InvalidArgument(f"accuracy={accuracy} must lie in [0, 1].")
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def two_way_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    alpha: float = 0.05,
    mode: Mode = "max",
    resamples: int = 2000,
    rng: np.random.Generator | int | None = 0,
) -> dict[str, Interval]:
    """Return intervals of the mean difference A - B over runs, over test examples, and over both.

    An interval over examples that is as wide as that over both says: more seeds will not help, a larger test set will.

    Args:
        a: `(runs, examples)`, what each run of A made of each example, as 1 for correct and 0 for wrong.
        b: the same of B, for the same seeds and examples.
        alpha: one minus the confidence.
        mode: `"max"` if higher is better.
        resamples: repetitions.
        rng: generator or seed.

    Returns:
        `"runs"`, `"examples"` and `"both"`: what is resampled.

    Raises:
        ShapeMismatch: if the two differ in shape, or are no matrices.

    Example:
        >>> two_way_bootstrap([[1, 1], [1, 1]], [[0, 1], [1, 0]], resamples=100)["runs"].estimate
        0.5
    """
    check_level("alpha", alpha)
    check_positive("resamples", resamples)
    x, y = numbers("a", a), numbers("b", b)
    if x.ndim != 2 or x.shape != y.shape or x.size == 0:
        raise ShapeMismatch(f"a is {x.shape} and b is {y.shape}; the same (runs, examples) of both is needed.")
    difference = (x - y) * (1 if mode == "max" else -1)
    runs, examples = difference.shape
    generator = np.random.default_rng(rng)
    weights = {
        "runs": bootstrap_counts(runs, resamples, generator) / runs,
        "examples": bootstrap_counts(examples, resamples, generator) / examples,
    }
    by_run = weights["runs"] @ difference  # (resamples, examples)
    values = {
        "runs": by_run.mean(1),
        "examples": weights["examples"] @ difference.mean(0),
        "both": np.einsum("re,re->r", by_run, weights["examples"]),
    }
    estimate = float(difference.mean())
    return {name: Interval(estimate, *_quantiles(sample, alpha)) for name, sample in values.items()}


def out_of_bootstrap(
    n: int, *, train_size: int | None = None, test_size: int | None = None, rng: np.random.Generator | int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of a training set drawn with replacement, and of a test set from what it left out.

    The split of MLSys 2021 (appendix B): pool all data first. The size of the training set does not depend on how often
    it is drawn.

    Args:
        n: number of pooled examples.
        train_size: default n.
        test_size: default everything that is left, which is about 37% of n.
        rng: generator or seed.

    Raises:
        InvalidArgument: if fewer examples are left than `test_size`.

    Example:
        >>> train, test = out_of_bootstrap(100, rng=0)
        >>> len(train), bool(set(train) & set(test))
        (100, False)
    """
    check_positive("n", n)
    generator = np.random.default_rng(rng)
    train = generator.integers(n, size=n if train_size is None else train_size)
    left = np.setdiff1d(np.arange(n), train)
    if test_size is not None:
        if test_size > len(left):
            raise InvalidArgument(f"test_size={test_size}: {len(left)} of {n} examples are not in the training set.")
        left = np.sort(generator.choice(left, test_size, replace=False))
    return train, left


def _std(x: Array) -> float:
    return float(x.std(ddof=1)) if np.ptp(x) > 0 else 0.0


def _quantiles(sample: Array, alpha: float) -> tuple[float, float]:
    low, high = np.quantile(sample, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)
