"""When a learned optimizer is not to be trusted: past its horizon, in wide layers, while the loss rises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning_methods.errors import InvalidArgument

_FIRST = 10
_FAST, _SLOW = 0.9, 0.99
_LOST = 0.25
_PATIENCE = 20
_LEAST = 1 / 16


def inputs_of(shape: Sequence[int]) -> int:
    """Return how many inputs a unit has of which this is the weight; a bias, or a scale, has one.

    It is the product of all dimensions but the first, also of embeddings and positions, which a shape does not tell
    from weights.

    Example:
        >>> inputs_of((16, 8, 3, 3)), inputs_of((16,))
        (72, 1)
    """
    return math.prod(shape[1:]) if len(shape) > 1 else 1


@dataclass
class Guard:
    """Falls back towards Adam's step, past the horizon and in wide layers little by little, and as the loss says.

    The running loss (decay 0.9) is compared with the lowest slow one (decay 0.99). Where a quarter of what was gained
    since the start is lost again, trust is halved, at most every 20 steps; where the loss is above that of the start,
    or no number, it is gone. Trust never comes back: what has diverged once diverges again.

    Args:
        lr: of the Adam step that is fallen back to.
        step_limit: largest step of an element, times the learning rate.
        trust: share of the learned step.

    Example:
        >>> guard = Guard()
        >>> for loss in [2.0] * 10 + [1.0] * 200 + [1.6] * 10:
        ...     guard.observe(loss)
        >>> guard.trust
        0.5
    """

    lr: float = 1e-3
    step_limit: float = 0.1
    trust: float = 1.0
    seen: int = 0
    start: float = 0.0
    fast: float = 0.0
    slow: float = 0.0
    noise: float = 0.0
    low: float = math.inf
    rest: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and self.step_limit > 0):
            raise InvalidArgument(f"lr={self.lr}, step_limit={self.step_limit}: positive numbers are needed.")

    def observe(self, loss: float) -> None:
        """Take notice of the loss of a step.

        Args:
            loss: before the step.
        """
        if not math.isfinite(loss):
            self.trust = 0.0 if self.seen >= _FIRST else self.trust
            return
        if self.seen < _FIRST:
            self.start += (loss - self.start) / (self.seen + 1)
            self.noise += (abs(loss - self.start) - self.noise) / (self.seen + 1)
            self.fast = self.slow = self.start
        else:
            self.fast += (1 - _FAST) * (loss - self.fast)
            self.slow += (1 - _SLOW) * (loss - self.slow)
            self.low = min(self.low, self.slow)
            self._judge()
            self.noise += (1 - _SLOW) * (abs(loss - self.fast) - self.noise)
        self.seen += 1

    def _judge(self) -> None:
        self.rest = max(0, self.rest - 1)
        spread = 3 * self.noise
        if self.trust == 0 or self.rest:
            return
        if self.fast > self.start + max(spread, _LOST * abs(self.start)):
            self.trust = 0.0
        elif self.fast > self.low + max(_LOST * (self.start - self.low), spread):
            self.trust = self.trust / 2 if self.trust / 2 >= _LEAST else 0.0
            self.rest = _PATIENCE

    def share(self, step: int, clock: int | None, inputs: int = 1, width: int | None = None) -> float:
        """Return the share of the learned step in a tensor; trust is a factor of it.

        Past the clock it falls as one over time, and past the width as one over the inputs of a unit, as the learning
        rate of a wide layer has to (Yang et al. 2021).

        Args:
            step: updates before this one.
            clock: where time stands still.
            inputs: of a unit of the layer, see `inputs_of`.
            width: the most that there were in the meta-training.

        Example:
            >>> Guard().share(100, 200), Guard().share(800, 200), Guard().share(800, 200, 256, 128)
            (1.0, 0.25, 0.125)
        """
        late = 1.0 if not clock or step <= clock else clock / step
        wide = 1.0 if not width or inputs <= width else width / inputs
        return self.trust * late * wide

    def state_dict(self) -> dict[str, float]:
        """Return what it has seen, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what was seen."""
        for name, value in state.items():
            setattr(self, name, value)
