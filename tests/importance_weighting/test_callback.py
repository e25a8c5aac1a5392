"""Weights in real trainings; what every callback must stand is in the contract."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_methods import ImportanceWeighting, PolyTailLoss, VSLoss
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LayerNotFound,
    NoEffect,
    ShapeMismatch,
    UnsupportedTraining,
)
from lightning_methods.importance_weighting import LabelShift, balanced_weights, poly_tail_loss
from lightning_methods.importance_weighting.datasets import dataset_labels
from lightning_methods.importance_weighting.functions import LOSSES, thread
from lightning_methods.snnl import SoftNearestNeighborLoss
from tests.support.processes import run_ranks
from tests.support.training import (
    ROWS,
    At,
    Settings,
    TinyModule,
    assert_identical,
    fingerprint,
    fit,
    largest_difference,
    loader,
    made_data,
    quiet_trainer,
)

W = [1.0, 2.0, 4.0]
MEAN1 = torch.tensor(W) * 3 / 7
SAMPLES = torch.rand(40, generator=torch.Generator().manual_seed(5)) * 3


class ByHand(TinyModule):
    def own_loss(self, z, y):
        return (MEAN1[y] * F.cross_entropy(z, y, reduction="none")).mean()


class TorchWeights(TinyModule):
    def own_loss(self, z, y):
        return F.cross_entropy(z, y, weight=torch.tensor(W))


def trained(tmp_path, kind=TinyModule, callbacks=(), data=None, make=None, **settings):
    torch.manual_seed(1)
    module = kind() if make is None else make()
    fit(quiet_trainer(tmp_path, callbacks=list(callbacks), **settings), module, data)
    return module


def run_and_trainer(tmp_path, kind=TinyModule, callbacks=(), data=None, **settings):
    torch.manual_seed(1)
    module, trainer = kind(), quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
    fit(trainer, module, data)
    return module, trainer


# -- where the weights come from ---------------------------------------------------------------------------------------


def test_equal_weights_are_the_training_without_them_bit_for_bit(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ImportanceWeighting([2.0, 2.0, 2.0])])
    torch.manual_seed(1)
    module = TinyModule()
    torch.manual_seed(3)
    with pytest.warns(NoEffect, match="all class weights are equal"):
        trainer.fit(module, loader(), loader(8))
    assert_identical(module, trained(tmp_path))


def test_the_scale_of_class_weights_does_not_matter(tmp_path):
    a, b = (trained(tmp_path, callbacks=[ImportanceWeighting([k * w for w in W])]) for k in (1, 64))
    assert_identical(a, b)


@pytest.mark.parametrize("normalize", ["none", "mean1", "batch"])
def test_every_normalisation_is_its_definition(tmp_path, normalize):
    class Expected(TinyModule):
        def own_loss(self, z, y):
            w = torch.tensor(W)
            losses = w[y] * F.cross_entropy(z, y, reduction="none")
            return {
                "none": losses.mean(),
                "mean1": losses.mean() / w.mean(),
                "batch": losses.sum() / w[y].sum(),
            }[normalize]

    ours = trained(tmp_path, callbacks=[ImportanceWeighting(W, normalize=normalize)])
    assert largest_difference(ours, trained(tmp_path, Expected)) < 1e-6


def test_balanced_and_effective_number_count_the_training_set(tmp_path):
    labels = made_data().tensors[1]
    counts = torch.bincount(labels).double()
    weighting = ImportanceWeighting("balanced")
    trained(tmp_path, callbacks=[weighting])
    assert torch.allclose(weighting.weights.table, balanced_weights(counts))
    assert float((weighting.weights.table * counts).sum() / counts.sum()) == pytest.approx(1)
    weighting = ImportanceWeighting("effective_number:0.9")
    trained(tmp_path, callbacks=[weighting])
    raw = 1 / (1 - 0.9**counts)
    assert torch.allclose(weighting.weights.table, raw * counts.sum() / (raw * counts).sum())


class Silent(Dataset):
    """A dataset that does not tell its labels."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        return self.inner[i]


def test_labels_that_the_dataset_does_not_tell_are_counted_in_a_pass_that_leaves_no_trace(tmp_path):
    told, counted = ImportanceWeighting("balanced"), ImportanceWeighting("balanced")
    a = trained(tmp_path, callbacks=[told], data=DataLoader(made_data(), 8, shuffle=True))
    b = trained(tmp_path, callbacks=[counted], data=DataLoader(Silent(made_data()), 8, shuffle=True))
    assert torch.equal(told.weights.table, counted.weights.table)
    assert_identical(a, b)


