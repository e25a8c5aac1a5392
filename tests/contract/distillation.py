"""Students and their teacher for the distilling methods, and the steps written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_methods.lit import LITDistiller
from lightning_methods.lit.functional import kd_loss
from tests.support.training import CLASSES, FEATURES, WIDTH, Settings, TinyModule

ALPHA, BETA, TEMPERATURE = 0.9, 0.6, 3.0
CHOICES = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE, "lit_epochs": 1}


class TinyNet(nn.Module):
    """Two sections, `first` and `second`, and a `head`."""

    def __init__(self, depth: int, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()
        noise = [nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)] if self.settings.stochastic else []
        self.first = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), *_deeper(depth), *noise)
        self.second = nn.Sequential(*_deeper(depth), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        if self.settings.checkpointing and torch.is_grad_enabled():
            return self.head(checkpoint(self.second, first, use_reentrant=False))
        return self.head(self.second(first))


def _deeper(depth: int) -> list[nn.Module]:
    return [layer for _ in range(depth - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]


def made_teacher() -> TinyNet:
    """Return the same teacher every time, without a draw from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return TinyNet(3).eval()


class StudentModule(TinyModule):
    """A module that is its own student, from the teacher's head on."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.head.load_state_dict(made_teacher().head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return super().layers(x)["head"]

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        return {"head": self(x)}


def lesson(teacher: TinyNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the sections of the teacher give, and its logits."""
    with torch.no_grad():
        t1 = teacher.first(x)
        t2 = teacher.second(t1)
        return t1, t2, teacher.head(t2)


def errors(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the sum of the sections' losses."""
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(given[0].dtype, torch.float32)
        return torch.stack([F.mse_loss(a.to(wide), b.to(wide)) for a, b in zip(given, wanted, strict=True)]).sum()


class _ByHand:
    """Phases written by hand: the head stands still in the first, the momentum is lost at its end."""

    def on_fit_start(self) -> None:
        teacher = self.trainer.precision_plugin.convert_module(made_teacher())
        object.__setattr__(self.student_by_hand, "taught_by", teacher)

    def on_fit_end(self) -> None:
        del self.student_by_hand.taught_by

    @property
    def phase_by_hand(self) -> int:
        return 1 if self.current_epoch < 1 else 2

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.trainer.global_step:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.phase_by_hand == 1:
            self.student_by_hand.head.zero_grad(set_to_none=True)


class StudentByHand(_ByHand, StudentModule):
    """The module's own loss as the hard term."""

    @property
    def student_by_hand(self) -> StudentModule:
        return self

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, **TinyModule.layers(self, x)}

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        loss = self.own_loss(layers["head"], y)
        t1, t2, taught = lesson(self.taught_by, layers["x"])
        first = self.phase_by_hand == 1
        regression = errors([layers["first"], self.second(t1)], [t1, t2]) if first else None
        with torch.autocast("cpu", enabled=False):
            share = BETA if first else 1.0
            soft = kd_loss(layers["head"], taught, alpha=0.0, temperature=TEMPERATURE) / TEMPERATURE**2
            term = share * (1 - ALPHA) * TEMPERATURE**2 * soft
            if regression is not None:
                term = term + (1 - BETA) * regression
            return loss + (term + (share * ALPHA - 1) * loss)


class DistilledModule(LITDistiller):
    """The distiller, with what a case asks of a module around it."""

    def __init__(self, settings: Settings | None = None) -> None:
        self_settings = settings or Settings()
        student = TinyNet(1, self_settings)
        super().__init__(made_teacher(), student, ["first", "second"], optimizer=sgd, scheduler=level, **CHOICES)
        self.finetune_lr, self.finetune_scheduler = 0.2, level
        self.settings = self_settings
        self.automatic_optimization = not self_settings.manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.settings.during_step is not None:
            self.settings.during_step(self)
        # all of its losses are means over the batch
        return loss if self.settings.divisor is None else loss * len(batch[1]) / self.settings.divisor

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.settings.during_validation is not None:
            self.settings.during_validation(self)
        super().validation_step(batch, batch_idx)


class DistilledByHand(_ByHand, DistilledModule):
    """The same student with a step of its own."""

    @property
    def student_by_hand(self) -> TinyNet:
        return self.student

    def _enter_phase(self) -> None:
        self._optimizer_phase = self.phase_by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        t1, t2, taught = lesson(self.student.taught_by, x)
        fed = self.student.second(t1) if self.phase_by_hand == 1 else None
        first = self.student.first(x)
        logits = self.student.head(self.student.second(first))
        total = kd_loss(logits, taught, y, alpha=ALPHA, temperature=TEMPERATURE)
        if fed is not None:
            total = BETA * total + (1 - BETA) * errors([first, fed], [t1, t2])
        return total if self.settings.divisor is None else total * len(y) / self.settings.divisor

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2, momentum=0.9)


def level(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class Untaught(DistilledModule):
    """The student on the labels alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.student(batch[0]), batch[1])

    def _enter_phase(self) -> None:
        pass
