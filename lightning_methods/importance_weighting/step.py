"""The user's training step, run with its losses weighted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_methods.core.gather import all_sum
from lightning_methods.core.layers import match_layers
from lightning_methods.core.means import EpochMeans
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.importance_weighting.functions import thread
from lightning_methods.importance_weighting.interception import (
    GradientInterception,
    LossInterception,
    LossModule,
    intercept,
    loss_modules,
)
from lightning_methods.importance_weighting.weights import BatchWeights

_REMEDIES = (
    "Other ways to the same weights: mode='module' (loss modules with a `reduction`), mode='gradient' with head= (the "
    "layer that gives the logits), mode='sampler' (draws samples by weight)."
)


class WeightedStep:
    """Runs the steps of a fit with the weights in their losses, and refuses those in which nothing was weighted.

    Args:
        weights: what belongs to which sample.
        mode, head, select: see `ImportanceWeighting`.
        weights_of: from a batch to the weight of each of its samples and which of them count, for `"gradient"`.
    """

    def __init__(
        self,
        weights: BatchWeights,
        *,
        mode: str,
        head: str | None,
        select: int | str | None,
        weights_of: Callable[[Any], tuple[Tensor, Tensor]],
    ) -> None:
        self.weights, self.mode, self.head, self.select, self.weights_of = weights, mode, head, select, weights_of
        self.functions = LossInterception(weights) if mode in ("auto", "function") else None
        self.reset()
        self.leave()

    def reset(self) -> None:
        """Forget the calls of an earlier fit."""
        self._hits = self._steps = 0

    def leave(self) -> None:
        """Let go of the batch and of the module; harmless when called twice."""
        self.weights.end()
        self._modules: list[LossModule] | None = None

    def check(self, module: Any) -> None:
        """Refuse a module without the layer or loss module that the mode needs."""
        if self.mode == "gradient":
            match_layers(module, self.head or "")
        if self.mode == "module" and not self.loss_modules(module):
            raise UnsupportedTraining(
                f"mode='module' found no loss module with match={self.weights.match!r} in {type(module).__name__}: a "
                f"submodule called ...Loss, with `reduction`, is needed."
            )

    @property
    def module_match(self) -> str:
        """Which loss modules are weighted, where it is modules that are chosen."""
        return self.weights.match if self.mode == "module" else "auto"

    def loss_modules(self, module: Any) -> list[LossModule]:
        """Return the loss modules that are weighted as a whole."""
        found, match = loss_modules(module, all_of_them=self.mode == "module"), self.module_match
        if match not in ("auto", "all", "first"):
            found = {k: m for k, m in found.items() if match in (k, type(m.module).__name__)}
        return list(dict.fromkeys(found.values()))

    def run_step(self, module: Any, batch: Any, batch_idx: int, step: Callable[[], Any]) -> Any:
        """Run the user's step with its losses weighted."""
        weights = self.weights
        weights.begin(batch, first=batch_idx == 0)
        if weights.normalize == "batch":
            weights.deferred = module.automatic_optimization and module.trainer.accumulate_grad_batches > 1
        try:
            if self._modules is None or batch_idx == 0:  # to walk through all submodules costs more than the weights
                self._modules = self.loss_modules(module) if self.mode in ("auto", "module") else []
            if self._modules or self.functions is None:
                output = self._through_hooks(module, batch, step)
            else:
                before, thread.catcher = thread.catcher, self.functions
                try:
                    output = step()
                finally:
                    thread.catcher = before
            if not weights.hits or weights.deferred:
                self._check(module, output)
        finally:
            weights.end()
        self._hits, self._steps = self._hits + weights.hits, self._steps + 1
        return output

    def _through_hooks(self, module: Any, batch: Any, step: Callable[[], Any]) -> Any:
        hooks: list[Any] = []
        try:
            if self.mode == "gradient":
                ((_, layer),) = match_layers(module, self.head or "").items()
                hooks = [GradientInterception(layer, lambda x: self._factors(batch, x), self.select)]
                output = step()
                self.weights.hits = hooks[0].calls
                return output
            hooks = [intercept(m, self.weights, self.functions, self.module_match) for m in self._modules or ()]
            with self.functions or nullcontext():
                return step()
        finally:
            for hooked in hooks:
                hooked.remove()

    def _factors(self, batch: Any, x: Tensor) -> Tensor:
        """Return the factor of the gradient of each row of the head's output."""
        if x.ndim > 1 and x.shape[1] > 1:
            self.weights.check_classes(f"the head {self.head!r}", self.weights.class_table(x), x.shape[1])
        w, counted = self.weights_of(batch)
        if self.weights.normalize == "batch":
            both = all_sum(torch.stack([counted.to(w).sum(), (w * counted).sum()]))
            if float(both[0]) == 1:
                raise InvalidArgument("normalize='batch' with a batch of one sample: its weight cancels. Use 'mean1'.")
            w = w * both[0] / both[1].clamp(min=1e-300)
        return w

    def _check(self, module: Any, output: Any) -> None:
        """Refuse a step in which nothing was weighted: silence would look like weights that do nothing."""
        weights = self.weights
        loss = output.get("loss") if isinstance(output, dict) else output
        trains = isinstance(loss, Tensor) and loss.requires_grad
        if not weights.hits and (trains or not module.automatic_optimization):
            called = f"It calls {', '.join(weights.called)}. " if weights.called else ""
            what = f"the head {self.head!r} did not run" if self.mode == "gradient" else "no loss could be weighted"
            raise InvalidArgument(
                f"{what.capitalize()} in {type(module).__name__}.training_step (mode={self.mode!r}, "
                f"match={weights.match!r}). {called}{_REMEDIES} If the whole module is compiled, compile its inner "
                f"network."
            )
        hub = vars(module).get("training_step")
        if weights.deferred and (loss is not weights.result or getattr(hub, "participants", [])):
            raise UnsupportedTraining(
                "normalize='batch' over accumulated batches divides the gradient in the end, which is exact only if "
                "the weighted loss is all that training_step returns. Use normalize='mean1', or do not accumulate."
            )

    def close_window(self, optimizer: Any) -> None:
        """Divide by the weights of all accumulated batches, which are known only now."""
        number, total = self.weights.seen
        if not self.weights.deferred or number == 0:
            return
        if number == 1:
            raise InvalidArgument("normalize='batch' with a batch of one sample: its weight cancels. Use 'mean1'.")
        self.weights.seen = [0.0, 0.0]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, number / total if total > 0 else 0.0)

    def count_into(self, means: EpochMeans) -> None:
        """Add the weighted calls of the steps since the last time; plain numbers until then, which cost nothing."""
        if self._steps:
            means.add({"hits": self._hits / self._steps}, weight=self._steps)
        self.reset()
