"""Taps give the tensors that flowed, or an error that says the remedy; never a silently wrong number."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_methods.core.taps import FeatureTaps, joined, masked_mean
from lightning_methods.errors import (
    InvalidArgument,
    LayerNotFound,
    ShapeMismatch,
    TapNotCalled,
    TensorOverwritten,
    UnsupportedTraining,
)

X = torch.arange(6.0).reshape(2, 3) / 6
Pair = namedtuple("Pair", ["hidden", "scores"])


@dataclass
class ModelOutput:
    """As the outputs of transformers, which are read by attribute."""

    loss: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Module):
    """Return whatever a function makes of the input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, *args, **kwargs):
        return self.make(*args, **kwargs)


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.act = nn.ReLU(inplace=inplace)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def read(module, layers, *args, run=None, **settings):
    """Tap, run once, and return what was read, with the taps removed again."""
    taps = FeatureTaps(layers, **settings)
    taps.attach(module)
    try:
        with taps.recording():
            (run or module)(*(args or (X,)))
            return taps.read()
    finally:
        taps.detach()


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_values_graph_order_and_removal():
    net = Net()
    found = read(net, ["second", "first"])
    assert list(found) == ["first", "second"]
    assert torch.equal(found["first"], net.first(X))
    (expected,) = torch.autograd.grad(net.first(X).square().sum(), net.first.weight)
    (gradient,) = torch.autograd.grad(found["first"].square().sum(), net.first.weight)
    assert torch.equal(gradient, expected)
    assert hooks(net) == 0


def test_input_of_a_layer_and_detached_tensors():
    net = Net()
    assert torch.equal(read(net, "act", capture="input")["act"], net.first(X))
    assert not read(net, "first", detach=True)["first"].requires_grad


OUTPUTS = {
    "tuple": (lambda x: (x.sum(), x, x + 1), None, 0),
    "tuple by index": (lambda x: (x, x + 1), 1, 1),
    "tuple by negative index": (lambda x: (x, x + 1), -1, 1),
    "list": (lambda x: [x, x + 1], 1, 1),
    "dict": (lambda x: {"n": 3, "loss": x.sum(), "hidden": x}, None, 0),
    "dict by key": (lambda x: {"hidden": x, "scores": x + 1}, "scores", 1),
    "ordered dict by index": (lambda x: OrderedDict(hidden=x, scores=x + 1), 1, 1),
    "named tuple by name": (lambda x: Pair(x, x + 1), "scores", 1),
    "named tuple by index": (lambda x: Pair(x, x + 1), 1, 1),
    "model output": (lambda x: ModelOutput(x.sum(), x), None, 0),
    "model output by name": (lambda x: ModelOutput(x.sum(), x + 1), "hidden", 1),
}


@pytest.mark.parametrize(("make", "select", "plus"), OUTPUTS.values(), ids=OUTPUTS)
def test_select(make, select, plus):
    net = nn.Sequential(Returns(make))
    assert torch.equal(read(net, "0", select=select)["0"], X + plus)


def test_select_of_inputs():
    def run(x):
        inner(x, scores=x + 1)

    inner = Returns(lambda x, scores: x)
    net = nn.Sequential(inner)
    assert torch.equal(read(net, "0", run=run, capture="input")["0"], X)
    assert torch.equal(read(net, "0", run=run, capture="input", select="scores")["0"], X + 1)


@pytest.mark.parametrize(
    ("make", "select", "said"),
    [
        (lambda x: {"hidden": x}, "hiden", "Did you mean 'hidden'"),
        (lambda x: (x,), 2, "no tensor under select=2"),
        (lambda x: (x.sum(), "text"), None, "tuple without a tensor of at least two dimensions"),
    ],
)
def test_select_of_what_is_not_there(make, select, said):
    with pytest.raises(InvalidArgument, match=said):
        read(nn.Sequential(Returns(make)), "0", select=select)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [("flatten", (2, 60)), ("gap", (2, 3)), ("none", (2, 3, 4, 5)), (lambda t: t.amax((2, 3)), (2, 3))],
    ids=["flatten", "gap", "none", "callable"],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pool(pool, shape, memory_format):
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    (found,) = read(nn.Sequential(nn.Identity()), "0", x, pool=pool).values()
    assert found.shape == shape
    if pool == "gap":
        assert torch.allclose(found, x.mean((2, 3)))
    if pool == "flatten":
        assert torch.equal(found, x.flatten(1))


def test_pool_needs_rows():
    with pytest.raises(ShapeMismatch, match=r"shape \(2,\); \(batch, features, ...\) is needed"):
        read(nn.Sequential(nn.Identity()), "0", X[:, 0])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"capture": "outputs"}, "Did you mean 'output'"),
        ({"pool": "mean"}, "pool='mean' is not known"),
        ({"on_repeat": "first"}, "on_repeat='first' is not known"),
    ],
)
def test_settings_are_checked_at_construction(settings, error):
    with pytest.raises(InvalidArgument, match=error):
        FeatureTaps("first", **settings)
    with pytest.raises(LayerNotFound, match="Did you mean 'first'"):
        FeatureTaps("fist").attach(Net())


