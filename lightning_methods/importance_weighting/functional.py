"""Importance weights, and how much they still do (Byrd and Lipton, ICML 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch


def check_weights(weights: Tensor | Sequence[float], what: str = "The weights") -> Tensor:
    """Return weights as a float64 tensor, having checked that they can be weights.

    Args:
        weights: numbers that are finite, not negative, and not all 0.
        what: how an error calls them.

    Raises:
        InvalidArgument: for anything else, saying which one it is.

    Example:
        >>> check_weights([1, 2])
        tensor([1., 2.], dtype=torch.float64)
    """
    try:
        # a list at once as float64: by itself it would become float32
        w = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64)
        if w.is_complex():
            raise TypeError("complex numbers have no order")
        w = w.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"{what} are {weights!r:.80}; numbers are needed: {error}") from error
    if not w.numel():
        raise InvalidArgument(f"{what} are empty; at least one is needed.")
    bad = ~(torch.isfinite(w) & (w >= 0))
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        at = f" at position {place[0] if len(place) == 1 else place}" if place else ""
        raise InvalidArgument(f"{what} hold {float(w[place])}{at}. Finite numbers of at least 0 are needed.")
    if not w.any():
        raise InvalidArgument(f"{what} are all 0: nothing would be trained. At least one must be positive.")
    return w


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `InvalidArgument` unless a setting is a whole number of at least `least`.

    Example:
        >>> check_whole("epochs", 3, 1)
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InvalidArgument(f"{name}={value!r}: a whole number of at least {least} is needed.")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_: str = "") -> None:
    """Raise `InvalidArgument` unless a setting is a finite number in a range, without the ends named in `open_`.

    Example:
        >>> check_number("beta", 0.5, 0, 1, open_="high")
    """
    fits = not isinstance(value, bool) and isinstance(value, Real) and low <= float(value) <= high
    x = float(value) if fits else math.nan  # type: ignore[arg-type]
    if not fits or abs(x) == math.inf or (x == low and "low" in open_) or (x == high and "high" in open_):
        least = f"above {low:g}" if "low" in open_ else f"from {low:g}"
        most = "" if high == math.inf else f" to {'below ' if 'high' in open_ else ''}{high:g}"
        raise InvalidArgument(f"{name}={value!r}: a finite number {least}{most} is needed.")


def check_pair(name: str, value: object) -> None:
    """Raise `InvalidArgument` unless a setting is a pair of numbers `0 <= low < high`, high possibly infinite.

    Example:
        >>> check_pair("clip", (0.1, 10.0))
    """
    pair = list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or not all(isinstance(x, Real) for x in pair) or not 0 <= pair[0] < pair[1]:
        raise InvalidArgument(f"{name}={value!r}: a pair 0 <= low < high is needed.")


def class_numbers(counts: Tensor | Sequence[float], what: str) -> Tensor:
    """Return what `check_weights` does, one for each class."""
    n = check_weights(counts, what)
    if n.ndim != 1:
        raise ShapeMismatch(f"{what} have the shape {tuple(n.shape)}; one number for each class, (C,), is needed.")
    return n


def effective_sample_size(weights: Tensor | Sequence[float]) -> float:
    r"""Return how many equally weighted samples have the variance of these weighted ones.

    .. math:: n_{\mathrm{eff}} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    From 1 (one sample has all the weight) to `n` (all weights are equal); the scale of the weights does not matter.

    Shapes:
        weights of any shape; returns a number.

    Raises:
        InvalidArgument: for weights that are negative, not finite, all 0, or none.

    Example:
        >>> round(effective_sample_size([256.0, 1.0, 1.0, 1.0]), 4)
        1.0235
    """
    w = check_weights(weights)
    w = w / w.max()  # squares of very large or small weights would leave the range of numbers
    return float(w.sum().square() / w.square().sum())


def balanced_weights(counts: Tensor | Sequence[int]) -> Tensor:
    r"""Return the weights under which every class counts the same, `n / (C n_c)`.

    A class without samples has weight 0 and is not counted in `C`. Over the samples the weights average 1.

    Shapes:
        counts `(C,)` -> `(C,)` float64.

    Args:
        counts: samples of each class.

    Raises:
        InvalidArgument: for counts that are negative, not finite, all 0, or none.

    Example:
        >>> balanced_weights([30, 10])
        tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    n = class_numbers(counts, "The class counts")
    present = n > 0
    return torch.where(present, n.sum() / (present.sum() * n.clamp(min=1e-300)), 0.0)


