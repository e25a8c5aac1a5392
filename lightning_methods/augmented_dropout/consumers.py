"""Layers that read dropped features, with the weight gradient that the paper defines.

The weight gradient of the layer after a dropout is part of the definition of forward and backward dropout. A dropout
alone cannot give it: the layer has saved the features that the forward pass showed it. Here the layer gets both views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.augmented_dropout.functional import (
    Coupling,
    Rate,
    Scale,
    Switch,
    WeightGrad,
    check_settings,
    dual_views,
    first_order,
)
from lightning_methods.errors import ShapeMismatch, check_choice


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p_forward: Rate = 0.5,
    p_backward: Rate | None = None,
    *,
    weight_grad: WeightGrad = "backward",
    training: bool = True,
    coupling: Coupling = "nested",
    scale: Scale = "inverted",
    generator: torch.Generator | None = None,
    mask_shape: Sequence[int] | None = None,
    mask_forward: Tensor | None = None,
    mask_backward: Tensor | None = None,
) -> Tensor:
    r"""Drop the features and apply a linear layer, with the weight gradient of the paper (slide equations 1 to 4).

    .. math:: z = W (h \odot m_f) + b, \qquad \frac{\partial J}{\partial W} := \delta (h \odot m_b)^\top, \qquad
        \frac{\partial J}{\partial h} := (W^\top \delta) \odot m_b

    The error :math:`\delta = \partial J / \partial z` is that of the dropped forward pass.

    Shapes:
        x `(..., in)`, weight `(out, in)`, bias `(out,)`; returns `(..., out)`.

    Args:
        x: features `h`.
        weight: `W`.
        bias: `b`.
        p_forward: as in `dual_dropout`.
        p_backward: as in `dual_dropout`.
        weight_grad: whether the weights see the features of the `"backward"` mask (the paper) or those of the
            `"forward"` pass, as with a dropout that knows nothing of the layer.
        training, coupling, scale, generator, mask_shape, mask_forward, mask_backward: as in `dual_dropout`.

    Raises:
        InvalidArgument: for a rate outside [0, 1] or an unknown mode.
        ShapeMismatch: if a mask does not broadcast to `x`.
        UnsupportedTraining: where the backward pass itself is differentiated.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, 2, requires_grad=True)
        >>> keep, all_kept = torch.tensor([True, False]), torch.tensor([True, True])
        >>> y = dual_linear(torch.tensor([3.0, 5.0]), weight, None, 0.5, 0.0, mask_forward=keep, mask_backward=all_kept)
        >>> y.backward()
        >>> y.tolist(), weight.grad.tolist()
        ([6.0], [[3.0, 5.0]])
    """
    check_settings(p_forward, p_backward, coupling, scale)
    check_choice("weight_grad", weight_grad, ("backward", "forward"))
    views = dual_views(
        x,
        p_forward,
        p_backward,
        training=training,
        coupling=coupling,
        scale=scale,
        generator=generator,
        mask_shape=mask_shape,
        masks=(mask_forward, mask_backward),
    )
    if weight_grad == "forward" or views.tied:
        return F.linear(views.forward, weight, bias)
    return consume_linear(views.forward, views.backward(), weight, bias)


def dual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p_forward: Rate = 0.5,
    p_backward: Rate | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    weight_grad: WeightGrad = "backward",
    training: bool = True,
    coupling: Coupling = "nested",
    scale: Scale = "inverted",
    generator: torch.Generator | None = None,
    mask_shape: Sequence[int] | None = None,
    mask_forward: Tensor | None = None,
    mask_backward: Tensor | None = None,
) -> Tensor:
    r"""Drop the features and convolve them in 1, 2 or 3 dimensions, with the weight gradient of the paper.

    As `dual_linear` with a convolution for :math:`W`; the kernel's shape decides over the number of dimensions.

    Shapes:
        x `(N, C, ...)` or `(C, ...)`, weight `(out, C / groups, ...)`; returns what `F.conv1d`, 2d or 3d return.

    Args:
        x: features.
        weight: kernel.
        bias: of the output channels.
        p_forward, p_backward: as in `dual_dropout`.
        stride, padding, dilation, groups: as in `F.conv2d`, `"same"` and `"valid"` included.
        weight_grad: as in `dual_linear`.
        training, coupling, scale, generator, mask_shape, mask_forward, mask_backward: as in `dual_dropout`.

    Raises:
        InvalidArgument: for a rate outside [0, 1] or an unknown mode.
        ShapeMismatch: if a mask does not broadcast to `x`, or the kernel is not of 1, 2 or 3 dimensions.
        UnsupportedTraining: where the backward pass itself is differentiated.

    Example:
        >>> import torch
        >>> dual_conv(torch.ones(1, 2, 5), torch.ones(3, 2, 3), None, 0.5, 0.2, padding="same").shape
        torch.Size([1, 3, 5])
    """
    check_settings(p_forward, p_backward, coupling, scale)
    check_choice("weight_grad", weight_grad, ("backward", "forward"))
    if weight.ndim not in (3, 4, 5):
        raise ShapeMismatch(
            f"The kernel has the shape {tuple(weight.shape)}; (out, in, ...) with 1 to 3 more is needed."
        )
    views = dual_views(
        x,
        p_forward,
        p_backward,
        training=training,
        coupling=coupling,
        scale=scale,
        generator=generator,
        mask_shape=mask_shape,
        masks=(mask_forward, mask_backward),
    )
    x_backward = None if weight_grad == "forward" or views.tied else views.backward()
    return consume_conv(views.forward, x_backward, weight, bias, stride, padding, dilation, groups)


# -- the layer alone: what the forward pass shows it, and what its weight gradient is taken from -----------------------


def consume_linear(
    x: Tensor, x_backward: Tensor, weight: Tensor, bias: Tensor | None, switch: Switch | None = None
) -> Tensor:
    """Return `F.linear(x, weight, bias)`, whose weight gradient is that of `x_backward`."""
    return _in_one_precision(_Linear, x, x_backward, weight, bias, switch)


def consume_conv(
    x: Tensor,
    x_backward: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    switch: Switch | None = None,
) -> Tensor:
    """Return the convolution of `x`, whose weight gradient is that of `x_backward` (of `x` if `None`)."""
    n = weight.ndim - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    if x_backward is None:
        return conv(x, weight, bias, stride, padding, dilation, groups)
    stride, dilation = _tuple(stride, n), _tuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # an even kernel: one more at the end, as torch does
            ends = [side for t in reversed(total) for side in (0, t % 2)]
            x, x_backward = F.pad(x, ends), F.pad(x_backward, ends)
    padding = _tuple(0 if padding == "valid" else padding, n)  # type: ignore[arg-type]
    single = x.ndim == n + 1
    if single:
        x, x_backward = x.unsqueeze(0), x_backward.unsqueeze(0)
    y = _in_one_precision(_Conv, x, x_backward, weight, bias, switch, conv, stride, padding, dilation, groups)
    return y.squeeze(0) if single else y


def consume_matmul(x: Tensor, x_backward: Tensor, values: Tensor, switch: Switch | None = None) -> Tensor:
    """Return `x @ values`, where the gradient of `values` is that of `x_backward @ values`."""
    return _in_one_precision(_Matmul, x, x_backward, values, None, switch)


def _in_one_precision(
    function: Any, x: Tensor, x_backward: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """Apply a function with autocast off, in the dtype that autocast would have taken."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return function.apply(x, x_backward, weight, bias, *rest)
    dtype = torch.get_autocast_dtype(device)
    cast = (t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in (x, x_backward, weight, bias))
    with torch.autocast(device, enabled=False):
        return function.apply(*cast, *rest)


