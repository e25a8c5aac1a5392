"""The step of a learned optimizer in chunks that stay in the cache.

Three rearrangements, all exact: momenta are kept feature by feature, so that both layers are products with long rows;
what normalises the inputs is multiplied into the first layer, which is smaller; what is constant over a tensor enters
by its bias. Tensors go through one behind the other, small ones many at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.chunks import CHUNK, Chunk, Entry, chunks_of, gather
from lightning_methods.learned_optimizer.functional import ADAM, DECAYS, step_size, time_features
from lightning_methods.learned_optimizer.unrolled import fold

# a normalised step needs the whole tensor before any of it can be taken: as much of it as this share of the state is
# kept, and at least so many elements; the rest is computed twice
_KEPT, _KEPT_AT_LEAST = 0.015, 1 << 16


@dataclass(frozen=True)
class Settings:
    """What holds for all tensors of one call.

    Attributes:
        time: number of updates before this one, as the network is told.
        size: factor of the learned step.
        gradient: factor of the gradients, negative to maximise.
        adam_lr: learning rate of Adam's part of the step.
        limit: largest learned step of an element.
    """

    time: int
    size: float
    gradient: float = 1.0
    adam_lr: float = 0.0
    limit: float = math.inf


class Network:
    """Weights on a device, in the precision of the step.

    Args:
        architecture: of the optimizer.
        theta: its weights.
        dtype: of the computation.
        device: of the parameters.
    """

    def __init__(self, architecture: Architecture, theta: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.architecture = architecture
        self.weights = architecture.split(theta.to(device=device, dtype=dtype))
        self.exact = architecture.split(theta.to(device=device, dtype=torch.float64))
        self.like = torch.empty(0, dtype=dtype, device=device)
        factors = torch.ones(architecture.outputs, dtype=dtype, device=device)
        factors[1] = architecture.exp_mult  # the exponent's factor, ahead of the product
        w = {name: x.mT if x.ndim == 2 else x for name, x in self.weights.items()}
        # biases are one more column: one more input that is one
        self.last = torch.cat([w["w_out"], w["b_out"].unsqueeze(1)], 1) * factors.unsqueeze(1)
        self.second = torch.cat([w["w1"], w["b1"].unsqueeze(1)], 1) if architecture.hidden_layers == 2 else None

    def first(self, mean_square: Tensor, numel: Tensor, time: int) -> Tensor:
        """Return first layers with the factors of the inputs, and the bias in the last column.

        Shapes:
            mean squares `(K, F)` of K tensors and their sizes `(K,)`, float64 -> `(K, H, F + 1)`.
        """
        given = time_features(time, dtype=torch.float64).to(mean_square.device)
        scale, bias = fold(self.architecture, self.exact, mean_square, given, numel)
        layer = self.exact["w0"][: self.architecture.elements].T * scale.unsqueeze(1)
        return torch.cat([layer, bias.unsqueeze(2)], 2).to(self.like.dtype)

    def size(self, mean_square: Tensor, scale: Tensor, energy: Tensor) -> Tensor:
        """Return the factor that gives normalised steps their size; nothing moves without a gradient."""
        a = self.architecture
        gate = energy / (energy + a.eps)
        return (step_size(scale, a.step_mult) * gate * torch.rsqrt(mean_square + 1e-8)).to(self.like.dtype)


class _Views:
    """The buffers of a chunk, cut to a length. The last rows of inputs and hidden units are 1, for biases."""

    def __init__(self, rows: Tensor, hidden: list[Tensor], outputs: Tensor, adam: Tensor, count: int) -> None:
        self.inputs = rows[:, :count]
        self.given = self.inputs[:-1]
        self.gradient, self.parameter, self.momenta = self.inputs[0], self.inputs[1], self.inputs[2:-1]
        self.units = [h[:, :count] for h in hidden]
        self.hidden = [h[:-1] for h in self.units]
        self.outputs = outputs[:, :count]
        self.rows = self.outputs.unbind()
        self.momentum, self.adam = self.momenta[DECAYS.index(ADAM[0])], adam[:count]


class Engine(Network):
    """A network and the buffers of a chunk.

    Args:
        architecture: of the optimizer.
        theta: its weights.
        dtype: of the computation.
        device: of the parameters.
        chunk: elements at a time, half as many with two hidden layers.
    """

    def __init__(
        self, architecture: Architecture, theta: Tensor, dtype: torch.dtype, device: torch.device, chunk: int = CHUNK
    ) -> None:
        super().__init__(architecture, theta, dtype, device)
        a, self.chunk = architecture, chunk // architecture.hidden_layers
        self.kept = torch.tensor(DECAYS, dtype=dtype, device=device).unsqueeze(1)
        width = self.chunk + 48  # rows a power of two apart would share lines of the cache
        self._rows = self.like.new_ones(a.elements + 1, width)
        self._hidden = [self.like.new_ones(a.hidden_size + 1, width) for _ in range(a.hidden_layers)]
        self._outputs, self._ratio = self.like.new_empty(a.outputs, width), self.like.new_empty(width)
        self._views: dict[int, _Views] = {}

    def views(self, count: int) -> _Views:
        """Return the buffers cut to `count` elements, kept for the next time."""
        if count not in self._views:
            if len(self._views) >= 64:
                self._views.clear()
            self._views[count] = _Views(self._rows, self._hidden, self._outputs, self._ratio, count)
        return self._views[count]

    def update(self, entries: Sequence[Entry], settings: Settings, numel: int) -> None:
        """Update tensors.

        Args:
            entries: what is updated.
            settings: of the step.
            numel: elements of all parameters, a share of which may be kept at a time.
        """
        room = max(len(DECAYS) * int(_KEPT * numel), _KEPT_AT_LEAST)
        together: list[Entry] = []
        others: list[Entry] = []
        for entry in entries:
            own = entry.in_memory_order()
            (together if own.is_flat() else others).append(own)
        if together:
            self._together(together, settings, room)
        for entry in others:
            copy = entry.flat()
            self._together([copy], settings, room)
            entry.take(copy)

    def _together(self, entries: Sequence[Entry], settings: Settings, room: int) -> None:
        # a normalised step is kept until its tensor is complete
        for batch in _batches(entries, room if self.architecture.normalize_step else math.inf):
            self._update(batch, settings, room)

    def _update(self, entries: Sequence[Entry], settings: Settings, room: int) -> None:
        chunks = chunks_of(entries, self.chunk)
        means = _Means(chunks, [e.parameter.numel() for e in entries], self.like.device)
        norms = self.like.new_empty(len(means.tensors), self.architecture.elements)
        for chunk, own in zip(chunks, norms.split([len(c.tensors) for c in chunks]), strict=True):
            self._advance(chunk, own, settings.gradient)
        mean_square = means(norms.double().square_())
        if not bool(mean_square.isfinite().all()):
            mean_square = means(self._squares_of_large_numbers(chunks, settings.gradient))
        first = self.first(mean_square, means.counts, settings.time).unbind()
        if self.architecture.normalize_step:
            self._normalized(chunks, first, mean_square, means, settings, room)
            return
        factor = self.architecture.step_mult * settings.size
        for chunk in chunks:
            self._apply(chunk, self._direction(chunk, first, settings), factor, settings)

    def _fill(self, chunk: Chunk, factor: float, *, momenta: bool = True) -> _Views:
        v = self.views(sum(chunk.lengths))
        gather(v.gradient, chunk.gradients)
        if factor != 1:
            v.gradient.mul_(factor)
        gather(v.parameter, chunk.parameters)
        if momenta:
            gather(v.momenta, chunk.momenta)
        return v

    def _advance(self, chunk: Chunk, norms: Tensor, factor: float) -> None:
        """Move the momenta of a chunk on, and write the norms of the inputs of each of its runs `(runs, F)`."""
        alone = len(chunk.tensors) == 1
        v = self._fill(chunk, factor, momenta=not alone)
        torch.lerp(v.gradient, chunk.momenta[0] if alone else v.momenta, self.kept, out=v.momenta)
        torch._foreach_copy_(chunk.momenta, chunk.split(v.momenta))
        for run, own in zip(chunk.split(v.given), norms.unbind(), strict=True):
            torch.linalg.vector_norm(run, dim=1, out=own)

    def _squares_of_large_numbers(self, chunks: list[Chunk], factor: float) -> Tensor:
        """Return the sums of squares of each run where they exceed float32, as float64 `(runs, F)`."""
        squares = []
        for chunk in chunks:
            squares += [run.double().square().sum(1) for run in chunk.split(self._fill(chunk, factor).given)]
        return torch.stack(squares)

    def _direction(self, chunk: Chunk, first: Sequence[Tensor], settings: Settings, *, last: bool = True) -> Tensor:
        """Return the step of a chunk before the factor that all share, and write Adam's the last time."""
        v = self._fill(chunk, settings.gradient)
        if last and chunk.seconds:
            self._adam(chunk, settings)
        for tensor, x, out in zip(chunk.tensors, chunk.split(v.inputs), chunk.split(v.hidden[0]), strict=True):
            torch.mm(first[tensor], x, out=out)
        v.hidden[0].relu_()
        if self.second is not None:
            torch.mm(self.second, v.units[0], out=v.hidden[1]).relu_()
        torch.mm(self.last, v.units[-1], out=v.outputs)
        return v.rows[0].mul_(v.rows[1].exp_())

    def _apply(self, chunk: Chunk, step: Tensor, factor: float, settings: Settings) -> None:
        """Take a step times a factor, or Adam's for a part."""
        if settings.limit < math.inf and factor:
            bound = settings.limit / abs(factor)
            step.clamp_(-bound, bound)
        if chunk.seconds:
            self._mix(chunk, step, factor, settings)
            factor = 1.0
        torch._foreach_sub_(chunk.parameters, chunk.split(step), alpha=factor)

    def _adam(self, chunk: Chunk, settings: Settings) -> None:
        """Move Adam's second moments on, and write its direction: `adam_direction` in few passes over memory."""
        v, seconds = self.views(sum(chunk.lengths)), iter(chunk.seconds)
        runs = zip(chunk.mixes, *(chunk.split(x) for x in (v.adam, v.gradient, v.momentum)), strict=True)
        for (_, age), out, gradient, momentum in runs:
            if age:
                second = next(seconds).mul_(ADAM[1]).addcmul_(gradient, gradient, value=1 - ADAM[1])
                # numbers instead of passes: what corrects the root goes into all that the root is compared with
                bound, late = _bound(settings.time, age)
                torch.div(momentum, torch.sqrt(second, out=out).add_(1e-8 * late), out=out).clamp_(-bound, bound)

    def _mix(self, chunk: Chunk, step: Tensor, factor: float, settings: Settings) -> None:
        """Make it the learned step and Adam's, as the shares say."""
        adam = self.views(sum(chunk.lengths)).adam
        for (share, age), learned, other in zip(chunk.mixes, chunk.split(step), chunk.split(adam), strict=True):
            learned.mul_(share * factor)
            if age:
                learned.add_(other, alpha=(1 - share) * settings.adam_lr / _bound(settings.time, age)[0])

    # -- normalised steps --------------------------------------------------------------------------------------------

    def _normalized(
        self,
        chunks: list[Chunk],
        first: Sequence[Tensor],
        mean_square: Tensor,
        means: _Means,
        settings: Settings,
        room: int,
    ) -> None:
        """Take steps of the size that each tensor's third output chooses; up to `room` elements are kept until then."""
        energy = mean_square[:, self.architecture.momentum]
        scale = torch.rsqrt(energy + self.architecture.eps).tolist()
        kept: dict[int, Tensor] = {}
        sums = []
        for i, chunk in enumerate(chunks):
            u = self._moved(chunk, first, scale, settings, last=False)
            third = self.views(sum(chunk.lengths)).rows[2]
            for x, y in zip(chunk.split(u), chunk.split(third), strict=True):
                sums += [torch.dot(x, x), y.sum()]
            if len(u) <= room:
                kept[i] = u.clone()
                room -= len(u)
        squares, scales = means(torch.stack(sums).view(-1, 2).double()).unbind(1)
        size = self.size(squares, scales, energy).tolist()
        for i, chunk in enumerate(chunks):
            if i not in kept:
                u = self._moved(chunk, first, scale, settings, last=True)
            else:
                u = kept.pop(i)
                if chunk.seconds:
                    self._fill(chunk, settings.gradient)
                    self._adam(chunk, settings)
            torch._foreach_mul_(chunk.split(u), [size[tensor] for tensor in chunk.tensors])
            self._apply(chunk, u, settings.size, settings)

    def _moved(
        self, chunk: Chunk, first: Sequence[Tensor], scale: list[float], settings: Settings, *, last: bool
    ) -> Tensor:
        """Return the direction of a chunk, which starts from the momentum."""
        u = self._direction(chunk, first, settings, last=last)
        momentum = self.views(sum(chunk.lengths)).inputs[self.architecture.momentum]
        for tensor, x, m in zip(chunk.tensors, chunk.split(u), chunk.split(momentum), strict=True):
            x.add_(m, alpha=scale[tensor])
        return u


