"""The encoder equals the transform, learns its scales from there, compiles, and has safe gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.geometric_scattering import (
    ScatteringEncoder,
    lazy_random_walk,
    scattering_coefficients,
    scattering_moments,
)
from lightning_methods.geometric_scattering.functional import transition
from tests.geometric_scattering.oracle import complete, path_graph, random_graph


@pytest.fixture
def graphs() -> tuple[Tensor, Tensor, Tensor]:
    """Edges, signals and batch of two graphs, one of them with an isolated node."""
    torch.manual_seed(0)
    edges = torch.cat([random_graph(15, 0.3, 1), random_graph(10, 0.4, 2) + 15], 1)
    edges = edges[:, ((edges != 3).all(0))]
    return edges, torch.rand(25, 2, dtype=torch.float64), torch.tensor([0] * 15 + [1] * 10)


def fixed(graphs: tuple[Tensor, Tensor, Tensor], *, normalized: bool = True, **settings: object) -> Tensor:
    edges, x, batch = graphs
    filters = {k: settings.pop(k) for k in ("include_finest", "include_lowpass", "order", "J") if k in settings}
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=25, **settings), x, **filters)
    return scattering_moments(u, batch, 2, normalized=normalized)


@pytest.mark.parametrize("learnable", [False, "legs"])
@pytest.mark.parametrize("scale_mode", ["softmax", "free"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalized": False},
        {"include_finest": True, "include_lowpass": True, "J": 3},
        {"isolated": "stay"},
        {"normalization": "row"},
        {"order": 3, "J": 3, "normalization": "symmetric"},
    ],
    ids=str,
)
def test_starts_as_the_fixed_transform(graphs, learnable, scale_mode, settings):
    edges, x, batch = graphs
    encoder = ScatteringEncoder(2, learnable=learnable, scale_mode=scale_mode, **settings).double()
    found = encoder(x, edges, batch=batch, batch_size=2)
    expected = fixed(graphs, **settings)
    assert found.shape == (2, encoder.out_channels) == expected.shape
    assert len(encoder.feature_names()) == encoder.out_channels
    tolerance = 1e-10 if not learnable or scale_mode == "free" else 1e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
    if learnable and not settings.get("normalized", True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_every_parameter_gets_a_gradient_and_the_fixed_one_has_none(graphs):
    edges, x, batch = graphs
    encoder = ScatteringEncoder(2, learnable="legs").double()
    encoder(x, edges, batch=batch).square().sum().backward()
    assert {name for name, _ in encoder.named_parameters()} == {"selector", "laziness"}
    for parameter in encoder.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    assert not list(ScatteringEncoder(2).parameters())
    assert not ScatteringEncoder(2, learnable=True, learn_laziness=False).laziness.requires_grad


@pytest.mark.parametrize("scale_mode", ["softmax", "free"])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_of_scales_and_laziness(normalized, scale_mode):
    edges, x = random_graph(7, 0.5, 3), torch.rand(7, 1, dtype=torch.float64)
    encoder = ScatteringEncoder(1, J=2, learnable="legs", scale_mode=scale_mode, normalized=normalized).double()
    torch.manual_seed(0)
    selector = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    laziness = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def features(selector: Tensor, laziness: Tensor, x: Tensor) -> Tensor:
        given = {"selector": selector, "laziness": laziness}
        return torch.func.functional_call(encoder, given, (x, edges))

    x.requires_grad_()
    assert torch.autograd.gradcheck(features, (selector, laziness, x), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("learnable", [False, "legs"])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_are_finite_on_regular_graphs(normalized, learnable):
    x = torch.ones(6, 1, requires_grad=True)
    encoder = ScatteringEncoder(1, normalized=normalized, learnable=learnable)
    encoder(x, complete(6)).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("learnable", [False, "legs"])
def test_compiles_into_one_graph(graphs, learnable):
    edges, x, batch = graphs
    encoder = ScatteringEncoder(2, J=3, learnable=learnable).double()
    edges, weight, _ = transition(edges, None, 25)
    eager = encoder.from_transition(x, edges, weight, None, batch, 2)
    torch._dynamo.reset()
    compiled = torch.compile(encoder.from_transition, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, edges, weight, None, batch, 2), eager)


def test_half_precision_and_autocast_are_computed_in_single(graphs):
    edges, x, batch = graphs
    encoder = ScatteringEncoder(2)
    expected = encoder(x.bfloat16().float(), edges, batch=batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(x.bfloat16(), edges, batch=batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_scales_can_be_learned():
    """Graphs that differ at one scale only, which the selector finds from far away."""
    torch.manual_seed(0)
    encoder = ScatteringEncoder(1, J=3, order=1, Q=1, normalized=False, learnable="legs", learn_laziness=False).double()
    edges = path_graph(12)
    x = torch.randn(12, 1, dtype=torch.float64)
    P = lazy_random_walk(edges)
    wanted = (P @ x - torch.linalg.matrix_power(P.to_dense(), 6) @ x).abs().sum()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1, eps=1e-30)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (encoder(x, edges)[0, 2] - wanted).square()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]


def test_state_dict_round_trip(graphs):
    edges, x, batch = graphs
    encoder, other = (ScatteringEncoder(2, learnable="legs") for _ in range(2))
    torch.nn.init.normal_(encoder.selector)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(x, edges, batch=batch), encoder(x, edges, batch=batch))
    torch.testing.assert_close(encoder.scales().sum(1), torch.ones(6))
    assert ScatteringEncoder(1).scales().argmax(1).tolist() == [0, 1, 3, 7, 15, 31]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ScatteringEncoder(0), InvalidArgument, "in_channels=0"),
        (lambda: ScatteringEncoder(1, learnable="legz"), InvalidArgument, "legs"),
        (lambda: ScatteringEncoder(1, scale_mode="soft"), InvalidArgument, "softmax"),
        (lambda: ScatteringEncoder(1, J=0), InvalidArgument, "J=0"),
        (lambda: ScatteringEncoder(1)(torch.rand(3, 2), path_graph(3)), ShapeMismatch, r"\(n, 1\)"),
        (lambda: ScatteringEncoder(1)(torch.rand(2), path_graph(3)), InvalidArgument, "there are 2 nodes"),
        (lambda: ScatteringEncoder(1)(torch.tensor([1, torch.nan, 2]), path_graph(3)), InvalidArgument, "node 1"),
        (lambda: ScatteringEncoder(1)(torch.tensor([1, 2, torch.inf]), path_graph(3)), InvalidArgument, "node 2"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
