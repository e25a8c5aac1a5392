"""The driver of a study: claims runs from the ledger, has them computed, extends leases, commits what came out."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_methods.reproducibility.executors import Executor
from lightning_methods.reproducibility.ledger import Ledger, Run

# seconds between two looks at the runs: short after one has ended, for those that take no time, then longer
_SHORT, _LONG = 0.001, 0.05


@dataclass(frozen=True)
class Progress:
    """How far a study is, told after every run.

    Attributes:
        done, failed, total: runs.
        run: the run that just ended.
        error: of it, None if it went well.
        seconds_left: estimate, None before the first run ended.
    """

    done: int
    failed: int
    total: int
    run: Run
    metrics: Mapping[str, float] | None
    error: str | None
    seconds_left: float | None


def drive(
    ledger: Ledger,
    wanted: Sequence[str],
    make_task: Callable[[Run], Mapping[str, Any]],
    executor: Executor,
    *,
    workers: int = 1,
    timeout: float | None = None,
    retries: int = 1,
    lease: float = 60.0,
    tell: Callable[[Progress], None] | None = None,
) -> dict[str, int]:
    """Have the wanted runs made, and return how many have each status.

    Runs that another driver holds are waited for, and taken over if that driver dies.

    Args:
        ledger: of the runs, which are in it already.
        wanted: run ids in the order in which to make them.
        make_task: from a claimed run to what the executor needs.
        executor: where they are computed.
        workers: runs at once.
        timeout: seconds after which a run is ended and counts as failed.
        retries: how often a failed run is tried again.
        lease: seconds for which a run is claimed; extended as long as this driver lives.
        tell: called after every run.
    """
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    running: dict[str, tuple[Run, Any, float]] = {}
    extended = start = time.monotonic()
    ended, pause = 0, _SHORT
    try:
        while True:
            while len(running) < workers and (run := ledger.claim(wanted, owner=owner, lease=lease)) is not None:
                running[run.run_id] = run, executor.start(make_task(run)), time.monotonic()
            if not running and not _others_at_work(ledger, wanted):
                return ledger.counts(wanted)
            for run, handle, since in list(running.values()):
                outcome = executor.poll(handle)
                if outcome is None and timeout is not None and time.monotonic() - since > timeout:
                    executor.stop(handle)
                    outcome = {"error": f"the run took longer than {timeout:g} s", "seconds": timeout}
                if outcome is None:
                    continue
                del running[run.run_id]
                pause = _SHORT
                ledger.finish(run.run_id, run.attempt, outcome, retries=retries)
                ended += 1
                if tell is not None:
                    rate = ended / (time.monotonic() - start)
                    tell(_progress(ledger, wanted, run, outcome, rate))
            if time.monotonic() - extended > lease / 3:
                extended = time.monotonic()
                for lost in ledger.extend({r.run_id: r.attempt for r, _, _ in running.values()}, lease=lease):
                    executor.stop(running.pop(lost)[1])  # this driver was taken for dead; another has the run
            time.sleep(pause if running else _LONG)
            pause = min(1.3 * pause, _LONG)
    finally:
        for _, handle, _ in running.values():
            executor.stop(handle)
        ledger.release({r.run_id: r.attempt for r, _, _ in running.values()})
        executor.close()


def _others_at_work(ledger: Ledger, wanted: Sequence[str]) -> bool:
    counts = ledger.counts(wanted)
    return bool(counts.get("running") or counts.get("pending"))


def _progress(ledger: Ledger, wanted: Sequence[str], run: Run, outcome: Mapping[str, Any], rate: float) -> Progress:
    counts = ledger.counts(wanted)
    done, failed = counts.get("done", 0), counts.get("failed", 0)
    left = len(wanted) - done - failed
    return Progress(
        done=done,
        failed=failed,
        total=len(wanted),
        run=run,
        metrics=outcome.get("metrics"),
        error=outcome.get("error"),
        seconds_left=left / rate if rate > 0 else None,
    )


def run_folder(folder: Path, run_id: str) -> Path:
    """Return where a run keeps its log and what else it writes."""
    return folder / "runs" / run_id
