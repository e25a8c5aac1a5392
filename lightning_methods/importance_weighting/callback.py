"""Weights for the loss of an unchanged module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback, rank_zero_warn
from lightning_methods.core.batches import targets_of
from lightning_methods.core.gather import all_sum, world_size
from lightning_methods.core.losses import LossHub
from lightning_methods.core.means import EpochMeans
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    NoEffect,
    ShapeMismatch,
    check_choice,
)
from lightning_methods.importance_weighting.datasets import class_counts, draw_by_weight, epoch_batches
from lightning_methods.importance_weighting.estimation import LabelShift, ShiftEstimate, read_logits, show_estimate
from lightning_methods.importance_weighting.functional import (
    balanced_weights,
    check_weights,
    class_balanced_weights,
    normalized_weights,
)
from lightning_methods.importance_weighting.functions import StandIns
from lightning_methods.importance_weighting.settings import (
    beta_of,
    check_numbers,
    check_settings,
    checked_class_weights,
    checked_counts,
)
from lightning_methods.importance_weighting.step import WeightedStep
from lightning_methods.importance_weighting.validation import ValidationRisk
from lightning_methods.importance_weighting.weights import BatchWeights, raw_sample_weights


class ImportanceWeighting(Callback):
    r"""Weight the loss of an unchanged module, by class or by sample.

    .. math:: \min_\theta \frac1n \sum_i w_i\, \ell(f_\theta(x_i), y_i), \qquad w_i = \frac{q(x_i, y_i)}{p(x_i, y_i)}

    The loss functions that `training_step` calls are caught and weighted before their reduction: `cross_entropy`,
    `nll_loss`, `binary_cross_entropy(_with_logits)`, `mse_loss`, `l1_loss`, `smooth_l1_loss`, `huber_loss` and
    `kl_div`, as functions and as modules, and any other module that is called a loss and has a `reduction`. The
    parameters are bit for bit those of the module with the weights written into its step. What your module logs as its
    training loss is the weighted loss; its validation is untouched.

    Logs `importance_weighting/hits` (weighted calls a step), `importance_weighting/strength`, and
    `importance_weighting/val_risk`, the weighted mean of the validation losses: what to stop early on, with Lightning's
    own `EarlyStopping("importance_weighting/val_risk")`. With `LabelShift` also the estimated weights with their
    intervals, and the confusion matrix.

    Args:
        class_weights: one for each class; `"balanced"` (all classes count the same); `"effective_number"` or
            `"effective_number:0.999"` (Cui et al. 2019, with that beta); `LabelShift` to estimate them from unlabelled
            target data; `None` for weights by sample only.
        sample_weights: where the weights of the samples are in a batch: index, key, or function of the batch.
        class_counts: training samples of each class; read from the dataset, or counted, if they are needed.
        normalize: `"mean1"` (default) divides by one constant, the mean weight over the training set where the counts
            of the classes are known and else over the classes, so that the learning rate keeps its meaning; `"none"`
            leaves the weights as they are; `"batch"` divides by the mean weight of each batch, as torch does with
            `weight=`: of all ranks and all accumulated batches together.
        mean_weight: the mean of the sample weights for `"mean1"`; measured in a pass over the training data if not
            given.
        exponent: raise the weights to this power first; 1.5 to 3 with `PolyTailLoss`.
        clip: smallest and largest weight, after `exponent`, before the normalisation.
        mode: `"function"` catches the functions; `"module"` the loss modules, by name with `match`; `"gradient"`
            multiplies the gradient of the output of `head`, for losses that nothing can take apart; `"sampler"` draws
            samples by class weight instead, also under DDP; `"auto"` (default) functions and such modules as are none
            of torch's.
        match: which losses, where a step calls several: `"all"`, `"first"`, or a name such as `"cross_entropy"` or that
            of a module's class. `"auto"` (default) takes the only one, and says so if there are more.
        head: for `"gradient"`, the layer that gives the logits, one row a sample.
        select: item of a head that returns a tuple or a dict.
        labels: where the targets are in a batch, for losses whose own targets are no classes.
        start_epoch: first epoch with weights (deferred reweighting).
        warmup_epochs: over so many epochs from there the weights grow linearly from 1.
        schedule: instead, from the epoch to the strength s, 0 to 1: weights act as `1 + s (w - 1)`.
        weight_validation: whether losses in `validation_step` are weighted too.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for weights that are negative, not finite or all 0, for settings outside of their range, for
            two such callbacks, for a label without a weight, and for a step whose losses nothing could catch.
        ShapeMismatch: if there is not one weight for each logit, or for each sample.
        BatchFormat: if the weights or labels are not in the batch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import ImportanceWeighting
        >>> trainer = Trainer(callbacks=ImportanceWeighting("balanced"), logger=False)

    Deviations from the paper: it does not say how weights are normalised; the default keeps their mean at 1.
    """

    method: ClassVar[str] = "importance_weighting"

    def __init__(
        self,
        class_weights: str | Sequence[float] | LabelShift | None = None,
        *,
        sample_weights: int | str | Callable[[Any], Tensor] | None = None,
        class_counts: Sequence[int] | None = None,
        normalize: Literal["mean1", "batch", "none"] = "mean1",
        mean_weight: float | None = None,
        exponent: float = 1.0,
        clip: tuple[float, float] | None = None,
        mode: Literal["auto", "function", "module", "gradient", "sampler"] = "auto",
        match: str = "auto",
        head: str | None = None,
        select: int | str | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        start_epoch: int = 0,
        warmup_epochs: int = 0,
        schedule: Callable[[int], float] | None = None,
        weight_validation: bool = False,
        log_prefix: str = "importance_weighting",
    ) -> None:
        check_choice("normalize", normalize, ("mean1", "batch", "none"))
        check_choice("mode", mode, ("auto", "function", "module", "gradient", "sampler"))
        self.class_weights = checked_class_weights(class_weights)
        self._beta = beta_of(class_weights)
        self._given = f"{class_weights} {sample_weights}" if not callable(sample_weights) else f"{class_weights}"
        if class_weights is None and sample_weights is None:
            raise InvalidArgument("Neither class_weights nor sample_weights are given: nothing would be weighted.")
        check_settings(mode, head, sample_weights, normalize, class_weights)
        check_numbers(exponent, clip, mean_weight, start_epoch, warmup_epochs, schedule)
        self.exponent, self.clip, self.normalize = exponent, clip, normalize
        self.mode, self.match, self.head, self.select = mode, match, head, select
        self.start_epoch, self.warmup_epochs, self.schedule = start_epoch, warmup_epochs, schedule
        self.weight_validation, self.log_prefix, self.labels = weight_validation, log_prefix, labels
        self.class_counts = checked_counts(class_counts, self.class_weights)
        self.mean_weight = mean_weight
        self.weights = BatchWeights(normalize, match, labels, sample_weights, self._transformed)
        self.figure_paths: list[Path] = []
        self._step = WeightedStep(self.weights, mode=mode, head=head, select=select, weights_of=self._weights_of_batch)
        self._stand_ins = StandIns()
        self._module: Any = None
        self._sampling: tuple[Any, Any] | None = None
        self._validation = ValidationRisk(self.weights, change=weight_validation)
        self._told: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier fit measured."""
        self._epoch = 0
        self._means = EpochMeans()
        self._step.reset()
        self._prepared = False
        self._estimated = -1
        #: the latest estimate of `LabelShift`
        self.estimate: ShiftEstimate | None = None
        self.weights.set_table(None, 0.0)

    def _transformed(self, weights: Tensor) -> Tensor:
        w = weights if self.exponent == 1 else weights.pow(self.exponent)
        return w if self.clip is None else w.clamp(*self.clip)

    @property
    def state_key(self) -> str:
        """Let two of them get as far as the error that says why there cannot be two; of two alike the Trainer tells."""
        return self._generate_state_key(weights=self._given, log_prefix=self.log_prefix)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        others = [c for c in trainer.callbacks if isinstance(c, ImportanceWeighting) and c is not self]
        if others:
            raise InvalidArgument(
                "There are two ImportanceWeighting callbacks, whose weights would multiply. Give one of them both "
                "class_weights and sample_weights."
            )
        if stage == "fit" and trainer.global_step == 0:
            self.reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the interception in place."""
        self.release()
        self._step.check(pl_module)
        self._module = pl_module
        self._stand_ins.put_in_place()
        if self.mode != "sampler":
            LossHub.wrap(pl_module, self._step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the weights, which may need the training data, and replace the sampler if it is to draw by weight."""
        if not self._prepared:
            self._prepare(trainer, pl_module)
            self._prepared = True
        if self.mode == "sampler":
            self._sampling = draw_by_weight(trainer, self.weights.table, self.labels) or self._sampling

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the sampler of a loader that was made anew."""
        if self.mode == "sampler":
            self._sampling = draw_by_weight(trainer, self.weights.table, self.labels) or self._sampling

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self._closed_means()
            self._estimate(trainer, pl_module, self._epoch)
        self._epoch = trainer.current_epoch
        strength = self._strength(self._epoch)
        if strength != self.weights.strength:
            self.weights.set_strength(strength)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch, and estimate the weights anew if that is due."""
        self._epoch = trainer.current_epoch
        means = self._closed_means()
        self._refuse_nothing(means)
        if self.mode == "sampler":
            means["hits"] = 0.0
        for key, value in {**means, "strength": self._strength(self._epoch)}.items():
            pl_module.log(f"{self.log_prefix}/{key}", value, sync_dist=world_size() > 1)
        self._estimate(trainer, pl_module, self._epoch)

    def _refuse_nothing(self, means: dict[str, float]) -> None:
        """Refuse to go on after an epoch whose samples all had weight 0."""
        if self.weights.sample_weighted and means:
            if not float(all_sum(self.weights.total.to(torch.float64))) > 0:
                raise InvalidArgument(
                    f"The weights of all samples of epoch {self._epoch} are 0: nothing was trained. Look at what "
                    f"sample_weights={self.weights.selector!r} gives."
                )
            self.weights.total = torch.zeros(())

    def _closed_means(self) -> dict[str, float]:
        self._step.count_into(self._means)
        return self._means.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the running epoch and its sums."""
        self._step.count_into(self._means)
        return {
            "epoch": self._epoch,
            "means": self._means.state_dict(),
            "prepared": self._prepared,
            "table": self.weights.table.clone(),
            "mean_weight": self.weights.mean_weight,
            "estimated": self._estimated,
            "seen": list(self.weights.seen),
            "total": float(self.weights.total),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._epoch, self._prepared = state_dict["epoch"], state_dict["prepared"]
        self._estimated = state_dict["estimated"]
        self._means.load_state_dict(state_dict["means"])
        self.weights.set_table(state_dict["table"], self._strength(self._epoch))
        self.weights.mean_weight, self.weights.seen = state_dict["mean_weight"], list(state_dict["seen"])
        self.weights.total = torch.tensor(state_dict["total"])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self.release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was also after a crash, where Lightning calls no `on_fit_end`."""
        self.release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self.release()

    def release(self) -> None:
        """Take everything out of module and loader; harmless when called twice."""
        self._validation.leave()
        self._step.leave()
        self._stand_ins.put_back()
        if self._module is not None:
            LossHub.leave(self._module, self._step)
            self._module = None
        if self._sampling is not None:
            batch_sampler, sampler = self._sampling
            batch_sampler.sampler = sampler
            self._sampling = None

    # -- the weights -------------------------------------------------------------------------------------------------

    def _strength(self, epoch: int) -> float:
        if self.schedule is not None:
            s = float(self.schedule(epoch))
            if not 0 <= s <= 1:
                raise InvalidArgument(f"schedule({epoch}) is {s}; a strength from 0 to 1 is needed.")
            return s
        if epoch < self.start_epoch:
            return 0.0
        return min(1.0, (epoch - self.start_epoch + 1) / (self.warmup_epochs + 1))

    def _prepare(self, trainer: Any, pl_module: Any) -> None:
        """Make the table of class weights, and the mean of sample weights."""
        counts, named = self.class_counts, self.class_weights
        raw: Tensor | None
        if isinstance(named, str):
            counts = class_counts(trainer, pl_module, self.labels) if counts is None else counts
            raw = balanced_weights(counts) if named == "balanced" else class_balanced_weights(counts, self._beta)
        else:
            raw = named if isinstance(named, Tensor) else None
        if raw is not None:
            if counts is not None and counts.shape != raw.shape:
                raise ShapeMismatch(f"There are {len(raw)} class weights and class_counts of {len(counts)} classes.")
            self._take(self._transformed(raw), counts)
        if self.weights.sample_weighted and self.normalize == "mean1":
            self.weights.mean_weight = self._mean_sample_weight(trainer, pl_module)

    def _take(self, raw: Tensor, counts: Tensor | None) -> None:
        check_weights(raw, "The class weights, after exponent and clip,")
        table = normalized_weights(raw, counts) if self.normalize == "mean1" else raw
        self.weights.set_table(table, self._strength(self._epoch))
        if bool((table == table[0]).all()) and not self.weights.sample_weighted:
            rank_zero_warn("ImportanceWeighting: all class weights are equal, nothing changes.", category=NoEffect)

    def _mean_sample_weight(self, trainer: Any, pl_module: Any) -> float:
        """Return the mean weight of the training samples, of class and sample together."""
        if self.mean_weight is not None:
            return self.mean_weight
        sums = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        for batch in epoch_batches(trainer, pl_module, "measuring the mean of the sample weights", "mean_weight="):
            w = self._transformed(raw_sample_weights(batch, self.weights.selector))
            if len(self.weights.table):
                w = w * self.weights.by_label(targets_of(batch, self.labels))
            sums += torch.stack([w.sum().to(sums), torch.tensor(w.numel()).to(sums)])
        total, number = all_sum(sums).tolist()
        if not total > 0:
            raise InvalidArgument("The sample weights of the training data are all 0: nothing would be trained.")
        return total / number

    def _weights_of_batch(self, batch: Any) -> tuple[Tensor, Tensor]:
        labels: Any = targets_of(batch, self.labels)
        w = self.weights_of(batch, labels)
        self.weights.total = self.weights.total.to(w.device) + w.sum()
        whole = len(self.weights.table) or not labels.is_floating_point()
        return w, labels >= 0 if whole and labels.shape == w.shape else torch.ones_like(w, dtype=torch.bool)

    def weights_of(self, batch: Any, labels: Tensor) -> Tensor:
        """Return the weight that acts on each sample of a batch now, `(B,)` in float64.

        Args:
            batch: as the loader gave it.
            labels: `(B,)` the classes of its samples; those below 0 are ignored ones. With weights by sample alone
                `(B, ...)` of any kind.

        Raises:
            BatchFormat: if there is not one target a sample, or the batch holds no weights.
            InvalidArgument: for a label without a weight.
            ShapeMismatch: if there is not one weight for each sample.
        """
        if not isinstance(labels, Tensor) or labels.ndim < 1 or (len(self.weights.table) and labels.ndim > 1):
            raise BatchFormat("One target a sample is needed, (B,); say where it is in a batch with labels=.")
        w = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
        s = self.weights.strength
        if len(self.weights.table):
            w = 1 + s * (self.weights.by_label(labels) - 1)
        if self.weights.sample_weighted:
            own = self._transformed(raw_sample_weights(batch, self.weights.selector)) / self.weights.mean_weight
            if own.shape != w.shape:
                raise ShapeMismatch(
                    f"There are weights of shape {tuple(own.shape)} for {len(w)} samples; one for each."
                )
            w = w * (1 + s * (own.to(w.device) - 1))
        return w

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Divide by the weights of all accumulated batches, which are known only now."""
        self._step.close_window(optimizer)

    # -- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the weighted risk anew."""
        self._validation.begin()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Catch the losses of the validation step: to measure the weighted risk, or to weight them if asked to."""
        ready = self._module is not None and self._prepared and not trainer.sanity_checking
        if ready and self._can_measure(batch):
            self._validation.enter(batch, self._step.loss_modules(pl_module), self._step.module_match)

    def _can_measure(self, batch: Any) -> bool:
        if not self.weights.sample_weighted or self.weight_validation:
            return True
        try:
            raw_sample_weights(batch, self.weights.selector)
        except Exception as error:  # also what a user's own function raises: the validation must go on
            self._tell_once("the validation risk is not logged", error)
            return False
        return True

    def _tell_once(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(f"ImportanceWeighting: {what}: {error}", category=NoEffect)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Let go of the validation step."""
        self._validation.leave()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the weighted mean of the losses."""
        if trainer.sanity_checking or self._module is None:
            return
        risk = self._validation.value(pl_module.device)
        if risk is not None:
            pl_module.log(f"{self.log_prefix}/val_risk", risk, sync_dist=world_size() > 1)

    # -- estimation --------------------------------------------------------------------------------------------------

    def _estimate(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        """Estimate class weights from the target as of the end of an epoch, if that is due and was not done."""
        shift = self.class_weights
        if not isinstance(shift, LabelShift) or epoch <= self._estimated:
            return
        if epoch + 1 < shift.start_epoch or (epoch + 1 - shift.start_epoch) % shift.every_n_epochs:
            return
        self._estimated = epoch
        source, labels = read_logits(trainer, pl_module, shift.source, self.labels, labelled=True)
        target, _ = read_logits(trainer, pl_module, shift.target, self.labels, labelled=False)
        try:
            found = shift.estimate(source, labels, target)
        except InvalidArgument as error:
            self._tell_once("the label shift could not be estimated, and the weights stay", error)
            return
        self.estimate = found
        self._take(self._transformed(found.weights), found.source_prior)
        self.figure_paths = show_estimate(trainer, found, self.log_prefix)
