"""The learned optimizer as a differentiable function of its weights, for many particles at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.functional import (
    DECAYS,
    SMALL_FC_DECAYS,
    adam_direction,
    advance_small_fc,
    factored_dims,
    learned_decay,
    paper_inputs,
    signal_inputs,
    small_fc_inputs,
    step_size,
    time_features,
    unit_scale,
)
from lightning_methods.learned_optimizer.guard import Guard, inputs_of

State = dict[str, Tensor]

_CACHE = 1 << 17  # floats: half a megabyte


def fold(
    architecture: Architecture, weights: dict[str, Tensor], mean_square: Tensor, time: Tensor, numel: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factor of each element's inputs, and the bias of the first layer for each tensor.

    What is constant over a tensor (time, signals) enters by the bias alone.

    Shapes:
        mean squares `(..., K, F)` of K tensors, time `(11,)`, numel `(K,)` -> `(..., K, F)`, `(..., K, H)`.
    """
    scale = unit_scale(mean_square, architecture.eps)
    first, last = architecture.elements, architecture.elements + len(time)
    bias = weights["b0"] + time.to(mean_square.dtype) @ weights["w0"][..., first:last, :]
    bias = bias.unsqueeze(-2)
    if architecture.features == "signal":
        bias = bias + signal_inputs(mean_square, numel) @ weights["w0"][..., last:, :]
    return scale, bias.expand(*mean_square.shape[:-1], -1)