def test_labels_of_datasets():
    data = made_data()
    y = data.tensors[1]
    assert torch.equal(dataset_labels(Subset(data, [3, 1])), y[[3, 1]])
    assert torch.equal(dataset_labels(ConcatDataset([data, Subset(data, [0])])), torch.cat([y, y[:1]]))
    assert dataset_labels(Silent(data)) is None
    assert dataset_labels(Subset(Silent(data), [0])) is None
    assert dataset_labels(TensorDataset(torch.zeros(3, 2), torch.zeros(3))) is None

    class WithTargets(Silent):
        targets = y.tolist()
        target_transform = None

    assert torch.equal(dataset_labels(WithTargets(data)), y)
    WithTargets.target_transform = abs
    assert dataset_labels(WithTargets(data)) is None


class ThirdIsWeight(TinyModule):
    """Batches (x, y, weight) or dicts; ignores the weight."""

    def training_step(self, batch, batch_idx):
        batch = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        return super().training_step(batch, batch_idx)


class ThirdByHand(TinyModule):
    def training_step(self, batch, batch_idx):
        x, y, w = batch
        w = w / SAMPLES.double().mean().float()
        loss = (w * F.cross_entropy(self(x), y, reduction="none")).mean()
        self.log("train_loss", loss)
        return loss


def with_weights(as_dict=False):
    x, y = made_data().tensors
    if not as_dict:
        return DataLoader(TensorDataset(x, y, SAMPLES), 8)
    items = [{"x": a, "y": b, "importance": c} for a, b, c in zip(x, y, SAMPLES, strict=True)]
    return DataLoader(items, 8)


@pytest.mark.parametrize(
    ("selector", "as_dict"),
    [(2, False), ("importance", True), (lambda batch: batch[2], False)],
    ids=["index", "key", "function"],
)
def test_sample_weights_of_the_batch_have_mean_one_over_the_training_set(tmp_path, selector, as_dict):
    weighting = ImportanceWeighting(sample_weights=selector)
    ours = trained(tmp_path, ThirdIsWeight, [weighting], with_weights(as_dict))
    assert weighting.weights.mean_weight == pytest.approx(float(SAMPLES.double().mean()))
    assert largest_difference(ours, trained(tmp_path, ThirdByHand, data=with_weights())) < 1e-6


def test_a_given_mean_saves_the_pass(tmp_path):
    mean = float(SAMPLES.double().mean())
    given = trained(tmp_path, ThirdIsWeight, [ImportanceWeighting(sample_weights=2, mean_weight=mean)], with_weights())
    measured = trained(tmp_path, ThirdIsWeight, [ImportanceWeighting(sample_weights=2)], with_weights())
    assert largest_difference(given, measured) < 1e-7


def test_exponent_clip_and_strength(tmp_path):
    weighting = ImportanceWeighting([1.0, 2.0, 10.0], exponent=2.0, clip=(2.0, 50.0), normalize="none")
    trained(tmp_path, callbacks=[weighting])
    assert weighting.weights.table.tolist() == [2.0, 4.0, 50.0]
    late = ImportanceWeighting(W, start_epoch=2)
    assert_identical(trained(tmp_path, callbacks=[late]), trained(tmp_path))
    warm = ImportanceWeighting(W, start_epoch=1, warmup_epochs=1)
    assert [warm._strength(e) for e in range(4)] == [0.0, 0.5, 1.0, 1.0]

    class Half(TinyModule):
        def own_loss(self, z, y):
            return ((0.5 + 0.5 * MEAN1)[y] * F.cross_entropy(z, y, reduction="none")).mean()

    half = trained(tmp_path, callbacks=[ImportanceWeighting(W, schedule=lambda epoch: 0.5)])
    assert largest_difference(half, trained(tmp_path, Half)) < 1e-6


# -- how they get into the loss ----------------------------------------------------------------------------------------


class OwnMargin(nn.Module):
    """Somebody's loss."""

    def __init__(self):
        super().__init__()
        self.reduction = "mean"

    def forward(self, z, target):
        losses = poly_tail_loss(z, target, reduction="none")
        return losses.mean() if self.reduction == "mean" else losses


OwnMarginLoss = type("OwnMarginLoss", (OwnMargin,), {})


