"""Small reference networks and one plain LightningModule, for configs, examples and benchmarks."""

from lightning_methods.models.classifier import Classifier
from lightning_methods.models.convnet import ConvNet, SmallConvNet
from lightning_methods.models.mlp import MLP
from lightning_methods.models.resnet import CIFARResNet

__all__ = ["MLP", "CIFARResNet", "Classifier", "ConvNet", "SmallConvNet"]
