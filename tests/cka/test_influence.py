"""Sample influence against brute force, and the bootstrap interval."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_methods.cka.functional import cka
from lightning_methods.cka.influence import bootstrap_cka, certainty, leave_one_out_cka
from lightning_methods.errors import InvalidArgument, ShapeMismatch


def related(n: int = 40, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two representations of unequal width that share a part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    y = torch.cat([x[:, :3], torch.randn(n, 8, generator=generator, dtype=dtype)], 1) + 2.0
    return x, y


def brute_force(x: Tensor, y: Tensor) -> Tensor:
    kept = ~torch.eye(len(x), dtype=torch.bool)
    return torch.stack([cka(x[rows], y[rows], debiased=True) for rows in kept])


@pytest.mark.parametrize("n", [5, 6, 40])
def test_leaving_one_out_equals_brute_force(n):
    x, y = related(n, seed=n + 1)
    expected, found = brute_force(x, y), leave_one_out_cka(x, y)
    assert found.dtype == torch.float64
    # at n = 5 four samples are left, whose self terms may not be positive
    assert torch.allclose(found, expected, atol=1e-12, rtol=0, equal_nan=True)


def test_leaving_one_out_of_maps_far_from_zero_in_float32():
    x, y = related(64)
    maps = (x.float().view(64, 2, 3) + 1000, y.float() * 1e-6)
    assert torch.allclose(leave_one_out_cka(*maps), brute_force(x, y), atol=2e-3)
    assert torch.allclose(leave_one_out_cka(x.float(), y.float() * 1e25), brute_force(x, y), atol=1e-6)


def test_a_planted_outlier_is_named():
    x, y = related()
    x[17] += 30.0
    y[17] += 30.0
    found = certainty(x, y)
    assert found.sample == 17
    changes = (brute_force(x, y) - cka(x, y, debiased=True)).abs()
    assert found.influence == pytest.approx(float(changes.max()), abs=1e-12)
    assert found.influence > 1.5 * float(changes.sort().values[-2])


def test_the_interval_holds_the_value_and_narrows_with_samples():
    widths = []
    for n in (40, 160, 640):
        x, y = related(n, seed=n)
        low, high = bootstrap_cka(x, y)
        assert low < cka(x, y, debiased=True) < high
        widths.append(float(high - low))
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = float(cka(*related(4000, seed=99), debiased=True))
    intervals = [bootstrap_cka(*related(60, seed=seed)) for seed in range(100)]
    covered = sum(float(low) <= truth <= float(high) for low, high in intervals)
    assert 85 <= covered <= 100


def test_the_interval_of_independent_features_holds_zero():
    x, y = (torch.randn(100, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    low, high = bootstrap_cka(x, y)
    assert low < 0 < high


def test_the_interval_is_deterministic_and_draws_no_global_random_number():
    x, y = related()
    state = torch.get_rng_state()
    first, again, other = bootstrap_cka(x, y), bootstrap_cka(x, y), bootstrap_cka(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != other
    narrow = bootstrap_cka(x, y, confidence=0.5)
    assert first[0] < narrow[0] < narrow[1] < first[1]


def test_both_at_once_equal_each_alone():
    x, y = related()
    found = certainty(x, y)
    assert (found.low, found.high) == tuple(map(float, bootstrap_cka(x, y)))


def test_features_that_do_not_vary():
    x, _ = related()
    assert leave_one_out_cka(x, torch.ones(40, 3)).isnan().all()
    assert all(math.isnan(end) for end in bootstrap_cka(x, torch.zeros(40, 3)))
    found = certainty(x, torch.zeros(40, 3))
    assert math.isnan(found.influence)
    assert found.sample == -1


@pytest.mark.parametrize("function", [leave_one_out_cka, bootstrap_cka, certainty])
def test_bad_shapes(function):
    with pytest.raises(ShapeMismatch, match=r"same n samples"):
        function(torch.ones(6, 2), torch.ones(7, 2))
    with pytest.raises(ShapeMismatch, match=r"at least 5"):
        function(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ShapeMismatch):
        function(torch.ones(6), torch.ones(6, 2))


def test_bad_settings():
    x, y = related()
    with pytest.raises(InvalidArgument, match="resamples=3"):
        bootstrap_cka(x, y, resamples=3)
    for confidence in (0, 1, 95):
        with pytest.raises(InvalidArgument, match="confidence"):
            bootstrap_cka(x, y, confidence=confidence)
