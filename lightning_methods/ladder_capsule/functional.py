"""The maths of capsules: squashing, pruning, the ladder, dynamic routing and the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

LossName = Literal["paper", "code"]
Regulariser = Literal["l2", "l1_mean"]
_EPS = 1e-8  # of the official code


class LossConstants(NamedTuple):
    """Constants of the margin loss, and how the code vector is regularised."""

    m_plus: float
    m_minus: float
    lam: float
    reg: Regulariser


# the text of the paper, and its code: e^2 for the true class, max(0, 0.8 - e)^2 for the others, written with 1 - e
PRESETS: dict[str, LossConstants] = {
    "paper": LossConstants(0.9, 0.1, 0.5, "l2"),
    "code": LossConstants(1.0, 0.2, 1.0, "l1_mean"),
}


def wide(x: Tensor) -> Tensor:
    """Return half precision as float32: squares and norms are taken there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def safe_norm(x: Tensor, dim: int = -1, *, keepdim: bool = False, eps: float = _EPS) -> Tensor:
    r"""Return :math:`\sqrt{\lVert x \rVert^2 + \epsilon^2}`, whose gradient at 0 is 0 instead of NaN.

    Squares that are too large for the floating-point type do not overflow.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> safe_norm(x).backward()
        >>> x.grad
        tensor([0., 0.])
    """
    with torch.autocast(x.device.type, enabled=False):
        _, norm, scale = _scaled(wide(x), dim, eps)
        return norm * scale if keepdim else (norm * scale).squeeze(dim)


