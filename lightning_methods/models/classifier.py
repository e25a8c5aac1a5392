"""A plain LightningModule around any network that gives logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_methods.core._lightning import LightningModule, OneFamily
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch


class Classifier(OneFamily, LightningModule):
    """Train any network that gives logits with cross-entropy.

    Logs at the end of every epoch `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`, `val/ece` (expected
    calibration error, 15 bins) and the same under `test/`. `train/loss` is what is optimised, with label smoothing;
    `val/loss` and `test/loss` are without. With `barebones=True` nothing is measured.

    Shapes: batches (inputs, targets, ...) with targets (B,) int64; logits (B, num_classes).

    Args:
        net: the network.
        optimizer: from parameters to an optimizer. Default Adam with learning rate 1e-3.
        scheduler: from the optimizer to a scheduler that steps once an epoch. Default None. `ReduceLROnPlateau`
            watches `val/loss`.
        num_classes: number of logits. Default 10.
        label_smoothing: share of the target spread over all classes, from 0 to 1. Default 0.

    Raises:
        InvalidArgument: if a number is out of range.
        BatchFormat: if a batch is not (inputs, targets).
        ShapeMismatch: if the network gives another number of logits.
        UnsupportedTraining: if the Trainer is of the other Lightning family.

    Example:
        >>> from lightning_methods.models import MLP
        >>> model = Classifier(MLP(64), label_smoothing=0.1)
        >>> model(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InvalidArgument(f"num_classes={num_classes}: at least two classes are needed.")
        if not 0 <= label_smoothing <= 1:
            raise InvalidArgument(f"label_smoothing={label_smoothing}: a share from 0 to 1 is needed.")
        # plain numbers only, so that checkpoints load with weights_only=True
        self.save_hyperparameters("num_classes", "label_smoothing")
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_accuracy", MulticlassAccuracy(num_classes, average="micro"))
            if stage != "train":
                setattr(self, f"{stage}_ece", MulticlassCalibrationError(num_classes, n_bins=15))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        logits, targets = self._logits(batch)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self._measure("train", loss, logits, targets)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities, (B, num_classes) float32, of a batch (inputs, ...) or of bare inputs."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(x).float().softmax(dim=1)

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler where there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if not isinstance(scheduler, ReduceLROnPlateau):
            return [optimizer], [scheduler]
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def _evaluate(self, stage: str, batch: Any) -> None:
        logits, targets = self._logits(batch)
        self._measure(stage, F.cross_entropy(logits, targets), logits, targets)

    def _logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise BatchFormat(f"Classifier got a batch that is a {what}. A batch (inputs, targets) is needed.")
        logits = self(batch[0])
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ShapeMismatch(
                f"The network gives {tuple(logits.shape)}. Logits (B, {self.num_classes}) are needed, since "
                f"num_classes={self.num_classes}; change num_classes or the network's last layer."
            )
        return logits, batch[1]

    def _measure(self, stage: str, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        # a step may be called without a Trainer, and the barebones one never resets a metric, whose state would grow
        if self._trainer is None or self._trainer.barebones:
            return
        probabilities = logits.detach().float().softmax(dim=1)
        kept: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(targets), "prog_bar": True}
        self.log(f"{stage}/loss", loss.detach().float(), sync_dist=True, **kept)
        for name in ("accuracy", "ece"):
            metric = getattr(self, f"{stage}_{name}", None)
            if metric is not None:
                metric.update(probabilities, targets)
                self.log(f"{stage}/{name}", metric, **kept)
