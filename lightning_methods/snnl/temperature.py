"""Temperatures of the soft nearest neighbour loss: the best one, the median distance, and the paper's steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_methods.errors import check_choice
from lightning_methods.snnl.functional import (
    CACHED_ELEMENTS,
    Distance,
    anchor_losses,
    feature_rows,
    log_sum_exp,
    pair_distances,
    prepared,
    refuse_non_positive,
)


def optimal_temperature(
    features: Tensor, labels: Tensor, *, distance: Distance = "sqeuclidean", ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the temperature at which the loss is smallest, and that loss: a value free of the features' scale.

    .. math:: l'_{sn}(x, y) = \min_{T} l_{sn}(x, y, T) \qquad \text{(equation 2)}

    The inverse temperature is searched on a grid of nine decades around the median distance, then refined by Newton's
    method inside the best bracket; the loss is not unimodal. It is never above the chance level, which is the value at
    infinite temperature (returned as `inf` where nothing is better). The distances of all pairs are held several times
    over: of very large batches give a part.

    Shapes:
        features `(B, ...)`, labels `(B,)`; returns two scalars without gradient.

    Args:
        features: one row per sample.
        labels: class of each sample.
        distance: squared Euclidean or `1 - cos`.
        ignore_index: label of samples to leave out.

    Raises:
        InvalidArgument: for soft or multi-label targets.
        ShapeMismatch: if features and labels do not fit together.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
        >>> temperature, loss = optimal_temperature(x, torch.tensor([0, 0, 1, 1]))
        >>> bool(loss < 1e-6)
        True

    Deviations from the paper: the exact minimum instead of one gradient step, which can make the released code's
    temperature negative.
    """
    x, classes, keep = prepared(features, labels, distance, ignore_index)
    if keep is not None:
        x, classes = x[keep], classes[keep]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _TemperatureSearch(pair_distances(x, distance), *_masks(classes)).minimum()


def median_temperature(features: Tensor, *, distance: Distance = "sqeuclidean") -> Tensor:
    """Return the median distance between different samples, at which the loss is free of the features' scale.

    Its gradient is that of the mean distance, with which the median grows. Without it shrinking the features would look
    like entangling them, and a negative weight would do little else.

    Shapes:
        features `(B, ...)`; returns a scalar, 1 where all samples are the same.

    Args:
        features: one row per sample. Of more than 512 rows every so-manieth is used for the median.
        distance: squared Euclidean or `1 - cos`, which knows no scale and hence has no gradient here.

    Raises:
        ShapeMismatch: for features of less than two dimensions.

    Example:
        >>> import torch
        >>> float(median_temperature(torch.tensor([[0.0], [1.0], [3.0]])))
        4.0
    """
    check_choice("distance", distance, ("sqeuclidean", "cosine"))
    x = feature_rows(features)
    some = x.detach()[:: math.ceil(len(x) / 512)] if len(x) else x.detach()
    with torch.autocast(x.device.type, enabled=False):
        median = _median(pair_distances(some, distance))
        if distance == "cosine" or not x.requires_grad or not torch.is_grad_enabled():
            return median
        spread = (x - x.detach().mean(0)).square().sum(1).mean()
        # features that overflow must show in the loss, not stop the training with a temperature that is not a number
        spread = torch.where((spread > 0) & spread.isfinite(), spread, 1.0)
        return median * (spread / spread.detach())


