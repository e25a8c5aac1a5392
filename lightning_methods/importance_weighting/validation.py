"""The weighted risk of a validation that runs as it always did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_methods.core.gather import all_sum
from lightning_methods.importance_weighting.interception import LossInterception, LossModule, intercept
from lightning_methods.importance_weighting.weights import BatchWeights


class ValidationRisk:
    """Catches the losses of validation steps between two hooks of the Trainer, to measure them or to weight them.

    Args:
        weights: what belongs to which sample.
        change: whether the losses are weighted; else they are returned as they are.
    """

    def __init__(self, weights: BatchWeights, *, change: bool) -> None:
        self.weights, self.change = weights, change
        self.functions = LossInterception(weights)
        self.modules: list[Any] = []
        self.entered = False

    def begin(self) -> None:
        """Start the sums of an epoch anew."""
        self.weights.risk = torch.zeros(2, dtype=torch.float64)

    def enter(self, batch: Any, modules: Sequence[LossModule], match: str) -> None:
        """Catch the losses of the step of this batch, and of these loss modules as a whole."""
        self.leave()
        self.weights.evaluating, self.weights.measuring, self.weights.quick = True, not self.change, None
        self.weights.begin(batch)
        self.modules = [intercept(m, self.weights, self.functions, match) for m in modules]
        self.functions.__enter__()
        self.entered = True

    def leave(self) -> None:
        """Let go of the step; harmless when called twice."""
        if not self.entered:
            return
        self.entered = False
        self.functions.__exit__(None, None, None)
        for hooked in self.modules:
            hooked.remove()
        self.modules = []
        self.weights.evaluating = self.weights.measuring = False
        self.weights.end()

    def value(self, device: Any) -> float | None:
        """Return the weighted mean of the losses of all ranks, `None` if there was none."""
        losses, weights = all_sum(self.weights.risk.to(device)).tolist()
        return losses / weights if weights > 0 else None
