"""LIT on a LightningModule that exists: a callback that changes the loss of its training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_methods.core._lightning import Callback, rank_zero_info
from lightning_methods.core.gather import gather_sizes, world_size
from lightning_methods.core.layers import named_layers_first
from lightning_methods.core.losses import LossHub, TrainingStep
from lightning_methods.core.means import EpochMeans
from lightning_methods.errors import InvalidArgument, LayerNotFound, TensorOverwritten, did_you_mean
from lightning_methods.lit.build import made_ends, refuse_shared, section_distillation
from lightning_methods.lit.capture import Call, SectionTap
from lightning_methods.lit.distillation import SectionDistillation, Statistics
from lightning_methods.lit.ends import Ends
from lightning_methods.lit.functional import SectionLoss, kd_terms
from lightning_methods.lit.history import History
from lightning_methods.lit.measure import Example
from lightning_methods.lit.outputs import logits_of, size_of
from lightning_methods.lit.phases import PhasePlan, plan_phases
from lightning_methods.lit.sections import Sections, Stage, find_pairs
from lightning_methods.lit.settings import Mode, Settings
from lightning_methods.lit.showing import show_history, show_networks
from lightning_methods.lit.teachers import fingerprint, load_teacher, refuse_another

# the mean square of a section's error and of its target: the share of an epoch is theirs, not a mean of shares
_ERROR, _SIZE = "error/", "size/"


@dataclass(frozen=True)
class _Watched:
    """What the user's step is watched by: the whole student, its sections, and the precision it runs in."""

    whole: Callable[[], list[Call]]
    own: Callable[[], list[Call]]
    precision: AbstractContextManager[Any]


