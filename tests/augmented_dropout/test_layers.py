from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_methods.augmented_dropout import (
    DualAlphaDropout,
    DualDropout,
    DualDropout1d,
    DualDropout2d,
    DualDropout3d,
)
from lightning_methods.augmented_dropout.layers import Noise, mask_shape
from lightning_methods.errors import InvalidArgument, ShapeMismatch

LAYERS = {
    DualDropout: (nn.Dropout, (4, 5)),
    DualDropout1d: (nn.Dropout1d, (4, 5, 6)),
    DualDropout2d: (nn.Dropout2d, (4, 5, 6, 3)),
    DualDropout3d: (nn.Dropout3d, (4, 5, 6, 3, 2)),
    DualAlphaDropout: (nn.AlphaDropout, (4, 5)),
}


@pytest.mark.parametrize("cls", LAYERS)
def test_by_default_each_is_the_module_of_torch(cls):
    standard, shape = LAYERS[cls]
    x = torch.randn(shape)
    torch.manual_seed(0)
    ours = cls(0.4)
    y = ours(x)
    torch.manual_seed(0)
    assert torch.equal(y, standard(0.4)(x))
    assert isinstance(ours, standard)
    assert ours.p == ours.p_forward == ours.p_backward == 0.4
    assert torch.equal(ours.eval()(x), x)
    assert list(ours.state_dict()) == []


@pytest.mark.parametrize("cls", [DualDropout1d, DualDropout2d, DualDropout3d])
def test_channels_are_dropped_whole_in_both_passes(cls):
    x = torch.ones(LAYERS[cls][1], requires_grad=True)
    torch.manual_seed(0)
    y = cls(0.5, 0.3)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for found, value in ((y, 2.0), (grad, 1 / 0.7)):
        flat = found.detach().flatten(2)
        assert (flat.std(2) == 0).all()
        assert {round(v, 4) for v in flat.flatten().tolist()} == {0.0, round(value, 4)}


def test_unbatched_inputs_are_read_as_torch_reads_them():
    kinds = {"1d": nn.Dropout1d(0.5), "3d": nn.Dropout3d(0.5), "2d": nn.Dropout2d(0.5)}
    for kind, shape in (("1d", (40, 7)), ("3d", (40, 2, 3, 4)), ("2d", (6, 8, 5))):
        x = torch.ones(shape)
        torch.manual_seed(0)
        theirs = kinds[kind](x)
        kept = len([n for n in mask_shape(kind, x) if n > 1])
        assert (theirs.flatten(kept).std(-1) == 0).all()
        assert 0 < float((theirs == 0).float().mean()) < 1


@pytest.mark.parametrize(
    ("cls", "shape"), [(DualDropout1d, (5,)), (DualDropout1d, (2, 3, 4, 5)), (DualDropout2d, (5,))]
)
def test_features_without_channels_are_refused(cls, shape):
    with pytest.raises(ShapeMismatch, match="channels"):
        cls(0.5, 0.2)(torch.ones(shape))


def test_rates_can_be_set_and_are_shown():
    layer = DualDropout(0.2, ratio=2.5, coupling="independent")
    assert (layer.p_forward, layer.p_backward) == (0.2, 0.5)
    assert repr(layer) == "DualDropout(p_forward=0.2, p_backward=0.5, coupling='independent', scale='inverted')"
    layer.p, layer.p_backward = 0.0, 1.0
    x = torch.randn(9, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, x)
    assert (torch.autograd.grad(y.sum(), x)[0] == 0).all()
    for name in ("p", "p_forward", "p_backward"):
        with pytest.raises(InvalidArgument, match=r"1\.5"):
            setattr(layer, name, 1.5)


def test_an_inplace_relu_after_a_dropout_that_drops_nothing_forward():
    net = nn.Sequential(nn.Linear(3, 4), DualDropout(0.0, 0.5), nn.ReLU(inplace=True))
    net(torch.ones(2, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_copies_pickles_and_half_precision():
    layer = DualDropout(0.001, 0.3).to(torch.bfloat16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.p_forward, other.p_backward) == (0.001, 0.3)
        assert other.noise is not layer.noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p_forward": 1.2}, "p_forward=1.2"),
        ({"p_backward": math.nan}, "p_backward=nan"),
        ({"p_backward": 0.2, "ratio": 0.5}, "Give one of them"),
        ({"p_forward": 0.5, "ratio": 3.0}, "At most ratio=2"),
        ({"ratio": -1.0}, "ratio=-1"),
        ({"ratio": math.inf}, "ratio=inf"),
        ({"coupling": "nestd"}, "nested"),
        ({"scale": "no"}, "none"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        DualDropout(**arguments)


def test_alpha_has_no_classic_scale():
    with pytest.raises(InvalidArgument, match="alpha"):
        DualAlphaDropout(0.5, 0.2, scale="classic")


# -- rates that change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["element", "1d", "2d", "3d", "alpha", "feature alpha"])
def test_the_rate_of_a_graph_is_the_rate_of_eager_code(kind, monkeypatch):
    shape = {"1d": (4, 5, 6), "3d": (3, 4, 2, 3, 2)}.get(kind, (4, 5, 6, 3))
    noise = Noise(kind, 0.5, 0.8, factors=(0.5, 0.25), graphed=torch.tensor([0.5, 0.25]), one_schedule=False)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        x = torch.ones(shape, requires_grad=True)
        torch.manual_seed(0)
        y = noise.views(x, training=True).forward
        found.append([y, *torch.autograd.grad(y.sum(), x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_ten_rates_are_one_compilation():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    layer = DualDropout(0.5, 0.8)
    layer.noise.graphed, layer.noise.one_schedule = torch.ones(2), False
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    dropped = []
    for i in range(10):
        layer.noise.factors = (i / 9, 1.0)
        layer.noise.graphed.copy_(torch.tensor(layer.noise.factors))
        dropped.append(float((compiled(torch.ones(4000)) == 0).double().mean()))
    assert counter.frame_count == 1
    assert all(abs(share - 0.5 * i / 9) < 0.04 for i, share in enumerate(dropped))
