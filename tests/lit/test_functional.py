"""The losses against the values of the card, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.lit.functional import intermediate_loss, kd_loss, kd_terms, relative_error, section_loss

DOUBLE = torch.float64
STUDENT = tensor([[1, 2, -1], [0.5, -0.5, 3]], dtype=DOUBLE)
TEACHER = tensor([[2, 1, 0], [-1, 0, 4]], dtype=DOUBLE)
TARGET = tensor([0, 2])


@pytest.mark.parametrize(
    ("alpha", "temperature", "soft", "total", "softened"),
    [
        (0.95, 6, "ce", 2.621923830261, 1.072553515424),
        (0.95, 6, "kl", 0.715859750621, 0.013629026735),
        (0.5, 1, "ce", 0.731289102973, 0.734865045422),
        (0.5, 1, "kl", 0.490919424126, 0.254125687728),
        (0, 4, "ce", 16.629502443348, 1.039343902709),
    ],
)
def test_distillation(alpha, temperature, soft, total, softened):
    settings = {"alpha": alpha, "temperature": temperature, "soft": soft}
    assert kd_loss(STUDENT, TEACHER, TARGET, **settings).item() == pytest.approx(total, abs=1e-11)
    hard, found = kd_terms(STUDENT, TEACHER, TARGET, **settings)
    assert found.item() == pytest.approx(softened, abs=1e-11)
    if alpha:
        assert hard.item() == pytest.approx(0.727713160524, abs=1e-11)
    else:
        assert hard is None
        assert kd_loss(STUDENT, TEACHER, **settings).item() == pytest.approx(total, abs=1e-11)


@pytest.mark.parametrize("soft", ["ce", "kl"])
def test_its_gradient(soft):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    kd_loss(student, teacher, TARGET, soft=soft).backward()
    expected = [[-0.358502281182, 0.346666716171, 0.011835565011], [0.046187706699, 0.011113329273, -0.057301035971]]
    torch.testing.assert_close(student.grad, tensor(expected, dtype=DOUBLE), atol=1e-11, rtol=0)
    assert teacher.grad is None


@pytest.mark.parametrize("soft", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_extreme_logits(soft, dtype):
    student = tensor([[1e4, 0, 0]], dtype=dtype, requires_grad=True)
    loss = kd_loss(student, tensor([[0, 1e4, 0]], dtype=dtype), tensor([1]), soft=soft)
    loss.backward()
    assert loss.item() == pytest.approx(12500, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert student.grad.isfinite().all()
    assert loss.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


@pytest.mark.parametrize("soft", ["ce", "kl"])
def test_classes_that_both_rule_out(soft):
    student = tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    teacher = tensor([[0.0, 2.0, -torch.inf]])
    loss = kd_loss(student, teacher, tensor([1]), soft=soft)
    expected = kd_loss(student[:, :2], teacher[:, :2], tensor([1]), soft=soft)
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert student.grad.isfinite().all()


def test_equal_logits_and_the_order_of_the_batch():
    assert kd_loss(TEACHER, TEACHER, TARGET, alpha=0, soft="kl").item() == pytest.approx(0, abs=1e-12)
    flipped = kd_loss(STUDENT.flip(0), TEACHER.flip(0), TARGET.flip(0))
    assert flipped.item() == pytest.approx(kd_loss(STUDENT, TEACHER, TARGET).item(), abs=1e-14)


def test_targets_that_do_not_count_probabilities_and_maps():
    one = kd_terms(STUDENT, TEACHER, tensor([0, -100]), alpha=1.0, temperature=1.0)[0]
    assert one.item() == pytest.approx(F.cross_entropy(STUDENT[:1], TARGET[:1]).item())
    none = kd_terms(STUDENT, TEACHER, tensor([-100, -100]), alpha=1.0, temperature=1.0)[0]
    assert none.item() == 0
    shares = F.one_hot(TARGET, 3).double()
    assert kd_loss(STUDENT, TEACHER, shares).item() == pytest.approx(kd_loss(STUDENT, TEACHER, TARGET).item())
    maps = [x.T[None, :, :, None] for x in (STUDENT, TEACHER)]
    assert kd_loss(*maps, TARGET[None, :, None]).item() == pytest.approx(kd_loss(STUDENT, TEACHER, TARGET).item())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"alpha": float("nan")}, "from 0 to 1"),
        ({"temperature": 0}, "a positive number"),
        ({"temperature": float("inf")}, "a positive number"),
        ({"soft": "klx"}, "Did you mean 'kl'"),
        ({"target": None}, "set alpha=0"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(InvalidArgument, match=says):
        kd_loss(STUDENT, TEACHER, **{"target": TARGET, **settings})


@pytest.mark.parametrize(
    ("student", "target", "says"),
    [
        (STUDENT[:, :2], TARGET, "beta=0"),
        (STUDENT, tensor([[0], [1]]), r"\(2,\) is needed"),
        (STUDENT, torch.ones(2, 2), "probabilities of the shape"),
    ],
)
def test_shapes_that_do_not_fit(student, target, says):
    with pytest.raises(ShapeMismatch, match=says):
        kd_loss(student, TEACHER, target)


# -- sections: the card's linear network -------------------------------------------------------------------------------

X = tensor([[1, 2], [3, -1]], dtype=DOUBLE)
A1, A2 = tensor([[1, 0.5], [0, 2]], dtype=DOUBLE), tensor([[0.5, -1], [1, 1]], dtype=DOUBLE)
B1, B2 = tensor([[0.9, 0.4], [0.1, 1.8]], dtype=DOUBLE), tensor([[0.6, -0.8], [0.9, 1.2]], dtype=DOUBLE)
HEAD = tensor([[1, 0], [0, 1], [1, -1]], dtype=DOUBLE)
LABELS = tensor([2, 1])


def test_the_linear_network():
    b1, b2 = B1.clone().requires_grad_(), B2.clone().requires_grad_()
    t1, t2 = X @ A1.T, X @ A1.T @ A2.T
    total, (first, second) = intermediate_loss([X @ b1.T, t1 @ b2.T], [t1, t2])
    assert (first.item(), second.item()) == (pytest.approx(0.1175), pytest.approx(0.45125))
    assert total.item() == pytest.approx(0.56875)
    own = section_loss(X @ b1.T @ b2.T, t2)  # fed by the student, as FitNets do
    assert own.item() == pytest.approx(0.406575)
    kd = kd_loss(X @ b1.T @ b2.T @ HEAD.T, t2 @ HEAD.T, LABELS)
    assert kd.item() == pytest.approx(9.573611644709, abs=1e-11)
    for beta, expected in {0.75: 7.322396233532, 0.05: 1.018993082235, 0: 0.56875, 1: 9.573611644709}.items():
        assert (beta * kd + (1 - beta) * total).item() == pytest.approx(expected, abs=1e-11)
    total.backward()
    torch.testing.assert_close(b1.grad, tensor([[-0.45, -0.2], [0.6, -0.55]], dtype=DOUBLE))
    torch.testing.assert_close(b2.grad, tensor([[0.8125, 2.15], [-0.2125, 1.85]], dtype=DOUBLE))


def test_weights_losses_and_half_precision():
    outputs, targets = [torch.zeros(2, 3), torch.ones(4)], [torch.full((2, 3), 2.0), torch.zeros(4)]
    assert intermediate_loss(outputs, targets, weights=[0.5, 2])[0].item() == 0.5 * 4 + 2 * 1
    assert intermediate_loss(outputs, targets, loss="l1")[0].item() == 3
    assert intermediate_loss(outputs, targets, loss="smooth_l1")[0].item() == 2
    assert intermediate_loss(outputs, targets, loss=lambda x, y: (y - x).sum())[0].item() == 8
    large = torch.full((8,), 300.0, dtype=torch.float16)
    assert section_loss(large, torch.zeros_like(large)).item() == 90000  # float16 ends at 65504


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([], []), InvalidArgument),
        (([torch.ones(2)], []), InvalidArgument),
        (([torch.ones(2)], [torch.ones(1)]), ShapeMismatch),  # broadcasting would hide it
    ],
)
def test_sections_that_do_not_fit(arguments, error):
    with pytest.raises(error):
        intermediate_loss(*arguments)
    with pytest.raises(InvalidArgument):
        intermediate_loss([torch.ones(2)], [torch.ones(2)], weights=[1, 2])


def test_relative_errors():
    target = torch.randn(4, 5)
    assert relative_error(target, target) == 0
    assert relative_error(torch.zeros_like(target), target).item() == pytest.approx(1)
    assert relative_error(target * 1e3 * 1.1, target * 1e3).item() == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
