"""RoG: robust inference by generative classifiers for networks that were trained on noisy labels."""

from __future__ import annotations

from lightning_methods.rog.audit import LabelAudit
from lightning_methods.rog.callback import RobustGenerativeClassifier
from lightning_methods.rog.classifier import GenerativeClassifier
from lightning_methods.rog.display import write_audit
from lightning_methods.rog.ensemble import LayerEnsemble
from lightning_methods.rog.functional import consistency_factor
from lightning_methods.rog.mcd import MCDResult, fast_mcd
from lightning_methods.rog.module import RobustModule

__all__ = [
    "GenerativeClassifier",
    "LabelAudit",
    "LayerEnsemble",
    "MCDResult",
    "RobustGenerativeClassifier",
    "RobustModule",
    "consistency_factor",
    "fast_mcd",
    "write_audit",
]
