"""The ledger: claims are disjoint, leases end, late results are fenced off, nothing is lost to kill -9."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from lightning_methods import Study
from lightning_methods.reproducibility.design import cells, derive_seed
from lightning_methods.reproducibility.ledger import Ledger
from tests.reproducibility import pipelines


def rows(count: int) -> list[dict[str, object]]:
    return [{"run_id": f"r{i}", "pipeline": "A", "pipeline_hash": "h", "seeds": {"init": i}} for i in range(count)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "ledger.sqlite")
    found.add(rows(5))
    return found


def test_adding_again_adds_nothing(ledger):
    assert ledger.add(rows(7)) == 2
    assert ledger.add(rows(7)) == 0
    assert ledger.counts([f"r{i}" for i in range(7)]) == {"pending": 7}


def test_claims_follow_the_order_asked_for_and_are_disjoint(ledger):
    wanted = ["r3", "r1", "r0"]
    assert [ledger.claim(wanted, owner=o).run_id for o in "abc"] == wanted
    assert ledger.claim(wanted, owner="d") is None
    assert ledger.counts(wanted) == {"running": 3}


def test_a_lease_that_ends_is_taken_over_and_the_late_result_is_fenced_off(ledger):
    first = ledger.claim(["r0"], owner="a", lease=0.05)
    assert ledger.claim(["r0"], owner="b") is None
    time.sleep(0.1)
    second = ledger.claim(["r0"], owner="b", lease=60)
    assert (first.attempt, second.attempt) == (1, 2)
    # the first driver was only slow
    assert ledger.extend({"r0": first.attempt}) == {"r0"}
    assert not ledger.finish("r0", first.attempt, {"metrics": {"x": 1.0}})
    assert ledger.finish("r0", second.attempt, {"metrics": {"x": 2.0}})
    assert ledger.runs(["r0"])["r0"].metrics == {"x": 2.0}
    assert not ledger.finish("r0", second.attempt, {"metrics": {"x": 3.0}})


def test_extending_keeps_a_lease(ledger):
    run = ledger.claim(["r0"], owner="a", lease=0.2)
    for _ in range(4):
        time.sleep(0.1)
        assert ledger.extend({"r0": run.attempt}, lease=0.2) == set()
    assert ledger.claim(["r0"], owner="b") is None


def test_failures_are_retried_then_kept(ledger):
    for attempt in (1, 2):
        run = ledger.claim(["r0"], owner="a")
        assert run.attempt == attempt
        ledger.finish("r0", run.attempt, {"error": "no", "log": "log.txt"}, retries=1)
    found = ledger.runs(["r0"])["r0"]
    assert (found.status, found.failures, found.error, found.log) == ("failed", 2, "no", "log.txt")
    assert ledger.claim(["r0"], owner="a") is None
    assert ledger.retry_failed(["r0"]) == 1
    assert ledger.claim(["r0"], owner="a").attempt == 3


def test_giving_back(ledger):
    run = ledger.claim(["r0"], owner="a")
    ledger.release({"r0": run.attempt})
    assert ledger.claim(["r0"], owner="b").attempt == 2


def _claim_all(path: str, name: str, queue: multiprocessing.Queue) -> None:
    ledger, mine = Ledger(path), []
    while (run := ledger.claim([f"r{i}" for i in range(60)], owner=name)) is not None:
        mine.append(run.run_id)
        ledger.finish(run.run_id, run.attempt, {"metrics": {"x": 1.0}})
    queue.put(mine)


def test_processes_claim_disjoint_runs(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add(rows(60))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_claim_all, args=(str(ledger.path), n, queue)) for n in "abc"]
    for process in processes:
        process.start()
    claimed = [run for _ in processes for run in queue.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(claimed) == sorted(f"r{i}" for i in range(60))


# -- design ------------------------------------------------------------------------------------------------------------


def test_seeds_do_not_depend_on_the_number_of_replicates_and_are_not_neighbours():
    few, many = (
        cells(vary=["init", "order"], design="all", replicates=n, root_seed=1, check_repeat=False) for n in (3, 30)
    )
    assert many[:3] == few
    orders = [c.seeds["order"] for c in many]
    assert len(set(orders)) == 30
    assert min(abs(a - b) for i, a in enumerate(orders) for b in orders[:i]) > 30
    assert len({c.seeds["dropout"] for c in many}) == 1  # not varied
    assert all(0 <= s < 2**31 for c in many for s in c.seeds.values())
    assert derive_seed(1, "init", 0) != derive_seed(2, "init", 0)


def test_one_at_a_time_and_sobol():
    alone = cells(vary=["init", "order"], design="one_at_a_time", replicates=2, root_seed=0, check_repeat=False)
    assert [c.part for c in alone] == ["init", "order", "init", "order"]
    assert alone[0].seeds["order"] == alone[2].seeds["order"] == alone[0].seeds["order"]
    assert alone[0].seeds["init"] != alone[2].seeds["init"]
    rows = {c.part: c.seeds for c in cells(vary=["init", "order"], design="sobol", replicates=1, root_seed=0)}
    assert rows["AB:init"]["init"] == rows["B"]["init"]
    assert rows["AB:init"]["order"] == rows["A"]["order"]
    everything = cells(vary=["init", "order"], design="all", replicates=1, root_seed=0)
    assert everything[0].seeds == rows["A"]  # its runs are shared
    assert rows["repeat"] == rows["A"]


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def driver(folder: Path, function: object = pipelines.counted, lease: float = 0.5) -> int:
    """Start a process that drives a study, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        study(folder, function, lease).run()
        os._exit(0)
    finally:
        os._exit(1)


