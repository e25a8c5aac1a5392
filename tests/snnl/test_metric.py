"""Entanglement: sums over batches by hand, exact states, and life inside a LightningModule."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.snnl import (
    Entanglement,
    chance_level,
    median_temperature,
    optimal_temperature,
    soft_nearest_neighbor_loss,
)
from tests.snnl import oracle
from tests.support.processes import run_ranks
from tests.support.training import TinyModule, fit, loader, quiet_trainer

STATES = ("sum_loss", "sum_chance", "anchors")


def batches(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        y = torch.randint(3, (size,), generator=generator)
        found.append((torch.randn(size, 4, generator=generator, dtype=torch.float64) + y[:, None], y))
    return found


def anchors_of(y: Tensor) -> int:
    return sum(1 for label in y if (y == label).sum() > 1)


def updated(metric: Entanglement, data: list[tuple[Tensor, Tensor]]) -> Entanglement:
    for x, y in data:
        metric.update(x, y)
    return metric


LOSSES: dict[Any, Callable[[Tensor, Tensor], float]] = {
    2.0: lambda x, y: oracle.loss(x.numpy(), y.numpy(), 2.0),
    "median": lambda x, y: oracle.loss(x.numpy(), y.numpy(), float(median_temperature(x))),
    "optimal": lambda x, y: float(optimal_temperature(x, y)[1]),
}


@pytest.mark.parametrize("normalized", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("temperature", LOSSES)
def test_weighs_batches_by_their_anchors(temperature: Any, normalized: bool) -> None:
    data = batches(20, 7, 4, 12)
    loss = sum(anchors_of(y) * LOSSES[temperature](x, y) for x, y in data)
    divisor = sum(anchors_of(y) * (oracle.chance(y.numpy()) if normalized else 1) for _, y in data)
    value = updated(Entanglement(temperature, normalized=normalized), data).compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(loss / divisor, rel=1e-11)


def test_cosine_distance() -> None:
    ((x, y),) = batches(20)
    metric = updated(Entanglement(0.5, distance="cosine", normalized=False), [(x, y)])
    assert float(metric.compute()) == pytest.approx(oracle.loss(x.numpy(), y.numpy(), 0.5, "cosine"), rel=1e-11)


@pytest.mark.parametrize("temperature", LOSSES)
def test_leaves_out_ignored_samples(temperature: Any) -> None:
    ((x, y),) = batches(24)
    y[::5] = -1
    kept = y != -1
    clean = updated(Entanglement(temperature), [(x[kept], y[kept])]).compute()
    x[0] = math.nan
    dirty = updated(Entanglement(temperature, ignore_index=-1), [(x, y)]).compute()
    assert float(dirty) == pytest.approx(float(clean), rel=1e-12)


def test_reads_one_hot_and_flattens() -> None:
    ((x, y),) = batches(12)
    metric = updated(Entanglement(), [(x.reshape(12, 2, 2), nn.functional.one_hot(y, 3))])
    assert float(metric.compute()) == pytest.approx(float(updated(Entanglement(), [(x, y)]).compute()), rel=1e-12)


def test_forward_gives_the_value_of_the_batch_and_accumulates() -> None:
    first, second = batches(10, 16)
    metric = Entanglement()
    metric(*first)
    now = metric(*second)
    assert float(now) == pytest.approx(float(updated(Entanglement(), [second]).compute()), rel=1e-12)
    assert float(metric.compute()) == pytest.approx(
        float(updated(Entanglement(), [first, second]).compute()), rel=1e-12
    )


def test_batch_without_anchors_adds_nothing() -> None:
    data = batches(10)
    alone = (torch.full((3, 4), math.nan, dtype=torch.float64), torch.tensor([0, 1, 2]))
    metric = updated(Entanglement(temperature=1.0), [*data, alone])
    assert float(metric.compute()) == pytest.approx(float(updated(Entanglement(1.0), data).compute()), rel=1e-12)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("temperature", LOSSES)
def test_one_class_has_nothing_to_entangle(temperature: Any, normalized: bool) -> None:
    ((x, _),) = batches(6)
    metric = updated(Entanglement(temperature, normalized=normalized), [(x, torch.zeros(6).long())])
    assert float(metric.compute()) == 0.0
    assert float(metric.anchors) == 6


def test_batch_of_one_class_counts_in_the_mean() -> None:
    # its loss is 0, not missing
    ((x, y),) = batches(12)
    metric = updated(Entanglement(1.0, normalized=False), [(x, y), (x[:6], torch.full((6,), 2))])
    expected = anchors_of(y) * oracle.loss(x.numpy(), y.numpy(), 1.0) / (anchors_of(y) + 6)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 1, 2]], ids=["no update", "all alone"])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_compute_without_anchors_is_refused(labels: list[int]) -> None:
    metric = Entanglement()
    if labels:
        metric.update(torch.ones(len(labels), 2), torch.tensor(labels))
    with pytest.raises(InvalidArgument, match=r"no batch with two samples of one class.*larger batches"):
        metric.compute()


def test_nan_shows_in_the_value() -> None:
    ((x, y),) = batches(12)
    x[3, 1] = math.nan
    for temperature in LOSSES:
        assert math.isnan(updated(Entanglement(temperature), [(x, y)]).compute())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"temperature": 0.0}, "positive number.*'optimal'", id="zero temperature"),
        pytest.param({"temperature": math.nan}, "positive number", id="nan temperature"),
        pytest.param({"temperature": "paper"}, "temperature='paper' is not known", id="unknown temperature"),
        pytest.param({"distance": "l2"}, "distance='l2' is not known", id="unknown distance"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Entanglement(**settings)


def test_batches_that_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="soft"):
        Entanglement().update(torch.ones(4, 2), torch.full((4, 2), 0.5))
    with pytest.raises(ShapeMismatch, match=r"4 rows.*3 labels"):
        Entanglement().update(torch.ones(4, 2), torch.zeros(3).long())


# -- states ------------------------------------------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float16),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(device, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "set_dtype": lambda m: m.set_dtype(torch.float16) if isinstance(m, Entanglement) else m,
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a module"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_sums_stay_in_float64(cast: Callable[[nn.Module], Any], inside: bool) -> None:
    data = batches(20, 13)
    metric = updated(Entanglement(), data[:1])
    owner = nn.ModuleDict({"metric": metric, "linear": nn.Linear(1, 1)}) if inside else metric
    before = {name: getattr(metric, name).clone() for name in STATES}
    cast(owner)
    for name in STATES:
        assert getattr(metric, name).dtype == torch.float64
        assert torch.equal(getattr(metric, name), before[name])
    updated(metric, data[1:])
    assert float(metric.compute()) == pytest.approx(float(updated(Entanglement(), data).compute()), rel=1e-12)
    metric.reset()
    assert all(getattr(metric, name).dtype == torch.float64 for name in STATES)


def test_moves_with_its_module() -> None:
    metric = Entanglement().to("meta")
    assert {getattr(metric, name).device.type for name in STATES} == {"meta"}
    assert {default.device.type for default in metric._defaults.values()} == {"meta"}


def test_reset_starts_anew() -> None:
    first, second = batches(10, 16)
    metric = updated(Entanglement(), [first])
    metric.compute()
    metric.reset()
    assert float(metric.anchors) == 0
    assert torch.equal(updated(metric, [second]).compute(), updated(Entanglement(), [second]).compute())


@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_where_the_original_was(copy: Callable[[Entanglement], Entanglement]) -> None:
    first, second = batches(10, 16)
    metric = updated(Entanglement("median", ignore_index=9), [first])
    twin = copy(metric)
    assert torch.equal(updated(twin, [second]).compute(), updated(metric, [second]).compute())
    assert (twin.temperature, twin.ignore_index) == ("median", 9)


def test_state_dict_carries_the_sums_where_they_are_persistent() -> None:
    first, second = batches(10, 16)
    metric = updated(Entanglement(), [first])
    assert metric.state_dict() == {}
    metric.persistent(True)
    twin = Entanglement()
    twin.persistent(True)
    twin.load_state_dict(metric.state_dict())
    assert torch.equal(updated(twin, [second]).compute(), updated(metric, [second]).compute())


def test_merged_states_equal_one_metric_on_all_batches() -> None:
    data = batches(10, 16, 9, 12)
    left, right = updated(Entanglement(), data[:2]), updated(Entanglement(), data[2:])
    left.merge_state(right)
    assert float(left.compute()) == pytest.approx(float(updated(Entanglement(), data).compute()), rel=1e-13)


def own_share() -> Tensor:
    """Run on each rank: unequal numbers of batches, and on the second rank none with anchors."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    metric = Entanglement()
    data = batches(10, 16) if dist.get_rank() == 0 else [(torch.ones(2, 4).double(), torch.tensor([0, 1]))]
    value = updated(metric, data).compute()
    dist.destroy_process_group()
    return value


