"""The ledger of runs: one SQLite file (write-ahead log) with leases, so that no run is lost or made twice.

A run is claimed in one transaction, for a time that its driver keeps extending; if that driver dies, the lease ends and
the run can be claimed again. Results are committed together with the status and only for the attempt that holds the
run, so that a driver that was taken for dead cannot overwrite what came after it.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, pipeline TEXT NOT NULL, pipeline_hash TEXT NOT NULL, seeds TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending', attempt INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
    lease_until REAL, owner TEXT, host TEXT, pid INTEGER, started REAL, ended REAL, seconds REAL,
    metrics TEXT, fingerprints TEXT, environment TEXT, error TEXT, log TEXT
);
CREATE TABLE IF NOT EXISTS pipelines (
    pipeline_hash TEXT PRIMARY KEY, name TEXT NOT NULL, description TEXT NOT NULL, added REAL NOT NULL
);
"""
_PATIENCE = 100
_JSON = ("seeds", "metrics", "fingerprints", "environment")


@dataclass(frozen=True)
class Run:
    """A row of the ledger."""

    run_id: str
    pipeline: str
    pipeline_hash: str
    seeds: dict[str, int]
    status: str
    attempt: int
    failures: int
    lease_until: float | None
    owner: str | None
    host: str | None
    pid: int | None
    started: float | None
    ended: float | None
    seconds: float | None
    metrics: dict[str, float] | None
    fingerprints: dict[str, str] | None
    environment: dict[str, str] | None
    error: str | None
    log: str | None


