"""The losses of LIT: knowledge distillation on logits, and regression of sections on the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

SectionLoss = Literal["mse", "l1", "smooth_l1"] | Callable[[Tensor, Tensor], Tensor]

_SECTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}
IGNORED = -100  # PyTorch's own mark of a target that does not count


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float = 0.95,
    temperature: float = 6.0,
    soft: Literal["ce", "kl"] = "ce",
) -> Tensor:
    r"""Return the knowledge distillation loss of the paper's code, the mean over the batch.

    .. math::
        L_{KD} = \alpha\, CE(z_S, y) + (1 - \alpha)\, \tau^2\,
            H\big(\mathrm{softmax}(z_T / \tau), \mathrm{softmax}(z_S / \tau)\big)

    `alpha` weights the *hard* term. With :math:`\tau = 6` the factor of the soft term is :math:`0.05 \cdot 36 = 1.8`.

    Shapes:
        logits `(B, C)` or `(B, C, ...)`; `target` `(B, ...)` int64, or probabilities of the shape of the logits.

    Args:
        student_logits: what is trained; computed in float32 or better.
        teacher_logits: no gradient flows into them.
        target: class indices, -100 where there is none, or probabilities; not needed at `alpha=0`.
        alpha: share of the hard term, from 0 to 1. The code of the paper has 0.95.
        temperature: positive. The code of the paper has 6.
        soft: the cross-entropy H (`"ce"`, as the code of the paper) or the divergence (`"kl"`): the gradient is the
            same, the value differs by the teacher's entropy.

    Raises:
        InvalidArgument: if a number is out of range, or `target` is missing at `alpha > 0`.
        ShapeMismatch: if the tensors do not fit together.

    Example:
        >>> student = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 3.0]])
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.0, 4.0]])
        >>> kd_loss(student, teacher, torch.tensor([0, 2]))
        tensor(2.6219)
    """
    check_distillation(alpha, temperature, soft)
    hard, softened = kd_terms(student_logits, teacher_logits, target, alpha=alpha, temperature=temperature, soft=soft)
    loss = (1 - alpha) * temperature**2 * softened
    return loss if hard is None else alpha * hard + loss


def kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    alpha: float,
    temperature: float,
    soft: Literal["ce", "kl"] = "ce",
) -> tuple[Tensor | None, Tensor]:
    """Return the hard and the soft term without their factors; no hard one at `alpha=0`.

    Shapes, arguments and errors are those of `kd_loss`.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> kd_terms(logits, logits, torch.tensor([0]), alpha=0.5, temperature=1.0)
        (tensor(0.6931), tensor(0.6931))
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim < 2:
        raise ShapeMismatch(
            f"The student's logits are {tuple(student_logits.shape)} and the teacher's {tuple(teacher_logits.shape)}; "
            f"the same shape (B, C) is needed. Where the classes differ, only sections can be distilled: beta=0."
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _precise(student_logits), _precise(teacher_logits).detach()
        if alpha > 0 and target is None:
            raise InvalidArgument(f"alpha={alpha} needs targets, and there are none. Give them, or set alpha=0.")
        hard = _hard(student, target) if alpha > 0 and target is not None else None
        wanted = (teacher / temperature).softmax(1)
        log_given = (student / temperature).log_softmax(1)
        # where the teacher gives nothing, log 0 of the student must not make NaN of it
        cross = (wanted * log_given.masked_fill(wanted == 0, 0)).sum(1)
        if soft == "kl":
            log_wanted = (teacher / temperature).log_softmax(1).masked_fill(wanted == 0, 0)
            cross = cross - (wanted * log_wanted).sum(1)
        return hard, -cross.mean()


def intermediate_loss(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    loss: SectionLoss = "mse",
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    r"""Return the sum of the sections' losses, and each of them without its weight.

    .. math:: L_{IR} = \sum_{i=1}^{k} w_i\, \ell\big(S_i(T_{i-1}(x)),\, T_i(x)\big)

    Shapes:
        the `i`-th output and the `i`-th target have the same shape, whatever it is.

    Args:
        outputs: what the student's sections give.
        targets: what the teacher's give; no gradient flows into them.
        loss: `"mse"` (the paper's: mean over all elements), `"l1"`, `"smooth_l1"`, or a function of both tensors.
        weights: one a section, default 1.

    Raises:
        InvalidArgument: if there is no section, or the numbers of sections differ.
        ShapeMismatch: if an output is not of the shape of its target.

    Example:
        >>> total, each = intermediate_loss([torch.zeros(2, 3), torch.ones(2)], [torch.ones(2, 3), torch.ones(2)])
        >>> total, [float(x) for x in each]
        (tensor(1.), [1.0, 0.0])
    """
    if not outputs or len(outputs) != len(targets) or (weights is not None and len(weights) != len(outputs)):
        counted = "" if weights is None else f" and {len(weights)} weights"
        raise InvalidArgument(
            f"{len(outputs)} outputs, {len(targets)} targets{counted}: the same number, at least one, is needed."
        )
    each = [section_loss(x, y, loss, name=str(i)) for i, (x, y) in enumerate(zip(outputs, targets, strict=True))]
    factors = [1.0] * len(each) if weights is None else list(weights)
    total = each[0] * factors[0]
    for value, factor in zip(each[1:], factors[1:], strict=True):
        total = total + factor * value
    return total, each


def section_loss(output: Tensor, target: Tensor, loss: SectionLoss = "mse", *, name: str = "") -> Tensor:
    """Return the loss of one section, in float32 or better.

    Args:
        output: what the student's section gives.
        target: what the teacher's gives, of the same shape; no gradient flows into it.
        loss: see `intermediate_loss`.
        name: of the section, for the message.

    Raises:
        ShapeMismatch: if the shapes differ, which broadcasting would hide.

    Example:
        >>> section_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0))
        tensor(4.)
    """
    if output.shape != target.shape:
        raise ShapeMismatch(
            f"The section {name!r} of the student gives {tuple(output.shape)} and the teacher's {tuple(target.shape)}; "
            f"the same shape is needed. Widths that differ need adapters='conv1x1' or 'select'."
        )
    function = loss if callable(loss) else _SECTION_LOSSES[loss]
    with torch.autocast(output.device.type, enabled=False):
        return function(_precise(output), _precise(target).detach())


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    r"""Return the mean squared error as a share of the target's mean square: 0 is exact, 1 is what zeros would give.

    .. math:: \sum (o - t)^2 \Big/ \sum t^2

    Shapes:
        `output` and `target` of the same shape; returns a scalar, 0 where both are zero.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        tensor(0.1000)
    """
    error, size = mean_squares(output, target)
    return error / size.clamp(min=torch.finfo(size.dtype).tiny)


def mean_squares(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squares of the error and of the target, in float32 or better.

    Example:
        >>> mean_squares(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        (tensor(0.5000), tensor(5.))
    """
    output, target = _precise(output), _precise(target)
    return (output - target).square().mean(), target.square().mean()


def check_distillation(alpha: float, temperature: float, soft: str) -> None:
    """Raise `InvalidArgument` for settings of `kd_loss` that are out of range."""
    if not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha={alpha}: the share of the hard term, from 0 to 1, is needed.")
    if not 0 < temperature < float("inf"):
        raise InvalidArgument(f"temperature={temperature}: a positive number is needed. The paper's code has 6.")
    check_choice("soft", soft, ("ce", "kl"))


def _hard(student: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        if target.shape != student.shape:
            raise ShapeMismatch(
                f"The targets are {tuple(target.shape)} and {target.dtype}, the logits {tuple(student.shape)}; class "
                f"indices (int64) or probabilities of the shape of the logits are needed."
            )
        return F.cross_entropy(student, target.to(student.dtype))
    expected = student.shape[:1] + student.shape[2:]
    if target.shape != expected:
        raise ShapeMismatch(
            f"The targets are {tuple(target.shape)} for logits of {tuple(student.shape)}; {tuple(expected)} is needed."
        )
    summed = F.cross_entropy(student, target, ignore_index=IGNORED, reduction="sum")
    return summed / (target != IGNORED).sum().clamp(min=1)  # a batch without any target has no hard term, not NaN


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
