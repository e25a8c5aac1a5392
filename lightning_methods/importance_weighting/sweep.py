"""The paper's experiment on frozen features: heads of all weights and seeds, trained in one batched computation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, NotFinite, ShapeMismatch, check_choice
from lightning_methods.importance_weighting.functional import (
    boundary_shift,
    check_number,
    check_weights,
    check_whole,
    margins,
    normalized_weights,
)
from lightning_methods.importance_weighting.losses import poly_tail_loss
from lightning_methods.report import color_cycle, curves

_BATCH_NORM_MOMENTUM, _BATCH_NORM_EPSILON = 0.1, 1e-5  # torch's defaults


@dataclass(frozen=True)
class HeadSettings:
    """How the heads are built and trained.

    Args:
        hidden: widths of hidden layers; none for a linear head.
        epochs: passes over the training features.
        batch_size: samples a step. Default 16, as in the paper.
        lr: learning rate of plain SGD, constant. Default 0.1, as in the paper.
        weight_decay: L2 penalty as in `torch.optim.SGD`. Default 0.
        dropout: probability of dropping a hidden unit. Default 0.
        batch_norm: whether hidden layers are normalised before the ReLU. Default False.
        loss: `"ce"`, or `"poly"`, the polynomial tail.
        alpha: power of that tail. Default 1.

    Raises:
        InvalidArgument: for settings outside of their range.

    Example:
        >>> HeadSettings(epochs=10).lr
        0.1
    """

    hidden: Sequence[int] = ()
    epochs: int = 100
    batch_size: int = 16
    lr: float = 0.1
    weight_decay: float = 0.0
    dropout: float = 0.0
    batch_norm: bool = False
    loss: Literal["ce", "poly"] = "ce"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("ce", "poly"))
        if isinstance(self.hidden, (str, bytes)) or not isinstance(self.hidden, Sequence):
            raise InvalidArgument(f"hidden={self.hidden!r}: the widths of the hidden layers, (64,), are needed.")
        for name, whole in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            check_whole(name, whole, 1)
        for width in self.hidden:
            check_whole("a width of hidden", width, 1)
        check_number("lr", self.lr, 0, open_="low")
        check_number("weight_decay", self.weight_decay, 0)
        check_number("alpha", self.alpha, 0, open_="low")
        check_number("dropout", self.dropout, 0, 1, open_="high")
        if (self.dropout or self.batch_norm) and not self.hidden:
            raise InvalidArgument("dropout and batch_norm act on hidden layers, and hidden names none.")


@dataclass
class Fading:
    """What the heads did at the recorded epochs; R weightings, S seeds, C classes, E epochs.

    Attributes:
        names: of the weightings.
        seeds: number of seeds.
        epochs: the recorded ones, `(E,)`.
        fraction: probe -> `(E, R, S, C)` share of its samples predicted as each class.
        accuracy: probe with labels -> `(E, R, S)`.
        train_accuracy: `(E, R, S)`.
        margin: `(E, R, S)` median margin of the training samples.
        effect: `(E, R, S)` how far the weights can move the boundary, see `boundary_shift`.
    """

    names: list[str]
    seeds: int
    epochs: list[int] = field(default_factory=list)
    fraction: dict[str, Tensor] = field(default_factory=dict)
    accuracy: dict[str, Tensor] = field(default_factory=dict)
    train_accuracy: Tensor = field(default_factory=lambda: torch.empty(0))
    margin: Tensor = field(default_factory=lambda: torch.empty(0))
    effect: Tensor = field(default_factory=lambda: torch.empty(0))


class Heads:
    """As many multilayer perceptrons as there are weightings and seeds, in batched matrices `(R * S, in, out)`.

    Heads of one seed start from the same numbers, see the same batches in the same order, and drop the same units, so
    that the weights are all that differs between them.
    """

    def __init__(self, in_features: int, classes: int, weightings: int, seeds: Sequence[int], settings: HeadSettings):
        self.settings, self.weightings, self.seeds = settings, weightings, list(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        widths = [in_features, *settings.hidden, classes]
        self.weight, self.bias = [], []
        for before, after in pairwise(widths):
            bound = 1 / math.sqrt(before)  # what nn.Linear does
            self.weight.append(self._parameter((before, after), bound))
            self.bias.append(self._parameter((1, after), bound))
        self.gain, self.offset, self.running = [], [], []
        if settings.batch_norm:
            heads = weightings * len(self.seeds)
            for width in settings.hidden:
                self.gain.append(torch.ones(heads, 1, width).requires_grad_())
                self.offset.append(torch.zeros(heads, 1, width).requires_grad_())
                self.running.append((torch.zeros(heads, 1, width), torch.ones(heads, 1, width)))

    def to(self, device: torch.device | str) -> Heads:
        """Move the parameters."""
        for group in (self.weight, self.bias, self.gain, self.offset):
            group[:] = [p.detach().to(device).requires_grad_() for p in group]
        self.running = [(m.to(device), v.to(device)) for m, v in self.running]
        return self

    @property
    def parameters(self) -> list[Tensor]:
        """All of them."""
        return [*self.weight, *self.bias, *self.gain, *self.offset]

    def per_head(self, drawn: Sequence[Tensor]) -> Tensor:
        """Return what was drawn for each seed, once for each head."""
        stacked = torch.stack(list(drawn))
        return stacked.expand(self.weightings, *stacked.shape).flatten(0, 1)

    def _parameter(self, shape: tuple[int, int], bound: float) -> Tensor:
        drawn = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in self.generators]
        return self.per_head(drawn).clone().requires_grad_()

    def __call__(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Return logits `(R * S, B, C)` of inputs `(R * S, B, D)`, or `(B, D)` that all heads see."""
        if x.ndim == 2:
            x = x.expand(len(self.weight[0]), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i == len(self.weight) - 1:
                return x
            if self.settings.batch_norm:
                x = self._normalised(x, i, training)
            x = x.relu()
            if training and self.settings.dropout:
                x = x * self._kept(x)
        return x

    def _normalised(self, x: Tensor, layer: int, training: bool) -> Tensor:
        mean, variance = self.running[layer]
        if training:
            n = x.shape[1]
            batch_mean, batch_variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
            with torch.no_grad():
                mean.lerp_(batch_mean, _BATCH_NORM_MOMENTUM)
                variance.lerp_(batch_variance * n / max(n - 1, 1), _BATCH_NORM_MOMENTUM)
            mean, variance = batch_mean, batch_variance
        return (x - mean) * (variance + _BATCH_NORM_EPSILON).rsqrt() * self.gain[layer] + self.offset[layer]

    def _kept(self, x: Tensor) -> Tensor:
        p = self.settings.dropout
        drawn = self.per_head([torch.rand(x.shape[1:], generator=g) for g in self.generators])
        return (drawn >= p).to(x) / (1 - p)

    def epoch(self, x: Tensor, y: Tensor, table: Tensor) -> None:
        """Train all heads over the data once; `table` `(R * S, C)` holds the class weights of each."""
        settings = self.settings
        order = self.per_head([torch.randperm(len(x), generator=g) for g in self.generators]).to(x.device)
        for start in range(0, len(x), settings.batch_size):
            rows = order[:, start : start + settings.batch_size]
            if settings.batch_norm and rows.shape[1] == 1:
                continue  # one sample has no variance
            logits, target = self(x[rows], training=True), y[rows]
            losses = table.gather(1, target) * self._losses(logits, target)
            # a sum over the heads: each gets the gradient of its own mean
            gradients = torch.autograd.grad(losses.mean(1).sum(), self.parameters)
            with torch.no_grad():
                for p, g in zip(self.parameters, gradients, strict=True):
                    if settings.weight_decay:
                        p.mul_(1 - settings.lr * settings.weight_decay)
                    p.sub_(g, alpha=settings.lr)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        flat, classes = logits.flatten(0, 1), target.flatten()
        if self.settings.loss == "poly":
            losses = poly_tail_loss(flat, classes, alpha=self.settings.alpha, reduction="none")
        else:
            losses = F.cross_entropy(flat, classes, reduction="none")
        return losses.view_as(target)


def sweep_heads(
    features: Tensor,
    labels: Tensor,
    class_weights: Mapping[str, Sequence[float]],
    *,
    probes: Mapping[str, Tensor | tuple[Tensor, Tensor]],
    seeds: int | Sequence[int] = 5,
    settings: HeadSettings | None = None,
    record: Sequence[int] | None = None,
) -> Fading:
    r"""Train a head for every weighting and seed at once on frozen features, and record whether the weights still act.

    Every head minimises :math:`\frac1B \sum_i w_{y_i} \ell(f(x_i), y_i)` with plain SGD, the weights of a weighting
    divided by their mean over the training samples. All heads are one batched matrix product a layer.

    Shapes:
        features `(N, ...)`, flattened, labels `(N,)` whole numbers from 0; probes `(M, ...)`, or with their labels.

    Args:
        features: of the training samples.
        labels: their classes.
        class_weights: name of a weighting -> one weight for each class.
        probes: name -> features on which the predictions are counted: held-out samples, other classes, noise.
        seeds: how many, or which.
        settings: of the heads.
        record: after which epochs to record; by default some ten, evenly spaced on a logarithmic axis.

    Raises:
        InvalidArgument: for weights, labels or settings that cannot be used.
        ShapeMismatch: if features, labels, weights and probes do not fit together.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> y = torch.arange(60) % 2
        >>> x = torch.randn(60, 2, generator=generator) + 6.0 * y[:, None]
        >>> found = sweep_heads(x, y, {"1:1": [1, 1], "16:1": [16, 1]}, probes={"held out": x}, seeds=2,
        ...                     settings=HeadSettings(epochs=2))
        >>> found.fraction["held out"].shape
        torch.Size([2, 2, 2, 2])
    """
    settings = settings or HeadSettings()
    x, y, shown, truth = _checked_data(features, labels, probes)
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise InvalidArgument(f"seeds={seeds!r} names none; at least one is needed.")
    for seed in chosen:
        check_whole("seed", seed, 0)
    table = _table(class_weights, y)
    heads = Heads(x.shape[1], table.shape[1], len(table), chosen, settings).to(x.device)
    per_head = table.repeat_interleave(len(chosen), 0).to(x)
    when = sorted(set(spaced_epochs(settings.epochs) if record is None else record))
    if not when or when != [epoch for epoch in when if epoch in range(1, settings.epochs + 1)]:
        raise InvalidArgument(f"record={record!r}: some of the epochs 1 to {settings.epochs} are needed.")
    found = Fading(list(class_weights), len(chosen))
    rows: dict[str, list[Tensor]] = {}
    for epoch in range(1, settings.epochs + 1):
        heads.epoch(x, y, per_head)
        if epoch in when:
            found.epochs.append(epoch)
            for key, value in _measured(heads, x, y, per_head, shown, truth).items():
                rows.setdefault(key, []).append(value.cpu().unflatten(0, (len(table), len(chosen))))
    for key, values in rows.items():
        kind, _, probe = key.partition("/")
        stacked = torch.stack(values)
        if probe:
            getattr(found, kind)[probe] = stacked
        else:
            setattr(found, kind, stacked)
    return found


def spaced_epochs(epochs: int, count: int = 10) -> list[int]:
    """Return some epochs from 1 to the last, evenly spaced on a logarithmic axis.

    Example:
        >>> spaced_epochs(100, 5)
        [1, 3, 10, 32, 100]
    """
    return sorted({round(epochs ** (i / max(count - 1, 1))) for i in range(count)} | {epochs})


def ratio_weights(ratios: Sequence[float]) -> dict[str, list[float]]:
    """Return weightings of two classes by their ratio: 16 is `16:1` in favour of the first class, 1/16 is `1:16`.

    Raises:
        InvalidArgument: for a ratio that is not positive.

    Example:
        >>> ratio_weights([4, 0.25])
        {'4:1': [4.0, 1.0], '1:4': [1.0, 4.0]}
    """
    named = {}
    for ratio in ratios:
        check_number("ratio (16 for 16:1)", ratio, 0, open_="low")
        pair = [float(ratio), 1.0] if ratio >= 1 else [1.0, 1.0 / ratio]
        named[":".join(f"{value:g}" for value in pair)] = pair
    return named


def fading_figure(found: Fading, probe: str, *, of_class: int = 0, title: str = "") -> Figure:
    """Draw the share of a probe that is predicted as one class over the epochs, one line a weighting.

    The lines are means over the seeds, the bands reach from the smallest to the largest.

    Raises:
        InvalidArgument: for a probe or a class that was not recorded.

    Example:
        >>> figure = fading_figure(found, "other classes")  # doctest: +SKIP
    """
    check_choice("probe", probe, found.fraction)
    check_whole("of_class", of_class, 0)
    classes = found.fraction[probe].shape[-1]
    if of_class >= classes:
        raise InvalidArgument(f"of_class={of_class}: the heads tell {classes} classes apart, from 0.")
    share = 100 * found.fraction[probe][..., of_class]
    lines = {name: (found.epochs, share[:, i].mean(1)) for i, name in enumerate(found.names)}
    figure = curves(lines, title=title, x_label="epoch", y_label=f"% of {probe} predicted as class {of_class}")
    axes = figure.axes[0]
    for i, color in enumerate(color_cycle(len(found.names))):
        low, high = share[:, i].min(1).values, share[:, i].max(1).values
        axes.fill_between(found.epochs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(found.epochs, [str(epoch) for epoch in found.epochs])
    axes.minorticks_off()
    return figure


@torch.no_grad()
def _measured(
    heads: Heads, x: Tensor, y: Tensor, table: Tensor, probes: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is recorded of each head, `(R * S, ...)`; NaN of a head that has diverged."""
    classes = table.shape[1]
    logits = heads(x)
    diverged = ~torch.isfinite(logits).flatten(1).all(1)
    if diverged.any():
        warnings.warn(
            f"{int(diverged.sum())} of {len(diverged)} heads have diverged and are recorded as NaN. Lower lr.",
            NotFinite,
        )
    logits = torch.where(diverged[:, None, None], 0.0, logits)
    margin = torch.stack([margins(own, y) for own in logits])
    effect = [boundary_shift(w[y], m) for w, m in zip(table, margin, strict=True)]
    found = {
        "train_accuracy": (margin > 0).double().mean(1),
        "margin": margin.median(1).values,
        "effect": torch.tensor(effect, dtype=torch.float64, device=x.device),
    }
    for name, inputs in probes.items():
        predicted = heads(inputs).argmax(2)
        found[f"fraction/{name}"] = F.one_hot(predicted, classes).double().mean(1)
        if name in truth:
            found[f"accuracy/{name}"] = (predicted == truth[name]).double().mean(1)
    for values in found.values():
        values[diverged] = torch.nan
    return found


def _checked_data(
    features: Tensor, labels: Tensor, probes: Mapping[str, Tensor | tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    x = features.detach().flatten(1).float()
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ShapeMismatch(
            f"features {tuple(features.shape)} and labels {labels.dtype} {tuple(labels.shape)}: one whole number for "
            f"each sample is needed."
        )
    if not len(x) or not torch.isfinite(x).all():
        raise InvalidArgument("The features must be finite numbers of at least one sample.")
    shown, truth = {}, {}
    for name, given in probes.items():
        inputs, own = given if isinstance(given, tuple) else (given, None)
        shown[name] = inputs.detach().flatten(1).float().to(x.device)
        if not len(inputs) or shown[name].shape[1] != x.shape[1]:
            raise ShapeMismatch(
                f"The probe {name!r} is {tuple(inputs.shape)}; rows of {x.shape[1]} numbers are needed."
            )
        if not torch.isfinite(shown[name]).all():
            raise InvalidArgument(f"The probe {name!r} holds numbers that are not finite.")
        if own is not None and own.shape != inputs.shape[:1]:
            raise ShapeMismatch(f"The probe {name!r} has {len(inputs)} rows and labels of shape {tuple(own.shape)}.")
        if own is not None:
            truth[name] = own.to(x.device)
    return x, labels.to(x.device), shown, truth


def _table(class_weights: Mapping[str, Sequence[float]], y: Tensor) -> Tensor:
    if not class_weights:
        raise InvalidArgument("class_weights names no weighting; at least one is needed.")
    rows = [check_weights(w, f"The weights {name!r}") for name, w in class_weights.items()]
    classes = {len(row) for row in rows}
    if len(classes) > 1 or min(classes) < 2 or int(y.min()) < 0 or int(y.max()) >= min(classes):
        raise ShapeMismatch(
            f"The weightings have weights for {sorted(classes)} classes and the labels run from {int(y.min())} to "
            f"{int(y.max())}: every weighting needs one weight for each of at least two classes."
        )
    counts = torch.bincount(y.cpu(), minlength=min(classes))
    return torch.stack([normalized_weights(row, counts) for row in rows])
