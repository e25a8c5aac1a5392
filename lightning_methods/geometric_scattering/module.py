"""A LightningModule that classifies graphs by their scattering features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_methods.core._lightning import LightningModule, OneFamily
from lightning_methods.core.passes import batches
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch, check_choice
from lightning_methods.geometric_scattering.encoder import ScatteringEncoder
from lightning_methods.geometric_scattering.functional import Isolated
from lightning_methods.geometric_scattering.standardize import Standardize
from lightning_methods.geometric_scattering.transform import edges_of, signal_of
from lightning_methods.report import heatmap, log_figure


class ScatteringClassifier(OneFamily, LightningModule):
    """Classify graphs by their scattering features, standardised, with a small network on top.

    Features that the graphs bring along (`data.scattering`, from the transform `GeometricScattering`) are used as they
    are, unless scales are learned. Logs `train/loss`, `train/accuracy`, and the same under `val/` and `test/`; with
    `learnable="legs"` also `scattering/scale/<j>`, the mean diffusion time of each low-pass filter, and
    `scattering/laziness`, and at the end of the fit the selector as a figure.

    Shapes: batches of PyG graphs with `x` (nodes, in_channels), `edge_index`, `y` (graphs,); logits (graphs, classes).

    Args:
        num_classes: number of classes.
        in_channels: number of signals, the columns of `data.x` (`datamodule.num_features`).
        hidden: widths of the hidden layers of the head; none for a linear one.
        dropout: share of hidden units that is dropped in training.
        lr: learning rate of Adam.
        weight_decay: of Adam, not of the scales.
        selector_lr: learning rate of the scales, whose optimizer is blind to the size of their gradients.
        standardize: whether features are standardised by the `"train"` split, `"transductive"` by all splits as in the
            paper (no labels are used), or `"none"`.
        J: number of scales, 5 in the paper.
        Q: number of moments, 4 in the paper.
        order: longest path, 2 in the paper.
        normalized: whether the moments are mean, variance, skewness and kurtosis, or sums of powers.
        learnable: `"legs"` learns the scales and the laziness of the walk.
        scale_mode: whether the selector is a `"softmax"` over diffusion times, or `"free"`.
        isolated: whether a node without edges loses mass as in the paper, or keeps it.

    Raises:
        InvalidArgument: if a number is out of range, or it is used before it was fitted.
        BatchFormat: if a batch has no signals, edges or labels.
        ShapeMismatch: if the number of signals or features differs.
        UnsupportedTraining: if the Trainer is of the other Lightning family.

    Example:
        >>> import torch
        >>> model = ScatteringClassifier(num_classes=2, in_channels=3)
        >>> model.encoder.out_channels
        192
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden: Sequence[int] = (128, 64),
        *,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        selector_lr: float = 0.05,
        standardize: Literal["train", "transductive", "none"] = "train",
        J: int = 5,
        Q: int = 4,
        order: int = 2,
        normalized: bool = True,
        learnable: Literal["legs"] | bool = False,
        scale_mode: Literal["softmax", "free"] = "softmax",
        isolated: Isolated = "leak",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InvalidArgument(f"num_classes={num_classes}: at least two classes are needed.")
        if not 0 <= dropout < 1:
            raise InvalidArgument(f"dropout={dropout}: a share from 0 to below 1 is needed.")
        for name, number in (("lr", lr), ("selector_lr", selector_lr)):
            if not number > 0:
                raise InvalidArgument(f"{name}={number}: a positive learning rate is needed.")
        if not weight_decay >= 0:
            raise InvalidArgument(f"weight_decay={weight_decay}: at least 0 is needed.")
        if any(width < 1 for width in hidden):
            raise InvalidArgument(f"hidden={list(hidden)}: widths of at least 1 are needed.")
        check_choice("standardize", standardize, ("train", "transductive", "none"))
        # plain values only, so that checkpoints load with weights_only=True
        self.save_hyperparameters({**dict(self._arguments(locals())), "hidden": list(hidden)})
        self.num_classes, self.standardize = num_classes, standardize
        self.lr, self.weight_decay, self.selector_lr = lr, weight_decay, selector_lr
        self.encoder = ScatteringEncoder(
            in_channels,
            J,
            Q,
            order,
            normalized=normalized,
            learnable=learnable,
            scale_mode=scale_mode,
            isolated=isolated,
        )
        self.scaler = Standardize(self.encoder.out_channels) if standardize != "none" else None
        widths = [self.encoder.out_channels, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_accuracy", MulticlassAccuracy(num_classes, average="micro"))

    @staticmethod
    def _arguments(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        plain = (int, float, str, bool)
        return ((k, v) for k, v in given.items() if isinstance(v, plain) and not k.startswith("_"))

    # -- features ----------------------------------------------------------------------------------------------------

    def features(self, batch: Any) -> Tensor:
        """Return the features `(graphs, F')` before standardisation."""
        ready = None if self.encoder.learnable else getattr(batch, "scattering", None)
        if ready is not None:
            if ready.ndim != 2 or ready.shape[1] != self.encoder.out_channels:
                raise ShapeMismatch(
                    f"data.scattering has the shape {tuple(ready.shape)}; (graphs, {self.encoder.out_channels}) is "
                    f"needed. Give the transform and the module the same J, Q, order and signals."
                )
            return ready
        x, edge_index = signal_of(batch), edges_of(batch)
        if not self.encoder.learnable:
            x = x.double()  # the longest scales need it, and it costs little without a graph
        groups = getattr(batch, "batch", None)
        graphs = int(batch.num_graphs) if groups is not None else 1
        return self.encoder(x, edge_index, getattr(batch, "edge_weight", None), groups, graphs)

    def forward(self, batch: Any) -> Tensor:
        """Return the logits (graphs, classes) of a batch of graphs."""
        features = self.features(batch)
        if self.scaler is not None and not self._trains_nothing():
            features = self.scaler(features)
        return self.head(features.to(next(self.head.parameters()).dtype))

    def on_fit_start(self) -> None:
        """Take the statistics of the features, unless a checkpoint or an earlier fit has brought them."""
        if self.scaler is None or bool(self.scaler.fitted) or self._trains_nothing():
            return
        self.trainer.fit_loop.setup_data()  # Lightning makes the training loader only after the sanity check
        splits = ("train",) if self.standardize == "train" else ("train", "val", "test")
        self.scaler.fit(self._all_features(splits))

    def _trains_nothing(self) -> bool:
        """Tell whether there are no statistics because a fit has no training batch (`limit_train_batches=0`)."""
        if self.scaler is None or bool(self.scaler.fitted) or self._trainer is None:
            return False
        return self.trainer.state.fn == "fit" and self.trainer.limit_train_batches == 0

    def _all_features(self, splits: Sequence[str]) -> Iterator[Tensor]:
        for split in splits:
            for batch in batches(self.trainer, self, split, description=f"features of {split}"):
                yield self.features(batch)

    # -- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss = self._measured("train", batch)
        if self.encoder.learnable:
            self._log_scales()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._measured("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._measured("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities (graphs, classes)."""
        return self(batch).float().softmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; the scales start nearly one-hot, with gradients far below Adam's usual epsilon."""
        selector = [self.encoder.selector] if self.encoder.learnable else []
        others = [p for p in self.parameters() if not any(p is s for s in selector)]
        groups: list[dict[str, Any]] = [{"params": others, "weight_decay": self.weight_decay}]
        if selector:
            groups.append({"params": selector, "lr": self.selector_lr, "eps": 1e-24, "weight_decay": 0.0})
        return torch.optim.Adam(groups, lr=self.lr)

    def on_train_end(self) -> None:
        """Draw the learned scales."""
        if not self.encoder.learnable or self.trainer.barebones:
            return
        weights = self.encoder.scales().detach().cpu()
        figure = heatmap(
            weights,
            [f"low-pass {j}" for j in range(len(weights))],
            range(1, weights.shape[1] + 1),
            title="How much of each diffusion time is in each filter",
            x_label="steps of the walk",
            value_label="weight",
        )
        log_figure(self.trainer, "scattering/selector", figure)

    def _measured(self, stage: str, batch: Any) -> Tensor:
        targets = getattr(batch, "y", None)
        if targets is None:
            raise BatchFormat("The batch has no labels y. A batch of PyG graphs with y (graphs,) is needed.")
        logits, targets = self(batch), targets.reshape(-1).long()
        if len(targets) != len(logits):
            raise ShapeMismatch(f"The batch has {len(logits)} graphs and {len(targets)} labels; one a graph is needed.")
        loss = F.cross_entropy(logits, targets)
        if self._trainer is not None and not self._trainer.barebones:
            metric = getattr(self, f"{stage}_accuracy")
            metric.update(logits.detach().float(), targets)
            kept: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(targets), "prog_bar": True}
            self.log(f"{stage}/loss", loss.detach(), sync_dist=True, **kept)
            # the name: Lightning finds a metric of a copied module by it alone
            self.log(f"{stage}/accuracy", metric, metric_attribute=f"{stage}_accuracy", **kept)
        return loss

    def _log_scales(self) -> None:
        if self._trainer is None or self._trainer.barebones:
            return
        weights = self.encoder.scales().detach()
        times = torch.arange(1, weights.shape[1] + 1, device=weights.device, dtype=weights.dtype)
        for j, center in enumerate((weights * times).sum(1)):
            self.log(f"scattering/scale/{j}", center, on_step=False, on_epoch=True, batch_size=1)
        self.log("scattering/laziness", self.encoder.alpha().detach(), on_step=False, on_epoch=True, batch_size=1)
