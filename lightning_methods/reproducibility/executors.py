"""Where a run is computed: a process forked from this one, a reused one, a fresh interpreter, Slurm, or Ray.

Every executor starts a task, says later what became of it, and can stop it. The ledger stays with the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning_methods.errors import MissingDependency
from lightning_methods.reproducibility.pipelines import Prepared
from lightning_methods.reproducibility.worker import execute, write_outcome

Task = Mapping[str, Any]
Outcome = dict[str, Any]


class Executor(Protocol):
    """What the driver needs of a place to compute."""

    def start(self, task: Task) -> Any:
        """Begin a run and return a handle of it."""

    def poll(self, handle: Any) -> Outcome | None:
        """Return the outcome, or None while the run goes on."""

    def stop(self, handle: Any) -> None:
        """End a run that takes too long or is not wanted any more."""

    def close(self) -> None:
        """Let go of what the executor holds."""


def killed(code: int, task: Task) -> Outcome:
    """Return the outcome of a process that ended without one."""
    how = f"was killed by signal {-code}" if code < 0 else f"left with code {code}"
    return {"error": f"the process of the run {how}", "log": str(Path(task["folder"]) / "log.txt")}


class ForkExecutor:
    """A fresh process for every run, forked from this one, which has imported and read everything already.

    Args:
        prepared: pipeline name -> what runs it.
    """

    def __init__(self, prepared: Mapping[str, Prepared]) -> None:
        self.prepared = prepared

    def start(self, task: Task) -> tuple[int, Task, Path]:
        """Fork the process of a run."""
        outcome = _outcome_file(task)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid, task, outcome
        code = 1
        try:
            _become_a_run(task)
            write_outcome(outcome, execute(task, self.prepared[task["pipeline"]["name"]]))
            code = 0
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # neither destructors nor exit handlers of the driver's objects run here

    def poll(self, handle: tuple[int, Task, Path]) -> Outcome | None:
        """Return the outcome once the process has ended."""
        pid, task, file = handle
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        return _read_outcome(file, os.waitstatus_to_exitcode(status), task)

    def stop(self, handle: tuple[int, Task, Path]) -> None:
        """Kill the process with all that it started."""
        _kill_group(handle[0])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(handle[0], 0)

    def close(self) -> None:
        """There is nothing to let go of."""


class ReuseExecutor:
    """A few forked processes that do one run after the other: what the runs leave behind is theirs to bear.

    Args:
        prepared: pipeline name -> what runs it.
    """

    def __init__(self, prepared: Mapping[str, Prepared]) -> None:
        self.fork = ForkExecutor(prepared)
        self.idle: list[tuple[int, Any]] = []

    def start(self, task: Task) -> dict[str, Any]:
        """Give the run to an idle process, or to a new one."""
        file = _outcome_file(task)
        pid, pipe = self.idle.pop() if self.idle else self._worker()
        os.write(pipe, (json.dumps({**task, "outcome": str(file)}) + "\n").encode())
        return {"pid": pid, "pipe": pipe, "task": task, "file": file}

    def _worker(self) -> tuple[int, int]:
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(read)
            return pid, write
        try:
            os.close(write)
            _die_with_parent()
            for line in os.fdopen(read):
                task = json.loads(line)
                _log_to_file(task)
                write_outcome(Path(task["outcome"]), execute(task, self.fork.prepared[task["pipeline"]["name"]]))
        finally:
            os._exit(0)

    def poll(self, handle: dict[str, Any]) -> Outcome | None:
        """Return the outcome once its file is there; a process that died is not used again."""
        if handle["file"].is_file():
            self.idle.append((handle["pid"], handle["pipe"]))
            return _read_outcome(handle["file"], 0, handle["task"])
        done, status = os.waitpid(handle["pid"], os.WNOHANG)
        if not done:
            return None
        os.close(handle["pipe"])
        return _read_outcome(handle["file"], os.waitstatus_to_exitcode(status), handle["task"])

    def stop(self, handle: dict[str, Any]) -> None:
        """Kill the process of the run."""
        os.close(handle["pipe"])
        _kill_group(handle["pid"])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(handle["pid"], 0)

    def close(self) -> None:
        """End the idle processes."""
        for pid, pipe in self.idle:
            os.close(pipe)
            _kill_group(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.idle = []


class SpawnExecutor:
    """A fresh interpreter for every run, which imports all anew: for CUDA, and for what a fork cannot inherit."""

    def start(self, task: Task) -> tuple[subprocess.Popen[bytes], Task, Path]:
        """Start the interpreter."""
        outcome = _outcome_file(task)
        folder = Path(task["folder"])
        file = folder / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["settings"]["threads"])}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lightning_methods.reproducibility.worker", str(file), str(outcome)],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return process, task, outcome

    def poll(self, handle: tuple[subprocess.Popen[bytes], Task, Path]) -> Outcome | None:
        """Return the outcome once the interpreter has ended."""
        process, task, file = handle
        code = process.poll()
        return None if code is None else _read_outcome(file, code, task)

    def stop(self, handle: tuple[subprocess.Popen[bytes], Task, Path]) -> None:
        """Kill the interpreter with all that it started."""
        _kill_group(handle[0].pid)
        handle[0].wait()

    def close(self) -> None:
        """There is nothing to let go of."""


class SubmititExecutor:
    """Jobs of Slurm through submitit: one job a run, results come back through submitit's files.

    Args:
        folder: shared by all hosts, for submitit's files.
        cluster: `slurm`, or `local` to try it without one.
        parameters: of `submitit.AutoExecutor.update_parameters`, as `slurm_partition` or `timeout_min`.
    """

    def __init__(self, folder: Path, *, cluster: str = "slurm", parameters: Mapping[str, Any] | None = None) -> None:
        submitit = _installed("submitit", "engine.kind=slurm")
        self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self.executor.update_parameters(**{"timeout_min": 60, "name": "study", **(parameters or {})})

    def start(self, task: Task) -> tuple[Any, Task]:
        """Submit the job."""
        return self.executor.submit(execute, dict(task)), task

    def poll(self, handle: tuple[Any, Task]) -> Outcome | None:
        """Return the outcome once the job is done; a job that failed says why."""
        job = handle[0]
        if not job.done():
            return None
        try:
            return {**job.result(), "host": str(job.job_id)}
        except Exception as error:
            return {"error": f"job {job.job_id}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"}

    def stop(self, handle: tuple[Any, Task]) -> None:
        """Cancel the job."""
        handle[0].cancel(check=False)

    def close(self) -> None:
        """There is nothing to let go of."""


class RayExecutor:
    """Tasks of Ray, on this machine or on a cluster that is already started; only the driver opens the ledger.

    Args:
        workers: runs at once, where Ray is started here.
        address: of a running cluster, `auto` to find it; default: start one on this machine.
    """

    def __init__(self, workers: int, *, address: str | None = None) -> None:
        self.ray = _installed("ray", "engine.kind=ray")
        self.started = not self.ray.is_initialized()
        if self.started:
            paths = os.pathsep.join(p for p in sys.path if p)
            options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers}
            self.ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
                **options,
            )
        self.remote = self.ray.remote(max_retries=0)(execute)

    def start(self, task: Task) -> tuple[Any, Task]:
        """Give the run to Ray."""
        return self.remote.remote(dict(task)), task

    def poll(self, handle: tuple[Any, Task]) -> Outcome | None:
        """Return the outcome once Ray has it."""
        ready, _ = self.ray.wait([handle[0]], timeout=0)
        if not ready:
            return None
        try:
            outcome: Outcome = self.ray.get(handle[0])
        except Exception as error:
            return {"error": f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        return outcome

    def stop(self, handle: tuple[Any, Task]) -> None:
        """Cancel the task."""
        self.ray.cancel(handle[0], force=True)

    def close(self) -> None:
        """Stop Ray where it was started here."""
        if self.started:
            self.ray.shutdown()


def _installed(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"{what} needs the package {package!r}, which cannot be imported here ({error}). Install it with: "
            f"pip install {package}"
        ) from error


# -- the process of a run ----------------------------------------------------------------------------------------------


def _outcome_file(task: Task) -> Path:
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    # an attempt reads its own file only: a process that was given up may still write one
    return folder / f"outcome_{task['attempt']}.json"


def _read_outcome(file: Path, code: int, task: Task) -> Outcome:
    if not file.is_file():
        return killed(code, task)
    outcome: Outcome = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return outcome


def _become_a_run(task: Task) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    _log_to_file(task)


def _die_with_parent() -> None:
    """Ask the kernel to end this process when its driver ends, however that happens (Linux)."""
    if sys.platform.startswith("linux"):
        driver = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != driver:  # it ended in the meantime
            os._exit(1)


def _log_to_file(task: Task) -> None:
    file = os.open(Path(task["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    # streams that a notebook or a test put in place of the process's own would write into the driver's
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    print(time.strftime("-- %Y-%m-%d %H:%M:%S"), f"run {task['run_id']}, attempt {task['attempt']}")


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
