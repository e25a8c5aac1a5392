"""Seeds from places in the meta-training, so that nothing but counters has to be saved to go on."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*place: int | str) -> int:
    """Return a seed for a place, such as (seed, "noise", outer step, pair); places that differ have unrelated ones.

    Example:
        >>> seed_of(0, "noise", 1) == seed_of(0, "noise", 1), seed_of(0, "noise", 1) == seed_of(0, "noise", 2)
        (True, False)
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*place: int | str) -> torch.Generator:
    """Return a generator, on the CPU, for a place.

    Example:
        >>> generator_of(0, "batch").initial_seed() == seed_of(0, "batch")
        True
    """
    return torch.Generator().manual_seed(seed_of(*place))
