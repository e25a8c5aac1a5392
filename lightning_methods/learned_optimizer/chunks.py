"""Tensors one behind the other, cut into chunks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.functional import DECAYS

CHUNK = 8192
"""Elements of a chunk; its hidden units take a megabyte."""


class Entry(NamedTuple):
    """A parameter, its gradient, and its state."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]

    def in_memory_order(self) -> Entry:
        """Return it with its dimensions from the slowest to the fastest in the parameter's memory."""
        if self.parameter.is_contiguous():
            return self
        order = memory_order(self.parameter)
        state = {name: x.permute([0, *(i + 1 for i in order)] if name == "momenta" else order) for name, x in self._moved}
        return Entry(self.parameter.permute(order), self.gradient.permute(order), state)

    def is_flat(self) -> bool:
        """Tell whether all of it flattens without a copy."""
        return all(x.is_contiguous() for x in (self.parameter, self.gradient, *dict(self._moved).values()))

    def flat(self) -> Entry:
        """Return it, with copies of what does not flatten by itself."""
        state = {name: x.contiguous() for name, x in self._moved}
        return Entry(self.parameter.contiguous(), self.gradient.contiguous(), state)

    def take(self, other: Entry) -> None:
        """Copy the parameter and the state of another."""
        self.parameter.copy_(other.parameter)
        for name, x in self._moved:
            x.copy_(other.state[name])

    @property
    def _moved(self) -> list[tuple[str, Tensor]]:
        return [(name, self.state[name]) for name in ("momenta", "second_moment") if name in self.state]


class Piece(NamedTuple):
    """A run of elements of one tensor, as views.

    Attributes:
        tensor: which one.
        parameter: `(n,)`.
        gradient: `(n,)`.
        momenta: `(6, n)`.
        second: Adam's second moment `(n,)`, where there is one.
    """

    tensor: int
    parameter: Tensor
    gradient: Tensor
    momenta: Tensor
    second: Tensor | None = None


class Chunk(NamedTuple):
    """Pieces that are taken together, and their lengths."""

    pieces: list[Piece]
    lengths: list[int]


@lru_cache(maxsize=64)
def cuts(sizes: tuple[int, ...], chunk: int) -> tuple[list[list[int]], list[int]]:
    """Return the lengths of the pieces of each tensor, and how many pieces each chunk has.

    Example:
        >>> cuts((300, 5, 200), 256)
        ([[256, 44], [5], [200]], [1, 3])
    """
    pieces: list[list[int]] = []
    counts: list[int] = []
    room = 0
    for left in sizes:
        pieces.append([])
        while left:
            if not room:
                counts.append(0)
                room = chunk
            length = min(left, room)
            pieces[-1].append(length)
            counts[-1] += 1
            left, room = left - length, room - length
    return pieces, counts


def chunks_of(entries: Sequence[Entry], chunk: int) -> list[Chunk]:
    """Return the chunks of tensors that flatten without a copy.

    Args:
        entries: tensors, none of them empty.
        chunk: largest number of elements of one.
    """
    lengths, counts = cuts(tuple(e.parameter.numel() for e in entries), chunk)
    pieces: list[Piece] = []
    for index, (entry, own) in enumerate(zip(entries, lengths, strict=True)):
        flat = [entry.parameter.view(-1), entry.gradient.view(-1), entry.state["momenta"].view(len(DECAYS), -1)]
        if "second_moment" in entry.state:
            flat.append(entry.state["second_moment"].view(-1))
        if len(own) == 1:
            pieces.append(Piece(index, *flat))
        else:
            pieces += [Piece(index, *x) for x in zip(*(f.split(own, -1) for f in flat), strict=True)]
    chunks, end = [], 0
    for count in counts:
        own = pieces[end : end + count]
        chunks.append(Chunk(own, [len(x.parameter) for x in own]))
        end += count
    return chunks


def memory_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the slowest to the fastest in memory.

    Example:
        >>> memory_order(torch.zeros(2, 3).T)
        [1, 0]
    """
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda i: (-strides[i], i))


def gather(out: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """Write pieces one behind the other.

    Shapes:
        `(..., n)` each -> out, `(..., sum of n)`.
    """
    return out.copy_(pieces[0]) if len(pieces) == 1 else torch.cat(list(pieces), -1, out=out)
