"""Estimated weights against the card's values, an outside optimiser, and data of a known shift."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.importance_weighting import (
    LabelShift,
    bbse,
    calibrate,
    condition_number,
    density_ratio_weights,
    em_prior_shift,
    rlls,
)

C = torch.tensor([[0.30, 0.05, 0.05], [0.06, 0.28, 0.02], [0.04, 0.02, 0.18]], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
W = [0.078571428571, 0.864285714286, 2.664285714286]


def test_bbse_of_the_card():
    assert bbse(C, Q).tolist() == pytest.approx(W, abs=1e-11)
    assert (bbse(C, Q) * C.sum(0)).tolist() == pytest.approx([0.031428571429, 0.3025, 0.666071428571], abs=1e-11)
    assert torch.allclose(bbse(1000 * C, 30 * Q), bbse(C, Q))  # counts


@pytest.mark.parametrize(("delta", "objective"), [(0.01, 0.019071696092), (0.05, 0.095358480462)])
def test_rlls_of_the_card(delta, objective):
    theta = rlls(C, Q, delta) - 1
    assert theta.tolist() == pytest.approx([-0.921428571429, -0.135714285714, 1.664285714286], abs=1e-10)
    value = (C @ theta - (Q - C.sum(1))).norm() + delta * theta.norm()
    assert float(value) == pytest.approx(objective, abs=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.005, 1.0))
def test_rlls_is_the_minimum_that_another_optimiser_finds(seed, delta):
    generator = np.random.default_rng(seed)
    c = generator.dirichlet(np.ones(9)).reshape(3, 3)
    if seed % 3 == 0:
        c[2] = c[1]  # singular
        c /= c.sum()
    q = generator.dirichlet(np.ones(3))
    b = q - c.sum(1)

    def value(theta):
        return np.linalg.norm(c @ theta - b) + delta * np.linalg.norm(theta)

    u, s, v = np.linalg.svd(c)
    from lightning_methods.importance_weighting.shift import _penalized

    ours = v.T @ _penalized(torch.from_numpy(s), torch.from_numpy(u.T @ b), delta).numpy()
    found = min(
        (minimize(value, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).fun)
        for start in (np.zeros(3) + 1e-3, ours + 1e-3)
    )
    assert value(ours) <= found + 1e-8
    weights = rlls(torch.from_numpy(c), torch.from_numpy(q), delta)
    assert torch.allclose(weights, (1 + torch.from_numpy(ours)).clamp(min=0), atol=1e-9)


def test_rlls_goes_from_bbse_to_no_shift():
    assert torch.allclose(rlls(C, Q, 0.0), bbse(C, Q))
    assert rlls(C, Q, 10.0).tolist() == [1, 1, 1]
    assert torch.allclose(rlls(C, Q, 0.01, gamma=0.5), 1 + 0.5 * (bbse(C, Q) - 1))
    assert rlls(C, C.sum(1), 0.01).tolist() == pytest.approx([1, 1, 1])


def test_em_of_the_card():
    p = torch.tensor(
        [[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
        dtype=torch.float64,
    )
    got = em_prior_shift(p, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert got.tolist() == pytest.approx([0.318912786735, 0.264952016835, 0.416135196430], abs=1e-9)


def test_em_with_counts_is_em_of_repeated_rows():
    p = torch.rand(12, 3, dtype=torch.float64).softmax(1)
    counts = torch.randint(0, 4, (2, 12)) + torch.tensor([1, 0])[:, None]
    prior = torch.tensor([0.5, 0.3, 0.2])
    both = em_prior_shift(p, prior, counts=counts)
    for row, n in zip(both, counts, strict=True):
        assert torch.allclose(row, em_prior_shift(p.repeat_interleave(n, 0), prior), atol=1e-9)


def test_em_that_is_cut_short_says_so():
    with pytest.warns(LightningMethodsWarning, match="after 1 iterations"):
        em_prior_shift(torch.tensor([[0.6, 0.4], [0.3, 0.7]]), torch.tensor([0.5, 0.5]), max_iterations=1)


def test_a_singular_matrix_is_refused_with_its_condition_and_an_ill_one_warned_about():
    singular = torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    with pytest.raises(InvalidArgument, match=r"condition number (inf|\d).*rlls or em_prior_shift"):
        bbse(singular, Q[:2])
    ill = torch.tensor([[0.25, 0.2499], [0.25, 0.2501]], dtype=torch.float64)
    assert condition_number(ill) > 1e3
    with pytest.warns(LightningMethodsWarning, match="condition number"):
        bbse(ill, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("confusion", "prediction", "error"),
    [
        (C[:2], Q, ShapeMismatch),
        (C, Q[:2], ShapeMismatch),
        (C / C.sum(0), Q, InvalidArgument),
        (C / C.sum(1, keepdim=True), Q, InvalidArgument),
        (-C, Q, InvalidArgument),
        (C * math.nan, Q, InvalidArgument),
        (torch.zeros(3, 3), Q, InvalidArgument),
    ],
)
def test_bad_confusion_matrices(confusion, prediction, error):
    for solve in (bbse, rlls):
        with pytest.raises(error):
            solve(confusion, prediction)


def test_bad_settings_of_rlls_and_em():
    for bad in ({"delta": -1.0}, {"delta": math.nan}, {"gamma": 1.5}):
        with pytest.raises(InvalidArgument):
            rlls(C, Q, **bad)
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(InvalidArgument, match="softmax first"):
        em_prior_shift(torch.tensor([[2.0, 1.0]]), half)
    with pytest.raises(InvalidArgument, match="prior 0"):
        em_prior_shift(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 0.0]))
    with pytest.raises(ShapeMismatch):
        em_prior_shift(torch.tensor([[0.5, 0.5]]), torch.ones(3))


def test_em_refuses_counts_and_settings_outside_of_their_range():
    p, half = torch.tensor([[0.5, 0.5], [0.4, 0.6]]), torch.tensor([0.5, 0.5])
    for bad in (torch.ones(2), torch.ones(1, 3), torch.tensor([[1.0, 1.0], [0.0, 0.0]])):
        with pytest.raises(ShapeMismatch, match="counts"):
            em_prior_shift(p, half, counts=bad)
    for more in (
        {"counts": -torch.ones(1, 2)},
        {"counts": torch.full((1, 2), math.nan)},
        {"counts": torch.zeros(1, 2)},
        {"tolerance": -1.0},
        {"tolerance": math.nan},
        {"max_iterations": 0},
        {"max_iterations": 1.5},
    ):
        with pytest.raises(InvalidArgument):
            em_prior_shift(p, half, **more)
    for bad in (p * math.nan, -p, p[:0]):
        with pytest.raises(InvalidArgument):
            em_prior_shift(bad, half)
    assert torch.allclose(em_prior_shift(p.tolist(), [1, 1]), em_prior_shift(p, half))


def test_condition_numbers_of_what_is_no_matrix():
    for bad in (torch.ones(2, 3), torch.ones(3), torch.ones(0, 0)):
        with pytest.raises(ShapeMismatch):
            condition_number(bad)
    with pytest.raises(InvalidArgument, match="finite"):
        condition_number(torch.full((2, 2), math.nan))


def shifted(n, share, seed, sharpness=1.0):
    """Return logits and labels of two Gaussian classes whose true log odds are known."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=generator) < share).long()
    x = torch.randn(n, generator=generator, dtype=torch.float64) + 2.0 * y
    odds = sharpness * (2 * x - 2)
    return torch.stack([torch.zeros_like(odds), odds], 1), y


