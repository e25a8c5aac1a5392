"""What is read of a dataloader: each sample once, in order, in bounded memory, and refused where it cannot be used."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from lightning_methods import RobustGenerativeClassifier
from lightning_methods.errors import BatchFormat, InvalidArgument, LightningMethodsError, ShapeMismatch
from lightning_methods.rog.features import Collected, _fewer, _Reservoir, in_order
from tests.support.processes import run_ranks
from tests.support.training import FEATURES, TinyModule, loader, made_data, quiet_trainer

CLASSES, WIDTH = 4, 8


def fed(reservoir: _Reservoir, order: Tensor, batch: int = 100) -> Collected:
    """Return what is kept of samples that arrive in an order; the features of a sample are its index."""
    for index in order.split(batch):
        x = index[:, None].float().expand(-1, WIDTH)
        reservoir.add({"layer": x}, index % CLASSES, torch.zeros(len(index), CLASSES), index)
    return reservoir.joined(torch.device("cpu"), keep_unlabelled=False)


def test_the_reservoir_keeps_as_many_of_each_class_whatever_the_order_and_the_batches() -> None:
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    first = fed(_Reservoir(50, None, None, 3), torch.arange(4000))
    assert torch.bincount(first.labels).tolist() == [50] * CLASSES
    assert torch.equal(first.features["layer"][:, 0].long(), first.index)
    assert torch.equal(first.index, first.index.sort().values)
    assert first.left_out == 4000 - 200
    for other in (fed(_Reservoir(50, None, None, 3), order, 7), fed(_Reservoir(50, None, None, 3), order, 4000)):
        assert torch.equal(other.index, first.index)
    assert not torch.equal(fed(_Reservoir(50, None, None, 4), order).index, first.index)


def test_the_reservoir_draws_uniformly() -> None:
    times = torch.zeros(2000)
    for seed in range(200):
        times[fed(_Reservoir(50, None, None, seed), torch.arange(2000), 2000).index] += 1
    # 200 draws of one in ten: 20 times each, with a standard deviation of 4.2
    assert float(times.mean()) == pytest.approx(20)
    assert float(times.std()) == pytest.approx(4.24, abs=0.35)
    halves = times.view(2, 1000).sum(1)  # of the data
    assert float((halves[0] - halves[1]).abs()) < 4 * (40_000 * 0.9) ** 0.5


def test_processes_that_keep_the_least_of_their_shares_keep_the_least_of_all() -> None:
    index = torch.arange(3000)
    table = {"index": index, "labels": index % 3}
    whole = _fewer(table, 40, 0)
    shares = [_fewer({k: v[rank::2] for k, v in table.items()}, 40, 0) for rank in range(2)]
    joined = _fewer({k: torch.cat([share[k] for share in shares]) for k in table}, 40, 0)
    assert torch.equal(joined["index"].sort().values, whole["index"])


def test_features_stay_within_their_bytes_while_they_are_read() -> None:
    reservoir, most = _Reservoir(None, 100 * CLASSES * WIDTH * 4, None, 0), 0
    for index in torch.arange(20_000).split(64):
        x = torch.zeros(len(index), WIDTH)
        reservoir.add({"layer": x}, index % CLASSES, torch.zeros(len(index), CLASSES), index)
        most = max(most, sum(part.nbytes for part in reservoir.rows["x/layer"]))
    assert most <= 1.25 * reservoir.max_bytes + 64 * WIDTH * 4
    assert reservoir.quota() == 100
    found = reservoir.joined(torch.device("cpu"), keep_unlabelled=False)
    assert found.features["layer"].nbytes <= reservoir.max_bytes
    assert torch.bincount(found.labels).tolist() == [100] * CLASSES


def bounded(**settings: Any) -> dict[str, Any]:
    """Return what a callback with few samples says of the made data; in a process of its own, or one of two."""
    together = settings.pop("together", False)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        rog = RobustGenerativeClassifier(["first", "second"], max_per_class=9, train=loader(90), validation=loader(40))
        own = {"strategy": "ddp", "devices": 2} if together else {}
        trainer = quiet_trainer(folder, callbacks=[rog], **own)
        trainer.validate(TinyModule(), loader(32), verbose=False)
    assert rog.audit is not None
    assert rog.ensemble is not None
    return {"index": rog.audit.index, **rog.ensemble.state_dict()}


def bounded_together() -> dict[str, Any]:
    return bounded(together=True)


@pytest.mark.slow
def test_two_processes_fit_to_the_same_samples_as_one(tmp_path: Path) -> None:
    alone = bounded()
    assert len(alone["index"]) == 27
    for rank in run_ranks("tests.rog.test_features:bounded_together", 2, tmp_path / "ranks"):
        assert torch.equal(rank["index"], alone["index"])
        for name, value in alone.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": True},
        {"sampler": SubsetRandomSampler(range(20))},
        {"sampler": [3, 3, 1, 4]},
        {"batch_sampler": BatchSampler(RandomSampler(range(20)), 6, drop_last=True)},
        {"sampler": BatchSampler(RandomSampler(range(20)), 6, drop_last=True), "batch_size": None},
    ],
    ids=["shuffled", "subset", "own sampler", "batch sampler", "whole batches"],
)
def test_each_sample_once_and_in_order(settings: dict[str, Any]) -> None:
    data = TensorDataset(torch.arange(20), torch.arange(20) % 3)
    read, places = in_order(DataLoader(data, **settings))
    expected = [1, 3, 4] if settings.get("sampler") == [3, 3, 1, 4] else list(range(20))
    assert torch.cat([x for x, _ in read]).tolist() == expected
    assert places.tolist() == expected


def test_items_that_are_whole_batches_stay_as_they_are() -> None:
    items = [(torch.arange(6) + 6 * i, torch.zeros(6)) for i in range(3)]
    read, places = in_order(DataLoader(items, batch_size=None, shuffle=True))  # type: ignore[arg-type]
    assert torch.cat([x for x, _ in read]).tolist() == list(range(18))
    assert places is None


class Tested(TinyModule):
    """Has a test step."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.own_loss(self(batch[0]), batch[1]))


