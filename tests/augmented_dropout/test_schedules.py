from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from lightning_methods.augmented_dropout import (
    AugmentedDropout,
    ConstantRate,
    CosineRate,
    CurriculumRate,
    DropoutSchedule,
    EarlyRate,
    LateRate,
    LinearRate,
)
from lightning_methods.augmented_dropout.schedules import progress_of
from lightning_methods.augmented_dropout.scheduling import stochastic_depths_of
from lightning_methods.errors import InvalidArgument, LayerNotFound, UnsupportedTraining
from tests.support.training import At, TinyModule, fit, quiet_trainer

SCHEDULES = [ConstantRate(0.3), LinearRate(0.2, 0.9), CosineRate(1, 0), CurriculumRate(), EarlyRate(0.4)]
SCHEDULES += [EarlyRate(0.4, "constant"), LateRate(0.4)]


@given(st.floats(0, 1), st.sampled_from(SCHEDULES))
def test_factors_are_shares(progress, schedule):
    assert 0 <= schedule(progress) <= 1


def test_values_at_the_ends_and_the_cutoff():
    ends = {type(s).__name__ + getattr(s, "shape", ""): (s(0.0), s(1.0)) for s in SCHEDULES}
    assert ends == {
        "ConstantRate": (0.3, 0.3),
        "LinearRate": (0.2, pytest.approx(0.9)),
        "CosineRate": (1, pytest.approx(0)),
        "CurriculumRate": (0, pytest.approx(1, abs=1e-4)),
        "EarlyRatelinear": (1, 0),
        "EarlyRateconstant": (1, 0),
        "LateRate": (0, 1),
    }
    assert EarlyRate(0.4)(0.1) == pytest.approx(0.75)
    assert [EarlyRate(0.4, "constant")(t) for t in (0.39, 0.4)] == [1, 0]
    assert [LateRate(0.4)(t) for t in (0.39, 0.4)] == [0, 1]
    assert EarlyRate()(50 / 300) == 0 < EarlyRate()(49 / 300)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantRate(1.5),
        lambda: LinearRate(start=-0.1),
        lambda: CosineRate(end=float("nan")),
        lambda: CurriculumRate(0),
        lambda: EarlyRate(0),
        lambda: EarlyRate(0.5, "steep"),
        lambda: LateRate(1),
        lambda: DropoutSchedule(None),
        lambda: DropoutSchedule("early"),
        lambda: DropoutSchedule(EarlyRate(), p=1.5),
        lambda: AugmentedDropout(schedule_forward=0.5),
    ],
)
def test_bad_settings(make):
    with pytest.raises(InvalidArgument):
        make()


def trainer_at(**counters):
    default = {"max_epochs": 4, "max_steps": -1, "num_training_batches": 5, "current_epoch": 1, "global_step": 7}
    return SimpleNamespace(**{**default, **counters})


def test_progress_is_a_function_of_the_trainers_counters():
    assert progress_of(trainer_at(), 2) == pytest.approx(1.4 / 4)
    assert progress_of(trainer_at(max_epochs=None, max_steps=20), 2) == pytest.approx(7 / 20)
    assert progress_of(trainer_at(max_steps=8), 2) == pytest.approx(7 / 8)
    assert progress_of(trainer_at(num_training_batches=float("inf")), 2) == pytest.approx(1 / 4)
    assert progress_of(trainer_at(current_epoch=9), 0) == 1
    for endless in ({"max_epochs": None}, {"max_epochs": -1}):
        with pytest.raises(UnsupportedTraining, match="max_epochs"):
            progress_of(trainer_at(**endless), 0)


class DropPath(nn.Module):
    """As image models have it."""

    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep


class Deep(TinyModule):
    def __init__(self, settings=None):
        super().__init__(settings)
        self.drop = nn.Dropout(0.5)
        self.path = DropPath(0.4)
        self.depth = StochasticDepth(0.2, "row")

    def layers(self, x):
        first = self.first(x)
        return super().layers(x) | {"head": self.head(self.drop(first + self.depth(self.path(first))))}


