"""The callback as a loss and as a probe: equal to the hand-written term, right in what it logs, draws and keeps."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_methods.catalog  # noqa: F401 - short names in YAML
from lightning_methods.core.losses import LayerBatch
from lightning_methods.errors import (
    InvalidArgument,
    LayerNotFound,
    NoEffect,
    NotFinite,
    ShapeMismatch,
    TermOutweighsLoss,
)
from lightning_methods.snnl import (
    SoftNearestNeighborLoss,
    chance_level,
    class_entanglement,
    median_temperature,
    optimal_temperature,
    paper_temperature_step,
    soft_nearest_neighbor_loss,
)
from lightning_methods.snnl.callback import PRESETS
from tests.support.training import (
    CLASSES,
    Settings,
    TinyModule,
    assert_identical,
    fit,
    loader,
    made_data,
    quiet_trainer,
    same_state,
)


class Recorded(TinyModule):
    """Keeps the layers, the labels and the user's loss of every training step."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.steps: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        loss = super().total_loss(layers, y)
        if torch.is_grad_enabled():
            self.steps.append(({name: h.detach().clone() for name, h in layers.items()}, y, loss.detach()))
        return loss


class EachStep(Callback):
    """Keeps what is logged after every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def seeded(kind: Callable[..., TinyModule] = TinyModule, *args: Any) -> TinyModule:
    torch.manual_seed(1)
    return kind(*args)


def trained(folder: Path, *callbacks: Callback, module: TinyModule | None = None, **settings: Any) -> Any:
    """Return module and trainer of a fit with these callbacks."""
    data = settings.pop("data", None)
    module = seeded() if module is None else module
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **settings)
    fit(trainer, module, data)
    return module, trainer


def labelled(ignored: int) -> DataLoader:
    """Return the made data with every third label replaced."""
    x, y = made_data().tensors
    y = torch.where(torch.arange(len(y)) % 3 == 0, ignored, y)
    return DataLoader(TensorDataset(x, y), batch_size=8)


# -- as a loss: equal to the form written by hand ----------------------------------------------------------------------

BY_HAND: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "default": ({}, lambda h, y: -0.03 * soft_nearest_neighbor_loss(h, y, median_temperature(h))),
    "paper's preset": (
        {"preset": "paper", "weight": -0.5},
        lambda h, y: -0.5 * soft_nearest_neighbor_loss(h, y, 100.0),
    ),
    "optimal": (
        {"weight": 0.1, "temperature": "optimal"},
        lambda h, y: 0.1 * soft_nearest_neighbor_loss(h, y, optimal_temperature(h, y)[0]),
    ),
    "cosine": (
        {"weight": 0.2, "temperature": 0.5, "distance": "cosine"},
        lambda h, y: 0.2 * soft_nearest_neighbor_loss(h, y, 0.5, distance="cosine"),
    ),
    "chunked": (
        {"weight": 0.2, "temperature": 2.0, "chunk_size": 3},
        lambda h, y: 0.2 * soft_nearest_neighbor_loss(h, y, 2.0, chunk_size=3),
    ),
    "dict": (
        {"weight": {"sec*": 0.2}, "temperature": 2.0},
        lambda h, y: 0.2 * soft_nearest_neighbor_loss(h, y, 2.0),
    ),
    "ignoring": (
        {"weight": 0.2, "ignore_index": 1},
        lambda h, y: 0.2 * soft_nearest_neighbor_loss(h, y, median_temperature(h[y != 1]), ignore_index=1),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_the_term_written_by_hand(name: str, tmp_path: Path) -> None:
    options, term = BY_HAND[name]

    class ByHand(TinyModule):
        def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
            return self.own_loss(layers["head"], y) + term(layers["second"], y)

    ours, _ = trained(tmp_path, SoftNearestNeighborLoss("second", **options))
    theirs, _ = trained(tmp_path, module=seeded(ByHand))
    plain, _ = trained(tmp_path)
    assert_identical(ours, theirs)
    assert not torch.equal(ours.first[0].weight, plain.first[0].weight)


def test_layers_of_different_weight_add_up(tmp_path: Path) -> None:
    class ByHand(TinyModule):
        def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
            terms = [soft_nearest_neighbor_loss(layers[name], y, 2.0) for name in ("first", "head")]
            return self.own_loss(layers["head"], y) + (-0.1 * terms[0] + 0.3 * terms[1])

    weight = {"first": -0.1, "second": 0, "head": 0.3}
    snnl = SoftNearestNeighborLoss(["first", "second", "head"], weight=weight, temperature=2.0)
    ours, _ = trained(tmp_path, snnl)
    theirs, _ = trained(tmp_path, module=seeded(ByHand))
    assert_identical(ours, theirs)
    assert set(snnl.history) == {"first", "second", "head"}  # that of weight 0 is measured


@pytest.mark.parametrize(
    ("options", "weight", "temperature", "max_share"),
    [
        pytest.param({}, -0.03, "median", 0.1, id="default"),
        pytest.param({"preset": "safe"}, -0.03, "median", 0.1, id="safe"),
        pytest.param({"max_share": 0.5}, -0.03, "median", 0.5, id="safe, own share"),
        pytest.param({"weight": -0.03}, -0.03, "median", None, id="own weight"),
        pytest.param({"weight": -0.03, "max_share": 0.2}, -0.03, "median", 0.2, id="own weight and share"),
        pytest.param({"preset": "paper"}, -10.0, 100.0, None, id="paper"),
        pytest.param({"preset": "paper", "weight": -1.0}, -1.0, 100.0, None, id="paper, own weight"),
        pytest.param({"preset": "paper", "temperature": "paper"}, -10.0, "paper", None, id="paper, own temperature"),
        pytest.param({"weight": 0}, 0, "optimal", None, id="probe"),
        pytest.param({"weight": {"a": 0.0, "b": 0.0}}, {"a": 0.0, "b": 0.0}, "optimal", None, id="probe by layer"),
        pytest.param({"weight": 0, "temperature": 3.0}, 0, 3.0, None, id="probe, own temperature"),
        pytest.param({"weight": {"a": 0.0, "b": 1.0}}, {"a": 0.0, "b": 1.0}, "median", None, id="one of two"),
    ],
)
def test_presets(options: dict[str, Any], weight: Any, temperature: Any, max_share: float | None) -> None:
    snnl = SoftNearestNeighborLoss(["a", "b"], **options)
    assert (snnl.weight, snnl.temperature, snnl.max_share) == (weight, temperature, max_share)
    assert snnl.is_probe == (temperature in ("optimal", 3.0))
    assert set(PRESETS) == {"safe", "paper"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"preset": "pape"}, "preset='pape' is not known.*'paper'", id="preset"),
        pytest.param({"distance": "l2"}, "distance='l2' is not known", id="distance"),
        pytest.param({"temperature": "anneal"}, "temperature='anneal' is not known", id="temperature mode"),
        pytest.param({"temperature": 0}, "temperature=0: a positive number", id="zero temperature"),
        pytest.param({"temperature": math.nan}, "temperature=nan: a positive number", id="nan temperature"),
        pytest.param({"weight": math.nan}, "finite number is needed", id="nan weight"),
        pytest.param({"weight": {"a": math.inf}}, "weight of 'a' is inf", id="infinite weight"),
        pytest.param({"weight": True}, "finite number is needed", id="boolean weight"),
        pytest.param({"chunk_size": 0}, "chunk_size=0: at least 1", id="chunk_size"),
        pytest.param({"figures_every_n_epochs": 0}, "figures_every_n_epochs=0: at least 1", id="figures"),
        pytest.param({"every_n_steps": 0}, "every_n_steps=0", id="every_n_steps"),
        pytest.param({"warmup_steps": 3, "schedule": float}, "Give one of them", id="warm-up and schedule"),
        pytest.param({"log_on": "batch"}, "log_on='batch' is not known", id="log_on"),
        pytest.param({"pool": "max"}, "pool='max' is not known", id="pool"),
        pytest.param({"layers": []}, "names no layer", id="no layer"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        SoftNearestNeighborLoss(**{"layers": "a", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"layers": "secnod"}, "'secnod'.*Did you mean 'second'", id="layer"),
        pytest.param({"layers": "second", "weight": {"secund": 1.0}}, "weight has 'secund'.*'second'", id="weight"),
        pytest.param({"layers": ["first", "!nothing"]}, "'nothing'", id="exclusion"),
    ],
)
def test_layer_that_is_not_there_is_named_with_close_ones(options: Any, said: str, tmp_path: Path) -> None:
    module = seeded()
    with pytest.raises(LayerNotFound, match=said):
        trained(tmp_path, SoftNearestNeighborLoss(**options), module=module)
    assert "training_step" not in vars(module)


# -- what is logged ----------------------------------------------------------------------------------------------------


def temperature_of(mode: Any, h: Tensor, y: Tensor) -> float:
    if mode == "median":
        return float(median_temperature(h))
    return float(optimal_temperature(h, y)[0]) if mode == "optimal" else float(mode)


@pytest.mark.parametrize("mode", ["median", "optimal", 7.0])
def test_logged_values_are_those_of_the_step(mode: Any, tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss(["first", "second"], weight=0.05, temperature=mode, log_on="step")
    logged = EachStep()
    module, _ = trained(tmp_path, snnl, logged, module=seeded(Recorded), max_epochs=1)
    assert len(module.steps) == len(logged.rows) == 5
    for (layers, y, loss), row in zip(module.steps, logged.rows, strict=True):
        term = 0.0
        for layer in ("first", "second"):
            t = temperature_of(mode, layers[layer], y)
            value = float(soft_nearest_neighbor_loss(layers[layer], y, t))
            term += 0.05 * value
            assert row[f"snnl/value/{layer}"] == pytest.approx(value, rel=1e-5)
            assert row[f"snnl/normalized/{layer}"] == pytest.approx(value / float(chance_level(y)), rel=1e-5)
            assert row[f"snnl/temperature/{layer}"] == pytest.approx(t, rel=1e-5)
        counted = sum(1 for label in y if (y == label).sum() > 1)
        assert row["snnl/valid_fraction"] == pytest.approx(counted / len(y))
        assert row["snnl/loss"] == pytest.approx(term, rel=1e-5)
        assert row["snnl/total_loss"] == pytest.approx(float(loss) + term, rel=1e-5)
        assert row["train_loss"] == pytest.approx(float(loss), rel=1e-5)  # the user's own, without the term


@pytest.mark.parametrize("weight", [0, 0.05], ids=["probe", "loss"])
@pytest.mark.parametrize("log_on", ["epoch", "step"])
def test_logged_keys_are_the_documented_ones(weight: float, log_on: Any, tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss(["first", "second"], weight=weight, log_on=log_on, log_prefix="mine")
    _, trainer = trained(tmp_path, snnl)
    expected = {f"mine/{q}/{layer}" for q in ("value", "normalized", "temperature") for layer in ("first", "second")}
    expected |= {"mine/valid_fraction"} | ({"mine/loss", "mine/total_loss"} if weight else set())
    assert {key for key in trainer.callback_metrics if key.startswith("mine")} == expected
    assert not [key for key in trainer.callback_metrics if key.startswith("snnl")]


def test_epoch_means_weigh_batches_by_their_size(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", weight=0, temperature=3.0)
    module, trainer = trained(tmp_path, snnl, module=seeded(Recorded), data=loader(20), max_epochs=1)  # 8, 8 and 4
    values = [(len(y), float(soft_nearest_neighbor_loss(h["second"], y, 3.0))) for h, y, _ in module.steps]
    assert [n for n, _ in values] == [8, 8, 4]
    mean = sum(n * v for n, v in values) / 20
    assert float(trainer.callback_metrics["snnl/value/second"]) == pytest.approx(mean, rel=1e-5)


def test_ignored_samples_are_not_counted(tmp_path: Path) -> None:
    logged = EachStep()
    snnl = SoftNearestNeighborLoss("second", weight=0, temperature=2.0, ignore_index=-1, log_on="step")

    class Lenient(Recorded):
        def own_loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits, y, ignore_index=-1)

    module, _ = trained(tmp_path, snnl, logged, module=seeded(Lenient), data=labelled(-1), max_epochs=1)
    for (layers, y, _), row in zip(module.steps, logged.rows, strict=True):
        kept = y != -1
        h, classes = layers["second"][kept], y[kept]
        assert row["snnl/value/second"] == pytest.approx(float(soft_nearest_neighbor_loss(h, classes, 2.0)), rel=1e-5)
        counted = sum(1 for label in classes if (classes == label).sum() > 1)
        assert row["snnl/valid_fraction"] == pytest.approx(counted / len(y))
    assert snnl.class_pairs["second"].shape == (CLASSES, CLASSES)


@pytest.mark.parametrize("temperature", ["median", "optimal", "paper", 2.0])
def test_ignored_rows_reach_no_temperature(temperature: Any) -> None:
    x, y = made_data().tensors
    y = y.clone()
    y[::4] = -1
    kept = y != -1
    dirty = torch.where(kept[:, None], x, math.nan)
    pair = []
    for features, labels in ((dirty, y), (x[kept], y[kept])):
        snnl = SoftNearestNeighborLoss("l", weight=1.0, temperature=temperature, ignore_index=-1)
        snnl.see_labels(labels)
        batch = LayerBatch(features, labels, slice(0, len(labels)), 1)
        term, quantities = snnl.layer_term("l", batch, None)  # type: ignore[arg-type]
        pair.append([float(term), *(float(v) for v in quantities.values())])
    assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def test_labels_are_found_where_they_are_said_to_be(tmp_path: Path) -> None:
    x, y = made_data().tensors
    batches = [{"x": x[i : i + 8], "other": y[i : i + 8], "aim": F.one_hot(y[i : i + 8], CLASSES)} for i in (0, 8)]

    class FromDict(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.own_loss(self(batch["x"]), batch["other"])

    values = []
    for labels in ("aim", "other", lambda batch: batch["other"]):
        snnl = SoftNearestNeighborLoss("second", labels=labels)
        trained(tmp_path, snnl, module=seeded(FromDict), data=DataLoader(batches, batch_size=None))
        values.append(snnl.history)
    assert values[0] == values[1] == values[2]


# -- when it acts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        pytest.param({}, [1.0] * 5, id="constant"),
        pytest.param({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0], id="warm-up"),
        pytest.param({"schedule": lambda step: 2.0 - step / 2}, [2.0, 1.5, 1.0, 0.5, None], id="schedule"),
    ],
)
def test_weight_follows_its_schedule(options: dict[str, Any], factors: list[float | None], tmp_path: Path) -> None:
    logged = EachStep()
    snnl = SoftNearestNeighborLoss("second", weight=0.1, log_on="step", **options)
    trained(tmp_path, snnl, logged, max_epochs=1)
    for row, factor in zip(logged.rows, factors, strict=True):
        if factor is not None:  # at factor 0 there is no term to log
            assert row["snnl/loss"] / row["snnl/value/second"] == pytest.approx(0.1 * factor, rel=1e-5)
    assert float(logged.rows[3]["snnl/loss"]) > 0


def test_acts_in_every_nth_batch_only(tmp_path: Path) -> None:
    seen = []

    class Counting(SoftNearestNeighborLoss):
        def layer_term(self, layer: str, batch: LayerBatch, step: Any) -> Any:
            seen.append(step.batch_idx)
            return super().layer_term(layer, batch, step)

    snnl = Counting("second", every_n_steps=2, weight=0.1, temperature="paper")
    module, _ = trained(tmp_path, snnl, module=seeded(Recorded))
    assert seen == [0, 2, 4] * 2
    t: Any = 1.0
    for i, (layers, y, _) in enumerate(module.steps):
        if i % 5 % 2 == 0:
            t = paper_temperature_step(layers["second"], y, t)
    assert float(snnl.state_dict()["inverse_temperatures"]["second"]) == float(t)


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_papers_temperature_stays_positive_on_large_features(scale: float) -> None:
    # where the released code's becomes negative in the first step
    generator = torch.Generator().manual_seed(0)
    x, y = scale * torch.randn(100, 10, generator=generator), torch.arange(100) % 5
    snnl = SoftNearestNeighborLoss(["a", "b"], weight=-1.0, temperature="paper")
    for _ in range(20):
        snnl.see_labels(y)
        for layer, features in (("a", x), ("b", x / scale)):
            batch = LayerBatch(features.requires_grad_(), y, slice(0, 100), 1)
            term, quantities = snnl.layer_term(layer, batch, None)  # type: ignore[arg-type]
            assert math.isfinite(term.detach())
            assert float(quantities["temperature"]) > 0
    kept = snnl.state_dict()["inverse_temperatures"]
    assert float(kept["a"]) == pytest.approx(1e-6)  # as hot as it may be
    assert 0.9 < float(kept["b"]) < 1.1  # each layer has its own


# -- as a probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, "median", "paper", 2.0])
def test_probe_changes_no_bit(temperature: Any, tmp_path: Path) -> None:
    settings = Settings(stochastic=True)
    states = []
    for callbacks in ([SoftNearestNeighborLoss(["first", "head"], weight=0, temperature=temperature)], []):
        module, _ = trained(tmp_path, *callbacks, module=seeded(TinyModule, settings), data=loader(shuffle=True))
        states.append((module, torch.get_rng_state()))
    assert_identical(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_two_on_one_layer_need_two_prefixes(tmp_path: Path) -> None:
    module = seeded()
    mixed = [SoftNearestNeighborLoss("second", weight=0), SoftNearestNeighborLoss("sec*", weight=0.1)]
    with pytest.raises(InvalidArgument, match=r"\['second'\] under 'snnl'.*another log_prefix"):
        trained(tmp_path, *mixed, module=module)
    assert "training_step" not in vars(module)

    both = [
        SoftNearestNeighborLoss("second", weight=0.1),
        SoftNearestNeighborLoss("second", weight=0, log_prefix="probe"),
    ]
    _, trainer = trained(tmp_path, *both)
    alone = SoftNearestNeighborLoss("second", weight=0.1)
    trained(tmp_path, alone)
    assert both[0].history == alone.history
    assert {"snnl/value/second", "probe/value/second"} <= set(trainer.callback_metrics)
    assert both[0].state_key != both[1].state_key


# -- warnings ----------------------------------------------------------------------------------------------------------


def warned(folder: Path, snnl: SoftNearestNeighborLoss, module: TinyModule | None = None) -> list[Any]:
    module = seeded() if module is None else module
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(folder, callbacks=[snnl], max_epochs=5).fit(module, loader())  # 25 steps
    ours = (TermOutweighsLoss, NoEffect, NotFinite)
    return [w.category for w in caught if isinstance(w.message, ours)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [], id="default"),
        pytest.param({"weight": -50.0}, [TermOutweighsLoss], id="silly weight"),
        pytest.param({"weight": 0}, [], id="probe"),
    ],
)
def test_warns_where_the_term_outweighs_the_loss(options: dict[str, Any], expected: list[Any], tmp_path: Path) -> None:
    assert warned(tmp_path, SoftNearestNeighborLoss(["first", "second"], **options)) == expected


@pytest.mark.parametrize(("weight", "expected"), [(-0.03, [NoEffect]), (0, [])], ids=["loss", "probe"])
def test_warns_of_layers_that_are_not_trained(weight: float, expected: list[Any], tmp_path: Path) -> None:
    module = seeded()
    module.first.requires_grad_(False)
    assert warned(tmp_path, SoftNearestNeighborLoss("first", weight=weight), module) == expected


@pytest.mark.parametrize("weight", [0, 0.01], ids=["probe", "loss"])
def test_warns_of_features_that_are_not_finite(weight: float, tmp_path: Path) -> None:
    module = seeded()
    module.second[0].weight.data[0, 0] = math.nan
    snnl = SoftNearestNeighborLoss("second", weight=weight)
    assert set(warned(tmp_path, snnl, module)) == {NotFinite}
    assert math.isnan(snnl.history["second"]["value"][-1])


@pytest.mark.parametrize("units", [1.0, 1e-3, 1e-5])
def test_the_default_does_not_wreck_a_training_whatever_units_its_loss_has(units: float, tmp_path: Path) -> None:
    class Scaled(TinyModule):
        def own_loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return units * super().own_loss(logits, y)

        def configure_optimizers(self) -> Any:  # does not care for units
            return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-16)

    def accuracy(*callbacks: Any) -> float:
        module, _ = trained(tmp_path, *callbacks, module=seeded(Scaled), max_epochs=20)
        x, y = made_data().tensors
        return float((module.eval()(x).argmax(1) == y).float().mean())

    assert accuracy(SoftNearestNeighborLoss(["first", "second"])) >= accuracy() - 0.05
    if units == 1e-5:  # the test can tell: without its limit the default follows the term
        assert accuracy(SoftNearestNeighborLoss(["first", "second"], weight=-0.03)) < accuracy() - 0.2


# -- history, state and pictures ---------------------------------------------------------------------------------------


def test_history_holds_the_mean_of_every_epoch(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss(["second", "first"], weight=0, temperature=3.0)
    module, _ = trained(tmp_path, snnl, module=seeded(Recorded))
    assert list(snnl.history) == ["first", "second"]  # in the order in which the layers run
    for layer, series in snnl.history.items():
        values = [soft_nearest_neighbor_loss(h[layer], y, 3.0).double() for h, y, _ in module.steps]
        shares = [v / chance_level(y) for v, (_, y, _) in zip(values, module.steps, strict=True)]
        for name, each in (("value", values), ("normalized", shares)):
            means = [float(torch.stack(each[i : i + 5]).mean()) for i in (0, 5)]
            assert series[name] == pytest.approx(means, rel=1e-5)
        assert series["temperature"] == [3.0, 3.0]


def test_class_pairs_are_the_shares_of_the_last_epoch(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", weight=0)
    module, _ = trained(tmp_path, snnl, module=seeded(Recorded))
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for layers, y, _ in module.steps[5:]:
        h = layers["second"].double()
        best, _ = optimal_temperature(h, y)
        expected += class_entanglement(h, y, best, num_classes=CLASSES)
    assert torch.allclose(snnl.class_pairs["second"], expected, rtol=1e-6, atol=1e-9)


def remembered(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    snnl = SoftNearestNeighborLoss("l", weight=0, temperature=1.0)
    snnl.see_labels(y)
    snnl.layer_term("l", LayerBatch(x, y, slice(0, len(x)), 1), None)  # type: ignore[arg-type]
    return snnl.class_pairs


def test_class_pairs_of_large_batches_come_from_some_of_their_samples() -> None:
    # classes in a fixed order, which every so-manieth sample would miss
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 4
    x = torch.randn(2000, 3, generator=generator) + 2 * F.one_hot(y, 4)[:, :3]
    state = torch.get_rng_state()
    pairs = remembered(x, y)["l"]
    assert torch.equal(torch.get_rng_state(), state)
    whole = class_entanglement(x, y, optimal_temperature(x, y)[0])
    assert torch.allclose(pairs, whole, rtol=0, atol=0.08)
    assert torch.allclose(pairs.sum(1), torch.ones(4).double())


@pytest.mark.parametrize("y", [[0, 0, 10**9, 10**9], [-1, -1, 0, 0], [0]], ids=["many classes", "negative", "one"])
def test_class_pairs_are_left_out_where_there_is_no_picture(y: list[int]) -> None:
    assert remembered(torch.randn(len(y), 2), torch.tensor(y)) == {}


@pytest.mark.drawn
def test_figures_and_table_are_written(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss(["first", "second"], log_prefix="probe", weight=0)
    trained(tmp_path, snnl)
    names = ["layers_by_epoch_10.png", "curves_10.png", "class_pairs/first_10.png", "class_pairs/second_10.png"]
    names.append("layers_10.csv")
    assert [str(path.relative_to(tmp_path / "probe")) for path in snnl.figure_paths] == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in snnl.figure_paths[:4])
    with snnl.figure_paths[4].open() as file:
        rows = list(csv.reader(file))
    quantities = ("value", "normalized", "temperature")
    assert rows[0] == ["layer", *(f"{q}, {when} epoch" for q in quantities for when in ("first", "last"))]
    assert [row[0] for row in rows[1:]] == ["first", "second"]
    series = snnl.history["second"]
    assert [float(cell) for cell in rows[2][1:]] == pytest.approx([series[q][i] for q in quantities for i in (0, -1)])


def test_figures_during_the_fit(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", figures_every_n_epochs=2)
    trained(tmp_path, snnl, max_epochs=5)
    drawn = sorted(path.name for path in (tmp_path / "snnl").glob("curves_*.png"))
    assert drawn == ["curves_10.png", "curves_20.png", "curves_25.png"]


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}])
def test_short_runs_draw_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    if "barebones" in settings:
        settings = {**settings, "max_epochs": 1}
    snnl = SoftNearestNeighborLoss("second")
    trained(tmp_path, snnl, **settings)
    assert snnl.figure_paths == []
    assert not (tmp_path / "snnl").exists()


def test_a_second_fit_starts_a_fresh_history(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", temperature="paper")
    trained(tmp_path, snnl)
    first = snnl.state_dict()
    trained(tmp_path, snnl)
    assert same_state(snnl.state_dict(), first)
    assert len(snnl.history["second"]["value"]) == 2


def test_continuing_a_fit_keeps_the_history(tmp_path: Path) -> None:
    snnl, whole = (SoftNearestNeighborLoss("second", temperature="paper") for _ in range(2))
    module, trainer = trained(tmp_path, snnl)
    trainer.fit_loop.max_epochs = 4
    fit(trainer, module)
    trained(tmp_path, whole, max_epochs=4)
    assert len(snnl.history["second"]["value"]) == 4
    assert snnl.history["second"]["value"][:2] == whole.history["second"]["value"][:2]


@pytest.mark.parametrize("temperature", ["paper", "median"])
def test_resumed_fit_goes_on_where_it_stopped(temperature: Any, tmp_path: Path) -> None:
    def attached() -> SoftNearestNeighborLoss:
        return SoftNearestNeighborLoss(["first", "second"], temperature=temperature)

    straight, before, after = attached(), attached(), attached()
    module, _ = trained(tmp_path, straight, max_epochs=4)
    _, trainer = trained(tmp_path, before)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded()
    fit(quiet_trainer(tmp_path, callbacks=[after], max_epochs=4), resumed, ckpt_path=tmp_path / "half.ckpt")
    assert_identical(resumed, module)
    assert same_state(after.state_dict(), straight.state_dict())
    assert (after.state_dict()["inverse_temperatures"] != {}) == (temperature == "paper")


def test_state_is_read_by_the_safe_loader(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", temperature="paper")
    trained(tmp_path, snnl)
    torch.save(snnl.state_dict(), tmp_path / "state.pt")
    twin = SoftNearestNeighborLoss("second", temperature="paper")
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_state(twin.state_dict(), snnl.state_dict())
    assert {"inverse_temperatures", "history", "means", "class_pairs"} <= set(twin.state_dict())
    assert twin.history["second"]["value"] == snnl.history["second"]["value"] != []


# -- ranks, as far as one process can tell -----------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize(
    "cuts", [(0, 20, 40), (0, 3, 40), (0, 0, 40), (0, 7, 21, 40)], ids=["equal", "unequal", "one empty", "three"]
)
def test_mean_over_ranks_is_the_loss_of_the_joined_batch(cuts: tuple[int, ...], ignore_index: int | None) -> None:
    x, y = made_data().tensors
    x = x.double()
    if ignore_index is not None:
        y = y.clone()
        y[:3] = ignore_index  # in the unequal case a rank of ignored samples only
    whole = x.clone().requires_grad_()
    loss = soft_nearest_neighbor_loss(whole, y, 4.0, ignore_index=ignore_index)
    loss.backward()
    shared = x.clone().requires_grad_()
    ranks = len(cuts) - 1
    terms = []
    for r in range(ranks):
        snnl = SoftNearestNeighborLoss("l", weight=1.0, temperature=4.0, ignore_index=ignore_index)
        snnl.see_labels(y)
        batch = LayerBatch(shared, y, slice(cuts[r], cuts[r + 1]), ranks)
        terms.append(snnl.layer_term("l", batch, None)[0])  # type: ignore[arg-type]
    mean = torch.stack(terms).mean()
    mean.backward()
    assert float(mean.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.allclose(shared.grad, whole.grad, rtol=1e-9, atol=1e-14)


# -- convolutional layers ----------------------------------------------------------------------------------------------


class Convolutional(TinyModule):
    """`first` returns maps of 2 channels, which `second` pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 2, 3, padding=1))
        self.second = nn.Sequential(nn.Flatten(), nn.LazyLinear(16))


