"""The two phases of LIT inside one fit: which epoch belongs to which, and the fresh start between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, ReduceLROnPlateau

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning

# the epochs of the paper's code on CIFAR-10: both phases, and where the learning rate falls within each
PAPER_EPOCHS = (175, 125)
PAPER_STEPS = (100 / 175, 55 / 125)


@dataclass(frozen=True)
class PhasePlan:
    """How many epochs each phase lasts.

    Attributes:
        lit: epochs of phase 1, sections on the teacher's inputs with the ends frozen.
        finetune: epochs of phase 2, knowledge distillation of the whole student.
    """

    lit: int
    finetune: int

    def phase_of(self, epoch: int) -> int:
        """Return the phase, 1 or 2, of an epoch.

        Example:
            >>> plan = PhasePlan(2, 1)
            >>> [plan.phase_of(epoch) for epoch in range(4)]
            [1, 1, 2, 2]
        """
        return 1 if epoch < self.lit else 2


def plan_phases(lit_epochs: int | None, finetune_epochs: int | None, max_epochs: int | None) -> PhasePlan:
    """Return the plan for a training of `max_epochs`.

    Args:
        lit_epochs: epochs of phase 1, or `None`.
        finetune_epochs: epochs of phase 2, or `None`.
        max_epochs: of the trainer; `None` or -1 where it has no such limit.

    With neither given, the training is divided as in the paper's code, 175 to 125. With one given, the other is the
    rest.

    Raises:
        InvalidArgument: if a number is negative, or the trainer has no limit to divide.

    Example:
        >>> plan_phases(None, None, 300), plan_phases(10, None, 12)
        (PhasePlan(lit=175, finetune=125), PhasePlan(lit=10, finetune=2))
    """
    for name, value in (("lit_epochs", lit_epochs), ("finetune_epochs", finetune_epochs)):
        if value is not None and value < 0:
            raise InvalidArgument(f"{name}={value}: a number of epochs, at least 0, is needed, or None.")
    limit = None if max_epochs is None or max_epochs < 0 else max_epochs
    if limit is None:
        if lit_epochs is None:
            raise InvalidArgument(
                "The Trainer has no max_epochs to divide into phases. Give lit_epochs, or max_epochs."
            )
        return PhasePlan(lit_epochs, finetune_epochs or 0)
    if lit_epochs is None:
        lit = round(limit * PAPER_EPOCHS[0] / sum(PAPER_EPOCHS)) if finetune_epochs is None else limit - finetune_epochs
        lit_epochs = max(lit, 0)
    if finetune_epochs is None:
        finetune_epochs = max(limit - lit_epochs, 0)
    planned = lit_epochs + finetune_epochs
    if planned != limit:
        cut = "phase 1" if lit_epochs > limit else "phase 2"
        change = f"{cut} is cut short" if planned > limit else "phase 2 goes on to the end"
        warnings.warn(
            f"lit_epochs={lit_epochs} and finetune_epochs={finetune_epochs} make {planned} epochs, the Trainer runs "
            f"{limit}: {change}. Set max_epochs={planned}.",
            LightningMethodsWarning,
        )
    return PhasePlan(lit_epochs, finetune_epochs)


def paper_sgd(params: Iterable[Any]) -> Optimizer:
    """Return the optimizer of the paper's code: SGD, learning rate 0.1, momentum 0.9, weight decay 1e-4.

    Args:
        params: parameters or groups of them.
    """
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4)


def paper_steps(optimizer: Optimizer, epochs: int, phase: int) -> LRScheduler:
    """Return the schedule of the paper's code: a tenth after 100 of 175 epochs of phase 1, 55 of 125 of phase 2.

    Args:
        optimizer: what to schedule.
        epochs: of the phase.
        phase: 1 or 2.
    """
    milestone = round(epochs * PAPER_STEPS[phase - 1])
    return MultiStepLR(optimizer, [milestone] if milestone > 0 else [], gamma=0.1)


def scheduled(scheduler: Any) -> dict[str, Any]:
    """Return what Lightning wants to know of a scheduler that steps once an epoch."""
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    watched = {"monitor": getattr(scheduler, "monitor", "val/loss")} if plateau else {}
    return {"scheduler": scheduler, "interval": "epoch", **watched}


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate; groups with another one than the first keep their ratio to it.

    Args:
        optimizer: what to change.
        lr: the learning rate of its first group.
    """
    groups = optimizer.param_groups
    before = [group.pop("initial_lr", group["lr"]) for group in groups]
    for group, own in zip(groups, before, strict=True):
        group["lr"] = lr * (own / before[0])


def restart(trainer: Any, former: Any, lr: float, schedule: Callable[[Optimizer], Any]) -> None:
    """Start the trainer's optimizer anew: no momentum, another learning rate, another schedule.

    Args:
        trainer: the running trainer, with one optimizer and one scheduler.
        former: the scheduler of the phase that ends; where another callback, such as weight averaging, has put its own
            into its place, learning rates are left to that one.
        lr: the learning rate.
        schedule: makes the scheduler.
    """
    (optimizer,) = trainer.optimizers
    optimizer.state.clear()
    if all(config.scheduler is not former for config in trainer.lr_scheduler_configs):
        return
    set_learning_rate(optimizer, lr)
    settings = scheduled(schedule(optimizer))
    (config,) = trainer.lr_scheduler_configs
    config.scheduler, config.monitor = settings["scheduler"], settings.get("monitor")
    config.reduce_on_plateau = isinstance(config.scheduler, ReduceLROnPlateau)
