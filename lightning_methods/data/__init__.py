"""LightningDataModules for real and small data, and wrappers that spoil labels or class sizes in a known way."""

from lightning_methods.data.cifar10 import CIFAR10DataModule
from lightning_methods.data.digits import DigitsDataModule
from lightning_methods.data.graphs import RandomGraphsDataModule, TUGraphDataModule
from lightning_methods.data.image_folder import ImageFolderDataModule
from lightning_methods.data.imbalanced import ImbalancedSubset
from lightning_methods.data.labels import find_labels
from lightning_methods.data.mnist import MNISTDataModule
from lightning_methods.data.noisy import NoisyLabels
from lightning_methods.data.poses import PoseDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "ImbalancedSubset",
    "MNISTDataModule",
    "NoisyLabels",
    "PoseDataModule",
    "RandomGraphsDataModule",
    "TUGraphDataModule",
    "find_labels",
]
