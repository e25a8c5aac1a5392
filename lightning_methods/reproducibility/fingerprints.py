"""What a run really drew, as one short hash a source, so that two runs can be told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# so much of a tensor or array is read for the fingerprint of a data set
_SAMPLE = 1 << 20


class Chain:
    """A hash of all that was added so far, in order, which can be saved and gone on with.

    Example:
        >>> chain = Chain()
        >>> chain.add(b"one")
        >>> again = Chain(chain.digest)
        >>> chain.add(b"two"); again.add(b"two")
        >>> chain.digest == again.digest
        True
    """

    def __init__(self, digest: str = "") -> None:
        self._digest = bytes.fromhex(digest)
        self._waiting: list[bytes] = []

    @property
    def digest(self) -> str:
        """The hash so far, in hexadecimal; empty before anything was added."""
        for item in self._waiting:
            self._digest = hashlib.blake2b(self._digest + item, digest_size=8).digest()
        self._waiting.clear()
        return self._digest.hex()

    def add(self, item: bytes) -> None:
        """Add a piece, which is hashed later: the first call of a hash function in a step costs more than the hash."""
        self._waiting.append(item)
        if len(self._waiting) == 4096:
            _ = self.digest


def generator_state() -> bytes:
    """Return the state of torch's generators in short: seed and position, and words that change every 624 draws."""
    state: bytes = torch.default_generator.get_state().numpy()[:64].tobytes()
    if torch.cuda.is_initialized():
        state += torch.cuda.get_rng_state().numpy().tobytes()
    return state


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hash of named tensors, values, shapes and types.

    Example:
        >>> import torch
        >>> hash_tensors([("w", torch.zeros(2))]) == hash_tensors([("w", torch.zeros(3))])
        False
    """
    chain = hashlib.blake2b(digest_size=8)
    for name, x in tensors:
        chain.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        chain.update(_raw(x))
    return chain.hexdigest()


def hash_module(module: nn.Module) -> str:
    """Return the hash of a module's parameters and buffers."""
    return hash_tensors((k, v) for k, v in module.state_dict().items() if isinstance(v, Tensor))


def hash_batch(batch: Any) -> bytes:
    """Return the bytes of the hash of every tensor and array in a batch of any nesting."""
    chain = hashlib.blake2b(digest_size=8)
    for part in _parts(batch):
        chain.update(_raw(part) if isinstance(part, Tensor) else np.ascontiguousarray(part).tobytes())
    return chain.digest()


def hash_dataset(dataset: Any) -> str:
    """Return the hash of which examples a map-style data set holds, without asking it for one.

    Indices of subsets, tensors, arrays and lists that it keeps are read, and those of the data sets it wraps; of large
    ones an evenly spaced part.
    """
    chain = hashlib.blake2b(digest_size=8)
    _read(dataset, chain, set())
    return chain.hexdigest()


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the sources in which two runs differ.

    Args:
        one, other: fingerprints of the runs, as in `SeedStreams.fingerprints`.

    Example:
        >>> differences({"order": "a1", "init": "00"}, {"order": "b2", "init": "00"})
        ['order']
    """
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def _raw(x: Tensor) -> Any:
    plain = x.detach().cpu()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, (Tensor, np.ndarray)):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _parts(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _parts(value)
    elif callable(getattr(batch, "to_dict", None)):  # a batch of graphs
        yield from _parts(batch.to_dict())


def _read(owner: Any, chain: Any, seen: set[int]) -> None:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    chain.update(f"{type(owner).__name__}{len(owner) if hasattr(owner, '__len__') else ''}".encode())
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        _read_value(name, value, chain, seen)


def _read_value(name: str, value: Any, chain: Any, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        chain.update(name.encode() + bytes(_raw(flat[:: 1 + flat.numel() // _SAMPLE])))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        row = value.reshape(-1)
        chain.update(name.encode() + np.ascontiguousarray(row[:: 1 + row.size // _SAMPLE]).tobytes())
    elif isinstance(value, (list, tuple, range)):
        for part in value[:: 1 + 16 * len(value) // _SAMPLE]:
            if hasattr(part, "__getitem__") and hasattr(part, "__dict__"):
                _read(part, chain, seen)
            elif isinstance(part, (Tensor, np.ndarray)):
                _read_value(name, part, chain, seen)
            elif isinstance(part, (str, int, float, tuple)):
                chain.update(repr(part).encode())
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__") and hasattr(value, "__dict__"):
        _read(value, chain, seen)
