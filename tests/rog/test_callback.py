"""The callback on a network that memorised wrong labels: it classifies better, and changes nothing."""

from __future__ import annotations

import copy
import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import Classifier, DigitsDataModule, NoisyLabels, RobustGenerativeClassifier
from lightning_methods.errors import InvalidArgument, LayerNotFound, UnsupportedTraining
from lightning_methods.models import MLP
from lightning_methods.rog import write_audit
from lightning_methods.rog.features import varies
from lightning_methods.rog.surroundings import blocks_before_classifier
from tests.support.training import FEATURES, TinyModule, fingerprint, fit, loader, quiet_trainer

NOISE = 0.4


def digits() -> DigitsDataModule:
    return DigitsDataModule(128, flat=True, wrap_train=partial(NoisyLabels, rate=NOISE))


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, RobustGenerativeClassifier, Path]:
    """Return a network that knows its wrong labels by heart, the fitted callback, and a checkpoint of both."""
    folder = tmp_path_factory.mktemp("memorised")
    torch.manual_seed(0)
    model = Classifier(MLP(64, (256, 64, 64)), partial(Adam, lr=3e-3))
    rog = RobustGenerativeClassifier()
    trainer = quiet_trainer(folder, max_epochs=60, callbacks=[rog])
    trainer.fit(model, digits())
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return model, rog, path


def test_better_than_the_softmax_with_wrong_labels(memorised: Any, tmp_path: Path) -> None:
    model, rog, _ = memorised
    (result,) = quiet_trainer(tmp_path, callbacks=[rog]).test(model, digits(), verbose=False)
    assert result["rog/test/softmax"] == pytest.approx(result["test/accuracy"], abs=1e-6)
    assert result["rog/test/accuracy"] > result["rog/test/softmax"] + 0.12
    assert set(rog.ensemble.names) == {"net.layer1", "net.layer2", "net.layer3"}
    assert {f"rog/test/layer/{name}" for name in rog.ensemble.names} <= set(result)


def test_audit_finds_the_wrong_labels(memorised: Any, tmp_path: Path) -> None:
    _, rog, _ = memorised
    quality = rog.audit.quality()
    assert quality["true_noise_rate"] == pytest.approx(NOISE, abs=0.01)
    assert rog.audit.noise_rate == pytest.approx(NOISE, abs=0.15)
    assert quality["suspects_precision"] > 0.7 > NOISE  # of labels picked at random
    assert quality["suspects_recall"] > 0.6
    torch.testing.assert_close(rog.audit.transition.sum(1), torch.ones(10, dtype=torch.float64))
    paths = write_audit(rog.audit, tmp_path / "audit")
    assert all(path.is_file() for path in paths)
    rows = list(csv.DictReader((tmp_path / "audit" / "suspects.csv").open(encoding="utf-8")))
    assert len(rows) == len(rog.audit.suspected)
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins, reverse=True)


def test_fits_inside_a_test_and_what_it_keeps_can_be_used_after(memorised: Any, tmp_path: Path) -> None:
    model, fitted, _ = memorised
    rog = RobustGenerativeClassifier()
    before = fingerprint(model)
    (result,) = quiet_trainer(tmp_path, callbacks=[rog]).test(model, digits(), verbose=False)
    assert result["rog/test/accuracy"] > result["rog/test/softmax"] + 0.12
    torch.testing.assert_close(rog.ensemble.weights, fitted.ensemble.weights)
    assert not rog.ensemble.weights.is_inference()
    assert not any(value.is_inference() for value in rog.ensemble.state_dict().values())
    assert fingerprint(model) == before


