"""DeepKNN against neighbours found by sorting, and what it does to a trainer, a module and random numbers: nothing."""

from __future__ import annotations

import copy
import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.errors import BatchFormat, InvalidArgument, LayerNotFound, ShapeMismatch, UnsupportedTraining
from lightning_methods.snnl import DeepKNN, NeighborScores
from lightning_methods.snnl import deep_knn as deep_knn_module
from tests.support.training import FEATURES, Settings, TinyModule, fingerprint, quiet_trainer

LAYERS = ("first", "second")
TRAIN, CALIBRATION, TEST = 60, 30, 25


def drawn(samples: int, seed: int, *, offset: float = 0.0) -> TensorDataset:
    """Return three overlapping clusters, or outliers beside them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (samples,), generator=generator)
    x = torch.randn(samples, FEATURES, generator=generator) + 1.5 * nn.functional.one_hot(y, FEATURES) + offset
    return TensorDataset(x, y)


class Data(pl.LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.parts = [drawn(n, 10 * seed + i) for i, n in enumerate((TRAIN, CALIBRATION, TEST))]
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=7)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], batch_size=8)


class Classifying(TinyModule):
    def __init__(self, settings: Settings | None = None) -> None:
        torch.manual_seed(1)
        super().__init__(settings)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.own_loss(self(batch[0]), batch[1]))


def run(
    folder: Path, callback: DeepKNN, *, module: Any = None, data: Any = None, times: int = 1, **settings: Any
) -> dict[str, float]:
    """Return what `trainer.test` logged."""
    module = Classifying() if module is None else module
    data = Data() if data is None else data
    for _ in range(times):
        trainer = quiet_trainer(folder, callbacks=[callback], **settings)
        (result,) = trainer.test(module, data, verbose=False)
    return result


# -- by sorting --------------------------------------------------------------------------------------------------------


def layer_features(x: Tensor, layers: tuple[str, ...] = LAYERS) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = Classifying().eval().layers(x)
    return {name: found[name].double().numpy() for name in layers}


def votes(
    queries: dict[str, np.ndarray], bank: dict[str, np.ndarray], labels: np.ndarray, k: int, distance: str
) -> np.ndarray:
    """Return how many neighbours in all layers bear each class."""
    count = len(next(iter(queries.values())))
    found = np.zeros((count, 3), dtype=int)
    for layer, rows in queries.items():
        for i, row in enumerate(rows):
            if distance == "sqeuclidean":
                far = [float(((row - other) ** 2).sum()) for other in bank[layer]]
            else:
                lengths = np.linalg.norm(bank[layer], axis=1) * np.linalg.norm(row)
                far = list(1 - bank[layer] @ row / lengths)
            for nearest in np.argsort(far, kind="stable")[:k]:
                found[i, labels[nearest]] += 1
    return found


def expected(distance: str, k: int, layers: tuple[str, ...] = LAYERS, quota: int = 10**9, data: Any = None) -> Any:
    """Return predicted classes, share of neighbours, p-values and test labels, from the definitions."""
    train, calibration, test = (data or Data()).parts
    chosen, seen = [], dict.fromkeys(range(3), 0)
    for i, label in enumerate(train.tensors[1].tolist()):
        if seen[label] < quota:
            seen[label] += 1
            chosen.append(i)
    bank = layer_features(train.tensors[0][chosen], layers)
    labels = train.tensors[1][chosen].numpy()
    against = {
        name: len(layers) * k - votes(layer_features(part.tensors[0], layers), bank, labels, k, distance)
        for name, part in (("calibration", calibration), ("test", test))
    }
    own = np.take_along_axis(against["calibration"], calibration.tensors[1].numpy()[:, None], 1)[:, 0]
    p_values = np.array([[(1 + (own >= a).sum()) / (1 + len(own)) for a in row] for row in against["test"]])
    with torch.no_grad():
        logits = Classifying().eval()(test.tensors[0])
    predicted = logits.argmax(1).numpy()
    shares = 1 - np.take_along_axis(against["test"], predicted[:, None], 1)[:, 0] / (len(layers) * k)
    return predicted, shares, p_values, test.tensors[1].numpy(), logits.softmax(1).amax(1).numpy()


@pytest.mark.parametrize(
    ("k", "layers"), [(1, LAYERS), (5, LAYERS), (5, ("second",)), (TRAIN, LAYERS)], ids=["1", "5", "one layer", "all"]
)
@pytest.mark.parametrize("distance", ["cosine", "sqeuclidean"])
def test_scores_equal_those_by_sorting(distance: Any, k: int, layers: tuple[str, ...], tmp_path: Path) -> None:
    callback = DeepKNN(list(layers), k=k, distance=distance)
    logged = run(tmp_path, callback)
    predicted, shares, p_values, labels, softmax = expected(distance, k, layers)
    scores = callback.test_scores
    assert scores is not None
    assert scores.predicted.tolist() == predicted.tolist()
    assert scores.softmax.numpy() == pytest.approx(softmax, rel=1e-6)
    assert scores.same_class_neighbors.numpy() == pytest.approx(shares, abs=1e-6)
    assert scores.p_values.numpy() == pytest.approx(p_values, rel=1e-12)
    assert scores.credibility.numpy() == pytest.approx(p_values.max(1), rel=1e-12)
    assert scores.confidence.numpy() == pytest.approx(1 - np.sort(p_values, 1)[:, -2], rel=1e-12)
    right = p_values.argmax(1) == labels
    assert logged["deep_knn/accuracy"] == pytest.approx(right.mean(), rel=1e-6)
    assert logged["deep_knn/network_accuracy"] == pytest.approx((predicted == labels).mean(), rel=1e-6)
    assert logged["deep_knn/credibility"] == pytest.approx(p_values.max(1).mean(), rel=1e-6)
    assert logged["deep_knn/same_class_neighbors"] == pytest.approx(shares.mean(), rel=1e-6)


def test_no_more_than_the_quota_of_a_class_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in the order of the loader
    monkeypatch.setattr(Data, "train_dataloader", lambda self: DataLoader(self.parts[0], batch_size=16))
    callback = DeepKNN(list(LAYERS), k=4, max_per_class=5)
    run(tmp_path, callback)
    assert callback.test_scores is not None
    assert callback.test_scores.p_values.numpy() == pytest.approx(expected("cosine", 4, quota=5)[2], rel=1e-12)


def test_queries_in_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = DeepKNN("second", k=5), DeepKNN("second", k=5)
    run(tmp_path, whole)
    monkeypatch.setattr(deep_knn_module, "_QUERIES_AT_A_TIME", 3)
    run(tmp_path, pieces)
    assert whole.test_scores is not None
    assert pieces.test_scores is not None
    assert torch.equal(whole.test_scores.p_values, pieces.test_scores.p_values)


def test_p_values_are_valid_on_exchangeable_data(tmp_path: Path) -> None:
    # P(p of the true class <= e) <= e; over 12 draws the means are within sampling error
    found = []
    for seed in range(12):
        callback = DeepKNN("second", k=9)
        data = Data(seed)
        run(tmp_path, callback, data=data)
        assert callback.test_scores is not None
        found.append(callback.test_scores.p_values.gather(1, data.parts[2].tensors[1][:, None])[:, 0])
    p = torch.cat(found)
    assert float(p.min()) >= 1 / (1 + CALIBRATION)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        # twice the spread of the mean over draws, which share their calibration samples
        spread = 2 * math.sqrt(level * (1 - level) * (1 / TEST + 1 / CALIBRATION) / 12)
        assert float((p <= level).double().mean()) <= level + spread


def test_confidence_of_one_class_is_one() -> None:
    scores = NeighborScores(torch.zeros(2), torch.ones(2), torch.ones(2), torch.tensor([[0.3], [0.4]]))
    assert scores.credibility.tolist() == pytest.approx([0.3, 0.4])
    assert scores.confidence.tolist() == [1.0, 1.0]


# -- outliers ----------------------------------------------------------------------------------------------------------


def auroc(inside: Tensor, outside: Tensor) -> float:
    wins = [(a > b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist()]
    return sum(wins) / len(wins)


class Outliers(Data):
    def __init__(self) -> None:
        super().__init__()
        self.prepared = False

    def prepare_data(self) -> None:
        self.prepared = True

    def test_dataloader(self) -> DataLoader:
        return DataLoader(drawn(20, 99, offset=-3.0), batch_size=6)


@pytest.mark.parametrize("kind", ["loader", "inputs only", "datamodule"])
def test_outliers_are_told_apart(kind: str, tmp_path: Path) -> None:
    source: Any = Outliers()
    if kind == "loader":
        outliers = source.test_dataloader()
    elif kind == "inputs only":
        outliers = DataLoader(drawn(20, 99, offset=-3.0).tensors[0], batch_size=6)
    else:
        outliers = source
    callback = DeepKNN("first", k=7, outliers=outliers)
    logged = run(tmp_path, callback)
    inside, outside = callback.test_scores, callback.outlier_scores
    assert inside is not None
    assert outside is not None
    assert len(outside.predicted) == 20
    for name in ("same_class_neighbors", "credibility", "softmax"):
        value = auroc(getattr(inside, name), getattr(outside, name))
        assert logged[f"deep_knn/auroc_{name}"] == pytest.approx(value, abs=1e-6)
    if kind == "datamodule":
        assert (source.prepared, source.stages) == (True, ["test"])


def test_logged_keys_are_the_documented_ones(tmp_path: Path) -> None:
    plain = {"accuracy", "network_accuracy", "credibility", "same_class_neighbors", "ece"}
    more = {"auroc_same_class_neighbors", "auroc_credibility", "auroc_softmax"}
    for outliers, names in ((None, plain), (Outliers(), plain | more)):
        logged = run(tmp_path, DeepKNN("second", k=3, outliers=outliers))
        assert {key for key in logged if key.startswith("deep_knn")} == {f"deep_knn/{name}" for name in names}


def test_scores_that_are_not_finite_give_no_auroc(tmp_path: Path) -> None:
    class Broken(Classifying):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.nan

    logged = run(tmp_path, DeepKNN("second", k=3, outliers=Outliers()), module=Broken())
    assert math.isnan(logged["deep_knn/auroc_softmax"])
    assert math.isfinite(logged["deep_knn/auroc_credibility"])


# -- what stays as it was ----------------------------------------------------------------------------------------------


def test_module_modes_and_random_numbers_stay(tmp_path: Path) -> None:
    states = []
    for callbacks in ([DeepKNN("first", k=3)], []):
        module = Classifying(Settings(stochastic=True)).train()
        module.second.eval()
        before = copy.deepcopy(module.state_dict())
        trainer = quiet_trainer(tmp_path, callbacks=callbacks)
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        trainer.test(module, Data(), verbose=False)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        states.append((fingerprint(module), torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])
    assert np.array_equal(states[0][2], states[1][2])


def test_testing_twice_gives_the_same(tmp_path: Path) -> None:
    callback = DeepKNN("second", k=5)
    once = run(tmp_path, callback)
    first = callback.test_scores
    twice = run(tmp_path, callback)
    assert once == twice
    assert first is not None
    assert callback.test_scores is not None
    assert torch.equal(first.p_values, callback.test_scores.p_values)


class Ragged(Classifying):
    """One of its layers becomes wider after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.width = nn.Identity()
        self.batches = batches

    def forward(self, x: Tensor) -> Tensor:
        self.batches -= 1
        self.width(torch.ones(len(x), 4 if self.batches >= 0 else 5))
        return super().forward(x)


