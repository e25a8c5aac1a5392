"""Concentration steps on packed classes: `(K, n, d)` points with a mask, all classes at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CONVERGED = 1e-9  # relative change of the log-determinant
_SINGULAR = 1e-13  # a pivot of this share of its feature's variance is rounding
_LARGEST_RIDGE = 1.0
_FEW = 0.8  # share of the points below which it is worth while to take the supported ones out


@dataclass(frozen=True)
class Packed:
    """Classes side by side, the shorter ones filled up.

    Attributes:
        x: `(K, n, d)` points near 0, exactly 0 where there is none.
        real: `(K, n)` bool, where there is one.
        h: `(K,)` how many are kept.
        target: `(d, d)` what the covariance of a small class is shrunk towards.
        shrinkage: `(K,)` how far, from 0 to 1.
        ridge: share of the mean variance that is added to a singular covariance.
    """

    x: Tensor
    real: Tensor
    h: Tensor
    target: Tensor
    shrinkage: Tensor
    ridge: float

    def rows(self, chosen: Tensor) -> Packed:
        """Return some of the classes."""
        return replace(
            self, x=self.x[chosen], real=self.real[chosen], h=self.h[chosen], shrinkage=self.shrinkage[chosen]
        )

    def thinned(self, priority: Tensor, most: int) -> tuple[Packed, Tensor]:
        """Return at most so many points of each class, those of least `priority (K, n)`, and their places."""
        places = priority.masked_fill(~self.real, torch.inf).argsort(dim=1, stable=True)[:, :most]
        real = self.real.gather(1, places)
        kept = -(-self.h * real.sum(1) // self.real.sum(1).clamp(min=1))  # the same share, rounded up
        return replace(self, x=_gathered(self.x, places), real=real, h=kept), places


@dataclass
class State:
    """Where the search stands for each class: its support `(K, n)`, and what follows from that.

    `added` is the multiple of the identity that keeps a singular covariance invertible, 0 for a regular one; `sums` and
    `products` are those of the supported points, from which the next step only takes the difference.
    """

    support: Tensor
    sums: Tensor
    products: Tensor
    location: Tensor
    scatter: Tensor
    factor: Tensor
    logdet: Tensor
    added: Tensor
    steps: Tensor

    def put(self, chosen: Tensor, other: State) -> None:
        """Replace some of the classes."""
        for name, mine in vars(self).items():
            mine[chosen] = getattr(other, name)

    def take(self, chosen: Tensor) -> State:
        """Return a copy of some of the classes."""
        return State(**{name: value[chosen] for name, value in vars(self).items()})


def estimate(packed: Packed, support: Tensor, added: Tensor | None = None, steps: Tensor | None = None) -> State:
    """Return location, scatter and Cholesky factor of the points in `support`, each from all of its points.

    The scatter is divided by the number of points, shrunk where the class is small, and gets `added` times the identity
    where it is singular. For any fixed `added` and `shrinkage` a concentration step raises no log-determinant.
    """
    points, weight = packed.x, support.to(packed.x.dtype)
    most = int(support.sum(1).max()) if len(support) else 0
    if most < _FEW * points.shape[1]:
        there, places = support.to(torch.float32).topk(max(most, 1), dim=1)
        points, weight = _gathered(points, places), there.to(points.dtype)
    count = weight.sum(1).clamp(min=1)
    location = torch.bmm(weight[:, None, :], points)[:, 0] / count[:, None]
    centred = (points - location[:, None, :]).mul_(weight[:, :, None])
    scatter = torch.bmm(centred.mT, centred) / count[:, None, None]
    zeros = torch.zeros_like(packed.h)
    added = torch.zeros_like(count) if added is None else added
    return _state(packed, support, location, scatter, added, zeros if steps is None else steps)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Return some points `(K, m, d)` of each class."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


def _state(packed: Packed, support: Tensor, location: Tensor, raw: Tensor, added: Tensor, steps: Tensor) -> State:
    count = support.sum(1)[:, None].to(packed.x.dtype)
    sums, products = location * count, count[:, :, None] * (raw + location[:, :, None] * location[:, None, :])
    rho = packed.shrinkage[:, None, None]
    scatter = (1 - rho) * raw + rho * packed.target if bool((rho > 0).any()) else raw
    factor, added = factorised(scatter, added, packed)
    logdet = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return State(support, sums, products, location, scatter, factor, logdet, added, steps)


def _updated(packed: Packed, before: State, support: Tensor) -> State:
    """Return the estimate for another support from what has entered and left it, if that is less work."""
    changed = support ^ before.support
    most = int(changed.sum(1).max()) if len(changed) else 0
    if 2 * most > packed.x.shape[1]:
        return estimate(packed, support, before.added, before.steps + 1)
    there, places = changed.to(torch.float32).topk(most, dim=1)
    sign = there.to(packed.x.dtype) * (2.0 * support.gather(1, places) - 1)
    points = _gathered(packed.x, places)
    signed = points * sign[:, :, None]
    count = support.sum(1).clamp(min=1)[:, None].to(packed.x.dtype)
    location = (before.sums + signed.sum(1)) / count
    products = torch.baddbmm(before.products, points.mT, signed) / count[:, :, None]
    scatter = products - location[:, :, None] * location[:, None, :]
    return _state(packed, support, location, scatter, before.added, before.steps + 1)


def factorised(scatter: Tensor, added: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Return a Cholesky factor of the scatter plus as little of the identity as makes it regular, and how much."""
    eye = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    variance = scatter.diagonal(dim1=1, dim2=2)
    # the overall size: of the class, else of all classes, else (all points equal) anything
    size = variance.mean(1)
    size = torch.where(size > 0, size, packed.target.diagonal().mean())
    size = torch.where(size > 0, size, torch.ones_like(size))
    added = added.clone()
    while True:
        factor, failed = torch.linalg.cholesky_ex(scatter + added[:, None, None] * eye)
        pivots = factor.diagonal(dim1=1, dim2=2).square()
        singular = (failed > 0) | ~(pivots > _SINGULAR * (variance + added[:, None])).all(1)
        singular &= added < _LARGEST_RIDGE * size
        if not bool(singular.any()):
            return factor, added
        added = torch.where(singular, torch.maximum(10 * added, packed.ridge * size), added)


