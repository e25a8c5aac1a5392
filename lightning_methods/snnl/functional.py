"""The soft nearest neighbour loss and what is measured with it (Frosst, Papernot and Hinton, ICML 2019)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

Distance = Literal["sqeuclidean", "cosine"]

# rows of the score matrix that are worked on at a time on a CPU, so that they stay in its cache
CACHED_ELEMENTS = 2**18


def soft_nearest_neighbor_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 100.0,
    *,
    distance: Distance = "sqeuclidean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return how entangled the classes are: the soft nearest neighbour loss at one temperature (equation 1).

    .. math:: l_{sn}(x, y, T) = -\frac{1}{M} \sum_i \log
        \frac{\sum_{j \ne i,\, y_j = y_i} e^{-D_{ij}/T}}{\sum_{k \ne i} e^{-D_{ik}/T}}

    0 where every sample's neighbours are of its own class, `chance_level(labels)` where they are drawn at random. The
    value is not comparable between batch sizes or class balances unless it is divided by `chance_level(labels)`.

    Shapes:
        features `(B, ...)`, flattened to `(B, D)`; labels `(B,)`, `(B, 1)` or one-hot `(B, C)`; returns a scalar, or
        `(B,)` with `reduction="none"`.

    Args:
        features: one row per sample; half precisions are computed in float32.
        labels: class of each sample.
        temperature: `T > 0`, in units of the distance (the paper's first value is 100, meant for squared Euclidean
            distances between wide convolutional features; cosine distances want 0.1 to 1). A tensor gets a gradient.
            `inf` gives the chance level.
        distance: `D`, squared Euclidean or `1 - cos`.
        reduction: mean or sum over the `M` samples that have another one of their class, or no reduction (0 for the
            samples without).
        ignore_index: label of samples that are neither anchors nor neighbours.
        chunk_size: work on so many rows at a time and compute them again in the backward pass: memory grows with
            `chunk_size * B` instead of `B * B`, at up to twice the time.

    Raises:
        InvalidArgument: for a temperature that is not positive, an unknown mode, or soft or multi-label targets.
        ShapeMismatch: if features and labels do not fit together.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
        >>> print(f"{soft_nearest_neighbor_loss(x, torch.tensor([0, 0, 1]), 1.0):.6f}")
        0.024461

    Deviations from the paper: a sample without another one of its class, whose term would be infinite, is left out of
    the mean; the released code adds a constant for it. Everything is computed in logarithms, so that no temperature
    saturates.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    x, classes, keep = prepared(features, labels, distance, ignore_index)
    losses, valid = anchor_losses(x, classes, temperature, distance=distance, keep=keep, chunk_size=chunk_size)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum().clamp(min=1)


def anchor_losses(
    x: Tensor,
    classes: Tensor,
    temperature: float | Tensor,
    *,
    distance: Distance = "sqeuclidean",
    keep: Tensor | None = None,
    rows: slice | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each anchor against all samples, and which anchors have another sample of their class.

    Shapes:
        x `(B, D)` prepared features, classes `(B,)`, keep `(B,)` or `None`; returns two tensors `(N,)`.

    Args:
        x: features, in float32 or float64.
        classes: integer labels.
        temperature: positive number or tensor.
        distance: squared Euclidean or cosine.
        keep: which samples count at all.
        rows: the anchors, a contiguous slice of the samples; all by default. In distributed training each rank takes
            its own rows of the joined batch.
        chunk_size: see `soft_nearest_neighbor_loss`.

    Raises:
        InvalidArgument: for a temperature or chunk size that is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise InvalidArgument(f"chunk_size={chunk_size}: at least 1 row at a time is needed, or None.")
    beta = _inverse_temperature(temperature, x)
    start, stop, _ = (rows or slice(None)).indices(len(x))
    with torch.autocast(x.device.type, enabled=False):
        if keep is not None:  # also an infinity in a row that does not count must reach nothing
            x = torch.where(keep[:, None], x, 0.0)
        if distance == "cosine":
            x = _unit_rows(x)
        elif len(x):
            # distances are translation invariant: centring removes cancellation, and the gradient of the mean is 0
            x = x - (x.detach().mean(0) if keep is None else x.detach().sum(0) / keep.sum().clamp(min=1))
        losses, valid = _AnchorLosses.apply(x, beta, classes, keep, (start, stop), distance == "cosine", chunk_size)
    return losses, valid


def chance_level(labels: Tensor, *, ignore_index: int | None = None) -> Tensor:
    r"""Return the loss of features that say nothing of the classes, the limit of infinite temperature.

    .. math:: \frac{1}{M} \sum_i \log \frac{B - 1}{n_{y_i} - 1}

    Shapes:
        labels `(B,)`; returns a scalar in float64.

    Args:
        labels: class of each sample.
        ignore_index: label of samples to leave out.

    Raises:
        InvalidArgument: for soft or multi-label targets.

    Example:
        >>> import torch
        >>> print(f"{chance_level(torch.arange(12) % 3):.6f}")
        1.299283
    """
    return anchors_and_chance(class_labels(labels), ignore_index)[1]


def anchors_and_chance(classes: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Return how many samples have another one of their class, and the chance level of the batch.

    Shapes:
        classes `(B,)`, integers; returns an integer and a float64 scalar, without waiting for the device.
    """
    ordered = classes.sort().values
    # how many bear the class of each sample
    counts = torch.searchsorted(ordered, classes, right=True) - torch.searchsorted(ordered, classes)
    kept = torch.ones_like(classes, dtype=torch.bool) if ignore_index is None else classes != ignore_index
    valid = kept & (counts > 1)
    levels = torch.log((kept.sum() - 1).double() / (counts - 1))
    anchors = valid.sum()
    return anchors, torch.where(valid, levels, 0.0).sum() / anchors.clamp(min=1)


