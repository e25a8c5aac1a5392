"""Estimates of the meta-gradient from one window of an unroll, by antithetic pairs with common random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.functional import es_gradient
from lightning_methods.learned_optimizer.problem import Problem, State
from lightning_methods.learned_optimizer.seeding import generator_of

Estimator = Literal["merged", "reparam", "es", "pes", "nres"]
ESTIMATORS: tuple[Estimator, ...] = ("merged", "reparam", "es", "pes", "nres")


@dataclass
class Episode:
    """An inner training on its way.

    Attributes:
        t: steps taken.
        horizon: steps after which it ends.
        state: of the particles.
        noise: of the window before (NRES: of the episode), `(S, D)`.
        total: sum of the noise of all windows, for PES.
    """

    t: int
    horizon: int
    state: State
    noise: Tensor | None = None
    total: Tensor | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether the horizon is reached."""
        return self.t >= self.horizon


class Estimates(NamedTuple):
    """What a window gives: mean losses of the particles `(2 S,)`, estimates of the pairs `(S, D)`, share diverged."""

    losses: Tensor
    reparam: Tensor | None
    es: Tensor | None
    diverged: Tensor


def draw_noise(seeds: Sequence[int], like: Tensor, sigma: float) -> Tensor:
    """Return normal noise of deviation `sigma`, one row a seed.

    Example:
        >>> draw_noise([1, 2], torch.zeros(5), 0.01).shape
        torch.Size([2, 5])
    """
    rows = [torch.randn(like.shape[-1], generator=generator_of(s, "noise"), dtype=torch.float64) for s in seeds]
    return sigma * torch.stack(rows).to(like)


def estimate(
    problem: Problem,
    theta: Tensor,
    episode: Episode,
    steps: int,
    seeds: Sequence[int],
    *,
    estimator: Estimator = "merged",
    sigma: float = 0.01,
    loss_clip: float = float("inf"),
    log_floor: float | None = None,
) -> Estimates:
    r"""Run one window of an episode and estimate the gradient of its mean loss at :math:`\theta`.

    `"reparam"` backpropagates through the window at :math:`\theta \pm \epsilon`; `"es"` compares the losses of both;
    `"merged"` gives both; `"pes"` compares with the noise of all windows of the episode added up, `"nres"` keeps one
    noise for the episode. The first three hold what came before the window for a constant.

    Shapes:
        theta `(D,)`; one seed a pair.

    Args:
        problem: what is unrolled.
        theta: weights.
        episode: where it stands; moved on.
        steps: of the window, cut at the horizon.
        seeds: of this window's noise and batches, one a pair.
        estimator: which.
        sigma: deviation of the noise. The paper has 0.01.
        loss_clip: larger losses, and those that are no number, count as this much.
        log_floor: take the logarithm of the mean loss, with this much added, instead of the mean loss.

    Example:
        >>> from lightning_methods.learned_optimizer.pathologies import Wave
        >>> wave, theta = Wave(3.0), torch.tensor([0.3], dtype=torch.float64)
        >>> episode = Episode(0, 1, wave.begin(theta, range(1000)))
        >>> given = estimate(wave, theta, episode, 1, range(1000))
        >>> round(float(given.reparam.mean()), 1)
        0.5
    """
    steps = min(steps, episode.horizon - episode.t)
    if estimator != "nres" or episode.noise is None:
        episode.noise = draw_noise(seeds, theta, sigma)
    noise = episode.noise
    if estimator == "pes":
        episode.total = noise if episode.total is None else episode.total + noise
    differentiable = estimator in ("merged", "reparam")
    both = torch.cat([theta + noise, theta - noise]).detach().requires_grad_(differentiable)
    losses, state = problem.unroll(both, episode.state, episode.t, steps, seeds, differentiable=differentiable)
    diverged = (~(losses <= loss_clip)).any(1).double().mean().detach()
    # a loss that is no number must not hide behind the clamp, whose gradient at NaN is NaN
    means = torch.where(losses <= loss_clip, losses, loss_clip).mean(1)
    outer = means if log_floor is None else (means + log_floor).log()
    episode.state, episode.t = {k: v.detach() for k, v in state.items()}, episode.t + steps
    plus, minus = outer.detach().chunk(2)
    reparam = es = None
    if differentiable:
        gradient = torch.autograd.grad(outer.sum(), both)[0] if outer.requires_grad else torch.zeros_like(both)
        first, second = gradient.chunk(2)
        reparam = (first + second) / 2
    if estimator != "reparam":
        es = es_gradient(plus, minus, noise if episode.total is None else episode.total, sigma)
    return Estimates(means.detach(), reparam, es, diverged)
