"""What runs in processes of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_methods.augmented_dropout import AugmentedDropout
from tests.support.training import TinyModule, fit, quiet_trainer


class Watched(TinyModule):
    """Keeps what its dropout left of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.kept: list[torch.Tensor] = []

    def layers(self, x):
        if self.training:
            self.kept.append(self.drop(torch.ones(64)).detach().bool())
        return super().layers(self.drop(x))


def seeded() -> dict[str, Any]:
    """Train with DDP and a seed."""
    with tempfile.TemporaryDirectory() as folder:
        module = Watched()
        torch.manual_seed(0)
        callback = AugmentedDropout(ratio=0.5, seed=7, compare_every_n_steps=2)
        trainer = quiet_trainer(Path(folder), callbacks=[callback], strategy="ddp", devices=2)
        fit(trainer, module)
        shown = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"module": dict(module.state_dict()), "kept": module.kept, "shown": shown}
