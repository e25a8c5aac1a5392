from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_methods.augmented_dropout import dual_alpha_dropout, dual_conv, dual_dropout, dual_linear
from lightning_methods.augmented_dropout.functional import dual_views
from lightning_methods.errors import InvalidArgument, ShapeMismatch, UnsupportedTraining
from tests.augmented_dropout import oracle

ONE = np.ones((2, 3))
F_, B_ = oracle.KEEP_FORWARD, oracle.KEEP_BACKWARD

# name -> rates, keep masks, settings, and the scaled masks of the definition: forward, backward, weights
CASES = {
    "standard": ((0.5, 0.5), (F_, F_), {}, (F_ * 2, F_ * 2, F_ * 2)),
    "forward-only": ((0.5, 0.0), (F_, ONE), {}, (F_ * 2, ONE, ONE)),
    "backward-only": ((0.0, 0.25), (ONE, B_), {}, (ONE, B_ / 0.75, B_ / 0.75)),
    "augmented": ((0.5, 0.25), (F_, B_), {}, (F_ * 2, B_ / 0.75, B_ / 0.75)),
    "errors only": ((0.5, 0.25), (F_, B_), {"weight_grad": "forward"}, (F_ * 2, B_ / 0.75, F_ * 2)),
    "no scale": ((0.5, 0.25), (F_, B_), {"scale": "none"}, (F_, B_, B_)),
    "forward scale": ((0.5, 0.25), (F_, B_), {"scale": "forward_only"}, (F_ * 2, B_, B_)),
    "classic": ((0.5, 0.25), (F_, B_), {"scale": "classic"}, (F_, B_, B_)),
}


def tensors():
    return [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (oracle.X, oracle.W, oracle.B)]


@pytest.mark.parametrize("name", CASES)
def test_linear_is_the_definition(name):
    rates, (keep_f, keep_b), given, masks = CASES[name]
    x, w, b = tensors()
    keep = {"mask_forward": torch.tensor(keep_f).bool(), "mask_backward": torch.tensor(keep_b).bool()}
    y = dual_linear(x, w, b, *rates, **keep, **given)
    y.square().sum().div(2).backward()
    expected = oracle.linear(*masks)
    for got, key in ((y.detach(), "y"), (x.grad, "x"), (w.grad, "weight"), (b.grad, "bias")):
        np.testing.assert_allclose(got.numpy(), expected[key], rtol=0, atol=1e-14)


