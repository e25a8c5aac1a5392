"""A LightningModule that distils a deep network into a shallow one, section by section."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_methods.core._lightning import Callback, LightningModule, OneFamily, rank_zero_info
from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.gather import world_size
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    UnsupportedTraining,
)
from lightning_methods.lit.adapters import Adapters
from lightning_methods.lit.build import (
    ReleaseOnException,
    check_numbers,
    made_adapters,
    made_ends,
    refuse_shared,
    section_distillation,
)
from lightning_methods.lit.distillation import SectionDistillation, Statistics
from lightning_methods.lit.ends import Ends
from lightning_methods.lit.functional import SectionLoss, kd_terms
from lightning_methods.lit.history import History
from lightning_methods.lit.matching import call_arguments
from lightning_methods.lit.measure import Example
from lightning_methods.lit.outputs import accuracy, agreement, logits_of, size_of
from lightning_methods.lit.phases import (
    PhasePlan,
    paper_sgd,
    paper_steps,
    plan_phases,
    restart,
    scheduled,
    set_learning_rate,
)
from lightning_methods.lit.sections import Pair, Sections, find_pairs
from lightning_methods.lit.settings import Mode, Settings
from lightning_methods.lit.showing import show_history, show_networks, show_stitching
from lightning_methods.lit.stitching import check_stitching, stitching_report
from lightning_methods.lit.teachers import Outside, load_teacher, refuse_another


class LITDistiller(OneFamily, LightningModule):
    r"""Distil a teacher into a shallower student that is cut at the same places (Koratana et al. 2019).

    In phase 1 each section of the student gets the teacher's input of that section and is to give the teacher's output,
    while the student as a whole is distilled; its ends, copied from the teacher, stand still:

    .. math::
        L = \beta\, L_{KD}(S(x), T(x), y) + (1 - \beta) \sum_{i=1}^{k} \ell\big(S_i(T_{i-1}(x)),\, T_i(x)\big)

    In phase 2 the whole student is distilled, with a fresh optimizer. Both happen within one `fit`.

    Logs at the end of every epoch `train/loss`, `train/accuracy`, `val/loss` (cross-entropy), `val/accuracy`,
    `val/agreement` (with the teacher's predictions) and the same under `test/`; `lit/phase`, `lit/kd_hard`,
    `lit/kd_soft`, `lit/ir`, `lit/ir/<section>`, `lit/ir_rel/<section>` (error over the teacher's mean square), and of
    the validation data `lit/teacher_fed/<section>` and `lit/student_fed/<section>`: how far the errors of earlier
    sections carry. Figures and tables: `lit/section_errors`, `lit/drift`, `lit/sections`, `lit/networks`,
    `lit/stitching`.

    Args:
        teacher: a network, or a model by name, see `load_teacher`; `None` to use the student alone.
        student: the network that is trained.
        sections: names of the sections in execution order; (teacher's name, student's name) where they differ;
            `"features.0:5"` for the modules 0 to 4 of an `nn.Sequential`; `"auto"` for the children that both have
            under one name with different numbers of parameters.
        mode: `"lit"`; `"kd"` (distillation alone); `"kd_copied_ends"` (with the teacher's ends, frozen in phase 1: the
            control that tells what copying alone brings); `"fitnets"` (sections get the student's own features);
            `"scratch"` (no teacher). Learning rates and epochs are the same in all.
        alpha: share of the hard term of the distillation loss. The paper's code has 0.95.
        beta: share of the distillation loss in phase 1; at 1 sections are left out, at 0 the student never runs by
            itself. The paper's code has 0.75 on CIFAR-10, 0.05 on Amazon reviews.
        temperature: of the soft term. The paper's code has 6.
        soft: cross-entropy `"ce"` (the paper's code) or divergence `"kl"`, of the same gradient.
        section_loss: `"mse"` (the paper's), `"l1"`, `"smooth_l1"` or a function of two tensors.
        section_weights: one a section, default 1.
        lit_epochs, finetune_epochs: how long the phases last; by default the training is divided as 175 to 125.
        optimizer: from parameters to an optimizer. Default SGD, learning rate 0.1, momentum 0.9, weight decay 1e-4.
        scheduler: of phase 1, from the optimizer, stepped once an epoch. Default: a tenth after 100 of 175 epochs.
        finetune_lr: learning rate of phase 2. The paper's code has 0.01.
        finetune_scheduler: of phase 2. Default: a tenth after 55 of 125 epochs.
        copy_ends: whether what lies outside of the sections is copied from the teacher.
        freeze_ends: whether it then stands still in phase 1.
        bn_stats: which pass updates running statistics of the sections: the `"student"`'s own, the `"teacher"`-fed one,
            or `"both"` as in the paper's code. `"auto"`: the student's own, at `beta=0` the teacher-fed one.
        adapters: where widths differ (an extension): `"conv1x1"` learns maps between them, `"select"` takes a fixed
            choice of the teacher's channels. Not part of the exported student.
        input_shape: of one sample, to make adapters for.
        loss_scale: factor of the loss in training. The paper's code on CIFAR-10 has 0.5.
        reuse_first_section: run the first section once where the student's frozen part before it gives what the
            teacher's gives; the loss is the same.
        clone_features: copy features before an in-place operation can overwrite them; `"auto"` where it happens.
        sequential_backward: take the gradient of each section at once, so that one section's graph is kept at a time.
        teacher_ckpt: a file with the teacher's weights, see `load_teacher`.
        inputs, targets: where they are in a batch: index, key or function. Inputs may be a dict of named arguments.
        stitch: evaluate after phase 1 every mixture of the teacher's and the student's sections.

    Raises:
        InvalidArgument: if a setting is out of range or contradicts another, or a checkpoint was made with another
            teacher.
        LayerNotFound: if a section is unknown.
        ShapeMismatch: at the first step, if sections do not fit together, with a table of them.
        UnsupportedTraining: if a section runs several times or in another order, or under manual optimisation.

    Example:
        >>> from lightning_methods.models import CIFARResNet
        >>> model = LITDistiller(CIFARResNet(20, width=4), CIFARResNet(8, width=4))
        >>> [pair.name for pair in model.pairs]
        ['layer1', 'layer2', 'layer3']

    Deviations from the paper: the paper's code updates batch norm in both passes, keeps the stem and the head frozen in
    phase 2 on CIFAR-10, and reports the best test accuracy of all epochs. Here only the student's own pass counts,
    phase 2 trains everything, and the last epoch is what is logged last.
    """

    def __init__(
        self,
        teacher: nn.Module | str | None,
        student: nn.Module,
        sections: Sections = "auto",
        *,
        mode: Mode = "lit",
        alpha: float = 0.95,
        beta: float = 0.75,
        temperature: float = 6.0,
        soft: Literal["ce", "kl"] = "ce",
        section_loss: SectionLoss = "mse",
        section_weights: Sequence[float] | None = None,
        lit_epochs: int | None = None,
        finetune_epochs: int | None = None,
        optimizer: Callable[[Iterable], Optimizer] = paper_sgd,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        finetune_lr: float = 0.01,
        finetune_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        copy_ends: bool = True,
        freeze_ends: bool = True,
        bn_stats: Statistics = "auto",
        adapters: Adapters = "none",
        input_shape: Sequence[int] | None = None,
        loss_scale: float = 1.0,
        reuse_first_section: bool = True,
        clone_features: bool | Literal["auto"] = "auto",
        sequential_backward: bool = False,
        teacher_ckpt: str | None = None,
        inputs: int | str | Callable[[Any], Any] | None = None,
        targets: int | str | Callable[[Any], Any] | None = None,
        stitch: bool = False,
    ) -> None:
        super().__init__()
        self.options = Settings(
            mode, alpha, beta, temperature, soft, section_loss, section_weights, bn_stats, copy_ends, freeze_ends
        )
        check_numbers(finetune_lr, loss_scale, clone_features)
        # plain values only, so that checkpoints load with weights_only=True
        self.save_hyperparameters(
            *("mode", "alpha", "beta", "temperature", "soft", "lit_epochs", "finetune_epochs", "finetune_lr"),
            *("copy_ends", "freeze_ends", "bn_stats", "adapters", "loss_scale"),
        )
        self.student = student
        self.lit_epochs, self.finetune_epochs = lit_epochs, finetune_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        self.finetune_lr, self.finetune_scheduler = finetune_lr, finetune_scheduler
        self.loss_scale, self.reuse_first_section = loss_scale, reuse_first_section
        self.inputs: Selector = inputs
        self.targets: Selector = targets
        self.stitch = stitch
        self.adapters = nn.ModuleList()
        self.plan: PhasePlan | None = None
        self.history = History()
        self._sections: SectionDistillation | None = None
        self._ends: Ends | None = None
        self._outside: Outside | None = None
        self._optimizer_phase = 1
        self._scheduled: Any = None
        self._restored_phase: int | None = None
        self._inspected = False
        self._example: Example | None = None
        if teacher is None or mode == "scratch":
            return
        network = load_teacher(teacher, teacher_ckpt)
        refuse_shared(network, student)
        self._outside = Outside(network)
        pairs = find_pairs(network, student, sections)
        if adapters != "none" and self.options.trains_sections:
            self.adapters = made_adapters(adapters, network, student, pairs, input_shape, fed=mode == "lit")
        if stitch:
            check_stitching(pairs, adapters)
        self._manner = (clone_features, sequential_backward)
        self._build(network, pairs, resumed=False)

    def _build(self, teacher: nn.Module, pairs: list[Pair], *, resumed: bool) -> None:
        self._sections = section_distillation(teacher, self.student, pairs, self.options, self.adapters, *self._manner)
        self._ends = made_ends(teacher, self.student, pairs, self.options, resumed=resumed)

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """Return the teacher, which is no submodule: optimizers, checkpoints and DDP do not see it."""
        return None if self._outside is None else self._outside.network

    @property
    def pairs(self) -> list[Pair]:
        """Return the sections."""
        return [] if self._sections is None else self._sections.pairs

    @property
    def phase(self) -> int:
        """Return the running phase, 1 or 2."""
        if self._trainer is None or self.plan is None:
            return 1
        return self.plan.phase_of(self.trainer.current_epoch)

    @property
    def reuses_first_section(self) -> bool:
        """Tell whether the first section runs once a step: found out in the first step of a fit."""
        return self._sections is not None and self._sections.reuse

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the student gives."""
        return self.student(*args, **kwargs)

    def export_student(self) -> dict[str, Tensor]:
        """Return a copy of the student's state under its own names, on the CPU, for `student.load_state_dict`."""
        state = self.student.state_dict()
        return {name.replace("_orig_mod.", ""): tensor.detach().cpu().clone() for name, tensor in state.items()}

    def train(self, mode: bool = True) -> LITDistiller:
        """Set the mode of the student; the teacher stays in eval mode, and frozen ends with it."""
        super().train(mode)
        if (teacher := self.teacher) is not None:
            teacher.eval()
        if mode and self._ends is not None and self._ends.is_frozen:
            self._ends.freeze()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LITDistiller:
        if (teacher := self.teacher) is not None:
            teacher._apply(fn)  # to the same device and type, though it is no submodule
        return super()._apply(fn, recurse)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Return what removes the hooks after a crash, where Lightning tells callbacks alone."""
        return [ReleaseOnException()]

    def setup(self, stage: str) -> None:
        """Plan the phases and register the hooks."""
        if stage == "fit":
            if self.teacher is None and self.options.mode != "scratch":
                raise InvalidArgument(f"mode={self.options.mode!r} needs a teacher, and teacher is None.")
            if not self.automatic_optimization:
                raise UnsupportedTraining("LITDistiller optimises automatically; automatic_optimization=False was set.")
            self.plan = plan_phases(self.lit_epochs, self.finetune_epochs, self.trainer.max_epochs)
            self._restored_phase, self._inspected, self._example = None, False, None
            if self.trainer.global_step == 0:
                self.history = History()
        if self._sections is not None and self.teacher is not None:
            # parts may have been compiled, wrapped or replaced since
            names = [(pair.teacher.path, pair.student.path) for pair in self.pairs]
            self.release()
            self._build(self.teacher, find_pairs(self.teacher, self.student, names), resumed=True)
            self._sections.attach()

    def teardown(self, stage: str) -> None:
        """Remove the hooks."""
        self.release()

    def release(self) -> None:
        """Remove every hook and put modes back; harmless when called twice."""
        if self._sections is not None:
            self._sections.detach()
        if self._ends is not None:
            self._ends.thaw()

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the scheduler of the phase that runs."""
        optimizer = self.optimizer(self.parameters())
        assert self.plan is not None
        phase = self._restored_phase or self.plan.phase_of(self.trainer.current_epoch)
        if phase == 2:
            set_learning_rate(optimizer, self.finetune_lr)
        self._optimizer_phase = phase
        self._scheduled = self._schedule(optimizer, phase)
        return {"optimizer": optimizer, "lr_scheduler": scheduled(self._scheduled)}

    def _schedule(self, optimizer: Optimizer, phase: int) -> LRScheduler:
        assert self.plan is not None
        chosen = self.scheduler if phase == 1 else self.finetune_scheduler
        if chosen is not None:
            return chosen(optimizer)
        return paper_steps(optimizer, self.plan.lit if phase == 1 else self.plan.finetune, phase)

    def on_train_start(self) -> None:
        """Enter the phase, also in the middle of an epoch that is resumed."""
        self._enter_phase()

    def on_train_epoch_start(self) -> None:
        """Enter the phase."""
        self._enter_phase()

    def _enter_phase(self) -> None:
        phase = self.phase
        if phase == 2 and self._optimizer_phase == 1:
            self._report_stitching()
            restart(self.trainer, self._scheduled, self.finetune_lr, lambda optimizer: self._schedule(optimizer, 2))
            self._optimizer_phase = 2
            rank_zero_info(f"LITDistiller: phase 2 begins at epoch {self.trainer.current_epoch}, all of it is trained")
        if self._ends is not None:
            if phase == 1 and self.options.freezes:
                self._ends.freeze()
            else:
                self._ends.thaw()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the optimizer pass frozen ends by; before the clipping, which they are no part of."""
        if self._ends is not None:
            self._ends.drop_gradients()

    # -- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the phase."""
        args, kwargs = call_arguments(inputs_of(batch, self.inputs))
        if self._example is None:
            self._example = Example(args, kwargs)
        options, phase = self.options, self.phase
        target = self._targets(batch, needed=options.uses_student(phase) and options.alpha > 0)
        if self._sections is None:
            logits = logits_of(self.student(*args, **kwargs))
            hard, _ = kd_terms(logits, logits, target, alpha=1.0, temperature=1.0)
            assert hard is not None
            self._log_step({"loss": hard}, {}, logits, target)
            return hard * self.loss_scale
        if not options.uses_sections(phase):
            taught = logits_of(self._sections.run_teacher(args, kwargs))
            logits = logits_of(self.student(*args, **kwargs))
            loss, shown = self._distilled(logits, taught, target)
            self._log_step({"loss": loss}, shown, logits, target)
            return (loss + self._touched(ends=False)) * self.loss_scale
        return self._section_step(self._sections, args, kwargs, target)

    def _section_step(
        self, sections: SectionDistillation, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor | None
    ) -> Tensor:
        options = self.options
        if not self._inspected:
            stands_still = options.copies and options.freezes and self._ends is not None and self._ends.is_frozen
            may_reuse = stands_still and self.reuse_first_section and options.beta > 0 and not len(self.adapters)
            sections.inspect(args, kwargs, reuse=may_reuse)
            self._inspected = True
        logits: Tensor | None = None
        shown: dict[str, Tensor] = {}
        with sections.lesson(args, kwargs) as lesson:
            outcomes = sections.fed_losses(lesson)
            if options.uses_student(1):
                with sections.own_pass() as own:
                    logits = logits_of(self.student(*args, **kwargs))
                    if sections.listens:
                        outcomes |= sections.own_losses(lesson, own())
            regression = sections.total(outcomes)
            loss = (1 - options.beta) * regression
            if options.beta > 0:
                assert logits is not None
                distilled, shown = self._distilled(logits, logits_of(lesson.output), target)
                loss = options.beta * distilled + loss
        for pair in self.pairs:
            shown[f"ir/{pair.name}"] = outcomes[pair.name].loss
            shown[f"ir_rel/{pair.name}"] = outcomes[pair.name].relative
        self._log_step({"loss": loss}, {**shown, "ir": regression}, logits, target, size=size_of(args, kwargs))
        return (loss + self._touched(ends=options.beta == 0)) * self.loss_scale

    def _distilled(self, logits: Tensor, taught: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        hard, soft = kd_terms(
            logits, taught, target, alpha=options.alpha, temperature=options.temperature, soft=options.soft
        )
        loss = (1 - options.alpha) * options.temperature**2 * soft
        shown = {"kd_soft": soft}
        if hard is not None:
            loss, shown["kd_hard"] = options.alpha * hard + loss, hard
        return loss, shown

    def _touched(self, *, ends: bool) -> Tensor | float:
        """Return 0 with what this step did not use in its graph, without which DDP waits for its gradient."""
        if world_size() == 1:
            return 0.0
        unused = self._ends.parameters() if ends and self._ends is not None else list(self.adapters.parameters())
        return sum((p.flatten()[:0].sum().float() for p in unused if p.requires_grad), 0.0)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the student's class probabilities, in float32."""
        args, kwargs = call_arguments(inputs_of(batch, self.inputs))
        return logits_of(self.student(*args, **kwargs)).float().softmax(1)

    def _evaluate(self, stage: str, batch: Any) -> None:
        args, kwargs = call_arguments(inputs_of(batch, self.inputs))
        target = self._targets(batch, needed=False)
        shown: dict[str, Tensor] = {}
        if self._sections is None:
            logits = logits_of(self.student(*args, **kwargs))
        elif not self.options.trains_sections:
            logits, taught = logits_of(self.student(*args, **kwargs)), self._sections.run_teacher(args, kwargs)
            shown[f"{stage}/agreement"] = agreement(logits, logits_of(taught))
        else:
            if not self._sections.is_inspected:  # validated before it is trained
                self._sections.inspect(args, kwargs, reuse=False)
            with self._sections.own_pass() as own, self._sections.lesson(args, kwargs) as lesson:
                logits = logits_of(self.student(*args, **kwargs))
                shown |= {f"lit/{key}": error for key, error in self._sections.drift(lesson, own()).items()}
                shown[f"{stage}/agreement"] = agreement(logits, logits_of(lesson.output))
        if target is not None:
            hard, _ = kd_terms(logits, logits, target, alpha=1.0, temperature=1.0)
            assert hard is not None
            shown[f"{stage}/loss"] = hard
            shown |= accuracy(stage, logits, target)
        self._log(shown, size_of(args, kwargs), bar=(f"{stage}/loss", f"{stage}/accuracy"))

    # -- what is shown -----------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's values for the curves."""
        metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("lit/")}
        if not self.options.uses_sections(self.phase):  # Lightning keeps the last values of phase 1
            metrics = {k: v for k, v in metrics.items() if not k.startswith("lit/ir")}
        self.history.add(self.trainer.current_epoch, metrics)

    def on_train_end(self) -> None:
        """Draw the curves and the tables."""
        if self.trainer.barebones or self.teacher is None:
            return
        if self.plan is not None and self._optimizer_phase == 1:
            self._report_stitching()
        show_history(self.trainer, self.history, self.pairs)
        show_networks(self.trainer, {"teacher": self.teacher, "student": self.student}, self._example)

    def _report_stitching(self) -> None:
        if self.stitch and self.teacher is not None:
            show_stitching(self.trainer, stitching_report(self.trainer, self, self._arguments_of))

    def _arguments_of(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        return *call_arguments(inputs_of(batch, self.inputs)), self._targets(batch, needed=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which teacher and which phase it was."""
        checkpoint["lit"] = {
            "phase": self._optimizer_phase,
            "history": self.history.state_dict(),
            "fingerprint": None if self._outside is None else self._outside.fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another teacher, and take up the phase."""
        state = checkpoint.get("lit")
        if state is None:
            return
        if self._outside is not None and state["fingerprint"] is not None:
            alone = ", or load the student alone: LITDistiller.load_from_checkpoint(path, teacher=None, student=...)"
            refuse_another(state["fingerprint"], self._outside.fingerprint, alone)
        self._restored_phase = state["phase"]
        self.history.load_state_dict(state["history"])

    def _targets(self, batch: Any, *, needed: bool) -> Tensor | None:
        try:
            return targets_of(batch, self.targets)
        except BatchFormat:
            if needed or self.targets is not None:
                raise
            return None

    def _log_step(
        self,
        losses: dict[str, Tensor],
        shown: dict[str, Tensor],
        logits: Tensor | None,
        target: Tensor | None,
        size: int | None = None,
    ) -> None:
        values = {f"train/{k}": v for k, v in losses.items()}
        values |= {f"lit/{k}": v for k, v in shown.items()}
        values["lit/phase"] = torch.tensor(float(self.phase))
        if logits is not None and target is not None:
            values |= accuracy("train", logits, target)
        self._log(values, size or (len(logits) if logits is not None else 1), bar=("train/loss", "train/accuracy"))

    def _log(self, values: dict[str, Tensor], size: int, *, bar: tuple[str, ...]) -> None:
        if self._trainer is None or self._trainer.barebones:
            return
        kept: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": size, "sync_dist": True}
        for key, value in values.items():
            self.log(key, value.detach().float(), prog_bar=key in bar, **kept)
