"""One run, in whatever process: the seeds go in, metrics and fingerprints come out, every failure with its log."""

from __future__ import annotations

import json
import math
import numbers
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_methods.errors import InvalidArgument, did_you_mean
from lightning_methods.reproducibility.pipelines import Prepared, prepare

# what Lightning leaves in the environment; a run must not inherit it from another
LEAKS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def execute(task: Mapping[str, Any], prepared: Prepared | None = None) -> dict[str, Any]:
    """Do one run and return its outcome, also if it fails.

    Args:
        task: `pipeline`, `seeds`, `settings`, `folder` of the run, as plain values.
        prepared: the pipeline, where it was already read.

    Returns:
        `metrics`, `fingerprints`, `seconds` and `environment`, or `error` in one line; the traceback goes to stderr.
    """
    start = time.perf_counter()
    log = str(Path(task["folder"]) / "log.txt")
    try:
        for name in LEAKS:
            os.environ.pop(name, None)
        _set_threads(int(task["settings"].get("threads", 1)))
        Path(task["folder"]).mkdir(parents=True, exist_ok=True)
        run = prepared if prepared is not None else prepare(task["pipeline"], task["settings"])
        outcome = run(task)
        metrics = checked_metrics(outcome["metrics"], str(task["settings"]["metric"]))
        if outcome.get("per_example") is not None:
            _save_examples(outcome["per_example"], Path(task["folder"]))
        return {
            "metrics": metrics,
            "fingerprints": outcome.get("fingerprints"),
            "seconds": time.perf_counter() - start,
            "environment": environment(),
            "log": log,
        }
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        traceback.print_exc()
        return {
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            "seconds": time.perf_counter() - start,
            "environment": environment(),
            "log": log,
        }


def checked_metrics(found: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return scores as plain numbers; the studied one must be there and finite.

    Args:
        found: what the run gave.
        metric: the studied one.

    Raises:
        InvalidArgument: naming the scores that are there.

    Example:
        >>> checked_metrics({"accuracy": 1}, "accuracy")
        {'accuracy': 1.0}
    """
    values: dict[str, float] = {}
    for name, value in found.items():
        number = value.item() if hasattr(value, "item") and np.size(value) == 1 else value
        if isinstance(number, numbers.Real):
            values[str(name)] = float(number)
    if metric not in values:
        raise InvalidArgument(f"The run gave no metric {metric!r}. {did_you_mean(metric, values)}")
    if not math.isfinite(values[metric]):
        raise InvalidArgument(f"The metric {metric!r} is {values[metric]}: this run cannot be compared.")
    return {name: value for name, value in values.items() if math.isfinite(value)}


def environment() -> dict[str, str]:
    """Return what the numbers may depend on: versions, processor, device and the threads of a run."""
    import torch

    modules = {name: sys.modules.get(name) for name in ("numpy", "torch", "lightning", "torchvision")}
    versions = {name: str(getattr(m, "__version__", "")) for name, m in modules.items() if m is not None}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    flags = {
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "threads": str(torch.get_num_threads()),
    }
    return {"python": platform.python_version(), **versions, "machine": platform.machine(), "device": device, **flags}


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _save_examples(values: Any, folder: Path) -> None:
    bits = np.asarray(values)
    if bits.ndim != 1 or not np.isin(bits, (0, 1)).all():
        raise InvalidArgument("per_example must hold one 0 or 1 for every test example.")
    np.savez(folder / "per_example.npz", bits=np.packbits(bits.astype(bool)), size=len(bits))


def load_examples(folder: str | Path) -> np.ndarray | None:
    """Return which test examples a run had right, None where it did not say."""
    file = Path(folder) / "per_example.npz"
    if not file.is_file():
        return None
    with np.load(file) as stored:
        return np.unpackbits(stored["bits"], count=int(stored["size"])).astype(bool)


def main(argv: list[str]) -> int:
    """Run the task in a JSON file and write the outcome beside it: `python -m ...worker task.json outcome.json`."""
    task = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    write_outcome(Path(argv[1]), execute(task))
    return 0


def write_outcome(path: Path, outcome: Mapping[str, Any]) -> None:
    """Write an outcome so that it is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
