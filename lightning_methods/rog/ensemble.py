"""Generative classifiers of several layers, mixed with weights that a validation split decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument, ShapeMismatch, did_you_mean
from lightning_methods.rog.classifier import GenerativeClassifier
from lightning_methods.rog.selection import clearly_better, noisy_log_likelihood

Mixing = Literal["noisy_val", "clean_val", "uniform", "last"]
Features = Mapping[str, Tensor]

Support = float | Literal["auto", "confirmed"] | None

CANDIDATES: tuple[Support, ...] = (None, 0.7, 0.9, 1.0, "confirmed")  # most robust first
_FEWEST = 10  # validation samples of each class, on average, without which nothing can be chosen by them
_ROUNDS = 3  # of fitting to the confirmed samples
_RATE, _EPOCHS, _BATCH, _TINY = 0.02, 20, 50, 1e-10  # of the released code
_ROWS = 16_384  # at a time
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
        support_fraction: the support that was chosen or given.
        prefers_softmax: whether, with `"auto"`, the network's own predictions are better on the validation split.
    """

    ensemble: LayerEnsemble
    support_fraction: float | Literal["confirmed"] | None
    prefers_softmax: bool


def fit_ensemble(
    features: Features,
    labels: Tensor,
    num_classes: int,
    *,
    validation: tuple[Features, Tensor, Tensor] | None,
    support_fraction: Support = "auto",
    mixing: Mixing = "noisy_val",
    **settings: Any,
) -> Fitted:
    """Fit all layers, and choose support and weights by a validation split.

    `"confirmed"` fits most robustly, and then, three times, the plain estimate of the samples whose labels the ensemble
    confirms. With `"auto"`, supports from the most robust to all samples, and `"confirmed"` at last, are tried in turn.
    One replaces another if it makes the validation labels likelier, by over one standard error of the paired
    difference; see `noisy_log_likelihood`. The softmax is preferred if it agrees with more of these labels, likewise.
    With fewer than ten validation samples a class nothing is tried, and the most robust support stays.

    Args:
        features: of the training samples by layer, `(n, d_l)` each.
        labels: their given classes.
        num_classes: number of classes.
        validation: features, given labels and the softmax's predictions of samples that were not trained on.
        support_fraction: see `GenerativeClassifier`, or `"confirmed"` or `"auto"`.
        mixing: how the weights are found.
        settings: other arguments of `GenerativeClassifier`.
    """
    if validation is None:
        mixing = "last" if mixing == "last" else "uniform"
        validation = {}, labels[:0], labels[:0]
    x, y, predicted = validation
    usable = torch.where((y >= 0) & (y < num_classes))[0]
    enough = len(usable) >= _FEWEST * num_classes
    tried = support_fraction == "auto" and settings.get("estimator", "mcd") == "mcd" and enough
    robust: Support = None if support_fraction == "auto" else support_fraction
    x = {name: value[usable.to(value.device)] for name, value in x.items()}
    y, predicted = y[usable], predicted[usable.to(predicted.device)]
    first: LayerEnsemble | None = None
    best, scores = None, torch.zeros(0)
    for support in CANDIDATES if tried else (robust,):
        if support == "confirmed":
            first = first or _fit(features, labels, num_classes, x, y, mixing, support_fraction=None, **settings)
            ensemble = _confirmed(first, features, labels, x, y, mixing, **settings)
        else:
            ensemble = _fit(features, labels, num_classes, x, y, mixing, support_fraction=support, **settings)
        first = first or ensemble
        new = noisy_log_likelihood(ensemble(x), y).cpu() if tried else scores
        if best is None or clearly_better(new, scores):
            best, scores = Fitted(ensemble, support, False), new  # type: ignore[arg-type]
    assert best is not None
    if not tried:
        return best
    agrees = best.ensemble(x).argmax(1).cpu() == y.cpu()
    softmax = predicted.cpu() == y.cpu()
    return replace(best, prefers_softmax=clearly_better(softmax.double(), agrees.double()))


def _fit(
    features: Features, labels: Tensor, num_classes: int, x: Features, y: Tensor, mixing: Mixing, **settings: Any
) -> LayerEnsemble:
    ensemble = LayerEnsemble(list(features), **settings).fit(features, labels, num_classes)
    return ensemble.learn_weights(x, y, mixing)


def _confirmed(
    ensemble: LayerEnsemble, features: Features, labels: Tensor, x: Features, y: Tensor, mixing: Mixing, **settings: Any
) -> LayerEnsemble:
    """Fit anew to the samples whose labels an ensemble confirms; a class that loses all of its samples keeps them."""
    settings = {**settings, "estimator": "sample"}
    for _ in range(_ROUNDS):
        parts = [
            ensemble({name: f[start : start + _ROWS] for name, f in features.items()}).argmax(1)
            for start in range(0, len(labels), _ROWS)
        ]
        right = torch.cat(parts).to(labels.device) == labels
        remaining = torch.bincount(labels[right], minlength=ensemble.num_classes)
        kept = torch.where(right | (remaining[labels.clamp(min=0)] == 0))[0]
        own = {name: f[kept.to(f.device)] for name, f in features.items()}
        ensemble = _fit(own, labels[kept], ensemble.num_classes, x, y, mixing, **settings)
    return ensemble


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
