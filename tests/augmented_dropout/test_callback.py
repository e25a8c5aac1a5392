from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_methods.augmented_dropout import AugmentedDropout, DualDropout, EarlyRate, LinearRate
from lightning_methods.errors import InvalidArgument, LayerNotFound, UnsupportedTraining
from tests.augmented_dropout import oracle
from tests.support.processes import run_ranks
from tests.support.training import (
    BATCH,
    FEATURES,
    WIDTH,
    At,
    ResumableLoader,
    TinyModule,
    assert_identical,
    fit,
    loader,
    quiet_trainer,
)


class Net(nn.Module):
    """Dropouts whose output reaches convolutions and linear layers through all kinds of views."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 4 * 25)
        self.drop = nn.Dropout(0.4)
        self.conv = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")
        self.flat = nn.Flatten()
        self.left, self.right = nn.Linear(150, 3), nn.Linear(150, 3)
        self.rows = nn.Linear(6, 3)

    def forward(self, x):
        h = self.conv(self.drop(self.embed(x).relu().view(-1, 4, 5, 5))).relu()
        h = self.drop(h)
        by_position = self.rows(h.permute(0, 2, 3, 1)).mean((1, 2))
        return self.left(self.flat(h)) + self.right(h.view(len(x), -1)).tanh() + by_position


class ByHand(Net):
    """The same by two passes of every layer."""

    rates = (0.4, 0.7)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        h = self.embed(x).relu().view(-1, 4, 5, 5)
        h = oracle.two_passes(self.conv, h, *oracle.scaled_masks(h, *self.rates)).relu()
        masks = oracle.scaled_masks(h, *self.rates)
        read = {
            "left": lambda t: self.left(t.flatten(1)),
            "right": lambda t: self.right(t.flatten(1)),
            "rows": lambda t: self.rows(t.permute(0, 2, 3, 1)),
        }
        left, right, rows = (oracle.two_passes(layer, h, *masks) for layer in read.values())
        return left + right.tanh() + rows.mean((1, 2))


class Around(TinyModule):
    """Any network in a LightningModule; remembers the latest gradients."""

    def __init__(self, net, lr=0.05):
        super().__init__()
        self.first = self.second = self.head = None
        self.net, self.lr = net, lr
        self.gradients = {}

    def layers(self, x):
        return {"head": self.net(x)}

    def on_after_backward(self):
        self.gradients = {n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trained(net, tmp_path, *callbacks, seed=3, data=None, **settings):
    module = Around(net)
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 1, **settings})
    fit(trainer, module, data, seed=seed)
    return module, trainer


def two(cls, *others):
    torch.manual_seed(1)
    nets = [cls(), *(other() for other in others)]
    for other in nets[1:]:
        other.load_state_dict(nets[0].state_dict())
    return nets


def test_an_unchanged_network_trains_as_two_passes_of_every_layer(tmp_path):
    net, by_hand = two(Net, ByHand)
    callback = AugmentedDropout(p_backward=0.7)
    ours, _ = trained(net, tmp_path, callback, precision="64-true")
    theirs, _ = trained(by_hand, tmp_path, precision="64-true")
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=0, atol=1e-10)
    (reading,) = callback.readings
    assert reading.weight_gradient == "backward mask in net.conv, net.rows, net.left, net.right"
    errors_only, _ = trained(two(Net)[0], tmp_path, AugmentedDropout(p_backward=0.7, weight_grad="forward"))
    assert not torch.allclose(errors_only.gradients["left.weight"].double(), theirs.gradients["left.weight"], rtol=0.1)


def test_autocast_does_not_fall_back_to_the_forward_mask(tmp_path):
    """A layer saves a copy in bfloat16 under autocast, which no trick with saved tensors recognises."""
    results = {}
    for name, settings in {
        "exact": {"precision": "64-true"},
        "autocast": {"precision": "bf16-mixed"},
        "errors only": {"precision": "64-true", "weight_grad": "forward"},
    }.items():
        how = {key: settings.pop(key) for key in ("weight_grad",) if key in settings}
        run, _ = trained(two(Net)[0], tmp_path, AugmentedDropout(p_backward=0.9, **how), max_steps=1, **settings)
        results[name] = run.gradients["left.weight"].double()
    scale = results["exact"].norm()
    assert (results["autocast"] - results["exact"]).norm() / scale < 0.02
    assert (results["errors only"] - results["exact"]).norm() / scale > 0.5


def test_equal_rates_change_nothing_at_all(tmp_path):
    callbacks = [
        AugmentedDropout(),
        AugmentedDropout(0.4),
        AugmentedDropout(0.4, 0.4),
        AugmentedDropout(p_backward=0.4),
    ]
    plain, _ = trained(two(Net)[0], tmp_path)
    for callback in callbacks:
        ours, _ = trained(two(Net)[0], tmp_path, callback)
        assert_identical(plain, ours)
    other, _ = trained(two(Net)[0], tmp_path, AugmentedDropout(0.2))
    assert not torch.equal(other.net.left.weight, plain.net.left.weight)


class Mixed(nn.Module):
    """Dropouts whose output is not read by a layer directly, or not only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.residual, self.shared, self.cut = nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.2)
        self.inplace, self.idle, self.functional = nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.2)
        self.late = nn.Dropout(0.2)

    def forward(self, x):
        h = self.a(x)
        h = self.norm(h + self.residual(self.b(h)))
        both = self.shared(h)
        h = self.b(both) + both
        h = self.b(F.relu(self.inplace(h), inplace=True))
        h = self.b(self.cut(h).relu())
        h = F.linear(self.functional(h), self.b.weight)
        h = h * 1.0
        late = self.late(h)
        h.mul_(2.0)
        return self.head(late) + self.head(h)


