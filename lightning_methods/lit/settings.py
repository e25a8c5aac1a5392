"""What the module and the callback are told, checked once, and what follows from the mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.lit.distillation import Statistics
from lightning_methods.lit.functional import SectionLoss, check_distillation

Mode = Literal["lit", "kd", "kd_copied_ends", "fitnets", "scratch"]
MODES = ("lit", "kd", "kd_copied_ends", "fitnets", "scratch")


@dataclass(frozen=True)
class Settings:
    """The choices of `LITDistiller` and `LITDistillation` that say what is optimised.

    Attributes:
        mode, alpha, beta, temperature, soft, section_loss, section_weights, bn_stats, copy_ends, freeze_ends: see
            `LITDistiller`.

    Raises:
        InvalidArgument: if a setting is out of range, or two of them contradict each other.
    """

    mode: Mode = "lit"
    alpha: float = 0.95
    beta: float = 0.75
    temperature: float = 6.0
    soft: Literal["ce", "kl"] = "ce"
    section_loss: SectionLoss = "mse"
    section_weights: Sequence[float] | None = None
    bn_stats: Statistics = "auto"
    copy_ends: bool = True
    freeze_ends: bool = True

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_distillation(self.alpha, self.temperature, self.soft)
        check_choice("bn_stats", self.bn_stats, ("auto", "student", "both", "teacher"))
        if not callable(self.section_loss):
            check_choice("section_loss", self.section_loss, ("mse", "l1", "smooth_l1"))
        if not 0 <= self.beta <= 1:
            raise InvalidArgument(f"beta={self.beta}: the share of the distillation loss, from 0 to 1, is needed.")
        if self.beta == 0 and not self.trains_sections:
            raise InvalidArgument(
                f"beta=0 leaves no loss in mode={self.mode!r}, which trains no section. Use mode='lit' or another beta."
            )
        if self.beta == 0 and self.bn_stats in ("student", "both"):
            raise InvalidArgument(
                f"bn_stats={self.bn_stats!r} at beta=0: the student never runs by itself then, and its batch norm "
                f"would keep its first statistics. Use bn_stats='auto' or 'teacher'."
            )
        if self.mode == "kd_copied_ends" and not self.copy_ends:
            raise InvalidArgument("mode='kd_copied_ends' with copy_ends=False is mode='kd'.")
        if any(not 0 <= w < float("inf") for w in self.section_weights or ()):
            raise InvalidArgument(
                f"section_weights={list(self.section_weights or ())}: numbers of at least 0 are needed."
            )

    @property
    def trains_sections(self) -> bool:
        """Tell whether the mode has section losses at all."""
        return self.mode in ("lit", "fitnets")

    @property
    def copies(self) -> bool:
        """Tell whether the ends come from the teacher."""
        return self.copy_ends and self.mode in ("lit", "fitnets", "kd_copied_ends")

    @property
    def freezes(self) -> bool:
        """Tell whether the ends stand still in phase 1; at `beta=0` nothing would move them but weight decay."""
        return self.beta == 0 or (self.copies and self.freeze_ends)

    @property
    def statistics(self) -> Literal["student", "both", "teacher"]:
        """Return which pass updates running statistics."""
        if self.bn_stats == "auto":
            return "teacher" if self.beta == 0 else "student"
        return self.bn_stats

    def uses_sections(self, phase: int) -> bool:
        """Tell whether section losses count in a phase; at `beta=1` they have no share."""
        return phase == 1 and self.trains_sections and self.beta < 1

    def uses_student(self, phase: int) -> bool:
        """Tell whether the student itself runs in a phase."""
        return phase == 2 or self.beta > 0 or self.mode == "fitnets"

    def share(self, phase: int) -> float:
        """Return the factor of the distillation loss."""
        return self.beta if self.uses_sections(phase) else 1.0
