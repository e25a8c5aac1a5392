"""Teachers: checkpoints of every kind, names, fingerprints; and what sections are found."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from lightning_methods.errors import InvalidArgument, LayerNotFound, MissingDependency, ShapeMismatch
from lightning_methods.lit import fingerprint, load_teacher, match_sections
from lightning_methods.lit.measure import Example, cost_of
from lightning_methods.models import CIFARResNet
from tests.lit.conftest import dense


@pytest.mark.parametrize("prefix", ["", "model.", "student.", "net._orig_mod.", "module.backbone."])
@pytest.mark.parametrize("form", ["plain", "lightning", "nested"])
def test_checkpoints(prefix, form, tmp_path):
    torch.manual_seed(0)
    net, path = dense(2, norm=nn.BatchNorm1d), tmp_path / "a.ckpt"
    weights = {f"{prefix}{k}": v for k, v in net.state_dict().items()}
    if prefix:
        weights["metric.total"] = torch.zeros(1)
    held = {"plain": weights, "lightning": {"state_dict": weights, "epoch": 3}, "nested": {"model": weights}}[form]
    torch.save(held, path)
    loaded = load_teacher(dense(2, norm=nn.BatchNorm1d), path)
    assert fingerprint(loaded) == fingerprint(net)
    assert not loaded.training


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(dense(2).state_dict(), path)
    with pytest.raises(ShapeMismatch, match=r"missing in the file \(4\): layer1.4.weight"):
        load_teacher(dense(3), path)
    with pytest.raises(ShapeMismatch, match=r"not in the network \(4\)"):
        load_teacher(dense(1), path)
    with pytest.raises(ShapeMismatch, match=r"head.weight: \(3, 8\) in the file, \(5, 8\) in the network"):
        load_teacher(dense(2, classes=5), path)
    assert load_teacher(dense(3), path, strict=False) is not None
    with pytest.raises(ShapeMismatch):
        load_teacher(nn.Linear(2, 2), path, strict=False)  # nothing of it is there
    with pytest.raises(InvalidArgument, match=r"Did you mean 'a\.ckpt'"):
        load_teacher(dense(2), tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_text("no checkpoint")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_teacher(dense(2), tmp_path / "c.ckpt")
    torch.save({"epoch": 3}, tmp_path / "d.ckpt")
    with pytest.raises(InvalidArgument, match="no state dict"):
        load_teacher(dense(2), tmp_path / "d.ckpt")


def test_names(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=4)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    loaded = load_teacher("torchvision:resnet18", tmp_path / "a.pt", num_classes=4)
    assert fingerprint(loaded) == fingerprint(net)
    with pytest.raises(InvalidArgument, match="resnet34"):
        load_teacher("torchvision:resnet33")
    with pytest.raises(InvalidArgument, match="torchvision:resnet34"):
        load_teacher("resnet34")
    own = importlib.import_module

    def without_timm(name, *args):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return own(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_timm)
    with pytest.raises(MissingDependency, match="pip install timm"):
        load_teacher("timm:resnet34")


def test_fingerprints():
    torch.manual_seed(0)
    net = dense(1)
    before = fingerprint(net)
    assert fingerprint(torch.compile(net)) == before
    assert fingerprint(net.bfloat16()) != before


def test_tables_of_sections():
    table = match_sections(CIFARResNet(20, width=4), CIFARResNet(8, width=6), torch.zeros(1, 3, 8, 8))
    assert not table.fits
    assert "1x4x8x8 / 1x6x8x8" in str(table)
    with pytest.raises(LayerNotFound, match="different numbers"):
        match_sections(dense(1), dense(1), torch.zeros(1, 6))
    wrapped = nn.Sequential(), nn.Sequential()
    for network, depth in zip(wrapped, (3, 1), strict=True):
        network.add_module("net", dense(depth))
    assert [m.student for m in match_sections(*wrapped, torch.zeros(1, 6))] == ["net.layer1", "net.layer2"]
    named = match_sections(dense(3), dense(1), {"input": torch.zeros(1, 6)})
    assert named.fits


def test_costs():
    net = CIFARResNet(8, width=16)
    example = Example((torch.zeros(20, 3, 32, 32),), {})
    cost = cost_of(net.eval(), *example.arguments(net), example.samples)
    assert example.samples == 8
    assert (cost.parameters, cost.depth) == (75290, 8)
    convolutions = 27 * 16 * 1024 + 2 * 144 * 16 * 1024
    convolutions += 144 * 32 * 256 + 288 * 32 * 256 + 288 * 64 * 64 + 576 * 64 * 64
    assert cost.macs == convolutions + 640
    assert cost.seconds > 0