def test_repeated_layers():
    def run(x):
        net.first(x)
        net.first(x + 1)

    net = Net()
    with pytest.raises(UnsupportedTraining, match=r"'first' ran 2 times in one step.*on_repeat='last'"):
        read(net, "first", run=run)
    assert torch.equal(read(net, "first", run=run, on_repeat="last")["first"], net.first(X + 1))
    both = read(net, "first", run=run, on_repeat="all")
    assert list(both) == ["first#0", "first#1"]
    assert torch.equal(both["first#0"], net.first(X))
    assert list(read(net, "first", on_repeat="all")) == ["first"]


@pytest.mark.parametrize("detach", [False, True])
def test_what_is_overwritten_in_place_is_an_error(detach):
    net = Net(inplace=True)
    with pytest.raises(TensorOverwritten, match=r"output of the layer 'first' .*inplace=False"):
        read(net, "first", detach=detach)
    assert torch.equal(read(net, "act", detach=detach)["act"], net.first(X).relu())


def test_an_input_that_is_overwritten_is_an_error_too():
    def run(x):
        h = net.first(x)
        net.second(h)
        h += 1

    net = Net()
    with pytest.raises(TensorOverwritten, match="input of the layer 'second'"):
        read(net, "second", run=run, capture="input")


@pytest.mark.parametrize("inplace", [False, True])
def test_inference_tensors_are_copied_since_they_count_no_versions(inplace):
    net = Net(inplace)
    with torch.inference_mode():
        assert torch.equal(read(net, "first")["first"], net.first(X))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    def run(x):
        return checkpoint(net.first, x, use_reentrant=use_reentrant)

    net = Net()
    taps = FeatureTaps("first", on_repeat="all")
    taps.attach(net)
    with taps.recording():
        if use_reentrant:
            with pytest.raises(UnsupportedTraining, match="use_reentrant=False"):
                run(X.clone().requires_grad_())
            return
        out = run(X)
        (out.sum() + taps.read()["first"].sum()).backward()  # runs the layer again
        assert list(taps.read()) == ["first"]
    assert torch.allclose(net.first.weight.grad, 2 * X.sum(0).expand(4, 3))


def test_a_layer_without_graph_inside_a_step_that_has_one_is_an_error():
    def run(x):
        with torch.no_grad():
            net(x)

    net = Net()
    with pytest.raises(UnsupportedTraining, match="ran without a graph"):
        read(net, "first", run=run)
    assert list(read(net, "first", run=run, detach=True)) == ["first"]
    with torch.no_grad():  # nobody asked for a graph
        assert list(read(net, "first")) == ["first"]


def test_a_layer_that_did_not_run_names_both_remedies():
    net = Net()
    with pytest.raises(TapNotCalled, match=r"'second'.*torch._dynamo.reset\(\).*skip_nnmodule_hook_guards = False"):
        read(net, ["first", "second"], run=net.first)
    taps = FeatureTaps(["first", "second"])
    taps.attach(net)
    with taps.recording():
        net.first(X)
        assert list(taps.read(missing="skip")) == ["first"]


def test_nothing_is_captured_outside_of_the_window_nor_kept_after_it():
    net, taps = Net(), FeatureTaps("first")
    taps.attach(net)
    net(X)
    with taps.recording():
        with pytest.raises(TapNotCalled):
            taps.read()
        net(X)
        kept = weakref.ref(taps.read()["first"])
        alive = [weakref.ref(t) for calls in taps._captured.values() for t, _ in calls]
    gc.collect()
    assert kept() is None
    assert alive
    assert all(ref() is None for ref in alive)


def test_a_window_that_an_exception_closes_is_empty():
    net, taps = Net(), FeatureTaps("first")
    taps.attach(net)
    with pytest.raises(TypeError), taps.recording():
        net.second(net(X), "too much")
    assert taps._captured == {}
    net(X)
    assert taps._captured == {}


@pytest.mark.parametrize("capture", ["output", "input"])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_tapped_module_do_not_write_into_the_taps(make, capture):
    net, taps = Net(), FeatureTaps("first", capture=capture)
    taps.attach(net)
    with taps.recording():
        expected = net(X)
        copied = make(net)  # while the taps hold a tensor with a graph
        assert torch.equal(copied(X), expected)
        copied(X + 1)
        copy.copy(net.first)(X + 1)  # a shallow copy has the same hooks
        assert torch.equal(taps.read()["first"], X if capture == "input" else Net().first(X))
    copied.first(X)
    assert pickle.loads(pickle.dumps(copied)).first(X).shape == (2, 4)


