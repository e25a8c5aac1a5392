"""Rows of all ranks come in rank order, with exactly the gradient that one process has, and nobody is left waiting."""

from __future__ import annotations

import pytest
import torch

from lightning_methods.core.gather import all_sum, gather_rows, gather_sizes, local_rows, rank, world_size
from tests.core import gather_jobs
from tests.support.processes import run_ranks


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks("tests.core.gather_jobs:on_every_rank", request.param, folder, timeout=90)


@pytest.mark.timeout(120)
def test_each_rank_knows_its_place(ranks):
    assert [found["rank"] for found in ranks] == list(range(len(ranks)))
    assert {found["world size"] for found in ranks} == {len(ranks)}
    assert {float(found["sum"]) for found in ranks} == {len(ranks) * (len(ranks) + 1) / 2}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", gather_jobs.SIZES)
def test_rows_in_rank_order_and_the_gradient_of_one_process(ranks, case):
    sizes = gather_jobs.SIZES[case][: len(ranks)]
    x = gather_jobs.joined(sizes).requires_grad_()
    gather_jobs.pairwise(x, slice(None)).backward()
    start = 0
    for found, size in zip(ranks, sizes, strict=True):
        assert torch.equal(found[case]["rows"], x.detach())
        assert found[case]["labels"].tolist() == [i for n in sizes for i in range(n)]
        torch.testing.assert_close(found[case]["gradient"], x.grad[start : start + size], rtol=1e-12, atol=1e-12)
        start += size


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", gather_jobs.MISFITS)
def test_rows_that_do_not_fit_are_refused_on_every_rank(ranks, case):
    for found in ranks:
        assert "different widths" in found[case]


def test_alone_nothing_is_done():
    x = torch.ones(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather_rows(x) is x
    assert gather_sizes(3, x.device) == [3]
    assert local_rows([3]) == slice(0, 3)
    total = all_sum(x)
    assert torch.equal(total, x)
    assert not total.requires_grad
