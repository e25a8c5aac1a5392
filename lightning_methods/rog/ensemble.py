"""Generative classifiers of several layers, mixed with weights that a validation split decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument, ShapeMismatch, did_you_mean
from lightning_methods.rog.classifier import GenerativeClassifier

Mixing = Literal["noisy_val", "clean_val", "uniform", "last"]
Features = Mapping[str, Tensor]

CANDIDATES: tuple[float | None, ...] = (None, 0.7, 0.9, 1.0)  # most robust first
_RATE, _EPOCHS, _BATCH, _TINY = 0.02, 20, 50, 1e-10  # of the released code
_KEPT = 0.5  # share of a noisy validation split that the weights are learned on (released code)


class LayerEnsemble(nn.Module):
    r"""Mix the class probabilities of the generative classifiers of several layers.

    .. math:: P(y \mid x) = \sum_l \alpha_l P_l(y \mid f_l(x))

    Shapes: features by layer, `(n, d_l)` each -> log-probabilities `(n, C)`.

    Args:
        names: the layers.
        settings: arguments of each `GenerativeClassifier`.

    Raises:
        InvalidArgument: if no layer is named, or one is named twice.
        ShapeMismatch: if a layer is missing from the features.

    Example:
        >>> x, y = torch.randn(90, 3, generator=torch.manual_seed(0)), torch.arange(90) % 3
        >>> ensemble = LayerEnsemble(["a", "b"]).fit({"a": x, "b": x + 5 * y[:, None]}, y)
        >>> ensemble({"a": x, "b": x + 5 * y[:, None]}).shape
        torch.Size([90, 3])
    """

    weights: Tensor

    def __init__(self, names: Sequence[str], **settings: Any) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise InvalidArgument(f"names={list(names)}: at least one layer, each once, is needed.")
        self.names = list(names)
        self.classifiers = nn.ModuleList(GenerativeClassifier(**settings) for _ in names)
        self.register_buffer("weights", torch.full((len(names),), 1 / len(names), dtype=torch.float64))

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 before `fit`."""
        return self.by_layer()[self.names[0]].num_classes

    @property
    def is_fitted(self) -> bool:
        """Whether it can be used."""
        return self.num_classes > 0

    def by_layer(self) -> dict[str, GenerativeClassifier]:
        """Return the classifier of each layer."""
        return dict(zip(self.names, self.classifiers, strict=True))  # type: ignore[arg-type]

    def fit(self, features: Features, labels: Tensor, num_classes: int | None = None) -> LayerEnsemble:
        """Fit the classifier of every layer; the weights stay equal."""
        for name, classifier in self.by_layer().items():
            classifier.fit(_layer(features, name), labels, num_classes)
        return self

    def learn_weights(self, features: Features, labels: Tensor, mixing: Mixing) -> LayerEnsemble:
        """Set the weights by a validation split; with `noisy_val` only its half that fits its labels best is used.

        That half is by the distance to the given class in the last layer. The weights minimise the negative
        log-likelihood, from equal ones, with the steps of the released code.
        """
        count = len(self.names)
        if mixing == "last":
            self.weights = torch.eye(count, dtype=torch.float64, device=self.weights.device)[-1]
        elif mixing == "uniform" or count == 1:
            self.weights = torch.full_like(self.weights, 1 / count)
        else:
            usable = (labels >= 0) & (labels < self.num_classes)
            kept = torch.where(usable)[0]
            if mixing == "noisy_val":
                last = self.by_layer()[self.names[-1]]
                distance = last.mahalanobis(_layer(features, self.names[-1])[kept])
                own = distance.gather(1, labels[kept].to(distance.device)[:, None])[:, 0]
                nearest = own.argsort(stable=True)[: max(round(_KEPT * len(own)), 1)].sort().values
                kept = kept[nearest.to(kept.device)]
            probability = torch.stack(
                [
                    p[kept].gather(1, labels[kept].to(p.device)[:, None])[:, 0].exp()
                    for p in self.layer_posteriors(features).values()
                ]
            )
            self.weights = _mixture_weights(probability.double().cpu()).to(self.weights)
        return self

    def layer_posteriors(self, features: Features) -> dict[str, Tensor]:
        """Return the log-posterior `(n, C)` of each layer."""
        return {name: classifier(_layer(features, name)) for name, classifier in self.by_layer().items()}

    def forward(self, features: Features) -> Tensor:
        """Return the log-probabilities `(n, C)`."""
        each = torch.stack(list(self.layer_posteriors(features).values()))
        return (each + self.weights.to(each).log()[:, None, None]).logsumexp(0)

    def distances(self, features: Features) -> Tensor:
        """Return the squared Mahalanobis distances `(n, C)` per feature, averaged over the layers by their weights."""
        total: Tensor | float = 0.0
        for weight, (name, classifier) in zip(self.weights, self.by_layer().items(), strict=True):
            if weight > 0:  # zero times infinity, of a class without samples
                squared = classifier.mahalanobis(_layer(features, name))
                total = total + weight.to(squared) * squared / max(len(classifier.whitening), 1)
        assert isinstance(total, Tensor)
        return total

    def outlier_score(self, features: Features) -> Tensor:
        """Return the distance to the nearest class `(n,)`: the larger, the less like the training data."""
        return self.distances(features).amin(1)


