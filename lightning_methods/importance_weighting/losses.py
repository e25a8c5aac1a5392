"""Losses under which the rare keep a say: polynomial tail, vector scaling, LDAM, logit adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice
from lightning_methods.importance_weighting.functional import check_number, check_weights

Reduction = Literal["mean", "sum", "none"]

_AT_ONE = math.log1p(math.exp(-1.0))


def poly_tail_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    left: Literal["logistic", "linear"] = "logistic",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return the loss with a polynomial tail, made for weights to keep their effect (Wang et al. 2022).

    .. math:: \ell(m) = \begin{cases} \log(1 + e^{-m}) / \log(1 + e^{-1}) & m \le 1 \\ m^{-\alpha} & m > 1 \end{cases}

    of the margin `m`, which is :math:`z_1 - z_0` with the sign of the class, and for more than two classes :math:`z_y -
    \log\sum_{j \ne y} e^{z_j}`, which is the same for two. The loss is continuous; its slope jumps at 1.

    Shapes:
        logits `(N, C, ...)` with target `(N, ...)` whole numbers, or one logit `(N,)` or `(N, 1)` with targets 0 and 1
        of the same shape -> a scalar, or the shape of the target. Half precisions give float32.

    Args:
        logits: of the classes.
        target: class of each sample.
        alpha: power of the tail; 1 and 2 in the paper.
        left: for margins up to 1 the logistic loss, or the line `2 - m`.
        reduction: mean, sum or none.

    Raises:
        InvalidArgument: for settings outside of their range, or labels that are no classes.
        ShapeMismatch: if logits and target do not fit together.

    Example:
        >>> z = torch.tensor([[0.0, 2.0], [0.0, 10.0]])
        >>> poly_tail_loss(z, torch.tensor([1, 1]), reduction="none")
        tensor([0.5000, 0.1000])

    Deviations from the paper: the form for more than two classes.
    """
    _check(alpha, left, reduction)
    m = _margin(logits, target)
    near, far = m.clamp(max=1.0), m.clamp(min=1.0)
    # each branch sees only margins of its own side, so that no gradient is 0 * inf
    rising = F.softplus(-near) / _AT_ONE if left == "logistic" else 2.0 - near
    losses = torch.where(m <= 1.0, rising, far.pow(-alpha))
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    if target.shape == z.shape:
        if not ((target == 0) | (target == 1)).all():
            raise InvalidArgument("With one logit a sample the targets must be 0 or 1.")
        return z * (2 * target.to(z.dtype) - 1)
    if z.ndim < 2 or target.shape != (z.shape[0], *z.shape[2:]) or z.shape[1] < 2:
        raise ShapeMismatch(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)}: (N, C, ...) and (N, ...), or twice the "
            f"same shape for one logit, are needed."
        )
    if target.is_floating_point() or (target.numel() and not 0 <= int(target.min()) <= int(target.max()) < z.shape[1]):
        raise InvalidArgument(f"The targets must be whole numbers from 0 to {z.shape[1] - 1}, got {target.dtype}.")
    place = target.long().unsqueeze(1)
    own = z.gather(1, place).squeeze(1)
    if z.shape[1] == 2:
        return own - z.gather(1, 1 - place).squeeze(1)
    return own - z.scatter(1, place, -torch.inf).logsumexp(1)


def _check(alpha: float, left: str, reduction: str) -> None:
    check_number("alpha", alpha, 0, open_="low")
    check_choice("left", left, ("logistic", "linear"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))