def test_calibration_finds_a_known_temperature():
    z, y = shifted(20_000, 0.5, 0, sharpness=3.0)
    temperature, bias = calibrate(z, y)
    assert temperature == pytest.approx(3.0, rel=0.05)
    assert bias.abs().max() < 0.05
    assert calibrate(z, y, bias=False)[1].tolist() == [0, 0]
    with pytest.raises(InvalidArgument):
        calibrate(z * math.nan, y)
    with pytest.raises(ShapeMismatch):
        calibrate(z, y[:-1])
    with pytest.raises(ShapeMismatch):
        calibrate(z[:, :1], y)
    for bad in (y + 5, y - 100, y.double()):
        with pytest.raises(InvalidArgument, match="whole numbers from 0 to 1"):
            calibrate(z, bad)


@pytest.mark.parametrize("method", ["em", "bbse", "rlls"])
def test_label_shift_finds_a_known_shift_within_its_interval(method):
    zs, ys = shifted(4000, 0.5, 1, sharpness=2.5)
    zt, _ = shifted(4000, 0.2, 2, sharpness=2.5)
    found = LabelShift(method, bootstrap=100).estimate(zs, ys, zt)
    truth = torch.tensor([0.8, 0.2]) / found.source_prior
    assert torch.allclose(found.weights, truth, atol=0.08)
    assert ((found.low <= found.weights) & (found.weights <= found.high)).all()
    assert ((found.low < truth) & (truth < found.high)).all()
    assert float(found.target_prior.sum()) == pytest.approx(1)
    assert found.condition_number == pytest.approx(condition_number(found.confusion))


def test_calibration_is_what_makes_em_right_for_overconfident_networks():
    zs, ys = shifted(4000, 0.5, 3, sharpness=6.0)
    zt, _ = shifted(4000, 0.1, 4, sharpness=6.0)
    right, wrong = (LabelShift("em", bootstrap=0, calibrated=c).estimate(zs, ys, zt).weights for c in (True, False))
    truth = torch.tensor([1.8, 0.2], dtype=torch.float64)
    assert (right - truth).abs().max() < 0.06 < (wrong - truth).abs().max()