def squared_distances(packed: Packed, state: State) -> Tensor:
    """Return the squared Mahalanobis distance of every point to its class, infinite where there is no point."""
    # a product with the inverted factor is several times faster than solving for every point
    eye = torch.eye(packed.x.shape[2], dtype=packed.x.dtype, device=packed.x.device)
    inverse = torch.linalg.solve_triangular(state.factor, eye.expand_as(state.factor), upper=False)
    origin = torch.bmm(inverse, state.location[:, :, None])
    # points along the last dimension: twice as fast as the transposed product, for the same numbers
    whitened = torch.baddbmm(origin, inverse, packed.x.mT, beta=-1)
    squared = whitened.square_().sum(1)
    return squared.masked_fill_(~packed.real, torch.inf)


def smallest(distances: Tensor, h: Tensor) -> Tensor:
    """Return which are the `h` smallest of each row; of equal ones the first."""
    wanted = h.clamp(min=1)
    if bool((wanted == wanted[0]).all()):
        last = distances.kthvalue(int(wanted[0]), dim=1, keepdim=True).values
    else:
        last = distances.sort(dim=1).values.gather(1, wanted[:, None] - 1)
    below = distances < last
    level = (distances == last) & (last < torch.inf)
    missing = h[:, None] - below.sum(1, keepdim=True)
    return below | (level & (level.cumsum(1) <= missing))


def c_step(packed: Packed, state: State) -> State:
    """Keep the `h` points of each class that are nearest to its estimate, and estimate again."""
    return _updated(packed, state, smallest(squared_distances(packed, state), packed.h))


def concentrate(packed: Packed, state: State, max_steps: int) -> State:
    """Repeat the step until no support changes; classes that are done take no further part."""
    active = torch.arange(len(packed.h), device=packed.x.device)
    state = state.take(active)
    working, current = packed, state.take(active)
    for _ in range(max_steps):
        after = c_step(working, current)
        state.put(active, after)
        same = (after.support == current.support).all(1)
        settled = (current.logdet - after.logdet).abs() <= _CONVERGED * (1 + after.logdet.abs())
        going = ~same & ~(settled & (after.added == current.added))
        if not bool(going.any()):
            break
        if bool(going.all()):
            current = after
        else:
            active, working, current = active[going], working.rows(going), after.take(going)
    return state
