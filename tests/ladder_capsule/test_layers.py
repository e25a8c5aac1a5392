"""Layers: sizes of the paper, equality with loops and dense products, gradients, compilation, precision, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_methods.errors import InvalidArgument, NoEffect, ShapeMismatch
from lightning_methods.ladder_capsule import (
    DynamicRouting,
    LadderHead,
    PrimaryCapsules,
    PruningLayer,
    ladder_loss,
    squash,
)
from lightning_methods.ladder_capsule.functional import capsules_of, ladder_inference
from lightning_methods.ladder_capsule.hyper import CodeLinear, Mixture
from lightning_methods.ladder_capsule.layers import Decoder
from tests.ladder_capsule import oracle

SIZES = {"num_caps": 12, "num_classes": 4, "k": 5, "in_dim": 3, "out_dim": 6}


def made_head(hyper: str = "per_class", dtype: torch.dtype = torch.float64, **settings: object) -> LadderHead:
    torch.manual_seed(0)
    return LadderHead(**{**SIZES, "hidden": (7, 9), "hyper": hyper, "rank": 4, **settings}).to(dtype)


def made_capsules(batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 12, 3, generator=torch.Generator().manual_seed(1), dtype=dtype).relu()


# --- sizes of the paper


def test_the_official_size_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        head = LadderHead(1152)
        shared = LadderHead(1152, hyper="shared")
        body = nn.Sequential(nn.Conv2d(1, 256, 9), PrimaryCapsules(256))
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("h", head), ("s", shared), ("b", body))}
    assert count["h"] + count["b"] == 80_863_784
    assert count["s"] + count["b"] < 8_000_000


def test_first_weights_are_those_of_the_official_code() -> None:
    torch.manual_seed(0)
    layer = CodeLinear(100, [(4, 20), (2, 50)])
    maps, coupling = layer.weight.split([80, 100], dim=1)
    assert maps.abs().max().item() == pytest.approx((6 / 120) ** 0.5, rel=0.01)
    assert coupling.abs().max().item() == pytest.approx((6 / 150) ** 0.5, rel=0.01)
    assert layer.bias[:80].abs().max().item() == pytest.approx((3 / 20) ** 0.5, rel=0.1)


# --- primary capsules


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_primary_capsules_are_channels_of_one_position(activation) -> None:
    layer = PrimaryCapsules(2, types=3, dim=4, kernel_size=3, activation=activation)
    x = torch.randn(2, 2, 9, 8)
    maps = layer.conv(x).relu() if activation == "relu" else layer.conv(x)
    assert layer.grid(x) == tuple(maps.shape[2:])
    assert torch.equal(layer(x), capsules_of(maps, 4))
    assert (layer(x) < 0).any() == (activation == "none")


def test_maps_smaller_than_the_kernel() -> None:
    with pytest.raises(ShapeMismatch, match="smaller than the kernel of 9 x 9"):
        PrimaryCapsules(2)(torch.zeros(1, 2, 8, 20))


# --- pruning


def test_gradients_reach_kept_capsules_and_all_activities() -> None:
    capsules = made_capsules().requires_grad_()
    pruned = PruningLayer(5)(capsules)
    assert not pruned.code.requires_grad
    assert torch.equal(pruned.code.sum(1), torch.full((3,), 5.0, dtype=torch.float64))
    assert torch.allclose(pruned.active, squash(capsules.gather(1, pruned.indices[..., None].expand(-1, -1, 3))))
    (through_active,) = torch.autograd.grad(pruned.active.sum(), capsules, retain_graph=True)
    left_out = pruned.code == 0
    assert (through_active[left_out] == 0).all()
    (through_activity,) = torch.autograd.grad(pruned.activity.sum(), capsules)
    assert (through_activity[left_out & (capsules > 0).any(-1)] != 0).any()


def test_pruning_refuses() -> None:
    with pytest.raises(InvalidArgument, match="k=0"):
        PruningLayer(0)
    with pytest.raises(InvalidArgument, match="k=13 of 12"):
        PruningLayer(13)(made_capsules())
    with pytest.raises(ShapeMismatch, match=r"\(B, N, d\)"):
        PruningLayer(1)(torch.zeros(3, 4))


# --- the head


@pytest.mark.parametrize("batch", [1, 3])
def test_head_equals_the_loop_over_classes_with_dense_products(batch: int) -> None:
    head, capsules = made_head(), made_capsules(batch)
    pruned = PruningLayer(5)(capsules)
    out = head(pruned)
    errors, poses = oracle.direct_head(head, capsules, pruned.indices)
    assert torch.allclose(out.errors, errors, atol=1e-10, rtol=0)
    assert torch.allclose(out.poses, poses, atol=1e-10, rtol=0)


def test_gradients_equal_those_of_the_loop() -> None:
    head, capsules = made_head(), made_capsules()
    pruned = PruningLayer(5)(capsules)
    ours = torch.autograd.grad(head(pruned).errors.square().sum(), list(head.parameters()))
    direct, _ = oracle.direct_head(head, capsules, pruned.indices)
    theirs = torch.autograd.grad(direct.square().sum(), list(head.parameters()))
    assert all(torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("hyper", ["per_class", "shared"])
def test_every_parameter_gets_a_finite_gradient(hyper) -> None:
    head = made_head(hyper)
    for capsules in (made_capsules(), torch.zeros(3, 12, 3, dtype=torch.float64)):
        pruned = PruningLayer(5)(capsules.clone().requires_grad_())
        out = head(pruned)
        loss = ladder_loss(out.errors, torch.tensor([0, 1, 3]), out.code, out.activity)
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        assert all(torch.isfinite(g).all() for g in (loss, *gradients))
    assert torch.allclose(out.errors, out.reconstruction.norm(dim=-1).mean(-1), atol=1e-6)


def laid_out(maps: Mixture) -> torch.Tensor:
    k, dim = maps.capsule
    basis = maps.basis.unflatten(2, (maps.weights.shape[2], -1))
    basis, offset = (x.expand(len(maps.weights), *x.shape[1:]) for x in (basis, maps.offset))
    whole = torch.einsum("cbr,cnre->cbne", maps.weights, basis) + offset[:, None]
    return whole.unflatten(2, (k, dim))


@pytest.mark.parametrize("hyper", ["per_class", "shared"])
def test_maps_that_are_not_laid_out_are_the_maps(hyper) -> None:
    head, pruned = made_head(hyper), PruningLayer(5)(made_capsules())
    maps = head.hyper(pruned.indices)
    whole = [laid_out(x) for x in maps[:2]]
    assert all(x.shape == y.shape == (4, 3, 5, 3, 6) for x, y in zip(whole, maps[:2], strict=True))
    direct, ours = ladder_inference(pruned.active, *whole, maps.coupling), head(pruned)
    assert all(torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(direct, ours[:3], strict=True))
    parameters = list(head.parameters())
    ours, direct = (torch.autograd.grad(x.errors.square().sum(), parameters, retain_graph=True) for x in (ours, direct))
    assert all(torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(ours, direct, strict=True))


def test_shared_maps_are_mixtures_and_classes_differ() -> None:
    head = made_head("shared")
    maps = head.hyper(PruningLayer(5)(made_capsules()).indices)
    assert maps.coupling.shape == (4, 3, 5)
    whole = laid_out(maps.forward_maps)
    centred = (whole - head.hyper.forward_maps.bias[0].view(5, 3, 6)).flatten(2).flatten(0, 1)
    assert torch.linalg.matrix_rank(centred) == 4
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("hyper", ["per_class", "shared"])
def test_unit_maps_reconstruct_capsules_of_about_length_one(hyper) -> None:
    lengths = {}
    for init in ("xavier", "unit"):
        head = made_head(hyper, map_init=init, num_caps=200, k=64, hidden=(32,), out_dim=16, in_dim=8)
        capsules = torch.randn(4, 200, 8, dtype=torch.float64).relu()
        lengths[init] = head(PruningLayer(64)(capsules)).reconstruction.norm(dim=-1).mean()
    assert lengths["xavier"] < 0.2 < 0.4 < lengths["unit"]


@pytest.mark.parametrize("hyper", ["per_class", "shared"])
def test_compiles_without_a_break(hyper) -> None:
    net = nn.Sequential(PrimaryCapsules(2, 3, 3, kernel_size=3), PruningLayer(5), made_head(hyper, torch.float32))
    x = torch.randn(3, 2, 5, 5)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    ours, plain = compiled(x), net(x)
    assert torch.allclose(ours.errors, plain.errors, atol=1e-6)
    ours.errors.sum().backward()
    torch.compiler.reset()


def test_routing_and_loss_compile_without_a_break() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ladder_loss(routing(x).norm(dim=-1), y)

    routing = DynamicRouting(12, 4, 3, 6)
    x, y = torch.randn(2, 12, 3), torch.tensor([0, 3])
    assert torch.allclose(step(x, y), ladder_loss(routing(x).norm(dim=-1), y), atol=1e-6)
    torch.compiler.reset()


def test_half_precision_stays_within_two_percent() -> None:
    head, capsules = made_head(dtype=torch.float32), made_capsules(dtype=torch.float32)
    y = torch.tensor([0, 1, 3])
    plain = ladder_loss(head(PruningLayer(5)(capsules)).errors, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(PruningLayer(5)(capsules))
        mixed = ladder_loss(out.errors, y)
    assert out.errors.dtype == mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain.item(), rel=0.02)


def test_head_refuses() -> None:
    with pytest.raises(InvalidArgument, match="k=13 capsules cannot be kept of 12"):
        made_head(k=13)
    with pytest.raises(InvalidArgument, match=r"hidden=\[\]"):
        made_head(hidden=())
    with pytest.raises(InvalidArgument, match="hyper='both' is not known"):
        made_head("both")
    with pytest.raises(InvalidArgument, match="map_init='ones' is not known"):
        made_head(map_init="ones")
    with pytest.raises(InvalidArgument, match="num_classes=0"):
        made_head(num_classes=0)
    with pytest.warns(NoEffect, match="keeps every capsule"):
        made_head(k=12)
    with pytest.raises(ShapeMismatch, match="images of another size"):
        made_head()(PruningLayer(5)(torch.rand(2, 13, 3)))


# --- routing and decoder


def test_votes_of_the_routing_layer() -> None:
    layer = DynamicRouting(5, 3, 2, 4).double()
    x = squash(torch.randn(2, 5, 2, dtype=torch.float64))
    votes = torch.einsum("bnd,cdne->bcne", x, layer.weight)
    assert torch.allclose(layer(x), oracle.direct_routing(votes, 3), atol=1e-10)
    with pytest.raises(ShapeMismatch, match=r"\(B, 5, 2\)"):
        layer(torch.zeros(2, 6, 2))
    with pytest.raises(InvalidArgument, match="init_std=0"):
        DynamicRouting(5, init_std=0)
    with pytest.raises(InvalidArgument, match="iters=0"):
        DynamicRouting(5, iters=0)


def test_decoder_sees_the_shown_class_alone() -> None:
    decoder = Decoder(3, 4, (1, 5, 6), hidden=(8,))
    poses = torch.randn(2, 3, 4)
    shown = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    other = poses.clone()
    other[:, [0, 2]] += 1
    assert torch.equal(decoder(poses, shown), decoder(other, shown))
    assert decoder(poses, shown).shape == (2, 1, 5, 6)
    with pytest.raises(InvalidArgument, match="decoder_activation='tanh'"):
        Decoder(3, 4, (1, 5, 6), activation="tanh")
