"""Heads of all weights at once: each is exactly the head trained by itself, and they fade as the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, NotFinite, ShapeMismatch
from lightning_methods.importance_weighting import (
    HeadSettings,
    fading_figure,
    poly_tail_loss,
    ratio_weights,
    sweep_heads,
)
from lightning_methods.importance_weighting.functional import boundary_shift, margins
from lightning_methods.importance_weighting.sweep import Heads, spaced_epochs


def clouds(n=60, features=4, seed=0, distance=3.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.randn(n, features, generator=generator) + distance * y[:, None], y


CASES = {
    "linear": HeadSettings(epochs=3),
    "hidden": HeadSettings(hidden=(8, 5), epochs=3),
    "weight decay": HeadSettings(hidden=(8,), epochs=3, weight_decay=0.05),
    "batch norm": HeadSettings(hidden=(8,), epochs=3, batch_norm=True),
    "polynomial": HeadSettings(hidden=(8,), epochs=3, loss="poly", alpha=2.0),
    "last batch smaller": HeadSettings(epochs=3, batch_size=7),
}


def alone(x, y, weights, seed, settings):
    """Train one head by itself, with torch's own layers and optimizer, from the same numbers."""
    heads = Heads(x.shape[1], 2, 1, [seed], settings)
    layers: list[nn.Module] = []
    for i, (weight, bias) in enumerate(zip(heads.weight, heads.bias, strict=True)):
        layer = nn.Linear(weight.shape[1], weight.shape[2])
        layer.weight.data, layer.bias.data = weight[0].detach().T.clone(), bias[0, 0].detach().clone()
        layers.append(layer)
        if i < len(heads.weight) - 1:
            layers += [*([nn.BatchNorm1d(weight.shape[2])] if settings.batch_norm else []), nn.ReLU()]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    w = torch.tensor(weights) / torch.tensor(weights).mean()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(x), generator=heads.generators[0]).split(settings.batch_size):
            z = net(x[rows])
            if settings.loss == "poly":
                losses = poly_tail_loss(z, y[rows], alpha=settings.alpha, reduction="none")
            else:
                losses = F.cross_entropy(z, y[rows], reduction="none")
            optimizer.zero_grad()
            (w[y[rows]] * losses).mean().backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize("case", CASES)
def test_every_head_is_the_one_trained_alone(case):
    x, y = clouds()
    settings = CASES[case]
    weights = ratio_weights([16, 1, 0.25])
    found = sweep_heads(x, y, weights, probes={"held out": (x, y)}, seeds=[3, 8], settings=settings, record=[3])
    for r, pair in enumerate(weights.values()):
        for s, seed in enumerate([3, 8]):
            net = alone(x, y, pair, seed, settings)
            with torch.no_grad():
                z = net(x)
            m, w = margins(z, y), torch.tensor(pair)[y]
            assert float(found.margin[0, r, s]) == pytest.approx(float(m.median()), abs=1e-4)
            assert float(found.effect[0, r, s]) == pytest.approx(boundary_shift(w, m), abs=1e-3)
            share = F.one_hot(z.argmax(1), 2).double().mean(0)
            assert torch.allclose(found.fraction["held out"][0, r, s], share)
            assert float(found.accuracy["held out"][0, r, s]) == float((z.argmax(1) == y).double().mean())


def test_heads_of_one_seed_differ_by_their_weights_alone():
    x, y = clouds()
    settings = HeadSettings(hidden=(8,), epochs=4, dropout=0.5)
    twice = {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [4.0, 1.0]}
    found = sweep_heads(x, y, twice, probes={"x": x}, seeds=3, settings=settings)
    assert torch.equal(found.margin[:, 0], found.margin[:, 1])
    assert not torch.equal(found.margin[:, 0], found.margin[:, 2])
    # and a head does not depend on what is trained beside it
    fewer = sweep_heads(x, y, {"c": [4.0, 1.0]}, probes={"x": x}, seeds=[1], settings=settings)
    assert torch.allclose(fewer.margin[:, 0, 0], found.margin[:, 2, 1], atol=1e-4)


def test_dropout_drops_so_many_units_and_only_in_training():
    heads = Heads(4, 2, 1, [0], HeadSettings(hidden=(10_000,), dropout=0.3))
    kept = heads._kept(torch.ones(1, 3, 10_000))
    assert float((kept > 0).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)
    x, _ = clouds(8)
    assert torch.equal(heads(x), heads(x))


def test_more_than_two_classes():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 3, generator=generator) + 3 * F.one_hot(y, 3)
    found = sweep_heads(x, y, {"1:1:1": [1, 1, 1], "1:1:50": [1, 1, 50]}, probes={"x": x}, seeds=2)
    assert found.fraction["x"].shape == (len(found.epochs), 2, 2, 3)
    assert torch.allclose(found.fraction["x"].sum(-1), torch.ones(len(found.epochs), 2, 2, dtype=torch.float64))
    assert (found.fraction["x"][0, 1, :, 2] > found.fraction["x"][0, 0, :, 2]).all()


