"""The monitor: its numbers by hand, its pictures on disk, several networks, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import CapsuleMonitor, Classifier
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.ladder_capsule.drawing import entropy
from lightning_methods.models import MLP
from tests.ladder_capsule.conftest import capsnet, ladder
from tests.support.drawing import leave_undrawn
from tests.support.training import quiet_trainer


def train(module: LightningModule, monitor: CapsuleMonitor, folder: Path, batch, **settings) -> None:
    loader = DataLoader(TensorDataset(*batch), 8)
    quiet_trainer(folder, callbacks=[monitor], **settings).fit(module, loader, loader)


def test_health_by_hand(tmp_path: Path, batch, monkeypatch) -> None:
    leave_undrawn(monkeypatch.setattr)
    module, monitor = ladder(), CapsuleMonitor(limit=3, dead_below=0.05)
    train(module, monitor, tmp_path, batch, max_epochs=2)
    out = module(batch[0])
    (_, first), (epoch, last) = monitor.history
    assert epoch == 1
    assert first != last
    assert last["dead"] == pytest.approx(float((out.activity < 0.05).all(0).float().mean()))
    assert last["activity"] == pytest.approx(out.activity.mean().item(), rel=1e-5)
    kept = out.code.sum(0)
    assert last["starved"] == pytest.approx((kept == 0).float().mean().item())
    p = kept[kept > 0] / kept.sum()
    assert last["code_entropy"] == pytest.approx(
        -(p * p.log()).sum().item() / torch.tensor(16.0).log().item(), rel=1e-5
    )
    assert last["unique_codes"] == len({tuple(row) for row in out.code.tolist()}) / 24
    table = (tmp_path / "ladder_capsule" / "health_table_6.csv").read_text().splitlines()
    assert table[0] == "epoch,dead,activity,starved,code_entropy,unique_codes"
    assert len(table) == 3


@pytest.mark.parametrize("make", [ladder, capsnet], ids=["ladder", "capsnet"])
def test_pictures(make, tmp_path: Path, batch) -> None:
    settings = {"decoder": True} if make is ladder else {"reconstruction": True}
    module, monitor = make(**settings), CapsuleMonitor(images=3, steps=(-0.2, 0.0, 0.2))
    train(module, monitor, tmp_path, batch)
    names = ["health", "capsules", "reconstructions", "perturbations"]
    assert [path.stem.rpartition("_")[0] for path in monitor.figure_paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in monitor.figure_paths)
    assert ("code_entropy" in monitor.history[0][1]) == (make is ladder)


def test_colour_images_of_another_backbone_and_no_decoder(tmp_path: Path, batch) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4))
    backbone[1].eval()
    module = ladder(backbone=backbone, in_channels=3, types=8)
    monitor = CapsuleMonitor(log_prefix="watch", every_n_epochs=2, data="train")
    train(module, monitor, tmp_path, (batch[0].expand(-1, 3, -1, -1), batch[1]))
    assert [path.name for path in monitor.figure_paths] == ["health_6.png", "capsules_6.png"]
    assert [epoch for epoch, _ in monitor.history] == [1]


def test_only_capsule_networks_are_watched(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(8, 64), torch.zeros(8, dtype=torch.long))
    trainer = quiet_trainer(tmp_path, callbacks=[CapsuleMonitor()])
    with pytest.raises(UnsupportedTraining, match="Classifier has no grid"):
        trainer.fit(Classifier(MLP(64, (8,))), DataLoader(data, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "holdout"}, "data='holdout'"),
        ({"limit": 0}, "limit=0"),
        ({"images": 0}, "images=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"dead_below": 0.0}, "dead_below=0"),
        ({"steps": ()}, r"steps=\(\)"),
        ({"steps": "abc"}, "steps='abc'"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"data": None}, "data=None"),
    ],
)
def test_refuses(settings, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        CapsuleMonitor(**settings)


def test_entropy() -> None:
    assert entropy(torch.ones(7)) == pytest.approx(1)
    assert entropy(torch.tensor([3.0, 0.0])) == 0
    assert entropy(torch.zeros(4)) == 0
    assert entropy(torch.ones(1)) == 0
