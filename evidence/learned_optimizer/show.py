"""Write the tables of README.md from results/, and draw the ratios to Adam: results/ratios.png.

python evidence/learned_optimizer/show.py
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from run import BASELINES, HERE, LEARNED, RESULTS, TASKS, TIMES, TUNING, Book
from scipy import stats

from lightning_methods.report import color_cycle, new_figure
from lightning_methods.report.style import decorate

COLUMNS = ["", "lr", "mean val loss", "over Adam's", "final val loss", "test loss", "accuracy", "ms a step"]
LENGTHS = (200, 2000)
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


def lines(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def summary() -> Iterator[str]:
    """Yield the table of the ratios to Adam."""
    shown = {"lm-small": "`lm-small`", "metz19": "`metz19`", "RMSprop": "tuned RMSprop"}
    found = [(f"{task}, {steps:,} steps", runs_of(task, steps)) for steps in LENGTHS for task in TASKS]
    rows = [[name, *(mean(ratios(runs, o)) for o in shown)] for name, runs in found if runs]
    return lines(["", *shown.values()], rows)


def choice() -> Iterator[str]:
    """Yield the table of the weights that were compared, by validation tasks."""
    with (HERE / "results" / "choice.csv").open() as file:
        rows = list(csv.DictReader(file))
    header = [
        "weights",
        "clock",
        "width",
        "outer steps",
        "CPU seconds",
        "200 steps",
        "2,000 steps",
        "last tenth",
        "wide",
    ]
    return lines(header, [list(row.values()) for row in rows])


def table(task: str, steps: int, times: dict[tuple[str, str], str]) -> Iterator[str]:
    """Yield the table of a task at a length."""
    runs = runs_of(task, steps)
    if not runs:
        return
    yield f"### {task}, {steps:,} steps"
    yield ""
    rows = []
    for name in [n for n in [*LEARNED, *BASELINES] if n in runs]:
        own, paired = runs[name], ratios(runs, name)
        cells = [name, own[0]["lr"], mean([float(r["mean_val"]) for r in own])]
        cells.append(mean(paired) if paired and name != "Adam" else "")
        cells += [mean([float(r[k]) for r in own]) for k in ("final_val", "test", "accuracy")]
        rows.append([*cells, times.get((task, name), "")])
    yield from lines(COLUMNS, rows)
    yield ""


def figure() -> Any:
    """Return the picture of the ratios, a panel for each length."""
    picture = new_figure(11.0, 5.0)
    for axes, steps in zip(picture.subplots(1, len(LENGTHS)), LENGTHS, strict=True):
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


def write(path: Path, part: str, content: Iterator[str]) -> None:
    """Put lines between the marks of a part."""
    begin, end = (f"<!-- {part}:{word} -->" for word in ("begin", "end"))
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no part {part!r}.")
    path.write_text(before + begin + "\n" + "\n".join(content).rstrip() + "\n" + end + after)


def main() -> None:
    times = {}
    if TIMES.is_file():
        times = {(r["task"], r["optimizer"]): f"{float(r['ms_per_step']):.2f}" for r in csv.DictReader(TIMES.open())}
    write(HERE / "README.md", "ratios", summary())
    write(HERE / "README.md", "choice", choice())
    for steps in LENGTHS:
        write(HERE / "README.md", str(steps), (line for task in TASKS for line in table(task, steps, times)))
    figure().savefig(RESULTS.with_name("ratios.png"), dpi=120)


if __name__ == "__main__":
    main()