def _scaled(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors divided by their largest component, where that is above 1, their norms, and the divisor."""
    scale = x.detach().abs().amax(dim, keepdim=True).clamp(min=1)
    x = x / scale
    return x, (x.square().sum(dim, keepdim=True) + (eps / scale).square()).sqrt(), scale


def squash(s: Tensor, dim: int = -1, *, eps: float = _EPS) -> Tensor:
    r"""Shrink vectors to a length below 1 and keep their direction (Sabour et al. 2017, equation 1).

    .. math:: \mathrm{squash}(s) = \frac{\lVert s \rVert^2}{1 + \lVert s \rVert^2}
        \frac{s}{\lVert s \rVert + \epsilon}

    Value and gradient are finite everywhere, also at 0. Computed in float32 or better, whatever autocast says.

    Shapes:
        any shape; the result has the same.

    Args:
        s: vectors.
        dim: along which a vector lies.
        eps: of the division, 1e-8 in the official code.

    Example:
        >>> squash(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0.0000, 0.0000],
                [0.5769, 0.7692]])
    """
    with torch.autocast(s.device.type, enabled=False):
        s, norm, scale = _scaled(wide(s), dim, eps)
        return _share(norm * scale) * (s / (norm + eps / scale))


def activities(capsules: Tensor) -> Tensor:
    r"""Return :math:`A = \lVert u \rVert^2 / (1 + \lVert u \rVert^2)`, the length of the squashed capsule.

    Shapes:
        `(B, N, d)` -> `(B, N)`.

    Example:
        >>> activities(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
        tensor([[0.9615, 0.0000]])
    """
    with torch.autocast(capsules.device.type, enabled=False):
        # exactly 0 for a capsule that is 0, which the norm with its epsilon is not
        return _share(safe_norm(capsules) * (capsules != 0).any(-1))


def _share(norm: Tensor) -> Tensor:
    # beyond 1e9 the quotient is 1 in every floating-point type, and the square could overflow
    square = norm.clamp(max=1e9).square()
    return square / (1 + square)


def capsules_of(features: Tensor, dim: int) -> Tensor:
    """Return feature maps as capsules: `dim` neighbouring channels of one position each, in the order (y, x, type).

    Shapes:
        `(B, types * dim, H, W)` -> `(B, H * W * types, dim)`.

    Raises:
        ShapeMismatch: if the channels cannot be divided into capsules.

    Example:
        >>> capsules_of(torch.zeros(2, 32, 6, 6), 8).shape
        torch.Size([2, 144, 8])
    """
    if features.ndim != 4 or features.shape[1] % dim:
        raise ShapeMismatch(
            f"Feature maps {tuple(features.shape)} cannot be divided into capsules of {dim} dimensions. A shape "
            f"(B, types * {dim}, H, W) is needed: change the number of channels, or the dimension of a capsule."
        )
    batch, channels, height, width = features.shape
    # channels last first: a plain view of NCHW would take neighbouring pixels of one channel for a capsule
    return features.permute(0, 2, 3, 1).reshape(batch, height * width * channels // dim, dim)


def top_capsules(activity: Tensor, k: int) -> Tensor:
    """Return the positions of the k most active capsules, ascending; of equal ones those at the lowest positions.

    Shapes:
        `(B, N)` -> `(B, k)` int64.

    Args:
        activity: finite activities.
        k: how many, from 1 to N.

    Raises:
        InvalidArgument: if there are fewer than k capsules.

    Example:
        >>> top_capsules(torch.tensor([[0.2, 0.9, 0.2, 0.5]]), 3)
        tensor([[0, 1, 3]])
    """
    if not 1 <= k <= activity.shape[-1]:
        raise InvalidArgument(
            f"k={k} of {activity.shape[-1]} capsules cannot be kept. A k from 1 to {activity.shape[-1]} is needed."
        )
    # torch.topk breaks ties differently on every device; a stable sort does not
    order = activity.detach().argsort(dim=-1, descending=True, stable=True)
    return order[..., :k].sort(dim=-1).values


def code_vector(indices: Tensor, num_caps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return which capsules are present, as ones and zeros.

    Shapes:
        `(B, k)` positions -> `(B, N)`.

    Example:
        >>> code_vector(torch.tensor([[0, 3]]), 4)
        tensor([[1., 0., 0., 1.]])
    """
    return torch.zeros(*indices.shape[:-1], num_caps, dtype=dtype, device=indices.device).scatter(-1, indices, 1.0)


class Maps(Protocol):
    """Linear maps of every class and image, whether they are laid out or not."""

    @property
    def shape(self) -> torch.Size:
        """(C, B, k, d, D)."""

    def summed(self, votes: Tensor) -> Tensor:
        """Return the poses `(C, B, D)` of capsules `(C, B, k * d)`, summed over these."""

    def spread(self, poses: Tensor) -> Tensor:
        """Return the capsules `(C, B, k * d)` of poses `(C, B, D)`."""


class _LaidOut:
    """Maps `(C, B, k, d, D)` as they stand, multiplied in float32 or better."""

    def __init__(self, maps: Tensor) -> None:
        self.shape, self._matrices = maps.shape, wide(maps).flatten(2, 3)

    def summed(self, votes: Tensor) -> Tensor:
        with torch.autocast(votes.device.type, enabled=False):
            return (votes[:, :, None] @ self._matrices).squeeze(2)

    def spread(self, poses: Tensor) -> Tensor:
        with torch.autocast(poses.device.type, enabled=False):
            # a row times a transposed matrix, which takes a third of the time of a matrix times a column
            return (poses[:, :, None] @ self._matrices.mT).squeeze(2)


class Inference(NamedTuple):
    """What the ladder finds: errors `(B, C)`, poses `(B, C, D)`, reconstructions `(B, C, k, d)`."""

    errors: Tensor
    poses: Tensor
    reconstruction: Tensor


def ladder_inference(
    active: Tensor, forward_maps: Tensor | Maps, inverse_maps: Tensor | Maps, coupling: Tensor
) -> Inference:
    r"""Infer the pose of every class from the selected capsules, and the capsules from the pose.

    .. math::
        D_j = \sum_{i \in S} c_{ji} W_{ji}^\top v_i, \quad d_j = \frac{D_j}{\lVert D_j \rVert + \epsilon}, \quad
        \hat v_{ji} = \mathrm{squash}(W^{inv}_{ji} d_j), \quad
        e_j = \frac{1}{k} \sum_{i \in S} \lVert v_i - \hat v_{ji} \rVert

    The length of the pose carries nothing of the class: :math:`1 - e_j` does. Norms are computed in float32 or better.

    Shapes:
        active `(B, k, d)`, both maps `(C, B, k, d, D)`, coupling `(C, B, k)`.

    Raises:
        ShapeMismatch: if these do not fit together.

    Example:
        >>> v, w, c = torch.ones(1, 2, 3), torch.ones(4, 1, 2, 3, 5), torch.ones(4, 1, 2)
        >>> [tuple(x.shape) for x in ladder_inference(v, w, w, c)]
        [(1, 4), (1, 4, 5), (1, 4, 2, 3)]
    """
    shape = forward_maps.shape
    if len(shape) != 5 or active.shape != shape[1:4] or inverse_maps.shape != shape or coupling.shape != shape[:3]:
        raise ShapeMismatch(
            f"active {tuple(active.shape)}, forward_maps {tuple(shape)}, inverse_maps {tuple(inverse_maps.shape)} and "
            f"coupling {tuple(coupling.shape)} do not fit together: (B, k, d), twice (C, B, k, d, D) and (C, B, k) are "
            "needed."
        )
    down, up = (_LaidOut(x) if isinstance(x, Tensor) else x for x in (forward_maps, inverse_maps))
    active, coupling = wide(active), wide(coupling)
    summed = wide(down.summed((coupling[..., None] * active).flatten(2)))
    poses = summed / (safe_norm(summed, keepdim=True) + _EPS)
    reconstruction = squash(up.spread(poses).unflatten(2, shape[2:4]))
    errors = safe_norm(active - reconstruction).mean(-1)
    return Inference(errors.transpose(0, 1), poses.transpose(0, 1), reconstruction.transpose(0, 1))


def dynamic_routing(votes: Tensor, iters: int = 3, *, detach: bool = True) -> Tensor:
    r"""Return the poses of the classes by routing-by-agreement (Sabour et al. 2017, procedure 1).

    .. math::
        c_{ij} = \mathrm{softmax}_j\, b_{ij}, \quad v_j = \mathrm{squash}\Big(\sum_i c_{ij} \hat u_{j|i}\Big), \quad
        b_{ij} \leftarrow b_{ij} + \hat u_{j|i} \cdot v_j

    Shapes:
        votes `(B, C, N, D)` -> `(B, C, D)`.

    Args:
        votes: what each capsule predicts of each class.
        iters: how often the coefficients are computed, 3 in the paper.
        detach: whether gradients flow through the last iteration alone, as in most implementations. `False` takes the
            gradient of all of them, as the authors' code.

    Raises:
        InvalidArgument: for fewer than one iteration.
        ShapeMismatch: if votes are not four-dimensional.

    Example:
        >>> dynamic_routing(torch.ones(1, 2, 3, 4)).shape
        torch.Size([1, 2, 4])
    """
    if votes.ndim != 4:
        raise ShapeMismatch(f"votes have the shape {tuple(votes.shape)}; (B, C, N, D) is needed.")
    with torch.autocast(votes.device.type, enabled=False):
        votes = wide(votes).contiguous()  # once, not in every product
        start = torch.zeros(votes.shape[:3], dtype=votes.dtype, device=votes.device)

        def summed(shares: Tensor, *, last: bool) -> Tensor:
            used = votes if last or not detach else votes.detach()
            return (shares[:, :, None] @ used).squeeze(2)

        def agreement(poses: Tensor) -> Tensor:
            used = votes.detach() if detach else votes
            return (poses[:, :, None] @ used.transpose(2, 3)).squeeze(2)

        return route(start, summed, agreement, iters, dim=1)


def route(
    logits: Tensor,
    summed: Callable[..., Tensor],
    agreement: Callable[[Tensor], Tensor],
    iters: int,
    *,
    dim: int,
) -> Tensor:
    """Return the squashed poses after `iters` iterations, for votes in any form.

    Args:
        logits: the first ones, 0 in the paper.
        summed: from shares shaped like these, and whether it is the `last` iteration, to the sum of the votes.
        agreement: from poses to what they add to the logits.
        iters: iterations, at least one.
        dim: along which the classes lie in the logits.

    Raises:
        InvalidArgument: for fewer than one iteration.

    Example:
        >>> votes = torch.ones(2, 3)  # of three capsules for two classes of one dimension
        >>> route(torch.zeros(2, 3), lambda c, last: (c * votes).sum(1, keepdim=True), lambda v: v * votes, 3, dim=0)
        tensor([[0.6923],
                [0.6923]])
    """
    if not isinstance(iters, int) or iters < 1:
        raise InvalidArgument(f"iters={iters!r}: a whole number of at least one iteration is needed.")
    for _ in range(iters - 1):
        logits = logits + agreement(squash(summed(logits.softmax(dim), last=False)))
    return squash(summed(logits.softmax(dim), last=True))


def class_targets(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return targets as one row of shares from 0 to 1 a sample.

    Shapes:
        class indices `(B,)`, or shares `(B, C)` (one-hot, several classes a sample, soft labels) -> `(B, C)`.

    Raises:
        InvalidArgument: if a class or a share is out of range, or classes are not whole numbers.
        ShapeMismatch: for other shapes.

    Example:
        >>> class_targets(torch.tensor([1]), 3)
        tensor([[0., 1., 0.]])
    """
    if not isinstance(target, Tensor):
        raise InvalidArgument(f"The targets are {type(target).__name__}. A tensor is needed: torch.as_tensor(targets).")
    if target.ndim == 1:
        if target.is_floating_point():
            raise InvalidArgument(f"The classes are {target.dtype}. Whole numbers (B,) or shares (B, C) are needed.")
        # a graph break otherwise; one_hot by comparison would make an unknown class no class at all
        if not torch.compiler.is_compiling() and not bool(((target >= 0) & (target < num_classes)).all()):
            raise InvalidArgument(
                f"A class from {int(target.min())} to {int(target.max())} is out of range. There are {num_classes} "
                f"classes, 0 to {num_classes - 1}; is num_classes right?"
            )
        return (target[:, None] == torch.arange(num_classes, device=target.device)).to(dtype)
    if target.ndim != 2 or target.shape[1] != num_classes:
        raise ShapeMismatch(
            f"The targets have the shape {tuple(target.shape)}. Classes (B,) or shares (B, {num_classes}) are needed."
        )
    if not torch.compiler.is_compiling() and not bool(((target >= 0) & (target <= 1)).all()):
        raise InvalidArgument("The targets (B, C) hold values outside of 0 to 1. Shares of classes are needed.")
    return target.to(dtype)


def margin_loss(
    activity: Tensor, target: Tensor, *, m_plus: float = 0.9, m_minus: float = 0.1, lam: float = 0.5
) -> Tensor:
    r"""Return the margin loss (Sabour et al. 2017, equation 4), summed over the classes, mean over the batch.

    .. math::
        \sum_j Y_j \max(0, m^+ - a_j)^2 + \lambda (1 - Y_j) \max(0, a_j - m^-)^2

    Shapes:
        activity `(B, C)`; target `(B,)` classes or `(B, C)` shares -> a scalar.

    Args:
        activity: of each class: the length of its capsule, or 1 minus its error.
        target: the classes.
        m_plus: activity from which the true class costs nothing, 0.9 in the paper.
        m_minus: activity up to which another class costs nothing, 0.1 in the paper.
        lam: weight of the other classes, 0.5 in the paper.

    Raises:
        InvalidArgument: if a class is out of range.
        ShapeMismatch: if activity and target do not fit together, or there is no sample.

    Example:
        >>> margin_loss(torch.tensor([[0.8, 0.3]]), torch.tensor([0]))
        tensor(0.0300)
    """
    if activity.ndim != 2 or len(activity) != len(target):
        raise ShapeMismatch(
            f"activity {tuple(activity.shape)} and target {tuple(target.shape)} do not fit together: (B, C), and (B,) "
            "or (B, C), are needed."
        )
    if not len(activity):
        raise ShapeMismatch("The batch is empty: the mean over no sample is no number.")
    with torch.autocast(activity.device.type, enabled=False):
        activity = wide(activity)
        true = class_targets(target, activity.shape[1], activity.dtype)
        present, absent = F.relu(m_plus - activity).square(), F.relu(activity - m_minus).square()
        return (true * present + lam * (1 - true) * absent).sum(1).mean()


def code_regulariser(code: Tensor, activity: Tensor, kind: Regulariser = "l2") -> Tensor:
    r"""Return how far the activities of the capsules are from the code vector, which is constant.

    .. math:: \mathrm{l2}: \; \frac1B \sum_b \sum_i (c_{bi} - A_{bi})^2, \qquad
        \mathrm{l1\_mean}: \; \frac1{BN} \sum_{b,i} |c_{bi} - A_{bi}|

    Shapes:
        both `(B, N)` -> a scalar.

    Raises:
        ShapeMismatch: if the shapes differ.
        InvalidArgument: for an unknown kind.

    Example:
        >>> code_regulariser(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.5000)
    """
    check_choice("reg", kind, ("l2", "l1_mean"))
    if code.shape != activity.shape or code.ndim != 2:
        raise ShapeMismatch(f"code {tuple(code.shape)} and activity {tuple(activity.shape)}: (B, N) each is needed.")
    with torch.autocast(activity.device.type, enabled=False):
        difference = code.detach().to(wide(activity).dtype) - wide(activity)
        return difference.square().sum(1).mean() if kind == "l2" else difference.abs().mean()


def ladder_loss(
    errors: Tensor,
    target: Tensor,
    code: Tensor | None = None,
    activity: Tensor | None = None,
    *,
    loss: LossName = "paper",
    m_plus: float | None = None,
    m_minus: float | None = None,
    lam: float | None = None,
    reg_weight: float = 1e-4,
    reg: Regulariser | None = None,
) -> Tensor:
    r"""Return the loss of the ladder network: the margin loss of :math:`a_j = 1 - e_j`, and that of the code vector.

    Paper and official code disagree: the text has :math:`m^+ = 0.9, m^- = 0.1, \lambda = 0.5` and
    :math:`\lVert c - A \rVert^2`, the code :math:`Y e^2 + (1 - Y) \max(0, 0.8 - e)^2`, which is
    :math:`m^+ = 1, m^- = 0.2, \lambda = 1`, and the mean of :math:`|c - A|`.

    Shapes:
        errors `(B, C)`; target `(B,)` or `(B, C)`; code and activity `(B, N)` -> a scalar.

    Args:
        errors: reconstruction error of each class.
        target: the classes.
        code: which capsules are present; left out, there is no regulariser.
        activity: of the capsules.
        loss: `"paper"` or `"code"`, which fixes the constants that are not given.
        m_plus, m_minus, lam: as in `margin_loss`.
        reg_weight: weight of the regulariser, 1e-4 in the code.
        reg: `"l2"` (the paper's) or `"l1_mean"` (the code's).

    Raises:
        InvalidArgument: if a class is out of range, a name is unknown, or one of code and activity is missing.
        ShapeMismatch: if tensors do not fit together.

    Example:
        >>> ladder_loss(torch.tensor([[0.2, 0.5]]), torch.tensor([0]), loss="code")
        tensor(0.1300)
    """
    check_choice("loss", loss, PRESETS)
    preset = PRESETS[loss]
    if (code is None) != (activity is None):
        raise InvalidArgument("Only one of code and activity is given; both are needed for the regulariser, or none.")
    data = margin_loss(
        1 - wide(errors),
        target,
        m_plus=preset.m_plus if m_plus is None else m_plus,
        m_minus=preset.m_minus if m_minus is None else m_minus,
        lam=preset.lam if lam is None else lam,
    )
    if code is None or activity is None:
        return data
    return data + reg_weight * code_regulariser(code, activity, reg or preset.reg)


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the squared error of an image, summed over its pixels, mean over the batch.

    Shapes:
        both `(B, ...)` with as many values -> a scalar.

    Raises:
        ShapeMismatch: if they do not hold as many values.

    Example:
        >>> reconstruction_loss(torch.zeros(2, 4), torch.ones(2, 1, 2, 2))
        tensor(4.)
    """
    if len(reconstruction) != len(images) or reconstruction[:1].numel() != images[:1].numel():
        raise ShapeMismatch(
            f"A reconstruction {tuple(reconstruction.shape)} of images {tuple(images.shape)}: as many values are "
            "needed."
        )
    with torch.autocast(images.device.type, enabled=False):
        difference = wide(reconstruction).flatten(1) - wide(images).flatten(1)
        return difference.square().sum(1).mean()
