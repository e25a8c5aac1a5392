"""Weighted means over an epoch."""

from __future__ import annotations

import math

import torch

from lightning_methods.core.means import EpochMeans


def test_means_are_weighted_and_start_anew() -> None:
    means = EpochMeans()
    means.add({"a": torch.tensor(1.0), "b": 2.0}, weight=3)
    means.add({"a": torch.tensor(5.0), "c": torch.tensor(7)}, weight=1)
    assert means.close() == {"a": 2.0, "b": 2.0, "c": 7.0}
    assert means.close() == {}


def test_sums_are_in_float64_and_hold_no_graph() -> None:
    means = EpochMeans()
    x = torch.tensor(0.1, requires_grad=True)
    for _ in range(1000):
        means.add({"a": x * 1}, weight=1)
    state = means.state_dict()
    assert state["sums"]["a"].dtype == torch.float64
    assert not state["sums"]["a"].requires_grad
    assert math.isclose(means.close()["a"], float(x.detach().double()), rel_tol=1e-12)


def test_what_is_not_finite_stays_visible() -> None:
    means = EpochMeans()
    means.add({"a": math.nan, "b": math.inf, "c": 1.0}, weight=2)
    closed = means.close()
    assert math.isnan(closed["a"])
    assert closed["b"] == math.inf
    assert closed["c"] == 1.0


def test_state_goes_on_where_it_stopped() -> None:
    first, second = EpochMeans(), EpochMeans()
    first.add({"a": 1.0}, weight=1)
    second.load_state_dict(first.state_dict())
    for means in (first, second):
        means.add({"a": 4.0}, weight=2)
    assert first.close() == second.close() == {"a": 3.0}