@pytest.mark.slow
def test_two_processes_share_one_value(tmp_path: Path) -> None:
    values = run_ranks("tests.snnl.test_metric:own_share", 2, tmp_path)
    expected = updated(Entanglement(), batches(10, 16)).compute()
    assert [float(v) for v in values] == pytest.approx([float(expected)] * 2, rel=1e-13)


def test_in_a_collection() -> None:
    data = batches(10, 16)
    kinds = {
        "raw": Entanglement(1.0, normalized=False),
        "best": Entanglement(),
        "cosine": Entanglement(distance="cosine"),
    }
    together = MetricCollection(deepcopy(kinds))
    for x, y in data:
        together.update(x, y)
    for name, value in together.compute().items():
        assert torch.equal(value, updated(kinds[name], data).compute())


class Measured(TinyModule):
    """Logs the metric object in validation, as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.entanglement = Entanglement()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        h = self.layers(x)["second"]
        if not self.trainer.sanity_checking:
            self.seen.append((h.detach(), y))
        self.entanglement(h, y)
        self.log("val/entanglement", self.entanglement)

    def on_validation_epoch_start(self) -> None:
        self.seen.clear()


def test_logged_from_a_validation_step(tmp_path: Path) -> None:
    module = Measured()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    fit(trainer, module)
    data = loader(20, batch_size=7)  # batches of 7, 7 and 6
    (result,) = trainer.validate(module, data, verbose=False)
    assert [len(y) for _, y in module.seen] == [7, 7, 6]
    expected = updated(Entanglement(), module.seen).compute()
    assert result["val/entanglement"] == pytest.approx(float(expected), rel=1e-6)


def test_value_of_one_batch_is_the_functions_quotient() -> None:
    ((x, y),) = batches(18)
    value = updated(Entanglement(3.0), [(x, y)]).compute()
    assert torch.allclose(value, soft_nearest_neighbor_loss(x, y, 3.0) / chance_level(y), rtol=1e-13, atol=0)
