"""The step by the 39 inputs (Metz et al. 2022), slice by slice, so that inputs of a whole tensor never exist."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.chunks import CHUNK, Entry
from lightning_methods.learned_optimizer.fast import Network, Settings
from lightning_methods.learned_optimizer.functional import (
    SMALL_FC_DECAYS,
    adam_direction,
    factored_dims,
    learned_decay,
    small_fc_inputs,
)

Slice = tuple[int, int, int]


def factored_step(network: Network, entry: Entry, settings: Settings) -> None:
    """Update one tensor.

    Args:
        network: of an architecture with `features="small_fc"`.
        entry: what is updated.
        settings: of the step.
    """
    work = _Work(network, entry, settings)
    work.advance()
    a, n = network.architecture, work.parameter.numel()
    squares = torch.zeros(a.elements, dtype=torch.float64, device=network.like.device)
    for own in work.slices:
        squares += work.inputs(own).square().sum(1, dtype=torch.float64)
    mean_square = squares / n
    count = torch.tensor([n], dtype=torch.float64, device=squares.device)
    first = network.first(mean_square.unsqueeze(0), count, settings.time)[0]
    if not a.normalize_step:
        for own in work.slices:
            out, _ = work.outputs(first, own)
            work.apply(own, out[0].mul_(out[1].exp_()).mul_(a.step_mult))
        return
    scale = torch.rsqrt(mean_square[a.momentum] + a.eps).to(network.like)
    directions, sums = [], squares.new_zeros(2)
    for own in work.slices:
        out, x = work.outputs(first, own)
        u = out[0].mul_(out[1].exp_()) + x[a.momentum] * scale
        sums += torch.stack([u.square().sum(), out[2].sum()])
        directions.append(u)
    size = network.size(sums[0] / n, sums[1] / n, mean_square[a.momentum])
    for own, u in zip(work.slices, directions, strict=True):
        work.apply(own, u.mul_(size))


class _Work:
    """A tensor in slices along its largest dimension."""

    def __init__(self, network: Network, entry: Entry, settings: Settings) -> None:
        self.network, self.entry, self.settings = network, entry, settings
        self.parameter = entry.parameter if entry.parameter.ndim else entry.parameter.view(1)
        self.ndim = self.parameter.ndim
        self.dims = factored_dims(self.parameter.shape)
        self.state = {k: v for k, v in entry.state.items() if k in ("momentum", "rms", "row", "column", "full")}
        self.slices = list(_slices(self.parameter.shape, CHUNK))

    def gradient(self, own: Slice) -> Tensor:
        part = self.entry.gradient.view(self.parameter.shape).narrow(*own)
        return part.to(self.network.like.dtype) * self.settings.gradient

    def own(self, own: Slice) -> dict[str, Tensor]:
        """Return the accumulators of a slice; rows are the mean over the dimension that is cut, so all slices' own."""
        dim, begin, length = own
        dim -= self.ndim
        return {k: v if k == "row" else v.narrow(dim, begin, length) for k, v in self.state.items()}

    def advance(self) -> None:
        weights = self.network.weights
        d = {n: learned_decay(x, weights[n]).view(-1, *[1] * self.ndim) for n, x in SMALL_FC_DECAYS.items()}
        dims = self.dims
        total = torch.zeros_like(self.state["row"][:1]) if dims is not None else None
        for own in self.slices:
            g, part = self.gradient(own).unsqueeze(0), self.own(own)
            square = g.square()
            part["momentum"].mul_(d["momentum"]).add_(g * (1 - d["momentum"]))
            part["rms"].mul_(d["rms"]).add_(square * (1 - d["rms"]))
            square = square + 1e-30
            if dims is None or total is None:
                part["full"].mul_(d["factored"]).add_(square * (1 - d["factored"]))
                continue
            part["column"].mul_(d["factored"]).add_(square.mean(dims[1], keepdim=True) * (1 - d["factored"]))
            total += square.sum(dims[0], keepdim=True)
        if dims is not None and total is not None:
            mean = total / self.parameter.shape[dims[0]]
            self.state["row"].mul_(d["factored"]).add_(mean * (1 - d["factored"]))

    def inputs(self, own: Slice) -> Tensor:
        parameter = self.parameter.narrow(*own).to(self.network.like.dtype)
        return small_fc_inputs(self.gradient(own), parameter, self.own(own), self.ndim, self.dims).flatten(1)

    def outputs(self, first: Tensor, own: Slice) -> tuple[Tensor, Tensor]:
        """Return the outputs for a slice, the second one times its factor, and the inputs."""
        x, network = self.inputs(own), self.network
        hidden = torch.addmm(first[:, -1:], first[:, :-1], x).relu_()
        if network.second is not None:
            hidden = torch.addmm(network.second[:, -1:], network.second[:, :-1], hidden).relu_()
        return torch.mm(network.last[:, :-1], hidden).add_(network.last[:, -1:]), x

    def apply(self, own: Slice, step: Tensor) -> None:
        settings, part = self.settings, self.parameter.narrow(*own)
        step = step.mul_(settings.size).clamp_(-settings.limit, settings.limit).view(part.shape)
        if self.entry.age:
            momentum, share = self.state["momentum"][0].narrow(*own), self.entry.share
            second = self.entry.state["second_moment"].view(self.parameter.shape).narrow(*own)
            ratio, moved = adam_direction(momentum, self.gradient(own), second, settings.time + 1, self.entry.age)
            second.copy_(moved)
            step = step.mul_(share).add_(ratio, alpha=(1 - share) * settings.adam_lr)
        part.sub_(step)


def _slices(shape: Sequence[int], chunk: int) -> Iterator[Slice]:
    """Yield (dimension, begin, length) of slices of at most `chunk` elements, where one row is not more by itself."""
    dims = factored_dims(shape)
    dim = dims[0] + len(shape) if dims is not None else 0
    length = max(1, chunk // max(math.prod(shape) // max(shape[dim], 1), 1))
    for begin in range(0, shape[dim], length):
        yield dim, begin, min(length, shape[dim] - begin)