class Varying(TinyModule):
    """The features of a batch are as many as it has samples."""

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        found = super().layers(x)
        self.wide(x)
        return found

    def __init__(self) -> None:
        super().__init__()
        self.wide = Wide()


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), len(x))


def odd(x: Any, y: Any) -> DataLoader:
    return DataLoader(TensorDataset(x, y), 10)


X, Y = made_data(40).tensors


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"train": odd(X, torch.rand(40))}, BatchFormat, "labels="),
        ({"train": odd(X, torch.zeros(40, 2, dtype=torch.int64))}, BatchFormat, "labels="),
        ({"train": DataLoader(X, 10)}, LightningMethodsError, "No targets were found"),
        ({"train": odd(X, Y.clone().fill_(2))}, InvalidArgument, "at least two"),
        ({"train": odd(X / 0, Y)}, InvalidArgument, "NaN or infinity"),
        ({"train": loader(35, batch_size=10), "layers": ["wide"]}, ShapeMismatch, "features per sample"),
        ({"train": odd(X, Y), "labels": "target"}, LightningMethodsError, "target"),
        ({"train": odd(X, Y), "pool": lambda x: x.sum()}, ShapeMismatch, "a row for each"),
    ],
    ids=["float labels", "two labels", "no labels", "one class", "infinite", "width varies", "key", "pool"],
)
def test_what_cannot_be_used_is_told(settings: dict[str, Any], kind: Any, says: str, tmp_path: Path) -> None:
    module = Varying()
    rog = RobustGenerativeClassifier(**{"layers": ["first"], **settings})
    with pytest.raises(kind, match=says):
        quiet_trainer(tmp_path, callbacks=[rog]).validate(module, loader(), verbose=False)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_module_that_gives_no_logits_is_told(tmp_path: Path) -> None:
    class Silent(TinyModule):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(ShapeMismatch, match="logits"):
        quiet_trainer(tmp_path, callbacks=[RobustGenerativeClassifier(["first"], train=odd(X, Y))]).validate(
            Silent(), odd(X, Y), verbose=False
        )


def test_labels_that_are_no_class_are_left_out_and_told(tmp_path: Path) -> None:
    y = Y.clone()
    y[:3] = torch.tensor([-1, 255, -100])
    rog = RobustGenerativeClassifier(["first"], train=odd(X, y), validation=odd(X, y))
    with pytest.warns(UserWarning, match="3 training samples have no label"):
        quiet_trainer(tmp_path, callbacks=[rog]).validate(TinyModule(), loader(), verbose=False)
    assert rog.audit is not None
    assert rog.audit.index.tolist() == list(range(3, 40))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_other_whole_types_and_in_a_column(dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for y in (Y, Y.to(dtype)[:, None]):
        torch.manual_seed(0)
        rog = RobustGenerativeClassifier(["first"], train=odd(X, y), validation=odd(X, Y))
        quiet_trainer(tmp_path, callbacks=[rog]).validate(TinyModule(), loader(), verbose=False)
        assert rog.ensemble is not None
        found.append(rog.ensemble.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_outliers_are_told_from_the_test_data(tmp_path: Path) -> None:
    far = torch.randn(60, FEATURES, generator=torch.Generator().manual_seed(1)) * 8 + 30
    rog = RobustGenerativeClassifier(["first", "second"], train=loader(200), validation=loader(60))
    rog.outliers = DataLoader(far, 20)
    (result,) = quiet_trainer(tmp_path, callbacks=[rog]).test(Tested(), loader(80), verbose=False)
    assert result["rog/test/auroc_outliers"] > 0.98
    assert 0 <= result["rog/test/auroc_softmax"] <= 1
    rog.outliers = loader(80)  # the test data themselves
    (same,) = quiet_trainer(tmp_path, callbacks=[rog]).test(Tested(), loader(80), verbose=False)
    assert same["rog/test/auroc_outliers"] == pytest.approx(0.5, abs=1e-6)
