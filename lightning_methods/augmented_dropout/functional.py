"""Dropout with one noise in the forward and another in the backward pass (Gao, Pei and Huang, ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch, UnsupportedTraining, check_choice

#: a probability of dropping: a number, or a 0-d tensor that may change without a new compilation
Rate = float | Tensor
Coupling = Literal["nested", "independent", "complementary"]
Scale = Literal["inverted", "none", "classic", "forward_only"]
WeightGrad = Literal["backward", "forward"]

COUPLINGS = ("nested", "independent", "complementary")
SCALES = ("inverted", "none", "classic", "forward_only")

# what a unit of a self-normalising network is dropped to: -scale * alpha of SELU (Klambauer et al. 2017)
_SELU_FLOOR = -1.7580993408473766
_LARGEST_SCALE = 2.0**24  # one over the resolution of the uniform numbers


def dual_dropout(
    x: Tensor,
    p_forward: Rate = 0.5,
    p_backward: Rate | None = None,
    *,
    training: bool = True,
    coupling: Coupling = "nested",
    scale: Scale = "inverted",
    generator: torch.Generator | None = None,
    mask_shape: Sequence[int] | None = None,
    mask_forward: Tensor | None = None,
    mask_backward: Tensor | None = None,
) -> Tensor:
    r"""Drop features with one mask in the forward pass and their errors with another one in the backward pass.

    .. math:: y = x \odot m_f, \qquad \frac{\partial J}{\partial x} := \frac{\partial J}{\partial y} \odot m_b,
        \qquad m = r / (1 - p), \quad r \sim \mathrm{Bernoulli}(1 - p)

    `p_backward=0` is forward dropout, `p_forward=0` backward dropout, and equal rates with nested masks are standard
    dropout: then `torch.nn.functional.dropout` itself is called. This form changes the errors only. The definition also
    gives the layer that reads `y` a weight gradient from `x * m_b`, which no function of `x` alone can do: see
    `dual_linear`, `dual_conv` and the callback `AugmentedDropout`.

    Shapes:
        x of any shape; returns the same shape. Masks `mask_shape`, or the given ones, broadcast to it.

    Args:
        x: features, of a floating dtype.
        p_forward: probability of dropping a feature in the forward pass. A 0-d tensor is read at every call, also by
            compiled code, and is not checked.
        p_backward: probability of dropping its error in the backward pass; that of the forward pass by default.
        training: whether anything is dropped; otherwise `x` itself is returned (times `1 - p_forward` if classic).
        coupling: `"nested"` takes both masks from one uniform number, so that the larger rate drops all that the
            smaller one drops; `"independent"` draws twice; `"complementary"` turns the number round for the backward
            mask, so that the two drop different units as far as they can.
        scale: `"inverted"` divides what is kept by `1 - p` in each pass; `"none"` not; `"classic"` not either, and
            evaluation multiplies by `1 - p_forward`; `"forward_only"` divides in the forward pass alone.
        generator: source of the random numbers, on the device of `x`.
        mask_shape: shape of the masks, to drop whole channels or samples.
        mask_forward: what to keep in the forward pass, instead of drawing; the rates then only scale.
        mask_backward: the same of the backward pass; `mask_forward` by default.

    Raises:
        InvalidArgument: for a rate outside [0, 1], an unknown mode, or a mask or `x` of another dtype.
        ShapeMismatch: if a mask does not broadcast to `x`.
        UnsupportedTraining: where the backward pass itself is differentiated.

    Example:
        >>> import torch
        >>> x = torch.ones(4, requires_grad=True)
        >>> keep = torch.tensor([True, True, False, False])
        >>> y = dual_dropout(x, 0.5, 0.0, mask_forward=keep, mask_backward=torch.ones(4, dtype=torch.bool))
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])

    Deviations from the paper: its equations show no scale; `scale="none"` is literally them.
    """
    check_settings(p_forward, p_backward, coupling, scale)
    plain = all(g is None for g in (generator, mask_shape, mask_forward, mask_backward))
    if training and plain and same_rate(p_forward, p_backward) and (coupling, scale) == ("nested", "inverted"):
        return F.dropout(x, float(p_forward), training=True)
    return dual_views(
        x,
        p_forward,
        p_backward,
        training=training,
        coupling=coupling,
        scale=scale,
        generator=generator,
        mask_shape=mask_shape,
        masks=(mask_forward, mask_backward),
    ).forward


def dual_alpha_dropout(
    x: Tensor,
    p_forward: Rate = 0.5,
    p_backward: Rate | None = None,
    *,
    training: bool = True,
    coupling: Coupling = "nested",
    scale: Scale = "inverted",
    generator: torch.Generator | None = None,
    mask_shape: Sequence[int] | None = None,
    mask_forward: Tensor | None = None,
    mask_backward: Tensor | None = None,
) -> Tensor:
    r"""Drop features of a self-normalising network to SELU's lower limit, with another mask in the backward pass.

    .. math:: y = a_f (x \odot r_f + \alpha' (1 - r_f)) + b_f, \qquad
        \frac{\partial J}{\partial x} := \frac{\partial J}{\partial y} \odot a_b r_b

    with :math:`a = ((1 - p)(1 + p \alpha'^2))^{-1/2}` and :math:`b = -a \alpha' p`, which keep mean 0 and variance 1.

    Shapes, Args, Raises: as `dual_dropout`; `scale="classic"` is refused, since the mean is kept without it, and with
    `"none"` a is 1 and b is 0.

    Example:
        >>> import torch
        >>> x, keep = torch.zeros(2), torch.tensor([True, False])
        >>> dual_alpha_dropout(x, 0.5, mask_forward=keep).round(decimals=3)
        tensor([ 0.7790, -0.7790])
    """
    check_settings(p_forward, p_backward, coupling, scale)
    return dual_views(
        x,
        p_forward,
        p_backward,
        training=training,
        coupling=coupling,
        scale=scale,
        generator=generator,
        mask_shape=mask_shape,
        masks=(mask_forward, mask_backward),
        alpha=True,
    ).forward


# -- both views of the features ----------------------------------------------------------------------------------------


@dataclass
class Views:
    """The features as the forward pass sees them, and what the backward mask would have left of them.

    Attributes:
        forward: `x * m_f`, in the graph; its gradient goes to `x` times `m_b`.
        tied: whether both are the same, so that nothing but standard dropout is needed.
        mask, scale, offset: `m_b`, and what alpha dropout adds.
    """

    forward: Tensor
    x: Tensor
    tied: bool
    mask: Tensor | None = None
    scale: Rate = 1.0
    offset: Tensor | None = None

    def backward(self) -> Tensor:
        """Return `x * m_b`, outside of the graph."""
        with torch.no_grad():
            return self.forward.detach() if self.tied else masked(self.x.detach(), self.mask, self.scale, self.offset)


def dual_views(
    x: Tensor,
    p_forward: Rate,
    p_backward: Rate | None,
    *,
    training: bool,
    coupling: Coupling,
    scale: Scale,
    generator: torch.Generator | None = None,
    mask_shape: Sequence[int] | None = None,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    alpha: bool = False,
    switch: Switch | None = None,
) -> Views:
    """Return both views of `x`; settings as in `dual_dropout`, already checked.

    Args:
        alpha: whether dropped features go to SELU's lower limit.
        switch: when on, the backward pass takes the forward mask, to compare the two gradients.
    """
    _check_features(x)
    if alpha and scale == "classic":
        raise InvalidArgument("scale='classic' has no meaning for alpha dropout, which keeps mean and variance itself.")
    if not training:
        return Views(x * (1 - p_forward) if scale == "classic" else x, x, tied=True)
    tied = p_backward is None or (p_backward is p_forward) or same_rate(p_forward, p_backward)
    second = p_forward if p_backward is None else p_backward
    if masks == (None, None):
        if _is_number(p_forward, 0.0) and _is_number(second, 0.0):
            return Views(x, x, tied=True)
        masks = _drawn_masks(x, p_forward, second, coupling, generator, mask_shape, tied=tied)
        tied = tied and coupling == "nested"
    else:
        masks, tied = _given_masks(x, masks, tied=tied)
    (scale_f, offset_f), (scale_b, offset_b) = (
        _affine(p, mask, x, scaled=scaled, alpha=alpha)
        for p, mask, scaled in (
            (p_forward, masks[0], scale in ("inverted", "forward_only")),
            (second, masks[1], scale == "inverted"),
        )
    )
    tied = tied and scale != "forward_only"
    # None for a mask that is the same: compiled code takes no tensor twice
    second_mask, one_mask = (None, True) if masks[1] is masks[0] else (masks[1], False)
    y = _TwoMasks.apply(x, masks[0], scale_f, offset_f, second_mask, scale_b, one_mask, tied, switch)
    return Views(y, x, tied, masks[1], scale_b, offset_b)


@dataclass
class Switch:
    """Turns the backward passes of a step to the forward mask, and thereby to the gradient of standard dropout."""

    on: bool = False


def masked(x: Tensor, mask: Tensor | None, scale: Rate, offset: Tensor | None = None) -> Tensor:
    """Return `x * mask * scale + offset`; by multiplication, so that infinities become NaN as in `nn.Dropout`."""
    y = x.clone() if mask is None else x * mask
    if isinstance(scale, Tensor) or scale != 1.0:
        y = y.mul_(scale)
    return y if offset is None else y.add_(offset)


class _TwoMasks(torch.autograd.Function):
    """The features under one mask, their gradient under the other; saves one byte an element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        mask_f: Tensor | None,
        scale_f: Rate,
        offset: Tensor | None,
        mask_b: Tensor | None,
        scale_b: Rate,
        one_mask: bool,
        tied: bool,
        switch: Switch | None,
    ) -> Tensor:
        return masked(x, mask_f, scale_f, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask_f, scale_f, _, mask_b, scale_b, one_mask, ctx.tied, ctx.switch = inputs
        ctx.scales = scale_f, scale_b
        ctx.save_for_backward(mask_f if one_mask else mask_b, None if ctx.switch is None else mask_f)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        standard = ctx.switch is not None and ctx.switch.on
        masks = ctx.saved_tensors
        errors = masked(grad, masks[1] if standard else masks[0], ctx.scales[0] if standard else ctx.scales[1])
        if not ctx.tied:
            (errors,) = first_order(errors)
        return errors, None, None, None, None, None, None, None, None


def first_order(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients so that differentiating them raises `UnsupportedTraining`."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    guarded = _FirstOrder.apply(*gradients)
    return guarded if isinstance(guarded, tuple) else (guarded,)


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise UnsupportedTraining(
            "The backward pass of augmented dropout was differentiated (a gradient penalty, a meta-gradient, a "
            "Hessian). With different masks in the two passes it is not the gradient of any loss, so that it has no "
            "derivative of use. Take equal rates with nested masks, or leave those dropouts out."
        )


def check_rate(name: str, p: Rate | None) -> None:
    """Raise `InvalidArgument` unless `p` is a probability; the value of a tensor would have to be waited for."""
    if isinstance(p, Tensor):
        if p.ndim != 0 or p.requires_grad:
            raise InvalidArgument(
                f"{name} is a tensor of shape {tuple(p.shape)}; one number without gradient is needed."
            )
    elif p is not None and (isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1):
        raise InvalidArgument(f"{name}={p!r} is no probability; a number from 0 to 1 is needed.")


def check_settings(p_forward: Rate, p_backward: Rate | None, coupling: str, scale: str) -> None:
    """Raise `InvalidArgument` for settings that mean nothing."""
    if p_forward is None:
        raise InvalidArgument("p_forward=None is no probability; a number from 0 to 1 is needed.")
    check_rate("p_forward", p_forward)
    check_rate("p_backward", p_backward)
    check_choice("coupling", coupling, COUPLINGS)
    check_choice("scale", scale, SCALES)


def same_rate(p_forward: Rate, p_backward: Rate | None) -> bool:
    """Tell whether two rates are known to be equal."""
    if p_backward is None:
        return not isinstance(p_forward, Tensor)
    return not isinstance(p_forward, Tensor) and not isinstance(p_backward, Tensor) and p_forward == p_backward


def _is_number(p: Rate, value: float) -> bool:
    return not isinstance(p, Tensor) and p == value


def _check_features(x: Tensor) -> None:
    if not (x.is_floating_point() or x.is_complex()):
        raise InvalidArgument(f"Features of {x.dtype} cannot be scaled; a floating dtype is needed: call x.float().")


def _uniform(x: Tensor, generator: torch.Generator | None, shape: Sequence[int] | None) -> Tensor:
    # always in float32: uniform bfloat16 numbers have steps of 1/256, which no small rate survives
    if shape is not None:
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device=x.device)
    if generator is None:
        return torch.rand_like(x, dtype=torch.float32)  # in the memory format of x
    return torch.empty_like(x, dtype=torch.float32).uniform_(generator=generator)


def _drawn_masks(
    x: Tensor,
    p_forward: Rate,
    p_backward: Rate,
    coupling: Coupling,
    generator: torch.Generator | None,
    shape: Sequence[int] | None,
    *,
    tied: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return which features to keep in each pass, `None` for all of them."""
    with torch.no_grad():
        u = _uniform(x.detach(), generator, shape)
        # compiled code would put off a draw that only the backward pass needs, and take the numbers in another order
        keep_all = _is_number(p_forward, 0.0) and not torch.compiler.is_compiling()
        forward = None if keep_all else u >= p_forward
        if coupling == "nested" and tied:
            return forward, forward
        if _is_number(p_backward, 0.0):
            return forward, None
        if coupling == "complementary":
            return forward, u < 1 - p_backward  # 1 - u may be 1 and is never 0: strict, so that a rate of 1 drops all
        if coupling == "independent":
            u = _uniform(x.detach(), generator, shape)
        return forward, u >= p_backward


def _given_masks(
    x: Tensor, masks: tuple[Tensor | None, Tensor | None], *, tied: bool
) -> tuple[tuple[Tensor, Tensor], bool]:
    forward, backward = masks
    if forward is None or (backward is None and not tied):
        raise InvalidArgument("Masks were given for one pass only. Give mask_forward and mask_backward, or neither.")
    for name, mask in (("mask_forward", forward), ("mask_backward", backward)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise InvalidArgument(f"{name} is of {mask.dtype}; a boolean mask, True for what is kept, is needed.")
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ShapeMismatch(f"{name} of shape {tuple(mask.shape)} does not fit features of {tuple(x.shape)}.")
    if backward is None:
        return (forward, forward), True
    return (forward, backward), tied and backward is forward


def _affine(p: Rate, mask: Tensor | None, x: Tensor, *, scaled: bool, alpha: bool) -> tuple[Rate, Tensor | None]:
    """Return the scale of one pass, and what alpha dropout adds to `x * mask * scale`."""
    if not alpha:
        return (_inverse(p) if scaled else 1.0), None
    with torch.no_grad():
        a, b = _alpha_affine(p) if scaled else (1.0, 0.0)
        if mask is None:
            return a, torch.zeros((), dtype=x.dtype, device=x.device) + b
        offset = torch.where(mask, 0.0, _SELU_FLOOR) * a + b
        return a, offset.to(x.dtype)


def _inverse(p: Rate) -> Rate:
    if isinstance(p, Tensor):
        return (1 - p).reciprocal().clamp(max=_LARGEST_SCALE)
    return 1.0 if p >= 1 else 1.0 / (1.0 - p)  # with p = 1 nothing is left to scale


def _alpha_affine(p: Rate) -> tuple[Rate, Rate]:
    if isinstance(p, Tensor):
        slope = ((1 - p).clamp(min=1 / _LARGEST_SCALE) * (1 + p * _SELU_FLOOR**2)).rsqrt() * (p < 1)
        return slope, -slope * _SELU_FLOOR * p
    a = 0.0 if p >= 1 else ((1 - p) * (1 + p * _SELU_FLOOR**2)) ** -0.5
    return a, -a * _SELU_FLOOR * p
