"""The losses against the card's values and their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_methods import LDAMLoss, LogitAdjustedLoss, PolyTailLoss, VSLoss
from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.importance_weighting import poly_tail_loss

COUNTS = [80, 15, 5]


def of_margin(m, **settings):
    m = torch.tensor(m, dtype=torch.float64)
    return poly_tail_loss(m, torch.ones_like(m), reduction="none", **settings)


def test_the_polynomial_tail_of_the_card():
    expected = [4.192219284530, 2.212677796801, 1.0, 0.5, 0.1]
    assert of_margin([-1.0, 0.0, 1.0, 2.0, 10.0]).tolist() == pytest.approx(expected, abs=1e-11)
    assert of_margin([2.0], alpha=2.0).item() == pytest.approx(0.25)
    assert of_margin([-1.0, 0.0, 1.0, 3.0], left="linear").tolist() == pytest.approx([3, 2, 1, 1 / 3])


def test_one_logit_and_two_logits_are_the_same():
    z, y = torch.randn(20, 2, dtype=torch.float64), torch.arange(20) % 2
    one = poly_tail_loss(z[:, 1] - z[:, 0], y, reduction="none")
    assert torch.allclose(poly_tail_loss(z, y, reduction="none"), one)
    assert torch.allclose(poly_tail_loss((z[:, 1] - z[:, 0])[:, None], y[:, None], reduction="none")[:, 0], one)


def test_more_classes_and_more_dimensions():
    z, y = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(3, (4, 5))
    got = poly_tail_loss(z, y, reduction="none")
    flat = poly_tail_loss(z.movedim(1, 2).reshape(-1, 3), y.reshape(-1), reduction="none")
    assert torch.allclose(got.reshape(-1), flat)
    p = z.softmax(1).gather(1, y[:, None])[:, 0]
    m = torch.log(p / (1 - p))
    assert torch.allclose(got, torch.where(m <= 1, torch.log1p(torch.exp(-m)) / math.log1p(math.exp(-1)), 1 / m))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_gradient_is_finite_everywhere_and_not_zero(kind, alpha):
    m = torch.tensor([0.0, 1.0, -50.0, 1e4, 1.0001], dtype=kind, requires_grad=True)
    loss = poly_tail_loss(m, torch.ones(5), alpha=alpha, reduction="sum")
    loss.backward()
    assert loss.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert torch.isfinite(loss)
    assert torch.isfinite(m.grad).all()
    assert (m.grad[:4] <= 0).all()
    assert m.grad[0] < -0.5


def test_the_tail_is_polynomial_so_a_weight_scales_the_margin_at_which_it_balances():
    """w m^-1 = (m / w)^-1: the effect of a weight is a factor of the margin, whatever the margin."""
    for m in (2.0, 20.0, 200.0):
        assert 5 * float(of_margin([5 * m])) == pytest.approx(float(of_margin([m])))


def test_gradcheck():
    z = torch.tensor([[0.3, -0.2, 1.1], [3.0, 0.0, -4.0], [0.0, 0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: poly_tail_loss(x, torch.tensor([2, 0, 2])), (z,))


def test_vs_loss_is_its_formula():
    z, y, n = torch.randn(7, 3, dtype=torch.float64), torch.randint(3, (7,)), torch.tensor(COUNTS, dtype=torch.float64)
    by_hand = -(z * (n / 80) ** 0.3 + 1.5 * torch.log(n / 100)).log_softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(VSLoss(COUNTS, 0.3, 1.5, reduction="none")(z, y), by_hand, atol=1e-6)
    assert torch.allclose(VSLoss(COUNTS, 0.0, 0.0)(z, y), F.cross_entropy(z, y), atol=1e-6)


def test_logit_adjustment_is_vs_without_scales():
    z, y = torch.randn(7, 3), torch.randint(3, (7,))
    assert torch.allclose(LogitAdjustedLoss(COUNTS, 2.0)(z, y), VSLoss(COUNTS, 0.0, 2.0)(z, y))


def test_logit_adjustment_fits_the_balanced_odds():
    """Its minimum on overlapping classes is where the likelihoods are equal, whatever the class shares."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(4000) % 20 == 0).long()
    x = torch.randn(4000, generator=generator) + 2 * y
    weight, bias = (torch.zeros(1, requires_grad=True) for _ in range(2))
    loss = LogitAdjustedLoss([3800, 200])
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def closure():
        optimizer.zero_grad()
        z = weight * x + bias
        value = loss(torch.stack([torch.zeros_like(z), z], 1), y)
        value.backward()
        return value

    optimizer.step(closure)
    assert float((-bias / weight).detach()) == pytest.approx(1.0, abs=0.15)  # halfway between the means


