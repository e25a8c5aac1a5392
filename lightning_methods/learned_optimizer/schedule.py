"""How many inner steps one outer step unrolls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_methods.errors import InvalidArgument, check_choice


@dataclass(frozen=True)
class TruncationSchedule:
    """The length of an unroll, or of an inner training, by the outer step.

    Args:
        kind: `"constant"` (`start`), `"linear"` or `"exponential"` growth from `start` to `end` over `over_steps` outer
            steps, or `"log_uniform"`: drawn anew between the two. The paper's unrolls grow.
        start: inner steps at first.
        end: inner steps in the end; by default `start`.
        over_steps: outer steps until `end` is reached. Default 1000.

    Raises:
        InvalidArgument: if a length is not positive, or growth has no time.

    Example:
        >>> schedule = TruncationSchedule("exponential", 10, 160, over_steps=4)
        >>> [schedule.length(step) for step in range(6)]
        [10, 20, 40, 80, 160, 160]
    """

    kind: Literal["constant", "linear", "exponential", "log_uniform"] = "constant"
    start: int = 100
    end: int | None = None
    over_steps: int = 1000

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("constant", "linear", "exponential", "log_uniform"))
        if min(self.start, self.last) < 1 or self.over_steps < 1:
            raise InvalidArgument(
                f"start={self.start}, end={self.end}, over_steps={self.over_steps}: positive numbers are needed."
            )
        if self.kind == "log_uniform" and self.last < self.start:
            raise InvalidArgument(f"log_uniform draws from start to end; start={self.start} is above end={self.end}.")

    @property
    def last(self) -> int:
        """Return the length in the end."""
        return self.start if self.end is None else self.end

    def length(self, outer_step: int, generator: torch.Generator | None = None) -> int:
        """Return the number of inner steps at an outer step.

        Args:
            outer_step: counted from 0.
            generator: for `"log_uniform"`.
        """
        if self.kind == "constant":
            return self.start
        if self.kind == "log_uniform":
            share = float(torch.rand((), generator=generator, dtype=torch.float64))
        else:
            share = min(outer_step / self.over_steps, 1.0)
        if self.kind == "linear":
            return round(self.start + share * (self.last - self.start))
        return round(math.exp(math.log(self.start) + share * (math.log(self.last) - math.log(self.start))))
