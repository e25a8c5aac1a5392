"""Streams of random numbers whose every piece depends on its place alone, and on nothing that was drawn before it."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument

_BITS = 2**64 - 1

#: the sources of variation, in the order in which they act
SOURCES = ("init", "split", "order", "augment", "dropout", "evaluation", "numerical")


def check_seed(source: str, seed: object) -> int:
    """Return the seed of a source, or raise `InvalidArgument` unless it is a whole number below 2**63."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**63:
        raise InvalidArgument(f"{source}={seed!r}: a seed is a whole number from 0 on and below 2**63.")
    return int(seed)


class Stream:
    r"""The random numbers of one source of variation, keyed by where in the training they are drawn.

    .. math:: k = \operatorname{BLAKE2b}_{63}(\text{source}, \text{seed}, \text{place})

    Nothing is carried from one place to the next, so that what happens elsewhere, or how often, changes nothing. Keys
    are hashes: two seeds share no piece, as consecutive seeds do where `seed + epoch` is the key.

    Args:
        source: name of the source.
        seed: a whole number from 0 on.

    Raises:
        InvalidArgument: for another seed.

    Example:
        >>> Stream("order", 1).key(0, 3) == Stream("order", 1).key(0, 3)
        True
        >>> Stream("order", 1).key(1) == Stream("order", 2).key(0)
        False
    """

    def __init__(self, source: str, seed: int) -> None:
        self.source = source
        self.seed = check_seed(source, seed)
        self._start = hashlib.blake2b(f"{source}\0{self.seed}\0".encode(), digest_size=8)

    def key(self, *place: int) -> int:
        """Return the 63-bit key of a place."""
        state = self._start.copy()
        state.update(struct.pack(f"{len(place)}q", *place))
        return int.from_bytes(state.digest(), "little") >> 1

    def within(self, *place: int) -> Callable[[int], int]:
        """Return the function from a number to the key of this place and that number, at a tenth of the cost.

        Example:
            >>> keys = Stream("dropout", 1).within(0, 2)
            >>> len({keys(batch) for batch in range(1000)})
            1000
        """
        start = self.key(*place)

        def key(number: int) -> int:
            # one step of SplitMix64, whose sequence does not repeat and whose seeds are hashes
            z = (start + (number + 1) * 0x9E3779B97F4A7C15) & _BITS
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
            return (z ^ (z >> 31)) >> 1

        return key

    def enter(self, *place: int) -> int:
        """Seed torch, NumPy and `random` for a place, and return its key."""
        key = self.key(*place)
        seed_all(key)
        return key


def seed_all(key: int) -> None:
    """Seed torch (CPU and the accelerators in use), NumPy's and Python's global generators with a 63-bit key."""
    seed_torch(key)
    _seed_numpy(key & 0xFFFFFFFF)
    _seed_python(_PYTHON, key)
    _PYTHON.gauss_next = None


def seed_torch(key: int) -> None:
    """Seed torch's generators alone."""
    # torch.manual_seed formats a stack trace for each call as long as CUDA is not in use: 350 microseconds, not 1
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key)
    elif _HAS_MPS:
        torch.mps.manual_seed(key)


# Methods of the global generators, which are what transforms draw from. The functions `np.random.seed` and
# `random.seed` come to the same for a whole number; in a training step, which has emptied the caches, each of them
# costs 5 microseconds more.
_seed_numpy: Callable[[int], None] = np.random.rand.__self__.seed  # type: ignore[attr-defined]
_PYTHON: Any = random.seed.__self__  # type: ignore[attr-defined]
_seed_python = random.Random.__base__.seed  # type: ignore[union-attr]
_HAS_MPS = torch.backends.mps.is_available()


class SeededIndices(list[Any]):
    """The indices of one batch that seed the global generators of the process which reads them, a worker's too."""

    def __init__(self, indices: list[Any], key: int) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Any:
        seed_all(self.key)
        return super().__iter__()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return SeededIndices, (list(super().__iter__()), self.key)


class GlobalGenerators:
    """The state of every global generator, to be put back later."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.numpy = np.random.get_state()  # noqa: NPY002
        self.python = random.getstate()

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