class PolyTailLoss(nn.Module):
    """The loss with a polynomial tail as a module, see `poly_tail_loss`.

    `ImportanceWeighting` weights it like any other loss; the authors raise the weights to a power of 1.5 to 3
    (`exponent=`).

    Shapes: as `poly_tail_loss`.

    Args:
        alpha: power of the tail. Default 1; 1 and 2 in the paper.
        left: `"logistic"` (default) or `"linear"` for margins up to 1.
        reduction: mean (default), sum or none.

    Raises:
        InvalidArgument: for settings outside of their range.

    Example:
        >>> PolyTailLoss(alpha=2.0)(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(0.2500)
    """

    def __init__(
        self, alpha: float = 1.0, *, left: Literal["logistic", "linear"] = "logistic", reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check(alpha, left, reduction)
        self.alpha = alpha
        self.left: Literal["logistic", "linear"] = left
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return poly_tail_loss(logits, target, alpha=self.alpha, left=self.left, reduction=self.reduction)


class VSLoss(nn.Module):
    r"""Cross-entropy of logits that are scaled and shifted by class (vector scaling, Kini et al. 2021).

    .. math:: \ell(z, y) = \mathrm{CE}(\Delta \odot z + \iota,\, y), \qquad \Delta_c = (n_c / n_{\max})^\gamma, \quad
        \iota_c = \tau \log(n_c / n)

    `gamma=0` is logit adjustment, `tau=0` class-dependent temperatures (CDT). Predict with the unchanged logits.

    Shapes:
        logits `(N, C, ...)`, target `(N, ...)` whole numbers or `(N, C, ...)` probabilities -> as `F.cross_entropy`.

    Args:
        class_counts: training samples of each class, all positive.
        gamma: power of the scales, at least 0. Default 0.2, ours.
        tau: factor of the shifts. Default 1, ours.
        ignore_index: target that does not count.
        label_smoothing: as in `F.cross_entropy`.
        reduction: mean (default), sum or none.

    Raises:
        InvalidArgument: for settings outside of their range.
        ShapeMismatch: if the logits have another number of classes.

    Example:
        >>> loss = VSLoss([90, 10], gamma=0.0, tau=1.0)
        >>> loss(torch.zeros(1, 2), torch.tensor([1]))
        tensor(2.3026)
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        class_counts: Sequence[int],
        gamma: float = 0.2,
        tau: float = 1.0,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("gamma", gamma, 0)
        check_number("tau", tau, -math.inf)
        check_number("label_smoothing", label_smoothing, 0, 1)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        n = _counts(class_counts)
        self.gamma, self.tau = gamma, tau
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.reduction: Reduction = reduction
        # not in the state: the counts that made them are in the code that builds the module
        self.register_buffer("scale", (n / n.max()).pow(gamma).float(), persistent=False)
        self.register_buffer("shift", (tau * torch.log(n / n.sum())).float(), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        shape = _class_shape(z, len(self.scale))
        z = self.scale.to(z.dtype).view(shape) * z + self.shift.to(z.dtype).view(shape)
        return _cross_entropy(z, target, self.ignore_index, self.reduction, self.label_smoothing)


class LogitAdjustedLoss(VSLoss):
    r"""Cross-entropy of logits that are shifted by the class shares (Menon et al. 2021).

    .. math:: \ell(z, y) = \mathrm{CE}(z + \tau \log \pi,\, y)

    The unchanged logits then aim at the balanced error.

    Shapes: as `VSLoss`.

    Args:
        class_counts: training samples of each class, all positive.
        tau: factor of the shifts. Default 1, for which the loss is consistent.
        ignore_index: target that does not count.
        label_smoothing: as in `F.cross_entropy`.
        reduction: mean (default), sum or none.

    Raises:
        InvalidArgument: for settings outside of their range.
        ShapeMismatch: if the logits have another number of classes.

    Example:
        >>> LogitAdjustedLoss([90, 10])(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.1054)
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        tau: float = 1.0,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            class_counts,
            0.0,
            tau,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class LDAMLoss(nn.Module):
    r"""Label-distribution-aware margin loss: the rarer a class, the larger its margin (Cao et al. 2019).

    .. math:: \ell(z, y) = \mathrm{CE}\big(s\, (z - m_y\, e_y),\, y\big), \qquad m_c = m_{\max}\, (n_c /
    n_{\min})^{-1/4}

    Meant for logits that are cosines (a head that normalises features and weights), with the scale of the paper.

    Shapes:
        logits `(N, C, ...)`, target `(N, ...)` whole numbers -> as `F.cross_entropy`.

    Args:
        class_counts: training samples of each class, all positive.
        max_margin: margin of the rarest class. Default 0.5.
        scale: `s`, what the logits are multiplied by. Default 30.
        ignore_index: target that does not count.
        reduction: mean (default), sum or none.

    Raises:
        InvalidArgument: for settings outside of their range.
        ShapeMismatch: if logits and targets do not fit together.

    Example:
        >>> LDAMLoss([160, 10], scale=1.0).margin
        tensor([0.2500, 0.5000])
    """

    margin: Tensor

    def __init__(
        self,
        class_counts: Sequence[int],
        max_margin: float = 0.5,
        scale: float = 30.0,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("max_margin", max_margin, 0)
        check_number("scale", scale, 0, open_="low")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        n = _counts(class_counts)
        self.max_margin, self.scale, self.ignore_index = max_margin, scale, ignore_index
        self.reduction: Reduction = reduction
        self.register_buffer("margin", (max_margin * (n / n.min()).pow(-0.25)).float(), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        _class_shape(z, len(self.margin))
        if target.is_floating_point() or target.shape != (z.shape[0], *z.shape[2:]):
            raise ShapeMismatch(f"target {target.dtype} {tuple(target.shape)}: one class for each sample is needed.")
        own = torch.zeros_like(z).scatter(1, target.clamp(0, z.shape[1] - 1).long().unsqueeze(1), 1.0)
        z = z - own * self.margin.to(z.dtype).view(_class_shape(z, len(self.margin)))
        return _cross_entropy(self.scale * z, target, self.ignore_index, self.reduction, 0.0)


def _counts(class_counts: Sequence[int]) -> Tensor:
    n = check_weights(class_counts, "class_counts")
    if n.ndim != 1 or len(n) < 2 or not (n > 0).all():
        raise InvalidArgument(f"class_counts={class_counts!r:.80}: a positive number for each of at least 2 classes.")
    return n


def _cross_entropy(z: Tensor, target: Tensor, ignore_index: int, reduction: Reduction, smoothing: float) -> Tensor:
    """Return the cross-entropy, with our own words for targets that do not fit."""
    if target.shape != (z.shape if target.is_floating_point() else (z.shape[0], *z.shape[2:])):
        raise ShapeMismatch(
            f"logits {tuple(z.shape)} and target {target.dtype} {tuple(target.shape)}: one class, or probabilities of "
            f"all classes, for each sample are needed."
        )
    try:
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
    except IndexError as error:  # only now, since to look at the labels first would wait for a device
        known = target[target != ignore_index]
        raise InvalidArgument(
            f"The labels run from {int(known.min())} to {int(known.max())}; class_counts names the classes 0 to "
            f"{z.shape[1] - 1}."
        ) from error


def _class_shape(z: Tensor, classes: int) -> list[int]:
    if z.ndim < 2 or z.shape[1] != classes:
        raise ShapeMismatch(
            f"The logits have the shape {tuple(z.shape)} and class_counts names {classes} classes: (N, {classes}, ...)."
        )
    return [1, classes, *[1] * (z.ndim - 2)]