@pytest.mark.parametrize("criterion", [PolyTailLoss, OwnMarginLoss, lambda: VSLoss([20, 10, 10])])
@pytest.mark.parametrize("mode", ["auto", "module"])
def test_loss_modules_without_a_function_of_torch(tmp_path, criterion, mode):
    class WithModule(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.criterion = criterion()

        def own_loss(self, z, y):
            return self.criterion(z, y)

    class ModuleByHand(WithModule):
        def own_loss(self, z, y):
            self.criterion.reduction = "none"
            return (MEAN1[y] * self.criterion(z, y)).mean()

    ours = trained(tmp_path, WithModule, [ImportanceWeighting(W, mode=mode)])
    assert largest_difference(ours, trained(tmp_path, ModuleByHand)) < 1e-6
    assert ours.criterion.reduction == "mean"
    assert not ours.criterion._forward_hooks


def test_the_gradient_mode_is_exact_for_a_mean_of_losses(tmp_path):
    ours = trained(tmp_path, callbacks=[ImportanceWeighting(W, mode="gradient", head="head")])
    assert largest_difference(ours, trained(tmp_path, ByHand)) < 1e-6
    assert fingerprint(ours)["hooks"] == {}


def test_functions_alone(tmp_path):
    assert_identical(trained(tmp_path, callbacks=[ImportanceWeighting(W, mode="function")]), trained(tmp_path, ByHand))


class Hidden(TinyModule):
    """A loss that nothing can catch."""

    def own_loss(self, z, y):
        return -z.log_softmax(1).gather(1, y[:, None]).mean()


@pytest.mark.parametrize("settings", [{}, {"mode": "function"}])
def test_a_step_in_which_nothing_is_weighted_is_an_error_that_names_the_ways_out(tmp_path, settings):
    callbacks = [ImportanceWeighting(W, **settings)]
    with pytest.raises(InvalidArgument, match=r"(?s)Hidden.training_step.*mode='gradient' with head=.*mode='sampler'"):
        trained(tmp_path, Hidden, callbacks)
    # and the way out works
    ours = trained(tmp_path, Hidden, [ImportanceWeighting(W, mode="gradient", head="head")])
    assert largest_difference(ours, trained(tmp_path, ByHand)) < 1e-6


def test_a_name_that_no_loss_bears_says_which_were_called(tmp_path):
    with pytest.raises(InvalidArgument, match=r"It calls cross_entropy\."):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, match="mse_loss")])


class SkipsSome(TinyModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx != 1 else None


def test_a_skipped_step_is_no_error(tmp_path):
    by_hand = type("SkipsByHand", (SkipsSome, ByHand), {})
    assert_identical(trained(tmp_path, SkipsSome, [ImportanceWeighting(W)]), trained(tmp_path, by_hand))


def test_mode_module_without_a_module_and_a_head_that_is_not_there(tmp_path):
    with pytest.raises(UnsupportedTraining, match=r"called \.\.\.Loss"):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, mode="module")])
    with pytest.raises(LayerNotFound):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, mode="gradient", head="heed")])


def test_manual_optimisation(tmp_path):
    def make(kind):
        return lambda: kind(Settings(manual=True))

    ours = trained(tmp_path, make=make(TinyModule), callbacks=[ImportanceWeighting(W)])
    assert_identical(ours, trained(tmp_path, make=make(ByHand)))
    with pytest.raises(InvalidArgument, match="No loss could be weighted"):
        trained(tmp_path, make=make(Hidden), callbacks=[ImportanceWeighting(W)])


def test_a_compiled_step_is_refused_and_never_trained_without_weights(tmp_path):
    class Compiled(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.step = torch.compile(self.whole, backend="aot_eager", fullgraph=True)

        def whole(self, x, y):
            return F.cross_entropy(self.layers(x)["head"], y)

        def training_step(self, batch, batch_idx):
            return self.step(*batch)

    torch._dynamo.reset()
    with pytest.raises(InvalidArgument, match="mode='gradient'"):
        trained(tmp_path, Compiled, [ImportanceWeighting(W)])


def test_terms_of_other_callbacks_are_not_weighted(tmp_path):
    """A term that calls a loss function itself is computed outside of the interception."""

    class Square(SoftNearestNeighborLoss):
        def layer_term(self, layer, batch, step):
            term = F.mse_loss(batch.features, torch.zeros_like(batch.features))
            return term, {"value": term.detach(), "normalized": term.detach(), "temperature": term.detach()}

    class TermByHand(ByHand):
        def total_loss(self, layers, y):
            h = layers["second"]
            return self.own_loss(layers["head"], y) + 0.1 * F.mse_loss(h, torch.zeros_like(h))

    def term():
        return Square("second", weight=0.1)

    expected = trained(tmp_path, TermByHand)
    for callbacks in ([ImportanceWeighting(W), term()], [term(), ImportanceWeighting(W)]):
        assert_identical(trained(tmp_path, callbacks=callbacks), expected)


# -- normalised by the batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [2, 5])
def test_batch_normalisation_over_accumulated_batches_is_that_of_one_large_batch(tmp_path, batches):
    settings = {"max_epochs": 4, "gradient_clip_val": 0.5}
    large = trained(tmp_path, TorchWeights, data=loader(batch_size=8 * batches), **settings)
    callbacks = [ImportanceWeighting(W, normalize="batch")]
    ours = trained(tmp_path, callbacks=callbacks, accumulate_grad_batches=batches, **settings)
    if 40 % (8 * batches):  # the last, smaller window counts less, as it does without weights

        class Windows(TorchWeights):
            def own_loss(self, z, y):
                return super().own_loss(z, y) * len(y) / (8 * batches)

        large = trained(tmp_path, Windows, data=loader(batch_size=8 * batches), **settings)
    assert largest_difference(ours, large) < 1e-6


def test_batch_normalisation_over_windows_refuses_what_it_would_scale_too(tmp_path):
    class Regularised(TinyModule):
        def own_loss(self, z, y):
            return F.cross_entropy(z, y) + 0.1 * z.square().mean()

    with pytest.raises(UnsupportedTraining, match="mean1"):
        trained(tmp_path, Regularised, [ImportanceWeighting(W, normalize="batch")], accumulate_grad_batches=2)
    term = SoftNearestNeighborLoss("second")
    with pytest.raises(UnsupportedTraining, match="mean1"):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, normalize="batch"), term], accumulate_grad_batches=2)
    # without windows both are exact
    trained(tmp_path, Regularised, [ImportanceWeighting(W, normalize="batch")])


