"""A loss whose gradient is taken at once, so that the graph behind it is freed before the next one is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def early_loss(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the value of `loss` with its gradient towards `parameters`, of which no graph is kept.

    The backward pass only multiplies the gradient that was taken here, so accumulation, loss scaling and DDP see
    nothing unusual. There is no second derivative.

    Args:
        loss: computes a scalar that depends on nothing else that is trained.
        parameters: the leaves that it depends on; those it does not depend on get no gradient.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> value = early_loss(lambda: (weight**2).sum(), [weight])
        >>> (3 * value).backward()
        >>> value.item(), weight.grad
        (5.0, tensor([ 6., 12.]))
    """
    trained = [p for p in parameters if p.requires_grad]
    value = loss()
    if not trained or not value.requires_grad:
        return value
    # half precision loses small gradients on their way; a power of two in between changes nothing else
    scale = _HALF_PRECISION_SCALE if torch.is_autocast_enabled(value.device.type) else 1.0
    gradients = torch.autograd.grad(value * scale, trained, allow_unused=True)
    used = [(p, g / scale) for p, g in zip(trained, gradients, strict=True) if g is not None]
    return _Early.apply(value.detach(), [g for _, g in used], *[p for p, _ in used])


_HALF_PRECISION_SCALE = 2.0**10


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        return None, None, *[g * outer.to(g.dtype) for g in ctx.gradients]
