"""Learned optimizers (Metz et al. 2019): one that runs in any Trainer, and the meta-training that makes them."""

from __future__ import annotations

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.families import ClassifierFamily
from lightning_methods.learned_optimizer.functional import combine_estimators
from lightning_methods.learned_optimizer.module import MetaTraining
from lightning_methods.learned_optimizer.schedule import TruncationSchedule
from lightning_methods.learned_optimizer.tasks import ModuleTask
from lightning_methods.learned_optimizer.weights import available_weights, weights_card

__all__ = [
    "Architecture",
    "ClassifierFamily",
    "MetaTraining",
    "ModuleTask",
    "TruncationSchedule",
    "available_weights",
    "combine_estimators",
    "weights_card",
]
