"""A method on an unchanged module trains exactly as the form written by hand, a probe exactly as without it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from tests.contract.recipes import Recipe
from tests.contract.training import train
from tests.support.training import Settings

NOISY = Settings(stochastic=True)


@pytest.mark.case("plain")
def test_plain(runs, assert_equal):
    assert_equal(*runs(settings=NOISY))


@pytest.mark.case("plain")
def test_what_should_have_an_effect_has_one(recipe, tmp_path):
    plain = train(Recipe("plain", "none", "none", module=recipe.plain, samples=recipe.samples), tmp_path)
    effect = train(recipe, tmp_path).difference(plain)
    assert effect == 0 if recipe.probe else effect > 1e-3


@pytest.mark.case("accumulate")
@pytest.mark.parametrize("batches", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_accumulated_gradients(runs, assert_equal, batches):
    assert_equal(*runs(settings=NOISY, accumulate_grad_batches=batches))  # of 5 batches: the last step has fewer


@pytest.mark.case("precision")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(runs, assert_equal, precision):
    assert_equal(*runs(settings=NOISY, precision=precision, accumulate_grad_batches=2))


@pytest.mark.case("precision")
def test_float16_with_a_gradient_scaler(runs, assert_equal):
    # given as a plugin: the Trainer itself replaces 16-mixed by bf16-mixed on a CPU
    def float16():
        return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))}

    assert_equal(*runs(settings=NOISY, accumulate_grad_batches=2, fresh=float16))


@pytest.mark.case("clip")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients(runs, assert_equal, algorithm):
    assert_equal(*runs(settings=NOISY, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm))


@pytest.mark.case("compile")
@pytest.mark.parametrize("form", [pytest.param("in place", marks=pytest.mark.slow), "assigned"])
def test_compiled_inner_modules(recipe, runs, assert_equal, form):
    def prepare(module):
        for name in recipe.inner:
            if form == "in place":
                module.get_submodule(name).compile(backend="aot_eager")
            else:
                module.set_submodule(name, torch.compile(module.get_submodule(name), backend="aot_eager"))

    assert_equal(*runs(prepare=prepare))


@pytest.mark.case("checkpointing")
def test_activation_checkpointing(runs, assert_equal):
    assert_equal(*runs(settings=Settings(stochastic=True, checkpointing=True)))


@pytest.mark.case("manual")
def test_manual_optimisation(runs, assert_equal):
    assert_equal(*runs(settings=Settings(manual=True)))


def swa():
    return [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]


def ema():
    return [EMAWeightAveraging(decay=0.9)]


@pytest.mark.case("averaging")
@pytest.mark.parametrize(
    ("place", "averaging"),
    [
        pytest.param("before", swa, id="swa-before"),
        pytest.param("after", swa, id="swa-after", marks=pytest.mark.slow),
        pytest.param("before", ema, id="ema-before", marks=pytest.mark.slow),
        pytest.param("after", ema, id="ema-after"),
    ],
)
def test_weight_averaging_beside_it(runs, assert_equal, averaging, place):
    assert_equal(*runs(**{place: averaging}, max_epochs=3))


@pytest.mark.case("modes")
@pytest.mark.parametrize(
    "mode",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3, "detect_anomaly": True},
        {"barebones": True},
        {"overfit_batches": 2, "inference_mode": False},
        {"limit_train_batches": 0},
        {"limit_train_batches": 0.5, "limit_val_batches": 0},
        {"max_steps": 3, "logger": False, "num_sanity_val_steps": 0},
        # each by itself
        pytest.param({"fast_dev_run": 3}, marks=pytest.mark.slow),
        pytest.param({"overfit_batches": 2}, marks=pytest.mark.slow),
        pytest.param({"logger": False, "num_sanity_val_steps": 0}, marks=pytest.mark.slow),
        pytest.param({"max_steps": 3}, marks=pytest.mark.slow),
        pytest.param({"detect_anomaly": True}, marks=pytest.mark.slow),
        pytest.param({"inference_mode": False}, marks=pytest.mark.slow),
    ],
    ids=lambda mode: ",".join(f"{k}={v}" for k, v in mode.items()),
)
def test_modes_of_the_trainer(runs, assert_equal, mode):
    assert_equal(*runs(settings=NOISY, **mode))
