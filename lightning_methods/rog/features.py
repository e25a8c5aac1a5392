"""Features of a dataloader's samples, each once, in a fixed order and in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.gather import gather_rows, gather_sizes, rank, world_size
from lightning_methods.core.passes import batches, preserved
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch

_WHOLE = (RandomSampler, SequentialSampler, WeightedRandomSampler, DistributedSampler)  # draw from all samples
_ROWS_SENT = 65_536  # at once between processes
_TRIES = 4  # to see whether a dataset gives the same sample twice


@dataclass(frozen=True)
class Collected:
    """What was kept of the samples, on the CPU and in the order of the dataset.

    Attributes:
        features: by layer, `(n, d)` each.
        labels: `(n,)` as given, -1 where they are no class.
        predicted: `(n,)` class by the network itself.
        confidence: `(n,)` its largest probability.
        index: `(n,)` place in the dataset, or of arrival where the data are a stream.
        num_classes: number of logits.
        dropped: how many samples had no class.
        left_out: how many were left out for want of memory.
    """

    features: dict[str, Tensor]
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    index: Tensor
    num_classes: int
    dropped: int
    left_out: int


@dataclass(frozen=True)
class Reader:
    """How samples are read from batches and layers."""

    taps: FeatureTaps
    inputs: Selector = None
    labels: Selector = None
    #: from features and labels of a batch to what is kept in place of the features, rows `(n, k)` by name
    reduce: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]] | None = None


def mean_pool(x: Tensor) -> Tensor:
    """Return a row of features for each sample: the mean over positions of maps, and over the tokens of sequences."""
    if x.ndim == 3:
        return x.mean(1)
    return x.flatten(2).mean(2) if x.ndim > 3 else x


def in_order(loader: Any) -> tuple[Any, Tensor | None]:
    """Return a loader of this process's share of the samples, each once and in order, and their places.

    A loader whose samples cannot be chosen is returned as it is, with `None`.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not _sized(dataset):
        return loader, None
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        places = torch.as_tensor(sorted(int(i) for i in sampler.indices))
    elif loader.batch_size is None or isinstance(sampler, _WHOLE):
        places = torch.arange(len(dataset))
    else:
        places = torch.as_tensor(sorted({int(i) for i in sampler}))
    own = places[rank() :: world_size()]
    workers: dict[str, Any] = {"num_workers": loader.num_workers, "pin_memory": loader.pin_memory}
    if loader.num_workers:
        workers |= {"multiprocessing_context": loader.multiprocessing_context, "timeout": loader.timeout}
    workers |= {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}
    if loader.batch_size is None and loader.batch_sampler is None and not isinstance(sampler, BatchSampler):
        return DataLoader(Subset(dataset, own.tolist()), batch_size=None, **workers), None  # an item is a whole batch
    if isinstance(sampler, BatchSampler):  # which asks the dataset for whole batches
        return DataLoader(dataset, None, sampler=BatchSampler(own.tolist(), sampler.batch_size, False), **workers), own
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 128
    whole = len(own) == len(dataset)
    return DataLoader(dataset if whole else Subset(dataset, own.tolist()), batch_size=size, **workers), own


def varies(dataset: Any) -> bool:
    """Tell whether a dataset gives another input when asked for the same sample again: random augmentation."""
    if isinstance(dataset, IterableDataset) or not _sized(dataset) or not len(dataset):
        return False
    with preserved(torch.nn.Module()):
        seen = []
        for attempt in range(_TRIES):
            torch.manual_seed(attempt)
            random.seed(attempt)
            seen.append(list(_tensors(dataset[0])))
    first = seen[0]
    return any(len(other) == len(first) and not all(map(_same, first, other)) for other in seen[1:])


