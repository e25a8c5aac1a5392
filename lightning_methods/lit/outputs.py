"""What networks return, read: logits, and how good they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_methods.errors import BatchFormat
from lightning_methods.lit.functional import IGNORED
from lightning_methods.lit.sections import first_tensor


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a network returned: under `logits`, or the first tensor."""
    logits = getattr(output, "logits", None)
    tensor = logits if isinstance(logits, Tensor) else first_tensor(output)
    if tensor is None:
        raise BatchFormat(f"A network returned a {type(output).__name__} without a tensor; logits are needed.")
    return tensor


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of samples, for exact epoch means in `log`."""
    tensor = first_tensor((args, kwargs))
    return len(tensor) if tensor is not None and tensor.ndim else 1


def accuracy(stage: str, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the share of right predictions under its key; nothing where targets are no class indices."""
    if target.is_floating_point() or target.ndim != logits.ndim - 1:
        return {}
    counted = target != IGNORED
    right = (logits.detach().argmax(1) == target) & counted
    return {f"{stage}/accuracy": right.sum() / counted.sum().clamp(min=1)}


def agreement(logits: Tensor, taught: Tensor) -> Tensor:
    """Return the share of samples for which two networks predict the same class."""
    return (logits.argmax(1) == taught.argmax(1)).float().mean()
