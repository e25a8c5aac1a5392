"""A live answer to the question whether the weights still do anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback, rank_zero_warn
from lightning_methods.errors import InvalidArgument, NoEffect, NotFinite, ShapeMismatch, UnsupportedTraining
from lightning_methods.importance_weighting.callback import ImportanceWeighting
from lightning_methods.importance_weighting.effect import Reader, Samples, fractions, measured, shown_classes
from lightning_methods.importance_weighting.functional import check_number, check_whole, class_numbers, two_logits
from lightning_methods.importance_weighting.twin import Twin, has_terms
from lightning_methods.report import curves, histograms, is_reporting, log_figure, log_table, log_text

REMEDIES = (
    "What helps: stop early on the weighted validation risk (EarlyStopping('importance_weighting/val_risk')); weight "
    "decay, enough of it (1e-2 kept most of the effect in our measurements, 1e-3 little). What is made for it: "
    "LogitAdjustedLoss or VSLoss for imbalanced classes; PolyTailLoss, whose authors take exponent=1.5 to 3 (it kept "
    "little in ours where the training data were fitted). Fewer samples of the large classes is another way to the "
    "same end."
)


class WeightEffectMonitor(Callback):
    r"""Show during a training whether importance weights still have an effect, and warn once when it is gone.

    Networks that separate their training data end where they would without weights, only the way there differs (Byrd
    and Lipton 2019). After every n-th epoch this measures, in extra passes that leave no trace in the training:

    - `effect`: how far the weights can still move the boundary, in parts of the way to the median sample, from 1 to 0
      (`boundary_shift`; for losses with an exponential tail, such as the cross-entropy);
    - `gradient_cosine` between the weighted and the unweighted gradient of a batch, over all parameters;
    - `share/<class>` of the loss gradient, and `intended/<class>`, the share that the weights mean to give it;
    - `ess`, `ess_fraction` and `max_weight`; `accuracy`, `separable`, `margin`, `margin/<class>`, `smallest_margin`,
      `margin_ratio` (largest over smallest class median), `weight_norm`;
    - the paper's own statistic, `fraction/<probe>/<class>`: the share predicted as each class in the validation data,
      in data of other classes, and in noise;
    - with a twin, `twin_gap/<probe>` (half the sum of differences of those shares) and `twin_agreement/<probe>`.

    All under `importance_weighting/`; figures and tables at the end of the fit. Ranks join their samples.

    Args:
        data: labelled samples to measure on: `"train"` (default), `"val"`, or a loader.
        in_domain: data whose predictions are counted: `"val"` (default; left out where there is none), a
            loader, or `None`.
        out_of_domain: likewise data of other classes, unlabelled. Default `None`.
        noise: whether predictions on Gaussian noise with the mean and deviation of the inputs are counted too.
        class_weights: for weights that your own loss has. Default those of the `ImportanceWeighting` beside it.
        twin: whether to train an unweighted copy on the same batches, which doubles the cost.
        warn_below: `effect` (or with a twin the largest gap) below which it counts as gone. Default 0.05.
        patience: in so many measurements in a row. Default 3.
        every_n_epochs: how often to measure.
        max_samples: at most so many samples of each set. Default 1,024.
        figures_every_n_epochs: draw the figures also during the fit.
        inputs: where the inputs are in a batch: index, key or function.
        labels: where the targets are.
        select: item of what the module returns for its inputs.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for settings outside of their range, and at the start of the fit if there are no weights.
        UnsupportedTraining: at the start of the fit, for a twin of a training that cannot be copied.
        BatchFormat: if inputs, targets or logits are not where they should be.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import ImportanceWeighting, WeightEffectMonitor
        >>> trainer = Trainer(callbacks=[ImportanceWeighting([16.0, 1.0]), WeightEffectMonitor()], logger=False)

    Deviations from the paper: all but the fraction predicted as each class is ours.
    """

    method: ClassVar[str] = "importance_weighting"

    def __init__(
        self,
        *,
        data: Any = "train",
        in_domain: Any = "val",
        out_of_domain: Any = None,
        noise: bool = True,
        class_weights: Sequence[float] | None = None,
        twin: bool = False,
        warn_below: float = 0.05,
        patience: int = 3,
        every_n_epochs: int = 1,
        max_samples: int = 1024,
        figures_every_n_epochs: int | None = None,
        inputs: int | str | Callable[[Any], Any] | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        select: int | str | None = None,
        log_prefix: str = "importance_weighting",
    ) -> None:
        for name, number in (
            ("patience", patience),
            ("every_n_epochs", every_n_epochs),
            ("max_samples", max_samples),
            ("figures_every_n_epochs", figures_every_n_epochs),
        ):
            if number is not None:
                check_whole(name, number, 1)
        check_number("warn_below", warn_below, 0, 1, open_="high")
        self.class_weights = None if class_weights is None else class_numbers(class_weights, "class_weights")
        self.data, self.in_domain, self.out_of_domain, self.noise = data, in_domain, out_of_domain, noise
        self.twin, self.warn_below, self.patience = twin, warn_below, patience
        self.every_n_epochs, self.figures_every_n_epochs = every_n_epochs, figures_every_n_epochs
        self.log_prefix = log_prefix
        self.reader = Reader(inputs, labels, select, max_samples)
        self.figure_paths: list[Path] = []
        self._twin: Twin | None = None
        self._weighting: ImportanceWeighting | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier fit measured."""
        #: quantity -> its values with their epochs
        self.history: dict[str, list[tuple[int, float]]] = {}
        #: a row a class of the latest measurement: weight, intended share, share, median and smallest margin
        self.classes: list[list[Any]] = []
        self._weights = torch.empty(0)
        self._epoch, self._measured, self._below = 0, -1, 0
        self._warned = False
        self._told: set[str] = set()
        self._twin_state: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tell several monitors in one trainer apart."""
        return self._generate_state_key(log_prefix=self.log_prefix)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the weights."""
        self._twin = None
        found = [c for c in trainer.callbacks if isinstance(c, ImportanceWeighting)]
        self._weighting = found[0] if found else None
        if self.class_weights is None and self._weighting is None:
            raise InvalidArgument(
                "WeightEffectMonitor knows no weights: put it beside ImportanceWeighting, or give class_weights=, "
                "those of your own loss."
            )
        if self.twin and self._weighting is not None and self._weighting.mode == "sampler":
            raise InvalidArgument("twin=True trains on the same batches, which mode='sampler' has drawn by weight.")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Copy the module, where it starts or where it was when the fit was interrupted."""
        if not self.twin:
            return
        self._twin = Twin(trainer, pl_module)
        if self._twin_state is not None:
            self._twin.load_state_dict(self._twin_state)
        if has_terms(pl_module):
            rank_zero_warn(
                "WeightEffectMonitor: other callbacks add terms to the loss, which the twin is trained without: its "
                "gap is not that of the weights alone.",
                category=NoEffect,
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self._measure(trainer, pl_module, self._epoch)
        self._epoch = trainer.current_epoch
        if self._twin is not None:
            self._twin.remember()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the twin step too."""
        if self._twin is not None:
            self._twin.due(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Train the twin on the same batch."""
        if self._twin is not None:
            self._twin.step(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and log, if that is due."""
        self._epoch = trainer.current_epoch
        self._measure(trainer, pl_module, self._epoch)
        if self._measured == self._epoch:
            for key, values in self.history.items():
                epoch, value = values[-1]
                if epoch == self._epoch:
                    pl_module.log(f"{self.log_prefix}/{key}", value)
        every = self.figures_every_n_epochs
        if every and (self._epoch + 1) % every == 0:
            self.show(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the figures and the tables of the whole fit."""
        self.show(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the twin go."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the twin go also after a crash."""
        self._release()

    def _release(self) -> None:
        if self._twin is not None:
            self._twin_state = self._twin.state_dict()
            self._twin = None
        self._weighting = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, and the twin."""
        twin = self._twin.state_dict() if self._twin is not None else self._twin_state
        return {
            "history": {key: [list(pair) for pair in values] for key, values in self.history.items()},
            "classes": self.classes,
            "weights": self._weights.cpu(),
            "epoch": self._epoch,
            "measured": self._measured,
            "below": self._below,
            "warned": self._warned,
            "twin": twin,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.history = {key: [(e, v) for e, v in values] for key, values in state_dict["history"].items()}
        self.classes, self._weights = state_dict["classes"], state_dict["weights"]
        self._epoch, self._measured = state_dict["epoch"], state_dict["measured"]
        self._below, self._warned = state_dict["below"], state_dict["warned"]
        self._twin_state = state_dict["twin"]

    # -- measuring ---------------------------------------------------------------------------------------------------

    def weights_of(self, batch: Any, labels: Tensor) -> Tensor:
        """Return the weight of each sample."""
        if self.class_weights is None:
            assert self._weighting is not None
            return self._weighting.weights_of(batch, labels)
        if len(labels) and int(labels.max()) >= len(self.class_weights):
            raise InvalidArgument(
                f"The batch holds the label {int(labels.max())}, and class_weights has {len(self.class_weights)}."
            )
        return self.class_weights.to(labels.device)[labels.clamp(min=0)]  # ignored ones are left out later

    def _measure(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        """Measure as of the end of an epoch, if that is due and was not done."""
        if epoch <= self._measured or (epoch + 1) % self.every_n_epochs:
            return
        if self.data == "train" and getattr(trainer, "limit_train_batches", 1) == 0:
            return
        self._measured = epoch
        if self._twin is not None:
            self._twin.end_epoch()
        samples = self.reader.samples(trainer, pl_module, self.data, self.weights_of)
        if not bool(torch.isfinite(samples.logits).all()):
            if "finite" not in self._told:
                self._told.add("finite")
                rank_zero_warn(
                    f"WeightEffectMonitor: the logits are not finite after epoch {epoch}: the training has diverged, "
                    f"and nothing is measured. Lower the learning rate, or clip the weights.",
                    category=NotFinite,
                )
            return
        classes = two_logits(samples.logits[:1]).shape[1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ShapeMismatch(
                f"class_weights has {len(self.class_weights)} numbers and the module gives {classes} logits. One for "
                f"each class is needed."
            )
        norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in pl_module.parameters()))
        found, self.classes = measured(samples, norm)
        self._weights = samples.weights.double().sort().values  # in an order that no number of ranks changes
        found |= self._predicted(trainer, pl_module, samples)
        for key, value in found.items():
            self.history.setdefault(key, []).append((epoch, value))
        self._judge(trainer, found)

    def _predicted(self, trainer: Any, module: Any, samples: Samples) -> dict[str, float]:
        """Return the share predicted as each class in every probe, and how the twin differs."""
        classes = two_logits(samples.logits[:1]).shape[1]
        twin = None if self._twin is None else self._twin.module
        sets: dict[str, list[Tensor]] = {}
        for name, loader in (("in_domain", self.in_domain), ("out_of_domain", self.out_of_domain)):
            if loader is not None:
                try:
                    sets[name] = self.reader.predictions(trainer, module, loader, twin)
                except UnsupportedTraining:
                    if loader != "val":  # which is the default, and may not be there
                        raise
        if self.noise and samples.noise is not None:
            inputs = samples.noise()
            sets["noise"] = self.reader.of_noise(module, inputs, twin)
        found: dict[str, float] = {}
        for name, predictions in sets.items():
            if not predictions:
                continue
            shares = [fractions(p, classes) for p in predictions]
            for c in shown_classes(classes):
                found[f"fraction/{name}/{c}"] = float(shares[0][c])
            if len(predictions) == 2:
                found[f"twin_gap/{name}"] = float((shares[0] - shares[1]).abs().sum() / 2)
                found[f"twin_agreement/{name}"] = float((predictions[0] == predictions[1]).double().mean())
        return found

    def _judge(self, trainer: Any, found: dict[str, float]) -> None:
        """Warn once when the effect was gone in several measurements in a row."""
        gaps = [value for key, value in found.items() if key.startswith("twin_gap/")]
        value = max(gaps) if gaps else found["effect"]
        self._below = self._below + 1 if value < self.warn_below else 0
        if self._below < self.patience or self._warned:
            return
        self._warned = True
        what = "predictions differ from those of the unweighted twin by" if gaps else "weights can move the boundary by"
        text = (
            f"The effect of the importance weights is gone: the {what} {100 * value:.1f}% at most since {self._below} "
            f"measurements (training accuracy {100 * found['accuracy']:.1f}%, median margin {found['margin']:.1f}). "
            f"{REMEDIES}"
        )
        rank_zero_warn(f"WeightEffectMonitor: {text}", category=NoEffect)
        log_text(trainer, f"{self.log_prefix}/faded", text)

    # -- showing -----------------------------------------------------------------------------------------------------

    def show(self, trainer: Any) -> None:
        """Send figures and tables to the loggers, or to files where no logger takes them."""
        if not is_reporting(trainer) or not self.history:
            return
        prefix = self.log_prefix
        shown = ("effect", "gradient_cosine", "ess_fraction", "accuracy")
        lines = {key: self._line(key) for key in self.history if key in shown or key.startswith("twin_gap/")}
        figure = curves(lines, title="Do the weights still have an effect?", x_label="epoch", y_label="share")
        written = log_figure(trainer, f"{prefix}/effect_by_epoch", figure)
        for probe in ("in_domain", "out_of_domain", "noise"):
            start = f"fraction/{probe}/"
            own = {f"class {k.removeprefix(start)}": self._line(k) for k in self.history if k.startswith(start)}
            if own:
                title = f"Predicted classes: {probe.replace('_', ' ')}"
                figure = curves(own, title=title, x_label="epoch", y_label="share of samples")
                written += log_figure(trainer, f"{prefix}/fraction_{probe}", figure)
        if self._weights.numel():
            figure = histograms({"weights": self._weights}, title="Weights of the monitored samples", x_label="weight")
            written += log_figure(trainer, f"{prefix}/weights", figure)
        columns = ["class", "mean weight", "intended share", "share of gradient", "median margin", "smallest margin"]
        written += log_table(trainer, f"{prefix}/classes", columns, self.classes)
        keys = [k for k, values in self.history.items() if len(values) == len(self.history["effect"])]
        rows = [[e, *(self.history[k][i][1] for k in keys)] for i, (e, _) in enumerate(self.history["effect"])]
        written += log_table(trainer, f"{prefix}/effect_table", ["epoch", *keys], rows)
        self.figure_paths = written

    def _line(self, key: str) -> tuple[list[int], list[float]]:
        pairs = self.history[key]
        return [epoch for epoch, _ in pairs], [value for _, value in pairs]