def test_the_rates_of_all_kinds_move_and_come_back(tmp_path):
    seen = []

    class Watch(At):
        def on_train_batch_start(self, trainer, module, *args):
            seen.append((module.drop._dual.noise.rates[0], module.path.drop_prob, module.depth.p))

    module = Deep()
    schedule = DropoutSchedule(LinearRate(1, 0))
    fit(quiet_trainer(tmp_path, callbacks=[schedule, Watch(0, lambda *_: None)]), module)
    assert len(seen) == 10
    for i, rates in enumerate(seen):
        assert rates == pytest.approx([p * (1 - i / 10) for p in (0.5, 0.4, 0.2)])
    assert (module.drop.p, module.path.drop_prob, module.depth.p) == (0.5, 0.4, 0.2)
    assert [type(m) for m in (module.drop, module.path, module.depth)] == [nn.Dropout, DropPath, StochasticDepth]
    (figure,) = (tmp_path / "dropout_schedule").glob("rates*.png")
    assert figure.stat().st_size > 5000


def test_a_rate_for_modules_without_one(tmp_path):
    module = Deep()
    module.path.drop_prob = None
    rates = []
    watch = At(1, lambda trainer, m: rates.append((m.path.drop_prob, m.depth.p)))
    fit(quiet_trainer(tmp_path, callbacks=[DropoutSchedule(ConstantRate(0.5), p=0.4, exclude="drop"), watch]), module)
    assert rates == [(0.2, 0.2)]
    assert module.path.drop_prob is None


def test_which_modules_are_stochastic_depth():
    class DropPathWithMore(DropPath):
        def forward(self, x, residual):
            return x + residual

    class OtherDropPath(DropPathWithMore):
        pass

    net = nn.ModuleDict({"a": DropPath(0.1), "b": OtherDropPath(0.1), "c": StochasticDepth(0.3, "batch")})
    assert {name: attribute for name, (_, attribute) in stochastic_depths_of(net).items()} == {
        "a": "drop_prob",
        "c": "p",
    }


@pytest.mark.parametrize("kind", ["drop", "path", "depth"])
def test_compiled_modules_follow_without_compiling_again(tmp_path, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module, counter = Deep(), CompileCounterWithBackend("aot_eager")
    getattr(module, kind).compile(backend=counter, fullgraph=True)
    fit(quiet_trainer(tmp_path, callbacks=[DropoutSchedule(LinearRate(0.1, 0.9), include=kind)], max_epochs=3), module)
    # once for training, once for evaluation
    assert counter.frame_count <= 2


def test_a_compiled_path_drops_whole_samples_at_the_rate(tmp_path):
    torch._dynamo.reset()
    seen = []

    def look(trainer, module):
        y = torch.compile(module.path, backend="aot_eager", fullgraph=True)(torch.ones(4000, 3))
        seen.append(float((y[:, 0] == 0).double().mean()))
        assert (y.std(1) == 0).all()

    fit(quiet_trainer(tmp_path, callbacks=[DropoutSchedule(ConstantRate(0.5)), At(1, look)]), Deep())
    assert seen[0] == pytest.approx(0.2, abs=0.03)


def test_nothing_to_schedule(tmp_path):
    with pytest.raises(LayerNotFound, match="no dropout"):
        fit(quiet_trainer(tmp_path, callbacks=[DropoutSchedule(LateRate())]), TinyModule())
    with pytest.raises(LayerNotFound, match="'path'"):
        fit(quiet_trainer(tmp_path, callbacks=[DropoutSchedule(LateRate(), include="pth")]), Deep())


def test_two_callbacks_for_one_dropout(tmp_path):
    both = [AugmentedDropout(0.2, 0.5), DropoutSchedule(LateRate())]
    module = Deep()
    with pytest.raises(InvalidArgument, match="include and exclude"):
        fit(quiet_trainer(tmp_path, callbacks=both), module)
    assert type(module.drop) is nn.Dropout
    divided = [AugmentedDropout(0.2, 0.5), DropoutSchedule(LateRate(), include=["path", "depth"])]
    fit(quiet_trainer(tmp_path, callbacks=divided), module)
    assert type(module.drop) is nn.Dropout