class UnrolledOptimizer:
    """One update of all tensors of a network, for particles that differ in weights, gradients and optimizer.

    It gives what `LearnedOptimizer` gives, as a function that can be differentiated twice.

    Args:
        architecture: of the learned optimizer.
        shapes: of the tensors of one particle.
        clock: where the guard of `LearnedOptimizer` lets time stand still and begins to hand over to Adam; its limit of
            a step holds too. None for the learned steps as they are. (What it does where the loss rises is no part.)
        width: inputs of a unit beyond which Adam has a part from the start.

    Example:
        >>> form = UnrolledOptimizer(Architecture(), [(2, 3), (3,)])
        >>> theta = torch.zeros(4, 706)
        >>> params = [torch.ones(4, 2, 3), torch.ones(4, 3)]
        >>> new, state = form.step(theta, params, params, form.begin(theta, 4), 0)
        >>> [tuple(p.shape) for p in new]
        [(4, 2, 3), (4, 3)]
    """

    def __init__(
        self,
        architecture: Architecture,
        shapes: Sequence[Sequence[int]],
        clock: int | None = None,
        width: int | None = None,
    ) -> None:
        self.architecture, self.clock, self.width, self.guard = architecture, clock, width, Guard()
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.numel = torch.tensor(self.sizes, dtype=torch.float64).clamp(min=1)
        # columns of ones, one a tensor: sums over tensors and values for all elements of one are matrix products
        self.member = torch.block_diag(*[torch.ones(size, 1) for size in self.sizes])

    def begin(self, like: Tensor, particles: int) -> State:
        """Return the state before the first update.

        Args:
            like: a tensor of the type and device that the state is to have.
            particles: number of particles.
        """
        if self.architecture.features != "small_fc":
            return {"momenta": like.new_zeros(particles, len(DECAYS), sum(self.sizes))}
        state: State = {}
        for i, shape in enumerate(self.shapes):
            for name, form in small_fc_shapes(shape).items():
                state[f"{i}/{name}"] = like.new_zeros(particles, *form)
        return state

    def step(
        self, theta: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, t: int
    ) -> tuple[list[Tensor], State]:
        """Return the parameters and the state after one update.

        Shapes:
            theta `(P, size)`; parameters and gradients `(P, *shape)`.

        Args:
            theta: weights of the optimizer of each particle.
            params: what is updated.
            grads: their gradients.
            state: from `begin` or the update before.
            t: updates before this one.
        """
        a, weights = self.architecture, self.architecture.split(theta)
        flat = torch.cat([p.reshape(len(p), -1) for p in params], 1)
        second = state.get("second")
        inputs, state = self._inputs(weights, params, grads, flat, state)
        member, counts = self.member.to(flat), self.numel.to(flat)
        mean_square = self._squares(inputs[:, :-1]) / counts.unsqueeze(1)
        time = time_features(min(t, self.clock) if self.clock else t, dtype=flat.dtype).to(flat.device)
        scale, bias = fold(a, weights, mean_square, time, counts)
        out = self._network(weights, inputs, scale, bias)
        update = out[:, 0] * torch.exp(a.exp_mult * out[:, 1])
        if a.normalize_step:
            update = update + inputs[:, a.momentum] * (scale[..., a.momentum] @ member.T)
            means = (torch.stack([update.square(), out[:, 2]], 1) @ member) / counts
            energy = mean_square[..., a.momentum]
            size = step_size(means[:, 1], a.step_mult) * energy / (energy + a.eps) * torch.rsqrt(means[:, 0] + 1e-8)
            update = update * (size @ member.T)
        else:
            update = update * a.step_mult
        if self.clock or self.width:
            update, second = self._guarded(update, inputs, second, t)
            state = state if second is None else {**state, "second": second}
        moved = (flat - update).split(self.sizes, 1)
        return [x.view(len(x), *shape) for x, shape in zip(moved, self.shapes, strict=True)], state

    def _guarded(self, update: Tensor, inputs: Tensor, second: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        """Return the update as the guard of `LearnedOptimizer` lets it be while the loss does not rise."""
        guard = self.guard
        update = update.clamp(-guard.step_limit, guard.step_limit)
        inputs_of_units = [inputs_of(shape) for shape in self.shapes]
        shares = [guard.share(t, self.clock, n, self.width) for n in inputs_of_units]
        if all(share == 1 for share in shares):
            return update, second
        wide = [bool(self.width) and n > (self.width or 0) for n in inputs_of_units]
        ages = [t + 1 if own else max(t - (self.clock or t), 0) for own in wide]
        mixes = torch.tensor([shares, ages], dtype=update.dtype, device=update.device)
        share, age = mixes @ self.member.to(update).T
        gradient, momentum = inputs[:, 0], inputs[:, self.architecture.momentum]
        second = torch.zeros_like(gradient) if second is None else second
        ratio, second = adam_direction(momentum, gradient, second, min(t, self.clock or t) + 1, age)
        return share * update + (1 - share) * guard.lr * ratio, second

    def _squares(self, inputs: Tensor) -> Tensor:
        """Return the sums of squares over each tensor: `(P, F, N)` -> `(P, K, F)`."""
        parts = inputs.split(self.sizes, 2)
        if torch.is_grad_enabled():
            return torch.stack([part.square().sum(2) for part in parts], 1)
        return torch.stack([torch.linalg.vector_norm(part, dim=2) for part in parts], 1).square_()

    def _network(self, weights: dict[str, Tensor], inputs: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Return the outputs for all elements, tensor by tensor, with the factors of the inputs in the first layer."""
        a = self.architecture
        # (P, K, H, F + 1): what normalises the inputs is multiplied into the weights, which are fewer; the bias is the
        # weight of the last input
        first = weights["w0"][:, None, : a.elements].mT * scale.unsqueeze(-2)
        first = torch.cat([first, bias.unsqueeze(-1)], -1)
        last = weights["w_out"].mT
        outputs = []
        for k, x in enumerate(inputs.split(self.sizes, 2)):
            blocks = [slice(None)] if torch.is_grad_enabled() else _blocks(len(x), a.hidden_size * x.shape[2])
            parts = []
            for rows in blocks:
                hidden = torch.bmm(first[rows, k], x[rows])
                hidden = hidden.relu() if hidden.requires_grad else hidden.relu_()
                if a.hidden_layers == 2:
                    hidden = torch.baddbmm(weights["b1"][rows].unsqueeze(-1), weights["w1"][rows].mT, hidden).relu()
                parts.append(torch.bmm(last[rows], hidden))
            outputs += [torch.cat(parts)] if len(parts) > 1 else parts
        return torch.cat(outputs, 2) + weights["b_out"].unsqueeze(-1)

    def _inputs(
        self,
        weights: dict[str, Tensor],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        flat: Tensor,
        state: State,
    ) -> tuple[Tensor, State]:
        """Return the inputs of the elements, with a last one that is 1, `(P, F + 1, N)`, and the state moved on."""
        if self.architecture.features != "small_fc":
            return self._paper_inputs(torch.cat([g.reshape(len(g), -1) for g in grads], 1), flat, state["momenta"])
        decays = {n: learned_decay(d, weights[n]) for n, d in SMALL_FC_DECAYS.items()}
        rows: list[Tensor] = []
        new: State = {}
        for i, (p, g, shape) in enumerate(zip(params, grads, self.shapes, strict=True)):
            if not shape:
                p, g = p.unsqueeze(-1), g.unsqueeze(-1)
            own = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{i}/")}
            ndim = max(len(shape), 1)
            own = advance_small_fc(g, own, decays, ndim)
            rows.append(small_fc_inputs(g, p, own, ndim, factored_dims(shape)).flatten(2))
            new |= {f"{i}/{name}": x for name, x in own.items()}
        return torch.cat([torch.cat(rows, 2), flat.new_ones(len(flat), 1, flat.shape[1])], 1), new

    def _paper_inputs(self, gradient: Tensor, flat: Tensor, momenta: Tensor) -> tuple[Tensor, State]:
        kept = torch.tensor(DECAYS, dtype=flat.dtype, device=flat.device).view(1, -1, 1)
        if torch.is_grad_enabled():
            momenta = torch.lerp(gradient.unsqueeze(1), momenta, kept)
            inputs = paper_inputs(gradient, flat, momenta)
            return torch.cat([inputs, torch.ones_like(flat).unsqueeze(1)], 1), {"momenta": momenta}
        inputs = flat.new_empty(len(flat), self.architecture.elements + 1, flat.shape[1])
        inputs[:, 0], inputs[:, 1], inputs[:, -1] = gradient, flat, 1
        torch.lerp(gradient.unsqueeze(1), momenta, kept, out=inputs[:, 2:-1])
        return inputs, {"momenta": inputs[:, 2:-1]}


def _blocks(particles: int, floats: int) -> list[slice]:
    """Return ranges of particles whose hidden units fit into a cache."""
    size = max(1, _CACHE // max(floats, 1))
    return [slice(i, min(i + size, particles)) for i in range(0, particles, size)]


def small_fc_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the accumulators of the 39 features for a tensor.

    Example:
        >>> small_fc_shapes((4, 3))
        {'momentum': (3, 4, 3), 'rms': (1, 4, 3), 'row': (3, 1, 3), 'column': (3, 4, 1)}
    """
    shape = tuple(shape) or (1,)
    forms = {"momentum": (3, *shape), "rms": (1, *shape)}
    dims = factored_dims(shape)
    if dims is None:
        return {**forms, "full": (3, *shape)}
    for name, dim in zip(("row", "column"), dims, strict=True):
        reduced = list(shape)
        reduced[dim] = 1
        forms[name] = (3, *reduced)
    return forms
