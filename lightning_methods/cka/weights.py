"""The weights of a network, from itself or from a file."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy on the CPU of all parameters and buffers.

    Args:
        module: whose weights.
    """
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def weights_in(path: str) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint of Lightning or in a bare file of weights, read without pickle.

    Args:
        path: the file.

    Raises:
        InvalidArgument: if there is none, or it holds no weights that can be read so.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidArgument(f"{path} cannot be read as a checkpoint of tensors: {reason[0]}") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InvalidArgument(f"{path} holds no weights: neither 'state_dict' nor a dict of tensors.")
    return weights
