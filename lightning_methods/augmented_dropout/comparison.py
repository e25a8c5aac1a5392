"""How far the gradient of augmented dropout is from that of standard dropout, on the same batch and forward masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_methods.augmented_dropout.functional import Switch
from lightning_methods.core.means import EpochMeans
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.report import curves


class GradientComparison:
    r"""Compares both gradients in every n-th batch of an epoch.

    .. math:: \cos = \frac{\langle g, g_s \rangle}{\|g\| \|g_s\|}, \qquad \text{ratio} = \frac{\|g\|}{\|g_s\|}

    over all trained parameters, where :math:`g_s` takes the forward masks in the backward pass too. Two more backward
    passes through the graph of the step, which change no gradient and draw no random number.

    Args:
        every: how often, or `None`.

    Raises:
        InvalidArgument: for a number below 1.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise InvalidArgument(f"compare_every_n_steps={every!r}: at least 1 is needed, or None.")
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Forget what was measured in an earlier fit."""
        #: quantity -> its mean in each epoch
        self.history: dict[str, list[float]] = {}
        self._epoch = 0
        self._means = EpochMeans()

    def begin(self, batch_idx: int) -> Switch | None:
        """Return the switch of a batch that is compared."""
        return Switch() if self.every is not None and batch_idx % self.every == 0 else None

    def compare(self, loss: Tensor, module: torch.nn.Module, switch: Switch | None) -> None:
        """Take both gradients of the loss."""
        if switch is None or not loss.requires_grad:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        try:
            switch.on = True
            standard = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            switch.on = False
            ours = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise UnsupportedTraining(
                "compare_every_n_steps takes gradients of chosen tensors, which reentrant activation checkpointing "
                "does not allow. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            ) from error
        finally:
            switch.on = False
        pairs = [
            (g.double(), s.double()) for g, s in zip(ours, standard, strict=True) if g is not None and s is not None
        ]
        product = sum((g * s).sum() for g, s in pairs)
        norms = [torch.as_tensor(sum(x.square().sum() for x in side)).sqrt() for side in zip(*pairs, strict=True)]
        values = {"grad_cosine": 0.0, "grad_norm_ratio": 0.0}
        if len(norms) == 2 and bool((norms[0] * norms[1]).isfinite()) and float(norms[0] * norms[1]) > 0:
            values = {
                "grad_cosine": float(product / (norms[0] * norms[1])),
                "grad_norm_ratio": float(norms[0] / norms[1]),
            }
            self._means.add(values, weight=1)
        else:  # no direction to compare: counted nowhere, but by every rank
            self._means.add(values, weight=0)

    def see_epoch_of(self, trainer: Any) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self.every is not None and self._epoch != trainer.current_epoch:
            self.close_epoch()
            self._epoch = trainer.current_epoch

    def close_epoch(self) -> dict[str, float]:
        """Return the means of the epoch over all ranks; every rank must call it."""
        means = {key: value for key, value in self._means.close().items() if math.isfinite(value)}
        for key, value in means.items():
            self.history.setdefault(key, []).append(value)
        return means

    def figure(self) -> Figure:
        """Return the picture of both quantities over the epochs."""
        names = {"grad_cosine": "cosine", "grad_norm_ratio": "ratio of the norms"}
        series = {names[key]: (list(range(len(values))), values) for key, values in self.history.items()}
        return curves(
            series,
            title="Gradient against that of standard dropout",
            x_label="epoch",
            y_label="mean over the compared batches",
            reference={"standard dropout": 1.0},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the running epoch, as tensors and plain builtins."""
        if self.every is None:
            return {}
        history = {key: list(values) for key, values in self.history.items()}
        return {"epoch": self._epoch, "means": self._means.state_dict(), "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        if state and self.every is not None:
            self._epoch, self.history = state["epoch"], state["history"]
            self._means.load_state_dict(state["means"])
