"""Weights, and how much they still do, against values that were computed independently."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.importance_weighting import (
    balanced_weights,
    boundary_shift,
    class_balanced_weights,
    effective_sample_size,
    gradient_share,
    margins,
    normalized_weights,
)

numbers = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


def test_effective_sample_size_of_the_card():
    assert effective_sample_size([256.0, 1, 1, 1]) == pytest.approx(1.0235279757, abs=1e-10)


@settings(max_examples=50, deadline=None)
@given(numbers, st.floats(1e-200, 1e200))
def test_effective_sample_size_lies_between_one_and_n_at_any_scale(weights, scale):
    size = effective_sample_size(weights)
    assert 1 - 1e-12 <= size <= len(weights) * (1 + 1e-12)
    assert effective_sample_size([w * scale for w in weights]) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize(
    "weights", [[], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], ["a"], torch.zeros(0), [[1.0], [1, 2]]]
)
def test_bad_weights_are_refused(weights):
    with pytest.raises(InvalidArgument):
        effective_sample_size(weights)


def test_the_error_names_the_bad_weight():
    with pytest.raises(InvalidArgument, match=r"-2\.0 at position 1"):
        effective_sample_size([1.0, -2.0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any))
def test_balanced_weights_make_every_class_count_the_same(counts):
    w, n = balanced_weights(counts), torch.tensor(counts, dtype=torch.float64)
    products = (w * n)[n > 0]
    assert torch.allclose(products, products[0].expand_as(products))
    assert float((w * n).sum() / n.sum()) == pytest.approx(1)
    assert (w[n == 0] == 0).all()


def test_class_balanced_weights_follow_their_formula():
    counts = torch.tensor([500.0, 50.0, 5.0])
    by_hand = (1 - 0.99) / (1 - 0.99 ** counts.double())
    assert torch.allclose(class_balanced_weights(counts, 0.99), by_hand * 3 / by_hand.sum())


def test_class_balanced_weights_reach_from_equal_to_balanced():
    counts = [900, 90, 10]
    assert torch.allclose(class_balanced_weights(counts, 0.0), torch.ones(3, dtype=torch.float64))
    near, balanced = class_balanced_weights(counts, 1 - 1e-9), balanced_weights(counts)
    assert torch.allclose(near / near.sum(), balanced / balanced.sum(), rtol=1e-5)
    assert class_balanced_weights([5, 0], 0.9).tolist() == [1.0, 0.0]


def test_counts_and_weights_of_classes_are_one_number_each():
    for function in (balanced_weights, class_balanced_weights, normalized_weights):
        for bad in ([[1.0, 2.0]], 3.0):
            with pytest.raises(ShapeMismatch, match="one number for each class"):
                function(bad)
        for bad in ([-1.0, 2.0], [math.nan, 1.0], [0.0, 0.0], [], torch.ones(2, dtype=torch.complex64)):
            with pytest.raises(InvalidArgument):
                function(bad)
    assert normalized_weights([1, 3]).tolist() == [0.5, 1.5]


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan, "0.9", None])
def test_bad_beta(beta):
    with pytest.raises(InvalidArgument, match="beta"):
        class_balanced_weights([1, 2], beta)


def test_normalised_over_classes_or_samples():
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert float(normalized_weights(w).mean()) == pytest.approx(1)
    counts = torch.tensor([10.0, 5.0, 1.0], dtype=torch.float64)
    assert float((normalized_weights(w, counts) * counts).sum() / counts.sum()) == pytest.approx(1)
    with pytest.raises(ShapeMismatch):
        normalized_weights(w, [1, 2])
    with pytest.raises(InvalidArgument, match="all have weight 0"):
        normalized_weights(torch.tensor([0.0, 1.0]), [3, 0])


def test_margins_by_hand_for_one_two_and_more_logits():
    z = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    assert margins(z, torch.tensor([0, 1])).tolist() == pytest.approx([1.5, -0.1])
    one = torch.tensor([0.7, -2.0])
    assert margins(one, torch.tensor([1, 1])).tolist() == pytest.approx([0.7, -2.0])
    assert margins(one[:, None], torch.tensor([0, 0])).tolist() == pytest.approx([-0.7, 2.0])
    assert margins(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_margins_refuse_what_does_not_fit():
    with pytest.raises(ShapeMismatch):
        margins(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InvalidArgument):
        margins(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(InvalidArgument):
        margins(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ShapeMismatch):
        margins(torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.long))
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidArgument, match="not all finite"):
            margins(torch.full((2, 2), bad), torch.zeros(2, dtype=torch.long))


HALF, ONES, PAIR = torch.tensor([0.5, 0.5]), torch.ones(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("probability", "weights", "labels", "error"),
    [
        (HALF, ONES[:1], PAIR, ShapeMismatch),
        (HALF[:, None], ONES, PAIR, ShapeMismatch),
        (HALF, ONES, PAIR[:1], ShapeMismatch),
        (HALF * math.nan, ONES, PAIR, InvalidArgument),
        (HALF * 3, ONES, PAIR, InvalidArgument),
        (HALF, -ONES, PAIR, InvalidArgument),
        (HALF, ONES * math.inf, PAIR, InvalidArgument),
        (HALF, ONES, PAIR + 1, InvalidArgument),
        (HALF, ONES, PAIR - 1, InvalidArgument),
        (HALF, ONES, PAIR.float(), InvalidArgument),
    ],
)
def test_gradient_share_refuses_what_it_would_count_wrongly(probability, weights, labels, error):
    with pytest.raises(error):
        gradient_share(probability, weights, labels, 2)


@pytest.mark.parametrize(
    ("weights", "margin", "error"),
    [
        (ONES, ONES[:1], ShapeMismatch),
        (-ONES, ONES, InvalidArgument),
        (ONES * math.nan, ONES, InvalidArgument),
        (ONES, ONES * math.nan, InvalidArgument),
        (ONES, ONES * math.inf, InvalidArgument),
    ],
)
def test_boundary_shift_refuses_what_means_nothing(weights, margin, error):
    with pytest.raises(error):
        boundary_shift(weights, margin)


def test_the_share_of_the_gradient_is_the_intended_one_until_something_is_fitted():
    labels, weights = torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    share, intended = gradient_share(torch.full((4,), 0.25), weights, labels, 3)
    assert torch.allclose(share / share.sum(), intended / intended.sum())
    share, _ = gradient_share(torch.tensor([1.0, 1.0, 0.25, 0.25]), weights, labels, 3)
    assert share.tolist() == [0.0, 1.5, 3.0]


def test_the_share_is_that_of_the_gradient_of_the_logits():
    z = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 1, 0, 1, 1, 0]), torch.rand(6, dtype=torch.float64)
    (weights * torch.nn.functional.cross_entropy(z, labels, reduction="none")).sum().backward()
    p = z.softmax(1).gather(1, labels[:, None])[:, 0]
    share, _ = gradient_share(p.detach(), weights, labels, 2)
    own = z.grad.gather(1, labels[:, None])[:, 0].abs()
    assert torch.allclose(share, torch.stack([own[labels == c].sum() for c in (0, 1)]))


def test_boundary_shift_is_where_two_weighted_points_balance():
    """Two points at -1 and 1 on a line: the boundary of a slope k lies where w1 e^-m1 = w0 e^-m0."""
    ratio, slope = 16.0, 20.0
    # logit k (x + s): margins k (1 + s) and k (1 - s); balanced where the difference is log of the ratio
    shift = math.log(ratio) / (2 * slope)
    got = boundary_shift(torch.tensor([ratio, 1.0]), torch.tensor([slope, slope]))
    assert got == pytest.approx(shift)


def test_boundary_shift_at_the_ends():
    w = torch.tensor([4.0, 1.0])
    assert boundary_shift(w, torch.tensor([-1.0, -1.0])) == 1.0
    assert boundary_shift(torch.ones(2), torch.tensor([-1.0, 5.0])) == 0.0
    assert boundary_shift(torch.zeros(2), torch.ones(2)) == 0.0
    assert boundary_shift(torch.tensor([4.0, 0.0]), torch.ones(2)) == 0.0
    assert 0 < boundary_shift(w, torch.full((2,), 1e6)) < 1e-5