def test_batch_normalisation_with_batches_of_one(tmp_path):
    with pytest.raises(InvalidArgument, match="one sample: its weight cancels"):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, normalize="batch")], data=loader(batch_size=1))
    # a window of several such batches is a batch
    callbacks = [ImportanceWeighting(W, normalize="batch")]
    ours = trained(tmp_path, callbacks=callbacks, data=loader(batch_size=1), accumulate_grad_batches=8)
    assert largest_difference(ours, trained(tmp_path, TorchWeights)) < 1e-6


def distributed_batch_normalisation():
    """Train on two ranks with equal and unequal shards, normalised by the joined batch."""
    from tests.contract.jobs import _Shards

    found = {}
    for samples in (48, 44):
        for batches in (1, 3):
            torch.manual_seed(1)
            module = TinyModule()
            trainer = quiet_trainer(
                "/tmp",
                callbacks=[ImportanceWeighting(W, normalize="batch")],
                strategy="ddp",
                devices=2,
                use_distributed_sampler=False,
                accumulate_grad_batches=batches,
            )
            fit(trainer, module, _Shards(samples, ROWS))
            found[f"{samples} {batches}"] = dict(module.state_dict())
    return found


@pytest.mark.slow
def test_batch_normalisation_over_ranks_is_that_of_the_joined_batch(tmp_path):
    ranks = run_ranks("tests.importance_weighting.test_callback:distributed_batch_normalisation", 2, tmp_path / "ranks")
    alone = trained(tmp_path, TorchWeights, data=DataLoader(made_data(48), 16))
    joined = trained(tmp_path, TorchWeights, data=DataLoader(made_data(48), 48))
    for rank in ranks:
        for key, expected in (("48 1", alone), ("48 3", joined)):
            for name, value in expected.state_dict().items():
                assert torch.allclose(rank[key][name], value, atol=1e-5)
        for key in rank:
            assert all(torch.equal(rank[key][name], ranks[0][key][name]) for name in rank[key])


# -- validation --------------------------------------------------------------------------------------------------------


class Validates(TinyModule):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.seen = [*getattr(self, "seen", []), F.cross_entropy(self(x), y)]


def test_the_validation_is_untouched_and_its_weighted_risk_logged(tmp_path):
    module, trainer = run_and_trainer(tmp_path, Validates, [ImportanceWeighting(W)])
    x, y = made_data(8).tensors
    with torch.no_grad():
        losses = F.cross_entropy(module.eval()(x), y, reduction="none")
    assert torch.equal(module.seen[-1], F.cross_entropy(module(x), y).detach())
    expected = float((MEAN1[y] * losses).sum() / MEAN1[y].sum())
    assert float(trainer.callback_metrics["importance_weighting/val_risk"]) == pytest.approx(expected, rel=1e-6)


def test_weighted_validation_where_it_is_asked_for(tmp_path):
    module, _ = run_and_trainer(tmp_path, Validates, [ImportanceWeighting(W, weight_validation=True)])
    x, y = made_data(8).tensors
    expected = (MEAN1[y] * F.cross_entropy(module.eval()(x), y, reduction="none")).mean()
    assert torch.allclose(module.seen[-1], expected)


