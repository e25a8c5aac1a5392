"""Learned optimizers (Metz et al. 2019): one that runs in any Trainer, and the meta-training that makes them."""

from __future__ import annotations

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.comparison import compare_optimizers
from lightning_methods.learned_optimizer.families import ClassifierFamily
from lightning_methods.learned_optimizer.functional import combine_estimators
from lightning_methods.learned_optimizer.module import MetaTraining
from lightning_methods.learned_optimizer.monitor import LearnedOptimizerMonitor
from lightning_methods.learned_optimizer.optimizer import LearnedOptimizer
from lightning_methods.learned_optimizer.schedule import TruncationSchedule
from lightning_methods.learned_optimizer.tasks import ModuleTask
from lightning_methods.learned_optimizer.weights import available_weights, load_weights, weights_card

__all__ = [
    "Architecture",
    "ClassifierFamily",
    "LearnedOptimizer",
    "LearnedOptimizerMonitor",
    "MetaTraining",
    "ModuleTask",
    "TruncationSchedule",
    "available_weights",
    "combine_estimators",
    "compare_optimizers",
    "load_weights",
    "weights_card",
]
