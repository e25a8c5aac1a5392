"""Run a function in several gloo processes, or in one fresh interpreter, and bring home what it returns."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_ranks(function: str, world_size: int, folder: Path, *, timeout: float = 240, **variables: str) -> list[Any]:
    """Return what `module:function` returned on each rank, in rank order; a rank that fails or hangs is an error.

    The function is called without arguments in fresh interpreters, with `variables` in their environment and for more
    than one process those of `torchrun`. It may return whatever `torch.load(weights_only=True)` reads.
    """
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    together = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "NODE_RANK": "0", "GROUP_RANK": "0"}
    folder.mkdir(parents=True, exist_ok=True)
    processes, logs = [], []
    for rank in range(world_size):
        logs.append(folder / f"rank{rank}.log")
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", "tests.support.processes", function, str(folder / f"rank{rank}.pt")]
            own = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            processes.append(
                subprocess.Popen(command, env=environment | own, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [-1]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size, "\n".join(f"-- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    torch.save(getattr(importlib.import_module(module), name)(), sys.argv[2])