@pytest.mark.parametrize("criterion", [PolyTailLoss, nn.CrossEntropyLoss])
def test_the_risk_of_a_loss_module(tmp_path, criterion):
    class WithModule(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.criterion = criterion()

        def own_loss(self, z, y):
            return self.criterion(z, y)

        def validation_step(self, batch, batch_idx):
            self.validated = self.criterion(self(batch[0]), batch[1])

    module, trainer = run_and_trainer(tmp_path, WithModule, [ImportanceWeighting(W)])
    x, y = made_data(8).tensors
    with torch.no_grad():
        z = module.eval()(x)
        assert torch.equal(module.criterion(z, y), module.validated)
        losses = type(module.criterion)(reduction="none")(z, y)
    expected = float((MEAN1[y] * losses).sum() / MEAN1[y].sum())
    assert float(trainer.callback_metrics["importance_weighting/val_risk"]) == pytest.approx(expected, rel=1e-6)


def test_early_stopping_on_the_weighted_risk_stops_where_it_was_best(tmp_path):
    """The weighted risk of a network that overfits rises long before its training ends."""
    stopping = EarlyStopping("importance_weighting/val_risk", patience=3)
    held = DataLoader(Subset(made_data(200), range(100, 200)), 50)
    torch.manual_seed(1)
    module, trainer = TinyModule(), quiet_trainer(tmp_path, callbacks=[ImportanceWeighting(W), stopping], max_epochs=60)
    risks = []
    trainer.callbacks.append(
        type(
            "Keep",
            (pl.Callback,),
            {
                "on_validation_end": lambda self, t, m: risks.append(
                    t.callback_metrics.get("importance_weighting/val_risk")
                )
            },
        )()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), held)
    measured = [float(r) for r in risks if r is not None]
    assert trainer.current_epoch < 60
    assert stopping.best_score == pytest.approx(min(measured))
    assert measured[-1] > min(measured)


def test_validation_batches_without_weights_are_validated_as_ever(tmp_path):
    torch.manual_seed(1)
    module = ThirdIsWeight()
    trainer = quiet_trainer(tmp_path, callbacks=[ImportanceWeighting(sample_weights=2)])
    with pytest.warns(NoEffect, match="validation risk is not logged"):
        trainer.fit(module, with_weights(), loader(8))
    assert "importance_weighting/val_risk" not in trainer.callback_metrics
    assert "val_loss" in trainer.callback_metrics


# -- drawn by weight ---------------------------------------------------------------------------------------------------


class Labels(TinyModule):
    def training_step(self, batch, batch_idx):
        self.drawn = [*getattr(self, "drawn", []), *batch[1].tolist()]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sampler_mode_draws_by_weight_and_gives_the_loader_back(tmp_path, workers):
    data = DataLoader(made_data(), 8, shuffle=True, num_workers=workers)
    before = data.batch_sampler.sampler
    module, trainer = run_and_trainer(
        tmp_path, Labels, [ImportanceWeighting([0.0, 0.0, 1.0], mode="sampler")], data, max_epochs=3
    )
    assert set(module.drawn) == {2}
    assert len(module.drawn) == 3 * 40
    assert trainer.global_step == 15
    assert data.batch_sampler.sampler is before


