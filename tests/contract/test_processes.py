"""Two processes train as one does on the joined batches, and the other Lightning's Trainer runs every callback."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_methods import errors
from tests.contract import jobs
from tests.contract.recipes import Recipe
from tests.contract.training import TOLERANCE
from tests.support.processes import run_ranks
from tests.support.training import same_state

SUMMED = 1e-5  # sums over ranks are taken in another order


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks("tests.contract.jobs:distributed", jobs.RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("foreign")
    return run_ranks("tests.contract.jobs:foreign", 1, folder, LIGHTNING_FAMILY="pytorch_lightning")[0]


def raised(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a job, or raise the error that it met."""
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return outcome


@pytest.mark.case("ddp")
@pytest.mark.timeout(280)
@pytest.mark.parametrize("batches", jobs.SAMPLES)
def test_two_processes_equal_one_on_the_joined_batch(recipe: Recipe, batches, ranks, tmp_path):
    outcomes = [raised(rank[f"{recipe.name} {batches}"]) for rank in ranks]
    run = jobs.single(recipe, tmp_path, jobs.SAMPLES[batches])
    alone = dict(run.module.state_dict())
    for together in outcomes:
        assert same_state(together["module"], alone, SUMMED)
        if not recipe.local:
            states = [callback.state_dict() for callback in run.trainer.callbacks[: len(recipe.callbacks())]]
            assert same_state(together["states"], states, SUMMED)
            shown = jobs.shown_by(run)
            assert {key: together["shown"][key] for key in recipe.scalars} == pytest.approx(
                {key: shown[key] for key in recipe.scalars}, rel=SUMMED
            )


@pytest.mark.case("foreign")
@pytest.mark.timeout(280)
def test_the_trainer_of_the_other_lightning(recipe: Recipe, foreign, record_property):
    outcome = raised(foreign[recipe.name])
    assert outcome["trainer"].startswith("pytorch_lightning.")
    record_property("difference", outcome["difference"])
    assert outcome["difference"] <= (0.0 if recipe.probe else TOLERANCE)
