"""A network with its generative classifiers as one LightningModule, for deployment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_methods.core._lightning import LightningModule, OneFamily
from lightning_methods.core.batches import inputs_of
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.rog.ensemble import LayerEnsemble
from lightning_methods.rog.features import forward


class RobustModule(OneFamily, LightningModule):
    """Classify inputs by the generative classifiers on a network's layers; made by `RobustGenerativeClassifier.deploy`.

    Shapes: what the network's forward takes -> log-probabilities `(n, C)` float32.

    Args:
        module: the network, whose `forward` gives logits.
        ensemble: the fitted classifiers.
        taps: how the layers are read.
        prefers_softmax: give the network's own log-probabilities, because they were better on the validation split.

    Raises:
        UnsupportedTraining: if the Trainer is of the other Lightning family.

    Example:
        >>> from lightning_methods.models import MLP, Classifier
        >>> net = Classifier(MLP(4, hidden=(8,), num_classes=2), num_classes=2)
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 2
        >>> ensemble = LayerEnsemble(["net.layer1"]).fit({"net.layer1": net.net.layer1(x).detach()}, y)
        >>> RobustModule(net, ensemble, FeatureTaps(["net.layer1"], detach=True))(x).shape
        torch.Size([60, 2])
    """

    def __init__(
        self, module: Any, ensemble: LayerEnsemble, taps: FeatureTaps, *, prefers_softmax: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.ensemble = ensemble
        self.prefers_softmax = prefers_softmax
        self._taps = taps

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """Return the log-probabilities `(n, C)`."""
        # for this call only: hooks that stay would not survive a copy or a pickle of the module
        self._taps.attach(self.module)
        try:
            features, logits = forward(self.module, inputs, self._taps)
        finally:
            self._taps.detach()
        return logits.log_softmax(1) if self.prefers_softmax else self.ensemble(features).float()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the log-probabilities of a batch."""
        return self(inputs_of(batch))
