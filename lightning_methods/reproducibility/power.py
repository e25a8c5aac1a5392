"""How many more pairs: the power of the verdict at the effect that was observed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_methods.errors import InvalidArgument
from lightning_methods.reproducibility.functional import (
    Array,
    Mode,
    check_level,
    power_of_pairs,
    power_of_unpaired,
    required_runs,
    two_sides,
)

_SIZES = (5, 8, 10, 15, 20, 29, 40, 50, 75, 100, 150, 200)


class PowerCurve(NamedTuple):
    """How often a study of each size would find A better, were the observed effect the true one.

    Attributes:
        sizes: numbers of runs of each.
        power: chance of a significant verdict.
        probability: the P(A>B) that the observed effect stands for, under normal scores.
        needed: runs for a power of 1 - beta; None where it takes more than `largest`, or A is not better.
        more: how many more than there are; None likewise.
        noether: the paper's sample size at this probability; None where A is not better.
        paired: whether pairs are compared.
    """

    sizes: Array
    power: Array
    probability: float
    needed: int | None
    more: int | None
    noether: int | None
    paired: bool


def power_curve(
    a: ArrayLike,
    b: ArrayLike,
    *,
    sizes: Sequence[int] = _SIZES,
    alpha: float = 0.05,
    beta: float = 0.05,
    paired: bool = True,
    mode: Mode = "max",
    largest: int = 2000,
    repetitions: int = 400,
    rng: np.random.Generator | int | None = 0,
) -> PowerCurve:
    """Return the power of the whole decision rule over the number of runs, at the observed effect with normal scores.

    A pilot's effect is itself uncertain: read it as "if the truth is what we saw". And fix the number of runs before
    the study; looking after each run until it is significant finds differences that are not there.

    Args:
        a: scores of A, at least two.
        b: scores of B.
        sizes: numbers of runs.
        alpha: one minus the confidence of the intervals.
        beta: the chance to miss the effect.
        paired: whether run i of both belongs together; then the standard deviation of differences counts.
        mode: `"max"` if higher is better.
        largest: more runs than these are not considered.
        repetitions: simulated studies a size, if not paired; pairs need no simulation.
        rng: generator or seed of these.

    Raises:
        ShapeMismatch: if paired scores differ in number.

    Example:
        >>> power_curve([1.2, 1.0, 1.4, 0.9], [0.6, 0.8, 1.0, 0.9], sizes=[10, 29]).needed
        19
    """
    check_level("alpha", alpha)
    check_level("beta", beta)
    x, y = two_sides(a, b, paired, mode)
    effect = _effect(x, y, paired)
    probability = float(stats.norm.cdf(effect))
    generator = np.random.default_rng(rng)
    if paired:
        power = [power_of_pairs(probability, n, alpha=alpha) for n in sizes]
    else:
        shift = math.sqrt(2) * effect
        power = [
            power_of_unpaired(min(shift, 99.0), n, alpha=alpha, repetitions=repetitions, rng=generator) for n in sizes
        ]
    needed = noether = None
    if probability > 0.5:
        needed = _needed(probability, alpha, beta, paired, largest, repetitions, generator)
        noether = required_runs(min(probability, 1 - 1e-9), alpha, beta)
        noether = noether if noether <= largest else None
    more = None if needed is None else max(needed - min(len(x), len(y)), 0)
    return PowerCurve(np.asarray(sizes), np.asarray(power), probability, needed, more, noether, paired)


def _effect(x: Array, y: Array, paired: bool) -> float:
    """Return the mean difference over the standard deviation of a difference of two runs, infinite without one."""
    if paired:
        difference = x - y
        mean, std = float(difference.mean()), float(difference.std(ddof=1)) if np.ptp(difference) > 0 else 0.0
    else:
        mean = float(x.mean() - y.mean())
        std = math.sqrt(sum(float(z.var(ddof=1)) if np.ptp(z) > 0 else 0.0 for z in (x, y)))
    return mean / std if std > 0 else math.copysign(math.inf, mean) if mean else 0.0


def _needed(
    probability: float,
    alpha: float,
    beta: float,
    paired: bool,
    largest: int,
    repetitions: int,
    rng: np.random.Generator,
) -> int | None:
    try:
        return required_runs(
            min(probability, 1 - 1e-9),
            alpha,
            beta,
            rule="paired" if paired else "unpaired",
            largest=largest,
            repetitions=repetitions,
            rng=rng,
        )
    except InvalidArgument:
        return None
