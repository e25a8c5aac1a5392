"""The definition written down a second time: NumPy for a linear layer, two passes of any layer for the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

X = np.array([[1, 2, 3], [-1, 0.5, 4]])
W = np.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])
B = np.array([0.01, -0.02])
KEEP_FORWARD = np.array([[1, 0, 1], [1, 1, 0]])
KEEP_BACKWARD = np.array([[1, 1, 1], [1, 1, 0]])
ONES = np.ones((2, 3))


def linear(forward: np.ndarray, backward: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return output and gradients of half the squared output, from scaled masks of both passes and of the weights."""
    weights = backward if weights is None else weights
    y = (X * forward) @ W.T + B
    return {"y": y, "x": (y @ W) * backward, "weight": y.T @ (X * weights), "bias": y.sum(0)}


class _UseValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_graph, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def two_passes(layer: Callable[[Tensor], Tensor], x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """Return the value of `layer(x * forward)` with the gradients of `layer(x * backward)`."""
    with torch.no_grad():
        value = layer(x * forward)
    return _UseValue.apply(layer(x * backward), value)


def scaled_masks(like: Tensor, p_forward: float, p_backward: float) -> tuple[Tensor, Tensor]:
    """Draw nested masks as the code under test does, scaled."""
    u = torch.rand_like(like, dtype=torch.float32)
    return tuple((u >= p).to(like.dtype) * (1.0 / (1.0 - p)) for p in (p_forward, p_backward))
