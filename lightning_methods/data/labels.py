"""Finding the labels of a dataset, and replacing the label of one item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_methods.errors import BatchFormat, InvalidArgument

_KEYS = ("label", "labels", "target", "targets", "y")


def find_labels(dataset: Dataset, *, true: bool = False) -> Tensor:
    """Return the class of every example of a map-style dataset.

    Looked for in this order: attribute `targets` or `labels` (unless a `target_transform` changes them later),
    `TensorDataset`, `Subset` and `ConcatDataset` of those, and else by one pass over the items, whose label is their
    second element or the entry `label`, `labels`, `target`, `targets` or `y`.

    Args:
        dataset: anything with `__getitem__` and `__len__`.
        true: prefer the labels before any noise (`true_targets`) where the dataset knows them. Default False.

    Returns:
        (N,) int64 on the CPU.

    Raises:
        InvalidArgument: if the dataset is not map-style or its labels are not one whole number an example.
        BatchFormat: if an item has no label that could be found.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> find_labels(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        tensor([0, 1, 1])
    """
    if not hasattr(dataset, "__getitem__") or not _sized(dataset):
        raise InvalidArgument(
            f"{type(dataset).__name__} has no length and no random access. A map-style dataset is needed, with "
            "__getitem__ and __len__; a stream can be read into a list first."
        )
    labels = torch.as_tensor(_raw_labels(dataset, true)).cpu()
    n = len(dataset)  # type: ignore[arg-type]
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise InvalidArgument(
            f"The labels of {type(dataset).__name__} have shape {tuple(labels.shape)} and type {labels.dtype}. "
            f"One whole number for each of the {n} examples is needed."
        )
    return labels.long()


def _sized(dataset: Dataset) -> bool:
    try:
        len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _raw_labels(dataset: Any, true: bool) -> Any:
    if true and hasattr(dataset, "true_targets"):
        return dataset.true_targets
    if isinstance(dataset, Subset):
        return find_labels(dataset.dataset, true=true)[torch.as_tensor(dataset.indices, dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([find_labels(part, true=true) for part in dataset.datasets])
    if getattr(dataset, "target_transform", None) is None:
        for name in ("targets", "labels"):
            value = getattr(dataset, name, None)
            if value is not None and not callable(value):
                return value
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[1]
    return [int(item_label(dataset[i])) for i in range(len(dataset))]


def item_label(item: Any) -> Any:
    """Return the label of one item, a tuple `(input, label, ...)` or a mapping."""
    return item[_label_place(item)]


def with_label(item: Any, label: int) -> Any:
    """Return a copy of `item` that bears `label`, of the same type as the label it replaces."""
    place = _label_place(item)
    old = item[place]
    new = old.new_tensor(label) if isinstance(old, Tensor) else label
    if isinstance(item, Mapping):
        return {**item, place: new}
    values = [*item[:place], new, *item[place + 1 :]]
    if hasattr(item, "_make"):  # a named tuple
        return item._make(values)
    return type(item)(values)


def _label_place(item: Any) -> Any:
    if isinstance(item, Mapping):
        for key in _KEYS:
            if key in item:
                return key
        raise BatchFormat(f"An item holds the keys {sorted(map(str, item))}. Its label is looked for under {_KEYS}.")
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return 1
    raise BatchFormat(
        f"An item of type {type(item).__name__} holds no label. Items (input, label, ...) or mappings are needed; "
        "a dataset may also give its labels as the attribute `targets`."
    )


def count_classes(labels: Tensor, num_classes: int | None) -> int:
    """Return the number of classes, having checked that the labels are 0 .. C-1."""
    if len(labels) == 0:
        raise InvalidArgument("The dataset is empty. At least one example is needed.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise InvalidArgument(
            f"The labels run from {low} to {high} with num_classes={num_classes}. Whole numbers from 0 to "
            "num_classes - 1 are needed."
        )
    return high + 1 if num_classes is None else num_classes
