"""What two processes train."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_methods.lit import LITDistiller
from tests.lit.conftest import dense, distiller, fit, loader

CASES: dict[str, dict[str, Any]] = {
    "sections alone": {"beta": 0.0},
    "both": {"beta": 0.5},
    "distillation alone": {"beta": 1.0},
    "adapters": {"adapters": "conv1x1", "input_shape": [6]},
    "fitnets": {"mode": "fitnets", "adapters": "conv1x1", "input_shape": [6]},
    "sequential": {"sequential_backward": True},
}


class Halves:
    """This rank's half of each batch; lazily, since the rank is known when the fit has begun."""

    def __len__(self) -> int:
        return len(loader())

    def __iter__(self) -> Iterator[Any]:
        for x, y in loader():
            rows = slice(dist.get_rank(), None, 2)
            yield x[rows], y[rows]


def made(case: str) -> LITDistiller:
    """Return the module of a case, the same one in every process."""
    settings = {"lit_epochs": 2, **CASES[case]}
    if "adapters" not in settings:
        return distiller(**settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LITDistiller(dense(3), dense(1, width=6), ["layer1", "layer2"], **settings)


def distributed() -> dict[str, Any]:
    """Train every case with DDP; every process runs this."""
    states = {}
    for case in CASES:
        module = made(case)
        with tempfile.TemporaryDirectory() as folder:
            settings = {"strategy": "ddp", "devices": 2, "limit_val_batches": 0, "max_epochs": 3}
            fit(module, Path(folder), data=Halves(), use_distributed_sampler=False, **settings)
        states[case] = {k: v.clone() for k, v in module.state_dict().items()}
    return states
