"""The step of a learned optimizer in chunks that stay in the cache.

Three rearrangements, all exact: momenta are kept feature by feature, so that both layers are products with long rows;
what normalises the inputs is multiplied into the first layer, which is smaller; what is constant over a tensor enters
by its bias. Tensors smaller than a chunk go through together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.functional import (
    DECAYS,
    step_size,
    time_features,
)
from lightning_methods.learned_optimizer.unrolled import fold

CHUNK = 8192
SMALL = 4096
# a normalised step needs the whole tensor before any of it can be taken: so much of it is kept, the rest computed twice
_KEPT = 0.03
_ADAM = (0.9, 0.999)


class Entry(NamedTuple):
    """A parameter, its gradient, and its state."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What holds for all tensors of one call.

    Attributes:
        time: number of updates before this one, as the network is told.
        size: factor of the learned step.
        gradient: factor of the gradients, negative to maximise.
        trust: share of the learned step; the rest is Adam's.
        adam_lr: learning rate of that.
        limit: largest learned step of an element.
    """

    time: int
    size: float
    gradient: float = 1.0
    trust: float = 1.0
    adam_lr: float = 1e-3
    limit: float = math.inf


class _Views(NamedTuple):
    """The buffers of a chunk, cut to its length."""

    inputs: Tensor
    gradient: Tensor
    parameter: Tensor
    momenta: Tensor
    hidden: list[Tensor]
    outputs: Tensor
    rows: tuple[Tensor, ...]


class Engine:
    """Weights on a device, in the precision of the step, and the buffers of a chunk.

    Args:
        architecture: of the optimizer.
        theta: its weights.
        dtype: of the computation.
        device: of the parameters.
        chunk: elements at a time.
    """

    def __init__(
        self, architecture: Architecture, theta: Tensor, dtype: torch.dtype, device: torch.device, chunk: int = CHUNK
    ) -> None:
        self.architecture, self.chunk = architecture, chunk
        self.weights = architecture.split(theta.to(device=device, dtype=dtype))
        a, w = architecture, self.weights
        self.kept = torch.tensor(DECAYS, dtype=dtype, device=device).unsqueeze(1)
        self.inputs = torch.empty(a.elements + 1, chunk, dtype=dtype, device=device)
        self.inputs[a.elements] = 1  # the bias is one more input
        self.hidden = [torch.empty(a.hidden_size, chunk, dtype=dtype, device=device) for _ in range(a.hidden_layers)]
        self.outputs = torch.empty(a.outputs, chunk, dtype=dtype, device=device)
        factors = torch.ones(a.outputs, dtype=dtype, device=device)
        factors[1] = a.exp_mult  # the exponent's factor, ahead of the product
        self.w_out = (w["w_out"] * factors).T.contiguous()
        self.b_out = (w["b_out"] * factors).unsqueeze(1)
        self.like = self.inputs.new_empty(0)
        self._views: dict[int, _Views] = {}

    def views(self, count: int) -> _Views:
        """Return the buffers cut to `count` elements, kept for the next time."""
        if count not in self._views:
            if len(self._views) >= 64:
                self._views.clear()
            x, out = self.inputs[:, :count], self.outputs[:, :count]
            hidden = [h[:, :count] for h in self.hidden]
            self._views[count] = _Views(x, x[0], x[1], x[2:-1], hidden, out, out.unbind(0))
        return self._views[count]

    # -- one large tensor --------------------------------------------------------------------------------------------

    def large(self, entry: Entry, settings: Settings, numel: int) -> None:
        """Update one tensor.

        Args:
            entry: what is updated.
            settings: of the step.
            numel: elements of all parameters, a share of which may be kept at a time.
        """
        flat = _Flat(entry, self.chunk)
        n = flat.parameter.numel()
        sums = [x for part in flat.parts for x in self._advance(part, settings.gradient)]
        squares = torch.stack(sums).view(-1, self.architecture.elements).sum(0)
        if not bool(squares.isfinite().all()):
            squares = self._squares_of_large_numbers(flat, settings.gradient)
        first = self.alone(squares / n, n, settings.time)
        if self.architecture.normalize_step:
            self._normalized(flat, first, squares / n, settings, numel)
        else:
            for part in flat.parts:
                self._fill(part, settings.gradient)
                self._apply(part, self._direction(first, part.length), settings)
        flat.write_back()

    def _advance(self, part: _Part, factor: float) -> list[Tensor]:
        """Move the momenta of a chunk on, and return the sums of squares of its inputs."""
        gradient, parameter = part.gradient, part.parameter
        if factor != 1 or gradient.dtype != self.like.dtype:
            gradient = _scaled(self.views(part.length).gradient, gradient, factor)
        if parameter.dtype != self.like.dtype:
            parameter = self.views(part.length).parameter.copy_(parameter)
        torch.lerp(gradient, part.momenta, self.kept, out=part.momenta)
        momenta = torch.linalg.vecdot(part.momenta, part.momenta)
        return [torch.dot(gradient, gradient), torch.dot(parameter, parameter), *momenta.unbind()]

    def _squares_of_large_numbers(self, flat: _Flat, factor: float) -> Tensor:
        """Return the sums of squares where they exceed float32, as float64."""
        total = torch.zeros(self.architecture.elements, dtype=torch.float64, device=self.like.device)
        for part in flat.parts:
            self._fill(part, factor)
            total += self.views(part.length).inputs[:-1].double().square().sum(1)
        return total

    def folded(self, mean_square: Tensor, numel: Tensor, time: int) -> Tensor:
        """Return the first layers `(K, H, F + 1)` with the factors of the inputs, and the bias in the last column."""
        a = self.architecture
        given = time_features(time, dtype=mean_square.dtype).to(self.like.device)
        weights = self.weights
        if mean_square.dtype != self.like.dtype:
            weights = {name: x.to(mean_square.dtype) for name, x in weights.items()}
        scale, bias = fold(a, weights, mean_square, given, numel)
        layer = weights["w0"][: a.elements].T * scale.unsqueeze(1)
        return torch.cat([layer, bias.unsqueeze(2)], 2).to(self.like.dtype)

    def alone(self, mean_square: Tensor, numel: int, time: int) -> Tensor:
        """Return the first layer `(H, F + 1)` of one tensor."""
        count = torch.tensor([float(numel)], dtype=torch.float64, device=self.like.device)
        return self.folded(mean_square.unsqueeze(0), count, time)[0]

    def _fill(self, part: _Part, factor: float) -> None:
        v = self.views(part.length)
        _scaled(v.gradient, part.gradient, factor)
        v.parameter.copy_(part.parameter)
        v.momenta.copy_(part.momenta)

    def rest(self, hidden: Tensor, count: int) -> Tensor:
        """Return the outputs, the second one times its factor, from the first hidden layer."""
        v = self.views(count)
        if self.architecture.hidden_layers == 2:
            hidden = torch.mm(self.weights["w1"].T, hidden, out=v.hidden[1])
            hidden = hidden.add_(self.weights["b1"].unsqueeze(1)).relu_()
        # the product and then the bias: addmm would first spread the bias, which is slower for few rows
        return torch.mm(self.w_out, hidden, out=v.outputs).add_(self.b_out)

    def _direction(self, first: Tensor, count: int) -> Tensor:
        """Return the step of the chunk that was filled in, before the factor that all share."""
        v = self.views(count)
        self.rest(torch.mm(first, v.inputs, out=v.hidden[0]).relu_(), count)
        return v.rows[0].mul_(v.rows[1].exp_())

    def _apply(self, part: _Part, direction: Tensor, settings: Settings) -> None:
        factor = self.architecture.step_mult * settings.size
        if settings.trust == 1:
            bound = settings.limit / factor if factor else math.inf
            if bound < math.inf:
                direction.clamp_(-bound, bound)
            part.parameter.sub_(direction, alpha=factor)
            return
        step = direction.mul_(factor).clamp_(-settings.limit, settings.limit)
        gradient = _scaled(self.views(part.length).gradient, part.gradient, settings.gradient)
        part.parameter.sub_(mixed(step, part.momenta[DECAYS.index(0.9)], gradient, part.second, settings))

    def _normalized(self, flat: _Flat, first: Tensor, mean_square: Tensor, settings: Settings, numel: int) -> None:
        a, n = self.architecture, flat.parameter.numel()
        room = max(len(DECAYS) * int(_KEPT * numel), self.chunk)
        kept = self.like.new_empty(min(n, room))
        scale = torch.rsqrt(mean_square[a.momentum] + a.eps).to(self.like)
        sums = self.like.new_zeros(2)
        for part in flat.parts:
            self._fill(part, settings.gradient)
            u = self._moved(first, part.length, scale)
            sums += torch.stack([torch.dot(u, u), self.views(part.length).rows[2].sum()])
            if part.end <= len(kept):
                kept[part.begin : part.end] = u
        size = self.size(sums[0] / n, sums[1] / n, mean_square[a.momentum]) / a.step_mult
        for part in flat.parts:
            if part.end <= len(kept):
                u = kept[part.begin : part.end]
            else:
                self._fill(part, settings.gradient)
                u = self._moved(first, part.length, scale)
            self._apply(part, u.mul_(size), settings)

    def _moved(self, first: Tensor, count: int, scale: Tensor) -> Tensor:
        momentum = self.views(count).inputs[self.architecture.momentum]
        return self._direction(first, count).add_(momentum * scale)

    def size(self, mean_square: Tensor, scale: Tensor, energy: Tensor) -> Tensor:
        """Return the factor that gives normalised steps their size; nothing moves without a gradient."""
        a = self.architecture
        gate = (energy / (energy + a.eps)).to(mean_square)
        return step_size(scale, a.step_mult) * gate * torch.rsqrt(mean_square + 1e-8)

    # -- many small tensors ------------------------------------------------------------------------------------------

    def small(self, entries: Sequence[Entry], settings: Settings) -> None:
        """Update tensors that together fit into a chunk."""
        a = self.architecture
        sizes = [e.parameter.numel() for e in entries]
        count = sum(sizes)
        v = self.views(count)
        x = v.inputs[:-1]
        _scaled(x[0], torch.cat([e.gradient.reshape(-1) for e in entries]), settings.gradient)
        x[1].copy_(torch.cat([e.parameter.reshape(-1) for e in entries]))
        momenta = [e.state["momenta"].view(len(DECAYS), -1) for e in entries]
        x[2:].copy_(torch.cat(momenta, 1))
        torch.lerp(x[0], x[2:], self.kept, out=x[2:])
        torch._foreach_copy_(momenta, x[2:].split(sizes, 1))
        lengths = torch.tensor(sizes, device=x.device)
        counts = lengths.to(x.dtype)
        parts = x.split(sizes, 1)
        mean_square = torch.stack([torch.linalg.vecdot(part, part) for part in parts]) / counts.unsqueeze(1)
        if not bool(mean_square.isfinite().all()):
            wide = [part.double() for part in parts]
            mean_square = torch.stack([torch.linalg.vecdot(part, part) for part in wide]) / counts.unsqueeze(1)
        first = self.folded(mean_square, counts, settings.time)
        for layer, part, hidden in zip(first, v.inputs.split(sizes, 1), v.hidden[0].split(sizes, 1), strict=True):
            torch.mm(layer, part, out=hidden)
        out = self.rest(v.hidden[0].relu_(), count)
        step = out[0].mul_(out[1].exp_())
        if a.normalize_step:
            scale = torch.rsqrt(mean_square[:, a.momentum] + a.eps).to(x)
            step.addcmul_(x[a.momentum], scale.repeat_interleave(lengths, output_size=count))
            means = [
                torch.stack([part @ part for part in step.split(sizes)]),
                torch.stack([part.sum() for part in out[2].split(sizes)]),
            ]
            size = self.size(means[0] / counts, means[1] / counts, mean_square[:, a.momentum])
            step.mul_((size / a.step_mult).repeat_interleave(lengths, output_size=count))
        step.mul_(a.step_mult * settings.size)
        if settings.limit < math.inf:
            step.clamp_(-settings.limit, settings.limit)
        if settings.trust < 1:
            seconds = [e.state["second_moment"].view(-1) for e in entries]
            joined = torch.cat(seconds)
            gradient = torch.cat([e.gradient.reshape(-1) for e in entries]).to(x.dtype).mul_(settings.gradient)
            step = mixed(step, torch.cat(momenta, 1)[DECAYS.index(0.9)], gradient, joined, settings)
            torch._foreach_copy_(seconds, joined.split(sizes))
        parts = [s.view(e.parameter.shape) for s, e in zip(step.split(sizes), entries, strict=True)]
        torch._foreach_sub_([e.parameter for e in entries], parts)


class _Part(NamedTuple):
    """A chunk of a tensor: views of its elements."""

    begin: int
    end: int
    length: int
    parameter: Tensor
    gradient: Tensor
    momenta: Tensor
    second: Tensor


class _Flat:
    """The elements of a parameter, its gradient and its state in the order of the parameter's memory, in chunks."""

    def __init__(self, entry: Entry, chunk: int) -> None:
        p = entry.parameter
        order = memory_order(p)
        self.target = p.permute(order)
        self.parameter = self.target.reshape(-1)
        self.gradient = entry.gradient.permute(order).reshape(-1)
        self.state = entry.state["momenta"].permute([0, *(i + 1 for i in order)])
        self.momenta = self.state.reshape(len(DECAYS), -1)
        self.second = self.parameter
        self.kept: Tensor | None = None
        if "second_moment" in entry.state:
            self.kept = entry.state["second_moment"].permute(order)
            self.second = self.kept.reshape(-1)
        flat = (self.parameter, self.gradient, self.momenta, self.second)
        parts = zip(*(x.split(chunk, -1) for x in flat), strict=True)
        starts = range(0, len(self.parameter), chunk)
        self.parts = [_Part(a, a + len(own[0]), len(own[0]), *own) for a, own in zip(starts, parts, strict=True)]

    def write_back(self) -> None:
        """Copy where reshaping made a copy: for memory with gaps or another order than the parameter's."""
        pairs = [(self.target, self.parameter), (self.state, self.momenta)]
        if self.kept is not None:
            pairs.append((self.kept, self.second))
        for place, values in pairs:
            if place.data_ptr() != values.data_ptr():
                place.copy_(values.view(place.shape))


def memory_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the slowest to the fastest in memory.

    Example:
        >>> memory_order(torch.zeros(2, 3).T)
        [1, 0]
    """
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda i: (-strides[i], i))


def mixed(step: Tensor, momentum: Tensor, gradient: Tensor, second: Tensor, settings: Settings) -> Tensor:
    """Return the learned step and Adam's, as trust says; Adam's second moment is moved on.

    It starts with the first square rather than at zero, and a ratio counts as at most one, since the momentum is older.
    """
    fresh = second == 0
    second.lerp_(gradient.square(), 1 - _ADAM[1])
    second.copy_(torch.where(fresh, gradient.square(), second))
    corrected = momentum / (1 - _ADAM[0] ** (settings.time + 1))
    ratio = (corrected / (second.sqrt() + 1e-8)).clamp(-1, 1)
    return step * settings.trust + ratio * ((1 - settings.trust) * settings.adam_lr)


def _scaled(out: Tensor, x: Tensor, factor: float) -> Tensor:
    out.copy_(x)
    return out if factor == 1 else out.mul_(factor)
