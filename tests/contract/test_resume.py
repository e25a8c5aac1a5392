"""A training that is interrupted and resumed ends where the uninterrupted one does, and its checkpoint loads safely."""

from __future__ import annotations

import pytest
import torch

from tests.contract.training import build, train
from tests.support.training import At, ResumableLoader, assert_identical, same_state

EPOCHS = 3
STEPS = 5  # per epoch


@pytest.mark.case("resume")
@pytest.mark.parametrize("when", [1, STEPS + 2, 2 * STEPS, "epoch end"])
def test_resumed_equals_uninterrupted(recipe, tmp_path, when):
    saved = tmp_path / "saved.ckpt"

    def save():
        return [At(when, lambda trainer, _: trainer.save_checkpoint(saved))]

    whole = train(recipe, tmp_path, after=save, data=ResumableLoader(kind=recipe.samples), max_epochs=EPOCHS)
    resumed = train(recipe, tmp_path, data=ResumableLoader(kind=recipe.samples), max_epochs=EPOCHS, ckpt_path=saved)
    assert whole.trainer.global_step == resumed.trainer.global_step == EPOCHS * STEPS
    assert_identical(whole.module, resumed.module)
    ours = slice(0, len(recipe.callbacks()))
    states = [[callback.state_dict() for callback in run.trainer.callbacks[ours]] for run in (whole, resumed)]
    assert same_state(*states)


@pytest.mark.case("resume")
def test_checkpoints_load_without_pickle_and_without_the_method(recipe, tmp_path):
    saved = tmp_path / "saved.ckpt"
    train(recipe, tmp_path, after=lambda: [At(STEPS, lambda trainer, _: trainer.save_checkpoint(saved))])
    checkpoint = torch.load(saved, weights_only=True)
    stateful = [callback.state_key for callback in recipe.callbacks() if callback.state_dict()]
    assert set(stateful) <= set(checkpoint["callbacks"])
    assert set(checkpoint["state_dict"]) == set(build(recipe).state_dict())
    resumed = train(recipe, tmp_path, reference=recipe.reference is not None, ckpt_path=saved)
    assert resumed.trainer.global_step == 2 * STEPS
