"""A copy of the module that trains on the same batches without weights, to compare with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS
from torchmetrics import Metric

from lightning_methods.core.gather import all_sum, world_size
from lightning_methods.core.losses import LossHub
from lightning_methods.core.passes import preserved
from lightning_methods.errors import UnsupportedTraining


class Twin:
    """Trains a copy of a module with a copy of its optimizer: same start, batches, random numbers, learning rates.

    The copy runs the user's own `training_step`, without the weights and without terms that other callbacks add.
    Nothing that it logs is shown, and no random number of the training is used up. It costs what the module costs.

    Raises:
        UnsupportedTraining: for manual optimisation, several optimizers, and LBFGS.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        optimizers = list(trainer.optimizers)
        if not module.automatic_optimization or len(optimizers) != 1 or isinstance(optimizers[0], LBFGS):
            raise UnsupportedTraining(
                "twin=True trains a copy as Lightning would: automatic optimisation with one optimizer, and not LBFGS, "
                "is needed. Leave the twin out."
            )
        # together, so that the copied optimizer holds the copied parameters
        self.module, self.optimizer = copy.deepcopy((module, optimizers[0]))
        self.module.trainer = trainer
        for name in ("log", "log_dict"):
            object.__setattr__(self.module, name, _nothing)
        self.module.zero_grad()
        self._random: Any = None
        self._settings: list[dict[str, Any]] | None = None

    def remember(self) -> None:
        """Keep the random state before the module's own step."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._random = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None)

    def due(self, optimizer: Any) -> None:
        """Take note that the module's optimizer steps now, and with which settings."""
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def step(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Do with the copy what was done with the module."""
        precision = trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        for own, theirs in zip(self.module.modules(), module.modules(), strict=True):
            own.training = theirs.training
        with preserved(self.module):
            torch.set_rng_state(self._random[0])
            if self._random[1] is not None:
                torch.cuda.set_rng_state_all(self._random[1])
            with torch.enable_grad(), precision.train_step_context():
                loss = self._loss(batch, batch_idx)
            if loss is not None:
                (loss * (scale / trainer.accumulate_grad_batches)).backward()
        if self._settings is not None:
            self._optimize(trainer, scale)

    def _loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        step = self.module.training_step
        names = getattr(type(self.module).training_step, "__code__", None)
        takes_index = names is None or names.co_argcount > 2 or bool(names.co_flags & 4)
        output = step(batch, batch_idx) if takes_index else step(batch)
        loss = output.get("loss") if isinstance(output, dict) else output
        return loss if isinstance(loss, Tensor) and loss.requires_grad else None

    def _optimize(self, trainer: Any, scale: float) -> None:
        for group, settings in zip(self.optimizer.param_groups, self._settings or [], strict=True):
            group.update(settings)
        self._settings = None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            if world_size() > 1:
                gradient.copy_(all_sum(gradient) / world_size())
            if scale != 1:
                gradient.div_(scale)
        if all(bool(torch.isfinite(g).all()) for g in gradients) or scale == 1:
            self.module.configure_gradient_clipping(
                self.optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
            self.optimizer.step()
        self.optimizer.zero_grad()

    def end_epoch(self) -> None:
        """Forget what metrics of the copy gathered, which nobody computes."""
        for part in self.module.modules():
            if isinstance(part, Metric):
                part.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer."""
        state = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        return {"module": state, "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


def has_terms(module: Any) -> bool:
    """Tell whether other callbacks add terms to the loss of a module, which its twin does not have."""
    hub = vars(module).get("training_step")
    return isinstance(hub, LossHub) and bool(hub.participants)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for `log` in the copy."""