def _bound(time: int, age: int) -> tuple[float, float]:
    """Return what Adam's ratio is at most before it is corrected, and the correction of its root."""
    late = math.sqrt(1 - ADAM[1] ** age)
    return (1 - ADAM[0] ** (time + 1)) / late, late


class _Means:
    """Means over the elements of tensors, from sums over their runs."""

    def __init__(self, chunks: Sequence[Chunk], sizes: Sequence[int], device: torch.device) -> None:
        self.tensors = torch.tensor([tensor for chunk in chunks for tensor in chunk.tensors], device=device)
        self.counts = torch.tensor(sizes, dtype=torch.float64, device=device)

    def __call__(self, sums: Tensor) -> Tensor:
        """Return the means.

        Shapes:
            `(runs, ...)`, float64 -> `(tensors, ...)`.
        """
        total = sums.new_zeros(len(self.counts), *sums.shape[1:]).index_add_(0, self.tensors, sums)
        return total / self.counts.unsqueeze(1)


def _batches(entries: Sequence[Entry], room: float) -> Iterator[list[Entry]]:
    """Yield lists of tensors of at most `room` elements together, where one is not more by itself."""
    batch: list[Entry] = []
    count = 0
    for entry in entries:
        if batch and count + entry.parameter.numel() > room:
            yield batch
            batch, count = [], 0
        batch.append(entry)
        count += entry.parameter.numel()
    if batch:
        yield batch