def test_the_report_says_who_reads_what(tmp_path, caplog):
    callback = AugmentedDropout(p_backward=0.5)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trained(Mixed(), tmp_path, callback)
    said = {r.name.removeprefix("net."): r.weight_gradient for r in callback.readings}
    assert said["residual"] == "errors only where read by Add"
    assert said["shared"] == "backward mask in net.b; errors only where read by Add"
    assert said["cut"] == "errors only where read by Relu"
    assert said["inplace"].startswith("errors only")
    assert said["functional"] == "errors only where read by Mm" or "Addmm" in said["functional"]
    assert "overwritten in place" in said["late"]
    assert said["idle"] == "did not run in the first batch"
    (line,) = [r.message for r in caplog.records if "net.residual (0.2/0.5): errors only" in r.message]
    assert "net.shared (0.2/0.5): backward mask in net.b" in line


class Halved(nn.Dropout):
    def forward(self, x):
        return super().forward(x) / 2


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_classes_of_the_users_own_are_left_alone_and_listed(tmp_path, caplog):
    net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Dropout(0.5), Adapted(WIDTH, 5), Halved(0.5), nn.Linear(5, 3))
    inside = []
    watch = At(1, lambda trainer, module: inside.extend(type(m) for m in module.net))
    callback = AugmentedDropout(ratio=0.0)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trained(net, tmp_path, callback, watch)
    assert inside[2:4] == [Adapted, Halved]
    assert inside[1] is not nn.Dropout
    assert [r.name for r in callback.readings] == ["net.1"]
    assert callback.readings[0].weight_gradient.startswith("errors only")
    assert "left alone: net.3 (Halved, a subclass)" in caplog.text


def test_frozen_layers_and_inputs_without_gradient(tmp_path):
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, 3))
    by_hand = copy.deepcopy(net)
    ours, _ = trained(net, tmp_path, AugmentedDropout(p_backward=0.6), max_steps=1, precision="64-true")
    # the first dropout's input needs no gradient, and still the layer's weights see the backward mask

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = by_hand

        def forward(self, x):
            for i in (1, 3):
                x = oracle.two_passes(self.net[i], x, *oracle.scaled_masks(x, 0.3, 0.6)) if self.training else x
            return x if x.shape[-1] == 3 else self.net(x)

    theirs, _ = trained(Two(), tmp_path, max_steps=1, precision="64-true")
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, theirs.gradients[f"net.{name}"], rtol=0, atol=1e-10)
    frozen = copy.deepcopy(by_hand).float()
    frozen[1].requires_grad_(False)
    run, _ = trained(frozen, tmp_path, AugmentedDropout(p_backward=0.6))
    assert set(run.gradients) == {"3.weight", "3.bias"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_is_not_checkpointed(tmp_path, reentrant):
    class Saving(Net):
        def forward(self, x):
            run = super().forward
            return checkpoint(run, x.requires_grad_(), use_reentrant=reentrant) if self.training else run(x)

    net, saving = two(Net, Saving)
    plain, _ = trained(net, tmp_path, AugmentedDropout(p_backward=0.7))
    ours, _ = trained(saving, tmp_path, AugmentedDropout(p_backward=0.7))
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient)