@dataclass(frozen=True)
class Fitted:
    """What `fit_ensemble` found.

    Attributes:
        ensemble: the classifiers and weights.
        support_fraction: the share that was chosen or given.
        prefers_softmax: whether, with `"auto"`, the network's own predictions are better on the validation split.
        accuracies: on the validation split, by support fraction; only for `"auto"`.
    """

    ensemble: LayerEnsemble
    support_fraction: float | None
    prefers_softmax: bool
    accuracies: dict[str, float]


def fit_ensemble(
    features: Features,
    labels: Tensor,
    num_classes: int,
    *,
    validation: tuple[Features, Tensor, Tensor] | None,
    support_fraction: float | Literal["auto"] | None = "auto",
    mixing: Mixing = "noisy_val",
    **settings: Any,
) -> Fitted:
    """Fit all layers, and choose support fraction and weights by a validation split.

    With `"auto"`, supports from the most robust to all samples are tried in turn, the softmax at last. One replaces
    another if it agrees with more of the validation labels, by over one standard error of the paired difference. Noise
    in these labels that is not more frequent than the true label lowers all candidates alike.

    Args:
        features: of the training samples by layer, `(n, d_l)` each.
        labels: their given classes.
        num_classes: number of classes.
        validation: features, given labels and the softmax's predictions of samples that were not trained on.
        support_fraction: see `GenerativeClassifier`, or `"auto"`.
        mixing: how the weights are found.
        settings: other arguments of `GenerativeClassifier`.
    """
    names = list(features)
    tried = settings.get("estimator", "mcd") == "mcd" and support_fraction == "auto"
    fractions: tuple[float | None, ...] = (None if support_fraction == "auto" else support_fraction,)
    if tried and validation is not None:
        fractions = CANDIDATES
    best: LayerEnsemble | None = None
    chosen, right = fractions[0], torch.zeros(0)
    accuracies: dict[str, float] = {}
    for fraction in fractions:
        ensemble = LayerEnsemble(names, support_fraction=fraction, **settings).fit(features, labels, num_classes)
        if validation is None:
            ensemble.learn_weights({}, labels, "last" if mixing == "last" else "uniform")
            return Fitted(ensemble, fraction, False, {})
        ensemble.learn_weights(validation[0], validation[1], mixing)
        agrees = (ensemble(validation[0]).argmax(1).cpu() == validation[1].cpu()).double()
        accuracies["most robust" if fraction is None else f"{fraction:g}"] = float(agrees.mean())
        if best is None or _better(agrees, right):
            best, chosen, right = ensemble, fraction, agrees
    assert best is not None
    assert validation is not None
    softmax = (validation[2].cpu() == validation[1].cpu()).double()
    accuracies["softmax"] = float(softmax.mean())
    return Fitted(best, chosen, tried and _better(softmax, right), accuracies)


def _better(new: Tensor, old: Tensor) -> bool:
    difference = new - old
    if len(difference) < 2:
        return False
    return bool(difference.mean() > difference.std() / len(difference) ** 0.5)


def _mixture_weights(probability: Tensor) -> Tensor:
    """Return the weights `(L,)` for the probabilities `(L, n)` that each layer gives the labels."""
    # also where gradients are off, as in trainer.test
    with torch.inference_mode(False), torch.enable_grad():
        probability = probability.clone()
        logits = torch.ones(len(probability), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=_RATE)
        for _ in range(_EPOCHS):
            for batch in probability.split(_BATCH, dim=1):
                loss = -(logits.softmax(0) @ batch + _TINY).log().mean()
                (logits.grad,) = torch.autograd.grad(loss, logits)
                optimizer.step()
    return logits.detach().softmax(0)


def _layer(features: Features, name: str) -> Tensor:
    if name not in features:
        raise ShapeMismatch(f"There are no features of the layer {name!r}. {did_you_mean(name, features)}")
    return features[name]