def _tuple(value: int | Sequence[int], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else [int(v) for v in value] * (n if len(value) == 1 else 1)


def _seen(ctx: Any) -> tuple[Tensor, Tensor]:
    """Return the features that the weight gradient is taken from, and the weight."""
    x_backward, weight, x = ctx.saved_tensors
    return (x if ctx.switch is not None and ctx.switch.on else x_backward), weight


def _guarded(gradients: Sequence[Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    """Return the gradients in the place of `count` inputs, with an error for those who would differentiate them."""
    present = iter(first_order(*(g for g in gradients if g is not None)))
    placed = [None if g is None else next(present) for g in gradients]
    return (*placed, *[None] * (count - len(placed)))


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, x_backward: Tensor, weight: Tensor, bias: Tensor | None, switch: Switch | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, x_backward, weight, _, ctx.switch = inputs
        ctx.save_for_backward(x_backward, weight, None if ctx.switch is None else x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight = _seen(ctx)
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if needs_x else None
        grad_weight = rows.mT @ seen.reshape(-1, seen.shape[-1]) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        return _guarded([grad_x, None, grad_weight, grad_bias], 5)


class _Conv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        x_backward: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        switch: Switch | None,
        conv: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        return conv(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, x_backward, weight, _, ctx.switch, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
        ctx.save_for_backward(x_backward, weight, None if ctx.switch is None else x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight = _seen(ctx)
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        # the gradient of the input depends on the weight alone, so that one call gives all three
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            seen,
            weight,
            [weight.shape[0]],
            ctx.stride,
            ctx.padding,
            ctx.dilation,
            False,
            [0] * len(ctx.stride),
            ctx.groups,
            [needs_x, needs_weight, needs_bias],
        )
        return _guarded([grad_x, None, grad_weight, grad_bias], 10)


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, x_backward: Tensor, values: Tensor, bias: None, switch: Switch | None) -> Tensor:
        return x @ values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, x_backward, values, _, ctx.switch = inputs
        ctx.save_for_backward(x_backward, values, None if ctx.switch is None else x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, values = _seen(ctx)
        grad_x = (grad @ values.mT).sum_to_size(seen.shape) if ctx.needs_input_grad[0] else None
        grad_values = (seen.mT @ grad).sum_to_size(values.shape) if ctx.needs_input_grad[2] else None
        return _guarded([grad_x, None, grad_values], 5)