def test_ldam_is_its_formula():
    loss = LDAMLoss([160, 10], max_margin=0.4, scale=5.0, reduction="none")
    assert loss.margin.tolist() == pytest.approx([0.4 * (1 / 16) ** 0.25, 0.4])
    z, y = torch.tensor([[0.2, 0.1], [0.3, -0.5]]), torch.tensor([0, 1])
    shifted = torch.tensor([[0.2 - 0.2, 0.1], [0.3, -0.5 - 0.4]])
    assert torch.allclose(loss(z, y), F.cross_entropy(5 * shifted, y, reduction="none"))


@pytest.mark.parametrize("loss", [VSLoss(COUNTS), LDAMLoss(COUNTS), LogitAdjustedLoss(COUNTS)])
def test_segmentation_ignored_targets_and_half_precision(loss):
    z, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    y[0, 0] = -100
    value = loss(z, y)
    flat, targets = z.movedim(1, 3).reshape(-1, 3), y.reshape(-1)
    assert torch.allclose(value, loss(flat[targets >= 0], targets[targets >= 0]), atol=1e-6)
    assert loss(z.half(), y).dtype == torch.float32
    assert torch.allclose(loss(z.to(memory_format=torch.channels_last), y), value)
    assert list(loss.state_dict()) == []


def test_vs_loss_takes_probabilities_and_smoothing():
    z, p = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    assert torch.isfinite(VSLoss(COUNTS)(z, p))
    y = torch.randint(3, (5,))
    smooth = 0.9 * F.one_hot(y, 3) + 0.1 / 3
    assert torch.allclose(VSLoss(COUNTS, label_smoothing=0.1)(z, y), VSLoss(COUNTS)(z, smooth))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VSLoss([1]),
        lambda: VSLoss([1, 0]),
        lambda: VSLoss([1, -1]),
        lambda: VSLoss([1, 2], gamma=-1.0),
        lambda: VSLoss([1, 2], tau=math.nan),
        lambda: VSLoss([1, 2], reduction="max"),
        lambda: VSLoss([1, 2], label_smoothing=2.0),
        lambda: LDAMLoss([1, 2], scale=0.0),
        lambda: LDAMLoss([1, 2], max_margin=-0.1),
        lambda: PolyTailLoss(alpha=0.0),
        lambda: PolyTailLoss(left="exp"),
        lambda: PolyTailLoss(reduction="max"),
        lambda: poly_tail_loss(torch.zeros(2, 2), torch.tensor([0, 2])),
        lambda: poly_tail_loss(torch.zeros(2, 2), torch.tensor([0, -1])),
        lambda: poly_tail_loss(torch.zeros(2), torch.tensor([0.5, 1.0])),
    ],
)
def test_settings_outside_of_their_range(make):
    with pytest.raises(InvalidArgument):
        make()


@pytest.mark.parametrize("loss", [VSLoss(COUNTS), LogitAdjustedLoss(COUNTS), LDAMLoss(COUNTS)])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_beyond_the_classes_is_named(loss, label):
    with pytest.raises(InvalidArgument, match=rf"{label}.*the classes 0 to 2"):
        loss(torch.zeros(3, 3), torch.tensor([1, label, -100]))


@pytest.mark.parametrize("make", [lambda: PolyTailLoss("1"), lambda: VSLoss([1, 2], tau=None), lambda: LDAMLoss("ab")])
def test_settings_that_are_no_numbers(make):
    with pytest.raises(InvalidArgument):
        make()


@pytest.mark.parametrize(
    "call",
    [
        lambda: VSLoss(COUNTS)(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        lambda: VSLoss(COUNTS)(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: VSLoss(COUNTS)(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)),
        lambda: LDAMLoss(COUNTS)(torch.zeros(2, 3), torch.zeros(2, 3)),
        lambda: PolyTailLoss()(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        lambda: PolyTailLoss()(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
    ],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ShapeMismatch):
        call()
