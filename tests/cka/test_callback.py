"""The callback: what it compares with, that it leaves no trace, and what it logs, draws and keeps."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.cka import RepresentationSimilarity, similarity_matrix
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LayerNotFound,
    LightningMethodsWarning,
    NoEffect,
    ShapeMismatch,
    UnsupportedTraining,
)
from tests.support.drawing import leave_undrawn
from tests.support.training import (
    At,
    ResumableLoader,
    Settings,
    TinyModule,
    assert_identical,
    fit,
    loader,
    made_data,
    pl,
    quiet_trainer,
    same_state,
)

LAYERS = ["first", "second", "head"]
STEPS = 5


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("drawn") is None:
        leave_undrawn(monkeypatch.setattr)


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Return a function that fits a module with callbacks and gives it back."""

    def trained(*callbacks: Any, module: Any = None, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
        module = seeded() if module is None else module
        trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
        fit(trainer, module, data, **({"ckpt_path": ckpt_path} if ckpt_path else {}))
        return module

    return trained


def seeded(kind: Any = TinyModule, settings: Settings | None = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return kind(settings)


def similarity(compare: Any = "init", **settings: Any) -> RepresentationSimilarity:
    """Return the callback on a fixed set of 40 samples that the trainer does not know."""
    return RepresentationSimilarity(LAYERS, **{"compare": compare, "data": loader(), **settings})


def features(module: TinyModule, samples: int = 40) -> dict[str, Tensor]:
    module.eval()
    with torch.no_grad():
        return {name: h.clone() for name, h in module.layers(made_data().tensors[0][:samples]).items()}


class Deeper(nn.Module):
    """Another network for the same samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 24), nn.Dropout(0.5), nn.Linear(24, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# -- what it compares with ---------------------------------------------------------------------------------------------


def test_layers_with_themselves(train):
    callback = similarity("self")
    module = train(callback)
    assert torch.equal(callback.matrix, similarity_matrix(features(module), debiased=True))
    assert callback.rows == callback.columns == LAYERS
    assert callback.history == {}


def test_with_the_network_at_initialisation(train):
    callback, start = similarity("init"), features(seeded())
    module = train(callback)
    assert torch.equal(callback.matrix, similarity_matrix(features(module), start, debiased=True))
    assert [epoch for epoch, _ in callback.history["second"]] == [0, 1]
    assert callback.history["second"][-1][1] == float(callback.matrix[1, 1])


def test_with_the_previous_comparison(train):
    callback, moments = similarity("previous"), [features(seeded())]
    keep = At("epoch end", lambda _, module: moments.append(features(copy.deepcopy(module))))
    module = train(callback, keep)
    assert torch.equal(callback.matrix, similarity_matrix(features(module), moments[1], debiased=True))
    first = similarity_matrix(moments[1], moments[0], debiased=True)
    assert [seen[0] for seen in callback.history.values()] == [(0, float(first[i, i])) for i in range(3)]


@pytest.mark.parametrize("bare", [False, True])
def test_with_a_checkpoint(train, tmp_path, bare):
    other = seeded(seed=7)
    path = tmp_path / "other.ckpt"
    torch.save(other.state_dict() if bare else {"state_dict": other.state_dict(), "epoch": 3}, path)
    callback = similarity(str(path))
    module = train(callback)
    assert torch.equal(callback.matrix, similarity_matrix(features(module), features(other), debiased=True))


def test_with_a_module_of_other_depth_and_width_which_stays_as_it_was(train):
    torch.manual_seed(3)
    other = Deeper()
    before = copy.deepcopy(other)
    callback = similarity(other, other_layers=["body.*", "!body.3"])
    module = train(callback)
    assert callback.columns == ["body.0", "body.1", "body.2", "body.4"]
    assert_identical(before, other)
    assert all(m.training for m in other.modules())
    assert not any(m._forward_hooks for m in other.modules())
    h, theirs = made_data().tensors[0], {}
    other.eval()
    for i, layer in enumerate(other.body):
        h = layer(h).detach()
        theirs |= {} if i == 3 else {f"body.{i}": h.clone()}
    assert torch.equal(callback.matrix, similarity_matrix(features(module), theirs, debiased=True))
    assert callback.history == {}  # no layer has a namesake


@pytest.mark.parametrize(
    ("index", "settings"),
    [
        ("cka", {"kernel": "rbf", "bandwidth": 0.4}),
        ("hsic", {}),
        ("cca", {"statistic": "r2"}),
        ("svcca", {}),
        ("pwcca", {}),
        ("linear_regression", {}),
        ("procrustes", {"kind": "angular"}),
    ],
)
def test_every_index(train, index, settings):
    callback, start = similarity("init", index=index, settings=settings), features(seeded())
    module = train(callback, max_epochs=1)
    assert torch.equal(callback.matrix, similarity_matrix(features(module), start, index=index, **settings))
    assert torch.isfinite(callback.matrix).all()


# -- samples and features ----------------------------------------------------------------------------------------------


def test_the_samples_are_fixed_whatever_the_loader_does(train):
    shuffled = DataLoader(made_data(), batch_size=8, shuffle=True)
    callbacks = [similarity("self", data=shuffled, max_samples=n, log_prefix=f"c{n}") for n in (11, 12)]
    seen: list[Tensor] = []
    keep = At("epoch end", lambda *_: seen.extend(callback._probe[0][0] for callback in callbacks))
    train(*callbacks, keep)
    train(*callbacks, keep, data=loader(24, shuffle=True))  # other random numbers are drawn before
    assert len(seen) == 4
    assert all(torch.equal(samples, seen[0]) for samples in seen)


def test_exactly_so_many_samples(train):
    callback = similarity("self", max_samples=11)
    module = train(callback)
    assert torch.equal(callback.matrix, similarity_matrix(features(module, samples=11), debiased=True))


def test_hooks_around_the_transfer_see_the_samples_once(train):
    class Normalised(TinyModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 10, batch[1]

    callback = similarity("self")
    module = train(callback, module=seeded(Normalised))
    module.eval()
    expected = {k: v.detach() for k, v in module.layers(made_data().tensors[0] * 10).items()}
    assert torch.equal(callback.matrix, similarity_matrix(expected, debiased=True))


def test_names_come_in_execution_order(train):
    class Reversed(TinyModule):
        def __init__(self, settings: Settings | None = None) -> None:
            super().__init__(settings)
            self.head, self.second, self.first = self._modules.pop("head"), self.second, self.first
            for name in ("second", "first"):
                self._modules[name] = self._modules.pop(name)

    module = seeded(Reversed)
    assert [name for name, _ in module.named_children()] == ["head", "second", "first"]
    callback = RepresentationSimilarity(["*"], data=loader())
    train(callback, module=module)
    assert callback.rows == LAYERS


def test_maps_of_a_convolution_averaged_over_positions(train):
    class Convolved(TinyModule):
        def __init__(self, settings: Settings | None = None) -> None:
            super().__init__(settings)
            self.conv = nn.Conv1d(1, 3, 3)

        def layers(self, x: Tensor) -> dict[str, Tensor]:
            return {"conv": self.conv(x[:, None]), **super().layers(x)}

    callback = RepresentationSimilarity(["conv", "second"], data=loader(), pool="gap")
    module = train(callback, module=seeded(Convolved))
    maps = features(module)
    expected = similarity_matrix([maps["conv"].mean(2), maps["second"]], debiased=True)
    assert torch.allclose(callback.matrix, expected)
    train(flat := RepresentationSimilarity(["conv", "second"], data=loader()), module=seeded(Convolved))
    assert not torch.allclose(flat.matrix, expected)


# -- no trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["self", "init", "previous", Deeper()], ids=str)
def test_the_training_is_the_same_bit_for_bit(train, compare):
    noisy = Settings(stochastic=True)
    other = {"other_layers": "body.*"} if isinstance(compare, nn.Module) else {}
    shuffled = loader(shuffle=True)
    ours = train(similarity(compare, data="val", **other), module=seeded(settings=noisy), data=shuffled)
    state = torch.get_rng_state()
    plain = train(module=seeded(settings=noisy), data=loader(shuffle=True))
    assert torch.equal(state, torch.get_rng_state())
    assert_identical(ours, plain)


def test_modes_hooks_and_memory_are_given_back(train):
    modes: list[list[bool]] = []
    callback = similarity("init")
    module = seeded(settings=Settings(stochastic=True))
    module.second.eval()  # as someone who freezes a layer does
    look = At("epoch end", lambda _, m: modes.append([s.training for s in m.modules()]))
    train(callback, look, module=module)
    modes_without: list[list[bool]] = []
    twin = seeded(settings=Settings(stochastic=True))
    twin.second.eval()
    train(At("epoch end", lambda _, m: modes_without.append([s.training for s in m.modules()])), module=twin)
    assert modes == modes_without
    assert not any(m._forward_hooks for m in module.modules())
    assert (callback._probe, callback._reference) == ([], {})


@pytest.mark.parametrize("compare", ["self", "init", "previous"])
@pytest.mark.parametrize("when", [2, STEPS, STEPS + 2, "epoch end"])
def test_resumed_equals_uninterrupted(train, tmp_path, compare, when):
    saved = tmp_path / "saved.ckpt"
    whole, resumed = similarity(compare), similarity(compare)
    save = At(when, lambda trainer, _: trainer.save_checkpoint(saved))
    train(whole, save, data=ResumableLoader(), max_epochs=3)
    train(resumed, data=ResumableLoader(), max_epochs=3, ckpt_path=saved)
    assert same_state(whole.state_dict(), resumed.state_dict())
    assert torch.equal(whole.matrix, resumed.matrix)
    if compare != "self":
        assert [epoch for epoch, _ in resumed.history["head"]] == [0, 1, 2]


def test_the_state_loads_without_pickle(train, tmp_path):
    saved = tmp_path / "saved.ckpt"
    callback = similarity("previous")
    train(callback, At(STEPS + 1, lambda trainer, _: trainer.save_checkpoint(saved)))
    state = torch.load(saved, weights_only=True)["callbacks"][callback.state_key]
    assert set(state["weights"]) == set(seeded().state_dict())
    assert similarity("self").state_dict()["weights"] == {}


def test_a_second_fit_starts_anew(train):
    callback = similarity("init")
    train(callback)
    first = callback.history
    train(callback)
    assert callback.history == first


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_scalars_history_and_every_n_epochs(train):
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("cka/")})

        on_train_end = on_train_epoch_end

    callback = similarity("init", every_n_epochs=2)
    train(callback, Watch(), max_epochs=4)
    assert [epoch for epoch, _ in callback.history["first"]] == [1, 3]
    assert set(seen[-1]) == {f"cka/{kind}/{layer}" for kind in ("similarity", "influence") for layer in LAYERS}
    assert seen[-1]["cka/similarity/head"] == pytest.approx(callback.history["head"][-1][1])


@pytest.mark.drawn
def test_figures_and_tables_are_written(train, tmp_path):
    callback = similarity("init")
    train(callback)
    written = {path.relative_to(tmp_path).as_posix() for path in callback.figure_paths}
    assert written == {f"cka/{name}_10.{kind}" for name, kind in
                       [("heatmap", "png"), ("pairs", "csv"), ("layers", "csv"), ("curves", "png")]}  # fmt: skip
    assert all(path.stat().st_size > 100 for path in callback.figure_paths)
    pairs = list(csv.DictReader((tmp_path / "cka/pairs_10.csv").open()))
    assert [(row["layer"], row["other"]) for row in pairs] == [(a, b) for a in LAYERS for b in LAYERS]
    assert float(pairs[1]["cka"]) == pytest.approx(float(callback.matrix[0, 1]))
    layers = list(csv.DictReader((tmp_path / "cka/layers_10.csv").open()))
    for row in layers:
        assert float(row["95% from"]) <= float(row["cka"]) <= float(row["to"]) + 1e-3
        assert 0 <= int(row["of sample"]) < 40


def test_figures_during_the_fit(train, tmp_path):
    train(similarity("init", figures_every_n_epochs=1))
    assert {path.name for path in (tmp_path / "cka").glob("*.png")} == {
        f"{name}_{step}.png" for name in ("heatmap", "curves") for step in (5, 10)
    }


def test_a_planted_outlier_is_named(train, tmp_path):
    x, y = made_data().tensors
    x = x.clone()
    x[13] *= 60
    callback = similarity("init", data=DataLoader(TensorDataset(x, y), batch_size=8))
    train(callback)
    rows = {row["layer"]: row for row in csv.DictReader((tmp_path / "cka/layers_10.csv").open())}
    assert rows["first"]["of sample"] == "13"


def test_layers_that_no_longer_change_are_named(train, tmp_path):
    class Frozen(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.5)

    callback = similarity("previous", freeze_threshold=0.99999)
    train(callback, module=seeded(Frozen), max_epochs=1)
    assert callback.freeze_candidates == ["first", "second"]
    assert "in first, second. They hardly change" in (tmp_path / "cka/freeze_5.md").read_text()


def test_a_dead_layer_is_nan_with_one_warning_and_the_others_are_right(tmp_path):
    class Dead(TinyModule):
        def layers(self, x: Tensor) -> dict[str, Tensor]:
            return {**super().layers(x), "dead": self.dead(x)}

        def __init__(self, settings: Settings | None = None) -> None:
            super().__init__(settings)
            self.dead = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
            self.dead[0].weight.data.zero_()
            self.dead[0].bias.data.fill_(-1)

    callback = RepresentationSimilarity([*LAYERS, "dead"], compare="init", data=loader())
    module, start = seeded(Dead), features(seeded(Dead))
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), loader(8))
    (warning,) = [w for w in told if issubclass(w.category, LightningMethodsWarning)]
    assert "dead" in str(warning.message)
    names = callback.rows
    assert names == [*LAYERS, "dead"]
    assert callback.matrix[3].isnan().all()
    assert callback.matrix[:, 3].isnan().all()
    end = features(module)
    expected = similarity_matrix([end[k] for k in LAYERS], [start[k] for k in LAYERS], debiased=True)
    assert torch.allclose(callback.matrix[:3, :3], expected, atol=1e-6)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compare": "initial"}, "no such file"),
        ({"compare": "nope.ckpt"}, "no such file"),
        ({"index": "cca2"}, "Did you mean 'cca'"),
        ({"settings": {"debias": True}}, "debiased"),
        ({"settings": {"kernel": "poly"}}, "kernel='poly'"),
        ({"index": "procrustes", "settings": {"kind": "far"}}, "kind='far'"),
        ({"max_samples": 4}, "max_samples=4"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"figures_every_n_epochs": 0}, "figures_every_n_epochs=0"),
        ({"freeze_threshold": 0.9}, "compare='previous'"),
        ({"other_layers": "body"}, "another module"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"on_repeat": "first"}, "on_repeat='first'"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(InvalidArgument, match=says):
        RepresentationSimilarity("first", **settings)


def test_a_pattern_that_matches_nothing_is_told_before_any_work(train):
    with pytest.raises(LayerNotFound, match="first"):
        train(RepresentationSimilarity("firts"))


def test_a_checkpoint_of_another_module(train, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": Deeper().state_dict()}, path)
    with pytest.raises(InvalidArgument, match="not of this module"):
        train(similarity(str(path)))


@pytest.mark.parametrize("content", ["text", "empty", "pickle"])
def test_a_file_that_is_no_checkpoint(train, tmp_path, content):
    path = tmp_path / "other.ckpt"
    if content == "pickle":
        torch.save({"state_dict": Deeper()}, path)
    elif content == "empty":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_text("not a checkpoint")
    with pytest.raises(InvalidArgument, match=r"other\.ckpt (cannot be read|holds no weights)"):
        train(similarity(str(path)))


def test_no_data_and_too_little(train, tmp_path):
    callback = similarity(data="val")
    trainer = quiet_trainer(tmp_path, callbacks=[callback], limit_val_batches=0)
    with pytest.warns(NoEffect, match="no batch"):
        trainer.fit(seeded(), loader(), loader(8))
    assert callback.history == {}
    trainer = quiet_trainer(tmp_path, callbacks=[similarity(data="val")])
    with pytest.raises(UnsupportedTraining, match="no val dataloader"):
        trainer.fit(seeded(), loader())
    with pytest.raises(ShapeMismatch):
        train(similarity(data=loader(3, batch_size=3)))


def test_two_callbacks_in_one_trainer(train):
    init, previous = similarity("init"), similarity("previous", log_prefix="drift")
    assert init.state_key != previous.state_key
    train(init, previous)
    assert init.history["head"][0] == previous.history["head"][0]
    assert init.history["head"][1] != previous.history["head"][1]


# -- padded sequences --------------------------------------------------------------------------------------------------


class Encoder(TinyModule):
    """Reads batches with an `attention_mask`; what its layer gives for the padding depends on the padding."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.tokens = nn.Linear(1, 6)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.tokens(x[..., None]), **super().layers(x[:, :8])}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["x"], batch["y"]), batch_idx)


def sequences(padding: float, *, longest: int = 12, by_batch: bool = False) -> list[dict[str, Tensor]]:
    """Return batches of 8 sequences of 8 to 12 positions, padded to one length or batch by batch."""
    x, y = made_data().tensors
    x = torch.cat([x, x[:, :4] ** 2], 1)
    lengths = torch.tensor([8 + i // 8 % 5 if by_batch else 8 + i % 5 for i in range(len(x))])
    real = torch.arange(12) < lengths[:, None]
    x, mask = x.masked_fill(~real, padding), real.long()
    widths = [int(lengths[i : i + 8].max()) if by_batch else longest for i in range(0, 40, 8)]
    starts = range(0, 40, 8)
    return [
        {"x": x[i : i + 8, :w], "y": y[i : i + 8], "attention_mask": mask[i : i + 8, :w]}
        for i, w in zip(starts, widths, strict=True)
    ]


def of_sequences(folder: Path, padding: float, **settings: Any) -> RepresentationSimilarity:
    by_batch = settings.pop("by_batch", False)
    data = DataLoader(sequences(padding, by_batch=by_batch), batch_size=None)
    callback = RepresentationSimilarity(["tokens", "head"], data=data, **settings)
    # the network itself sees no padding
    fed = DataLoader([{**batch, "x": batch["x"][:, :8]} for batch in sequences(0.0)], batch_size=None)
    # not by the fixture, which keeps warnings quiet
    quiet_trainer(folder, callbacks=[callback], limit_val_batches=0).fit(seeded(Encoder), fed)
    return callback


@pytest.mark.parametrize("by_batch", [False, True], ids=["one length", "padded batch by batch"])
def test_only_real_positions_count(tmp_path, by_batch):
    zeros, junk = (of_sequences(tmp_path, p, mask="attention_mask", by_batch=by_batch).matrix for p in (0.0, 1e4))
    assert torch.equal(zeros, junk)
    assert zeros[0, 1].abs() > 0.01
    function = of_sequences(tmp_path, 0.0, mask=lambda batch: batch["attention_mask"].bool(), by_batch=by_batch).matrix
    assert torch.equal(zeros, function)


def test_padding_that_is_compared_is_told(tmp_path):
    with pytest.warns(LightningMethodsWarning, match="mask='attention_mask'"):
        zeros = of_sequences(tmp_path, 0.0).matrix
    with pytest.warns(LightningMethodsWarning, match="mask='attention_mask'"):
        assert not torch.allclose(of_sequences(tmp_path, 3.0).matrix, zeros)


def test_lengths_that_differ_between_batches_are_told_with_the_remedy(tmp_path):
    with pytest.raises(ShapeMismatch, match=r"'tokens' gave rows of shape.*mask="):
        of_sequences(tmp_path, 0.0, by_batch=True)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        ("attention_masks", BatchFormat, "Did you mean 'attention_mask'"),
        (lambda batch: (1 - batch["attention_mask"]) * -1e4, InvalidArgument, "holds -10000"),
        (lambda batch: batch["attention_mask"] * 0, InvalidArgument, "Sample 0"),
        (lambda batch: batch["attention_mask"].T, ShapeMismatch, "'tokens'"),
    ],
)
def test_bad_masks(tmp_path, mask, error, says):
    with pytest.raises(error, match=says):
        of_sequences(tmp_path, 0.0, mask=mask)
