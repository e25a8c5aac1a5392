"""What the monitor says is so, and it says so once."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import ImportanceWeighting, WeightEffectMonitor
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    NoEffect,
    NotFinite,
    ShapeMismatch,
    UnsupportedTraining,
)
from lightning_methods.importance_weighting import boundary_shift, effective_sample_size, margins
from tests.support.training import (
    At,
    ResumableLoader,
    Settings,
    TinyModule,
    assert_identical,
    fit,
    loader,
    made_data,
    quiet_trainer,
    same_state,
)

W = [1.0, 2.0, 4.0]


def trained(tmp_path, callbacks, module=None, data=None, **settings):
    torch.manual_seed(1)
    module = TinyModule() if module is None else module()
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, **settings)
    fit(trainer, module, data)
    return module


def last(monitor, key):
    return monitor.history[key][-1][1]


def test_every_number_by_hand(tmp_path):
    monitor = WeightEffectMonitor(class_weights=W)
    module = trained(tmp_path, [monitor]).eval()
    x, y = made_data().tensors
    w = torch.tensor(W, dtype=torch.float64)[y]
    z = module(x)
    m, p = margins(z, y), z.detach().double().softmax(1).gather(1, y[:, None])[:, 0]
    assert last(monitor, "ess") == pytest.approx(effective_sample_size(w))
    assert last(monitor, "ess_fraction") == pytest.approx(effective_sample_size(w) / 40)
    assert last(monitor, "max_weight") == 4
    assert last(monitor, "effect") == pytest.approx(boundary_shift(w, m))
    assert last(monitor, "accuracy") == pytest.approx(float((z.argmax(1) == y).double().mean()))
    assert last(monitor, "margin") == pytest.approx(float(m.median()))
    assert last(monitor, "smallest_margin") == pytest.approx(float(m.min()))
    norm = torch.cat([q.detach().flatten() for q in module.parameters()]).double().norm()
    assert last(monitor, "weight_norm") == pytest.approx(float(norm))
    wrong = w * (1 - p)
    for c in range(3):
        assert last(monitor, f"share/{c}") == pytest.approx(float(wrong[y == c].sum() / wrong.sum()))
        assert last(monitor, f"intended/{c}") == pytest.approx(float(w[y == c].sum() / w.sum()))
        assert last(monitor, f"margin/{c}") == pytest.approx(float(m[y == c].median()))
    held = module(made_data(8).tensors[0]).argmax(1)
    for c in range(3):
        assert last(monitor, f"fraction/in_domain/{c}") == pytest.approx(float((held == c).double().mean()))
    assert sum(last(monitor, f"fraction/noise/{c}") for c in range(3)) == pytest.approx(1)
    # the cosine of the gradients of the first batch, over all parameters
    losses = F.cross_entropy(module(x[:8]), y[:8], reduction="none")
    plain, weighted = (
        torch.cat([g.flatten() for g in torch.autograd.grad(s, list(module.parameters()), retain_graph=True)])
        for s in (losses.sum(), (losses * w[:8].float()).sum())
    )
    assert last(monitor, "gradient_cosine") == pytest.approx(
        float(torch.cosine_similarity(plain, weighted, 0)), abs=1e-5
    )


def test_equal_weights_have_the_cosine_one_and_no_effect(tmp_path):
    monitor = WeightEffectMonitor(class_weights=[3.0, 3.0, 3.0])
    trained(tmp_path, [monitor])
    assert last(monitor, "gradient_cosine") == pytest.approx(1)
    assert last(monitor, "effect") == 0
    assert last(monitor, "ess_fraction") == pytest.approx(1)


def test_it_takes_the_weights_of_the_callback_beside_it_by_class_and_by_sample(tmp_path):
    samples = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5
    data = DataLoader(TensorDataset(*made_data().tensors, samples), 8)

    class Third(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    for order in (1, -1):
        monitor = WeightEffectMonitor()
        callbacks = [ImportanceWeighting(W, sample_weights=2), monitor][::order]
        trained(tmp_path, callbacks, Third, data)
        y = made_data().tensors[1]
        table = torch.tensor(W, dtype=torch.float64) * 3 / 7
        product = table[y] * samples.double()
        assert last(monitor, "ess") == pytest.approx(effective_sample_size(product), rel=1e-6)


def test_without_any_weights_it_says_what_it_needs(tmp_path):
    with pytest.raises(InvalidArgument, match="put it beside ImportanceWeighting"):
        trained(tmp_path, [WeightEffectMonitor()])
    with pytest.raises(InvalidArgument, match="the label 2"):
        trained(tmp_path, [WeightEffectMonitor(class_weights=[1.0, 2.0])])


# -- the twin ----------------------------------------------------------------------------------------------------------


class Scheduled(TinyModule):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TinyModule, {}),
        (Scheduled, {}),
        (TinyModule, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        (TinyModule, {"precision": "bf16-mixed"}),
        (TinyModule, {"max_steps": 3}),
    ],
)
def test_the_twin_is_the_training_without_weights_bit_for_bit(tmp_path, kind, settings):
    def noisy():
        return kind(Settings(stochastic=True))

    monitor = WeightEffectMonitor(twin=True)
    weighted = trained(tmp_path, [ImportanceWeighting(W), monitor], noisy, **settings)
    plain = trained(tmp_path, [], noisy, **settings)
    twin = monitor.state_dict()["twin"]["module"]
    assert all(torch.equal(twin[key], value) for key, value in plain.state_dict().items())
    # and the weighted one is what it is without the monitor
    assert_identical(weighted, trained(tmp_path, [ImportanceWeighting(W)], noisy, **settings))


def test_gap_and_agreement_of_the_twin(tmp_path):
    monitor = WeightEffectMonitor(twin=True)
    weighted = trained(tmp_path, [ImportanceWeighting([1.0, 1.0, 40.0]), monitor]).eval()
    plain = trained(tmp_path, []).eval()
    x = made_data(8).tensors[0]
    a, b = (m(x).argmax(1) for m in (weighted, plain))
    shares = [F.one_hot(p, 3).double().mean(0) for p in (a, b)]
    assert last(monitor, "twin_gap/in_domain") == pytest.approx(float((shares[0] - shares[1]).abs().sum() / 2))
    assert last(monitor, "twin_agreement/in_domain") == pytest.approx(float((a == b).double().mean()))
    assert last(monitor, "twin_gap/noise") > 0.1


def test_a_resumed_twin_goes_on(tmp_path):
    saved = tmp_path / "saved.ckpt"

    def run(more=(), **settings):
        monitor = WeightEffectMonitor(twin=True)
        torch.manual_seed(1)
        module = TinyModule()
        trainer = quiet_trainer(tmp_path, callbacks=[ImportanceWeighting(W), monitor, *more], max_epochs=3)
        fit(trainer, module, ResumableLoader(), **settings)
        return monitor.state_dict()

    whole = run([At(7, lambda trainer, _: trainer.save_checkpoint(saved))])
    assert same_state(run(ckpt_path=saved), whole)


def test_a_twin_that_cannot_be(tmp_path):
    class Two(TinyModule):
        def __init__(self, settings=None):
            super().__init__(Settings(manual=True))

        def configure_optimizers(self):
            return [torch.optim.SGD(self.first.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]

    with pytest.raises(UnsupportedTraining, match="one optimizer"):
        trained(tmp_path, [WeightEffectMonitor(class_weights=W, twin=True)], Two)
    with pytest.raises(InvalidArgument, match="mode='sampler'"):
        trained(tmp_path, [ImportanceWeighting(W, mode="sampler"), WeightEffectMonitor(twin=True)])


# -- the warning -------------------------------------------------------------------------------------------------------


class Separated(TinyModule):
    """Trains on data that any line separates."""

    def train_dataloader(self):
        x, y = made_data(120).tensors
        return DataLoader(TensorDataset(x + 20 * F.one_hot(y, 8), y), 20)


def faded(tmp_path, monitor, epochs, recwarn):
    torch.manual_seed(1)
    trainer = quiet_trainer(tmp_path, callbacks=[ImportanceWeighting([1.0, 1.0, 1.2]), monitor], max_epochs=epochs)
    trainer.fit(Separated())
    return [w for w in recwarn if issubclass(w.category, NoEffect) and "effect of the importance" in str(w.message)]


def test_one_warning_with_the_remedies_when_the_effect_is_gone(tmp_path, recwarn):
    monitor = WeightEffectMonitor(patience=2)
    told = faded(tmp_path, monitor, 6, recwarn)
    assert len(told) == 1
    text = str(told[0].message)
    for remedy in ("EarlyStopping", "weight decay", "PolyTailLoss", "LogitAdjustedLoss", "VSLoss"):
        assert remedy in text
    below = [value < 0.05 for _, value in monitor.history["effect"]]
    assert sum(below) >= 2
    assert list(tmp_path.rglob("faded_*.md"))


def test_no_warning_before_its_time_or_where_there_is_an_effect(tmp_path, recwarn):
    assert not faded(tmp_path, WeightEffectMonitor(patience=7), 6, recwarn)
    assert not faded(tmp_path, WeightEffectMonitor(warn_below=0.0), 6, recwarn)
    trained(tmp_path, [ImportanceWeighting([1.0, 1.0, 100.0]), WeightEffectMonitor(patience=1)])
    assert not [w for w in recwarn if "effect of the importance" in str(w.message)]


def test_a_training_that_diverged_is_not_measured(tmp_path, recwarn):
    class Diverges(TinyModule):
        def on_train_batch_end(self, *_):
            if self.current_epoch == 1:
                self.head.weight.data.fill_(float("nan"))

    monitor = WeightEffectMonitor(class_weights=W)
    torch.manual_seed(1)
    quiet_trainer(tmp_path, callbacks=[monitor], max_epochs=3).fit(Diverges(), loader())
    assert [epoch for epoch, _ in monitor.history["effect"]] == [0]
    assert len([w for w in recwarn if issubclass(w.category, NotFinite)]) == 1


# -- other data --------------------------------------------------------------------------------------------------------


def test_out_of_domain_data_without_labels_and_an_absent_validation(tmp_path):
    other = DataLoader(TensorDataset(torch.randn(30, 8)), 10)
    monitor = WeightEffectMonitor(class_weights=W, out_of_domain=other)
    torch.manual_seed(1)
    module = TinyModule()
    module.validation_step = None
    trainer = quiet_trainer(tmp_path, callbacks=[monitor])
    trainer.fit(module, loader())
    assert sum(last(monitor, f"fraction/out_of_domain/{c}") for c in range(3)) == pytest.approx(1)
    assert "fraction/in_domain/0" not in monitor.history


def test_one_logit_dict_batches_and_selected_outputs(tmp_path):
    class OneLogit(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.head = torch.nn.Linear(16, 1)

        def forward(self, x):
            return {"logits": super().forward(x)[:, 0], "other": x}

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch["x"])["logits"], (batch["y"] > 0).float())

        def validation_step(self, batch, batch_idx):
            pass

    x, y = made_data().tensors
    items = [{"x": a, "y": b} for a, b in zip(x, (y > 0).long(), strict=True)]
    monitor = WeightEffectMonitor(select="logits", in_domain=None)
    trained(tmp_path, [ImportanceWeighting([1.0, 9.0]), monitor], OneLogit, DataLoader(items, 8))
    assert last(monitor, "max_weight") == pytest.approx(1.8)
    assert {key for key in monitor.history if key.startswith("share/")} == {"share/0", "share/1"}


def returning(function):
    """Return a module whose forward does something to the logits, and whose validation does nothing."""
    members = {"forward": lambda self, x: function(self.layers(x)["head"]), "validation_step": lambda *_: None}
    return type("Returning", (TinyModule,), members)


@pytest.mark.parametrize(
    ("kind", "more", "error"),
    [
        (returning(lambda z: (z,)), {}, BatchFormat),
        (returning(lambda z: z[:, :, None]), {}, BatchFormat),
        (returning(lambda z: z.long()), {"labels": 0}, BatchFormat),
        (TinyModule, {"labels": 0}, BatchFormat),
        (TinyModule, {"labels": lambda batch: batch[1][:-1]}, ShapeMismatch),
    ],
)
def test_outputs_and_labels_that_cannot_be_read(tmp_path, kind, more, error):
    with pytest.raises(error):
        trained(tmp_path, [WeightEffectMonitor(class_weights=W, **more)], kind)


def test_more_labels_than_logits(tmp_path):
    with pytest.raises(ShapeMismatch, match="go up to 2 and the module gives 2 logits"):
        trained(tmp_path, [WeightEffectMonitor(class_weights=W)], returning(lambda z: z[:, :2]))


def test_class_weights_of_another_number_of_classes(tmp_path):
    for weights in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0]):
        with pytest.raises((ShapeMismatch, InvalidArgument), match=f"class_weights has {len(weights)}"):
            trained(tmp_path, [WeightEffectMonitor(class_weights=weights)])


def test_ignored_labels_are_left_out_and_must_not_be_all(tmp_path):
    x, y = made_data().tensors
    monitor, all_kept = WeightEffectMonitor(class_weights=W), WeightEffectMonitor(class_weights=W)
    ignored = torch.where(torch.arange(40) % 4 == 0, -100, y)
    module = trained(tmp_path, [monitor], data=DataLoader(TensorDataset(x, ignored), 8))
    kept = y[torch.arange(40) % 4 != 0]
    assert last(monitor, "ess") == pytest.approx(effective_sample_size(torch.tensor(W, dtype=torch.float64)[kept]))
    assert module is not None
    with pytest.raises(BatchFormat, match="no label of at least 0"):
        trained(tmp_path, [all_kept], data=DataLoader(TensorDataset(x, torch.full_like(y, -100)), 8))


def test_segmentation_is_refused(tmp_path):
    class Pixels(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.conv = torch.nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.conv(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    data = DataLoader(TensorDataset(torch.randn(8, 2, 4, 4), torch.randint(3, (8, 4, 4))), 4)
    with pytest.raises(BatchFormat, match=r"logits of shape \(4, 3, 4, 4\)"):
        trained(tmp_path, [ImportanceWeighting(W), WeightEffectMonitor(in_domain=None)], Pixels, data)


@pytest.mark.parametrize(
    "settings",
    [
        {"patience": 0},
        {"patience": 1.5},
        {"every_n_epochs": float("nan")},
        {"warn_below": float("nan")},
        {"class_weights": [0.0, 0.0]},
        {"every_n_epochs": 0},
        {"max_samples": 0},
        {"figures_every_n_epochs": 0},
        {"warn_below": 1.0},
        {"warn_below": -0.1},
        {"class_weights": [1.0, -1.0]},
    ],
)
def test_settings_outside_of_their_range(settings):
    with pytest.raises(InvalidArgument):
        WeightEffectMonitor(**settings)


def test_every_n_epochs_fewer_samples_and_tables(tmp_path):
    monitor = WeightEffectMonitor(class_weights=W, every_n_epochs=2, max_samples=16)
    trained(tmp_path, [monitor], max_epochs=5)
    assert [epoch for epoch, _ in monitor.history["effect"]] == [1, 3]
    assert len(monitor._weights) == 16
    (table,) = tmp_path.rglob("effect_table_*.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["epoch"] for row in rows] == ["1", "3"]
    (classes,) = tmp_path.rglob("classes_*.csv")
    assert len(list(csv.DictReader(classes.open()))) == 3


def test_a_second_fit_starts_anew_and_checkpoints_of_the_best_risk(tmp_path):
    weighting, monitor = ImportanceWeighting(W), WeightEffectMonitor(twin=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="importance_weighting/val_risk", save_top_k=1)
    settings = {"enable_checkpointing": True}
    trained(tmp_path, [weighting, monitor, best], **settings)
    first = monitor.state_dict()
    trained(tmp_path, [weighting, monitor])
    assert same_state(monitor.state_dict(), first)
    assert best.best_model_path