@pytest.mark.parametrize("batches", [7, 8], ids=["in the training data", "in the calibration data"])
def test_after_an_exception_the_module_is_what_it_was(batches: int, tmp_path: Path) -> None:
    module = Ragged(batches).train()  # 4 batches of test data, 4 of training data
    with pytest.raises(ShapeMismatch, match=r"5 features per sample, and 4 for") as caught:
        run(tmp_path, DeepKNN("width", k=3), module=module)
    # already while the traceback holds every frame
    assert caught.value.__traceback__ is not None
    assert not [name for name, m in module.named_modules() if m._forward_hooks]


# -- the score of a batch ----------------------------------------------------------------------------------------------


def test_score_of_a_batch_equals_that_of_the_test(tmp_path: Path) -> None:
    callback, module, data = DeepKNN(list(LAYERS), k=5), Classifying(), Data()
    run(tmp_path, callback, module=module, data=data)
    module.train()
    state = torch.get_rng_state()
    scores = callback.score(module, data.parts[2].tensors[0][:6])
    assert callback.test_scores is not None
    assert torch.equal(scores.p_values, callback.test_scores.p_values[:6])
    assert torch.equal(scores.predicted, callback.test_scores.predicted[:6])
    assert module.training
    assert not module.first._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_score_follows_the_module_to_another_device(tmp_path: Path) -> None:
    # neighbours found on one device, the module later on another: `meta` shows where the search looks
    callback = DeepKNN("second", k=5)
    run(tmp_path, callback)
    bank = callback._banks["second"]
    assert bank.votes(torch.ones(3, 16, device="meta"), 5, 3).device.type == "meta"
    assert {rows.device.type for rows, _ in bank.pieces} == {"meta"}


