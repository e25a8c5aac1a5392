"""Speed of the statistics beside rliable, and of the study engine beside one command-line process a run.

    python benchmarks/reproducibility.py --markdown benchmarks/results/reproducibility_cpu.md
    python benchmarks/reproducibility.py --rliable /path/to/python      an interpreter that has rliable

rliable needs an environment of its own (`pip install rliable "pandas<3"`); without one its row is left out. All engines
must give the same accuracies bit for bit. Limits are reported as ok or missed; nothing fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import TIMING_COLUMNS, Table, compare, environment, gate, timing_of, timing_rows, write_markdown

from lightning_methods import Study
from lightning_methods.reproducibility import stratified_bootstrap, verdict
from lightning_methods.reproducibility.functional import bootstrap_unpaired

ROOT = Path(__file__).parents[1]
RUNS, TASKS, REPETITIONS = 20, 3, 2000

PEER = """
import json, sys, time
import numpy as np
from rliable import library, metrics
data = json.loads(sys.stdin.read())
x, y = np.array(data["x"]), np.array(data["y"])
found = {"poi": [], "iqm": []}
for _ in range(data["rounds"]):
    start = time.perf_counter()
    library.get_interval_estimates({"a": (x, y)}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]),
                                   reps=data["repetitions"])
    found["poi"].append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    library.get_interval_estimates({"a": x}, lambda a: np.array([metrics.aggregate_iqm(a)]), reps=data["repetitions"])
    found["iqm"].append(1e3 * (time.perf_counter() - start))
print(json.dumps(found))
"""


def statistics_table(peer: str | None, rounds: int, gates: Table) -> Table:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, (RUNS, TASKS)), rng.normal(0, 1, (RUNS, TASKS))
    work: dict[str, Any] = {
        "P(A>B), ours": lambda: bootstrap_unpaired(x, y, resamples=REPETITIONS),
        "interquartile mean, ours": lambda: stratified_bootstrap(x, resamples=REPETITIONS),
        "paired verdict of 29, ours (exact, no repetitions)": lambda: verdict(x[:, 0], y[:, 0]),
    }
    timings = compare(work, rounds=rounds)
    if peer is not None:
        given = json.dumps({"x": x.tolist(), "y": y.tolist(), "rounds": 3, "repetitions": REPETITIONS})
        done = subprocess.run([peer, "-c", PEER], input=given, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"rliable failed in {peer}:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        timings["P(A>B), rliable"] = timing_of(found["poi"])
        timings["interquartile mean, rliable"] = timing_of(found["iqm"])
        ratio = timings["P(A>B), rliable"].median / timings["P(A>B), ours"].median
        gates.rows.append(["P(A>B): rliable / ours, at least", f"{ratio:.0f}", "50", gate(-ratio, -50)])
    title = f"Bootstrap, {REPETITIONS:,} repetitions of {RUNS} runs x {TASKS} tasks"
    table = Table(
        title, ["", *TIMING_COLUMNS], note="rliable runs in a process of its own; its time is without imports."
    )
    table.rows = [[name, *row] for name, row in timing_rows(timings).items()]
    return table


def engine_table(replicates: int, workers: int, gates: Table) -> Table:
    configuration = ROOT / "configs" / "reproducibility" / "digits.yaml"
    minutes: dict[str, float] = {}
    scores: dict[str, Any] = {}
    for process in ("one CLI process a run", "spawn", "fork", "reuse"):
        folder = Path(tempfile.mkdtemp())
        text = (
            f"study: {{name: speed, metric: val/accuracy, folder: {folder}/study}}\n"
            f"pipelines: {{A: {{config: {configuration}, overrides: {{trainer.max_epochs: 3}}}}}}\n"
            f"sources: {{replicates: {replicates}, check_repeat: false}}\n"
            f"engine: {{workers: {workers}, process: {'fork' if process.startswith('one') else process}}}\n"
        )
        (folder / "study.yaml").write_text(text, encoding="utf-8")
        study = Study.from_yaml(folder / "study.yaml")
        study.enter()  # what is read once is not timed, nor is this process's own import
        start = time.perf_counter()
        if process.startswith("one"):
            for run in study.enter():
                command = [sys.executable, "-m", "lightning_methods", "study", "run", str(study.file), "--only", run]
                subprocess.run(command, check=True, capture_output=True)
            scores[process] = study.analyse().scores
        else:
            scores[process] = study.run().scores
        minutes[process] = (time.perf_counter() - start) / 60
        shutil.rmtree(folder)
    slowest = minutes["one CLI process a run"]
    same = all(found == scores["fork"] for found in scores.values())
    table = Table(
        f"Study engine, digits, {replicates} runs of 3 epochs, {workers} at once (the CLI processes one by one)",
        ["", "runs a minute", "times as many"],
        note=f"Accuracies of all engines are {'the same bit for bit' if same else 'NOT THE SAME'}.",
    )
    table.rows = [[k, f"{replicates / v:.1f}", f"{slowest / v:.1f}"] for k, v in minutes.items()]
    for process in ("fork", "reuse"):
        ratio = slowest / minutes[process]
        gates.rows.append([f"runs a minute, {process} / CLI, at least", f"{ratio:.1f}", "3", gate(-ratio, -3)])
    gates.rows.append(["accuracies of all engines the same", str(same), "True", "ok" if same else "missed"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rliable", metavar="PYTHON", help="interpreter of an environment with rliable")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    gates = Table("Limits", ["", "measured", "limit", ""])
    tables = [statistics_table(args.rliable, args.rounds, gates), engine_table(args.replicates, args.workers, gates)]
    tables.append(gates)
    for table in tables:
        table.show()
    if args.markdown:
        about = ["Reproducible studies: statistics and engine. Again with:", "", "```bash"]
        about += ["python benchmarks/reproducibility.py --rliable PYTHON", "```", ""]
        about += ["The machine was shared with other work: ratios count, not times.", ""]
        about += environment("cpu", ["numpy", "scipy", "torch", "lightning"])
        write_markdown(args.markdown, "Reproducible studies: speed", about, tables)


if __name__ == "__main__":
    main()