def test_attaching_twice_and_detaching_twice():
    net, taps = Net(), FeatureTaps("first")
    assert taps.attach(net) == ["first"]
    assert taps.attach(net) == ["first"]
    assert hooks(net) == 1
    taps.detach()
    taps.detach()
    assert hooks(net) == 0


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["in place", "assigned"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("layer", ["body", "body.first", "head"])
def test_compiled_inner_modules(form, inplace, attached, layer):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net(inplace)
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.body(x))

    net = Whole()
    plain = Whole()
    plain.load_state_dict(net.state_dict())
    plain.body.act.inplace = False
    expected = read(plain, layer)[layer]
    (gradient,) = torch.autograd.grad(expected.square().sum(), plain.body.first.weight)

    taps = FeatureTaps(layer)
    if attached == "before":
        taps.attach(net)
    if form == "in place":
        net.body.compile(backend="aot_eager")
    else:
        net.body = torch.compile(net.body, backend="aot_eager")
    if attached == "after":
        taps.attach(net)
    for _ in range(2):  # traced, then from the cache
        with taps.recording():
            net(X)
            found = taps.read()[layer]
        assert torch.equal(found, expected)
        (own,) = torch.autograd.grad(found.square().sum(), net.get_submodule("body").first.weight)
        assert torch.allclose(own, gradient, atol=1e-7)
    taps.detach()
    net(X)


class TestMask:
    """Padded sequences: only real positions count, whatever the padding holds."""

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]])

    def read(self, make, mask, **settings):
        net = Returns(make)
        taps = FeatureTaps("0", **settings)
        taps.attach(nn.Sequential(net))
        with taps.recording():
            net(torch.zeros(1))
            return taps.read(mask=mask)["0"]

    def test_mean_over_real_positions(self):
        x = torch.randn(3, 4, 5)
        expected = torch.stack([x[b][self.mask[b].bool()].mean(0) for b in range(3)])
        torch.testing.assert_close(self.read(lambda _: x, self.mask), expected)

    @pytest.mark.parametrize("junk", [1e30, float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_what_the_padding_holds_does_not_matter(self, junk, dtype):
        x = torch.randn(3, 4, 5)
        spoilt = x.masked_fill(self.mask[..., None] == 0, junk)
        assert torch.equal(
            self.read(lambda _: spoilt, self.mask.to(dtype)), self.read(lambda _: x, self.mask.to(dtype))
        )

    def test_more_padding_changes_nothing(self):
        x = torch.randn(3, 4, 5)
        wider = torch.cat([x, torch.randn(3, 6, 5)], 1)
        more = torch.cat([self.mask, torch.zeros(3, 6, dtype=torch.int64)], 1)
        torch.testing.assert_close(self.read(lambda _: wider, more), self.read(lambda _: x, self.mask))

    def test_gradients_of_padding_are_zero_and_finite(self):
        x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: masked_mean(x, self.mask), x)
        masked_mean(x, self.mask).sum().backward()
        assert (x.grad[self.mask == 0] == 0).all()

    def test_half_precision_is_averaged_in_single(self):
        x = torch.full((1, 3000, 1), 60.0, dtype=torch.float16)
        mean = masked_mean(x, torch.ones(1, 3000))
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, torch.tensor([[60.0]]))

    def test_tensors_without_positions_are_as_ever(self):
        x = torch.randn(3, 5)
        assert torch.equal(self.read(lambda _: x, self.mask), x)

    def test_a_function_sees_the_means(self):
        x = torch.randn(3, 4, 5)
        torch.testing.assert_close(
            self.read(lambda _: x, self.mask, pool=lambda t: t[:, :2]), masked_mean(x, self.mask)[:, :2]
        )

    @pytest.mark.parametrize("shape", [(4, 3, 5), (3, 3, 5), (2, 4, 5)])
    def test_a_mask_that_does_not_fit_names_the_layer(self, shape):
        with pytest.raises(ShapeMismatch, match=r"layer '0'.*\(3, 4\)"):
            self.read(lambda _: torch.zeros(shape), self.mask)

    def test_an_additive_mask_is_refused(self):
        with pytest.raises(InvalidArgument, match="-inf"):
            masked_mean(torch.zeros(1, 2, 3), torch.tensor([[0.0, -float("inf")]]))

    def test_a_sample_of_padding_only_is_refused(self):
        with pytest.raises(InvalidArgument, match="Sample 1"):
            masked_mean(torch.zeros(2, 2, 3), torch.tensor([[1, 0], [0, 0]]))


def test_pieces_of_unequal_width_are_told_with_the_remedy():
    with pytest.raises(ShapeMismatch, match="mask="):
        joined("encoder", [torch.zeros(2, 3), torch.zeros(2, 4)])