def test_score_before_the_test_is_refused() -> None:
    with pytest.raises(UnsupportedTraining, match=r"no neighbours yet.*trainer\.test"):
        DeepKNN("first").score(Classifying(), torch.ones(2, FEATURES))


def test_fit_may_be_called_alone(tmp_path: Path) -> None:
    callback, module = DeepKNN("second", k=5), Classifying()
    trainer = quiet_trainer(tmp_path)
    data = Data()
    trainer.test(module, data, verbose=False)
    callback.train, callback.calibration = data.train_dataloader(), data.val_dataloader()
    callback.fit(trainer, module)
    assert callback.score(module, torch.ones(2, FEATURES)).p_values.shape == (2, 3)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"k": 0}, "k=0: at least 1", id="k"),
        pytest.param({"max_per_class": 0}, "max_per_class=0: at least 1", id="max_per_class"),
        pytest.param({"distance": "l2"}, "distance='l2' is not known", id="distance"),
        pytest.param({"layers": []}, "names no layer", id="layers"),
        pytest.param({"pool": "max"}, "pool='max' is not known", id="pool"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        DeepKNN(**{"layers": "first", **options})


class WithoutValidation(Data):
    """Has no validation data."""

    val_dataloader = pl.LightningDataModule.val_dataloader  # type: ignore[assignment]


def relabelled(part: int, label: int) -> Data:
    data = Data()
    x, y = data.parts[part].tensors
    data.parts[part] = TensorDataset(x, torch.where(torch.arange(len(y)) == 3, label, y))
    return data


class ThreeDimensional(Classifying):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", 0.0)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:, :, None]


class Pair(ThreeDimensional):
    def forward(self, x: Tensor) -> Any:
        return TinyModule.forward(self, x), x


@pytest.mark.parametrize(
    ("options", "given", "error", "said"),
    [
        pytest.param({"k": 61}, {}, InvalidArgument, r"k=61 neighbours.*of 60 training samples.*Lower k", id="k"),
        pytest.param({"k": 7, "max_per_class": 2}, {}, InvalidArgument, r"k=7.*of 6 training", id="quota"),
        pytest.param({"k": 17}, {"limit_train_batches": 1}, InvalidArgument, r"of 16 training", id="limit"),
        pytest.param({}, {"data": WithoutValidation()}, UnsupportedTraining, r"no val dataloader", id="no calibration"),
        pytest.param({}, {"limit_val_batches": 0}, InvalidArgument, r"hold no batch.*calibration=", id="empty"),
        pytest.param({"train": "all"}, {}, InvalidArgument, r"loader='all' is not known", id="loader"),
        pytest.param({"layers": "frist"}, {}, LayerNotFound, r"Did you mean 'first'", id="layer"),
        pytest.param({}, {"module": ThreeDimensional()}, ShapeMismatch, r"\(16, 3, 1\); logits \(B, C\)", id="3-D"),
        pytest.param({}, {"module": Pair()}, ShapeMismatch, r"returned tuple; logits", id="tuple"),
        pytest.param({}, {"data": relabelled(0, -100)}, InvalidArgument, r"training data is -100", id="train -100"),
        pytest.param({}, {"data": relabelled(1, -1)}, InvalidArgument, r"calibration data is -1", id="val -1"),
        pytest.param({"labels": "y"}, {}, BatchFormat, r"targets were said to be under 'y'", id="labels"),
    ],
)
def test_what_cannot_be_tested_is_refused(options: Any, given: Any, error: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        run(tmp_path, DeepKNN(**{"layers": "first", "k": 3, **options}), **given)


def test_class_that_was_not_trained_on_conforms_with_nothing(tmp_path: Path) -> None:
    # of the calibration data one sample bears a class without neighbours
    callback = DeepKNN("second", k=3)
    run(tmp_path, callback, data=relabelled(1, 4))
    assert callback._calibration.tolist().count(3) >= 1
    assert len(callback._calibration) == CALIBRATION


def test_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_knn_module, "world_size", lambda: 2)
    with pytest.raises(UnsupportedTraining, match=r"given 2.*Trainer\(devices=1\)"):
        DeepKNN("first").fit(None, Classifying())


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.drawn
def test_figures_and_table_are_written(tmp_path: Path) -> None:
    callback = DeepKNN("second", k=5, outliers=Outliers())
    run(tmp_path, callback)
    names = [path.name.rsplit("_", 1)[0] for path in callback.figure_paths]
    assert names == ["reliability", "same_class_neighbors", "least_credible"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in callback.figure_paths[:2])
    with callback.figure_paths[2].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    scores = callback.test_scores
    assert scores is not None
    credibility = [float(row["credibility"]) for row in rows]
    assert credibility == sorted(credibility)
    for row in rows:
        i = int(row["sample"])
        assert int(row["network predicts"]) == int(scores.predicted[i])
        assert float(row["credibility"]) == pytest.approx(float(scores.credibility[i]))
        assert int(row["label"]) == int(Data().parts[2].tensors[1][i])


def test_fast_dev_run_reads_one_batch_of_each(tmp_path: Path) -> None:
    callback = DeepKNN("second", k=5)
    run(tmp_path, callback, fast_dev_run=True)
    assert callback.test_scores is not None
    assert len(callback.test_scores.predicted) == 8
    assert len(callback._calibration) == 7
    assert callback.figure_paths == []


def test_scores_are_frozen() -> None:
    scores = NeighborScores(*(torch.zeros(1) for _ in range(3)), torch.ones(1, 2))
    assert replace(scores, softmax=torch.ones(1)).softmax.tolist() == [1.0]
    with pytest.raises(AttributeError):
        scores.softmax = torch.ones(1)  # type: ignore[misc]