def test_the_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(30):
        zs, ys = shifted(300, 0.5, 100 + seed)
        zt, _ = shifted(300, 0.3, 500 + seed)
        found = LabelShift("bbse", bootstrap=100).estimate(zs, ys, zt)
        prior = torch.bincount(ys).double() / len(ys)
        covered += int(found.low[1] <= 0.3 / prior[1] <= found.high[1])
    assert covered >= 25  # of 30 at 95%: fewer has a probability below 1 in 100


def test_label_shift_refuses_what_it_cannot_know():
    z, y = shifted(50, 0.5, 0)
    with pytest.raises(InvalidArgument, match=r"classes \[1\] are absent"):
        LabelShift().estimate(z, torch.zeros_like(y), z)
    with pytest.raises(ShapeMismatch):
        LabelShift().estimate(z, y, torch.zeros(5, 3))
    with pytest.raises(InvalidArgument):
        LabelShift().estimate(z, y, z[:0])
    for logits, labels, target in ((z * math.nan, y, z), (z, y, z * math.inf), (z, y + 0.5, z), (z, y - 1, z)):
        for method in ("bbse", "rlls", "em"):
            with pytest.raises(InvalidArgument):
                LabelShift(method, bootstrap=0).estimate(logits, labels, target)
    with pytest.raises(InvalidArgument, match="condition number"):
        LabelShift("bbse", bootstrap=0).estimate(torch.zeros_like(z), y, z)
    for bad in ({"bootstrap": 1.5}, {"confidence": math.nan}, {"delta": math.nan}, {"every_n_epochs": 0}, {"seed": -1}):
        with pytest.raises(InvalidArgument):
            LabelShift(**bad)
    for bad in ({"method": "kmm"}, {"bootstrap": -1}, {"confidence": 1.0}, {"delta": -1.0}, {"start_epoch": 0}):
        with pytest.raises(InvalidArgument):
            LabelShift(**bad)


def test_density_ratio_finds_a_known_ratio_out_of_fold():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    target = torch.randn(2000, 2, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.0])
    w = density_ratio_weights(source, target)
    truth = torch.exp(source[:, 0] - 0.5)  # of two unit Gaussians
    kept = (truth > 0.1) & (truth < 10)
    assert float((w[kept] / truth[kept]).log().abs().mean()) < 0.15
    assert float(w.mean()) == pytest.approx(1, abs=0.1)
    # weighted, the source has the mean of the target
    assert float((w[:, None] * source).sum(0)[0] / w.sum()) == pytest.approx(1.0, abs=0.1)


def test_density_ratio_never_asks_a_discriminator_about_what_it_was_trained_on():
    seen = []

    def memory(train, domain, test):
        seen.append((train, test))
        return torch.full((len(test),), 0.5)

    source = torch.arange(20.0)[:, None]
    w = density_ratio_weights(source, torch.arange(10.0)[:, None] + 100, discriminator=memory, folds=4)
    assert len(seen) == 4
    for train, test in seen:
        assert not set(train[:, 0].tolist()) & set(test[:, 0].tolist())
    assert sorted(x for _, test in seen for x in test[:, 0].tolist()) == source[:, 0].tolist()
    assert ((w > 1.5) & (w < 3)).all()  # about 20 / 10


def test_density_ratio_clips_and_refuses():
    near, far = torch.randn(30, 1), torch.randn(30, 1) + 50
    assert density_ratio_weights(near, far, clip=(0.5, 2.0)).unique().tolist() == [0.5]
    for bad in (
        {"folds": 1},
        {"folds": 31},
        {"clip": (2.0, 1.0)},
        {"regularization": 0.0},
        {"regularization": math.inf},
        {"folds": 2.5},
        {"clip": (0.0, 1.0, 2.0)},
        {"clip": None},
        {"clip": (math.nan, 1.0)},
        {"seed": -1},
        {"discriminator": lambda a, d, b: torch.full((len(b),), math.nan)},
        {"discriminator": lambda a, d, b: torch.full((len(b),), 2.0)},
        {"discriminator": lambda a, d, b: torch.full((len(b),), -0.1)},
    ):
        with pytest.raises(InvalidArgument):
            density_ratio_weights(near, far, **bad)
    with pytest.raises(ShapeMismatch):
        density_ratio_weights(near, torch.zeros(30, 2))
    with pytest.raises(ShapeMismatch):
        density_ratio_weights(near, far, discriminator=lambda a, d, b: torch.zeros(1))
    with pytest.raises(ShapeMismatch):
        density_ratio_weights(torch.tensor(1.0), far)
    with pytest.raises(InvalidArgument):
        density_ratio_weights(near * math.nan, far)
    with pytest.raises(InvalidArgument):
        density_ratio_weights(near[:0], far)
    assert len(density_ratio_weights(torch.ones(20), torch.ones(20))) == 20  # constant features tell nothing
