"""Ladder capsule network: classes rated by how well they explain the capsules that are present."""

from __future__ import annotations

from lightning_methods.ladder_capsule.callback import CapsuleMonitor
from lightning_methods.ladder_capsule.capsnet import CapsuleNetwork
from lightning_methods.ladder_capsule.functional import (
    activities,
    dynamic_routing,
    ladder_inference,
    ladder_loss,
    margin_loss,
    reconstruction_loss,
    squash,
)
from lightning_methods.ladder_capsule.layers import (
    DynamicRouting,
    LadderHead,
    LadderOutput,
    PrimaryCapsules,
    Pruned,
    PruningLayer,
)
from lightning_methods.ladder_capsule.metrics import CodeOverlap, EquivarianceR2, PoseGeneralizationCurve
from lightning_methods.ladder_capsule.module import LadderCapsuleNetwork

__all__ = [
    "CapsuleMonitor",
    "CapsuleNetwork",
    "CodeOverlap",
    "DynamicRouting",
    "EquivarianceR2",
    "LadderCapsuleNetwork",
    "LadderHead",
    "LadderOutput",
    "PoseGeneralizationCurve",
    "PrimaryCapsules",
    "Pruned",
    "PruningLayer",
    "activities",
    "dynamic_routing",
    "ladder_inference",
    "ladder_loss",
    "margin_loss",
    "reconstruction_loss",
    "squash",
]