def test_the_paper_on_digits():
    """16:1 against 1:16 on other digits: large at first, faded later, held by weight decay (47, 15 and 27 measured)."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    x = (x - x.mean()) / x.std()
    fit = torch.cat([(y == c).nonzero()[:120, 0] for c in (3, 5)])
    other = x[(y != 3) & (y != 5)]

    def effect(record, **settings):
        found = sweep_heads(
            x[fit],
            (y[fit] == 5).long(),
            ratio_weights([16, 1 / 16]),
            probes={"other": other},
            seeds=2,
            settings=HeadSettings(hidden=(128, 64), epochs=record[-1], **settings),
            record=record,
        )
        share = 100 * found.fraction["other"][..., 0].mean(2)
        return (share[:, 0] - share[:, 1]).tolist(), found.effect.mean((1, 2)).tolist()

    (early, later, late), meter = effect([10, 30, 100])
    assert early > 35
    assert 12 < later < 35
    assert late < 18
    assert meter[0] > meter[1] > meter[2]
    (held,), _ = effect([100], weight_decay=1e-2)
    assert held > late + 8


def test_a_head_that_diverges_is_recorded_as_such():
    x, y = clouds()
    with pytest.warns(NotFinite, match="heads have diverged"):
        found = sweep_heads(1e6 * x, y, ratio_weights([4]), probes={"x": x}, seeds=2,
                            settings=HeadSettings(hidden=(8, 8), epochs=3, lr=100.0))  # fmt: skip
    assert torch.isnan(found.fraction["x"][-1]).all()
    assert torch.isnan(found.train_accuracy[-1]).all()


def test_recorded_epochs_and_the_figure():
    assert spaced_epochs(1) == [1]
    assert spaced_epochs(1000)[-1] == 1000
    x, y = clouds()
    found = sweep_heads(x, y, ratio_weights([4, 1]), probes={"x": x}, seeds=2, settings=HeadSettings(epochs=6))
    assert found.epochs == spaced_epochs(6)
    figure = fading_figure(found, "x", title="x")
    assert figure.axes[0].get_xscale() == "log"
    with pytest.raises(InvalidArgument):
        fading_figure(found, "y")
    with pytest.raises(InvalidArgument, match="2 classes"):
        fading_figure(found, "x", of_class=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"hidden": (0,)},
        {"batch_size": 0},
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"alpha": float("nan")},
        {"hidden": (4,), "dropout": 1.0},
        {"dropout": 0.5},
        {"batch_norm": True},
        {"loss": "mse"},
        {"epochs": 1.5},
        {"hidden": 5},
        {"hidden": (4.5,)},
        {"lr": "0.1"},
        {"lr": float("inf")},
        {"hidden": (4,), "dropout": float("nan")},
    ],
)
def test_settings_outside_of_their_range(settings):
    with pytest.raises(InvalidArgument):
        HeadSettings(**settings)


def test_data_that_does_not_fit():
    x, y = clouds()
    weights, probes = ratio_weights([4, 1]), {"x": x}
    for features, labels, w, p, error in (
        (x, y[:-1], weights, probes, ShapeMismatch),
        (x, y.float(), weights, probes, ShapeMismatch),
        (x, y + 1, weights, probes, ShapeMismatch),
        (x, y - 1, weights, probes, ShapeMismatch),
        (x * float("nan"), y, weights, probes, InvalidArgument),
        (x, y, {}, probes, InvalidArgument),
        (x, y, {"a": [1.0, -1.0]}, probes, InvalidArgument),
        (x, y, {"a": [1.0, 1.0], "b": [1.0, 1.0, 1.0]}, probes, ShapeMismatch),
        (x, y, weights, {"x": x[:, :2]}, ShapeMismatch),
        (x, y, weights, {"x": x[:0]}, ShapeMismatch),
        (x, y, weights, {"x": x * float("inf")}, InvalidArgument),
        (x, y, weights, {"x": (x, y[:2])}, ShapeMismatch),
    ):
        with pytest.raises(error):
            sweep_heads(features, labels, w, probes=p, seeds=1)
    with pytest.raises(InvalidArgument):
        sweep_heads(x, y, weights, probes=probes, seeds=0)
    for more in ({"seeds": -1}, {"seeds": [0, -1]}, {"record": []}, {"record": [0]}, {"record": [10**6]}):
        with pytest.raises(InvalidArgument):
            sweep_heads(x, y, weights, probes=probes, **more)
    for bad in (0.0, -1.0, float("nan"), "16"):
        with pytest.raises(InvalidArgument):
            ratio_weights([bad])