def test_the_sampler_mode_draws_anew_each_epoch_and_the_same_when_resumed(tmp_path):
    def run(**settings):
        pl.seed_everything(7, verbose=False)
        module = Labels()
        trainer = quiet_trainer(tmp_path, callbacks=[ImportanceWeighting(W, mode="sampler"), *settings.pop("more", [])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(shuffle=True), **settings)
        return module.drawn

    saved = tmp_path / "epoch.ckpt"
    save = At("epoch end", lambda trainer, _: trainer.save_checkpoint(saved))
    whole = run(more=[save])
    assert whole[:40] != whole[40:]
    assert run(ckpt_path=saved) == whole[40:]


def test_the_sampler_mode_needs_a_loader_whose_sampler_can_be_replaced(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([made_data()[i] for i in range(40)])

    with pytest.raises(UnsupportedTraining, match="random access"):
        trained(tmp_path, callbacks=[ImportanceWeighting(W, mode="sampler")], data=DataLoader(Stream(), 8))
    with pytest.raises(InvalidArgument, match="the label 2, and there are 2 weights"):
        trained(tmp_path, callbacks=[ImportanceWeighting([1.0, 2.0], mode="sampler")])


# -- estimated weights -------------------------------------------------------------------------------------------------


def imbalanced(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=generator)]
    x = torch.randn(len(y), 8, generator=generator) + 2 * F.one_hot(y, 8)
    return TensorDataset(x, y)


class Shifted(TinyModule):
    def test_dataloader(self):
        x, _ = imbalanced([20, 100, 280], 2).tensors
        return DataLoader(TensorDataset(x, torch.full((len(x),), -1)), 100)


@pytest.mark.parametrize("method", ["em", "bbse", "rlls"])
def test_label_shift_is_estimated_while_training(tmp_path, method):
    weighting = ImportanceWeighting(LabelShift(method, bootstrap=20))
    torch.manual_seed(1)
    module, trainer = Shifted(), quiet_trainer(tmp_path, callbacks=[weighting], max_epochs=4)
    held = DataLoader(imbalanced([100, 100, 100], 1), 100)
    trainer.fit(module, DataLoader(imbalanced([100, 100, 100], 0), 20), held)
    truth = torch.tensor([20, 100, 280]) / 400 * 3
    assert torch.allclose(weighting.weights.table, truth.double(), atol=0.25)
    assert ((weighting.estimate.low <= truth) & (truth <= weighting.estimate.high)).all()
    names = {path.name for path in weighting.figure_paths}
    assert any(name.endswith(".png") for name in names)
    assert any(name.endswith(".csv") for name in names)


def test_the_first_epochs_of_an_estimate_are_unweighted_and_a_resumed_one_goes_on(tmp_path):
    saved = tmp_path / "saved.ckpt"
    held = DataLoader(imbalanced([30, 30, 30], 1), 30)
    data = DataLoader(imbalanced([30, 30, 30], 0), 10)

    def run(callbacks=(), kind=Shifted, **settings):
        torch.manual_seed(1)
        module, trainer = kind(), quiet_trainer(tmp_path, callbacks=list(callbacks), max_epochs=3)
        trainer.fit(module, data, held, **settings)
        return module

    def weighting():
        return ImportanceWeighting(LabelShift(start_epoch=2, bootstrap=0))

    firsts = []
    keep = At(18, lambda _, m: firsts.append(copy.deepcopy(m.state_dict())))
    save = At(22, lambda trainer, _: trainer.save_checkpoint(saved))
    whole = run([weighting(), keep, save])
    plain = []
    run([At(18, lambda _, m: plain.append(copy.deepcopy(m.state_dict())))])
    assert all(torch.equal(v, plain[0][k]) for k, v in firsts[0].items())
    state = torch.load(saved, weights_only=True)["callbacks"]
    assert any(s.get("estimated") == 1 for s in state.values())
    assert largest_difference(whole, run()) > 1e-3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImportanceWeighting(),
        lambda: ImportanceWeighting([1.0, -1.0]),
        lambda: ImportanceWeighting([1.0, float("nan")]),
        lambda: ImportanceWeighting([0.0, 0.0]),
        lambda: ImportanceWeighting([1.0]),
        lambda: ImportanceWeighting([]),
        lambda: ImportanceWeighting("balanse"),
        lambda: ImportanceWeighting("effective_number:1.0"),
        lambda: ImportanceWeighting("effective_number:x"),
        lambda: ImportanceWeighting("balanced:0.9"),
        lambda: ImportanceWeighting(W, normalize="mean"),
        lambda: ImportanceWeighting(W, mode="magic"),
        lambda: ImportanceWeighting(W, mode="gradient"),
        lambda: ImportanceWeighting(W, head="head"),
        lambda: ImportanceWeighting(W, mode="sampler", normalize="batch"),
        lambda: ImportanceWeighting(sample_weights=2, mode="sampler"),
        lambda: ImportanceWeighting(W, exponent=-1.0),
        lambda: ImportanceWeighting(W, exponent=float("nan")),
        lambda: ImportanceWeighting(W, clip=(2.0, 1.0)),
        lambda: ImportanceWeighting(W, mean_weight=0.0),
        lambda: ImportanceWeighting(W, start_epoch=-1),
        lambda: ImportanceWeighting(W, schedule=lambda e: 1.0, warmup_epochs=2),
        lambda: ImportanceWeighting(W, class_counts=[1, -1, 2]),
        lambda: ImportanceWeighting(W, class_counts=[0, 0, 0]),
        lambda: ImportanceWeighting([1.0, float("inf")]),
        lambda: ImportanceWeighting([[1.0, 2.0]]),
        lambda: ImportanceWeighting(3.0),
        lambda: ImportanceWeighting({0: 1.0, 1: 2.0}),
        lambda: ImportanceWeighting(W, exponent="2"),
        lambda: ImportanceWeighting(W, clip=3.0),
        lambda: ImportanceWeighting(W, clip=(float("nan"), 1.0)),
        lambda: ImportanceWeighting(W, start_epoch=1.5),
        lambda: ImportanceWeighting(W, warmup_epochs=float("nan")),
        lambda: ImportanceWeighting(W, schedule=0.5),
        lambda: ImportanceWeighting(sample_weights=1, mean_weight="1"),
        lambda: ImportanceWeighting(W, normalize=None),
    ],
)
def test_settings_outside_of_their_range(make):
    with pytest.raises(InvalidArgument):
        make()


def test_class_counts_are_as_many_as_the_weights():
    with pytest.raises(ShapeMismatch, match="class_counts of 2"):
        ImportanceWeighting(W, class_counts=[1, 2])
    with pytest.raises(ShapeMismatch, match="one number for each class"):
        ImportanceWeighting("balanced", class_counts=[[1, 2]])


MODES = ({}, {"mode": "module"}, {"mode": "gradient", "head": "head"})


class CriterionModule(TinyModule):
    """With a loss module of torch."""

    def __init__(self, settings=None, criterion=None):
        super().__init__(settings)
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def own_loss(self, z, y):
        return self.criterion(z, y)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], ids=len)
