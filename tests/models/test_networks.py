"""The reference networks: shapes, sizes, names, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_methods.errors import InvalidArgument
from lightning_methods.models import MLP, CIFARResNet, ConvNet, SmallConvNet


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (MLP(64), (1, 8, 8)),
        (MLP(64, hidden=()), (64,)),
        (MLP(12, hidden=(5,), num_classes=3, dropout=0.5, norm="batch"), (3, 2, 2)),
        (MLP(12, hidden=(5, 4), num_classes=3, norm="layer"), (12,)),
        (ConvNet(), (1, 28, 28)),
        (ConvNet((3, 32, 32), 7, width=0.1), (3, 32, 32)),
        (ConvNet((2, 33, 41), width=0.05), (2, 33, 41)),
        (SmallConvNet(), (1, 8, 8)),
        (SmallConvNet((3, 7, 12), 4, width=0.1), (3, 7, 12)),
        (CIFARResNet(8, width=4), (3, 32, 32)),
        (CIFARResNet(14, width=3, num_classes=5, in_channels=1), (1, 28, 28)),
    ],
)
def test_logits_and_gradients(net: nn.Module, shape: tuple[int, ...]) -> None:
    logits = net(torch.randn(4, *shape))
    assert logits.shape == (4, net.head.out_features)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_names_to_tap() -> None:
    assert [n for n, _ in MLP(4).named_children()] == ["flatten", "layer1", "layer2", "head"]
    assert [n for n, _ in MLP(4, dropout=0.1, norm="layer").layer1.named_children()] == [
        "linear",
        "norm",
        "act",
        "dropout",
    ]
    assert [n for n, _ in SmallConvNet().named_children()] == ["layer1", "layer2", "layer3", "flatten", "head"]
    names = [n for n, _ in CIFARResNet(14, width=2).named_children()]
    assert names == ["stem", "layer1", "layer2", "layer3", "pool", "flatten", "head"]
    assert [n for n, _ in CIFARResNet(14, width=2).layer2.named_children()] == ["block1", "block2"]


@pytest.mark.parametrize("net", [MLP(4), ConvNet(), SmallConvNet(), CIFARResNet()])
def test_no_relu_works_in_place(net: nn.Module) -> None:
    assert not any(m.inplace for m in net.modules() if isinstance(m, nn.ReLU))


def test_convnet_is_the_card_s_network() -> None:
    net = ConvNet()
    x = torch.zeros(1, 1, 28, 28)
    sizes = []
    for i in (1, 2, 3):
        x = net.get_submodule(f"layer{i}")(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 14, 14), (128, 5, 5), (128, 1, 1)]
    assert net.head.in_features == 128
    assert sum(p.numel() for p in net.parameters()) == 710_218


def test_convnet_has_he_initialisation() -> None:
    torch.manual_seed(0)
    weight = ConvNet().layer2.conv.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 36)) ** 0.5, rel=0.02)
    assert ConvNet().layer2.conv.bias.abs().max() == 0


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_sizes_are_those_of_table_6(depth: int, millions: float) -> None:
    net = CIFARResNet(depth)
    digits = 1 if millions > 1 else 2
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, digits) == millions
    with_weights = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(with_weights) == depth


def test_resnet_stages() -> None:
    net, x = CIFARResNet(20), torch.zeros(1, 3, 32, 32)
    sizes = {}
    for name, module in net.named_children():
        x = module(x)
        sizes[name] = tuple(x.shape[1:])
    assert (sizes["layer1"], sizes["layer2"], sizes["layer3"]) == ((16, 32, 32), (32, 16, 16), (64, 8, 8))


def test_shortcut_is_every_second_pixel_and_zeros() -> None:
    block = CIFARResNet(8, width=2).layer2.block1
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(1, 2, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert out[:, 2:].abs().max() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0), "in_features=0"),
        (lambda: MLP(4, hidden=(3, 0)), r"hidden=\(3, 0\)"),
        (lambda: MLP(4, dropout=1.0), r"dropout=1\.0"),
        (lambda: MLP(4, norm="bach"), "Did you mean 'batch'"),
        (lambda: ConvNet((1, 8, 8)), "Use SmallConvNet"),
        (lambda: ConvNet((1, 28, 27)), "nothing is left after its layer 3"),
        (lambda: SmallConvNet((1, 6, 6)), "at least 7x7"),
        (lambda: ConvNet((28, 28)), r"shape \(C, H, W\)"),
        (lambda: ConvNet(width=0), "width=0"),
        (lambda: CIFARResNet(18), "nearest are 14 and 20"),
        (lambda: CIFARResNet(2), "nearest are 8 and 14"),
        (lambda: CIFARResNet(width=0), "width=0"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


@pytest.mark.parametrize(
    "net", [MLP(64), ConvNet(width=0.1), SmallConvNet(width=0.1), CIFARResNet(8)], ids=str.__class__
)
def test_a_slice_is_a_plain_chain_of_the_same_layers(net: nn.Module) -> None:
    part = net[:2]
    assert type(part) is nn.Sequential
    assert [name for name, _ in part.named_children()] == [name for name, _ in net.named_children()][:2]
    assert part[0] is net[0]
