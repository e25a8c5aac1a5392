"""Two processes train as one does, whatever a phase leaves unused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lit import jobs
from tests.lit.conftest import fit, loader
from tests.support.processes import run_ranks
from tests.support.training import same_state


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks("tests.lit.jobs:distributed", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", jobs.CASES)
def test_two_processes_equal_one(case, ranks, tmp_path):
    module = jobs.made(case)
    fit(module, tmp_path, data=loader(batch=16), limit_val_batches=0, max_epochs=3)
    for rank in ranks:
        assert same_state(rank[case], dict(module.state_dict()), 1e-5)