def chain():
    torch.manual_seed(1)
    tail = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Dropout(0.5), nn.Flatten(), tail, nn.Dropout(0.3), nn.Linear(WIDTH, 3)
    )


@pytest.mark.parametrize("how", ["whole", "in place", "parts"])
def test_compiled_is_eager(tmp_path, how):
    torch._dynamo.reset()
    ours = chain()
    if how == "whole":
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    elif how == "in place":
        ours.compile(backend="aot_eager", fullgraph=True)
        compiled = ours
    else:  # the dropout is in one graph, the layer that reads it in another or in none
        compiled = nn.Sequential(torch.compile(ours[:2], backend="aot_eager"), *ours[2:4], *ours[4:])
        compiled[2].compile(backend="aot_eager")
    callback = AugmentedDropout(p_backward=0.7, schedule_backward=LinearRate(1, 0.5))
    run, _ = trained(compiled, tmp_path, callback)
    plain, _ = trained(chain(), tmp_path, AugmentedDropout(p_backward=0.7, schedule_backward=LinearRate(1, 0.5)))
    for (name, gradient), other in zip(plain.gradients.items(), run.gradients.values(), strict=True):
        torch.testing.assert_close(other, gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert all("backward mask" in reading.weight_gradient for reading in callback.readings)


def test_a_dual_module_of_the_users_own_reaches_the_layer_after_it(tmp_path):
    def network(dropout):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, WIDTH), dropout, nn.Linear(WIDTH, 3))

    by_hand, _ = trained(network(nn.Dropout(0.3)), tmp_path, AugmentedDropout(0.3, 0.6))
    ours, _ = trained(network(DualDropout(0.3, 0.6)), tmp_path, AugmentedDropout())
    assert_identical(by_hand, ours)
    alone, _ = trained(network(DualDropout(0.3, 0.6)), tmp_path)
    assert not torch.equal(alone.net[2].weight, ours.net[2].weight)


def test_two_callbacks_for_different_parts(tmp_path):
    def network():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(FEATURES, WIDTH),
            DualDropout(0.3, 0.6),
            nn.Linear(WIDTH, WIDTH),
            nn.Dropout(0.2),
            nn.Linear(WIDTH, 3),
        )

    both = [
        AugmentedDropout(0.3, 0.6, include="net.1"),
        AugmentedDropout(0.2, 0.4, include="net.3", log_prefix="other"),
    ]
    ours, trainer = trained(network(), tmp_path, *both)
    one, _ = trained(network(), tmp_path, AugmentedDropout(ratio=2.0))
    assert_identical(ours, one)
    assert all("backward mask" in callback.readings[0].weight_gradient for callback in both)
    assert {key for key in trainer.callback_metrics if key.endswith("p_backward")} == {
        "augmented_dropout/p_backward",
        "other/p_backward",
    }
    with pytest.raises(InvalidArgument, match="log_prefix"):
        trained(network(), tmp_path, AugmentedDropout(0.3, include="net.1"), AugmentedDropout(0.2, include="net.3"))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_names_and_patterns(tmp_path):
    names = [
        ("net.residual", None, ["residual"]),
        (["net.re*", "re:net\\.(shared|cut)"], None, ["residual", "shared", "cut"]),
        ("net", ["net.i*", "net.late", "net.functional"], ["residual", "shared", "cut"]),
        (None, "net.residual", ["shared", "cut", "inplace", "idle", "functional", "late"]),
    ]
    for include, exclude, expected in names:
        callback = AugmentedDropout(0.1, 0.2, include=include, exclude=exclude)
        trained(Mixed(), tmp_path, callback, fast_dev_run=True)
        assert [r.name.removeprefix("net.") for r in callback.readings] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": "net.residul"}, "Did you mean 'net.residual'.*The dropouts are: .*'net.late'"),
        ({"exclude": "encoder"}, "exclude has 'encoder'"),
        ({"exclude": "net"}, "leave none of"),
    ],
)
def test_patterns_that_name_nothing_list_the_dropouts(tmp_path, settings, message):
    with pytest.raises(LayerNotFound, match=message):
        trained(Mixed(), tmp_path, AugmentedDropout(0.1, 0.2, **settings))