def class_entanglement(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    distance: Distance = "sqeuclidean",
    num_classes: int | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Return which classes are entangled: the share of class `b` among the soft neighbours of samples of class `a`.

    .. math:: E_{ab} = \frac{1}{n_a} \sum_{i: y_i = a} \sum_{k \ne i,\, y_k = b}
        \frac{e^{-D_{ik}/T}}{\sum_{m \ne i} e^{-D_{im}/T}}

    Shapes:
        features `(B, ...)`, labels `(B,)` with values from 0; returns `(C, C)` in float64. Rows of classes that are
        present sum to 1, rows of absent classes are 0.

    Args:
        features: one row per sample.
        labels: class of each sample.
        temperature: positive number.
        distance: squared Euclidean or `1 - cos`.
        num_classes: `C`; the largest label plus 1 if not given.
        ignore_index: label of samples to leave out.

    Raises:
        InvalidArgument: for a temperature that is not positive, or labels outside `[0, C)`.
        ShapeMismatch: if features and labels do not fit together.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> class_entanglement(x, torch.tensor([0, 0, 1, 1]), 1.0).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    x, classes, keep = prepared(features, labels, distance, ignore_index)
    if keep is not None:
        x, classes = x[keep], classes[keep]
    if num_classes is None:
        num_classes = int(classes.max()) + 1 if len(classes) else 0
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) < num_classes):
        raise InvalidArgument(
            f"The labels go from {int(classes.min())} to {int(classes.max())}; 0 to {num_classes - 1} is needed for "
            f"num_classes={num_classes}. Mark samples to leave out with ignore_index."
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        beta = _inverse_temperature(temperature, x)
        if len(x) < 2:
            return x.new_zeros(num_classes, num_classes, dtype=torch.float64)
        member = torch.nn.functional.one_hot(classes, num_classes).to(torch.float64)
        scores = (-beta * pair_distances(x, distance)).fill_diagonal_(-math.inf)
        mass = scores.softmax(1).double() @ member
        return (member.T @ mass) / member.sum(0).clamp(min=1)[:, None]


def class_labels(labels: Tensor) -> Tensor:
    """Return labels as one integer per sample.

    Shapes:
        `(B,)`, `(B, 1)` or one-hot `(B, C)`; returns `(B,)`, int64.

    Raises:
        InvalidArgument: for soft labels (mixup, smoothing), several labels per sample, or fractions.
        ShapeMismatch: for other shapes.
    """
    if not isinstance(labels, Tensor):
        raise InvalidArgument(f"The labels are a {type(labels).__name__}; a tensor of one class per sample is needed.")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1]:
        hard = ((labels == 0) | (labels == 1)).all() & (labels.sum(1) == 1).all()
        if not hard:
            raise InvalidArgument(
                "The targets are soft or hold several labels per sample; one class per sample is needed. Give the "
                "labels from before mixup, cutmix or smoothing, for instance with labels=."
            )
        return labels.to(torch.uint8).argmax(1)
    if labels.ndim != 1:
        raise ShapeMismatch(
            f"The labels have the shape {tuple(labels.shape)}; (B,), (B, 1) or one-hot (B, C) is needed."
        )
    if labels.is_floating_point():
        if not ((labels == labels.round()) & labels.isfinite()).all():
            raise InvalidArgument(
                "The labels are fractions or not finite; one class per sample is needed (a regression target?)."
            )
        return labels.long()
    if labels.is_complex():
        raise InvalidArgument("The labels are complex numbers; one class per sample is needed.")
    return labels.long()