def collect(
    trainer: Any,
    pl_module: Any,
    loaders: Iterable[Any],
    reader: Reader,
    *,
    description: str,
    limit: Callable[[Any], int | None],
    labelled: bool = True,
    max_per_class: int | None = None,
    max_bytes: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Collected:
    """Read loaders through the module, and join what all processes kept.

    Args:
        trainer: the running trainer.
        pl_module: the module.
        loaders: what to read; all processes read the same ones.
        reader: how.
        description: for the progress phase.
        limit: gives the number of batches to read of a loader.
        labelled: whether there are labels.
        max_per_class: at most so many samples of each class, drawn at random.
        max_bytes: at most so much memory for features, over all classes.
        num_classes: number of classes, by default that of the logits.
        seed: of that draw.
    """
    kept = _Reservoir(max_per_class, max_bytes, num_classes, seed)
    offset = 0
    for loader in loaders:
        mine, places = in_order(loader)
        arrived = 0
        passed: Any = batches(trainer, pl_module, mine, description=description, limit=limit(mine))
        with closing(passed):
            for batch in passed:
                features, logits = forward(pl_module, inputs_of(batch, reader.inputs), reader.taps)
                here = torch.arange(arrived, arrived + len(logits))
                index = places[here] if places is not None else here * world_size() + rank()
                arrived += len(logits)
                labels = (
                    class_labels(targets_of(batch, reader.labels), len(logits))
                    if labelled
                    else torch.full((len(logits),), -1)
                )
                rows = features if reader.reduce is None else reader.reduce(features, labels)
                kept.add(rows, labels, logits, index + offset)
        offset += len(loader.dataset) if _sized(getattr(loader, "dataset", None)) else 1 << 32
    return kept.joined(pl_module.device, keep_unlabelled=not labelled)


def forward(pl_module: Any, inputs: Any, taps: FeatureTaps) -> tuple[dict[str, Tensor], Tensor]:
    """Return features and logits `(n, C)` of a batch.

    Raises:
        ShapeMismatch: if the module's forward gives no logits, or a layer not a row of features for each of them.
    """
    with taps.recording():
        logits = logits_of(pl_module(inputs))
        features = {name: _wide(x) for name, x in taps.read().items()}
    for name, x in features.items():
        if x.ndim != 2 or len(x) != len(logits):
            raise ShapeMismatch(
                f"The layer {name!r} gave features of shape {tuple(x.shape)} for {len(logits)} samples; a row for each "
                f"is needed. Pass pool= a function that gives one."
            )
        bad = int((~x.isfinite()).any(1).sum())
        if bad:
            raise InvalidArgument(
                f"The features of {bad} of {len(x)} samples in the layer {name!r} hold NaN or infinity. Has the "
                f"training diverged?"
            )
    return features, logits


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a module's forward gives: the tensor itself, or what is called `logits`."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeMismatch(
            f"The module's forward returned {shape}; logits (n, C) of at least two classes are needed, or an output "
            f"with `logits`."
        )
    return output.float()


def class_labels(targets: Any, rows: int) -> Tensor:
    """Return labels `(n,)` on the CPU.

    Raises:
        BatchFormat: if the targets are not one whole number a sample.
    """
    labels = torch.as_tensor(targets).detach().cpu()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        raise BatchFormat(
            f"The targets have shape {tuple(labels.shape)} and type {labels.dtype} for {rows} samples; one class, a "
            f"whole number, for each is needed. Say where they are with labels=."
        )
    return labels.long()


