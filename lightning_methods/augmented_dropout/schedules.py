"""How a rate of dropout changes over a training: functions of the share of the training that is done."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from lightning_methods.errors import InvalidArgument, UnsupportedTraining, check_choice


class RateSchedule(ABC):
    """Abstract function from progress, 0 at the start of the training and 1 at its end, to a factor of the rate."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor, from 0 to 1."""


class ConstantRate(RateSchedule):
    """The same factor all along.

    Args:
        factor: from 0 to 1. Default 1.

    Example:
        >>> ConstantRate(0.5)(0.7)
        0.5
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = _share("factor", factor)

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return self.factor


class LinearRate(RateSchedule):
    """A straight line from `start` to `end`.

    Args:
        start: factor at the start. Default 0.
        end: factor at the end. Default 1.

    Example:
        >>> LinearRate(1.0, 0.0)(0.25)
        0.75
    """

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        self.start, self.end = _share("start", start), _share("end", end)

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return self.start + (self.end - self.start) * progress


class CosineRate(LinearRate):
    """Half a cosine from `start` to `end`: slow, fast, slow.

    Args:
        start: factor at the start. Default 0.
        end: factor at the end. Default 1.

    Example:
        >>> [round(CosineRate()(t), 3) for t in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.146, 0.5, 1.0]
    """

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return super().__call__((1 - math.cos(math.pi * progress)) / 2)


class CurriculumRate(RateSchedule):
    r"""Curriculum dropout (Morerio et al. 2017): from nothing to the full rate along :math:`1 - e^{-\gamma t}`.

    Args:
        gamma: how fast, for a training of length 1. Default 10.

    Raises:
        InvalidArgument: for a gamma that is not positive.

    Example:
        >>> round(CurriculumRate()(0.1), 4)
        0.6321
    """

    def __init__(self, gamma: float = 10.0) -> None:
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
            raise InvalidArgument(f"gamma={gamma!r}: a positive number is needed.")
        self.gamma = gamma

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return 1 - math.exp(-self.gamma * progress)


class EarlyRate(RateSchedule):
    """Early dropout (Liu et al. 2023): dropout in the first part of the training only, against underfitting.

    Args:
        cutoff: the share of the training after which nothing is dropped. Default 1/6, their 50 of 300 epochs.
        shape: whether the rate falls along a `"linear"` line to 0 (theirs) or stays `"constant"` until then.

    Raises:
        InvalidArgument: for a cutoff outside (0, 1] or an unknown shape.

    Example:
        >>> EarlyRate(0.5)(0.25), EarlyRate(0.5)(0.75), EarlyRate(0.5, "constant")(0.25)
        (0.5, 0.0, 1.0)
    """

    def __init__(self, cutoff: float = 1 / 6, shape: Literal["linear", "constant"] = "linear") -> None:
        check_choice("shape", shape, ("linear", "constant"))
        if _share("cutoff", cutoff) == 0:
            raise InvalidArgument("cutoff=0 leaves no dropout at all; a share of the training above 0 is needed.")
        self.cutoff, self.shape = cutoff, shape

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        if progress >= self.cutoff:
            return 0.0
        return 1.0 if self.shape == "constant" else 1 - progress / self.cutoff


class LateRate(RateSchedule):
    """Late dropout (Liu et al. 2023): nothing at first and the full rate afterwards, against overfitting.

    Args:
        cutoff: the share of the training after which features are dropped. Default 1/6.

    Raises:
        InvalidArgument: for a cutoff outside [0, 1).

    Example:
        >>> LateRate(0.5)(0.25), LateRate(0.5)(0.5)
        (0.0, 1.0)
    """

    def __init__(self, cutoff: float = 1 / 6) -> None:
        if _share("cutoff", cutoff) == 1:
            raise InvalidArgument("cutoff=1 leaves no dropout at all; a share of the training below 1 is needed.")
        self.cutoff = cutoff

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return 0.0 if progress < self.cutoff else 1.0


def progress_of(trainer: Any, batch_idx: int) -> float:
    """Return the share of the training that is done before a batch: of its epochs, or steps, whichever end first.

    It depends on the trainer's counters alone, so that a resumed training goes on where it was.

    Raises:
        UnsupportedTraining: if the trainer does not say when it ends.
    """
    done = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = batch_idx / batches if 0 < batches < math.inf else 0.0
        done.append((trainer.current_epoch + within) / trainer.max_epochs)
    if trainer.max_steps > 0:
        done.append(trainer.global_step / trainer.max_steps)
    if not done:
        raise UnsupportedTraining(
            "A schedule needs to know when the training ends, and neither max_epochs nor max_steps of the Trainer is "
            "set. Set one of them."
        )
    return min(1.0, max(done))


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidArgument(f"{name}={value!r}: a number from 0 to 1 is needed.")
    return float(value)
