"""The transform as it is written in the paper, with dense matrix powers, in NumPy and SciPy."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

Array = NDArray[np.float64]


def walk(edge_index: Tensor, n: int, weight: Tensor | None = None, isolated: str = "leak") -> Array:
    a = np.zeros((n, n))
    for k, (s, t) in enumerate(edge_index.T.tolist()):
        a[t, s] = 1.0 if weight is None else float(weight[k])
    d = a.sum(0)
    normalised = np.divide(a, d, out=np.zeros_like(a), where=d > 0)
    p = 0.5 * (np.eye(n) + normalised)
    if isolated == "stay":
        p[d == 0, d == 0] = 1.0
    return p


def coefficients(p: Array, x: Array, J: int, order: int = 2) -> dict[tuple[int, ...], Array]:
    """Return path -> coefficients of one signal."""
    power = np.linalg.matrix_power
    psi = {j: power(p, 2 ** (j - 1)) - power(p, 2**j) for j in range(1, J + 1)}
    found: dict[tuple[int, ...], Array] = {(): x}
    for length in range(1, order + 1):
        for path in sorted(itertools.combinations(range(1, J + 1), length), key=lambda q: q[::-1]):
            found[path] = np.abs(psi[path[-1]] @ found[path[:-1]])
    return found


def sums(u: Array, Q: int) -> list[float]:
    return [float((np.abs(u) ** q).sum()) for q in range(1, Q + 1)]


def standardised(u: Array) -> list[float]:
    return [u.mean(), u.var(), stats.skew(u, bias=False), stats.kurtosis(u)]


def features(edge_index: Tensor, x: Tensor, *, J: int = 5, Q: int = 4, normalized: bool = False, **walk_: str) -> Array:
    """Return the features of one graph, `(F, paths, Q)`."""
    p = walk(edge_index, len(x), **walk_)
    of = standardised if normalized else lambda u: sums(u, Q)
    return np.array([[of(u) for u in coefficients(p, c, J).values()] for c in x.double().numpy().T])


def undirected(pairs: list[tuple[int, int]]) -> Tensor:
    both = [*pairs, *[(t, s) for s, t in pairs]]
    return torch.tensor(both, dtype=torch.int64).T if both else torch.zeros(2, 0, dtype=torch.int64)


def path_graph(n: int) -> Tensor:
    return undirected([(i, i + 1) for i in range(n - 1)])


def star(n: int) -> Tensor:
    return undirected([(0, i) for i in range(1, n)])


def complete(n: int) -> Tensor:
    return undirected(list(itertools.combinations(range(n), 2)))


def random_graph(n: int, p: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return undirected([(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < p])
