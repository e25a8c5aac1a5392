"""The labels of what is trained on, from the dataset where it gives them, else from its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_methods.core.batches import Selector, targets_of
from lightning_methods.core.gather import all_sum, world_size
from lightning_methods.core.passes import batches
from lightning_methods.errors import BatchFormat, InvalidArgument, UnsupportedTraining
from lightning_methods.importance_weighting.sampler import DistributedWeightedSampler

_IGNORED = -100  # the label that the losses of torch leave out if they are not told otherwise


def dataset_labels(dataset: Any) -> Tensor | None:
    """Return the class of every item without reading the items, or `None` where the dataset does not tell.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset_labels(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        tensor([0, 1, 1])
    """
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    found = getattr(dataset, "targets", None)
    if found is None or callable(found):
        found = getattr(dataset, "labels", None)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        found = dataset.tensors[1]
    if found is None or callable(found):
        if not isinstance(dataset, Subset):
            return None
        inner = dataset_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    try:
        labels = torch.as_tensor(found).cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not labels.is_floating_point() and not labels.is_complex()
    return labels.long() if whole and labels.shape == (len(dataset),) else None


def train_loader(trainer: Any, purpose: str) -> Any:
    """Return the one training loader of a running fit.

    Raises:
        UnsupportedTraining: if there are several.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, (list, tuple, dict)):
        raise UnsupportedTraining(f"There are {len(loader)} training loaders; {purpose} needs one.")
    return loader


def class_counts(trainer: Any, pl_module: Any, labels: Selector) -> Tensor:
    """Return how many samples each class has in the training set, over all ranks.

    Raises:
        BatchFormat: if neither dataset nor batches tell.
        InvalidArgument: for labels that are no whole numbers from 0.
    """
    loader = train_loader(trainer, "counting the classes")
    found = dataset_labels(getattr(loader, "dataset", None)) if labels is None else None
    if found is not None:
        found = found[found != _IGNORED]
        _check(found)
        return torch.bincount(found).double()
    counts = torch.zeros(0, dtype=torch.float64)
    for batch in epoch_batches(trainer, pl_module, "counting the classes", "class_counts="):
        targets = targets_of(batch, labels)
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise BatchFormat("The targets of a batch are no whole numbers; give class_counts=, or the weights.")
        targets = targets[targets != _IGNORED]
        if not targets.numel():
            continue
        _check(targets)
        own = torch.bincount(targets.flatten().cpu()).double()
        size = max(len(own), len(counts))
        counts = torch.nn.functional.pad(counts, (0, size - len(counts)))
        counts = counts + torch.nn.functional.pad(own, (0, size - len(own)))
    size = int(_largest(len(counts), pl_module.device))
    if not size:
        _check(counts)
    return all_sum(torch.nn.functional.pad(counts, (0, size - len(counts))).to(pl_module.device)).cpu()


def _largest(number: int, device: Any) -> int:
    """Return the largest of the ranks' numbers."""
    from torch import distributed as dist

    x = torch.tensor([number], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def _check(labels: Tensor) -> None:
    if not labels.numel() or int(labels.min()) < 0:
        raise InvalidArgument(
            f"The training labels {'are none' if not labels.numel() else f'go down to {int(labels.min())}'}; whole "
            f"numbers from 0 are needed. Give class_counts= or the weights as numbers."
        )


def epoch_batches(trainer: Any, pl_module: Any, purpose: str, instead: str) -> Any:
    """Return the batches of an extra pass over the training data, before or between epochs.

    Raises:
        UnsupportedTraining: for loaders that such a pass would disturb or never end.
    """
    loader = train_loader(trainer, purpose)
    try:
        len(loader)
    except (TypeError, NotImplementedError) as error:
        raise UnsupportedTraining(
            f"The training loader has no length, so {purpose} in a pass over it might never end. Give {instead}."
        ) from error
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        raise UnsupportedTraining(
            f"The training loader has persistent workers, whose running epoch {purpose} would disturb. Give {instead}, "
            f"or set persistent_workers=False."
        )
    return batches(trainer, pl_module, "train", description=f"ImportanceWeighting: {purpose}")


def item_labels(dataset: Any, labels: Selector) -> Tensor:
    """Return the class of every item, read one by one where the dataset does not tell.

    Raises:
        BatchFormat: if an item has no label that could be found.
    """
    found = dataset_labels(dataset) if labels is None else None
    if found is None:
        found = torch.tensor([int(targets_of(dataset[i], labels)) for i in range(len(dataset))], dtype=torch.long)
    _check(found)
    return found


def draw_by_weight(trainer: Any, table: Tensor, labels: Selector) -> tuple[Any, Any] | None:
    """Let the training loader draw samples by the weights of their classes.

    Returns:
        The batch sampler that was changed, and the sampler that it had; `None` if that was done before.

    Raises:
        UnsupportedTraining: for a loader whose sampler cannot be replaced.
        InvalidArgument: for a label without a weight.
    """
    loader = train_loader(trainer, "mode='sampler'")
    batch_sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or type(batch_sampler) is not BatchSampler:
        raise UnsupportedTraining(
            "mode='sampler' needs a DataLoader of a map-style dataset with a batch_size. Give the loader a "
            "DistributedWeightedSampler yourself, or use mode='auto'."
        )
    try:
        len(loader.dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise UnsupportedTraining(
            "mode='sampler' needs a dataset with a length and random access; a stream has none. Use mode='auto'."
        ) from error
    before = batch_sampler.sampler
    if isinstance(before, DistributedWeightedSampler):
        return None
    found = item_labels(loader.dataset, labels)
    if int(found.max()) >= len(table):
        raise InvalidArgument(f"The dataset holds the label {int(found.max())}, and there are {len(table)} weights.")
    drawn = len(before) * world_size()  # type: ignore[arg-type]
    # the seed that seed_everything set on all ranks alike
    sampler = DistributedWeightedSampler(table[found], drawn, seed=torch.initial_seed() % 2**31)
    sampler.set_epoch(trainer.current_epoch)
    batch_sampler.sampler = sampler
    if loader.num_workers:
        # its workers were told the first indices already, when Lightning made the iterator
        fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
        if fetcher is None:
            raise UnsupportedTraining("mode='sampler' cannot restart the workers of the loader; use num_workers=0.")
        iter(fetcher)
    return batch_sampler, before
