"""The parts of a distillation, made from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lightning_methods.core._lightning import Callback, rank_zero_warn
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, check_choice
from lightning_methods.lit.adapters import Adapters
from lightning_methods.lit.distillation import SectionDistillation, fit_adapters
from lightning_methods.lit.ends import Ends
from lightning_methods.lit.sections import Pair
from lightning_methods.lit.settings import Settings


class ReleaseOnException(Callback):
    """Removes a module's hooks after a crash, where Lightning tells callbacks alone."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the module go."""
        pl_module.release()


def check_numbers(finetune_lr: float, loss_scale: float, clone_features: bool | str) -> None:
    """Raise `InvalidArgument` for numbers out of range."""
    if not 0 < finetune_lr < float("inf") or not 0 < loss_scale < float("inf"):
        raise InvalidArgument(
            f"finetune_lr={finetune_lr} and loss_scale={loss_scale}: positive numbers are needed. The paper's code has "
            f"0.01 and 0.5."
        )
    if clone_features not in (True, False, "auto"):
        raise InvalidArgument(f"clone_features={clone_features!r}: True, False or 'auto' is needed.")


def refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Raise `InvalidArgument` where training the student would change the teacher."""
    theirs = {id(p): name for name, p in teacher.named_parameters()}
    shared = [name for name, p in student.named_parameters() if id(p) in theirs]
    if teacher is student or shared:
        raise InvalidArgument(
            f"Teacher and student share parameters ({', '.join(shared[:5])}): training the one would change the other. "
            f"Give copy.deepcopy(teacher) as the student."
        )


def section_distillation(
    teacher: nn.Module,
    student: nn.Module,
    pairs: list[Pair],
    options: Settings,
    adapters: nn.ModuleList | None = None,
    clone: bool | Literal["auto"] = "auto",
    early: bool = False,
) -> SectionDistillation:
    """Return the sections' part of a distillation."""
    weights = options.section_weights
    if weights is not None and len(weights) != len(pairs):
        raise InvalidArgument(f"{len(weights)} section_weights for {len(pairs)} sections: one each is needed.")
    return SectionDistillation(
        teacher,
        student,
        pairs,
        fed_by="student" if options.mode == "fitnets" else "teacher",
        loss=options.section_loss,
        weights=weights,
        statistics=options.statistics,
        adapters=[*adapters] if adapters else None,
        clone=clone,
        early=early,
    )


def made_ends(
    teacher: nn.Module, student: nn.Module, pairs: list[Pair], options: Settings, *, resumed: bool = False
) -> Ends:
    """Return the student's ends, copied from the teacher's where the settings say so and no checkpoint brought them."""
    ends = Ends(student, [pair.student for pair in pairs])
    stages = [pair.teacher for pair in pairs]
    left = ends.copy(teacher, stages, only_names=resumed) if options.copies else []
    if left and not resumed:
        rank_zero_warn(
            f"The teacher has no tensor of the same name and shape outside of its sections for {left[:5]}"
            f"{' and others' if len(left) > 5 else ''}: they keep their own values and are trained from the start.",
            category=LightningMethodsWarning,
        )
    return ends


def made_adapters(
    kind: Adapters,
    teacher: nn.Module,
    student: nn.Module,
    pairs: list[Pair],
    input_shape: Sequence[int] | None,
    *,
    fed: bool,
) -> nn.ModuleList:
    """Return one adapter for each section, for inputs of a shape; without a map of inputs where none are fed."""
    check_choice("adapters", kind, ("none", "conv1x1", "select"))
    if kind == "none" or input_shape is None:
        raise InvalidArgument(f"adapters={kind!r} needs input_shape=, that of one sample, for instance [3, 32, 32].")
    example = next(student.parameters()).new_zeros((2, *input_shape))
    return fit_adapters(kind, teacher, student, pairs, (example,), {}, fed=fed)