def test_no_dropout_at_all_says_what_there_is(tmp_path):
    with pytest.raises(LayerNotFound, match=r"no dropout.*functional='patch'"):
        trained(nn.Linear(FEATURES, 3), tmp_path, AugmentedDropout(0.1, 0.2))
    with pytest.raises(LayerNotFound, match=r"net\.0 \(Halved, a subclass\)"):
        trained(nn.Sequential(Halved(), nn.Linear(FEATURES, 3)), tmp_path, AugmentedDropout(0.1, 0.2))


@pytest.mark.parametrize(
    "settings",
    [
        {"p_forward": 1.5},
        {"p_backward": float("nan")},
        {"p_backward": 0.5, "ratio": 2.0},
        {"p_forward": 0.5, "ratio": 3.0},
        {"ratio": -1.0},
        {"coupling": "nest"},
        {"scale": "double"},
        {"weight_grad": "both"},
        {"functional": "replace"},
        {"attention": "flash"},
        {"compare_every_n_steps": 0},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(InvalidArgument):
        AugmentedDropout(**settings)


def test_a_ratio_that_is_too_large_for_one_dropout_names_it(tmp_path):
    net = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURES, WIDTH), nn.Dropout(0.6), nn.Linear(WIDTH, 3))
    with pytest.raises(InvalidArgument, match=r"of 'net.2' is 1\.2.*At most ratio=1\.667"):
        trained(net, tmp_path, AugmentedDropout(ratio=2.0))
    assert type(net[0]) is nn.Dropout


def test_a_line_search_is_refused_unless_nothing_changes(tmp_path):
    class Searching(Around):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    module = Searching(Net())
    with pytest.raises(UnsupportedTraining, match="not the gradient of any loss"):
        fit(quiet_trainer(tmp_path, callbacks=[AugmentedDropout(0.2, 0.5)]), module)
    assert type(module.net.drop) is nn.Dropout
    fit(quiet_trainer(tmp_path, callbacks=[AugmentedDropout()], max_steps=1), module)


def test_a_gradient_penalty_says_why_it_cannot_be(tmp_path):
    class Penalised(Around):
        def own_loss(self, logits, y):
            (gradient,) = torch.autograd.grad(logits.square().sum(), self.net.left.weight, create_graph=True)
            return gradient.square().sum()

    with pytest.raises(UnsupportedTraining, match="gradient penalty"):
        fit(quiet_trainer(tmp_path, callbacks=[AugmentedDropout(0.2, 0.5)]), Penalised(Net()))


def test_classic_scale_holds_when_the_module_is_tested(tmp_path):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, 3))
    module = Around(net)
    module.test_step = lambda batch, batch_idx: outputs.append(net(torch.ones(1, FEATURES)))
    outputs = []
    plain = net.eval()(torch.ones(1, FEATURES) * 0.5)
    trainer = quiet_trainer(tmp_path, callbacks=[AugmentedDropout(scale="classic")])
    trainer.test(module, loader(BATCH), verbose=False)
    torch.testing.assert_close(outputs[0], plain)
    assert type(net[0]) is nn.Dropout


# -- rates that move, seeds, and what is measured ----------------------------------------------------------------------


def test_rates_of_each_pass_follow_their_own_schedule(tmp_path):
    seen = []

    class Watch(At):
        def on_train_batch_start(self, trainer, module, *args):
            seen.append(module.net.drop._dual.noise.rates)

    callback = AugmentedDropout(0.4, 0.8, schedule_forward=EarlyRate(0.5), schedule_backward=LinearRate(0, 1))
    _, trainer = trained(Net(), tmp_path, callback, Watch(0, print), max_epochs=2)
    assert seen == [pytest.approx((0.4 * max(0, 1 - i / 5), 0.8 * i / 10)) for i in range(10)]
    assert float(trainer.callback_metrics["augmented_dropout/p_backward"]) == pytest.approx(0.72)
    assert list((tmp_path / "augmented_dropout").glob("rates*.png"))


