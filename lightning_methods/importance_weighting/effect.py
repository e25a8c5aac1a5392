"""What is measured of the weights on a set of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.gather import all_sum, gather_rows, world_size
from lightning_methods.core.passes import batches
from lightning_methods.errors import BatchFormat, ShapeMismatch
from lightning_methods.importance_weighting.functional import (
    boundary_shift,
    effective_sample_size,
    gradient_share,
    margins,
    two_logits,
)

_SHOWN_CLASSES = 20  # with more, only the tables name every class
_NOISE_SAMPLES = 512


@dataclass
class Samples:
    """Logits of some samples of all ranks, and what belongs to them; `inputs` are statistics of the inputs."""

    logits: Tensor
    labels: Tensor
    weights: Tensor
    cosine: float | None
    noise: Callable[[], Tensor] | None


class Reader:
    """Reads logits, labels and weights in extra passes that leave no trace in the training."""

    def __init__(self, inputs: Selector, labels: Selector, select: int | str | None, max_samples: int) -> None:
        self.inputs, self.labels, self.select, self.max_samples = inputs, labels, select, max_samples

    def logits_of(self, module: Any, inputs: Any) -> Tensor:
        """Return the logits of a batch, `(B, C)` or one a sample, with their graph if there is one.

        Raises:
            BatchFormat: if the module returns something else.
        """
        z = module(inputs)
        z = z if self.select is None else z[self.select]
        if not isinstance(z, Tensor) or z.ndim not in (1, 2):
            what = f"logits of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise BatchFormat(f"The module returned {what} for its inputs; (B, C) is needed. Say which item, select=.")
        return z

    def samples(self, trainer: Any, module: Any, loader: Any, weights: Callable[[Any, Tensor], Tensor]) -> Samples:
        """Return logits, labels and weights of the first samples, and the cosine of the gradients of the first batch.

        Raises:
            BatchFormat: if there is no batch, or not one whole number a sample as its label.
            ShapeMismatch: for labels that are no classes of the logits.
        """
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        used: list[Tensor] = []
        cosine, sums, like = None, torch.zeros(3, dtype=torch.float64), None
        for batch in self._batches(trainer, module, loader):
            x, y = inputs_of(batch, self.inputs), targets_of(batch, self.labels)
            z = self.logits_of(module, x)
            _check_labels(y, z)
            w, kept = weights(batch, y), y >= 0  # below 0 are those that a loss ignores
            if not logits:
                cosine = self._cosine(module, x, y, w)
            logits.append(z.detach()[kept])
            labels.append(y[kept])
            used.append(w[kept])
            if isinstance(x, Tensor) and x.is_floating_point():
                d = x.detach().double()
                sums = sums.to(d.device) + torch.stack([torch.tensor(d.numel()).to(d), d.sum(), d.square().sum()])
                like = x
        if not logits:
            raise BatchFormat("The monitored data gave no batch.")
        z, y, w = (gather_rows(torch.cat(parts)) for parts in (logits, labels, used))
        if not len(y):
            raise BatchFormat("The monitored data hold no label of at least 0: there is nothing to measure.")
        return Samples(z, y, w, cosine, None if like is None else partial(_noise, like, all_sum(sums).tolist()))

    def predictions(self, trainer: Any, module: Any, loader: Any, other: Any = None) -> list[Tensor]:
        """Return the predicted classes of a loader's first samples, of one module or of two on the same batches."""
        modules = [m for m in (module, other) if m is not None]
        found: list[list[Tensor]] = [[] for _ in modules]
        for batch in self._batches(trainer, module, loader):
            x = inputs_of(batch, self.inputs)
            for m, kept in zip(modules, found, strict=True):
                kept.append(self._predicted(m, x))
        return [gather_rows(torch.cat(kept)) for kept in found if kept]

    def of_noise(self, module: Any, noise: Tensor, other: Any = None) -> list[Tensor]:
        """Return the predicted classes of noise."""
        modules = [m for m in (module, other) if m is not None]
        with torch.no_grad():
            return [torch.cat([self._predicted(m, part) for part in noise.split(128)]) for m in modules]

    def _predicted(self, module: Any, x: Any) -> Tensor:
        was = module.training
        module.eval()
        predicted = two_logits(self.logits_of(module, x)).argmax(1)
        module.train(was)
        return predicted

    def _batches(self, trainer: Any, module: Any, loader: Any) -> Any:
        left = -(-self.max_samples // world_size())
        # closed at the end, which restores modes and random states
        reading: Any = batches(trainer, module, loader, description="WeightEffectMonitor: reading")
        try:
            for batch in reading:
                yield batch
                x = inputs_of(batch, self.inputs)
                left -= len(x) if hasattr(x, "__len__") else 1
                if left <= 0:
                    return
        finally:
            reading.close()

    def _cosine(self, module: Any, x: Any, y: Tensor, w: Tensor) -> float | None:
        """Return the cosine between the weighted and the unweighted gradient of the cross-entropy of a batch.

        Of all ranks: their sums are joined before the cosine is taken.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        with torch.enable_grad():
            z = self.logits_of(module, x)
            z = z.float() if z.ndim == 2 and z.shape[1] > 1 else _beside_zero(z.float())
            losses = F.cross_entropy(z, y.clamp(min=-1), reduction="none", ignore_index=-1)
            pair = [
                torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True)
                for loss in (losses, losses * w.to(losses))
            ]
        plain, weighted = (
            all_sum(torch.cat([g.detach().double().flatten() for g in found if g is not None])) for found in pair
        )
        norms = float(plain.norm() * weighted.norm())
        return float(plain @ weighted) / norms if norms > 0 else None


def measured(samples: Samples, norm: float) -> tuple[dict[str, float], list[list[Any]]]:
    """Return what to log of the monitored samples, and a row a class for the table."""
    z, y, w = two_logits(samples.logits), samples.labels, samples.weights.double()
    classes = z.shape[1]
    m = margins(z, y)
    share, intended = gradient_share(z.softmax(1).gather(1, y[:, None])[:, 0], w, y, classes)
    share, intended = share / share.sum().clamp(min=1e-300), intended / intended.sum()
    ess = effective_sample_size(w)
    of_class = {c: m[y == c] for c in range(classes) if bool((y == c).any())}
    middle = {c: float(own.median()) for c, own in of_class.items()}
    positive = [v for v in middle.values() if v > 0]
    found = {
        "ess": ess,
        "ess_fraction": ess / len(w),
        "max_weight": float(w.max()),
        "effect": boundary_shift(w, m),
        "accuracy": float((m > 0).double().mean()),
        "separable": float(bool((m > 0).all())),
        "margin": float(m.median()),
        "smallest_margin": float(m.min()),
        "weight_norm": norm,
    }
    if len(positive) == len(middle):  # defined once the classes are separated
        found["margin_ratio"] = max(positive) / min(positive)
    if samples.cosine is not None:
        found["gradient_cosine"] = samples.cosine
    if classes <= _SHOWN_CLASSES:
        for c in range(classes):
            found[f"share/{c}"], found[f"intended/{c}"] = float(share[c]), float(intended[c])
        found |= {f"margin/{c}": value for c, value in middle.items()}
    rows = [
        [c, float(w[y == c].mean()), float(intended[c]), float(share[c]), middle[c], float(of_class[c].min())]
        for c in middle
    ]
    return found, rows


def fractions(predicted: Tensor, classes: int) -> Tensor:
    """Return the share of samples predicted as each class."""
    return torch.bincount(predicted.flatten(), minlength=classes).double() / max(predicted.numel(), 1)


def shown_classes(classes: int) -> range:
    """Return the classes that are logged by name."""
    return range(classes if classes <= _SHOWN_CLASSES else 0)


def _noise(like: Tensor, sums: list[float]) -> Tensor:
    """Return Gaussian noise of the shape, mean and deviation of the inputs: their number, sum and sum of squares."""
    n, total, squares = sums
    mean, deviation = total / n, max(squares / n - (total / n) ** 2, 0.0) ** 0.5
    drawn = torch.randn(_NOISE_SAMPLES, *like.shape[1:], generator=torch.Generator().manual_seed(0))
    return (mean + deviation * drawn).to(like)


def _check_labels(y: Any, z: Tensor) -> None:
    if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1:
        raise BatchFormat("One whole number a sample is needed as target; say where it is with labels=.")
    classes = z.shape[1] if z.ndim == 2 and z.shape[1] > 1 else 2
    if len(y) != len(z):
        raise ShapeMismatch(f"There are {len(y)} labels for {len(z)} rows of logits in a batch.")
    if len(y) and int(y.max()) >= classes:
        raise ShapeMismatch(f"The labels go up to {int(y.max())} and the module gives {classes} logits.")


def _beside_zero(z: Tensor) -> Tensor:
    z = z.reshape(-1)
    return torch.stack([torch.zeros_like(z), z], dim=1)
