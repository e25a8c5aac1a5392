"""What runs in processes of its own: meta-training divided among two."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_methods.learned_optimizer import MetaTraining, ModuleTask
from lightning_methods.learned_optimizer.samples import samples_of as samples

__all__ = ["distributed", "samples", "trained"]

FORMS: dict[str, dict[str, Any]] = {
    "merged": {"unroll": 3},
    "split": {"unroll": 3, "variance": "split"},
    "ema": {"unroll": 3, "variance": "ema"},
    "nres": {"unroll": 2, "horizon": 5, "estimator": "nres"},
    "pes": {"unroll": 2, "horizon": 5, "estimator": "pes"},
    "reparam": {"unroll": 3, "estimator": "reparam"},
}


def trained(pairs: int, **settings: Any) -> dict[str, Tensor]:
    """Return the weights after three outer steps of every form, with so many pairs a process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    found = {}
    for name, form in FORMS.items():
        task = ModuleTask(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), x, torch.arange(40) % 2)
        model = MetaTraining([task], hidden_size=4, **{"num_pairs": pairs, **form})
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            trainer = Trainer(
                max_steps=3,
                max_epochs=-1,
                accelerator="cpu",
                logger=False,
                limit_val_batches=0,
                default_root_dir=folder,
                **quiet,
                **settings,
            )
            trainer.fit(model)
        found[name] = model.theta.detach().clone()
    return found


def distributed() -> dict[str, Tensor]:
    """Train with half of the pairs in each of two processes."""
    return trained(2, strategy="ddp", devices=2)
