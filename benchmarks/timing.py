"""What the benchmarks of all methods share: fair timing, peak memory in fresh processes, and tables."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median, smallest, and the width of the middle half."""

    median: float
    smallest: float
    spread: float


@dataclass
class Table:
    """A titled table, for the terminal and for markdown."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    note: str = ""

    def show(self) -> None:
        """Print it."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*map(str, row))
        Console(width=None if sys.stdout.isatty() else 140).print(table)

    def markdown(self) -> str:
        """Return it as a markdown section."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines += ["|" + "---|" + "---:|" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def compare(
    candidates: Mapping[str, Callable[[], object]], *, device: str = "cpu", rounds: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Time candidates in turns, so that what else the machine does meets all of them alike.

    Args:
        candidates: name -> function without arguments.
        device: "cpu" or "cuda", whose queue is emptied before and after each call.
        rounds: how often each is timed.
        warmup: calls of each before that.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, rounds):
        for name, work in candidates.items():
            elapsed = timed(work, device)
            if turn >= 0:
                times[name].append(elapsed)
    return {name: timing_of(values) for name, values in times.items()}


def timed(work: Callable[[], object], device: str) -> float:
    """Return the milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def timing_of(milliseconds: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return Timing(median, min(milliseconds), high - low)


def timing_rows(timings: Mapping[str, Timing]) -> dict[str, list[str]]:
    """Return for each candidate the median, the smallest, the spread, and the median over that of the first."""
    first = next(iter(timings.values())).median
    return {
        name: [f"{t.median:.1f}", f"{t.smallest:.1f}", f"{t.spread:.1f}", f"{t.median / first:.2f}"]
        for name, t in timings.items()
    }


TIMING_COLUMNS = ("median ms", "min", "IQR", "ratio to first")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- memory ------------------------------------------------------------------------------------------------------------


def extra_memory(work: Callable[[], object], device: str) -> float:
    """Return by how many bytes `work` raises the peak memory of this process or, on CUDA, of the allocator.

    On a CPU the process must be a fresh one (`in_fresh_process`): memory that an earlier computation gave back to the
    allocator, but not to the system, would hide what this one takes.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _reset_peak()
    work()
    return _peak() - before


def in_fresh_process(script: str | Path, *arguments: object) -> Any:
    """Run `script` with the same interpreter and return its last line, which must be JSON."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _reset_peak() -> float:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024.0 * int(found[1])
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used) if sys.platform == "darwin" else 1024.0 * used


# -- gates and where it ran --------------------------------------------------------------------------------------------


def gate(value: float, limit: float) -> str:
    """Say whether a value keeps a limit; a benchmark reports, it never fails."""
    return "ok" if value <= limit else "missed"


def environment(device: str, packages: Sequence[str]) -> list[str]:
    """Return what a reader needs to judge the numbers, as markdown items."""
    from importlib.metadata import version

    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    lines = [f"- processor: {_cpu_name()}, {threads}"]
    if device == "cuda":
        lines.append(f"- device: {torch.cuda.get_device_name()}")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [*lines, f"- Python {platform.python_version()}, {versions}"]


def write_markdown(path: str | Path, title: str, about: Sequence[str], tables: Sequence[Table]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join([f"# {title}", "", *about, "", *(table.markdown() for table in tables)]))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