def test_another_number_of_weights_than_classes_in_every_mode(tmp_path, mode, weights):
    with pytest.raises(ShapeMismatch, match=f"{len(weights)} class weights and 3 logits"):
        trained(tmp_path, CriterionModule, [ImportanceWeighting(weights, **mode)])
    own = {"criterion": PolyTailLoss()}
    if mode != MODES[2]:
        with pytest.raises((ShapeMismatch, InvalidArgument)):
            trained(tmp_path, make=lambda: CriterionModule(**own), callbacks=[ImportanceWeighting(weights, **mode)])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ignored_labels_in_every_mode(tmp_path, mode):
    x, y = made_data().tensors
    ignored = torch.where(torch.arange(40) % 5 == 0, -100, y)

    class Ignoring(TinyModule):
        def own_loss(self, z, y):
            kept = y >= 0
            return (MEAN1[y[kept]] * F.cross_entropy(z[kept], y[kept], reduction="none")).mean()

        def validation_step(self, batch, batch_idx):
            pass

    kind = type("Ignores", (CriterionModule,), {"validation_step": Ignoring.validation_step})
    data = DataLoader(TensorDataset(x, ignored), 8)
    ours = trained(tmp_path, kind, [ImportanceWeighting(W, class_counts=[1, 1, 1], **mode)], data)
    assert largest_difference(ours, trained(tmp_path, Ignoring, data=data)) < 1e-6