def study(folder: Path, function: object = pipelines.counted, lease: float = 0.5) -> Study:
    engine = {"workers": 2, "lease": lease, "process": "reuse"}
    found = Study("k", metric="x", vary=["init"], replicates=30, folder=folder, check_repeat=False, engine=engine)
    return found.add("A", function)


def test_kill_nine_at_any_moment_loses_nothing_and_repeats_only_what_was_in_flight(tmp_path, monkeypatch):
    counter = tmp_path / "counter"
    monkeypatch.setenv("STUDY_COUNTER", str(counter))
    rng, folder = random.Random(0), tmp_path / "study"
    kills = 0
    for _ in range(20):
        pid = driver(folder)
        time.sleep(rng.uniform(0.02, 0.35))
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    assert kills >= 3
    found = study(folder).run()  # to the end
    runs = study(folder).ledger.runs()
    assert {r.status for r in runs.values()} == {"done"}
    assert len(runs) == 30
    # at most the two in flight at each kill were begun again, and none that was committed
    assert sum(r.attempt - 1 for r in runs.values()) <= 2 * kills
    done = counter.read_text().split()
    assert len(done) <= 30 + 2 * kills
    assert set(done) == {str(r.seeds["init"]) for r in runs.values()}
    monkeypatch.setenv("STUDY_COUNTER", str(tmp_path / "other"))
    assert found.scores == study(tmp_path / "whole").run().scores  # bit for bit


def test_two_drivers_never_make_the_same_run(tmp_path, monkeypatch):
    counter = tmp_path / "counter"
    monkeypatch.setenv("STUDY_COUNTER", str(counter))
    study(tmp_path / "study").enter()
    for pid in [driver(tmp_path / "study", lease=60) for _ in range(3)]:
        assert os.waitpid(pid, 0)[1] == 0
    assert len(counter.read_text().split()) == 30
    assert {r.attempt for r in study(tmp_path / "study").ledger.runs().values()} == {1}


def test_the_runs_of_a_killed_driver_end_with_it(tmp_path):
    pid = driver(tmp_path / "study", pipelines.hanging)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "study/runs").glob("*/log.txt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while any(Path(f"/proc/{c}").exists() for c in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{c}").exists() for c in children)
