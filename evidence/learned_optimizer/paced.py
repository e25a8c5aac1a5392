"""The learned update of many trainings at once, with the guard's time, step size and limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.guard import Guard
from lightning_methods.learned_optimizer.unrolled import State, UnrolledOptimizer
from lightning_methods.learned_optimizer.weights import Weights

POWER = 1.0


class Pace(NamedTuple):
    """Where time stands still, the power of time with which steps fall from there on, and the largest step."""

    clock: int | None = None
    power: float = 0.0
    limit: float = Guard().step_limit

    @classmethod
    def of(cls, weights: Weights) -> Pace:
        """Return what the guard does with these weights."""
        return cls(weights.clock, POWER)


FREE = Pace(limit=math.inf)


class Paced(UnrolledOptimizer):
    """What `LearnedOptimizer` does, but for the Adam steps that the guard falls back to when the loss rises."""

    pace = FREE

    def step(
        self, theta: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, t: int
    ) -> tuple[list[Tensor], State]:
        """Return the parameters and the state after one update."""
        clock, power, limit = self.pace
        past = clock is not None and t > clock
        time, size = (clock, (clock / t) ** power) if clock is not None and past else (t, 1.0)
        moved, state = super().step(theta, params, grads, state, time)
        steps = torch._foreach_sub(moved, list(params))
        torch._foreach_mul_(steps, size)
        torch._foreach_clamp_max_(steps, limit)
        torch._foreach_clamp_min_(steps, -limit)
        return list(torch._foreach_add(list(params), steps)), state