# -- the loss and its gradient -----------------------------------------------------------------------------------------


class _AnchorLosses(torch.autograd.Function):
    r"""Loss of each anchor, with the gradient in closed form.

    With the scores `s_ik = -beta D_ik` up to a constant per row, `p` their softmax over `k != i` and `q` over the
    positives, `dl_i/ds_ik = p_ik - q_ik =: G_ik`, whose rows sum to 0. Forward is one matrix product, backward one more
    for `W = G + G^T`, and only `G` is kept. In chunks `G` is not: the forward pass turns each of its blocks into its
    part of the gradient of the sum of all losses, and only where the backward pass wants another combination of them
    than a multiple of the sum is it computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor,
        classes: Tensor,
        keep: Tensor | None,
        bounds: tuple[int, int],
        cosine: bool,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        start, stop = bounds
        need_x, need_beta = ctx.needs_input_grad[:2]
        stored = need_x and chunk_size is None
        losses, valid = x.new_empty(stop - start), torch.empty(stop - start, dtype=torch.bool, device=x.device)
        slopes = x.new_empty(stop - start) if need_beta else None
        gradient = x.new_empty(stop - start, len(x)) if stored else None
        of_sum = torch.zeros_like(x) if need_x and not stored else None
        for a, b in _blocks(x, start, stop, chunk_size):
            own = slice(a - start, b - start)
            block = _Block(x, beta, classes, keep, (a, b), cosine)
            losses[own], valid[own] = block.losses, block.valid
            if slopes is not None:
                slopes[own] = block.slopes(beta)
            if gradient is not None:
                block.score_gradient(out=gradient[own])
            if of_sum is not None:
                of_sum += _pulled_back(block.score_gradient(out=block.p), None, x, (a, b), cosine)
        ctx.save_for_backward(x, beta, classes, keep, gradient, of_sum, slopes)
        ctx.settings = (bounds, cosine, chunk_size)
        ctx.mark_non_differentiable(valid)
        return losses, valid

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, classes, keep, gradient, of_sum, slopes = ctx.saved_tensors
        bounds, cosine, chunk_size = ctx.settings
        need_x, need_beta = ctx.needs_input_grad[:2]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody differentiates twice
                inputs = [v for v, needed in ((x, need_x), (beta, need_beta)) if needed]
                losses = _plain_losses(x, beta, classes, keep, bounds, cosine)
                grads = list(torch.autograd.grad(losses, inputs, upstream, create_graph=True))
                return grads.pop(0) if need_x else None, grads.pop(0) if need_beta else None, *[None] * 5
            grad_beta = (upstream * slopes).sum() if need_beta else None
            factor = beta if cosine else 2 * beta
            if not need_x:
                grad_x = None
            elif gradient is not None:
                grad_x = _pulled_back(gradient, upstream, x, bounds, cosine).mul_(factor)
            elif len(upstream) and upstream.stride(0) == 0:  # one number, expanded: what a sum or a mean sends back
                grad_x = of_sum * (factor * upstream[0])
            else:
                grad_x = torch.zeros_like(x)
                for a, b in _blocks(x, bounds[0], bounds[1], chunk_size):
                    block = _Block(x, beta, classes, keep, (a, b), cosine)
                    own = slice(a - bounds[0], b - bounds[0])
                    grad_x += _pulled_back(block.score_gradient(out=block.p), upstream[own], x, (a, b), cosine)
                grad_x.mul_(factor)
        return grad_x, grad_beta, *[None] * 5


class _Block:
    """The scores of the anchors `a` to `b` against all samples, and what follows from them."""

    def __init__(
        self,
        x: Tensor,
        beta: Tensor,
        classes: Tensor,
        keep: Tensor | None,
        bounds: tuple[int, int],
        cosine: bool,
    ) -> None:
        a, b = bounds
        scores = _scores(x, beta, bounds, cosine)
        scores.diagonal(a).fill_(-math.inf)
        different = torch.ne(classes[a:b, None], classes, out=x.new_empty(b - a, len(x)))
        if keep is not None:
            scores.masked_fill_(~keep, -math.inf)
            different.masked_fill_(~(keep[a:b, None] & keep), 1.0)
        self.valid = len(x) - different.sum(1) > 1  # each anchor is among its own class
        self.scores = scores
        # a finite push out of the positives: a row without any stays free of NaN, and softmax is exact all the same
        positive = torch.add(scores, different, alpha=-torch.finfo(x.dtype).max / 2)
        self.p, self.q = scores.softmax(1), positive.softmax(1)
        losses = log_sum_exp(scores, self.p) - log_sum_exp(positive, self.q)
        self.losses = torch.where(self.valid, losses, 0.0)

    def score_gradient(self, out: Tensor | None = None) -> Tensor:
        """Return `G = p - q`, 0 for anchors that do not count."""
        return torch.sub(self.p, self.q, out=out).masked_fill_(~self.valid[:, None], 0.0)

    def slopes(self, beta: Tensor) -> Tensor:
        """Return the derivative of each loss by the inverse temperature, `E_q[D] - E_p[D]`."""
        seen = self.scores.masked_fill(self.scores == -math.inf, 0.0)
        # at an infinite temperature all scores are 0, and so is the derivative by the temperature
        return (self.score_gradient() * seen).sum(1) / beta.clamp(min=torch.finfo(beta.dtype).tiny)


def log_sum_exp(scores: Tensor, softmax: Tensor) -> Tensor:
    """Return `log sum exp` of each row from its softmax: exact where sums underflow, without another exponential."""
    return scores.amax(-1) - softmax.amax(-1).log()


def _scores(x: Tensor, beta: Tensor, bounds: tuple[int, int], cosine: bool) -> Tensor:
    """Return `-beta D` for the anchors, up to a constant in each row, which the loss does not see."""
    a, b = bounds
    if cosine:
        return (x[a:b] * beta) @ x.T
    return torch.addmm(torch.linalg.vecdot(x, x) * -beta, x[a:b] * (2 * beta), x.T)


def _pulled_back(gradient: Tensor, upstream: Tensor | None, x: Tensor, bounds: tuple[int, int], cosine: bool) -> Tensor:
    """Return the gradient for `x`, but for its factor, from that for the scores; `upstream` of `None` is all ones."""
    a, b = bounds
    weighted = gradient if upstream is None else gradient * upstream[:, None]
    lengths = weighted.sum(0)
    if b - a == len(x):
        # copying a transposed matrix is tuned, adding one is not
        grad_x = torch.empty_like(weighted).copy_(weighted.T).add_(weighted) @ x
    else:
        grad_x = weighted.T @ x[a:b]
        grad_x[a:b] += weighted @ x
    return grad_x if cosine else grad_x.sub_(lengths[:, None] * x)


def _plain_losses(
    x: Tensor, beta: Tensor, classes: Tensor, keep: Tensor | None, bounds: tuple[int, int], cosine: bool
) -> Tensor:
    """The same losses in operations that can be differentiated any number of times."""
    a, b = bounds
    itself = torch.zeros(b - a, len(x), dtype=torch.bool, device=x.device)
    itself.diagonal(a).fill_(True)
    same = classes[a:b, None] == classes[None]
    out = itself
    if keep is not None:
        out = out | ~keep
        same = same & keep[a:b, None]
    positive = same & ~out
    valid = positive.any(1)
    # rows without a positive get a constant score, so that no infinity reaches the derivative
    scores = torch.where(valid[:, None], _scores(x, beta, bounds, cosine), 0.0)
    everything = scores.masked_fill(out & valid[:, None], -math.inf).logsumexp(1)
    own = scores.masked_fill(~positive & valid[:, None], -math.inf).logsumexp(1)
    return torch.where(valid, everything - own, 0.0)


def _blocks(x: Tensor, start: int, stop: int, chunk_size: int | None) -> list[tuple[int, int]]:
    size = chunk_size or (max(16, CACHED_ELEMENTS // max(len(x), 1)) if x.device.type == "cpu" else stop - start)
    return [(a, min(a + size, stop)) for a in range(start, stop, max(size, 1))]


# -- preparation -------------------------------------------------------------------------------------------------------


def prepared(
    features: Tensor, labels: Tensor, distance: str, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return features `(B, D)` in float32 or float64, classes `(B,)` and which samples count (`None`: all)."""
    check_choice("distance", distance, ("sqeuclidean", "cosine"))
    x, classes = feature_rows(features), class_labels(labels).to(features.device)
    if len(x) != len(classes):
        raise ShapeMismatch(
            f"There are {len(x)} rows of features {tuple(features.shape)} and {len(classes)} labels "
            f"{tuple(labels.shape)}; one label per row is needed."
        )
    if ignore_index is None:
        return x, classes, None
    return x, classes, classes != ignore_index