POOLS: dict[Any, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(1),
    "gap": lambda h: h.mean((2, 3)),
    "none": lambda h: h.flatten(1),  # flattened where distances are taken
}


@pytest.mark.parametrize("pool", POOLS)
def test_maps_are_pooled_as_asked(pool: Any, tmp_path: Path) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Kept(Convolutional):
        def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
            kept.append((layers["first"].detach(), y))
            return super().total_loss(layers, y)

    snnl = SoftNearestNeighborLoss("first", weight=0, temperature=1.0, pool=pool)
    torch.manual_seed(1)
    module = Kept()
    module.layers(torch.zeros(2, 8))
    trained(tmp_path, snnl, module=module, max_epochs=1)
    values = [float(soft_nearest_neighbor_loss(POOLS[pool](h), y, 1.0)) for h, y in kept]
    assert snnl.history["first"]["value"] == pytest.approx([sum(values) / len(values)], rel=1e-5)


def test_pool_that_gives_no_rows_is_refused(tmp_path: Path) -> None:
    snnl = SoftNearestNeighborLoss("second", pool=_sums)
    with pytest.raises(ShapeMismatch, match=r"\(8,\).*\(B, D\)"):
        trained(tmp_path, snnl)


def _sums(h: Tensor) -> Tensor:
    return h.sum(1)