def class_balanced_weights(counts: Tensor | Sequence[int], beta: float = 0.999) -> Tensor:
    r"""Return weights inverse to the effective number of samples of each class (Cui et al. 2019).

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    `beta = 0` gives equal weights; `beta -> 1` those of `balanced_weights`, up to scale. The mean over the classes that
    have samples is 1, and a class without samples has weight 0.

    Shapes:
        counts `(C,)` -> `(C,)` float64.

    Args:
        counts: samples of each class.
        beta: from 0 to below 1; 0.9 to 0.9999 in the paper.

    Raises:
        InvalidArgument: for counts or a beta outside of their range.

    Example:
        >>> class_balanced_weights([1000, 10], beta=0.99)
        tensor([0.1746, 1.8254], dtype=torch.float64)
    """
    check_number("beta", beta, 0, 1, open_="high")
    n = class_numbers(counts, "The class counts")
    present = n > 0
    effective = -torch.expm1(n * torch.log(torch.tensor(beta, dtype=torch.float64))) if beta else torch.ones_like(n)
    weights = torch.where(present, (1 - beta) / effective.clamp(min=1e-300), 0.0)
    return weights * present.sum() / weights.sum()


def normalized_weights(weights: Tensor | Sequence[float], counts: Tensor | Sequence[int] | None = None) -> Tensor:
    """Return weights divided by their mean, over the samples where `counts` of each class are given.

    Shapes:
        weights `(C,)`, counts `(C,)` -> `(C,)`.

    Raises:
        ShapeMismatch: if there is not one count for each weight.
        InvalidArgument: for weights or counts that are negative, not finite or all 0, or if the mean is 0.

    Example:
        >>> normalized_weights(torch.tensor([1.0, 2.0, 4.0, 1.0]))
        tensor([0.5000, 1.0000, 2.0000, 0.5000])
    """
    w = class_numbers(weights, "The class weights")
    if counts is None:
        mean = w.mean()
    else:
        n = class_numbers(counts, "The class counts")
        if n.shape != w.shape:
            raise ShapeMismatch(f"There are {len(w)} class weights and counts of {len(n)} classes.")
        mean = (w * n).sum() / n.sum()
    if not mean > 0:
        raise InvalidArgument("The classes that have samples all have weight 0: nothing would be trained.")
    return (w / mean).to(weights) if isinstance(weights, Tensor) and weights.is_floating_point() else w / mean


