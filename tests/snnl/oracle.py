"""The equations in NumPy's float64 and plain loops, and the fixtures: nothing here comes from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROWS = np.arange(12)
A = np.array([[math.sin(0.7 * i * (j + 1) + j) for j in range(5)] for i in range(12)])
B = np.array([[math.cos(0.3 * i * (j + 1)) + 0.1 * i for j in range(3)] for i in range(12)])
Y3 = ROWS % 3
YS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 7])  # 7 has no other one of its class
_RANDOM = np.random.RandomState(1337)  # whose numbers the published values belong to
X1337 = _RANDOM.randn(100, 10)
Y1337 = np.arange(100) % 5
X1337_SHIFTED = X1337 + Y1337[:, None]


def distance(a: Array, b: Array, kind: str) -> float:
    if kind == "sqeuclidean":
        return float(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))
    lengths = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    return 1.0 if min(lengths) == 0 else 1.0 - float(a @ b) / (lengths[0] * lengths[1])


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def losses(x: Array, y: Array, temperature: float, kind: str = "sqeuclidean", ignore: int | None = None) -> list[float]:
    """Return the loss of each anchor, NaN for those that do not count."""
    found = []
    for i in range(len(x)):
        others = [k for k in range(len(x)) if k != i and y[k] != ignore]
        positives = [k for k in others if y[k] == y[i]]
        if y[i] == ignore or not positives:
            found.append(math.nan)
            continue
        scores = {k: -distance(x[i], x[k], kind) / temperature for k in others}
        found.append(log_sum_exp(list(scores.values())) - log_sum_exp([scores[k] for k in positives]))
    return found


def loss(x: Array, y: Array, temperature: float, kind: str = "sqeuclidean", ignore: int | None = None) -> float:
    counted = [value for value in losses(x, y, temperature, kind, ignore) if not math.isnan(value)]
    return sum(counted) / len(counted) if counted else 0.0


def chance(y: Array) -> float:
    counts = [sum(1 for other in y if other == label) for label in y]
    levels = [math.log((len(y) - 1) / (n - 1)) for n in counts if n > 1]
    return sum(levels) / len(levels) if levels else 0.0


def entanglement(x: Array, y: Array, temperature: float, classes: int, kind: str = "sqeuclidean") -> Array:
    shares = np.zeros((classes, classes))
    for i in range(len(x)):
        weights = {k: math.exp(-distance(x[i], x[k], kind) / temperature) for k in range(len(x)) if k != i}
        for k, weight in weights.items():
            shares[y[i], y[k]] += weight / sum(weights.values())
    counts = np.array([(y == c).sum() for c in range(classes)])
    return shares / np.maximum(counts, 1)[:, None]


def minimum(f: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Return where a function of one minimum is smallest, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if f(a) < f(b) else (a, high)
    return (low + high) / 2, f((low + high) / 2)


def paper_t(f: Callable[[float], float], t: float, initial: float = 100.0, rate: float = 0.1) -> float:
    """Return the released code's next t, its derivative by a difference of fourth order."""
    h = 1e-3 * t
    slope = (
        -f(initial / (t + 2 * h)) + 8 * f(initial / (t + h)) - 8 * f(initial / (t - h)) + f(initial / (t - 2 * h))
    ) / (12 * h)
    return t - rate * slope