# -- from YAML ---------------------------------------------------------------------------------------------------------

YAML = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: {name}
      init_args:
        layers: ["first", "second"]
        weight: {{first: -0.1, second: 0}}
        temperature: {temperature}
        labels: 1
        warmup_steps: 7
"""


@pytest.fixture
def no_argv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["train"])
    return None


@pytest.mark.usefixtures("no_argv")
@pytest.mark.parametrize("temperature", ["paper", 2.5])
@pytest.mark.parametrize("name", ["SoftNearestNeighborLoss", "lightning_methods.SoftNearestNeighborLoss"])
def test_built_from_yaml(name: str, temperature: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(name=name, temperature=temperature))
    cli = LightningCLI(
        TinyModule, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")]
    )
    (snnl,) = (c for c in cli.trainer.callbacks if isinstance(c, SoftNearestNeighborLoss))
    assert snnl.layers == ["first", "second"]
    assert snnl.weight == {"first": -0.1, "second": 0}
    assert (snnl.temperature, snnl.labels, snnl.warmup_steps) == (temperature, 1, 7)


@pytest.mark.usefixtures("no_argv")
def test_wrong_setting_in_yaml_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(name="SoftNearestNeighborLoss", temperature="-3.0"))
    with pytest.raises(ValueError, match=r"temperature=-3\.0: a positive number is needed"):
        LightningCLI(TinyModule, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")])
