"""Under DDP with two processes too, varying one source changes that source alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reproducibility.jobs import VARIED
from tests.reproducibility.test_streams import CONTENT, FOLLOWS
from tests.reproducibility.training import SIZE
from tests.support.processes import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    # LightningCLI leaves a seed, by which DDP seeds everything again; the streams are not to notice
    variables = {"PL_GLOBAL_SEED": "3"}
    return run_ranks("tests.reproducibility.jobs:distributed", 2, tmp_path_factory.mktemp("ranks"), **variables)


def _changed(rank: Any, one: str, other: str) -> set[str]:
    return {name for name in rank[one] if rank[one][name] != rank[other].get(name)}


@pytest.mark.timeout(200)
def test_the_same_seeds_give_the_same_training(ranks):
    for rank in ranks:
        assert _changed(rank, "base", "again") == set()
        assert rank["workers"]["final"] == rank["base"]["final"]
    assert ranks[0]["base"]["final"] == ranks[1]["base"]["final"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("source", VARIED)
def test_one_source_changes_alone(ranks, source):
    for rank in ranks:
        assert _changed(rank, "base", source) == {source} | FOLLOWS[source]


@pytest.mark.timeout(200)
def test_ranks_draw_noise_of_their_own(ranks):
    first, second = (rank["base"] for rank in ranks)
    assert {"augment", "dropout", "evaluation", "order"} <= {k for k in first if first[k] != second[k]}
    assert all(first[k] == second[k] for k in ("init", "split", "final"))


@pytest.mark.timeout(200)
def test_ranks_share_the_rows_of_an_epoch_and_epochs_differ(ranks):
    for epoch in range(2):
        assert sorted(ranks[0]["rows"][epoch] + ranks[1]["rows"][epoch]) == list(range(SIZE))
    assert ranks[0]["rows"][0] != ranks[0]["rows"][1]


@pytest.mark.timeout(200)
def test_a_sampler_that_lightning_wraps_is_reached(ranks):
    for rank in ranks:
        assert _changed(rank, "weighted 0", "weighted 1") == {"order"} | CONTENT
