"""Random numbers of a training batch that depend on where it stands in the training, and on nothing before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_methods.core.gather import rank
from lightning_methods.errors import InvalidArgument


class StepSeed:
    """Seeds torch's generators for the time of each training batch, and puts their states back afterwards.

    torch's own generators are used, since activation checkpointing and compiled code repeat the numbers of these alone.
    Without a seed nothing happens.

    Args:
        seed: a number from 0 on, or `None`.

    Raises:
        InvalidArgument: for another seed.
    """

    def __init__(self, seed: int | None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InvalidArgument(f"seed={seed!r}: a whole number from 0 on is needed, or None.")
        self.seed = seed

    @contextmanager
    def step(self, trainer: Any, module: Any, batch_idx: int) -> Iterator[None]:
        """Draw the numbers of one batch from the seed, this rank, the epoch and the batch."""
        if self.seed is None:
            yield
            return
        on_cuda = module.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state(module.device) if on_cuda else None
        place = np.random.SeedSequence([self.seed, rank(), trainer.current_epoch, batch_idx])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], module.device)
