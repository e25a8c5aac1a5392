"""The learned update rule, written as the papers have it, and the estimators of its meta-gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Decays of the six momenta of the paper's features."""
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""Time scales of the eleven features that tell how far the training is."""
ADAM = (0.9, 0.999)
"""Decays of the step that the guard hands over to."""
SMALL_FC_DECAYS = {"momentum": (0.9, 0.99, 0.999), "rms": (0.999,), "factored": (0.9, 0.99, 0.999)}
"""Decays of the accumulators of the 39 features, before what meta-training adds."""
BOUND = 5.0
"""The logarithm of a normalised step's size stays within this of that of `step_mult`."""


def time_features(step: int | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Return :math:`\tanh(t / s - 1)` for the eleven time scales, `t = 0` in the first step.

    Shapes:
        a number or `()` -> `(11,)`.

    Args:
        step: updates before this one.
        dtype: of the result.

    Example:
        >>> time_features(3)[:3]
        tensor([ 0.9640,  0.0000, -0.6044])
    """
    t = torch.as_tensor(step).to(torch.float64)
    scales = torch.tensor(TIMES, dtype=torch.float64, device=t.device)
    return torch.tanh(t / scales - 1).to(dtype)


def paper_inputs(gradient: Tensor, parameter: Tensor, momenta: Tensor) -> Tensor:
    """Return the eight inputs of each element before they are normalised: gradient, parameter, six momenta.

    Shapes:
        gradient and parameter `(..., n)`, momenta `(..., 6, n)`, already updated -> `(..., 8, n)`.
    """
    return torch.cat([gradient.unsqueeze(-2), parameter.unsqueeze(-2), momenta], -2)


def signal_inputs(mean_square: Tensor, numel: Tensor) -> Tensor:
    r"""Return eight inputs of each tensor that do not depend on the scale of the loss.

    :math:`\log(\mathrm{rms}(m_k) / \mathrm{rms}(g)) / 4` of each momentum, which falls where gradients are noise;
    :math:`\log \mathrm{rms}(p) / 2`, and :math:`\log n / 10`.

    Shapes:
        mean squares of the eight inputs of `paper_inputs`, `(..., 8)`; number of elements `(...)` -> `(..., 8)`.
    """
    ratios = (mean_square[..., 2:] + 1e-30).log() - (mean_square[..., :1] + 1e-30).log()
    size = (mean_square[..., 1:2] + 1e-6).log()
    # lowest terms: log of an rms is half the log of a mean square
    return torch.cat([ratios / 8, size / 4, numel.to(size.dtype).expand(size.shape[:-1]).unsqueeze(-1).log() / 10], -1)


def learned_decay(initial: Sequence[float], shift: Tensor) -> Tensor:
    """Return the decay that meta-training shifts: `1 - (1 - initial) exp(10 shift)`, within 0 and 1.

    Example:
        >>> learned_decay((0.9, 0.99), torch.zeros(2))
        tensor([0.9000, 0.9900])
    """
    start = torch.tensor(initial, dtype=shift.dtype, device=shift.device)
    return (1 - (1 - start) * torch.exp(10 * shift)).clamp(0, 1)


def factored_dims(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the largest and the second largest dimension, counted from the end; None below two dimensions.

    Of equal dimensions the later one counts as larger.

    Example:
        >>> factored_dims((8, 4, 3, 3)), factored_dims((5,))
        ((-4, -3), None)
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    return order[-1] - len(shape), order[-2] - len(shape)


def advance_small_fc(
    gradient: Tensor, state: Mapping[str, Tensor], decays: Mapping[str, Tensor], ndim: int
) -> dict[str, Tensor]:
    """Return the accumulators of the 39 features after one more gradient.

    Shapes:
        gradient `(..., *shape)` with `ndim` dimensions of its own; `momentum` `(..., 3, *shape)`, `rms`
        `(..., 1, *shape)`, `row` and `column` `(..., 3, *shape)` with one dimension averaged away (kept as 1), or
        `full` below two dimensions; decays `(..., 3)` or `(..., 1)`.
    """
    g = gradient.unsqueeze(-ndim - 1)
    d = {name: value.reshape(*value.shape, *[1] * ndim) for name, value in decays.items()}
    square = g.square()
    new = {
        "momentum": d["momentum"] * state["momentum"] + (1 - d["momentum"]) * g,
        "rms": d["rms"] * state["rms"] + (1 - d["rms"]) * square,
    }
    dims = factored_dims(gradient.shape[gradient.ndim - ndim :])
    square = square + 1e-30
    if dims is None:
        return new | {"full": d["factored"] * state["full"] + (1 - d["factored"]) * square}
    for name, dim in zip(("row", "column"), dims, strict=True):
        new[name] = d["factored"] * state[name] + (1 - d["factored"]) * square.mean(dim, keepdim=True)
    return new


def small_fc_inputs(
    gradient: Tensor, parameter: Tensor, state: Mapping[str, Tensor], ndim: int, dims: tuple[int, int] | None
) -> Tensor:
    """Return the 28 inputs of each element before they are normalised (Metz et al. 2022).

    In order: gradient, parameter, momenta (3), second moment, momenta over its root (3), one over its root, factored
    gradient (3), rows (3), columns (3), one over their roots (3 and 3), factored momenta (3).

    Shapes:
        as `advance_small_fc` -> `(..., 28, *shape)`; `dims` are the `factored_dims` of the whole tensor.
    """
    g, p = gradient.unsqueeze(-ndim - 1), parameter.unsqueeze(-ndim - 1)
    m, v = state["momentum"], state["rms"]
    inverse = torch.rsqrt(v + 1e-6)
    if dims is None:
        row = column = state["full"]
        by, momentum_by = torch.rsqrt((row + 1e-9).clamp(min=1e-9)), torch.rsqrt(row + 1e-6)
    else:
        row, column = state["row"], state["column"]
        relative = row / (row.mean(dims[1], keepdim=True) + 1e-9)
        by = torch.rsqrt(relative.clamp(min=1e-9)) * torch.rsqrt(column.clamp(min=1e-9))
        momentum_by = by
    parts = [g, p, m, v, m * inverse, inverse, g * by, row, column]
    parts += [torch.rsqrt(row + 1e-8), torch.rsqrt(column + 1e-8), m * momentum_by]
    shape = torch.broadcast_shapes(*(part.shape for part in parts[:3]))[-ndim:] if ndim else ()
    return torch.cat([part.expand(*part.shape[: part.ndim - ndim], *shape) for part in parts], -ndim - 1)


def unit_scale(mean_square: Tensor, eps: float) -> Tensor:
    """Return the factor that gives an input a mean square of one over its tensor."""
    return torch.rsqrt(mean_square + eps)


def adam_direction(
    momentum: Tensor, gradient: Tensor, second: Tensor, updates: int, age: Tensor | int
) -> tuple[Tensor, Tensor]:
    r"""Return Adam's direction, and its second moment moved on.

    .. math:: \mathrm{clip}\Big(\frac{m / (1 - 0.9^{n})}{\sqrt{v / (1 - 0.999^{a})} + 10^{-8}}, -1, 1\Big)

    A ratio counts as at most one, since the momentum may be older than the second moment (decay 0.999).

    Shapes:
        all the same; the age may be a number.

    Args:
        momentum: of decay 0.9, with this gradient in it.
        gradient: of this update.
        second: before it, zeros at first.
        updates: that the momentum has seen.
        age: updates of the second moment, this one included; where it is 0 the second moment has not begun.

    Example:
        >>> adam_direction(torch.tensor([0.1]), torch.ones(1), torch.zeros(1), 1, 1)[0]
        tensor([1.0000])
    """
    age = torch.as_tensor(age, dtype=second.dtype, device=second.device)
    begun = age > 0
    second = torch.where(begun, second * ADAM[1] + gradient.square() * (1 - ADAM[1]), second)
    corrected = second / torch.where(begun, 1 - ADAM[1] ** age, 1.0)
    # the root of zero has no derivative
    root = torch.where(second > 0, corrected, 1.0).sqrt() * (second > 0) if second.requires_grad else corrected.sqrt()
    return (momentum / (1 - ADAM[0] ** updates) / (root + 1e-8)).clamp(-1, 1), second


def apply_network(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return what the network gives for each row of inputs: ReLU layers, then a linear one.

    Shapes:
        `(n, inputs)` -> `(n, outputs)`.
    """
    hidden = (inputs @ weights["w0"] + weights["b0"]).relu()
    if "w1" in weights:
        hidden = (hidden @ weights["w1"] + weights["b1"]).relu()
    return hidden @ weights["w_out"] + weights["b_out"]


def scaled_step(direction: Tensor, magnitude: Tensor, step_mult: float, exp_mult: float) -> Tensor:
    r"""Return the paper's step :math:`c_s\, d\, e^{c_e m}`, with :math:`c_s = c_e = 10^{-3}` there.

    Example:
        >>> scaled_step(torch.tensor([2.0]), torch.tensor([0.0]), 1e-3, 1e-3)
        tensor([0.0020])
    """
    return direction * torch.exp(exp_mult * magnitude) * step_mult


def step_size(mean_scale: Tensor, step_mult: float) -> Tensor:
    """Return the root mean square of a normalised step, within `exp(-5)` and `exp(5)` of `step_mult`.

    Shapes:
        mean of the third output over the tensor `(...)` -> `(...)`.

    Example:
        >>> step_size(torch.tensor(0.0), 0.003)
        tensor(0.0030)
    """
    return step_mult * torch.exp(BOUND * torch.tanh(mean_scale / BOUND))


def es_gradient(loss_plus: Tensor, loss_minus: Tensor, noise: Tensor, sigma: float) -> Tensor:
    r"""Return the antithetic evolution strategies estimate of each pair.

    .. math:: g_s = \frac{L(\theta + \epsilon_s) - L(\theta - \epsilon_s)}{2 \sigma^2}\, \epsilon_s

    Shapes:
        losses `(S,)`, noise `(S, D)` -> `(S, D)`.

    Args:
        loss_plus: at the weights plus the noise.
        loss_minus: at the weights minus the noise.
        noise: drawn from a normal distribution of deviation `sigma`; for PES what has been added up over the windows.
        sigma: of the noise.

    Example:
        >>> es_gradient(torch.tensor([1.02]), torch.tensor([0.98]), torch.tensor([[0.01, 0.0]]), 0.01)
        tensor([[2.0000, 0.0000]])
    """
    return ((loss_plus - loss_minus) / (2 * sigma**2)).unsqueeze(-1) * noise


def combine_estimators(
    reparam: Tensor, es: Tensor, *, variance: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the mean of two estimators, weighted by the inverse variance of each element, and the first one's weight.

    .. math::
        w_i = \frac{v_{rp,i}^{-1}}{v_{rp,i}^{-1} + v_{es,i}^{-1}}, \qquad
        g_i = w_i\, \bar g_{rp,i} + (1 - w_i)\, \bar g_{es,i}

    Where a pair's reparameterisation gradient is not finite, that element rests on evolution strategies alone.

    Shapes:
        one estimate a pair, `(S, D)` each -> `(D,)`, `(D,)`.

    Args:
        reparam: reparameterisation gradients.
        es: evolution strategies.
        variance: of both, `(D,)` each, where they are known otherwise; by default that of the S pairs.

    Raises:
        ShapeMismatch: if the two differ in shape, or are not `(S, D)`.
        InvalidArgument: if there is one pair only, and no variance is given.

    Example:
        >>> reparam = torch.tensor([[1.0], [1.2]])
        >>> es = torch.tensor([[0.0], [4.0]])
        >>> combine_estimators(reparam, es)
        (tensor([1.1022]), tensor([0.9975]))
    """
    if reparam.shape != es.shape or reparam.ndim != 2 or not len(reparam):
        raise ShapeMismatch(
            f"The estimates are {tuple(reparam.shape)} and {tuple(es.shape)}; both (pairs, weights) is needed."
        )
    count = torch.full((), len(reparam), dtype=torch.float64, device=reparam.device)
    sums = estimator_sums(reparam, es)
    if variance is None and len(reparam) < 2:
        raise InvalidArgument(
            "One pair has no variance. Use two or more, or variance='ema', which remembers that of earlier steps."
        )
    gradient, weight = combine_sums(sums, count, variance)
    return gradient.to(reparam.dtype), weight.to(reparam.dtype)


def estimator_sums(reparam: Tensor, es: Tensor) -> Tensor:
    """Return in float64 the sums and the sums of squares of both estimators over the pairs: what ranks add up.

    Elements of the first that are not finite become infinite sums of squares.

    Shapes:
        `(S, D)`, `(S, D)` -> `(4, D)`.
    """
    rp, es = reparam.double(), es.double()
    bad = ~rp.isfinite()
    rp = rp.masked_fill(bad, 0)
    squares = rp.square().sum(0).masked_fill(bad.any(0), torch.inf)
    return torch.stack([rp.sum(0), squares, es.sum(0), es.square().sum(0)])


def variances(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unbiased variances of both estimators from `estimator_sums`; infinite stays infinite.

    Shapes:
        `(4, D)`, `()` -> `(D,)`, `(D,)`.
    """
    spread = (sums[1::2] - sums[::2].square() / count).clamp(min=0) / (count - 1)
    return spread[0], spread[1]


def combine_sums(sums: Tensor, count: Tensor, variance: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return what `combine_estimators` returns, from the sums over all pairs of all ranks, in float64.

    Shapes:
        `(4, D)`, `()` -> `(D,)`, `(D,)`.
    """
    v_rp, v_es = variances(sums, count) if variance is None else (v.double() for v in variance)
    exploded = ~sums[1].isfinite()
    v_rp = v_rp.masked_fill(exploded, torch.inf)
    tiny = torch.finfo(torch.float64).tiny
    # equal where both vanish; infinity over infinity is the first one's fault
    weight = torch.where(v_es.isinf() & ~v_rp.isinf(), 1.0, (v_es + tiny) / (v_rp + v_es + 2 * tiny))
    weight = torch.where(v_rp.isinf(), 0.0, weight)
    mean_rp, mean_es = sums[0] / count, sums[2] / count
    mixed = torch.where(weight > 0, weight * mean_rp, 0.0) + torch.where(weight < 1, (1 - weight) * mean_es, 0.0)
    return mixed, weight