def test_a_checkpoint_needs_no_training_data(memorised: Any, tmp_path: Path) -> None:
    model, fitted, path = memorised
    torch.load(path, weights_only=True)
    test = DataLoader(TensorDataset(torch.randn(20, 64), torch.arange(20) % 10), 8)
    other, rog = Classifier(MLP(64, (256, 64, 64))), RobustGenerativeClassifier()
    trainer = quiet_trainer(tmp_path, callbacks=[rog])
    trainer.test(other, test, ckpt_path=path, verbose=False, weights_only=True)
    assert torch.equal(rog.ensemble.weights, fitted.ensemble.weights)
    predictions = trainer.predict(model, test)
    assert len(torch.cat(predictions)) == 20
    torch.testing.assert_close(rog.predictions.exp().sum(1), torch.ones(20, dtype=torch.float64))


def test_deployed_module_predicts_what_the_callback_does(memorised: Any, tmp_path: Path) -> None:
    model, rog, _ = memorised
    x = torch.randn(30, 64)
    quiet_trainer(tmp_path, callbacks=[rog]).predict(model, DataLoader(TensorDataset(x), 16))
    deployed = rog.deploy(model).eval()
    torch.testing.assert_close(deployed(x), rog.predictions.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(deployed)(x), deployed(x))


def test_without_a_fit_or_training_data(tmp_path: Path) -> None:
    rog = RobustGenerativeClassifier()
    with pytest.raises(UnsupportedTraining, match="fit"):
        rog.deploy(TinyModule())
    with pytest.raises(UnsupportedTraining, match="ckpt_path"):
        quiet_trainer(tmp_path, callbacks=[rog]).predict(TinyModule(), DataLoader(torch.randn(16, FEATURES), 8))


@pytest.mark.parametrize("estimator", ["mcd", "official", "sample"])
def test_training_stays_the_same_bit_for_bit(estimator: Any, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [RobustGenerativeClassifier(estimator=estimator, every_n_epochs=1)]):
        torch.manual_seed(1)
        module = TinyModule()
        before = fingerprint(module)
        fit(quiet_trainer(tmp_path, callbacks=callbacks), module)
        assert fingerprint(module)["hooks"] == before["hooks"]
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [epoch for epoch, _ in callbacks[0].history["softmax"]] == [0, 1]


def test_augmentation_is_told_from_samples_that_stay() -> None:
    class Shaken(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.rand(1), y

    x, y = torch.randn(4, 3), torch.arange(4)
    assert varies(Shaken(x, y))
    assert not varies(TensorDataset(x, y))
    assert not varies(TensorDataset(torch.full((4, 3), torch.nan), y))


def test_no_bad_features_pass(tmp_path: Path) -> None:
    module = TinyModule()
    bad = DataLoader(TensorDataset(torch.full((16, FEATURES), torch.nan), torch.arange(16) % 3), 8)
    with pytest.raises(InvalidArgument, match="NaN"):
        quiet_trainer(tmp_path, callbacks=[RobustGenerativeClassifier(train=bad)]).validate(
            module, loader(), verbose=False
        )
    one = DataLoader(TensorDataset(torch.randn(16, FEATURES), torch.zeros(16, dtype=torch.int64)), 8)
    with pytest.raises(InvalidArgument, match="at least two"):
        quiet_trainer(tmp_path, callbacks=[RobustGenerativeClassifier(train=one)]).validate(
            module, loader(), verbose=False
        )
    with pytest.raises(LayerNotFound, match="second"):
        fit(quiet_trainer(tmp_path, callbacks=[RobustGenerativeClassifier("secnd")]), module)


def test_blocks_before_the_classifier() -> None:
    assert blocks_before_classifier(TinyModule()) == ["first", "second"]
    with pytest.raises(LayerNotFound, match="layers="):
        blocks_before_classifier(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "settings",
    [
        {"support_fraction": 0.3},
        {"support_fraction": "most"},
        {"ensemble": "best"},
        {"estimator": "mdc"},
        {"priors": "equal"},
        {"every_n_epochs": 0},
        {"num_classes": 1},
        {"max_per_class": 1},
        {"max_dim": 0},
        {"shrinkage": 2.0},
        {"layers": []},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises((InvalidArgument, LayerNotFound)):
        RobustGenerativeClassifier(**settings)