@pytest.mark.parametrize(
    "criterion",
    [
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0])),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda: nn.CrossEntropyLoss(reduction="sum"),
        lambda: nn.CrossEntropyLoss(ignore_index=1),
    ],
    ids=range(4),
)
def test_mode_module_is_mode_function_for_the_losses_of_torch(tmp_path, criterion):
    by_module, by_function = (
        trained(
            tmp_path,
            make=lambda: CriterionModule(criterion=criterion()),
            callbacks=[ImportanceWeighting(W, mode=mode, match=match)],
        )
        for mode, match in (("module", "criterion"), ("function", "auto"))
    )
    assert_identical(by_module, by_function)
    assert not by_module.criterion._forward_hooks


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "criterion",
    [
        lambda backend: torch.compile(nn.CrossEntropyLoss(ignore_index=0), backend=backend),
        lambda backend: torch.compile(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0])), backend=backend),
    ],
    ids=["ignore_index", "own weights"],
)
def test_a_compiled_loss_module_in_mode_module(tmp_path, criterion, backend):
    torch._dynamo.reset()
    compiled = trained(
        tmp_path,
        make=lambda: CriterionModule(criterion=criterion(backend)),
        callbacks=[ImportanceWeighting(W, mode="module")],
    )
    plain = trained(
        tmp_path,
        make=lambda: CriterionModule(criterion=criterion(backend)._orig_mod),
        callbacks=[ImportanceWeighting(W, mode="function")],
    )
    pairs = zip(compiled.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_batches_of_weight_zero_are_right_but_not_whole_epochs_of_them(tmp_path):
    def of_batch(batch):
        return (batch[1] == 0).double()  # some batches have none

    trained(tmp_path, callbacks=[ImportanceWeighting(sample_weights=of_batch, mean_weight=1.0)])
    for mode in ({}, {"normalize": "batch"}, {"mode": "gradient", "head": "head"}):
        weighting = ImportanceWeighting(sample_weights=lambda b: 0 * b[0][:, 0], mean_weight=1.0, **mode)
        with pytest.raises(InvalidArgument, match="all samples of epoch 0 are 0"):
            trained(tmp_path, callbacks=[weighting])


def test_balanced_leaves_ignored_labels_out(tmp_path):
    x, y = made_data().tensors
    ignored = TensorDataset(x, torch.where(torch.arange(40) % 4 == 0, -100, y))
    counts = torch.bincount(y[torch.arange(40) % 4 != 0]).double()
    for data in (ignored, Silent(ignored)):
        weighting = ImportanceWeighting("balanced")
        trained(tmp_path, callbacks=[weighting], data=DataLoader(data, 8))
        assert torch.allclose(weighting.weights.table, balanced_weights(counts))
    with pytest.raises(InvalidArgument, match="are none"):
        trained(
            tmp_path,
            callbacks=[ImportanceWeighting("balanced")],
            data=DataLoader(TensorDataset(x, torch.full_like(y, -100)), 8),
        )


def test_sample_weights_that_do_not_fit_in_gradient_mode(tmp_path):
    weighting = ImportanceWeighting(
        sample_weights=lambda b: torch.ones(3), mean_weight=1.0, mode="gradient", head="head"
    )
    with pytest.raises(ShapeMismatch, match=r"\(3,\) for 8 samples"):
        trained(tmp_path, callbacks=[weighting])


def test_sample_weights_of_a_regression_in_gradient_mode(tmp_path):
    x, _ = made_data().tensors
    data = DataLoader(TensorDataset(x, torch.randn(40, 3), SAMPLES), 8)

    class Regression(TinyModule):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    class RegressionByHand(Regression):
        def training_step(self, batch, batch_idx):
            w = batch[2] / SAMPLES.double().mean().float()
            return (w[:, None] * F.mse_loss(self(batch[0]), batch[1], reduction="none")).mean()

    expected = trained(tmp_path, RegressionByHand, data=data)
    for mode in ({}, {"mode": "gradient", "head": "head"}):
        ours = trained(tmp_path, Regression, [ImportanceWeighting(sample_weights=2, **mode)], data)
        assert largest_difference(ours, expected) < 1e-6


@pytest.mark.parametrize(
    ("callback", "error", "match"),
    [
        (lambda: ImportanceWeighting([1.0, 2.0]), ShapeMismatch, "2 class weights and 3 logits"),
        (lambda: ImportanceWeighting(sample_weights=2), BatchFormat, "sample_weights=2"),
        (lambda: ImportanceWeighting(W, schedule=lambda e: 2.0), InvalidArgument, "from 0 to 1"),
        (lambda: ImportanceWeighting(sample_weights=lambda b: 0 * b[0][:, 0]), InvalidArgument, "all 0"),
    ],
)
def test_what_a_training_refuses_leaves_the_module_as_it_was(tmp_path, callback, error, match):
    torch.manual_seed(1)
    module, before = TinyModule(), fingerprint(TinyModule())
    with pytest.raises(error, match=match):
        fit(quiet_trainer(tmp_path, callbacks=[callback()]), module)
    assert "training_step" not in vars(module)
    assert fingerprint(module)["hooks"] == before["hooks"] == {}


def test_the_loss_functions_of_torch_are_what_they_were(tmp_path):
    """After a fit, after a crash in it, after a refused one, and in a fit that another one has crashed before."""
    before = [function.__code__ for function in LOSSES]
    weighting = ImportanceWeighting(W)
    first = trained(tmp_path, callbacks=[weighting])
    assert all(f.__code__ is code for f, code in zip(LOSSES, before, strict=True))

    def crash(*_):
        raise ZeroDivisionError

    for callbacks in ([weighting, At(3, crash)], [ImportanceWeighting([1.0, 2.0])]):
        with pytest.raises((ZeroDivisionError, ShapeMismatch)):
            trained(tmp_path, callbacks=callbacks)
        assert all(f.__code__ is code for f, code in zip(LOSSES, before, strict=True))
        assert thread.catcher is None
    assert_identical(trained(tmp_path, callbacks=[weighting]), first)


def test_functions_outside_of_the_step_are_as_ever(tmp_path):
    found = []

    class Outside(TinyModule):
        def on_train_batch_end(self, *_):
            found.append(float(F.cross_entropy(torch.eye(3), torch.arange(3))))

    trained(tmp_path, Outside, [ImportanceWeighting(W)])
    assert set(found) == {float(F.cross_entropy(torch.eye(3), torch.arange(3)))}


def test_two_of_them(tmp_path):
    for other in (ImportanceWeighting(sample_weights=2), ImportanceWeighting([1.0, 2.0, 5.0], normalize="none")):
        with pytest.raises(InvalidArgument, match="two ImportanceWeighting"):
            trained(tmp_path, callbacks=[ImportanceWeighting(W), other])
    # two that are alike are refused as soon as the Trainer is made, by Lightning itself
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ImportanceWeighting`"):
        quiet_trainer(tmp_path, callbacks=[ImportanceWeighting(W), ImportanceWeighting(W)])


def test_the_pass_over_the_data_refuses_what_it_would_disturb(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([made_data()[i] for i in range(40)])

    with pytest.raises(UnsupportedTraining, match="class_counts="):
        trained(tmp_path, callbacks=[ImportanceWeighting("balanced")], data=DataLoader(Stream(), 8))
    trained(
        tmp_path, callbacks=[ImportanceWeighting("balanced", class_counts=[9, 9, 22])], data=DataLoader(Stream(), 8)
    )


def test_soft_targets_in_a_training(tmp_path):
    x, y = made_data().tensors
    soft = TensorDataset(x, 0.8 * F.one_hot(y, 3) + 0.2 / 3)

    class SoftByHand(TinyModule):
        def own_loss(self, z, y):
            return -(MEAN1 * y * z.log_softmax(1)).sum(1).mean()

    ours = trained(tmp_path, callbacks=[ImportanceWeighting(W)], data=DataLoader(soft, 8))
    assert largest_difference(ours, trained(tmp_path, SoftByHand, data=DataLoader(soft, 8))) < 1e-6
