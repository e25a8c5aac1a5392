"""The hub adds terms to any kind of `training_step`, in any company, and goes without a trace; the callback on it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from lightning_methods.core.losses import AuxiliaryLoss, LossHub
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LayerNotFound,
    NoEffect,
    ShapeMismatch,
    TapNotCalled,
    TermOutweighsLoss,
    UnsupportedTraining,
)
from tests.support.training import (
    At,
    Settings,
    TinyModule,
    assert_identical,
    fit,
    largest_difference,
    loader,
    quiet_trainer,
)


class Size(AuxiliaryLoss):
    """The mean square of a layer, a term that anybody can write by hand."""

    method = "size"

    def layer_term(self, layer, batch, step):
        term = batch.features.square().mean()
        return term, {"value": term.detach()}


class ByHand(TinyModule):
    weight = 0.5

    def total_loss(self, layers, y):
        return super().total_loss(layers, y) + self.weight * layers["second"].float().square().mean()


def make(kind=TinyModule, settings=None):
    torch.manual_seed(1)
    return kind(settings)


def trained(tmp_path, kind=TinyModule, callbacks=(), **settings):
    module = make(kind)
    fit(quiet_trainer(tmp_path, callbacks=list(callbacks), **settings), module)
    return module


# -- what training_step may be -----------------------------------------------------------------------------------------


class ReturnsDict(TinyModule):
    def training_step(self, batch, batch_idx):
        self.returned = {"loss": super().training_step(batch, batch_idx), "extra": 3}
        return self.returned


class WithoutIndex(TinyModule):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class OtherNames(TinyModule):
    def training_step(self, data, index, *rest):
        return super().training_step(data, index)


class KeywordOnly(TinyModule):
    def training_step(self, batch, batch_idx, *, scale=1.0):
        return super().training_step(batch, batch_idx) * scale


class SkipsSome(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


@pytest.mark.parametrize("kind", [ReturnsDict, WithoutIndex, OtherNames, KeywordOnly, SkipsSome])
def test_every_form_of_the_step_equals_the_term_written_by_hand(tmp_path, kind):
    by_hand = type("ByHandToo", (kind, ByHand), {})
    ours = trained(tmp_path, kind, [Size("second", weight=0.5)])
    assert_identical(ours, trained(tmp_path, by_hand))
    assert largest_difference(ours, trained(tmp_path, kind)) > 1e-2


def test_the_users_dict_is_not_changed(tmp_path):
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            seen.append((outputs, pl_module.returned))

    trained(tmp_path, ReturnsDict, [Size("second", weight=0.5), Looks()])
    outputs, returned = seen[0]
    assert outputs is not returned
    assert outputs["extra"] == returned["extra"] == 3
    assert outputs["loss"] > returned["loss"]


class TakesIterator(TinyModule):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class ReturnsText(TinyModule):
    def training_step(self, batch, batch_idx):
        return "done"


class ReturnsNoLoss(TinyModule):
    def training_step(self, batch, batch_idx):
        return {"los": super().training_step(batch, batch_idx)}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: make(TakesIterator), "takes dataloader_iter"),
        (lambda: make(TinyModule, Settings(manual=True)), "optimises manually"),
        (lambda: make(ReturnsText), "returned 'done'. A tensor, a dict"),
        (lambda: make(ReturnsNoLoss), r"a dict with the keys \['los'\]"),
    ],
)
def test_what_cannot_take_a_term_is_refused(tmp_path, module, said):
    module = module()
    with pytest.raises(UnsupportedTraining, match=said):
        fit(quiet_trainer(tmp_path, callbacks=[Size("second", weight=0.5)]), module)
    assert "training_step" not in vars(module)


def test_validation_that_calls_the_step_gets_no_term_and_logs_nothing(tmp_path):
    class Shared(TinyModule):
        def validation_step(self, batch, batch_idx):
            self.validated = self.training_step(batch, batch_idx)
            assert torch.equal(self.validated, F.cross_entropy(self(batch[0]), batch[1]))

    module = trained(tmp_path, Shared, [Size("second", weight=0.5)])
    assert module.validated.ndim == 0


def test_lbfgs(tmp_path):
    class Closure(TinyModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    by_hand = type("ClosureByHand", (Closure, ByHand), {})
    ours = trained(tmp_path, Closure, [Size("second", weight=0.5)])
    assert_identical(ours, trained(tmp_path, by_hand))
    assert largest_difference(ours, trained(tmp_path, Closure)) > 1e-3


def test_the_users_logged_loss_stays_his(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[Size("second", weight=0.5)], max_epochs=1)
    fit(trainer, make(), loader(8))
    shown = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert shown["size/loss"] == pytest.approx(0.5 * shown["size/value/second"])
    assert shown["size/total_loss"] == pytest.approx(shown["train_loss"] + shown["size/loss"])


# -- the hub -----------------------------------------------------------------------------------------------------------


class Adds:
    """A participant that adds a number and notes that it was asked."""

    def __init__(self, amount=1.0):
        self.amount = amount
        self.steps = []

    @contextmanager
    def around_step(self, module, batch, batch_idx):
        yield

    def step_ended(self):
        self.ended = True

    def loss_term(self, step):
        assert self.ended
        self.steps.append(step.batch_idx)
        return torch.tensor(self.amount)


class Bench(TinyModule):
    """A module that can be stepped without a fit."""

    def training_step(self, batch, batch_idx=0):
        return torch.zeros((), requires_grad=True) + 0


@pytest.fixture
def module():
    module = Bench()
    module.trainer = quiet_trainer(".")
    module.trainer.training = True
    return module


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_participants_leave_in_any_order(module, order):
    participants = [Adds(1), Adds(10), Adds(100)]
    for participant in participants:
        LossHub.join(module, participant)
        LossHub.join(module, participant)  # twice is once
    assert module.training_step(None).item() == 111
    left = 111
    for i in order:
        LossHub.leave(module, participants[i])
        LossHub.leave(module, participants[i])
        left -= participants[i].amount
        assert module.training_step(None).item() == left
    assert "training_step" not in vars(module)


def test_a_step_that_was_on_the_instance_comes_back(module):
    def compiled(batch, batch_idx):
        return torch.zeros((), requires_grad=True) + 5

    module.training_step = compiled
    participant = Adds()
    LossHub.join(module, participant)
    assert module.training_step(None, 0).item() == 6
    LossHub.leave(module, participant)
    assert vars(module)["training_step"] is compiled


def test_a_compiled_lightning_module_keeps_its_compiled_step():
    torch._dynamo.reset()
    stepped = pl.utilities.compile.from_compiled(torch.compile(make(), backend="eager"))
    before = vars(stepped)["training_step"]
    participant = Adds()
    LossHub.join(stepped, participant)
    assert vars(stepped)["training_step"] is not before
    LossHub.leave(stepped, participant)
    assert vars(stepped)["training_step"] is before
    torch._dynamo.reset()


def test_a_foreign_wrapper_on_top_keeps_working_and_adds_nothing_any_more(module):
    participant = Adds()
    LossHub.join(module, participant)
    hub = module.training_step

    def foreign(*args):
        return hub(*args) * 2

    foreign.__wrapped__ = hub
    module.training_step = foreign
    assert module.training_step(None).item() == 2
    LossHub.leave(module, participant)
    assert module.training_step is foreign
    assert module.training_step(None).item() == 0
    assert participant.steps == [0]


def test_a_participant_may_join_and_leave_while_another_stays(module):
    first, second = Adds(1), Adds(10)
    LossHub.join(module, first)
    hub = module.training_step
    LossHub.join(module, second)
    assert module.training_step is hub
    LossHub.leave(module, first)
    LossHub.join(module, first)
    assert hub.participants == [second, first]
    LossHub.leave(module, first)
    LossHub.leave(module, second)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_the_users_own_step(module, duplicate):
    participant = Adds()
    LossHub.join(module, participant)
    copied = duplicate(module)
    LossHub.leave(module, participant)
    assert copied.training_step.__self__ is copied
    assert copied.training_step(None).item() == 0
    assert participant.steps == []


def test_steps_in_evaluation_or_without_grad_are_the_users(module):
    participant = Adds()
    LossHub.join(module, participant)
    with torch.no_grad():
        assert module.training_step(None).item() == 0
    module.trainer.validating = True
    assert module.training_step(None).item() == 0
    assert participant.steps == []


def test_lightning_reads_the_signature_through_the_hub(module):
    LossHub.join(module, Adds())
    assert module.training_step.__name__ == "training_step"
    assert module.training_step.__wrapped__.__self__ is module


# -- the callback ------------------------------------------------------------------------------------------------------


def test_an_exception_in_the_step_releases_the_tensors(tmp_path):
    seen = []

    def fail(module):
        (calls,) = callback.taps._captured.values()
        seen.append(weakref.ref(calls[0][0]))
        raise ZeroDivisionError

    callback = Size("second", weight=0.5)
    with pytest.raises(ZeroDivisionError):
        fit(quiet_trainer(tmp_path, callbacks=[callback]), make(TinyModule, Settings(during_step=fail)))
    gc.collect()
    assert seen[0]() is None


def test_no_tensor_is_held_between_steps(tmp_path):
    held = []
    callback = Size("second", weight=0.5)
    trained(tmp_path, callbacks=[callback, At(2, lambda *_: held.append(dict(callback.taps._captured)))])
    assert held == [{}]


@pytest.mark.parametrize(
    ("weight", "first", "second"),
    [(0.5, 0.5, 0.5), ({"second": 0.5}, 0.0, 0.5), ({"*": 0.25, "second": 0.5}, 0.25, 0.5)],
)
def test_weights_by_layer(tmp_path, weight, first, second):
    class Both(TinyModule):
        def total_loss(self, layers, y):
            terms = [(w, layers[n].square().mean()) for n, w in (("first", first), ("second", second)) if w]
            weighted = [w * term for w, term in terms]
            return super().total_loss(layers, y) + (weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1])

    ours = trained(tmp_path, callbacks=[Size(["first", "second"], weight=weight)])
    assert_identical(ours, trained(tmp_path, Both))


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1] * 10),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75] + [1] * 7),
        ({"schedule": lambda step: float(step == 3)}, [0, 0, 0, 1] + [0] * 6),
        ({"every_n_steps": 2}, [1, 0, 1, 0, 1] * 2),
    ],
    ids=["constant", "warm-up", "schedule", "every second"],
)
def test_how_the_weight_goes_with_the_steps(tmp_path, settings, factors):
    class Scheduled(TinyModule):
        def total_loss(self, layers, y):
            weight = 0.5 * factors[self.global_step] if torch.is_grad_enabled() else 0
            return super().total_loss(layers, y) + weight * layers["second"].square().mean()

    assert_identical(
        trained(tmp_path, callbacks=[Size("second", weight=0.5, **settings)]), trained(tmp_path, Scheduled)
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weight": float("nan")}, "'weight' is nan"),
        ({"weight": True}, "'weight' is True"),
        ({"weight": {"first": "1"}}, "'first' is '1'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"warmup_steps": 2, "schedule": float}, "Give one of them"),
        ({"log_on": "batch"}, "log_on='batch'"),
        ({"layers": []}, "names no layer"),
    ],
)
def test_settings_are_checked_at_construction(arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        Size(**{"layers": "second", "weight": 0.5, **arguments})


@pytest.mark.parametrize(
    ("callback", "error", "said"),
    [
        (lambda: Size("secnd", weight=1), LayerNotFound, "Did you mean 'second'"),
        (lambda: Size("second", weight={"third": 1.0}), LayerNotFound, "weight has 'third'"),
        (lambda: Size("second", weight=1, labels="y"), BatchFormat, "a list of 2"),
        (lambda: Size("second", weight=1, labels=lambda b: b[1][:3]), ShapeMismatch, "8 rows .* for 3 targets"),
        (lambda: Size("settled", weight=1), TapNotCalled, "'settled'"),
    ],
)
def test_errors_at_the_start_leave_the_module_as_it_was(tmp_path, callback, error, said):
    class WithUnused(TinyModule):
        def __init__(self, settings=None):
            super().__init__(settings)
            self.settled = torch.nn.ReLU()

    module = make(WithUnused)
    with pytest.raises(error, match=said):
        fit(quiet_trainer(tmp_path, callbacks=[callback()]), module)
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


def told(tmp_path, callback, module=None, **settings):
    """Return the categories of our warnings in a fit."""
    module = module or make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, callbacks=[callback], **settings).fit(module, loader())
    return [w.category for w in caught if issubclass(w.category, UserWarning) and "Size" in str(w.message)]


def test_a_term_that_outweighs_the_loss_is_told_once(tmp_path):
    assert told(tmp_path, Size("second", weight=100.0), max_epochs=6) == [TermOutweighsLoss]
    assert told(tmp_path, Size("second", weight=0.01), max_epochs=6) == []
    assert told(tmp_path, Size("second", weight=0), max_epochs=6) == []


def test_a_term_without_effect_is_told(tmp_path):
    module = make()
    module.first.requires_grad_(False)
    assert told(tmp_path, Size("first", weight=0.1), module) == [NoEffect]


@pytest.mark.parametrize("log_on", ["epoch", "step"])
def test_logged_once_per_epoch_or_step(tmp_path, log_on):
    values = []

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            values.append("size/value/second" in trainer.logged_metrics)

    trained(tmp_path, callbacks=[Size("second", weight=0.5, log_on=log_on), Keeps()], log_every_n_steps=1, max_epochs=1)
    assert values == [log_on == "step"] * 5


@pytest.mark.parametrize(
    ("second", "shared"),
    [
        (lambda: Size(["second", "head"], weight=0), r"\['second'\]"),
        (lambda: Size("first", weight=0.1), r"\['loss', 'total_loss'\]"),
        (lambda: Size("first", weight=0), None),
        (lambda: Size("first", weight=0.1, log_prefix="other"), None),
    ],
    ids=["one layer", "two losses", "a probe of another layer", "another prefix"],
)
def test_two_callbacks_must_not_log_under_one_key(tmp_path, second, shared):
    callbacks = [Size("second", weight=0.5), second()]
    if shared is None:
        assert "training_step" not in vars(trained(tmp_path, callbacks=callbacks))
        return
    module = make()
    with pytest.raises(InvalidArgument, match=f"Two callbacks log {shared}"):
        fit(quiet_trainer(tmp_path, callbacks=callbacks), module)
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


# -- the share of the loss that a term may be --------------------------------------------------------------------------


class LimitedByHand(ByHand):
    share = 0.2

    def total_loss(self, layers, y):
        loss = self.own_loss(layers["head"], y)
        term = self.weight * layers["second"].square().mean()
        return loss + term * min(1.0, float(self.share * loss.detach() / term.detach()))


def test_a_limited_term_equals_the_one_written_by_hand(tmp_path):
    ours = trained(tmp_path, callbacks=[Size("second", weight=5.0, max_share=0.2)])
    theirs = trained(tmp_path, type("Heavy", (LimitedByHand,), {"weight": 5.0}))
    assert largest_difference(ours, theirs) < 1e-6
    assert largest_difference(ours, trained(tmp_path, callbacks=[Size("second", weight=5.0)])) > 1e-2


def test_a_limit_that_is_not_reached_changes_no_bit(tmp_path):
    limited = trained(tmp_path, callbacks=[Size("second", weight=0.1, max_share=1.0)])
    assert_identical(limited, trained(tmp_path, callbacks=[Size("second", weight=0.1)]))


class Recorded(Size):
    """Keep what was logged in each step."""

    def reset(self):
        super().reset()
        self.steps = []

    def _log(self, step, values, labels):
        if "limit" in values:
            self.steps.append((float(step.loss), {key: float(value) for key, value in values.items()}))
        super()._log(step, values, labels)


@pytest.mark.parametrize("units", [1.0, 1e-6, -1.0])
def test_the_share_is_kept_whatever_units_the_loss_has(tmp_path, units):
    class Scaled(TinyModule):
        def own_loss(self, logits, y):
            return units * super().own_loss(logits, y)

    size = Recorded("second", weight=5.0, max_share=0.2)
    trained(tmp_path, Scaled, [size])
    assert len(size.steps) == 10
    for loss, logged in size.steps:
        assert abs(logged["loss"]) <= 0.2 * abs(loss) * (1 + 1e-5)
        assert logged["total_loss"] == pytest.approx(loss + logged["loss"])
        assert 0 < logged["limit"] <= 1
    if units == 1e-6:
        assert all(abs(logged["loss"]) == pytest.approx(0.2 * abs(loss), rel=1e-4) for loss, logged in size.steps)


def test_terms_of_opposite_signs_do_not_hide_each_other(tmp_path):
    size = Recorded(["first", "second"], weight={"first": 50.0, "second": -50.0}, max_share=0.2)
    module = make()
    x, y = next(iter(loader()))
    layers = module.layers(x)
    sizes = sum(50 * float(layers[name].square().mean()) for name in ("first", "second"))
    fit(quiet_trainer(tmp_path, callbacks=[size], max_epochs=1, limit_train_batches=1), module)
    ((loss, logged),) = size.steps
    assert loss == pytest.approx(float(module.own_loss(layers["head"], y)), rel=1e-5)
    assert logged["limit"] == pytest.approx(0.2 * loss / sizes, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_loss_of_which_there_is_no_share(tmp_path, value):
    class Odd(TinyModule):
        def own_loss(self, logits, y):
            return super().own_loss(logits, y) * 0 + value

    size = Recorded("second", weight=5.0, max_share=0.2)
    trained(tmp_path, Odd, [size], max_epochs=1, limit_train_batches=1)
    ((_, logged),) = size.steps
    if value == 0.0:
        assert logged["limit"] == logged["loss"] == logged["total_loss"] == 0
    else:
        assert logged["limit"] == 1
        assert not math.isfinite(logged["total_loss"])


@pytest.mark.parametrize("share", [0, -0.1, math.nan])
def test_bad_shares(share):
    with pytest.raises(InvalidArgument, match="max_share"):
        Size("second", weight=1.0, max_share=share)
