"""Inputs and targets of any batch: tuple, dict, named tuple, dataclass, PyG `Data`, or whatever a function can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_methods.errors import BatchFormat, did_you_mean

Selector = int | str | Callable[[Any], Any] | None

_INPUT_NAMES = (
    "input",
    "inputs",
    "x",
    "image",
    "images",
    "img",
    "pixel_values",
    "input_ids",
    "features",
    "data",
    "feat",
)
_TARGET_NAMES = ("label", "labels", "y", "target", "targets", "class", "classes")


def inputs_of(batch: Any, selector: Selector = None) -> Any:
    """Return the inputs of a batch.

    Args:
        batch: what the dataloader gave.
        selector: index, key or attribute, or a function of the batch; `None` takes item 0 of a tuple or list, a usual
            key (`x`, `image`, `inputs`, ...) of a dict or object, and a tensor as it is.

    Raises:
        BatchFormat: if there is no such thing, with what the batch held.

    Example:
        >>> import torch
        >>> inputs_of({"image": torch.ones(2, 3), "label": torch.tensor([0, 1])}).shape
        torch.Size([2, 3])
    """
    if selector is None and isinstance(batch, Tensor):
        return batch
    return _item_of(batch, selector, position=0, names=_INPUT_NAMES, role="inputs")


def targets_of(batch: Any, selector: Selector = None) -> Any:
    """Return the targets of a batch.

    Args:
        batch: what the dataloader gave.
        selector: index, key or attribute, or a function of the batch; `None` takes item 1 of a tuple or list and a
            usual key (`y`, `label`, `targets`, ...) of a dict or object.

    Raises:
        BatchFormat: if there is no such thing, with what the batch held.

    Example:
        >>> import torch
        >>> targets_of((torch.ones(2, 3), torch.tensor([0, 1])))
        tensor([0, 1])
    """
    return _item_of(batch, selector, position=1, names=_TARGET_NAMES, role="targets")


def mask_of(batch: Any, selector: Selector) -> Tensor | None:
    """Return which positions of padded sequences are real, or `None` without a selector.

    Args:
        batch: what the dataloader gave.
        selector: index, key or attribute, or a function of the batch.

    Raises:
        BatchFormat: if there is no such thing, or it is no tensor, with what the batch held.

    Example:
        >>> import torch
        >>> mask_of({"ids": torch.tensor([[5, 6, 0]])}, lambda batch: batch["ids"] != 0)
        tensor([[ True,  True, False]])
    """
    if selector is None:
        return None
    mask = _item_of(batch, selector, position=0, names=(), role="mask")
    if not isinstance(mask, Tensor):
        raise BatchFormat(
            f"The mask is a {type(mask).__name__}; a tensor (B, T) is needed, 1 where a position is real."
        )
    return mask


def batch_size_of(targets: Any) -> int:
    """Return the number of samples, for exact epoch means in `log`."""
    return len(targets) if isinstance(targets, Tensor) and targets.ndim else 1


def describe_batch(batch: Any) -> str:
    """Return in words what a batch holds, for error messages."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and {batch.dtype}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with " + ", ".join(f"{k!r}: {_short(v)}" for k, v in batch.items())
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}: " + ", ".join(_short(v) for v in batch)
    fields = {k: getattr(batch, k, None) for k in _attributes(batch)}
    return f"a {type(batch).__name__} with " + (
        ", ".join(f"{k}: {_short(v)}" for k, v in fields.items()) or "no fields"
    )


def _item_of(batch: Any, selector: Selector, *, position: int, names: tuple[str, ...], role: str) -> Any:
    if callable(selector):
        found = selector(batch)
    elif selector is not None:
        found = _selected(batch, selector, role)
    else:
        found = _usual(batch, position, names)
    if found is None:
        raise BatchFormat(
            f"No {role} were found in the batch, which is {describe_batch(batch)}. "
            f"Say where they are: an index, a key, or a function of the batch."
        )
    return found


def _selected(batch: Any, selector: int | str, role: str) -> Any:
    try:
        if isinstance(selector, int) or isinstance(batch, Mapping):
            return batch[selector]
        return getattr(batch, selector)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        hint = did_you_mean(str(selector), [str(k) for k in _keys(batch)])
        raise BatchFormat(
            f"The {role} were said to be under {selector!r}, but the batch is {describe_batch(batch)}. {hint}"
        ) from error


def _usual(batch: Any, position: int, names: tuple[str, ...]) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[name] for name in names if name in batch), None)
    if isinstance(batch, (tuple, list)):
        fields = getattr(batch, "_fields", ())
        named = next((getattr(batch, name) for name in names if name in fields), None)
        if named is not None:
            return named
        return batch[position] if len(batch) > position else None
    if isinstance(batch, Tensor):
        return None
    return next((v for v in (getattr(batch, name, None) for name in names) if v is not None), None)


def _keys(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch)
    if isinstance(batch, (tuple, list)):
        return [*getattr(batch, "_fields", ()), *range(len(batch))]
    return _attributes(batch)


def _attributes(batch: Any) -> list[str]:
    keys = getattr(batch, "keys", None)  # PyG's Data lists its fields so, as a method or (older) as a property
    if callable(keys):
        return [str(k) for k in keys()]
    return [str(k) for k in keys or getattr(batch, "__dict__", {}) if not str(k).startswith("_")]


def _short(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
