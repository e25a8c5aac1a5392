"""Similarity indices written down from their definitions in float64 NumPy, and published or independent values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def notebook() -> tuple[Array, Array]:
    """Return the data of the demo that Google published, whose printed values are known."""
    state = np.random.RandomState(1337)
    x = state.randn(100, 10)
    return x, state.randn(100, 10) + x


def trigonometric() -> tuple[Array, Array]:
    i = np.arange(12)[:, None]
    a = np.sin(0.7 * i * (np.arange(5) + 1) + np.arange(5))
    return a, np.cos(0.3 * i * (np.arange(3) + 1)) + 0.1 * i


# (function, arguments) -> the value for the notebook's data
NOTEBOOK: list[tuple[str, dict[str, Any], float]] = [
    ("cka", {}, 0.5576132566117585),
    ("cka", {"debiased": True}, 0.5134564895055259),
    ("cka", {"kernel": "rbf", "bandwidth": 0.2}, 0.9898069302768644),
    ("cka", {"kernel": "rbf", "bandwidth": 0.4}, 0.7481998075978709),
    ("cka", {"kernel": "rbf", "bandwidth": 0.5}, 0.6548311822614982),
    ("cka", {"kernel": "rbf", "bandwidth": 0.8}, 0.585857089328739),
    ("cka", {"kernel": "rbf", "bandwidth": 1.0}, 0.5758322230135365),
    ("cka", {"kernel": "rbf", "debiased": True}, 0.4192767510220522),
    ("hsic", {}, 11.878357269185974),
    ("hsic", {"debiased": True}, 9.895955787045914),
    ("cca", {}, 0.7310139587836586),
    ("cca", {"statistic": "r2"}, 0.545396332190833),
    ("cca", {"statistic": "r2", "center": False}, 0.5431238559305234),
    ("pwcca", {}, 0.7346677196174037),
    ("linear_regression_r2", {}, 0.5634752416529546),
    ("procrustes", {}, 0.7362553106058285),
    ("procrustes", {"kind": "distance"}, 0.527489378788343),
]
NOTEBOOK_REVERSED = [("pwcca", {}, 0.7368405675246635), ("linear_regression_r2", {}, 0.5677425705377119)]
NOTEBOOK_MINIBATCH = {
    10: 0.5437308119619042,
    20: 0.5337183633654443,
    25: 0.5132675063590595,
    50: 0.5308439528321822,
    100: 0.5134564895055259,
}
TRIGONOMETRIC: list[tuple[str, dict[str, Any], float]] = [
    ("cka", {}, 0.20082406390091656),
    ("cka", {"debiased": True}, -0.12398233479100917),
    ("cka", {"kernel": "rbf", "bandwidth": 0.2}, 0.7087384658930908),
    ("cka", {"kernel": "rbf", "bandwidth": 0.4}, 0.5326968515743358),
    ("cka", {"kernel": "rbf", "bandwidth": 0.5}, 0.4505786397469532),
    ("cka", {"kernel": "rbf", "bandwidth": 0.8}, 0.3127981084238038),
    ("cka", {"kernel": "rbf", "bandwidth": 1.0}, 0.273292799532524),
    ("cca", {}, 0.42028202324106356),
    ("cca", {"statistic": "r2"}, 0.33884044310876216),
    ("pwcca", {}, 0.34282911183781367),
    ("linear_regression_r2", {}, 0.19089627209285692),
    ("procrustes", {}, 0.3156308797943933),
]
TRIGONOMETRIC_REVERSED = [("pwcca", {}, 0.4322067743539971), ("linear_regression_r2", {}, 0.35468813839369395)]


def gram(x: Array, kernel: str = "linear", bandwidth: float = 0.5) -> Array:
    if kernel == "linear":
        return x @ x.T
    distances = ((x[:, None] - x[None]) ** 2).sum(2)
    return np.exp(-distances / (2 * bandwidth**2 * np.median(distances)))


def hsic(x: Array, y: Array, kernel: str = "linear", debiased: bool = False, bandwidth: float = 0.5) -> float:
    """Return HSIC by matrices of ones (biased), or in the form of Song et al. 2012, equation 5."""
    return _hsic_of(gram(x, kernel, bandwidth), gram(y, kernel, bandwidth), debiased)


def _hsic_of(k: Array, m: Array, debiased: bool) -> float:
    n = len(k)
    if not debiased:
        h = np.eye(n) - np.ones((n, n)) / n
        return float(np.trace(k @ h @ m @ h) / (n - 1) ** 2)
    k, m = (g - np.diag(np.diag(g)) for g in (k, m))
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    return float(total / (n * (n - 3)))


def u_centred_hsic(x: Array, y: Array) -> float:
    """Return the unbiased HSIC by U-centring, which must be the form of Song et al."""
    n = len(x)
    grams = []
    for z in (x, y):
        k = z @ z.T
        np.fill_diagonal(k, 0)
        k = k - k.sum(0) / (n - 2) - k.sum(1)[:, None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        grams.append(k)
    return float((grams[0] * grams[1]).sum() / (n * (n - 3)))


def cka(x: Array, y: Array, **settings: Any) -> float:
    return hsic(x, y, **settings) / np.sqrt(hsic(x, x, **settings) * hsic(y, y, **settings))


def kernel_target_alignment(x: Array, labels: Array, debiased: bool = False, **settings: Any) -> float:
    k, m = gram(x, **settings), (labels[:, None] == labels[None]).astype(float)
    value, own, other = (_hsic_of(p, q, debiased) for p, q in ((k, m), (k, k), (m, m)))
    return float(value / np.sqrt(own * other))


def centred(x: Array) -> Array:
    return x - x.mean(0)


def _projector(x: Array) -> Array:
    return x @ np.linalg.pinv(x, rcond=1e-10)


def cca(x: Array, y: Array, statistic: str = "rho", center: bool = True) -> float:
    """Return CCA from the eigenvalues of the product of two projections, which are the squared correlations."""
    p, q = (_projector(centred(z) if center else z) for z in (x, y))
    count = min(round(np.trace(p)), round(np.trace(q)))
    squares = np.sort(np.linalg.eigvals(p @ q).real)[::-1][:count].clip(0, 1)
    return float(squares.mean() if statistic == "r2" else np.sqrt(squares).mean())


def svcca(x: Array, y: Array, statistic: str = "rho", threshold: float = 0.99) -> float:
    kept = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(centred(z), full_matrices=False)
        count = 1
        while (s[:count] ** 2).sum() < threshold * (s**2).sum():
            count += 1
        kept.append(u[:, :count] * s[:count])
    return cca(*kept, statistic=statistic)


def pwcca(x: Array, y: Array) -> float:
    """Return PWCCA with the canonical directions as eigenvectors in sample space."""
    x, y = centred(x), centred(y)
    p, q = _projector(x), _projector(y)
    values, vectors = np.linalg.eigh(p @ q @ p)
    count = min(round(np.trace(p)), round(np.trace(q)))
    h, squares = vectors[:, ::-1][:, :count], values[::-1][:count].clip(0, 1)
    weights = np.abs(h.T @ x).sum(1)
    return float((weights * np.sqrt(squares)).sum() / weights.sum())


def linear_regression_r2(x: Array, y: Array) -> float:
    x, y = centred(x), centred(y)
    residual = x - y @ np.linalg.lstsq(y, x, rcond=1e-10)[0]
    return float(1 - (residual**2).sum() / (x**2).sum())


def procrustes(x: Array, y: Array, kind: str = "similarity") -> float:
    """Return it by the squared distance after the best rotation, of widths made equal by zeros."""
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(centred(z), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    u, _, v = np.linalg.svd(x.T @ y)
    distance = ((x @ u @ v - y) ** 2).sum()
    similarity = 1 - distance / 2
    return float({"similarity": similarity, "distance": distance, "angular": np.arccos(min(similarity, 1))}[kind])


def minibatch_cka(batches: list[tuple[Array, Array]], weights: list[float], **settings: Any) -> float:
    """Return the ratio of weighted averages of the unbiased HSIC of batches."""

    def average(choose: Callable[[Array, Array], tuple[Array, Array]]) -> float:
        values = [hsic(*choose(x, y), debiased=True, **settings) for x, y in batches]
        return float(np.average(values, weights=weights))

    cross, own, other = (average(c) for c in (lambda x, y: (x, y), lambda x, y: (x, x), lambda x, y: (y, y)))
    return float(cross / np.sqrt(own * other))