class _Reservoir:
    """Samples with the least of a fixed random number each, so that neither order nor number of processes matters."""

    def __init__(self, max_per_class: int | None, max_bytes: int | None, num_classes: int | None, seed: int) -> None:
        self.max_per_class, self.max_bytes, self.num_classes, self.seed = max_per_class, max_bytes, num_classes, seed
        self.rows: dict[str, list[Tensor]] = {}
        self.layers: list[str] = []
        self.held = self.seen = 0

    def add(self, features: dict[str, Tensor], labels: Tensor, logits: Tensor, index: Tensor) -> None:
        probability, predicted = logits.softmax(1).max(1)
        self.num_classes = self.num_classes or logits.shape[1]
        labels = torch.where((labels >= 0) & (labels < self.num_classes), labels, -1)
        row = {f"x/{name}": x.cpu() for name, x in features.items()}
        row |= {"labels": labels, "predicted": predicted.cpu(), "confidence": probability.cpu(), "index": index}
        for name, value in row.items():
            self._check_width(name, value)
            self.rows.setdefault(name, []).append(value)
        self.held += len(labels)
        self.seen += len(labels)
        quota = self.quota()
        if quota is not None and self.held > 1.25 * quota * self.num_classes:
            self._shrink(quota)

    def quota(self) -> int | None:
        """Return how many samples of a class may be kept, `None` for all."""
        bounds = [] if self.max_per_class is None else [self.max_per_class]
        if self.max_bytes is not None:
            bytes_a_row = 4 * sum(parts[0].shape[1] for name, parts in self.rows.items() if name.startswith("x/"))
            bounds.append(max(self.max_bytes // max(bytes_a_row * (self.num_classes or 1), 1), 2))
        return min(bounds) if bounds else None

    def joined(self, device: torch.device, *, keep_unlabelled: bool) -> Collected:
        """Join what all processes hold, in the order of the data."""
        quota = self.quota() if self.rows else None
        table = {name: torch.cat(parts) for name, parts in self.rows.items()}
        seen = self.seen
        if world_size() > 1:
            table, seen = _gathered(table, seen, device)
        if not table:
            empty = torch.zeros(0, dtype=torch.int64)
            return Collected({}, empty, empty, empty, empty, 0, 0, 0)
        dropped = 0
        if not keep_unlabelled:
            known = table["labels"] >= 0
            dropped = int((~known).sum())
            table = {name: value[known] for name, value in table.items()}
            if quota is not None:
                table = _fewer(table, quota, self.seed)
        order = table["index"].argsort(stable=True)
        table = {name: value[order] for name, value in table.items()}
        features = {name[2:]: table.pop(name) for name in list(table) if name.startswith("x/")}
        left_out = seen - dropped - len(order) if not keep_unlabelled else 0
        return Collected(features, **table, num_classes=self.num_classes or 0, dropped=dropped, left_out=left_out)

    def _shrink(self, quota: int) -> None:
        table = _fewer({name: torch.cat(parts) for name, parts in self.rows.items()}, quota, self.seed)
        self.rows = {name: [value] for name, value in table.items()}
        self.held = len(table["labels"])

    def _check_width(self, name: str, value: Tensor) -> None:
        first = self.rows[name][0] if name in self.rows else value
        if first.shape[1:] != value.shape[1:]:
            raise ShapeMismatch(
                f"The layer {name[2:]!r} gave {value.shape[1]} features per sample, and {first.shape[1]} before. "
                f"Inputs of one size are needed, or pool='mean'."
            )


def _fewer(table: dict[str, Tensor], quota: int, seed: int) -> dict[str, Tensor]:
    """Keep of each class the samples with the least random numbers."""
    labels, chance = table["labels"], _mixed(table["index"], seed)
    order = chance.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels + 1)
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order] + 1]
    kept = order[place < quota].sort().values
    return {name: value[kept] for name, value in table.items()}


def _mixed(index: Tensor, seed: int) -> Tensor:
    """Return a well mixed number for each index (the finaliser of splitmix64)."""
    offset = (seed + 1) * -7046029254386353131 % 2**64  # all arithmetic is modulo 2^64, and signed
    z = index + (offset - 2**64 if offset >= 2**63 else offset)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _gathered(table: dict[str, Tensor], seen: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Return the rows of all processes; one that has none takes part with the others' names."""
    import torch.distributed as dist

    described: list[Any] = [None] * world_size()
    dist.all_gather_object(described, ({k: (tuple(v.shape[1:]), v.dtype) for k, v in table.items()}, seen))
    names: dict[str, Any] = next((shapes for shapes, _ in described if shapes), {})
    joined = {}
    for name, (shape, dtype) in names.items():
        own = table.get(name, torch.zeros(0, *shape, dtype=dtype))
        longest = max(gather_sizes(len(own), device))
        pieces = [
            gather_rows(own[start : start + _ROWS_SENT].to(device)).cpu() for start in range(0, longest, _ROWS_SENT)
        ]
        joined[name] = torch.cat(pieces) if pieces else own
    return joined, sum(count for _, count in described)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _sized(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, (tuple, list)):
        for value in item:
            yield from _tensors(value)
