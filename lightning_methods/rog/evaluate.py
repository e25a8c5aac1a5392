"""How often the softmax, the ensemble and each layer are right on collected features, and who tells outliers apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_methods.rog.ensemble import LayerEnsemble
from lightning_methods.rog.features import Collected

_ROWS = 4096  # at a time


def accuracies(ensemble: LayerEnsemble, found: Collected) -> dict[str, float]:
    """Return the share of right predictions by the softmax, the ensemble and each layer."""
    right = {"softmax": found.predicted == found.labels}
    right["accuracy"] = log_probabilities(ensemble, found).argmax(1) == found.labels
    for name, classifier in ensemble.by_layer().items():
        x = found.features[name]
        parts = [classifier(part.to(classifier.weight.device)).argmax(1).cpu() for part in x.split(_ROWS)]
        right[f"layer/{name}"] = torch.cat(parts) == found.labels
    return {name: float(hit.double().mean()) for name, hit in right.items()}


def log_probabilities(ensemble: LayerEnsemble, found: Collected) -> Tensor:
    """Return the log-probabilities `(n, C)` of the ensemble, on the CPU."""
    device, parts = ensemble.weights.device, []
    for start in range(0, len(found.index), _ROWS):
        own = slice(start, start + _ROWS)
        parts.append(ensemble({name: x[own].to(device) for name, x in found.features.items()}).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, ensemble.num_classes, dtype=torch.float64)


def outlier_auroc(ensemble: LayerEnsemble, inside: Collected, outside: Collected) -> dict[str, Tensor]:
    """Return how well outliers are told apart by the distance to the nearest class, and by the softmax."""
    scores: dict[str, list[Tensor]] = {"auroc_outliers": [], "auroc_softmax": []}
    for found in (inside, outside):
        distances = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(found.index), _ROWS):
            own = slice(start, start + _ROWS)
            features = {name: x[own].to(ensemble.weights.device) for name, x in found.features.items()}
            distances.append(ensemble.outlier_score(features).cpu())
        scores["auroc_outliers"].append(torch.cat(distances))
        scores["auroc_softmax"].append(-found.confidence)
    return {name: _auroc(*pair) for name, pair in scores.items()}


def _auroc(inside: Tensor, outside: Tensor) -> Tensor:
    label = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    # only the order counts; binary_auroc takes what lies outside of [0, 1] for logits and saturates
    order = torch.cat([inside, outside]).double().unique(return_inverse=True)[1].double()
    return binary_auroc(order / order.max().clamp(min=1), label).float()