def feature_rows(features: Tensor) -> Tensor:
    """Return features as rows `(B, D)` in float32 or float64."""
    if features.ndim < 2 or features.is_complex():
        raise ShapeMismatch(
            f"The features have the shape {tuple(features.shape)} and are {features.dtype}; real numbers (B, D) with "
            f"one row per sample are needed, or (B, ...) to be flattened."
        )
    return features.flatten(1).to(torch.float64 if features.dtype == torch.float64 else torch.float32)


def _inverse_temperature(temperature: float | Tensor, x: Tensor) -> Tensor:
    refuse_non_positive("temperature", temperature, "median_temperature(features) gives one that fits the distances.")
    value = torch.as_tensor(temperature, dtype=x.dtype, device=x.device)
    return 1 / value.reshape(())


def refuse_non_positive(name: str, value: float | Tensor, remedy: str) -> None:
    """Raise a typed error unless `value` is one positive number; a value on a device is not waited for."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ShapeMismatch(f"{name} has the shape {tuple(value.shape)}; one number is needed. {remedy}")
        if value.device.type != "cpu":  # a value on a device is not waited for
            return
        value = value.detach().item()
    if isinstance(value, str) or not value > 0:
        raise InvalidArgument(f"{name}={value!r}: a positive number is needed. {remedy}")


def _unit_rows(x: Tensor) -> Tensor:
    """Return rows of length 1; a row of zeros stays, which puts it at cosine distance 1 from everything."""
    tiny = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) < 1e-12
    # the second derivative of a length is infinite at 0, and 0 times it is not a number
    return torch.where(tiny, 0.0, x / torch.linalg.vector_norm(torch.where(tiny, 1.0, x), dim=1, keepdim=True))


def pair_distances(x: Tensor, distance: str) -> Tensor:
    """Return the distances between all rows, `(B, B)`."""
    if distance == "cosine":
        unit = _unit_rows(x)
        return (1 - unit @ unit.T).clamp_(min=0).fill_diagonal_(0)
    x = x - x.mean(0) if len(x) else x
    lengths = torch.linalg.vecdot(x, x)
    return torch.addmm(lengths[:, None] + lengths, x, x.T, alpha=-2).clamp_(min=0).fill_diagonal_(0)
