"""All training samples of a datamodule as two tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_methods.core.batches import inputs_of, targets_of
from lightning_methods.errors import BatchFormat


def samples_of(datamodule: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of one pass over the training loader.

    Args:
        datamodule: any LightningDataModule whose batches stack.

    Raises:
        BatchFormat: if inputs or targets are no tensors, or there is no batch.
    """
    batches = [(inputs_of(batch), targets_of(batch)) for batch in datamodule.train_dataloader()]
    if not batches or not all(isinstance(part, Tensor) for batch in batches for part in batch):
        raise BatchFormat("The training loader of the datamodule must give batches of input and target tensors.")
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return inputs, targets
