"""What an optimizer does: the size of its steps, the learning rate they amount to, and how they compare to Adam's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback
from lightning_methods.errors import InvalidArgument
from lightning_methods.report import curves, is_reporting, log_figure, log_table

_BETAS = (0.9, 0.999)
_COLUMNS = ("step_size", "relative_step", "learning_rate", "adam_cosine")


class _Before(NamedTuple):
    parameter: Tensor
    gradient: Tensor
    adam: Tensor


class LearnedOptimizerMonitor(Callback):
    r"""Watch the steps of any optimizer; it changes nothing.

    Logs, as means over an epoch, `learned_optimizer/step_size` (root mean square of the step),
    `learned_optimizer/relative_step` (over that of the parameters), `learned_optimizer/learning_rate`
    (:math:`\langle s, g \rangle / \langle g, g \rangle`: the learning rate of gradient descent that goes as far along
    the gradient), `learned_optimizer/adam_cosine` (to the step that Adam would take), and of a `LearnedOptimizer`
    `learned_optimizer/trust`, the share of the learned step that its guard allows. The figure
    `learned_optimizer/curves` and the table `learned_optimizer/tensors` follow at the end of the training.

    Args:
        every_n_steps: how often steps are measured. Adam's moments are followed at every step.
        log_prefix: first part of the keys.

    Raises:
        InvalidArgument: if `every_n_steps` is not positive.

    Example:
        >>> LearnedOptimizerMonitor(every_n_steps=10).every_n_steps
        10
    """

    def __init__(self, *, every_n_steps: int = 1, log_prefix: str = "learned_optimizer") -> None:
        if every_n_steps < 1:
            raise InvalidArgument(f"every_n_steps={every_n_steps}: a positive number is needed.")
        self.every_n_steps, self.prefix = every_n_steps, log_prefix
        self._clear()

    def _clear(self) -> None:
        self._moments: dict[str, Tensor] = {}
        self._steps = 0
        self._before: dict[str, _Before] = {}
        self._of_tensors: dict[str, list[float]] = {}
        # epoch -> sums of the measures, and how many
        self._epochs: dict[int, list[float]] = {}

    @property
    def state_key(self) -> str:
        """Return a key that differs where several watch one training."""
        return self._generate_state_key(prefix=self.prefix, every_n_steps=self.every_n_steps)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew, unless a training goes on."""
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self._clear()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Follow the gradients, and keep what is needed to measure the step."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in pl_module.named_parameters() if id(p) in own and p.grad is not None and p.numel()]
        self._steps += 1
        measured = (self._steps - 1) % self.every_n_steps == 0
        for name, p in named:
            assert p.grad is not None
            gradient = p.grad.detach().float()
            adam = self._adam(name, gradient)
            if measured:
                self._before[name] = _Before(p.detach().float().clone(), gradient.clone(), adam)

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        """Return Adam's direction after this gradient."""
        key = f"{name}/{len(gradient.shape)}"
        moments = self._moments.setdefault(key, gradient.new_zeros(2, *gradient.shape)).to(gradient.device)
        moments[0].lerp_(gradient, 1 - _BETAS[0])
        moments[1].lerp_(gradient.square(), 1 - _BETAS[1])
        self._moments[key] = moments
        # the factors that correct for the start are the same for all elements: of no matter for a cosine
        return moments[0] / (moments[1].sqrt() + 1e-8 * math.sqrt(1 - _BETAS[1] ** self._steps))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Measure the step that was taken."""
        if not self._before:
            return
        parameters = dict(pl_module.named_parameters())
        sums = torch.zeros(7, dtype=torch.float64)
        for name, before in self._before.items():
            own = _products(before, parameters[name].detach().float())
            sums += own
            self._of_tensors[name] = _measures(own)
        self._before = {}
        measured = _measures(sums)
        # added up by ourselves: an epoch that was resumed in has all of its steps
        so_far = self._epochs.get(trainer.current_epoch, [0.0] * (len(measured) + 1))
        self._epochs[trainer.current_epoch] = [a + b for a, b in zip(so_far, [*measured, 1.0], strict=True)]
        values = dict(zip(_COLUMNS, measured, strict=True))
        shares = [o.learned_share for o in trainer.optimizers if getattr(o, "guard", None) is not None]
        if shares:
            values["trust"] = float(min(shares))
        if not trainer.barebones:
            for name, value in values.items():
                pl_module.log(f"{self.prefix}/{name}", value, on_step=False, on_epoch=True, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the curves and write the table."""
        if not is_reporting(trainer) or not self._of_tensors:
            return
        rows = [[name, *values] for name, values in self._of_tensors.items()]
        log_table(trainer, f"{self.prefix}/tensors", ["tensor", *_COLUMNS], rows)
        epochs = sorted(self._epochs)
        means = [[x / self._epochs[e][-1] for x in self._epochs[e][:-1]] for e in epochs]
        size, relative, rate, _ = map(list, zip(*means, strict=True))
        lines = {"step size": (epochs, size), "relative step": (epochs, relative), "learning rate": (epochs, rate)}
        figure = curves(lines, title="What the optimizer does", x_label="epoch", y_label="mean over the epoch")
        log_figure(trainer, f"{self.prefix}/curves", figure)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and what was measured."""
        return {
            "moments": {name: x.clone() for name, x in self._moments.items()},
            "steps": self._steps,
            "tensors": {name: list(values) for name, values in self._of_tensors.items()},
            "epochs": {epoch: list(sums) for epoch, sums in self._epochs.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the moments and what was measured."""
        self._moments = {name: x.clone() for name, x in state_dict["moments"].items()}
        self._steps = state_dict["steps"]
        self._of_tensors = {name: list(values) for name, values in state_dict["tensors"].items()}
        self._epochs = {epoch: list(sums) for epoch, sums in state_dict["epochs"].items()}


def _products(before: _Before, after: Tensor) -> Tensor:
    """Return the squares and products of which all measures are made; they add up over tensors."""
    p, g, a = (x.double().flatten() for x in before)
    step = p - after.double().flatten()
    products = [step @ step, p @ p, step @ g, g @ g, step @ a, a @ a, torch.tensor(float(p.numel()))]
    return torch.stack([x.cpu().double() for x in products])


def _measures(sums: Tensor) -> list[float]:
    """Return the measures in the order of their columns; 0 where there is nothing to divide by."""
    step, own, along, gradient, by_adam, adam, count = sums.tolist()
    return [
        math.sqrt(step / count),
        math.sqrt(step / own) if own else 0.0,
        along / gradient if gradient else 0.0,
        by_adam / math.sqrt(step * adam) if step * adam > 0 else 0.0,
    ]
