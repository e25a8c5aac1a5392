"""What two processes train."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

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
            # the sampler deals the 48 rows out in turns; batches of 8 on two ranks are those of 16 on one
            data = loader(batch=8)
            settings = {"strategy": "ddp", "devices": 2, "limit_val_batches": 0, "max_epochs": 3}
            fit(module, Path(folder), data=data, **settings)
        states[case] = {k: v.clone() for k, v in module.state_dict().items()}
    return states
