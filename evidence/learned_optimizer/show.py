"""Print a table for each task and length of results/runs.csv, and draw the ratios to Adam: results/ratios.png.

python evidence/learned_optimizer/show.py
"""

from __future__ import annotations

import csv
import math
from typing import Any

import numpy as np
from run import BASELINES, LEARNED, RESULTS, TASKS, TIMES, TUNING, Book
from scipy import stats

from lightning_methods.report import color_cycle, new_figure
from lightning_methods.report.style import decorate

COLUMNS = ["", "lr", "mean val loss", "over Adam's", "final val loss", "test loss", "accuracy", "ms a step"]
DRAWN = ("lm-small", "metz19", "RMSprop", "SGD momentum")


def half_width(values: list[float]) -> float:
    """Return half of the 95% t-interval of a mean."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{np.mean(values):.3f}"
    return f"{np.mean(values):.3f} ± {half_width(values):.3f}"


def runs_of(task: str, steps: int) -> dict[str, list[dict[str, str]]]:
    """Return the reported trainings by optimizer."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in Book().rows.values():
        if row["task"] == task and int(row["steps"]) == steps and int(row["seed"]) not in TUNING:
            found.setdefault(row["optimizer"], []).append(row)
    return found


def ratios(runs: dict[str, list[dict[str, str]]], name: str) -> list[float]:
    """Return mean validation losses over Adam's of the same seeds."""
    adam = {row["seed"]: float(row["mean_val"]) for row in runs.get("Adam", [])}
    return [float(row["mean_val"]) / adam[row["seed"]] for row in runs[name] if row["seed"] in adam]


def table(task: str, steps: int, times: dict[tuple[str, str], str]) -> None:
    """Print the table of a task at a length."""
    runs = runs_of(task, steps)
    if not runs:
        return
    print(f"\n### {task}, {steps:,} steps\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    for name in [n for n in [*LEARNED, *BASELINES] if n in runs]:
        own, paired = runs[name], ratios(runs, name)
        cells = [name, own[0]["lr"], mean([float(r["mean_val"]) for r in own])]
        cells.append(mean(paired) if paired and name != "Adam" else "")
        cells += [mean([float(r[k]) for r in own]) for k in ("final_val", "test", "accuracy")]
        print("| " + " | ".join([*cells, times.get((task, name), "")]) + " |")


def figure() -> Any:
    """Return the picture of the ratios, a panel for each length."""
    picture, lengths = new_figure(11.0, 5.0), (200, 2000)
    for axes, steps in zip(picture.subplots(1, len(lengths)), lengths, strict=True):
        tasks = [task for task in TASKS if runs_of(task, steps)][::-1]
        for k, (name, color) in enumerate(zip(DRAWN, color_cycle(len(DRAWN)), strict=True)):
            found = [(i, ratios(runs_of(t, steps), name)) for i, t in enumerate(tasks) if name in runs_of(t, steps)]
            y = [i + 0.27 - 0.18 * k for i, _ in found]
            x, spread = [float(np.mean(r)) for _, r in found], [half_width(r) for _, r in found]
            axes.errorbar(x, y, xerr=spread, fmt="o", markersize=4.5, linewidth=1.2, color=color, label=name)
        axes.axvline(1.0, color="#4d4d4d", linewidth=1.0)
        axes.set_xscale("log")
        ticks = [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(len(tasks)), tasks)
        decorate(axes, title=f"{steps:,} steps", x_label="mean validation loss over tuned Adam's")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN), frameon=False)
    return picture


def main() -> None:
    times = {}
    if TIMES.is_file():
        times = {(r["task"], r["optimizer"]): f"{float(r['ms_per_step']):.2f}" for r in csv.DictReader(TIMES.open())}
    for steps in (200, 2000):
        for task in TASKS:
            table(task, steps, times)
    figure().savefig(RESULTS.with_name("ratios.png"), dpi=120)


if __name__ == "__main__":
    main()
