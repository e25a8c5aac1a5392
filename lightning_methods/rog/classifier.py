"""A Gaussian for each class with a shared covariance: a linear classifier on features that needs no training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.errors import (
    InvalidArgument,
    LightningMethodsWarning,
    ShapeMismatch,
    UnsupportedTraining,
    check_choice,
)
from lightning_methods.rog.estimators import Estimator, principal_axes, tied_estimate, total_variance, whiten
from lightning_methods.rog.mcd import check_starts, check_support_fraction

Priors = Literal["uniform", "empirical"] | Sequence[float]

_ESTIMATORS = ("mcd", "official", "sample")
_STATE = ("weight", "bias", "center", "location", "whitening", "counts", "support_counts")


class GenerativeClassifier(nn.Module):
    r"""Classify features by a normal distribution for each class with one covariance for all, estimated robustly.

    .. math:: P(y = c \mid f) = \mathrm{softmax}_c\left(
        \mu_c^T \Sigma^{-1} f - \tfrac{1}{2} \mu_c^T \Sigma^{-1} \mu_c + \log \beta_c \right)

    `fit` estimates means and covariance without a gradient; `forward` is then one linear layer and a log-softmax.

    Shapes:
        features `(n, d)` of any floating type, labels `(n,)` whole numbers; `forward` and `mahalanobis` return
        `(n, C)` in float64 (float32 where the device has no float64).

    Args:
        estimator: `"mcd"` (robust: the minimum covariance determinant of each class, then pooled), `"official"` (one
            step of the released code, its pooling mended) or `"sample"` (linear discriminant analysis).
        support_fraction: of `"mcd"`: `None` for the most robust support, or a share from 0.5 to 1, see `fast_mcd`.
        priors: `"uniform"`, `"empirical"` (the shares of the labels) or one probability a class.
        starts: of `"mcd"`, see `fast_mcd`.
        shrinkage: of `"mcd"`: how far each class's covariance is drawn towards the pooled one while searching.
        max_dim: more features than this are first reduced to so many principal components.
        seed: of what is drawn at random.

    Raises:
        InvalidArgument: for settings that cannot be read, features that are not finite, or labels of less than two
            classes.
        ShapeMismatch: if features and labels do not fit together, or not what was fitted.
        UnsupportedTraining: if used before `fit`.

    Example:
        >>> x, y = torch.randn(200, 4, generator=torch.manual_seed(0)), torch.arange(200) % 2
        >>> x[y == 1] += 4.0
        >>> y[:60] = 1 - y[:60]  # three in ten labels are wrong
        >>> classifier = GenerativeClassifier().fit(x, y)
        >>> bool((classifier(x).argmax(1) == (torch.arange(200) % 2)).double().mean() > 0.95)
        True

    Deviations from the paper: priors are uniform by default, as in the released code; a floor under the variances in
    place of the pseudo-inverse, with which classes that do not vary at all would be told apart by nothing.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    location: Tensor
    whitening: Tensor
    counts: Tensor
    support_counts: Tensor

    def __init__(
        self,
        *,
        estimator: Estimator = "mcd",
        support_fraction: float | None = None,
        priors: Literal["uniform", "empirical"] | Sequence[float] = "uniform",
        starts: Sequence[str] = ("median", "spatial_sign"),
        shrinkage: float = 0.2,
        max_dim: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("estimator", estimator, _ESTIMATORS)
        check_support_fraction(support_fraction)
        check_starts(starts)
        check_priors(priors)
        if not 0 <= shrinkage <= 1:
            raise InvalidArgument(f"shrinkage={shrinkage}: a share from 0 to 1 is needed.")
        if max_dim < 1:
            raise InvalidArgument(f"max_dim={max_dim}: at least 1 is needed.")
        self.estimator: Estimator = estimator
        self.support_fraction = support_fraction
        self.priors = priors
        self.starts = tuple(starts)
        self.shrinkage = shrinkage
        self.max_dim = max_dim
        self.seed = seed
        self.support: Tensor | None = None
        for name in _STATE:
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 before `fit`."""
        return len(self.bias)

    @property
    def is_fitted(self) -> bool:
        """Whether it can be used."""
        return self.num_classes > 0

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, num_classes: int | None = None) -> GenerativeClassifier:
        """Estimate everything from features and labels; samples with a label below 0 are left out.

        `support` then tells which samples the estimate is of.

        Args:
            features: `(n, d)`.
            labels: `(n,)`.
            num_classes: number of classes, by default the largest label + 1.
        """
        x, y, count = _checked(features, labels, num_classes)
        known = y >= 0
        x, y = x[known], y[known]
        sizes = torch.bincount(y, minlength=count)
        present = int((sizes > 0).sum())
        if present < 2:
            raise InvalidArgument(
                f"The labels are of {present} class; at least two are needed. Is the data sorted by class, and a limit "
                f"cuts it?"
            )
        if isinstance(self.priors, Sequence) and not isinstance(self.priors, str) and len(self.priors) != count:
            raise InvalidArgument(f"priors has {len(self.priors)} probabilities for {count} classes.")
        center, basis = _coordinates(x, self.max_dim)
        z = (x.double() - center) @ basis if basis is not None else x.double() - center
        estimate = tied_estimate(
            z, y, count, estimator=self.estimator, generator=torch.Generator().manual_seed(self.seed), **self._search()
        )
        whitening = whiten(estimate.covariance, total_variance(z))
        if basis is not None:
            whitening, location = whitening @ basis.T, estimate.location @ basis.T
        else:
            location = estimate.location
        self.support = torch.zeros_like(known)
        self.support[known] = estimate.support
        self._keep(center, location, whitening, sizes, torch.bincount(y[estimate.support], minlength=count))
        return self

    def _search(self) -> dict[str, Any]:
        if self.estimator != "mcd":
            return {}
        return {"support_fraction": self.support_fraction, "starts": self.starts, "shrinkage": self.shrinkage}

    def _keep(self, center: Tensor, location: Tensor, whitening: Tensor, sizes: Tensor, kept: Tensor) -> None:
        white = location @ whitening.T
        self.center, self.location, self.whitening = center, location, whitening
        self.counts, self.support_counts = sizes, kept
        self.weight = white @ whitening
        self.bias = self._log_priors(sizes) - white.square().sum(1) / 2
        absent = torch.where(sizes == 0)[0].tolist()
        if absent:
            shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            warnings.warn(
                f"There is no sample of class {shown}: it is never predicted.", LightningMethodsWarning, stacklevel=3
            )

    def _log_priors(self, sizes: Tensor) -> Tensor:
        if self.priors == "uniform":
            priors = (sizes > 0).double()
        elif self.priors == "empirical":
            priors = sizes.double()
        else:
            priors = torch.as_tensor(self.priors, dtype=torch.float64, device=sizes.device) * (sizes > 0)
        return (priors / priors.sum()).log()

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits `(n, C)`, minus infinity for a class without samples."""
        return self._centred(features) @ self.weight.T + self.bias

    def forward(self, features: Tensor) -> Tensor:
        """Return the log-posterior `(n, C)`."""
        return self.logits(features).log_softmax(1)

    def mahalanobis(self, features: Tensor) -> Tensor:
        """Return the squared Mahalanobis distances to all classes `(n, C)`, infinite for one without samples."""
        white, means = self._centred(features) @ self.whitening.T, self.location @ self.whitening.T
        squared = white.square().sum(1)[:, None] + means.square().sum(1) - 2 * white @ means.T
        return squared.clamp(min=0).masked_fill(self.counts == 0, torch.inf)

    def outlier_score(self, features: Tensor) -> Tensor:
        """Return the squared distance to the nearest class `(n,)`: the larger, the less like the training data."""
        return self.mahalanobis(features).amin(1)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return the same classifier as a plain linear layer that gives logits."""
        classes, dim = self._fitted().weight.shape
        linear = nn.Linear(dim, classes, dtype=dtype, device=self.weight.device).requires_grad_(False)
        linear.weight.copy_(self.weight)
        linear.bias.copy_(self.bias - self.weight @ self.center)
        return linear

    def _fitted(self) -> GenerativeClassifier:
        if not self.is_fitted:
            raise UnsupportedTraining("This GenerativeClassifier knows no classes yet. Call fit first.")
        return self

    def _centred(self, features: Tensor) -> Tensor:
        dim = len(self._fitted().center)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ShapeMismatch(f"Features of shape {tuple(features.shape)} were given; (n, {dim}) was fitted.")
        return features.to(self.center) - self.center

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GenerativeClassifier:
        # moved to other devices but never to half precision: the few numbers here cost nothing
        for name in _STATE:
            buffer = getattr(self, name)
            device = fn(buffer).device
            wide = torch.float32 if device.type == "mps" and buffer.is_floating_point() else buffer.dtype
            self._buffers[name] = buffer.to(device, wide)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the sizes are known only after a fit
        for name in _STATE:
            given = state_dict.get(prefix + name)
            if given is not None:
                here = self._buffers[name]
                assert here is not None
                self._buffers[name] = torch.empty_like(given, device=here.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"classes={self.num_classes}, dim={len(self.center)}, estimator={self.estimator!r}"


def check_priors(priors: Any) -> None:
    """Raise `InvalidArgument` for what are no priors."""
    if isinstance(priors, str):
        check_choice("priors", priors, ("uniform", "empirical"))
        return
    values = [float(p) for p in priors]
    if not values or min(values) < 0 or not all(map(math.isfinite, values)) or sum(values) <= 0:
        raise InvalidArgument(
            f"priors={priors!r}: 'uniform', 'empirical' or one share of at least 0 a class is needed."
        )


def _checked(features: Tensor, labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ShapeMismatch(
            f"features are {tuple(features.shape)} of {features.dtype}; floating point (n, d) with at least one of "
            f"each is needed."
        )
    if labels.shape != (len(features),):
        raise ShapeMismatch(f"labels have shape {tuple(labels.shape)} for {len(features)} samples.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidArgument(f"labels are of type {labels.dtype}; whole numbers are needed.")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise InvalidArgument(f"The features of {bad} of {len(features)} samples hold NaN or infinity.")
    y = labels.to(features.device, torch.int64)
    largest = int(y.max())
    count = largest + 1 if num_classes is None else num_classes
    if largest >= count:
        raise InvalidArgument(f"A label is {largest} with num_classes={num_classes}; labels below that are needed.")
    return features.detach(), y, count


def _coordinates(x: Tensor, max_dim: int) -> tuple[Tensor, Tensor | None]:
    """Return where the features are centred, and the principal axes `(d, max_dim)` if there are too many of them."""
    if x.shape[1] <= max_dim:
        return x.double().mean(0), None
    return principal_axes(x, max_dim)
