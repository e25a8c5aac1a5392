"""A copy of the user's dataloader whose order and augmentation come from streams of their own."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_methods.reproducibility.seeding import SeededIndices, Stream, seed_all, seed_torch

# these draw all they need, or the seed of their own generator, when their first index is asked for
_DRAW_ONCE = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)

Place = tuple[int, ...]


class StreamedSampler:
    """Stands for a sampler or batch sampler: the same indices, drawn from `order`; what is fetched, from `augment`.

    Indices are drawn under the key of (pass, batch) of `order`, without the rank, which samplers shard themselves.
    Just before a batch is fetched the global generators are seeded with its key of `augment`, in the process that
    fetches it: its noise is the same for any number of workers.

    Args:
        sampler: the user's.
        order, augment: the streams.
        begin: gives the place of a new pass (stage, epoch, how often in it, loader), and who is told of each batch.
        rank: of this process.
        in_workers: whether other processes fetch.
        bootstrap: index -> index, for a training set drawn with replacement.
    """

    def __init__(
        self,
        sampler: Any,
        order: Stream,
        augment: Stream,
        begin: Callable[[], tuple[Place, Callable[[bytes], None]]],
        *,
        rank: int = 0,
        in_workers: bool = False,
        bootstrap: np.ndarray | None = None,
    ) -> None:
        self.inner = sampler
        self.order = order
        self.augment = augment
        self.begin = begin
        self.rank = rank
        self.in_workers = in_workers
        self.bootstrap = bootstrap
        #: whether the streams are on; what is kept beyond the run is the user's sampler again
        self.active = True

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked for by copy and pickle before there is one
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        if not self.active:
            return iter(self.inner)
        self.augment.enter(self.rank)  # the loader draws the seed of its workers next
        return _Batches(self)


class _Batches:
    """One pass over the indices; it begins with the first, since loaders with workers ask for two and drop one."""

    def __init__(self, sampler: StreamedSampler) -> None:
        self.sampler = sampler
        self.batch = 0
        own = getattr(sampler.inner, "sampler", sampler.inner)
        batched = type(sampler.inner) is BatchSampler
        self.once = type(own) in _DRAW_ONCE and (batched or own is sampler.inner)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        sampler = self.sampler
        if self.batch == 0:
            self._begin()
        elif not self.once:
            sampler.order.enter(*self.place, self.batch)
        key = self.key(self.batch)
        self.batch += 1
        try:
            drawn = next(self.indices)
        finally:  # also when there are no more: the transfer of the last batches to the device may still draw
            self.seed(key)
        self.tell(_raw(drawn))
        if sampler.bootstrap is not None:
            drawn = sampler.bootstrap[drawn].tolist()
        return SeededIndices(drawn, key) if sampler.in_workers and isinstance(drawn, list) else drawn

    def _begin(self) -> None:
        sampler = self.sampler
        self.place, self.tell = sampler.begin()
        self.key = sampler.augment.within(sampler.rank, *self.place)
        # where others fetch, what is left to draw from here is the transfer to the device
        self.seed = seed_torch if sampler.in_workers else seed_all
        key = sampler.order.enter(*self.place, 0)
        own = getattr(sampler.inner, "sampler", sampler.inner)
        if isinstance(own, DistributedSampler):
            own.seed = key & 0x3FFFFFFF  # to which it adds the epoch
        self.indices = iter(sampler.inner)


def _raw(drawn: Any) -> bytes:
    if isinstance(drawn, torch.Tensor):
        drawn = drawn.tolist()
    if isinstance(drawn, list):
        try:
            return array("q", drawn).tobytes()
        except (TypeError, OverflowError):  # indices of another kind
            pass
    return repr(drawn).encode()


def streamed(
    loader: DataLoader[Any],
    order: Stream,
    augment: Stream,
    begin: Callable[[], tuple[Place, Callable[[bytes], None]]],
    *,
    rank: int = 0,
    force: bool = False,
    bootstrap: np.ndarray | None = None,
) -> DataLoader[Any]:
    """Return a copy of a loader that draws from the streams; the loader itself stays as it is.

    Args:
        loader: the user's, as the Trainer would run it.
        order, augment: the streams.
        begin: see `StreamedSampler`.
        rank: of this process.
        force: whether to pass over a generator of the user's own.
        bootstrap: index -> index.
    """
    copied = copy.copy(loader)
    kind = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler: Any = getattr(loader, kind)
    if isinstance(sampler, StreamedSampler):  # of an earlier run, in a CombinedLoader of the user's
        sampler = sampler.inner
    drawing = sampler if kind == "sampler" else getattr(sampler, "sampler", None)
    passed_over = force and isinstance(getattr(drawing, "generator", None), torch.Generator)
    if passed_over or isinstance(drawing, DistributedSampler):  # its seed is set
        own: Any = copy.copy(drawing)
        if passed_over:
            own.generator = None
        if kind == "batch_sampler":
            sampler = copy.copy(sampler)
            sampler.sampler = own
        else:
            sampler = own
        vars(copied)["sampler"] = own
    if force:
        vars(copied)["generator"] = None
    # DataLoader refuses the assignment of its samplers; its iterators read them from here
    vars(copied)[kind] = StreamedSampler(
        sampler, order, augment, begin, rank=rank, in_workers=loader.num_workers > 0, bootstrap=bootstrap
    )
    return copied


def owned_generator(loader: DataLoader[Any]) -> bool:
    """Tell whether the user gave the loader, or its sampler, a generator of their own."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    owners = (loader, sampler, getattr(sampler, "sampler", None))
    return any(isinstance(getattr(owner, "generator", None), torch.Generator) for owner in owners)