class LITDistillation(Callback):
    r"""Distil a teacher into the network of an unchanged module, section by section (Koratana et al. 2019).

    The module's own loss stands for the hard term. With :math:`L` for it, the loss becomes in phase 1

    .. math::
        \beta \big(\alpha L + (1 - \alpha)\, \tau^2 H(T(x)/\tau, S(x)/\tau)\big)
            + (1 - \beta) \sum_{i=1}^{k} \ell\big(S_i(T_{i-1}(x)),\, T_i(x)\big)

    and in phase 2 what stands in the bracket. The teacher is given what the student was given. In phase 1 the student's
    ends are the teacher's and stand still. Optimizer and schedule are the module's; between the phases the optimizer
    loses its momentum.

    Logs once an epoch `lit/loss` (what is optimised), `lit/kd_soft`, `lit/ir`, `lit/ir/<section>`,
    `lit/ir_rel/<section>` (error over the teacher's mean square) and `lit/phase`; at the end the figure
    `lit/section_errors` and the tables `lit/sections`, `lit/networks`.

    Args:
        teacher: a network, or a model by name, see `load_teacher`.
        sections: see `LITDistiller`; names are those within the student.
        student: the module's attribute that is the student, `None` for the module itself where its training step calls
            `self(...)`; its output is logits, or has them.
        mode: `"lit"`, `"kd"`, `"kd_copied_ends"` or `"fitnets"`, see `LITDistiller`.
        alpha, beta, temperature, soft, section_loss, section_weights: see `LITDistiller`.
        lit_epochs, finetune_epochs: how long the phases last; by default the training is divided as 175 to 125.
        copy_ends, freeze_ends, bn_stats, clone_features, sequential_backward: see `LITDistiller`.
        reuse_first_section: see `LITDistiller`.
        restart_optimizer: whether the optimizer's state is cleared between the phases.
        teacher_ckpt: a file with the teacher's weights, see `load_teacher`.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: if a setting is out of range or contradicts another, or a checkpoint was made with another
            teacher.
        LayerNotFound: if the student or a section is unknown.
        ShapeMismatch: at the first step, if sections do not fit together.
        UnsupportedTraining: under manual optimisation, or if a section runs several times.

    Example:
        >>> from lightning_methods.models import CIFARResNet
        >>> callback = LITDistillation(CIFARResNet(20, width=4), ["layer1", "layer2", "layer3"], student="net")

    Deviations from the paper: see `LITDistiller`. The learning rate is not set anew between the phases, since the
    schedule is the module's.
    """

    method: ClassVar[str] = "lit"

    def __init__(
        self,
        teacher: nn.Module | str,
        sections: Sections = "auto",
        *,
        student: str | None = "net",
        mode: Mode = "lit",
        alpha: float = 0.95,
        beta: float = 0.75,
        temperature: float = 6.0,
        soft: Literal["ce", "kl"] = "ce",
        section_loss: SectionLoss = "mse",
        section_weights: Sequence[float] | None = None,
        lit_epochs: int | None = None,
        finetune_epochs: int | None = None,
        copy_ends: bool = True,
        freeze_ends: bool = True,
        bn_stats: Statistics = "auto",
        reuse_first_section: bool = True,
        clone_features: bool | Literal["auto"] = "auto",
        sequential_backward: bool = False,
        restart_optimizer: bool = True,
        teacher_ckpt: str | None = None,
        log_prefix: str | None = None,
    ) -> None:
        self.options = Settings(
            mode, alpha, beta, temperature, soft, section_loss, section_weights, bn_stats, copy_ends, freeze_ends
        )
        if mode == "scratch":
            raise InvalidArgument("mode='scratch' has no teacher: train without the callback.")
        if clone_features not in (True, False, "auto"):
            raise InvalidArgument(f"clone_features={clone_features!r}: True, False or 'auto' is needed.")
        self.teacher = load_teacher(teacher, teacher_ckpt)
        self.fingerprint = fingerprint(self.teacher)
        self.sections: Sections = sections
        self.student = student
        self.lit_epochs, self.finetune_epochs = lit_epochs, finetune_epochs
        self.reuse_first_section = reuse_first_section
        self.clone_features: bool | Literal["auto"] = clone_features
        self.sequential_backward = sequential_backward
        self.restart_optimizer = restart_optimizer
        self.log_prefix = log_prefix or self.method
        self.plan: PhasePlan | None = None
        self._module: Any = None
        self._parts: SectionDistillation | None = None
        self._ends: Ends | None = None
        self._whole: SectionTap | None = None
        self._watched: _Watched | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured in an earlier fit."""
        self.history = History()
        self._means = EpochMeans()
        self._epoch, self._optimizer_phase = 0, 1
        self._example: Example | None = None

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(student=self.student, log_prefix=self.log_prefix)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Plan the phases; a checkpoint's state comes after this."""
        if stage == "fit":
            self.plan = plan_phases(self.lit_epochs, self.finetune_epochs, trainer.max_epochs)
            if trainer.global_step == 0:
                self.reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the student and join the hub; here, since modules may be built as late as `configure_model`."""
        others = [c for c in trainer.callbacks if isinstance(c, LITDistillation) and c is not self]
        if any(c.student == self.student for c in others):
            raise InvalidArgument(
                f"Two LITDistillation callbacks distil into {self.student!r}: each takes the module's loss as its own "
                f"share. Use one, or students of different names in a module whose loss is a sum."
            )
        student = self._found(pl_module)
        teacher = trainer.precision_plugin.convert_module(self.teacher.to(pl_module.device))
        refuse_shared(teacher, student)
        pairs = find_pairs(teacher, student, self.sections)
        self._parts = section_distillation(
            teacher, student, pairs, self.options, None, self.clone_features, self.sequential_backward
        )
        self._ends = made_ends(teacher, student, pairs, self.options, resumed=trainer.ckpt_path is not None)
        self._whole = SectionTap([Stage(self.student or "forward", (student,), ("",))], "module")
        LossHub.join(pl_module, self)
        self._module = pl_module
        self._parts.attach()
        self._whole.attach()
        rank_zero_info(f"LITDistillation: sections {', '.join(p.name for p in pairs)} of {self.student!r}")

    def _found(self, module: Any) -> nn.Module:
        if self.student is None:
            return module
        layers = dict(named_layers_first(module))
        if self.student not in layers:
            raise LayerNotFound(
                f"The module has no {self.student!r} to be the student. Set student=. "
                f"{did_you_mean(self.student, layers)}"
            )
        return layers[self.student]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Enter the phase, also in the middle of an epoch that is resumed."""
        self._enter_phase(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Enter the phase."""
        self._enter_phase(trainer)

    def _enter_phase(self, trainer: Any) -> None:
        phase = self._phase(trainer.current_epoch)
        if phase == 2 and self._optimizer_phase == 1:
            self._optimizer_phase = 2
            if self.restart_optimizer:
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()
            rank_zero_info(f"LITDistillation: phase 2 begins at epoch {trainer.current_epoch}")
        if self._ends is not None:
            if phase == 1 and self.options.freezes:
                self._ends.freeze()
            else:
                self._ends.thaw()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self._close_epoch()
        self._epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the epoch."""
        for key, value in self._close_epoch().items():
            pl_module.log(f"{self.log_prefix}/{key}", value, sync_dist=world_size() > 1)

    def _close_epoch(self) -> dict[str, float]:
        means = self._means.close()
        errors = [key for key in means if key.startswith(_ERROR)]
        for key in errors:
            name = key.removeprefix(_ERROR)
            size = means.pop(_SIZE + name)
            means[f"ir_rel/{name}"] = means.pop(key) / size if size else 0.0
        self.history.add(self._epoch, {f"lit/{key}": value for key, value in means.items()})
        return means

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the optimizer pass frozen ends by; before the clipping, which they are no part of."""
        if self._ends is not None:
            self._ends.drop_gradients()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the curves and the tables."""
        if self._parts is None or trainer.barebones:
            return
        show_history(trainer, self.history, self._parts.pairs, prefix=self.log_prefix)
        networks = {"teacher": self._parts.teacher, "student": self._parts.student}
        show_networks(trainer, networks, self._example, prefix=self.log_prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return which teacher and which phase it is, and what was measured."""
        return {
            "fingerprint": self.fingerprint,
            "phase": self._optimizer_phase,
            "epoch": self._epoch,
            "means": self._means.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse another teacher, and take up what `state_dict` returned."""
        refuse_another(state_dict["fingerprint"], self.fingerprint)
        self._optimizer_phase, self._epoch = state_dict["phase"], state_dict["epoch"]
        self._means.load_state_dict(state_dict["means"])
        self.history.load_state_dict(state_dict["history"])

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
        """Remove every hook and the wrapper, and put modes back; harmless when called twice."""
        if self._parts is not None:
            self._parts.detach()
        if self._whole is not None:
            self._whole.detach()
        if self._ends is not None:
            self._ends.thaw()
        if self._module is not None:
            LossHub.leave(self._module, self)
        self._module = self._parts = self._ends = self._whole = None

    # -- the step ----------------------------------------------------------------------------------------------------

    def _phase(self, epoch: int) -> int:
        return 1 if self.plan is None else self.plan.phase_of(epoch)

    @contextmanager
    def around_step(self, module: Any, batch: Any, batch_idx: int) -> Iterator[None]:
        """Watch the student run in the user's step."""
        assert self._whole is not None
        assert self._parts is not None
        with ExitStack() as stack:
            whole = stack.enter_context(self._whole.recording())
            own: Any = list
            if self.options.uses_sections(self._phase(module.current_epoch)):
                own = stack.enter_context(self._parts.own_pass())
            device = module.device.type
            # the hub computes terms outside of autocast; networks run inside of what the user's step ran in
            half = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            self._watched = _Watched(whole, own, half)
            try:
                yield
            finally:
                self._watched = None

    def step_ended(self) -> None:
        """Take what the student did in the user's step, and watch no longer."""
        if self._watched is not None and self._whole is not None and self._parts is not None:
            self._whole.pause()
            self._parts.student_tap.pause()

    def loss_term(self, step: TrainingStep) -> Tensor:
        """Return what makes the user's loss that of the phase."""
        assert self._parts is not None
        assert self._watched is not None
        (call,) = self._watched.whole()
        if call.is_overwritten():
            raise TensorOverwritten(
                f"What {self.student!r} was given or returned was changed in place in the training step, so that the "
                f"teacher cannot be given the same. Leave out the in-place operation on it."
            )
        own = self._watched.own()
        phase = self._phase(step.module.current_epoch)
        if self._example is None:
            self._example = Example(call.args, call.kwargs)
        options, logits = self.options, logits_of(call.output)
        shown: dict[str, Tensor | float] = {"phase": float(phase)}
        regression: Tensor | None = None
        with self._watched.precision:
            if options.uses_sections(phase):
                taught, regression = self._section_terms(self._parts, call, own, shown)
            else:
                taught = logits_of(self._parts.run_teacher(call.args, call.kwargs))
        _, soft = kd_terms(logits, taught, None, alpha=0.0, temperature=options.temperature, soft=options.soft)
        share = options.share(phase)
        term = share * (1 - options.alpha) * options.temperature**2 * soft
        if regression is not None:
            term = term + (1 - options.beta) * regression
            shown["ir"] = regression
        self._means.add({**shown, "kd_soft": soft}, rows := size_of(call.args, call.kwargs))
        # means over the rows of a rank become the mean over all rows, also where the ranks' batches are unequal
        sizes = gather_sizes(rows, term.device)
        term = rows * len(sizes) / sum(sizes) * term
        self._means.add({"loss": share * options.alpha * step.loss + term}, sum(sizes))
        return term + (share * options.alpha - 1) * step.loss

    def _section_terms(
        self, parts: SectionDistillation, call: Call, own: Sequence[Call], shown: dict[str, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits and the sum of the sections' losses, and note what is shown of them."""
        if not parts.is_inspected:
            still = self.options.copies and self._ends is not None and self._ends.is_frozen
            parts.inspect(call.args, call.kwargs, reuse=still and self.reuse_first_section)
        with parts.lesson(call.args, call.kwargs) as lesson:
            outcomes = parts.fed_losses(lesson) | parts.own_losses(lesson, own)
            for name, outcome in outcomes.items():
                shown |= {f"ir/{name}": outcome.loss, _ERROR + name: outcome.error, _SIZE + name: outcome.size}
            return logits_of(lesson.output), parts.total(outcomes)