def test_a_seed_makes_a_resumed_training_equal_bit_for_bit(tmp_path):
    saved = tmp_path / "saved.ckpt"
    save = At(7, lambda trainer, _: trainer.save_checkpoint(saved))
    runs = []
    for ckpt_path, neighbours in ((None, [save]), (saved, [])):
        module = Around(two(Net)[0])
        callback = AugmentedDropout(ratio=0.5, seed=5, compare_every_n_steps=2)
        trainer = quiet_trainer(tmp_path, callbacks=[callback, *neighbours], max_epochs=3)
        fit(trainer, module, ResumableLoader(), seed=len(runs), ckpt_path=ckpt_path)
        runs.append((module, callback))
    assert_identical(runs[0][0], runs[1][0])
    assert runs[0][1].comparison.history == runs[1][1].comparison.history
    assert len(runs[0][1].comparison.history["grad_cosine"]) == 3
    assert set(torch.load(saved, weights_only=True)["callbacks"]) == {runs[0][1].state_key}


def test_a_seed_leaves_the_random_numbers_outside_of_the_batches(tmp_path):
    class Bare(Around):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * torch.rand(3).sum()

    torch.manual_seed(9)
    untouched = torch.get_rng_state()
    module = Bare(Net())
    trainer = quiet_trainer(tmp_path, callbacks=[AugmentedDropout(seed=1)], num_sanity_val_steps=0, limit_val_batches=0)
    torch.set_rng_state(untouched)
    list(loader())
    expected = torch.get_rng_state()
    torch.set_rng_state(untouched)
    trainer.fit(module, ResumableLoader())
    torch.set_rng_state(untouched)
    list(loader())
    assert torch.equal(expected, torch.get_rng_state())


def test_the_comparison_is_that_of_both_gradients(tmp_path):
    callback = AugmentedDropout(p_backward=0.7, compare_every_n_steps=1)
    net, by_hand = two(Net, ByHand)
    by_hand.rates = (0.4, 0.4)
    ours, trainer = trained(net, tmp_path, callback, max_steps=1)
    standard, _ = trained(by_hand, tmp_path, max_steps=1)
    assert list(ours.gradients) == list(standard.gradients)
    a, b = (torch.cat([g.flatten() for g in run.gradients.values()]).double() for run in (ours, standard))
    shown = trainer.callback_metrics
    assert float(shown["augmented_dropout/grad_cosine"]) == pytest.approx(float(F.cosine_similarity(a, b, 0)), rel=1e-5)
    assert float(shown["augmented_dropout/grad_norm_ratio"]) == pytest.approx(float(a.norm() / b.norm()), rel=1e-5)


def test_comparing_changes_nothing(tmp_path):
    runs = [
        trained(two(Net)[0], tmp_path, AugmentedDropout(p_backward=0.7, compare_every_n_steps=n), max_epochs=2)
        for n in (None, 1, 2)
    ]
    for run, trainer in runs[1:]:
        assert_identical(runs[0][0], run)
        assert 0 < float(trainer.callback_metrics["augmented_dropout/grad_cosine"]) < 1


def test_comparing_without_any_gradient_shows_nothing(tmp_path):
    net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Dropout(1.0), nn.Linear(WIDTH, 3, bias=False))
    _, trainer = trained(net, tmp_path, AugmentedDropout(1.0, 1.0, compare_every_n_steps=1, coupling="independent"))
    assert "augmented_dropout/grad_cosine" not in trainer.callback_metrics


def test_comparing_is_refused_where_it_cannot_be(tmp_path):
    net = chain()
    net.compile(backend="aot_eager")
    with pytest.raises(UnsupportedTraining, match="compile"):
        trained(net, tmp_path, AugmentedDropout(0.2, 0.5, compare_every_n_steps=1))
    assert type(net[1]) is nn.Dropout


def test_dropouts_in_step_of_nobody(tmp_path):
    """A skipped step and a module hook that ends the epoch leave no random state and no mode behind."""

    class Skipping(Around):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Skipping(Net())
    callback = AugmentedDropout(0.2, 0.5, seed=1, functional="patch")
    fit(quiet_trainer(tmp_path, callbacks=[callback]), module)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert type(module.net.drop) is nn.Dropout


@pytest.mark.slow
def test_ranks_draw_different_masks_and_stay_together(tmp_path):
    ranks = run_ranks("tests.augmented_dropout.jobs:seeded", 2, tmp_path)
    assert all(torch.equal(ranks[0]["module"][key], ranks[1]["module"][key]) for key in ranks[0]["module"])
    assert not any(torch.equal(a, b) for a, b in zip(ranks[0]["kept"], ranks[1]["kept"], strict=True))
    keys = ("augmented_dropout/grad_cosine", "augmented_dropout/grad_norm_ratio")
    assert all(ranks[0]["shown"][key] == ranks[1]["shown"][key] for key in keys)
