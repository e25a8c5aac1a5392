"""The minimum covariance determinant against values worked out independently, and its invariants."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.rog import consistency_factor, fast_mcd
from lightning_methods.rog.csteps import Packed, c_step, estimate, squared_distances

F64 = torch.float64
# ten points of which three lie far away; the best six by trying all subsets
POINTS = torch.tensor(
    [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5), (0.2, 0.8), (0.9, 0.3), (10, 10), (11, 9), (10, 12)], dtype=F64
)
PLAIN: dict[str, Any] = {"reweight": False, "consistency": False}


def packed(x: Tensor, h: int) -> Packed:
    eye = torch.eye(x.shape[1], dtype=F64)
    real = torch.ones(1, len(x), dtype=torch.bool)
    return Packed(x[None], real, torch.tensor([h]), eye, torch.zeros(1, dtype=F64), 1e-6)


def support_of(places: list[int], n: int) -> Tensor:
    support = torch.zeros(1, n, dtype=torch.bool)
    support[0, places] = True
    return support


def contaminated(share: float, shift: float, *, n: int = 2000, d: int = 64, seed: int = 0) -> tuple[Tensor, int]:
    x = torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    bad = int(share * n)
    x[:bad] += shift
    return x, bad


@pytest.mark.parametrize(
    ("alpha", "dim", "expected"),
    [
        (0.5, 2, 3.25889135327),
        (0.7, 2, 2.06606594918),
        (0.5, 64, 1.16338018663),
        (0.7, 64, 1.09908701649),
        (0.975, 64, 1.01194730792),
        (0.7, 512, 1.03238290245),
        (1.0, 3, 1.0),
    ],
)
def test_consistency_factor(alpha: float, dim: int, expected: float) -> None:
    assert consistency_factor(alpha, dim) == pytest.approx(expected, rel=1e-10)


def test_finds_the_best_of_all_subsets() -> None:
    found = fast_mcd(POINTS, starts=("median", "random:20"), selection="determinant", **PLAIN)
    assert torch.where(found.support)[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert int(found.h) == 6
    torch.testing.assert_close(found.location, torch.tensor([0.6, 0.6], dtype=F64))
    expected = torch.tensor([[0.47 / 3, -0.08], [-0.08, 0.41 / 3]], dtype=F64)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-12, atol=0)
    assert float(found.logdet) == pytest.approx(math.log(0.0150111111111111), rel=1e-10)


def test_one_step() -> None:
    cloud = packed(POINTS, 6)
    before = estimate(cloud, support_of([0, 1, 3, 5, 7, 8], 10))
    expected = [0.672862453532, 1.955788635157, 2.686670207116, 0.392857142857, 0.516429899097]
    expected += [1.385422198619, 0.899117100372, 3.787573021774, 3.805496548062, 19.923526287839]
    assert squared_distances(cloud, before)[0].tolist() == pytest.approx(expected, rel=1e-9)
    after = c_step(cloud, before)
    assert torch.where(after.support[0])[0].tolist() == [0, 1, 3, 4, 5, 6]
    assert [float(before.logdet), float(after.logdet)] == pytest.approx([2.412203198904, -3.822114594329], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_step_raises_the_determinant(seed: int) -> None:
    x, _ = contaminated(0.3, 3.0, n=300, d=8, seed=seed)
    cloud = packed(x, 155)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    state = estimate(cloud, support_of(order[:155].tolist(), 300))
    logdets = [float(state.logdet)]
    for _ in range(12):
        state = c_step(cloud, state)
        logdets.append(float(state.logdet))
    assert all(b <= a + 1e-9 for a, b in pairwise(logdets))
    assert logdets[-1] < logdets[0]


@pytest.mark.parametrize(("share", "shift"), [(0.3, 3.0), (0.4, 2.0)])
def test_clustered_outliers_are_left_out(share: float, shift: float) -> None:
    x, bad = contaminated(share, shift)
    found = fast_mcd(x)
    assert int(found.support[:bad].sum()) == 0
    assert float(found.location.norm()) < 0.4  # of 8 * shift for the plain mean times the share


def test_the_textbook_rule_keeps_outliers_that_the_robust_one_leaves_out() -> None:
    x, bad = contaminated(0.4, 2.0)
    assert int(fast_mcd(x, selection="determinant").support[:bad].sum()) > 0


def test_all_points_give_the_plain_estimate() -> None:
    x, _ = contaminated(0.0, 0.0, n=200, d=5)
    found = fast_mcd(x, support_fraction=1.0)
    torch.testing.assert_close(found.location, x.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.covariance, x.T.cov(correction=0), rtol=1e-11, atol=1e-12)


def test_classes_together_are_classes_one_by_one_in_any_chunks() -> None:
    x, _ = contaminated(0.2, 3.0, n=600, d=4)
    y = torch.arange(600) % 3
    y[:7] = -1
    starts = ("median", "spatial_sign")
    together = fast_mcd(x, y, starts=starts)
    chunked = fast_mcd(x, y, starts=starts, max_bytes=1)
    for c in range(3):
        alone = fast_mcd(x[y == c], starts=starts)
        for found in (together, chunked):
            torch.testing.assert_close(found.covariance[c], alone.covariance, rtol=1e-10, atol=1e-12)
            assert torch.equal(found.support[y == c], alone.support)
    assert not bool(together.support[:7].any())
    assert bool(together.distances[:7].isnan().all())


def test_order_shift_and_scale_do_not_matter() -> None:
    x, _ = contaminated(0.2, 3.0, n=400, d=4)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    scale, shift = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=F64), torch.tensor([5.0, -3.0, 0.0, 100.0], dtype=F64)
    plain, moved = fast_mcd(x, starts=("median",)), fast_mcd((x * scale + shift)[order], starts=("median",))
    assert torch.equal(moved.support, plain.support[order])
    torch.testing.assert_close(moved.location, plain.location * scale + shift, rtol=1e-9, atol=1e-9)


def test_random_starts_leave_the_global_state_alone() -> None:
    x, _ = contaminated(0.2, 3.0, n=100, d=3)
    before = torch.get_rng_state()
    first, second = fast_mcd(x, starts=("random:3",)), fast_mcd(x, starts=("random:3",))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.support, second.support)


def test_singular_and_tiny_classes_stay_finite() -> None:
    x, _ = contaminated(0.0, 0.0, n=60, d=5)
    x[:, 2] = 1.0  # does not vary
    x[:20] = x[0]  # a class of equal points
    y = torch.tensor([0] * 20 + [1] * 37 + [2] * 3)
    found = fast_mcd(x, y, num_classes=5)
    assert bool(found.location.isfinite().all())
    assert bool(found.covariance.isfinite().all())
    assert found.h[3:].tolist() == [0, 0]
    assert float(found.ridge[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions_and_strides(dtype: torch.dtype) -> None:
    x, bad = contaminated(0.3, 3.0, n=300, d=6)
    found = fast_mcd(x.to(dtype).T.contiguous().T)
    assert found.location.dtype == F64
    assert int(found.support[:bad].sum()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"support_fraction": 0.4}, "0.5"),
        ({"starts": ()}, "at least one"),
        ({"starts": ("medain",)}, "median"),
        ({"starts": ("random:0",)}, "random:0"),
        ({"selection": "best"}, "selection"),
        ({"max_steps": 0}, "max_steps"),
        ({"shrinkage": 2.0}, "shrinkage"),
        ({"ridge": 0.0}, "ridge"),
        ({"dtype": torch.float16}, "float64"),
        ({"y": torch.full((10,), -1)}, "largest label"),
        ({"y": torch.zeros(10)}, "whole numbers"),
        ({"y": torch.full((10,), 3), "num_classes": 2}, "num_classes"),
        ({"x": POINTS.long()}, "floating"),
        ({"x": POINTS.masked_fill(POINTS > 11, torch.nan)}, "1 of 10 points"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fast_mcd(**{"x": POINTS, **settings})


@pytest.mark.parametrize("wrong", [{"x": POINTS[0]}, {"x": POINTS[:0]}, {"y": torch.zeros(9, dtype=torch.int64)}])
def test_bad_shapes(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeMismatch):
        fast_mcd(**{"x": POINTS, **wrong})
