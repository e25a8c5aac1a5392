"""The classifier trains in a Trainer, keeps its statistics with its weights, and resumes to the same numbers."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from lightning_methods import (
    ClusteringCoefficient,
    Eccentricity,
    GeometricScattering,
    RandomGraphsDataModule,
    ScatteringClassifier,
)
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch
from lightning_methods.geometric_scattering.standardize import Standardize
from tests.geometric_scattering.oracle import path_graph
from tests.support.training import assert_identical, quiet_trainer

SIGNALS = [Eccentricity(), ClusteringCoefficient()]


def data(**settings: object) -> RandomGraphsDataModule:
    return RandomGraphsDataModule(**{"graphs_per_class": 20, "nodes": (12, 20), "transform": SIGNALS, **settings})


def model(**settings: object) -> ScatteringClassifier:
    torch.manual_seed(0)
    return ScatteringClassifier(4, 2, (16,), **{"lr": 1e-2, "J": 3, **settings})


def fitted(tmp_path, module=None, source=None, ckpt_path=None, **settings):
    module, source = module or model(), source or data()
    trainer = quiet_trainer(tmp_path, **settings)
    torch.manual_seed(1)
    trainer.fit(module, datamodule=source, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("standardize", ["train", "transductive"])
def test_learns_to_tell_random_models_apart(tmp_path, standardize):
    source = RandomGraphsDataModule(transform=SIGNALS)
    module, trainer = fitted(tmp_path, model(standardize=standardize, J=5), source, max_epochs=12)
    (tested,) = trainer.test(module, datamodule=source, verbose=False)
    assert tested["test/accuracy"] > 0.75  # chance is a quarter


def test_the_scaler_has_the_statistics_of_the_training_graphs(tmp_path):
    source = data()
    module, _ = fitted(tmp_path, source=source, max_epochs=1)
    train = Batch.from_data_list([source.graphs[i] for i in source.splits["train"]])
    z = module.scaler(module.features(train))
    varies = module.scaler.scale > 0
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), rtol=0, atol=1e-8)
    torch.testing.assert_close(z.std(0, correction=0)[varies], torch.ones_like(z[0])[varies], rtol=1e-6, atol=1e-6)


def test_features_of_the_transform_are_used_as_they_are(tmp_path):
    ready = GeometricScattering(J=3)
    plain, _ = fitted(tmp_path)
    given, _ = fitted(tmp_path, source=data(transform=[*SIGNALS, ready]))
    for ours, theirs in zip(given.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_resumed_equals_uninterrupted(tmp_path):
    source = data(batch_size=16)
    source.setup()
    # in one order: a resumed fit does not replay the random numbers that shuffled the epochs before
    source._loader = lambda split, shuffle=False: DataLoader([source.graphs[i] for i in source.splits[split]], 16)

    def trained(epochs: int, ckpt_path=None):
        module, trainer = model(), quiet_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(module, datamodule=source, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, trainer

    whole, _ = trained(4)
    _, trainer = trained(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]["scaler.fitted"]
    resumed, _ = trained(4, tmp_path / "half.ckpt")
    assert_identical(resumed, whole)


@pytest.mark.parametrize("scale_mode", ["softmax", "free"])
def test_scales_are_learned_in_a_trainer(tmp_path, scale_mode):
    module, trainer = fitted(tmp_path, model(learnable="legs", scale_mode=scale_mode), max_epochs=3)
    fresh = model(learnable="legs", scale_mode=scale_mode)
    assert not torch.allclose(module.encoder.selector, fresh.encoder.selector)
    assert trainer.callback_metrics["scattering/laziness"] != 0.5
    assert trainer.callback_metrics["scattering/scale/3"] > trainer.callback_metrics["scattering/scale/0"]
    assert list(tmp_path.rglob("*selector*.png"))


def test_loaders_given_directly_and_a_sanity_check(tmp_path):
    source = data()
    source.setup()
    module = model()
    quiet_trainer(tmp_path, num_sanity_val_steps=1).fit(module, source.train_dataloader(), source.val_dataloader())
    assert module.scaler.fitted


def test_same_seed_same_weights_and_a_second_fit_goes_on(tmp_path):
    first, _ = fitted(tmp_path)
    second, _ = fitted(tmp_path)
    assert_identical(first, second)
    mean = first.scaler.mean.clone()
    fitted(tmp_path, first)
    assert torch.equal(first.scaler.mean, mean)
    copy.deepcopy(first)


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"fast_dev_run": True}, {"accumulate_grad_batches": 2}]
)
def test_kinds_of_training(tmp_path, settings):
    module, _ = fitted(tmp_path, **settings)
    assert module.scaler.mean.dtype == torch.float64
    assert all(p.isfinite().all() for p in module.parameters())


def test_predictions_and_checkpoints(tmp_path):
    source = data()
    module, trainer = fitted(tmp_path, source=source)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ScatteringClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.hparams["J"] == 3
    batch = next(iter(source.test_dataloader()))
    with torch.no_grad():
        probabilities = loaded.eval().predict_step(batch, 0)
        assert torch.equal(probabilities, module.eval().predict_step(batch, 0))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)))


def test_statistics_survive_half_and_refuse_what_they_cannot_use():
    scaler = Standardize(2).fit([torch.tensor([[1.0, 7], [3, 7]]), torch.tensor([[5.0, 7]])])
    assert scaler.half().mean.dtype == torch.float64
    torch.testing.assert_close(scaler(torch.tensor([[3.0, 9.0]])), torch.zeros(1, 2))
    large = torch.randn(1000, 1, dtype=torch.float64) + 1e9
    found = Standardize(1).fit(large.split(10))
    torch.testing.assert_close(1 / found.scale, large.std(0, correction=0), rtol=1e-6, atol=0)
    with pytest.raises(InvalidArgument, match="no graph"):
        Standardize(2).fit([])
    with pytest.raises(InvalidArgument, match="Feature 1 is not finite"):
        Standardize(2).fit([torch.tensor([[1.0, float("nan")], [1, 2]])])
    with pytest.raises(ShapeMismatch, match=r"\(B, 2\)"):
        scaler(torch.zeros(1, 3))
    with pytest.raises(InvalidArgument, match="not known yet"):
        Standardize(2)(torch.zeros(1, 2))


GRAPH = Data(edge_index=path_graph(3), x=torch.rand(3, 2), y=torch.tensor([1]))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ScatteringClassifier(1, 2), InvalidArgument, "num_classes=1"),
        (lambda: ScatteringClassifier(2, 0), InvalidArgument, "in_channels=0"),
        (lambda: ScatteringClassifier(2, 2, dropout=1.0), InvalidArgument, "dropout"),
        (lambda: ScatteringClassifier(2, 2, lr=0), InvalidArgument, "lr=0"),
        (lambda: ScatteringClassifier(2, 2, hidden=(0,)), InvalidArgument, "hidden"),
        (lambda: ScatteringClassifier(2, 2, standardize="test"), InvalidArgument, "transductive"),
        (lambda: ScatteringClassifier(2, 3, standardize="none")(GRAPH), ShapeMismatch, r"\(n, 3\)"),
        (lambda: ScatteringClassifier(2, 2)(GRAPH), InvalidArgument, "not known yet"),
        (lambda: ScatteringClassifier(2, 2, standardize="none").training_step(Data(x=GRAPH.x), 0), BatchFormat, "y"),
        (lambda: ScatteringClassifier(2, 2, standardize="none")(Data(x=GRAPH.x)), BatchFormat, "edge_index"),
        (
            lambda: ScatteringClassifier(2, 2, J=2)(GeometricScattering()(GRAPH)),
            ShapeMismatch,
            "same J, Q, order",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_two_labels_for_one_graph():
    batch = next(iter(DataLoader([GRAPH], 1)))
    batch.y = torch.tensor([0, 1])
    with pytest.raises(ShapeMismatch, match="1 graphs and 2 labels"):
        ScatteringClassifier(2, 2, standardize="none").validation_step(batch, 0)
    assert isinstance(model(), pl.LightningModule)
