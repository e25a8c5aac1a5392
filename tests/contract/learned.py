"""What the learned optimizer trains, and its own meta-training, for the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.learned_optimizer import LearnedOptimizer, MetaTraining, ModuleTask
from tests.support.training import BATCH, Settings, TinyModule


class LearnedModule(TinyModule):
    """The tiny module with a learned optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return LearnedOptimizer(self.parameters())


def made_task() -> ModuleTask:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(30, 4, generator=generator)
    return ModuleTask(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), inputs, torch.arange(30) % 2)


class MetaModule(MetaTraining):
    """Meta-training on a tiny task; the rows of the Trainer's loader are turns to take."""

    def __init__(self, settings: Settings | None = None) -> None:
        self_settings = settings or Settings()
        pairs = 2 if self_settings.divisor is None else 2 * int(self_settings.divisor) // BATCH
        super().__init__(
            [made_task()],
            hidden_size=4,
            num_pairs=pairs,
            unroll=2,
            horizon=4,
            eval_steps=3,
            eval_seeds=1,
            outer_lr=0.05,
        )
        self.settings = self_settings
        self.automatic_optimization = not self_settings.manual

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() * self.theta.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.settings.during_step is not None:
            self.settings.during_step(self)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.settings.during_validation is not None:
            self.settings.during_validation(self)
        super().validation_step(batch, batch_idx)


class Unmoved(MetaModule):
    """The same with weights that stay where they are."""

    def _outer_step(self) -> Tensor:
        self.outer_step += 1
        return torch.zeros_like(self.theta)
