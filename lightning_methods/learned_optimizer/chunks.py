"""Tensors one behind the other, cut into chunks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.functional import DECAYS

CHUNK = 10240
"""Elements of a chunk; its hidden units take little more than a megabyte."""


class Entry(NamedTuple):
    """A parameter, its gradient, and its state.

    Attributes:
        share: of the learned step; the rest is Adam's.
        age: updates of Adam's second moment, this one included; 0 where it has not begun.
    """

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    share: float = 1.0
    age: int = 0

    def in_memory_order(self) -> Entry:
        """Return it with its dimensions from the slowest to the fastest in the parameter's memory."""
        if self.parameter.is_contiguous():
            return self
        order = memory_order(self.parameter)
        orders = {"momenta": [0, *(i + 1 for i in order)], "second_moment": order}
        state = {name: x.permute(orders[name]) for name, x in self._moved}
        return Entry(self.parameter.permute(order), self.gradient.permute(order), state, self.share, self.age)

    def is_flat(self) -> bool:
        """Tell whether all of it flattens without a copy."""
        return all(x.is_contiguous() for x in (self.parameter, self.gradient, *dict(self._moved).values()))

    def flat(self) -> Entry:
        """Return it, with copies of what does not flatten by itself."""
        state = {name: x.contiguous() for name, x in self._moved}
        return Entry(self.parameter.contiguous(), self.gradient.contiguous(), state, self.share, self.age)

    def take(self, other: Entry) -> None:
        """Copy the parameter and the state of another."""
        self.parameter.copy_(other.parameter)
        for name, x in self._moved:
            x.copy_(other.state[name])

    @property
    def _moved(self) -> list[tuple[str, Tensor]]:
        return [(name, self.state[name]) for name in ("momenta", "second_moment") if name in self.state]


class Cuts(NamedTuple):
    """Where tensors are cut that lie one behind the other.

    Attributes:
        runs: of each tensor, the lengths of its runs.
        chunks: of each chunk, the tensors of its runs and their lengths.
    """

    runs: list[list[int]]
    chunks: list[tuple[list[int], list[int]]]


@lru_cache(maxsize=64)
def cuts(sizes: tuple[int, ...], most: int) -> Cuts:
    """Return where to cut tensors of these sizes, none of them zero, into chunks of at most `most` elements.

    Example:
        >>> cuts((300, 5), 256)
        Cuts(runs=[[256, 44], [5]], chunks=[([0], [256]), ([0, 1], [44, 5])])
    """
    found = Cuts([], [])
    room = 0
    for tensor, left in enumerate(sizes):
        found.runs.append([])
        while left:
            if not room:
                found.chunks.append(([], []))
                room = most
            length = min(left, room)
            found.runs[-1].append(length)
            for own, value in zip(found.chunks[-1], (tensor, length), strict=True):
                own.append(value)
            left, room = left - length, room - length
    return found


class Chunk(NamedTuple):
    """Runs of elements that are taken together: of each the tensor that it is of, its length, and views of it.

    Attributes:
        tensors: indices of the tensors.
        lengths: elements of each run.
        mixes: share of the learned step in each, and the age of Adam's second moment.
        parameters: `(n,)` each.
        gradients: `(n,)`.
        momenta: `(6, n)`.
        seconds: Adam's second moments `(n,)`, of those that have any age.
    """

    tensors: list[int]
    lengths: list[int]
    mixes: list[tuple[float, int]]
    parameters: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]
    seconds: list[Tensor]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the runs of values `(..., count)`."""
        return (values,) if len(self.lengths) == 1 else values.split(self.lengths, -1)


def chunks_of(entries: Sequence[Entry], most: int) -> list[Chunk]:
    """Return the chunks of tensors that flatten without a copy.

    Args:
        entries: tensors, none of them empty.
        most: largest number of elements of a chunk.
    """
    found = cuts(tuple([e.parameter.numel() for e in entries]), most)

    parameters = _runs([e.parameter.view(-1) for e in entries], found)
    gradients = _runs([e.gradient.view(-1) for e in entries], found)
    momenta = _runs([e.state["momenta"].view(len(DECAYS), -1) for e in entries], found)
    seconds = iter(
        run
        for e, lengths in zip(entries, found.runs, strict=True)
        if e.age
        for run in e.state["second_moment"].view(-1).split(lengths)
    )
    chunks, end = [], 0
    for tensors, lengths in found.chunks:
        own, end = slice(end, end + len(tensors)), end + len(tensors)
        mixes = [(entries[i].share, entries[i].age) for i in tensors]
        moments = [next(seconds) for _, age in mixes if age]
        chunks.append(Chunk(tensors, lengths, mixes, parameters[own], gradients[own], momenta[own], moments))
    return chunks


def _runs(tensors: list[Tensor], found: Cuts) -> list[Tensor]:
    runs: list[Tensor] = []
    for x, lengths in zip(tensors, found.runs, strict=True):
        runs += x.split(lengths, -1) if len(lengths) > 1 else [x]
    return runs


def memory_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the slowest to the fastest in memory.

    Example:
        >>> memory_order(torch.zeros(2, 3).T)
        [1, 0]
    """
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda i: (-strides[i], i))


def gather(out: Tensor, runs: list[Tensor]) -> Tensor:
    """Write runs one behind the other.

    Shapes:
        `(..., n)` each -> out, `(..., sum of n)`.
    """
    return out.copy_(runs[0]) if len(runs) == 1 else torch.cat(runs, -1, out=out)
