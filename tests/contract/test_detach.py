"""After a fit, a crash or a second fit the module is what it was; copies made meanwhile are free of the method."""

from __future__ import annotations

import copy
import pickle

import pytest

from tests.contract.training import build, train
from tests.support.training import At, Settings, fingerprint, fit, quiet_trainer


class Interrupted(Exception):
    """What a crash raises."""


def crash(*_):
    raise Interrupted


def crash_in_validation(_, module):
    module.settings.during_validation = crash


@pytest.fixture
def pair(recipe):
    """The recipe's module and a twin that shares its fate without the callbacks: what Lightning leaves, both bear."""
    return build(recipe), build(recipe)


def assert_untouched(module, twin, recipe):
    assert fingerprint(module) == fingerprint(twin)
    copy.deepcopy(module)(recipe.samples.example())
    pickle.loads(pickle.dumps(module))(recipe.samples.example())


@pytest.mark.case("detach")
def test_after_one_and_two_fits(recipe, pair, tmp_path):
    callbacks = recipe.callbacks()
    for _ in range(2):
        for module, attached in zip(pair, (callbacks, []), strict=True):
            fit(quiet_trainer(tmp_path, callbacks=attached), module, kind=recipe.samples)
        assert_untouched(*pair, recipe)


@pytest.mark.case("detach")
@pytest.mark.parametrize(
    "where", ["in the step", pytest.param("in a neighbour", marks=pytest.mark.slow), "in validation"]
)
def test_after_an_exception_and_the_fit_after_it(recipe, pair, tmp_path, where):
    callbacks = recipe.callbacks()
    neighbours = {
        "in the step": [],
        "in a neighbour": [At(2, crash)],
        "in validation": [At(5, crash_in_validation)],
    }[where]
    for module, attached in zip(pair, (callbacks, []), strict=True):
        module.settings = Settings(during_step=crash if where == "in the step" else None)
        with pytest.raises(Interrupted):
            fit(quiet_trainer(tmp_path, callbacks=[*attached, *neighbours]), module, kind=recipe.samples)
        module.settings = Settings()
    assert_untouched(*pair, recipe)
    for module, attached in zip(pair, (callbacks, []), strict=True):
        fit(quiet_trainer(tmp_path, callbacks=attached), module, kind=recipe.samples)
    assert_untouched(*pair, recipe)


@pytest.mark.case("detach")
@pytest.mark.parametrize(
    ("made_by", "where"),
    [
        ("deepcopy", "in a neighbour"),
        ("pickle", "in the step"),
        pytest.param("deepcopy", "in the step", marks=pytest.mark.slow),
        pytest.param("pickle", "in a neighbour", marks=pytest.mark.slow),
    ],
)
def test_copies_made_during_training_are_free_and_change_nothing(recipe, tmp_path, where, made_by):
    copies = []

    def keep(*args):
        module = args[-1]
        during, module.settings.during_step = module.settings.during_step, None
        copies.append(copy.deepcopy(module) if made_by == "deepcopy" else pickle.loads(pickle.dumps(module)))
        module.settings.during_step = during

    if where == "in the step":
        ours = train(recipe, tmp_path, settings=Settings(during_step=keep))
    else:
        ours = train(recipe, tmp_path, after=lambda: [At(step, keep) for step in (1, 2)])
    ours.assert_equal(train(recipe, tmp_path), exactly=True)
    assert len(copies) >= 2
    # the copy is a module of its own: it trains without the method and its hooks do nothing
    copied, trained = copies[-1], copy.deepcopy(copies[-1])
    assert copied.training_step.__self__ is copied
    assert copied.training_step.__func__ is type(copied).training_step
    fit(quiet_trainer(tmp_path), trained, kind=recipe.samples)
    assert list(trained.state_dict()) == list(ours.module.state_dict())