def test_linear_gives_the_numbers_computed_elsewhere():
    x, w, b = tensors()
    keep = {"mask_forward": torch.tensor(F_).bool(), "mask_backward": torch.tensor(B_).bool()}
    y = dual_linear(x, w, b, 0.5, 0.25, **keep)
    y.square().sum().div(2).backward()
    close = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(y.detach(), [[2.01, -2.82], [-0.39, -0.32]], **close)
    np.testing.assert_allclose(x.grad, [[-1.236, -2.416, 3.06], [-0.2226666667, -0.1093333333, 0]], **close)
    np.testing.assert_allclose(w.grad, [[3.2, 5.1, 8.04], [-3.3333333333, -7.7333333333, -11.28]], **close)
    np.testing.assert_allclose(b.grad, [1.62, -3.14], **close)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_linear_of_any_leading_shape(shape):
    layer = nn.Linear(5, 3).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y = dual_linear(x, layer.weight, layer.bias, 0.4, 0.7)
    ours = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    torch.manual_seed(0)
    z = oracle.two_passes(layer, x, *oracle.scaled_masks(x, 0.4, 0.7))
    theirs = torch.autograd.grad(z.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


CONVOLUTIONS = [
    (nn.Conv1d, (3, 4, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv1d, (4, 9), {"kernel_size": 3}),
    (nn.Conv2d, (2, 4, 7, 6), {"kernel_size": (3, 2), "dilation": 2, "groups": 2}),
    (nn.Conv2d, (2, 4, 7, 6), {"kernel_size": (2, 4), "padding": "same", "bias": False}),
    (nn.Conv2d, (2, 4, 7, 6), {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (nn.Conv2d, (4, 7, 6), {"kernel_size": 3, "padding": "valid", "stride": (2, 1)}),
    (nn.Conv3d, (2, 4, 4, 5, 4), {"kernel_size": 2, "padding": (1, 0, 1)}),
]


@pytest.mark.parametrize(("kind", "shape", "arguments"), CONVOLUTIONS)
def test_convolutions_are_two_passes(kind, shape, arguments):
    layer = kind(4, 6, **arguments).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    how = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
    y = dual_conv(x, layer.weight, layer.bias, 0.4, 0.1, **how)
    ours = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    torch.manual_seed(0)
    z = oracle.two_passes(layer, x, *oracle.scaled_masks(x, 0.4, 0.1))
    theirs = torch.autograd.grad(z.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_kernel_without_spatial_dimensions_is_refused():
    with pytest.raises(ShapeMismatch, match="1 to 3 more"):
        dual_conv(torch.ones(2, 3), torch.ones(4, 3))


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_equal_rates_are_torch_itself(training):
    x = torch.randn(30, 20, requires_grad=True)
    results = []
    for function in (lambda: dual_dropout(x, 0.3, training=training), lambda: F.dropout(x, 0.3, training)):
        torch.manual_seed(5)
        y = function()
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_one_mask_for_both_passes_is_standard_dropout_bit_for_bit(p):
    x = torch.randn(100, requires_grad=True)
    keep = torch.rand(100) >= p
    y = dual_dropout(x, p, mask_forward=keep)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * keep * (1 / (1 - p)))
    assert torch.equal(grad, keep * torch.tensor(1 / (1 - p)))


@pytest.mark.parametrize("rates", [{"p_forward": 0.0, "p_backward": 0.0}, {"p_forward": 0.7, "training": False}])
def test_what_drops_nothing_returns_its_input_and_draws_nothing(rates):
    x = torch.randn(5, requires_grad=True)
    before = torch.get_rng_state()
    assert dual_dropout(x, **rates) is x
    assert torch.equal(before, torch.get_rng_state())


def keep_masks(p_forward, p_backward, coupling, n=200_000):
    x = torch.ones(n, requires_grad=True)
    y = dual_dropout(x, p_forward, p_backward, coupling=coupling, scale="none")
    return y.bool(), torch.autograd.grad(y.sum(), x)[0].bool()


@pytest.mark.parametrize(("p_forward", "p_backward"), [(0.5, 0.2), (0.2, 0.5), (0.6, 0.7)])
def test_the_joint_law_of_the_masks(p_forward, p_backward):
    torch.manual_seed(0)
    both = {
        "nested": 1 - max(p_forward, p_backward),
        "independent": (1 - p_forward) * (1 - p_backward),
        "complementary": max(0.0, 1 - p_forward - p_backward),
    }
    for coupling, expected in both.items():
        forward, backward = keep_masks(p_forward, p_backward, coupling)
        n = len(forward)
        for mask, p in ((forward, 1 - p_forward), (backward, 1 - p_backward), (forward & backward, expected)):
            assert abs(float(mask.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / n)
    forward, backward = keep_masks(p_forward, p_backward, "nested")
    assert not (forward & ~backward).any() if p_forward > p_backward else not (backward & ~forward).any()


def test_outputs_and_gradients_are_unbiased():
    torch.manual_seed(0)
    x = torch.tensor([1.5, -2.0], dtype=torch.float64).expand(4000, 2).clone().requires_grad_()
    y = dual_dropout(x, 0.4, 0.7)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for found, mean, p in ((y, x, 0.4), (grad, torch.ones_like(x), 0.7)):
        error = (mean[0].square() * p / (1 - p) / len(x)).sqrt()
        assert ((found.mean(0) - mean[0]).abs() <= 4 * error).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_rates_survive_half_precision(dtype):
    torch.manual_seed(0)
    x = torch.ones(400_000, dtype=dtype, requires_grad=True)
    y = dual_dropout(x, 0.001, 0.002)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    for found, p in ((y, 0.001), (grad, 0.002)):
        dropped = float((found == 0).double().mean())
        assert abs(dropped - p) <= 4 * math.sqrt(p / x.numel())
        assert found.dtype == dtype


@pytest.mark.parametrize("coupling", ["nested", "independent", "complementary"])
@pytest.mark.parametrize("scale", ["inverted", "none", "classic", "forward_only"])
def test_rates_of_one_drop_everything_and_never_give_nan(coupling, scale):
    x = torch.randn(500, requires_grad=True)
    for p_forward, p_backward in ((1.0, 0.5), (0.5, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)):
        y = dual_dropout(x, p_forward, p_backward, coupling=coupling, scale=scale)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (y == 0).all() if p_forward == 1 else y.isfinite().all()
        assert (grad == 0).all() if p_backward == 1 else grad.isfinite().all()


@given(
    p_forward=st.floats(0, 1),
    p_backward=st.floats(0, 1),
    coupling=st.sampled_from(["nested", "independent", "complementary"]),
    shape=st.sampled_from([(), (1,), (0,), (3, 0), (4, 5), (2, 3, 4)]),
)
@settings(max_examples=80, deadline=None)
def test_shapes_kept_and_values_masked(p_forward, p_backward, coupling, shape):
    x = torch.rand(shape, dtype=torch.float64) + 0.5
    x.requires_grad_()
    y = dual_dropout(x, p_forward, p_backward, coupling=coupling)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == grad.shape == x.shape
    for found, full, p in ((y, x, p_forward), (grad, torch.ones_like(x), p_backward)):
        kept = found != 0
        factor = 1 / (1 - p) if p < 1 else 0.0
        torch.testing.assert_close(found[kept], (full * factor)[kept], rtol=1e-6, atol=0)


def test_infinities_behave_as_in_torch():
    x = torch.tensor([math.inf, math.nan, 1.0])
    keep = torch.tensor([False, True, True])
    assert torch.equal(dual_dropout(x, 0.5, 0.2, mask_forward=keep, mask_backward=keep).isnan(), x.isnan() | x.isinf())
    assert F.dropout(x, 1.0).isnan()[0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided"])
def test_memory_formats(layout):
    x = torch.randn(4, 6, 5, 5)
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(1, 3),
        "expanded": lambda: x[:1].expand(4, 6, 5, 5),
        "strided": lambda: x[:, ::2],
    }[layout]()
    y = dual_dropout(x, 0.5, 0.2)
    if layout in ("channels_last", "transposed"):
        assert y.stride() == x.stride()
    torch.testing.assert_close(y[y != 0], (2 * x)[y != 0])


def test_masks_of_whole_channels_and_samples():
    x = torch.ones(6, 5, 7, requires_grad=True)
    y = dual_dropout(x, 0.5, 0.2, mask_shape=(6, 5, 1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y.std(2) == 0).all()
    assert (grad.std(2) == 0).all()
    assert 0 < float((y == 0).float().mean()) < 1


def test_a_generator_decides_alone():
    x = torch.ones(50)
    before = torch.get_rng_state()
    drawn = [dual_dropout(x, 0.5, 0.2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    equal = dual_dropout(x, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*drawn)
    assert torch.equal(equal, drawn[0])
    assert torch.equal(before, torch.get_rng_state())


def test_a_rate_in_a_tensor_is_the_rate():
    x = torch.randn(1000, requires_grad=True)
    found = []
    for rates in ((0.3, 0.6), (torch.tensor(0.3), torch.tensor(0.6)), (torch.tensor(0.3), 0.6)):
        torch.manual_seed(0)
        y = dual_dropout(x, *rates)
        found.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for y, grad in found[1:]:
        torch.testing.assert_close(y, found[0][0])
        torch.testing.assert_close(grad, found[0][1])
    for p in (0.0, 1.0):
        y = dual_dropout(x, torch.tensor(p), torch.tensor(p))
        torch.testing.assert_close(y, x if p == 0 else torch.zeros_like(x))


# -- scale in evaluation, alpha ----------------------------------------------------------------------------------------


def test_classic_scale_multiplies_in_evaluation_only():
    x = torch.ones(4, requires_grad=True)
    assert set(dual_dropout(x, 0.4, 0.4, scale="classic").tolist()) <= {0.0, 1.0}
    y = dual_dropout(x, 0.4, 0.1, scale="classic", training=False)
    torch.testing.assert_close(y, torch.full((4,), 0.6))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((4,), 0.6))


def test_alpha_dropout_keeps_mean_and_variance():
    torch.manual_seed(0)
    x = torch.randn(400_000, dtype=torch.float64)
    for p in (0.1, 0.4):
        y = dual_alpha_dropout(x, p, 0.2)
        assert abs(float(y.mean())) < 4 / math.sqrt(len(x)) * 2
        assert abs(float(y.var()) - 1) < 0.02


def test_alpha_dropout_with_one_mask_is_that_of_torch():
    x = torch.randn(2000, requires_grad=True, dtype=torch.float64)
    torch.manual_seed(0)
    theirs = F.alpha_dropout(x, 0.3, training=True)
    (grad,) = torch.autograd.grad(theirs.sum(), x)
    ours = dual_alpha_dropout(x, 0.3, mask_forward=grad != 0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0], grad)


def test_alpha_dropout_at_the_ends():
    x = torch.randn(100, requires_grad=True)
    assert (dual_alpha_dropout(x, 1.0, 0.5) == 0).all()
    y = dual_alpha_dropout(x, 0.5, 1.0)
    assert (torch.autograd.grad(y.sum(), x)[0] == 0).all()
    assert (dual_alpha_dropout(x, torch.tensor(1.0), 0.5).abs() < 1e-3).all()
    torch.testing.assert_close(dual_alpha_dropout(x, 0.0, 0.5), x)


def test_the_backward_view_of_alpha_dropout_is_what_its_mask_would_show():
    x = torch.randn(50, dtype=torch.float64)
    keep = torch.rand(50) > 0.3
    masks = (torch.ones(50, dtype=torch.bool), keep)
    views = dual_views(x, 0.1, 0.3, training=True, coupling="nested", scale="inverted", masks=masks, alpha=True)
    torch.testing.assert_close(views.backward(), dual_alpha_dropout(x, 0.3, mask_forward=keep))


# -- what is no gradient of a loss -------------------------------------------------------------------------------------


def test_gradcheck_passes_only_with_one_mask():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    a, b = torch.rand(6) > 0.4, torch.tensor([True, False] * 3)
    assert torch.autograd.gradcheck(lambda t: dual_dropout(t, 0.4, mask_forward=a), x)
    assert torch.autograd.gradgradcheck(lambda t: dual_dropout(t, 0.4, mask_forward=a), x)
    wrong = lambda t: dual_dropout(t, 0.4, 0.2, mask_forward=a, mask_backward=b)  # noqa: E731
    assert not torch.autograd.gradcheck(wrong, x, raise_exception=False)


def twice(function, *inputs):
    grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: dual_dropout(x, 0.5, 0.2) @ w.mT,
        lambda x, w: dual_linear(x, w, None, 0.5, 0.2),
        lambda x, w: dual_conv(x[:, :, None], w[:, :, None], None, 0.5, 0.2),
    ],
)
def test_a_second_derivative_says_why_there_is_none(function):
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedTraining, match="not the gradient of any loss"):
        twice(function, x, w)


def test_gradients_per_sample_with_torch_func():
    w, x = torch.randn(2, 3), torch.randn(5, 3)

    def loss(w, x):
        return dual_linear(x, w, None, 0.5, 0.2).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(w, x)
    assert grads.shape == (5, 2, 3)
    assert grads.isfinite().all()


# -- precision and compilation -----------------------------------------------------------------------------------------


def test_autocast_takes_the_weight_gradient_from_the_backward_mask():
    torch.manual_seed(0)
    x, w = torch.randn(256, 64), torch.randn(32, 64, requires_grad=True)
    masks = {"mask_forward": torch.rand(256, 64) > 0.5, "mask_backward": torch.rand(256, 64) > 0.5}

    def grad(dtype=torch.float32, autocast=False, **given):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = dual_linear(x.to(dtype), w.to(dtype), None, 0.5, 0.5, **masks, **given)
            assert y.dtype == (torch.bfloat16 if autocast else dtype)
            return torch.autograd.grad(y.float().square().sum(), w)[0].double()

    exact = grad(torch.float64)
    errors_only = grad(torch.float64, weight_grad="forward")
    assert float((grad(autocast=True) - exact).norm() / exact.norm()) < 0.02
    assert float((errors_only - exact).norm() / exact.norm()) > 0.5


@pytest.mark.parametrize("rates", [(0.5, 0.2), (0.0, 0.4), (torch.tensor(0.5), torch.tensor(0.2))])
def test_compiled_is_eager(rates):
    torch._dynamo.reset()
    x, w = torch.randn(6, 5), torch.randn(3, 5)

    def both(x, w):
        return dual_linear(x, w, None, *rates) + dual_dropout(x, *rates).sum(1, keepdim=True)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        torch.manual_seed(0)
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", [{}, {"scale": "forward_only"}])
def test_one_mask_compiles(settings):
    torch._dynamo.reset()
    rate = torch.tensor(0.5)
    x = torch.ones(4000, requires_grad=True)
    y = torch.compile(lambda t: dual_dropout(t, rate, rate, **settings), fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0)
    assert 0.4 < float((y == 0).double().mean()) < 0.6


def test_saves_one_byte_an_element():
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dual_dropout(x, 0.5, 0.2)
    saved.pop(x.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    assert sum(saved.values()) == 1000


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, "0.5", True, torch.zeros(2)])
@pytest.mark.parametrize("name", ["p_forward", "p_backward"])
def test_rates_that_are_none(bad, name):
    rates = {"p_forward": 0.5, "p_backward": 0.5, name: bad}
    with pytest.raises(InvalidArgument, match=name):
        dual_dropout(torch.ones(3), **rates)


def test_settings_that_are_not_known():
    x = torch.ones(3)
    for unknown in ({"coupling": "nest"}, {"scale": "invert"}):
        with pytest.raises(InvalidArgument, match="Did you mean"):
            dual_dropout(x, 0.5, 0.2, **unknown)
    with pytest.raises(InvalidArgument, match="weight_grad"):
        dual_linear(x, torch.ones(1, 3), weight_grad="both")
    with pytest.raises(InvalidArgument, match="alpha"):
        dual_alpha_dropout(x, 0.5, scale="classic")
    with pytest.raises(InvalidArgument, match="p_forward=None"):
        dual_dropout(x, None)


def test_masks_and_features_that_do_not_fit():
    x = torch.ones(2, 3)
    keep = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match="boolean"):
        dual_dropout(x, 0.5, mask_forward=keep.float())
    with pytest.raises(ShapeMismatch, match="mask_backward"):
        dual_dropout(x, 0.5, 0.2, mask_forward=keep, mask_backward=keep[:, :2])
    with pytest.raises(ShapeMismatch, match="mask_forward"):
        dual_dropout(x[0], 0.5, mask_forward=keep)
    with pytest.raises(InvalidArgument, match="one pass only"):
        dual_dropout(x, 0.5, 0.2, mask_backward=keep)
    with pytest.raises(InvalidArgument, match=r"x\.float"):
        dual_dropout(torch.arange(3), 0.5, 0.2)