class Ledger:
    """The runs of one study folder, safe under several processes and against kill -9.

    The file must lie on a local disk: SQLite's locks are unreliable on network file systems. Engines that compute on
    other hosts keep the ledger on the host that drives them.

    Args:
        path: of the SQLite file; made if it is missing.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(tempfile.mkdtemp() + "/ledger.sqlite")
        >>> ledger.add([{"run_id": "a", "pipeline": "A", "pipeline_hash": "h", "seeds": {"init": 1}}])
        1
        >>> ledger.claim(["a"], owner="me").attempt, ledger.claim(["a"], owner="you")
        (1, None)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_PATIENCE):  # where several processes make the file at once, all but one find it locked
            try:
                with self._connection() as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(_SCHEMA)
                return
            except sqlite3.OperationalError:
                if attempt == _PATIENCE - 1:
                    raise
                time.sleep(0.05)

    def add(self, runs: Sequence[Mapping[str, Any]]) -> int:
        """Add runs that are not there yet, and return how many were new.

        Args:
            runs: mappings with run_id, pipeline, pipeline_hash and seeds.
        """
        rows = [(r["run_id"], r["pipeline"], r["pipeline_hash"], json.dumps(r["seeds"])) for r in runs]
        with self._transaction() as connection:
            before = connection.total_changes
            connection.executemany(
                "INSERT OR IGNORE INTO runs (run_id, pipeline, pipeline_hash, seeds) VALUES (?, ?, ?, ?)", rows
            )
            return connection.total_changes - before

    def describe(self, pipelines: Mapping[str, tuple[str, str]]) -> None:
        """Remember what each pipeline is: hash -> (name, configuration or source)."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO pipelines VALUES (?, ?, ?, ?)",
                [(key, name, text, time.time()) for key, (name, text) in pipelines.items()],
            )

    def descriptions(self) -> dict[str, tuple[str, str]]:
        """Return hash -> (name, configuration or source) of all pipelines that ever were in the study."""
        with self._connection() as connection:
            return {key: (name, text) for key, name, text, _ in connection.execute("SELECT * FROM pipelines")}

    def claim(self, wanted: Sequence[str], *, owner: str, lease: float = 60.0) -> Run | None:
        """Take the first of the wanted runs that is pending, or whose lease has ended; None where there is none.

        Args:
            wanted: run ids in the order of preference.
            owner: who takes it.
            lease: seconds after which others may take it, unless extended.
        """
        now = time.time()
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT run_id FROM runs JOIN json_each(?) AS wanted ON wanted.value = run_id"
                " WHERE status = 'pending' OR (status = 'running' AND lease_until < ?) ORDER BY wanted.key LIMIT 1",
                (json.dumps(list(wanted)), now),
            ).fetchone()
            if row is None:
                return None
            connection.execute(
                "UPDATE runs SET status = 'running', attempt = attempt + 1, owner = ?, lease_until = ?, started = ?,"
                " ended = NULL, host = ?, pid = ?, error = NULL WHERE run_id = ?",
                (owner, now + lease, now, socket.gethostname(), os.getpid(), row[0]),
            )
            return _run(connection.execute("SELECT * FROM runs WHERE run_id = ?", row).fetchone())

    def extend(self, held: Mapping[str, int], *, lease: float = 60.0) -> set[str]:
        """Extend the leases of runs (id -> attempt), and return those that are no longer ours."""
        lost = set()
        with self._transaction() as connection:
            for run_id, attempt in held.items():
                done = connection.execute(
                    "UPDATE runs SET lease_until = ? WHERE run_id = ? AND attempt = ? AND status = 'running'",
                    (time.time() + lease, run_id, attempt),
                )
                if done.rowcount == 0:
                    lost.add(run_id)
        return lost

    def finish(self, run_id: str, attempt: int, outcome: Mapping[str, Any], *, retries: int = 0) -> bool:
        """Commit what became of a run; False if another attempt holds it, and then nothing is written.

        Args:
            run_id: of the run.
            attempt: that was claimed.
            outcome: `metrics`, `fingerprints`, `seconds`, `environment`, `log`, or `error` for a failure.
            retries: after so many failures and one more the run is `failed`, before that pending again.
        """
        failed = outcome.get("error") is not None
        with self._transaction() as connection:
            done = connection.execute(
                "UPDATE runs SET status = CASE WHEN ? THEN CASE WHEN failures < ? THEN 'pending' ELSE 'failed' END"
                " ELSE 'done' END, failures = failures + ?, lease_until = NULL, ended = ?, seconds = ?, metrics = ?,"
                " fingerprints = ?, environment = ?, error = ?, log = ?"
                " WHERE run_id = ? AND attempt = ? AND status = 'running'",
                (
                    failed,
                    retries,
                    int(failed),
                    time.time(),
                    outcome.get("seconds"),
                    *(json.dumps(outcome.get(k)) for k in ("metrics", "fingerprints", "environment")),
                    outcome.get("error"),
                    outcome.get("log"),
                    run_id,
                    attempt,
                ),
            )
            return done.rowcount == 1

    def release(self, held: Mapping[str, int]) -> None:
        """Give runs (id -> attempt) back that were claimed and not finished."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE runs SET status = 'pending', lease_until = NULL"
                " WHERE run_id = ? AND attempt = ? AND status = 'running'",
                list(held.items()),
            )

    def retry_failed(self, wanted: Sequence[str]) -> int:
        """Make failed runs pending again, and return how many there were."""
        with self._transaction() as connection:
            done = connection.execute(
                "UPDATE runs SET status = 'pending', failures = 0 WHERE status = 'failed'"
                " AND run_id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(wanted)),),
            )
            return done.rowcount

    def runs(self, wanted: Sequence[str] | None = None) -> dict[str, Run]:
        """Return the rows by run id, all or those wanted; a study that runs is not disturbed."""
        with self._connection() as connection:
            found = {row["run_id"]: _run(row) for row in connection.execute("SELECT * FROM runs")}
        return found if wanted is None else {i: found[i] for i in wanted if i in found}

    def counts(self, wanted: Sequence[str]) -> dict[str, int]:
        """Return how many of the wanted runs have each status."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT status, COUNT(*) FROM runs WHERE run_id IN (SELECT value FROM json_each(?)) GROUP BY status",
                (json.dumps(list(wanted)),),
            )
            return {status: int(count) for status, count in rows}

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # one connection an operation: none is open when a run is forked
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            # a commit survives the end of the process, however it ends; a power cut may undo the last ones
            connection.execute("PRAGMA synchronous = NORMAL")
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    for key in _JSON:
        values[key] = json.loads(values[key]) if values[key] else None
    return Run(**values)
