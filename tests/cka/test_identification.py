"""Layer identification: the protocol, ties, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_methods.cka import layer_identification, similarity_matrix
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch


def network(seed: int, *, noise: float = 0.3, n: int = 60) -> dict[str, Tensor]:
    """Return three layers that networks of all seeds share, turned and noisy."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    layers = {}
    for i in range(3):
        x = torch.randn(n, 6, generator=shared)
        turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=own))
        layers[f"layer{i}"] = x @ turn + noise * torch.randn(n, 6, generator=own)
    return layers


@pytest.mark.parametrize("index", ["cka", "hsic", "cca", "svcca", "pwcca", "linear_regression", "procrustes"])
def test_twins_are_found(index):
    assert layer_identification([network(1), network(2), network(3)], index=index) == 1.0


def test_equals_the_protocol_written_out():
    networks = [network(seed, noise=3.0, n=12) for seed in (1, 2, 3)]
    right = total = 0
    for a in networks:
        for b in networks:
            if a is not b:
                matrix = similarity_matrix(a, b, debiased=True)
                right += sum(int(matrix[i].argmax()) == i for i in range(3))
                total += 3
    assert 0 < right < total
    assert layer_identification(networks, debiased=True) == right / total


def test_ties_are_failures():
    x = torch.randn(20, 5)
    assert layer_identification([{"a": x, "b": x}, {"a": x, "b": x}]) == 0.0
    wide = [{name: torch.randn(20, 64) for name in "abc"} for _ in range(2)]
    with pytest.warns(LightningMethodsWarning):  # as many features as samples: everything predicts everything
        assert layer_identification(wide, index="linear_regression") == 0.0


def test_a_dead_layer_is_a_failure_and_the_others_count():
    a, b = network(1), network(2)
    b["layer1"] = torch.zeros(60, 6)
    with pytest.warns(LightningMethodsWarning):
        found = layer_identification([a, b])
    assert not math.isnan(found)
    assert found <= 4 / 6


def test_bad_input():
    one = network(1)
    with pytest.raises(InvalidArgument, match="at least two"):
        layer_identification([one])
    with pytest.raises(InvalidArgument, match="at least two"):
        layer_identification([{"a": one["layer0"]}] * 2)
    with pytest.raises(InvalidArgument, match="Network 1 has the layers"):
        layer_identification([one, {**one, "more": one["layer0"]}])
    with pytest.raises(InvalidArgument, match="kind='distance'"):
        layer_identification([one, one], index="procrustes", kind="distance")
    with pytest.raises(InvalidArgument, match="index"):
        layer_identification([one, one], index="nope")
    with pytest.raises(ShapeMismatch):
        layer_identification([one, network(2, n=50)])