# -- what the weights still do -----------------------------------------------------------------------------------------


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return by how much the logit of the true class exceeds the largest other one, `z_y - max_{j != y} z_j`.

    Positive where the sample is classified right. One logit counts as `z` of class 1 against 0.

    Shapes:
        logits `(N, C)`, `(N, 1)` or `(N,)`, labels `(N,)` whole numbers -> `(N,)` in float64.

    Raises:
        ShapeMismatch: if there is not one label for each row of logits.
        InvalidArgument: for labels that are no classes of the logits, and for logits that are not finite.

    Example:
        >>> margins(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0]))
        tensor([1.5000], dtype=torch.float64)
    """
    z, y = two_logits(logits), labels
    if y.shape != z.shape[:1]:
        raise ShapeMismatch(f"logits of shape {tuple(logits.shape)} and labels of {tuple(y.shape)}: one label a row.")
    if y.is_floating_point() or (y.numel() and not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]):
        raise InvalidArgument(f"The labels are {y.dtype}; whole numbers from 0 to {z.shape[1] - 1} are needed.")
    if not bool(torch.isfinite(z).all()):
        raise InvalidArgument("The logits are not all finite numbers: a margin of them means nothing.")
    own = z.gather(1, y.long()[:, None])
    others = z.scatter(1, y.long()[:, None], -torch.inf)
    return (own - others.max(1, keepdim=True).values)[:, 0]


def two_logits(logits: Tensor) -> Tensor:
    """Return logits as `(N, C)` in float64; one logit `z` becomes `(0, z)`.

    Raises:
        ShapeMismatch: for another shape.

    Example:
        >>> two_logits(torch.tensor([0.5])).shape
        torch.Size([1, 2])
    """
    z = logits.detach().double()
    if z.ndim == 1 or (z.ndim == 2 and z.shape[1] == 1):
        z = torch.stack([torch.zeros_like(z.reshape(-1)), z.reshape(-1)], dim=1)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ShapeMismatch(f"The logits have the shape {tuple(logits.shape)}; (N, classes) is needed.")
    return z


def gradient_share(probability: Tensor, weights: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    r"""Return per class its part in the gradient of the weighted cross-entropy, before division by the total.

    .. math:: g_c = \sum_{i:\, y_i = c} w_i (1 - p_i), \qquad s_c = \sum_{i:\, y_i = c} w_i

    :math:`g_c / \sum g` is the share that class c has; :math:`s_c / \sum s` the share that the weights mean to give it.
    They are equal as long as all samples are equally wrong, and part when some are fitted.

    Shapes:
        probability of the true class `(N,)`, weights `(N,)`, labels `(N,)` -> two `(classes,)`.

    Raises:
        ShapeMismatch: if they are not of one length.
        InvalidArgument: for numbers that are no probabilities or weights, or labels that are no classes.

    Example:
        >>> p, w = torch.tensor([0.5, 0.9]), torch.tensor([1.0, 3.0])
        >>> gradient_share(p, w, torch.tensor([0, 1]), 2)
        (tensor([0.5000, 0.3000]), tensor([1., 3.]))
    """
    if probability.ndim != 1 or weights.shape != probability.shape or labels.shape != probability.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (probability, weights, labels))
        raise ShapeMismatch(f"probability, weights and labels are {shapes}; three times (N,) is needed.")
    # also false for NaN
    if not bool(((probability >= 0) & (probability <= 1) & (weights >= 0) & torch.isfinite(weights)).all()):
        raise InvalidArgument("Probabilities from 0 to 1, and finite weights of at least 0, are needed.")
    if labels.is_floating_point() or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise InvalidArgument(f"The labels are {labels.dtype}; whole numbers from 0 to {classes - 1} are needed.")
    zeros = torch.zeros(classes, dtype=weights.dtype, device=weights.device)
    wrong = weights * (1 - probability.to(weights))
    return zeros.index_add(0, labels, wrong), zeros.index_add(0, labels, weights)


def boundary_shift(weights: Tensor, margin: Tensor) -> float:
    r"""Return how far the weights can still move a decision boundary, in parts of the way to the nearest samples.

    With a loss whose tail is exponential, as the cross-entropy, a weight is a shift of the margin: :math:`w e^{-m} =
    e^{-(m - \log w)}`. Two groups of samples with weights in the ratio R are balanced when their margins differ by
    :math:`\log R`, so that the boundary lies off the middle by

    .. math:: \mathrm{effect} = \min\left(1, \frac{\log(w_{\max} / w_{\min})}{2\, \mathrm{median}_i\, m_i}\right)

    of the half gap. The margins grow as long as the data are separated and nothing bounds the network, and the effect
    fades; it is 1 where at least half of the samples are not yet separated. The tail of another loss (`PolyTailLoss`)
    is not described by this.

    Shapes:
        weights `(N,)` (samples of weight 0 are left out), margin `(N,)` -> a number from 0 to 1.

    Raises:
        ShapeMismatch: if there is not one margin for each weight.
        InvalidArgument: for weights that are negative, and numbers that are not finite.

    Example:
        >>> w, m = torch.tensor([1.0, 16.0]), torch.tensor([10.0, 10.0])
        >>> round(boundary_shift(w, m), 4)
        0.1386
    """
    if weights.shape != margin.shape:
        raise ShapeMismatch(f"weights {tuple(weights.shape)} and margin {tuple(margin.shape)}: twice (N,) is needed.")
    if not bool((torch.isfinite(margin) & torch.isfinite(weights) & (weights >= 0)).all()):
        raise InvalidArgument("Finite margins, and finite weights of at least 0, are needed.")
    counted = weights > 0
    if not counted.any():
        return 0.0
    w = weights[counted].double()
    spread = float(torch.log(w.max() / w.min()))
    # the lower of two middle values: with an even number neither side is favoured by much
    middle = float(margin[counted].double().median())
    if spread == 0:
        return 0.0
    return 1.0 if middle <= 0 else min(1.0, spread / (2 * middle))
