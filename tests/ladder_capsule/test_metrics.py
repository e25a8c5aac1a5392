"""Metrics against values computed otherwise, in pieces as in one, under casts, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_methods import CodeOverlap, EquivarianceR2, PoseGeneralizationCurve
from lightning_methods.errors import InvalidArgument, ShapeMismatch


def poses(rows: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- accuracy over poses


def test_curve_by_hand_in_any_order() -> None:
    curve = PoseGeneralizationCurve()
    curve.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 0.0, 90.0, -30.0]))
    curve.update(torch.tensor([True, False]), -30)
    found = curve.compute()
    assert found["levels"].tolist() == [-30.0, 0.0, 90.0]
    assert found["accuracy"].tolist() == pytest.approx([1 / 3, 1.0, 1.0])
    assert found["count"].tolist() == [3, 2, 1]
    area = np.trapezoid([1 / 3, 1, 1], [-30, 0, 90]) / 120 if hasattr(np, "trapezoid") else None
    assert found["auc"].item() == pytest.approx(area if area is not None else (30 * 2 / 3 + 90) / 120)


def test_one_level_is_its_own_area() -> None:
    curve = PoseGeneralizationCurve()
    curve.update(torch.tensor([1, 0]), torch.tensor([1, 1]), 0.0)
    assert curve.compute()["auc"].item() == 0.5


def test_curve_refuses() -> None:
    curve = PoseGeneralizationCurve()
    with pytest.raises(InvalidArgument, match="saw no sample"):
        curve.compute()
    with pytest.raises(ShapeMismatch, match="differ in length"):
        curve.update(torch.tensor([1]), torch.tensor([1, 2]), 0.0)
    with pytest.raises(ShapeMismatch, match="one each"):
        curve.update(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(InvalidArgument, match="not finite"):
        curve.update(torch.tensor([1]), torch.tensor([1]), float("nan"))
    with pytest.raises(InvalidArgument, match="0 or 1"):
        curve.update(torch.tensor([3, 1]), 15.0)
    curve.update(torch.zeros(0), torch.zeros(0), 0.0)
    with pytest.raises(InvalidArgument, match="empty batches"):
        curve.compute()


# --- equivariance


def test_a_linear_action_is_explained_and_chance_is_not() -> None:
    z, action = poses(), torch.linalg.qr(poses(4, 1))[0]
    metric = EquivarianceR2(1e-9)
    metric.update(z, z @ action + 3)
    found = metric.compute()
    assert found["r2"].item() == pytest.approx(1, abs=1e-6)
    assert found["identity"] < 0
    assert abs(found["shuffled"]) < 0.2


def test_an_invariant_representation_is_the_identity() -> None:
    z = poses()
    metric = EquivarianceR2()
    metric.update(z, z)
    assert metric.compute()["identity"].item() == 1


def test_against_least_squares_and_in_batches() -> None:
    z = poses()
    moved = (z @ poses(4, 2)).tanh() + 0.1 * poses(200, 3)
    whole, pieces = EquivarianceR2(1e-12), EquivarianceR2(1e-12)
    whole.update(z, moved)
    for rows in (slice(0, 50), slice(50, 51), slice(51, 200)):
        pieces.update(z[rows], moved[rows])
    design = np.c_[z[::2], np.ones(100)]
    fitted = np.linalg.lstsq(design, moved[::2].numpy(), rcond=None)[0]
    left = moved[1::2].numpy() - np.c_[z[1::2], np.ones(100)] @ fitted
    total = ((moved[1::2] - moved[::2].mean(0)) ** 2).sum().item()
    assert whole.compute()["r2"].item() == pytest.approx(1 - (left**2).sum() / total, abs=1e-8)
    assert torch.equal(torch.stack([*whole.compute().values()]), torch.stack([*pieces.compute().values()]))


def test_classes_have_maps_of_their_own() -> None:
    z, y = poses(400), torch.arange(400) // 2 % 2
    moved = torch.where(y[:, None] == 0, z, -z)
    together, apart = EquivarianceR2(), EquivarianceR2()
    together.update(z, moved)
    apart.update(z, moved, y)
    assert together.compute()["r2"] < 0.2
    assert apart.compute()["r2"] > 0.99


def test_nothing_that_moves_is_no_nan() -> None:
    constant = torch.ones(20, 3)
    metric = EquivarianceR2()
    metric.update(constant, constant)
    assert [v.item() for v in metric.compute().values()] == [1, 1, 1]


def test_equivariance_refuses() -> None:
    with pytest.raises(InvalidArgument, match="ridge=0"):
        EquivarianceR2(0)
    metric = EquivarianceR2()
    with pytest.raises(InvalidArgument, match="saw no sample"):
        metric.compute()
    with pytest.raises(ShapeMismatch, match=r"\(B, D\)"):
        metric.update(torch.rand(3, 2), torch.rand(3, 3))
    with pytest.raises(ShapeMismatch, match=r"\(B,\) is needed"):
        metric.update(torch.rand(3, 2), torch.rand(3, 2), torch.tensor([1]))
    with pytest.raises(InvalidArgument, match="not finite"):
        metric.update(torch.rand(3, 2), torch.full((3, 2), torch.nan))
    metric.update(torch.rand(3, 2), torch.rand(3, 2))
    with pytest.raises(ShapeMismatch, match="some without"):
        metric.update(torch.rand(3, 2), torch.rand(3, 2), torch.tensor([1, 1, 0]))
    with pytest.raises(InvalidArgument, match="four samples"):
        metric.compute()


# --- code vectors


@pytest.mark.parametrize(("kind", "expected"), [("overlap", (0.5 + 1) / 2), ("jaccard", (1 / 3 + 1) / 2)])
def test_overlap_by_hand(kind, expected) -> None:
    metric = CodeOverlap(kind)
    metric.update(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 1, 1, 0]]))
    metric.update(torch.tensor([[1, 0, 0, 1]]), torch.tensor([[1, 0, 0, 1]]))
    assert metric.compute().item() == pytest.approx(expected)


def test_overlap_refuses() -> None:
    with pytest.raises(InvalidArgument, match="kind='dice'"):
        CodeOverlap("dice")
    with pytest.raises(InvalidArgument, match="saw no sample"):
        CodeOverlap().compute()
    with pytest.raises(InvalidArgument, match="empty"):
        CodeOverlap().update(torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(ShapeMismatch, match=r"\(B, N\)"):
        CodeOverlap().update(torch.ones(1, 3), torch.ones(1, 4))


def test_a_cast_of_the_module_leaves_sums_in_float64() -> None:
    holder = nn.Module()
    holder.overlap, holder.curve = CodeOverlap(), PoseGeneralizationCurve()
    holder.overlap.update(torch.ones(1, 3), torch.ones(1, 3))
    holder.curve.update(torch.tensor([1]), torch.tensor([1]), 1 / 3)
    holder.to(torch.bfloat16)
    assert holder.overlap.compute().dtype == torch.float64
    assert holder.curve.compute()["levels"].item() == 1 / 3
    holder.overlap.reset()
    assert holder.overlap.total.dtype == torch.float64
