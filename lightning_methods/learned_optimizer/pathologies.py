"""Two systems whose meta-gradients are known, on which estimators fail visibly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.problem import State


class Wave:
    r"""A loss with ripples, :math:`L(\theta) = \sin(f \theta) + (\theta - 1)^2`: one step, no state.

    Smoothed by noise of deviation sigma its derivative is
    :math:`f \cos(f\theta)\, e^{-(f\sigma)^2 / 2} + 2 (\theta - 1)`. The reparameterisation gradient is noisy where `f`
    is large, evolution strategies where it is small.

    Args:
        frequency: f.

    Example:
        >>> round(Wave(30.0).smoothed_gradient(0.3, 0.01), 6)
        -27.531147
    """

    def __init__(self, frequency: float) -> None:
        self.frequency = frequency

    def smoothed_gradient(self, theta: float, sigma: float) -> float:
        """Return the exact derivative of the smoothed loss."""
        f = torch.tensor(self.frequency, dtype=torch.float64)
        return float(f * torch.cos(f * theta) * torch.exp(-((f * sigma) ** 2) / 2) + 2 * (theta - 1))

    def begin(self, theta: Tensor, seeds: Sequence[int]) -> State:
        """Return no state."""
        return {}

    def unroll(
        self, theta: Tensor, state: State, t: int, steps: int, seeds: Sequence[int], *, differentiable: bool
    ) -> tuple[Tensor, State]:
        """Return the loss of each particle, the same at every step."""
        x = theta[:, 0]
        loss = torch.sin(self.frequency * x) + (x - 1) ** 2
        return loss.unsqueeze(1).expand(-1, steps), state


class InfluenceBalancing:
    r"""A linear system whose near effects of :math:`\theta` have the opposite sign of its far ones.

    :math:`s \leftarrow A s + \theta b` in 23 dimensions, :math:`A = I / 2` with 1/2 above the diagonal, `b` 10 times +1
    and 13 times -1, :math:`L_t = (s_{t,0} - 1)^2`. Cut short, its gradient points the wrong way.

    Example:
        >>> system = InfluenceBalancing()
        >>> theta = torch.full((2, 1), 0.5, dtype=torch.float64)
        >>> losses, _ = system.unroll(theta, system.begin(theta, [0]), 0, 100, [0], differentiable=False)
        >>> round(float(losses.mean()), 6)
        19.895687
    """

    size, positive = 23, 10

    def begin(self, theta: Tensor, seeds: Sequence[int]) -> State:
        """Return ones."""
        return {"s": theta.new_ones(2 * len(seeds), self.size)}

    def unroll(
        self, theta: Tensor, state: State, t: int, steps: int, seeds: Sequence[int], *, differentiable: bool
    ) -> tuple[Tensor, State]:
        """Return the losses after each of the steps."""
        eye = torch.eye(self.size, dtype=theta.dtype)
        transition = (0.5 * eye + 0.5 * eye.roll(1, 1).triu()).T
        push = torch.ones(self.size, dtype=theta.dtype)
        push[self.positive :] = -1
        s, losses = state["s"], []
        for _ in range(steps):
            s = s @ transition + theta * push
            losses.append((s[:, 0] - 1) ** 2)
        return torch.stack(losses, 1), {"s": s}
