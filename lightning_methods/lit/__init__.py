"""LIT: distil a deep network into a shallow one, section by section."""

from __future__ import annotations

from lightning_methods.lit.callback import LITDistillation
from lightning_methods.lit.functional import intermediate_loss, kd_loss
from lightning_methods.lit.matching import match_sections
from lightning_methods.lit.module import LITDistiller
from lightning_methods.lit.stitching import Hybrid, stitched
from lightning_methods.lit.teachers import fingerprint, load_teacher

__all__ = [
    "Hybrid",
    "LITDistillation",
    "LITDistiller",
    "fingerprint",
    "intermediate_loss",
    "kd_loss",
    "load_teacher",
    "match_sections",
    "stitched",
]
