"""The search for the minimum covariance determinant of all classes, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_methods.rog.csteps import Packed, State, concentrate, estimate, smallest, squared_distances
from lightning_methods.rog.functional import consistency_factor, inlier_bound
from lightning_methods.rog.starts import DETERMINISTIC, lower_median, median_start, random_start

Selection = Literal["robust", "determinant"]

_QUANTILE = 0.975  # what is further away is no inlier
_FIRST_STEPS = 2  # of every random start, before the best is chosen (Rousseeuw and Van Driessen 1999)
_SUBSAMPLE, _WORTH = 1500, 1.5  # points that random starts are tried on, and how many more make that worth while
_SMALL = 5  # a class of fewer points than this times the dimension is small
_COPIES = 5  # of the packed points that a step holds at once, at most
_CACHE = 32 << 20  # bytes worked on at once by a CPU: more classes than its caches hold together gain nothing
_SAMPLING_ERRORS = 3.0


@dataclass(frozen=True)
class Settings:
    """Arguments of `fast_mcd` that have been checked."""

    support_fraction: float | None
    starts: tuple[str, ...]
    selection: Selection
    max_steps: int
    reweight: bool
    consistency: bool
    shrinkage: float | str
    ridge: float


class _Chunk(NamedTuple):
    """Some classes, where their points stand in the input, and what was subtracted from these."""

    classes: Tensor
    places: Tensor
    packed: Packed
    origin: Tensor


class Search:
    """The search over all classes; `run` returns the fields of `MCDResult`."""

    def __init__(
        self, x: Tensor, labels: Tensor, count: int, settings: Settings, dtype: torch.dtype, max_bytes: int
    ) -> None:
        self.x, self.settings, self.dtype, self.max_bytes = x, settings, dtype, max_bytes
        self.dim = x.shape[1]
        self.sizes = torch.bincount(labels[labels >= 0], minlength=count)
        # the points of each class one after the other, behind those without a class
        self.order = labels.argsort(stable=True)[len(labels) - int(self.sizes.sum()) :]
        self.offsets = self.sizes.cumsum(0) - self.sizes
        self.target = torch.eye(self.dim, dtype=dtype, device=x.device)

    def run(self, generator: torch.Generator) -> dict[str, Any]:
        """Search every chunk, with random starts by `generator`."""
        n, c, d = len(self.x), len(self.sizes), self.dim
        new: dict[str, Any] = {"dtype": self.dtype, "device": self.x.device}
        found = {
            "location": torch.zeros(c, d, **new),
            "covariance": torch.zeros(c, d, d, **new),
            "support": torch.zeros(n, dtype=torch.bool, device=self.x.device),
            "logdet": torch.full((c,), -torch.inf, **new),
            "n_steps": torch.zeros_like(self.sizes),
            "h": self.kept(),
            "inliers": torch.zeros(n, dtype=torch.bool, device=self.x.device),
            "distances": torch.full((n,), torch.nan, **new),
            "ridge": torch.zeros(c, **new),
        }
        # a number for each point, drawn before the chunks, which then change nothing
        wanted = sum(int(s.partition(":")[2] or 1) for s in self.settings.starts if s.startswith("random"))
        priorities = [torch.rand(n, generator=generator).to(self.x.device) for _ in range(wanted)]
        if bool((self._shrinkages() > 0).any()):
            self.target = self._pooled()
        for chunk in self._chunks():
            packed, classes = chunk.packed, chunk.classes
            best = self._best(packed, self._candidates(packed, [p[chunk.places] for p in priorities]))
            location, covariance, inside, squared = self._finished(packed, best)
            found["location"][classes] = location + chunk.origin
            for name, value in zip(
                ("covariance", "logdet", "n_steps", "ridge"),
                (covariance, best.logdet, best.steps, best.added),
                strict=True,
            ):
                found[name][classes] = value
            own = chunk.places[packed.real]
            for name, rows in (("support", best.support), ("inliers", inside), ("distances", squared)):
                found[name][own] = rows[packed.real]
        return found

    def kept(self) -> Tensor:
        """Return `h` of each class."""
        n, share = self.sizes, self.settings.support_fraction
        if share is None:
            return torch.minimum((n + self.dim + 1) // 2, n)
        return torch.maximum((share * n.double() + 1e-9).floor().long(), n.clamp(max=1))

    def _shrinkages(self) -> Tensor:
        share = self.settings.shrinkage
        if share != "auto":
            return torch.full_like(self.sizes, float(share), dtype=self.dtype)
        if len(self.sizes) < 2:
            return torch.zeros_like(self.sizes, dtype=self.dtype)
        ratio = (self.dim / self.sizes.clamp(min=1)).clamp(max=1)
        return torch.where(self.sizes < _SMALL * self.dim, ratio, 0.0).to(self.dtype)

    def _pooled(self) -> Tensor:
        """Return the scatter of the innermost half of each class about its own centre, over all classes."""
        total, weight = torch.zeros_like(self.target), 0
        for chunk in self._chunks():
            support = median_start(chunk.packed)
            center = (chunk.packed.x * support[:, :, None]).sum(1) / support.sum(1)[:, None]
            inner = ((chunk.packed.x - center[:, None, :]) * support[:, :, None]).flatten(0, 1)
            total += inner.T @ inner
            weight += int(support.sum())
        pooled = total / max(weight, 1)
        return pooled if len(self.sizes) > 1 else pooled.diagonal().diag()

    def _chunks(self) -> Iterator[_Chunk]:
        """Yield classes of similar size together, as many as the memory allows."""
        h, rho = self.kept(), self._shrinkages()
        bytes_a_point = _COPIES * self.dim * torch.finfo(self.dtype).bits // 8
        most = min(self.max_bytes, _CACHE) if self.x.device.type == "cpu" else self.max_bytes
        waiting = [c for c in self.sizes.argsort(descending=True, stable=True).tolist() if self.sizes[c] > 0]
        while waiting:
            longest = int(self.sizes[waiting[0]])
            fitting = waiting[: max(most // (longest * bytes_a_point), 1)]
            # a class that would be filled up to more than twice its size waits
            chosen = [c for c in fitting if 2 * int(self.sizes[c]) >= longest]
            waiting = waiting[len(chosen) :]
            classes = torch.tensor(chosen, device=self.x.device)
            column = torch.arange(longest, device=self.x.device)
            real = column < self.sizes[classes][:, None]
            places = self.order[torch.where(real, self.offsets[classes][:, None] + column, 0)]
            points = self.x[places].to(self.dtype)
            origin = lower_median(points, real)[:, 0]
            points.sub_(origin[:, None, :]).masked_fill_(~real[:, :, None], 0.0)
            packed = Packed(points, real, h[classes], self.target, rho[classes], self.settings.ridge)
            yield _Chunk(classes, places, packed, origin)

    def _candidates(self, packed: Packed, priorities: list[Tensor]) -> list[State]:
        """Return where each deterministic start and the best of the random ones lead."""
        steps = self.settings.max_steps
        starts = [start for start in self.settings.starts if start in DETERMINISTIC]
        found = [concentrate(packed, estimate(packed, DETERMINISTIC[start](packed)), steps) for start in starts]
        if priorities:
            found.append(self._from_random(packed, priorities))
        return found

    def _from_random(self, packed: Packed, priorities: list[Tensor]) -> State:
        """Return where the best of the random starts leads, searched among part of the points where there are many."""
        most, steps = max(_SUBSAMPLE, _SMALL * self.dim), self.settings.max_steps
        first = min(_FIRST_STEPS, steps)
        part, whole = packed, packed.x.shape[1] <= _WORTH * most
        if not whole:
            part, places = packed.thinned(priorities[0], most)
            priorities = [p.gather(1, places) for p in priorities]
        tried = [concentrate(part, estimate(part, random_start(part, p)), first) for p in priorities]
        best = concentrate(part, _lowest(tried, [state.logdet for state in tried]), steps - first)
        if whole:
            return best
        everywhere = smallest(squared_distances(packed, best), packed.h)
        return concentrate(
            packed, estimate(packed, everywhere, best.added, best.steps), max(steps - int(best.steps.max()), 1)
        )

    def _best(self, packed: Packed, candidates: list[State]) -> State:
        """Return the candidate of the lowest determinant; with `robust`, among those whose inliers spread least."""
        if len(candidates) == 1:
            return candidates[0]
        scores = torch.stack([state.logdet for state in candidates])
        if self.settings.selection == "robust":
            whole = torch.stack([estimate(packed, self._inliers(packed, s)[0], s.added).logdet for s in candidates])
            # the log-determinant of d features from h normal points has a variance of about 2 d / h
            error = (2 * self.dim / packed.h.to(scores.dtype)).sqrt()
            scores = scores.masked_fill(whole > whole.amin(0) + _SAMPLING_ERRORS * error, torch.inf)
        return _lowest(candidates, list(scores))

    def _inliers(self, packed: Packed, state: State) -> tuple[Tensor, Tensor]:
        """Return the support with every point that is as near as 97.5% of a normal distribution, and the distances."""
        squared = squared_distances(packed, state)
        factor = torch.as_tensor(self._factors(packed), dtype=squared.dtype, device=squared.device)
        near = squared <= inlier_bound(_QUANTILE, self.dim) * factor[:, None]
        # a class that was not trimmed has no outliers to look for
        return state.support | (near & (packed.h < packed.real.sum(1))[:, None]), squared

    def _factors(self, packed: Packed) -> list[float]:
        return list(_factors_of(tuple((packed.h / packed.real.sum(1)).tolist()), self.dim))

    def _finished(self, packed: Packed, best: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return location, covariance, inliers and squared distances of the chosen states."""
        final = estimate(packed, best.support, best.added)  # free of the rounding of many updates
        inside, squared = self._inliers(packed, final)
        factor = torch.as_tensor(self._factors(packed), dtype=self.dtype, device=self.x.device)
        if self.settings.reweight:
            trimmed = packed.h < packed.real.sum(1)
            final = estimate(packed, inside, best.added)
            factor = torch.where(trimmed, torch.tensor(consistency_factor(_QUANTILE, self.dim)), 1.0).to(factor)
            squared = squared_distances(packed, final)
        if not self.settings.consistency:
            factor = torch.ones_like(factor)
        return final.location, final.scatter * factor[:, None, None], inside, squared / factor[:, None]


@lru_cache(maxsize=64)
def _factors_of(shares: tuple[float, ...], dim: int) -> list[float]:
    factors = consistency_factor(shares, dim)
    assert isinstance(factors, list)
    return factors


def _lowest(candidates: list[State], scores: list[Tensor]) -> State:
    """Return for each class the state with the lowest score, of equal ones the first."""
    winner = torch.stack(scores).argmin(0)
    best = candidates[0].take(torch.arange(len(winner), device=winner.device))
    for i, candidate in enumerate(candidates[1:], start=1):
        chosen = torch.where(winner == i)[0]
        best.put(chosen, candidate.take(chosen))
    return best
