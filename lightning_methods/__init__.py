"""Ten training techniques from ICML 2019 as drop-in parts for any PyTorch Lightning Trainer.

Importing the package costs nothing: a class is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public class -> the module that defines it
_EXPORTS = {
    "SoftNearestNeighborLoss": "snnl",
    "Entanglement": "snnl",
    "DeepKNN": "snnl",
    "RepresentationSimilarity": "cka",
    "MinibatchCKA": "cka",
    "StreamingCKA": "cka",
    "ImportanceWeighting": "importance_weighting",
    "WeightEffectMonitor": "importance_weighting",
    "PolyTailLoss": "importance_weighting",
    "VSLoss": "importance_weighting",
    "LDAMLoss": "importance_weighting",
    "LogitAdjustedLoss": "importance_weighting",
    "DistributedWeightedSampler": "importance_weighting",
    "AugmentedDropout": "augmented_dropout",
    "DropoutSchedule": "augmented_dropout",
    "DualDropout": "augmented_dropout",
    "DualDropout1d": "augmented_dropout",
    "DualDropout2d": "augmented_dropout",
    "DualDropout3d": "augmented_dropout",
    "DualAlphaDropout": "augmented_dropout",
    "ClusteringCoefficient": "geometric_scattering",
    "Eccentricity": "geometric_scattering",
    "GeometricScattering": "geometric_scattering",
    "ScatteringClassifier": "geometric_scattering",
    "ScatteringEncoder": "geometric_scattering",
    "ScatteringExplorer": "geometric_scattering",
    "ScatteringSVM": "geometric_scattering",
    "CapsuleMonitor": "ladder_capsule",
    "CapsuleNetwork": "ladder_capsule",
    "CodeOverlap": "ladder_capsule",
    "EquivarianceR2": "ladder_capsule",
    "LadderCapsuleNetwork": "ladder_capsule",
    "LadderHead": "ladder_capsule",
    "PoseGeneralizationCurve": "ladder_capsule",
    "PrimaryCapsules": "ladder_capsule",
    "PruningLayer": "ladder_capsule",
    "LearnedOptimizer": "learned_optimizer",
    "LearnedOptimizerMonitor": "learned_optimizer",
    "MetaTraining": "learned_optimizer",
    "TruncationSchedule": "learned_optimizer",
    "LITDistillation": "lit",
    "LITDistiller": "lit",
    "RobustGenerativeClassifier": "rog",
    "GenerativeClassifier": "rog",
    "SeedStreams": "reproducibility",
    "Study": "reproducibility",
    "DigitsDataModule": "data",
    "MNISTDataModule": "data",
    "CIFAR10DataModule": "data",
    "ImageFolderDataModule": "data",
    "NoisyLabels": "data",
    "PoseDataModule": "data",
    "RandomGraphsDataModule": "data",
    "TUGraphDataModule": "data",
    "ImbalancedSubset": "data",
    "Classifier": "models",
    "LoggerSaveConfig": "cli.save_config",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from lightning_methods.augmented_dropout import AugmentedDropout as AugmentedDropout
    from lightning_methods.augmented_dropout import DropoutSchedule as DropoutSchedule
    from lightning_methods.augmented_dropout import DualAlphaDropout as DualAlphaDropout
    from lightning_methods.augmented_dropout import DualDropout as DualDropout
    from lightning_methods.augmented_dropout import DualDropout1d as DualDropout1d
    from lightning_methods.augmented_dropout import DualDropout2d as DualDropout2d
    from lightning_methods.augmented_dropout import DualDropout3d as DualDropout3d
    from lightning_methods.cka import MinibatchCKA as MinibatchCKA
    from lightning_methods.cka import RepresentationSimilarity as RepresentationSimilarity
    from lightning_methods.cka import StreamingCKA as StreamingCKA
    from lightning_methods.cli.save_config import LoggerSaveConfig as LoggerSaveConfig
    from lightning_methods.data import CIFAR10DataModule as CIFAR10DataModule
    from lightning_methods.data import DigitsDataModule as DigitsDataModule
    from lightning_methods.data import ImageFolderDataModule as ImageFolderDataModule
    from lightning_methods.data import ImbalancedSubset as ImbalancedSubset
    from lightning_methods.data import MNISTDataModule as MNISTDataModule
    from lightning_methods.data import NoisyLabels as NoisyLabels
    from lightning_methods.data import PoseDataModule as PoseDataModule
    from lightning_methods.data import RandomGraphsDataModule as RandomGraphsDataModule
    from lightning_methods.data import TUGraphDataModule as TUGraphDataModule
    from lightning_methods.geometric_scattering import ClusteringCoefficient as ClusteringCoefficient
    from lightning_methods.geometric_scattering import Eccentricity as Eccentricity
    from lightning_methods.geometric_scattering import GeometricScattering as GeometricScattering
    from lightning_methods.geometric_scattering import ScatteringClassifier as ScatteringClassifier
    from lightning_methods.geometric_scattering import ScatteringEncoder as ScatteringEncoder
    from lightning_methods.geometric_scattering import ScatteringExplorer as ScatteringExplorer
    from lightning_methods.geometric_scattering import ScatteringSVM as ScatteringSVM
    from lightning_methods.importance_weighting import DistributedWeightedSampler as DistributedWeightedSampler
    from lightning_methods.importance_weighting import ImportanceWeighting as ImportanceWeighting
    from lightning_methods.importance_weighting import LDAMLoss as LDAMLoss
    from lightning_methods.importance_weighting import LogitAdjustedLoss as LogitAdjustedLoss
    from lightning_methods.importance_weighting import PolyTailLoss as PolyTailLoss
    from lightning_methods.importance_weighting import VSLoss as VSLoss
    from lightning_methods.importance_weighting import WeightEffectMonitor as WeightEffectMonitor
    from lightning_methods.ladder_capsule import CapsuleMonitor as CapsuleMonitor
    from lightning_methods.ladder_capsule import CapsuleNetwork as CapsuleNetwork
    from lightning_methods.ladder_capsule import CodeOverlap as CodeOverlap
    from lightning_methods.ladder_capsule import EquivarianceR2 as EquivarianceR2
    from lightning_methods.ladder_capsule import LadderCapsuleNetwork as LadderCapsuleNetwork
    from lightning_methods.ladder_capsule import LadderHead as LadderHead
    from lightning_methods.ladder_capsule import PoseGeneralizationCurve as PoseGeneralizationCurve
    from lightning_methods.ladder_capsule import PrimaryCapsules as PrimaryCapsules
    from lightning_methods.ladder_capsule import PruningLayer as PruningLayer
    from lightning_methods.learned_optimizer import LearnedOptimizer as LearnedOptimizer
    from lightning_methods.learned_optimizer import LearnedOptimizerMonitor as LearnedOptimizerMonitor
    from lightning_methods.learned_optimizer import MetaTraining as MetaTraining
    from lightning_methods.learned_optimizer import TruncationSchedule as TruncationSchedule
    from lightning_methods.lit import LITDistillation as LITDistillation
    from lightning_methods.lit import LITDistiller as LITDistiller
    from lightning_methods.models import Classifier as Classifier
    from lightning_methods.reproducibility import SeedStreams as SeedStreams
    from lightning_methods.reproducibility import Study as Study
    from lightning_methods.rog import GenerativeClassifier as GenerativeClassifier
    from lightning_methods.rog import RobustGenerativeClassifier as RobustGenerativeClassifier
    from lightning_methods.snnl import DeepKNN as DeepKNN
    from lightning_methods.snnl import Entanglement as Entanglement
    from lightning_methods.snnl import SoftNearestNeighborLoss as SoftNearestNeighborLoss


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
