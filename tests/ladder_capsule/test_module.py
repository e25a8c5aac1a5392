"""Both networks: sizes, steps, prediction, training, checkpoints, several loaders, bad input."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import CapsuleNetwork, LadderCapsuleNetwork, PoseDataModule
from lightning_methods.errors import BatchFormat, InvalidArgument, NotFinite, ShapeMismatch
from lightning_methods.ladder_capsule import ladder_loss, margin_loss
from lightning_methods.ladder_capsule.base import best, is_correct
from tests.ladder_capsule.conftest import capsnet, ladder
from tests.support.training import quiet_trainer

BOTH = pytest.mark.parametrize("make", [ladder, capsnet], ids=["ladder", "capsnet"])


# --- sizes


def test_the_paper_is_the_default() -> None:
    with torch.device("meta"):
        model = LadderCapsuleNetwork(backbone=None)
    assert (model.num_caps, model.head.k, model.grid) == (1152, 70, (6, 6, 32))
    assert sum(p.numel() for p in model.parameters()) == 80_863_784


def test_any_size_channels_classes_and_backbone() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
    backbone.train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    model = ladder(backbone=backbone, in_channels=3, image_size=(20, 14), num_classes=7, pose_dim=2)
    assert backbone.training
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())
    out = model(torch.rand(2, 3, 20, 14))
    assert out.errors.shape == (2, 7)
    assert out.poses.shape == (2, 7, 2)
    assert model.num_caps == out.code.shape[1] == 4 * 2 * 4


def test_the_grid_lies_over_the_centres_of_the_fields() -> None:
    model = ladder()
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    capsule = model.capsules(x)[0, 3 * model.grid[2] :].view(model.grid[2], -1)  # of the last position, row 1 column 1
    (seen,) = torch.autograd.grad(capsule.sum(), x)
    rows, columns = seen[0, 0].nonzero().T
    left, right, bottom, top = model.extent
    spacing = (right - left) / model.grid[1]
    centre = right - spacing / 2
    assert (columns.min() + columns.max()).item() / 2 == pytest.approx(centre)
    assert (rows.min() + rows.max()).item() / 2 == pytest.approx(bottom - spacing / 2)
    assert top == left


# --- steps


def test_the_training_loss_is_the_functions(batch) -> None:
    x, y = batch
    for name in ("paper", "code"):
        model = ladder(loss=name, reg_weight=0.3)
        out = model(x)
        expected = ladder_loss(out.errors, y, out.code, out.activity, loss=name, reg_weight=0.3)
        assert torch.allclose(model.training_step(batch, 0), expected, atol=1e-6)
    model = ladder(m_plus=0.8, m_minus=0.3, lam=0.7, reg="l1_mean")
    out = model(x)
    expected = ladder_loss(out.errors, y, out.code, out.activity, m_plus=0.8, m_minus=0.3, lam=0.7, reg="l1_mean")
    assert torch.allclose(model.training_step(batch, 0), expected, atol=1e-6)


def test_the_decoder_sees_the_true_class_in_training_and_the_found_one_afterwards(batch) -> None:
    x, y = batch
    model = capsnet(decoder_weight=0.1)
    out = model(x)
    true, found = torch.nn.functional.one_hot(y, 3).float(), best(out.scores, 1)
    for stage, shares in (("train", true), ("val", found)):
        error = (model.decoder(out.poses, shares) - x).square().flatten(1).sum(1).mean()
        expected = margin_loss(out.poses.norm(dim=-1), y) + 0.1 * error
        assert torch.allclose(model._measured(stage, batch), expected, atol=1e-5)
    assert not torch.equal(true, found)


def test_prediction_of_the_ladder(batch) -> None:
    model = ladder()
    out, found = model(batch[0]), model.predict_step(batch, 0)
    assert torch.equal(found["class"], out.errors.argmin(1))
    assert torch.equal(found["outlier_score"], out.errors.amin(1))
    assert torch.equal(found["capsules"], out.indices)
    assert torch.equal(found["pose"][5], out.poses[5, found["class"][5]])
    assert found["errors"].shape == (24, 3)
    assert torch.equal(model.predict_step(batch[0], 0)["class"], found["class"])


def test_prediction_of_capsnet(batch) -> None:
    model = capsnet()
    found = model.predict_step(batch, 0)
    assert torch.equal(found["class"], model(batch[0]).poses.norm(dim=-1).argmax(1))
    assert torch.allclose(found["outlier_score"], 1 - found["activities"].amax(1))


def test_the_gap_is_that_of_the_worst_true_class() -> None:
    errors = torch.tensor([[0.1, 0.4, 0.9], [0.5, 0.3, 0.2]])
    true = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    shown = ladder().summary(1 - errors, true)
    assert shown["err_true"].item() == pytest.approx((0.4 + 0.5) / 2)
    assert shown["err_other_min"].item() == pytest.approx((0.9 + 0.2) / 2)
    assert shown["margin_gap"].item() == pytest.approx((0.5 - 0.3) / 2)
    assert capsnet().summary(1 - errors, true)["margin_gap"].item() == pytest.approx((0.5 - 0.3) / 2)
    everything = ladder().summary(1 - errors, torch.ones(2, 3))
    assert all(torch.isfinite(x) for x in everything.values())


def test_several_classes_an_image(batch) -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8]])
    assert is_correct(scores, torch.tensor([[1.0, 1.0, 0.0]] * 2)).tolist() == [True, False]
    assert is_correct(scores, torch.tensor([[0.7, 0.3, 0.0]] * 2)).tolist() == [True, True]
    targets = torch.nn.functional.one_hot(batch[1], 3).roll(1, 1) | torch.nn.functional.one_hot(batch[1], 3)
    assert torch.isfinite(ladder(decoder=True).training_step((batch[0], targets), 0))


@BOTH
def test_black_images_and_a_batch_of_one_are_finite(make) -> None:
    model = make(decoder=True) if make is ladder else make()
    for x in (torch.zeros(4, 1, 8, 8), torch.rand(1, 1, 8, 8)):
        model.zero_grad()
        loss = model.training_step((x, torch.zeros(len(x), dtype=torch.long)), 0)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@BOTH
def test_autocast_stays_within_two_percent(make, batch) -> None:
    plain = make().training_step(batch, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make().training_step(batch, 0)
    assert mixed.item() == pytest.approx(plain.item(), rel=0.02)


@BOTH
def test_the_whole_network_compiles_without_a_break(make, batch) -> None:
    model = make()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(batch[0]).scores, model(batch[0]).scores, atol=1e-6)
    torch.compiler.reset()


# --- training


def test_fits_a_hundred_images() -> None:
    data = PoseDataModule("digits", train_rotation=(0, 0), train_size=100)
    data.setup("fit")
    x, y = data.train_dataset.__getitems__(range(100)).inputs, data.train_dataset.targets
    model = ladder(width=32, types=8, num_classes=10, lr=5e-3, k=16, map_init="unit")
    loader = DataLoader(TensorDataset(x, y), 25, shuffle=True)
    Trainer(max_epochs=60, accelerator="cpu", limit_val_batches=0, barebones=True).fit(model, loader)
    assert torch.equal(model.predict_step(x, 0)["class"], y)


@pytest.mark.slow
def test_digits_to_95_percent_in_a_minute(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = PoseDataModule("digits", train_rotation=(0, 0), test_rotations=(0,))
    model = LadderCapsuleNetwork(
        image_size=8, k=16, types=8, pose_dim=8, width=32, kernel_size=3, hidden=(32, 48, 64), hyper="shared", lr=3e-3
    )
    start = time.process_time()
    trainer = quiet_trainer(tmp_path, max_epochs=12)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert found["test/accuracy"] >= 0.95
    assert time.process_time() - start < 60


def test_optimisation_is_that_of_the_official_code_unless_another_is_given(tmp_path: Path, batch) -> None:
    made = ladder(lr_step=2, lr_gamma=0.5).configure_optimizers()
    assert isinstance(made["optimizer"], torch.optim.Adam)
    assert made["lr_scheduler"]["interval"] == "step"
    model = ladder(lr_step=2, lr_gamma=0.5)
    trainer = quiet_trainer(tmp_path, max_steps=5)
    trainer.fit(model, DataLoader(TensorDataset(*batch), 4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert isinstance(capsnet(lr=0.1).configure_optimizers(), torch.optim.Adam)

    def sgd(weights):
        return torch.optim.SGD(weights, lr=0.1)

    def steps(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    for make in (ladder, capsnet):
        (optimizer,), (scheduler,) = make(optimizer=sgd, scheduler=steps).configure_optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        assert scheduler.optimizer is optimizer


@BOTH
def test_a_checkpoint_brings_the_network_back(make, tmp_path: Path, batch) -> None:
    model = make()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, DataLoader(TensorDataset(*batch), 8))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = type(model).load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert torch.equal(again(batch[0]).scores, model(batch[0]).scores)


def test_one_loader_a_pose(tmp_path: Path, batch) -> None:
    data = PoseDataModule("digits", test_rotations=(0, 45), test_translations=(1,), test_size=50)
    model = LadderCapsuleNetwork(image_size=8, k=6, types=4, width=8, kernel_size=3, hidden=(8,))
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    (*found,) = trainer.test(model, data, verbose=False)
    values = {key: value for one in found for key, value in one.items()}
    for name in ("rotation_0", "rotation_45", "translation_1"):
        assert 0 <= values[f"test/accuracy/{name}"] <= 1
        assert values[f"test/err_other_min/{name}"] > 0
    assert (tmp_path / "ladder_capsule" / "accuracy_rotation_0.png").is_file()
    table = (tmp_path / "ladder_capsule" / "poses_0.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table] == [
        ["pose", "level"],
        ["rotation", "0.0"],
        ["rotation", "45.0"],
        ["translation", "1.0"],
    ]
    accuracy = [float(line.split(",")[2]) for line in table[1:]]
    assert accuracy == pytest.approx([values[f"test/accuracy/{lv.name}"] for lv in data.levels])
    loaders = [DataLoader(TensorDataset(*batch), 8)] * 2
    numbered = quiet_trainer(tmp_path).test(ladder(), loaders, verbose=False)
    assert {"test/loss/0", "test/loss/1"} <= {key for one in numbered for key in one}


def test_validation_logs_errors_and_gap(tmp_path: Path, batch) -> None:
    loader = DataLoader(TensorDataset(*batch), 8)
    model = ladder()
    (shown,) = quiet_trainer(tmp_path).validate(model, loader, verbose=False)
    out = model(batch[0])
    own = out.errors[torch.arange(24), batch[1]]
    assert shown["val/err_true"] == pytest.approx(own.mean().item(), rel=1e-5)
    assert shown["val/margin_gap"] == pytest.approx(shown["val/err_other_min"] - shown["val/err_true"], rel=1e-4)
    assert shown["val/accuracy"] == pytest.approx((out.errors.argmin(1) == batch[1]).float().mean().item())
    assert "val/code_reg" in shown


# --- bad input


def test_images_too_small_for_the_kernels() -> None:
    with pytest.raises(ShapeMismatch, match=r"need 17 x 17 pixels"):
        LadderCapsuleNetwork(image_size=16)
    with pytest.raises(ShapeMismatch, match="cannot take images"):
        ladder(backbone=nn.Conv2d(1, 4, 9))
    with pytest.raises(ShapeMismatch, match="smaller than the kernel of 3 x 3"):
        ladder(backbone=nn.Conv2d(1, 4, 7))
    with pytest.raises(ShapeMismatch, match=r"gives \(1, 64\)"):
        ladder(backbone=nn.Flatten())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 17}, "k=17 capsules cannot be kept of 16"),
        ({"k": 0}, "k=0"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"width": 0}, "width=0"),
        ({"loss": "margin"}, "loss='margin' is not known"),
        ({"reg": "l1"}, "reg='l1' is not known"),
        ({"reg_weight": -1.0}, "reg_weight=-1"),
        ({"lam": -1.0}, "lam=-1"),
        ({"lr": 0.0}, "lr=0"),
        ({"lr_step": 0}, "lr_step=0"),
        ({"lr_step": 1.5}, "lr_step=1.5"),
        ({"hidden": 8}, "hidden=8"),
        ({"hidden": (8.5,)}, r"hidden=\[8.5\]"),
        ({"coupling_hidden": ("8",)}, "coupling_hidden"),
        ({"image_size": (8, 8, 1)}, r"image_size=\(8, 8, 1\)"),
        ({"image_size": 8.0}, "image_size=8.0"),
        ({"image_size": 0}, "image_size=0"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"decoder": True, "decoder_hidden": ()}, "decoder_hidden"),
        ({"decoder": True, "decoder_weight": 0.0}, "decoder_weight=0"),
    ],
)
def test_settings_that_cannot_be(settings, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ladder(**settings)


@BOTH
def test_batches_that_cannot_be(make, batch) -> None:
    x, y = batch
    with pytest.raises(ShapeMismatch, match=r"\(B, 1, 8, 8\)"):
        make()(x[:, :, :7])
    with pytest.raises(InvalidArgument, match="out of range"):
        make().training_step((x, y + 1), 0)
    with pytest.raises(ShapeMismatch, match=r"\(B, 3\)"):
        make().training_step((x, torch.rand(24, 4)), 0)
    with pytest.raises(BatchFormat, match="targets"):
        make().training_step(x, 0)
    with pytest.raises(BatchFormat, match=r"torch.uint8.*float\(\) / 255"):
        make()((255 * x).byte())
    with pytest.raises(InvalidArgument, match="targets are list"):
        make().training_step((x, y.tolist()), 0)
    with pytest.raises(ShapeMismatch, match="batch is empty"):
        make().training_step((x[:0], y[:0]), 0)
    assert all(len(found) == 0 for found in make().predict_step(x[:0], 0).values())
    x[0, 0, 0, 0] = torch.nan
    with pytest.warns(NotFinite, match="NaN"):
        make().training_step((x, y), 0)


def test_capsnet_refuses_constants_that_cannot_be() -> None:
    for name in ("m_plus", "m_minus", "lam"):
        for value in (-1.0, float("nan")):
            with pytest.raises(InvalidArgument, match=f"{name}={value}"):
                capsnet(**{name: value})


def test_a_picture_needs_a_decoder(batch) -> None:
    out = ladder()(batch[0])
    with pytest.raises(InvalidArgument, match="decoder=True"):
        ladder().reconstruct(out.poses, best(out.scores, 1))
    assert isinstance(capsnet(reconstruction=False), CapsuleNetwork)
