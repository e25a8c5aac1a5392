from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_methods.augmented_dropout import AugmentedDropout
from lightning_methods.augmented_dropout.intercept import dual_attention
from lightning_methods.augmented_dropout.layers import Noise
from lightning_methods.errors import LightningMethodsWarning
from tests.augmented_dropout import oracle
from tests.augmented_dropout.test_callback import Around, Halved, trained
from tests.support.training import FEATURES, WIDTH, At, fit, loader, quiet_trainer
from tests.support.training import TinyModule as Tiny


def made(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes.values()]


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.arange(5)[None] <= torch.arange(4)[:, None]},
    "blind rows": {"attn_mask": torch.arange(5)[None] < torch.arange(4)[:, None]},
    "added": {"attn_mask": torch.linspace(-2, 1, 20, dtype=torch.float64).view(4, 5)},
    "scaled": {"scale": 0.7},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_without_drops_is_that_of_torch(name):
    q, k, v = made(q=(2, 3, 4, 6), k=(2, 3, 5, 6), v=(2, 3, 5, 7))
    ours = dual_attention(q, k, v, Noise("element", 0.0, 0.0), **MASKS[name])
    theirs = F.scaled_dot_product_attention(q, k, v, **MASKS[name])
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_is_the_definition():
    q, k, v = made(q=(2, 4, 6), k=(2, 5, 6), v=(2, 5, 7))
    torch.manual_seed(0)
    y = dual_attention(q, k, v, Noise("element", 0.3, 0.6))
    torch.manual_seed(0)
    weights = (q @ k.mT / 6**0.5).softmax(-1)
    forward, backward = oracle.scaled_masks(weights, 0.3, 0.6)
    by_hand = (weights * forward) @ v
    torch.testing.assert_close(y, by_hand)
    g = 2 * by_hand.detach()
    d_weights = (g @ v.mT) * backward
    d_q, d_k = torch.autograd.grad((weights * d_weights.detach()).sum(), (q, k))
    expected = (d_q, d_k, (weights * backward).mT @ g)
    for found, wanted in zip(torch.autograd.grad(y.square().sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


class Functional(nn.Module):
    """Dropout by function, attention with dropout by function and by module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.heads = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        h = self.b(F.dropout(self.a(x), 0.4, self.training))
        rows = h.view(-1, 4, 4)
        rows = F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.2 if self.training else 0.0)
        h = rows.reshape(1, -1, WIDTH)
        return self.head(self.heads(h, h, h, need_weights=False)[0][0])


def test_calls_of_functions_are_told_about_once(tmp_path):
    net = nn.Sequential(Functional(), nn.Dropout(0.1), nn.Linear(3, 3))
    with pytest.warns(LightningMethodsWarning) as told:
        module = run_loudly(net, tmp_path, AugmentedDropout(ratio=0.5))
    (message,) = [str(w.message) for w in told if issubclass(w.category, LightningMethodsWarning)]
    assert "F.dropout, F.scaled_dot_product_attention" in message
    assert module.net[0] is net[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LightningMethodsWarning)
        run_loudly(net, tmp_path, AugmentedDropout(ratio=0.5, functional="ignore"))


def run_loudly(net, tmp_path, callback):
    module = Around(net)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loader())
    return module


def test_a_patched_function_reaches_the_layer_after_it(tmp_path):
    class ByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.4, training=self.training))

    class ByModule(ByFunction):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.4)

        def forward(self, x):
            return self.b(self.drop(self.a(x)))

    ours, _ = trained(ByFunction(), tmp_path, AugmentedDropout(p_backward=0.7, functional="patch"))
    theirs, _ = trained(ByModule(), tmp_path, AugmentedDropout(p_backward=0.7))
    assert torch.equal(ours.net.a.weight, theirs.net.a.weight)
    assert torch.equal(ours.net.b.weight, theirs.net.b.weight)


def test_all_attention_is_reached(tmp_path):
    callback = AugmentedDropout(ratio=0.5, functional="patch", attention="math")
    during = []
    watch = At(1, lambda *_: during.append(dict(callback._mode.replaced)))
    module, _ = trained(Functional(), tmp_path, callback, watch)
    assert set(during[0]) == {"F.dropout", "F.scaled_dot_product_attention"}
    assert callback._mode.missed == {}
    plain, _ = trained(Functional(), tmp_path)
    assert not torch.equal(module.net.heads.in_proj_weight, plain.net.heads.in_proj_weight)
    assert F.dropout.__module__ == "torch.nn.functional"


def test_attention_of_a_module_with_weights(tmp_path):
    class Weights(Functional):
        def forward(self, x):
            h = self.b(self.a(x))[None]
            return self.head(self.heads(h, h, h, need_weights=True)[0][0])

    callback = AugmentedDropout(ratio=0.5, functional="patch", attention="math")
    trained(Weights(), tmp_path, callback)
    assert set(callback._mode.replaced) == {"F.dropout"}


def test_modules_that_are_left_alone_stay_so(tmp_path):
    """An excluded dropout calls F.dropout itself, which must not be taken for a call of the user's."""
    net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 3), nn.Dropout(0.1))
    inside = []
    watch = At(1, lambda trainer, module: inside.append(isinstance(module.net[1], nn.Dropout)))
    callback = AugmentedDropout(p_backward=0.3, include="net.3", functional="patch")
    trained(net, tmp_path, callback, watch)
    assert inside == [True]
    assert callback._mode.replaced == callback._mode.missed == {}
    assert type(net[1]) is nn.Dropout


def test_a_subclass_that_calls_the_function_is_reached_by_the_patch(tmp_path):
    callback = AugmentedDropout(ratio=0.0, functional="patch")
    trained(nn.Sequential(nn.Linear(FEATURES, WIDTH), Halved(0.5), nn.Linear(WIDTH, 3)), tmp_path, callback)
    assert set(callback._mode.replaced) == {"F.dropout"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dropout1d", (4, 5, 6)),
        ("dropout2d", (4, 5, 6, 3)),
        ("dropout3d", (4, 5, 6, 3, 2)),
        ("alpha_dropout", (4, 5)),
        ("feature_alpha_dropout", (4, 5, 6)),
    ],
)
def test_the_relatives_of_dropout(tmp_path, name, shape):
    class Calls(Tiny):
        def training_step(self, batch, batch_idx):
            x = torch.ones(shape, requires_grad=True)
            y = getattr(F, name)(x, 0.5, True)
            self.gradients = torch.autograd.grad(y.sum(), x)[0]
            assert torch.equal(getattr(F, name)(x, 0.5, False), x)
            return super().training_step(batch, batch_idx)

    module = Calls()
    callback = AugmentedDropout(p_backward=0.0, functional="patch")
    fit(quiet_trainer(tmp_path, callbacks=[callback]), module)
    assert f"F.{name}" in callback._mode.replaced
    torch.testing.assert_close(module.gradients, torch.ones(shape))


def test_validation_is_not_intercepted(tmp_path):
    seen = []
    module = Around(Functional())
    module.settings.during_validation = lambda m: seen.append(torch.overrides._get_current_function_mode_stack())
    fit(quiet_trainer(tmp_path, callbacks=[AugmentedDropout(ratio=0.5, functional="patch")]), module)
    assert seen
    assert not any(seen)