def paper_temperature_step(
    features: Tensor,
    labels: Tensor,
    t: float | Tensor,
    *,
    initial_temperature: float = 100.0,
    learning_rate: float = 0.1,
    distance: Distance = "sqeuclidean",
    ignore_index: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return the next `t` of the released code, whose temperature is `T = initial_temperature / t`.

    One gradient step per batch, :math:`t \leftarrow t - 0.1\, \partial l_{sn}(x, y, T_0/t) / \partial t`, from `t = 1`.

    Shapes:
        features `(B, ...)`, labels `(B,)`; returns a scalar in float64 without gradient.

    Args:
        features: one row per sample.
        labels: class of each sample.
        t: the current value.
        initial_temperature: `T_0`, 100 in the paper.
        learning_rate: 0.1 in the released code.
        distance: squared Euclidean or `1 - cos`.
        ignore_index: label of samples to leave out.
        chunk_size: see `soft_nearest_neighbor_loss`.

    Raises:
        InvalidArgument: if `t` is not positive.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
        >>> bool(paper_temperature_step(x, torch.tensor([0, 0, 1, 1]), 1.0) > 1)
        True

    Deviations from the paper: `t` is kept within `[1e-6, 1e6]`. The released code lets it become negative on features
    of large scale, which turns the loss into its opposite.
    """
    refuse_non_positive("t", t, "The released code starts from 1.")
    x, classes, keep = prepared(features.detach(), labels, distance, ignore_index)
    scale = torch.as_tensor(t, dtype=x.dtype, device=x.device).detach().reshape(()).requires_grad_()
    with torch.enable_grad():
        losses, valid = anchor_losses(
            x, classes, initial_temperature / scale, distance=distance, keep=keep, chunk_size=chunk_size
        )
        (slope,) = torch.autograd.grad(losses.sum() / valid.sum().clamp(min=1), scale)
    # features that are not finite must not end up in the state
    step = torch.nan_to_num(learning_rate * slope.double(), nan=0.0, posinf=0.0, neginf=0.0)
    return (scale.detach().double() - step).clamp(1e-6, 1e6)


# -- the search for the temperature ------------------------------------------------------------------------------------


class _TemperatureSearch:
    """Minimise the loss over the inverse temperature, given all distances."""

    decades = (-6.0, 3.0)  # of beta times the median distance
    grid = 33
    newton_steps = 30

    def __init__(self, distances: Tensor, positive: Tensor, out: Tensor) -> None:
        valid = positive.any(1)
        self.rows = int(valid.sum())
        distances, positive, out = distances[valid], positive[valid], out[valid]
        self.scale = float(_median(distances)) if self.rows else 1.0
        self.tolerance = math.sqrt(torch.finfo(distances.dtype).eps)  # nearer, a minimum is flat to rounding
        self.distances, self.squares = distances, distances**2
        zeros = torch.zeros_like(distances)
        self.not_neighbour = zeros.masked_fill(out, -math.inf)
        self.not_positive = zeros.masked_fill(~positive, -math.inf)

    def minimum(self) -> tuple[Tensor, Tensor]:
        """Return temperature and loss at the minimum; chance and infinite temperature where nothing is better."""
        zero = self.distances.new_zeros(())
        infinite = zero + math.inf
        if not self.rows:
            return infinite, zero
        betas = torch.logspace(*self.decades, self.grid, dtype=torch.float64).tolist()
        betas = [0.0, *(beta / self.scale for beta in betas)]
        losses = self.losses(betas)
        best = min(range(1, len(betas)), key=losses.__getitem__)
        if not losses[best] < losses[0]:  # the chance level
            return infinite, zero + losses[0]
        beta, loss = self.refined(betas[max(best - 1, 1)], betas[best], betas[min(best + 1, self.grid)])
        if loss > losses[best]:
            beta, loss = betas[best], losses[best]
        return zero + 1 / beta, zero + loss

    def losses(self, betas: list[float]) -> list[float]:
        """Return the loss at many inverse temperatures, so many at a time as memory and cache want."""
        together = max(1, CACHED_ELEMENTS // 8 // max(self.distances.numel(), 1))
        steps = self.distances.new_tensor(betas).split(together)
        return torch.cat([self.loss(self.distances * -some[:, None, None])[0] for some in steps]).tolist()

    def refined(self, low: float, beta: float, high: float) -> tuple[float, float]:
        """Return the minimum between two grid points: Newton in log(beta), bisection where it leaves the bracket."""
        low, u, high = math.log(low), math.log(beta), math.log(high)
        loss = math.inf
        for _ in range(self.newton_steps):
            beta = math.exp(u)
            value, slope, curvature = self.moments(beta)
            loss = value
            first, second = beta * slope, beta * slope + beta * beta * curvature
            low, high = (u, high) if first < 0 else (low, u)
            step = u - first / second if second > 0 else math.inf
            new = step if low < step < high else (low + high) / 2
            if abs(new - u) < self.tolerance:
                break
            u = new
        return math.exp(u), loss

    def moments(self, beta: float) -> tuple[float, float, float]:
        """Return the loss and its first two derivatives by beta, from the moments of the distance under p and q."""
        loss, p, q = self.loss(self.distances * -beta)
        mean_p, mean_q = ((w * self.distances).sum(1) for w in (p, q))
        square_p, square_q = ((w * self.squares).sum(1) for w in (p, q))
        slope = (mean_q - mean_p).double().mean()
        curvature = ((square_p - mean_p**2) - (square_q - mean_q**2)).double().mean()
        value, first, second = torch.stack([loss, slope, curvature]).tolist()
        return value, first, second

    def loss(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of scores `(..., rows, B)` and the two softmaxes in it."""
        everything, own = scores + self.not_neighbour, scores + self.not_positive
        p, q = everything.softmax(-1), own.softmax(-1)
        return (log_sum_exp(everything, p) - log_sum_exp(own, q)).double().mean(-1), p, q


def _masks(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs are positives and which are no neighbours at all, both `(B, B)`."""
    out = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    return (classes[:, None] == classes) & ~out, out


def _median(distances: Tensor) -> Tensor:
    """Return the median of a matrix of distances without its zeros, 1 where there is nothing else."""
    # marked, not selected: how many there are would have to be waited for
    median = distances.masked_fill(distances <= 0, math.nan).nanmedian()
    return torch.where(median.isnan(), 1.0, median)
