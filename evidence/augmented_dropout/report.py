"""Write the tables and figures of README.md from the runs in `results`.

python evidence/augmented_dropout/report.py
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lightning_methods.report import heatmap
from lightning_methods.report.style import MUTED, color_cycle, decorate, new_figure

HERE = Path(__file__).parent
TITLES = {"digits": "scikit-learn's digits", "mnist": "MNIST, 1,000 training images", "cifar10": "CIFAR-10"}
FAMILIES = ("no dropout", "standard", "forward only", "backward only", "augmented")
DIVERGED = 85.0  # an error as high as that of guessing

Array = np.ndarray
Cell = tuple[float, float]


class Grid:
    """All runs on one data set: quantity -> (seeds, cells)."""

    def __init__(self, path: Path) -> None:
        with path.open() as file:
            rows = list(csv.DictReader(file))
        cells = sorted({(float(r["p_forward"]), float(r["p_backward"])) for r in rows})
        found: dict[int, dict[Cell, dict[str, str]]] = {}
        for row in rows:
            found.setdefault(int(row["seed"]), {})[float(row["p_forward"]), float(row["p_backward"])] = row
        # a seed counts when all of its cells are there
        self.seeds = sorted(seed for seed, of_seed in found.items() if len(of_seed) == len(cells))
        self.cells = cells
        self.rates = sorted({p for p, _ in cells})
        names = ("val_error", "val_nll", "test_error", "test_nll", "test_ece", "train_nll", "seconds")
        self.values = {n: np.array([[float(found[s][c][n]) for c in cells] for s in self.seeds]) for n in names}

    def of(self, family: str) -> list[int]:
        """Return which cells belong to a family."""
        return [i for i, cell in enumerate(self.cells) if family_of(cell) == family]

    def square(self, values: Array) -> Array:
        """Return values of all cells as a matrix, forward rates down, backward rates across."""
        return values.reshape(len(self.rates), len(self.rates))


def family_of(cell: Cell) -> str:
    p_forward, p_backward = cell
    if p_forward == p_backward:
        return "standard" if p_forward else "no dropout"
    if not p_backward:
        return "forward only"
    return "augmented" if p_forward else "backward only"


def interval(values: Array, resamples: int = 10_000) -> tuple[float, float, float]:
    """Return the mean and its 95% percentile bootstrap interval over the seeds."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def shown(values: Array, digits: int = 2, sign: bool = False) -> str:
    plus = "+" if sign else ""
    mean, low, high = interval(values)
    return f"{mean:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def chosen(grid: Grid, cells: list[int]) -> Array:
    """Return for each seed the cell of the smallest validation error, ties by the validation likelihood."""
    keys = grid.values["val_error"][:, cells] + 1e-6 * np.minimum(grid.values["val_nll"][:, cells], 1e3)
    return np.array(cells)[keys.argmin(1)]


def take(grid: Grid, name: str, cells: Array) -> Array:
    return grid.values[name][np.arange(len(grid.seeds)), cells]


def better(ours: Array, theirs: Array) -> Array:
    """Return 1 where ours has the smaller error, a half for a tie: its mean is the probability to be better."""
    return (ours < theirs) + 0.5 * (ours == theirs)


def equal_budget(grid: Grid, most: float) -> tuple[Array, int, int]:
    """Return the error of augmented dropout tuned over as many pairs as standard dropout has, and both numbers.

    The mean over every choice of so many pairs with rates up to `most`: what a user who tries that many can expect.
    """
    small = [i for i, rates in enumerate(grid.cells) if max(rates) <= most]
    augmented = [i for i in grid.of("augmented") if i in small]
    budget = len([i for i in grid.of("standard") if i in small])
    subsets = list(itertools.combinations(augmented, budget))
    errors = np.mean([take(grid, "test_error", chosen(grid, list(s))) for s in subsets], axis=0)
    return errors, budget, len(augmented)


def choice_table(grid: Grid) -> str:
    standard = take(grid, "test_error", chosen(grid, grid.of("standard")))
    lines = ["| | rates tried | test error % | against standard, points [95%] | P(better than standard) | NLL | ECE |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for family in FAMILIES:
        cells = chosen(grid, grid.of(family))
        error, nll, ece = (take(grid, name, cells) for name in ("test_error", "test_nll", "test_ece"))
        against = ["", ""]
        if family != "standard":
            against = [shown(error - standard, sign=True), shown(better(error, standard))]
        row = [family, str(len(grid.of(family))), shown(error), *against, f"{nll.mean():.3f}", f"{ece.mean():.3f}"]
        lines.append("| " + " | ".join(row) + " |")
    for most in sorted({grid.rates[-1], *grid.rates[-2:-1]}):
        error, budget, number = equal_budget(grid, most)
        against = [shown(error - standard, sign=True), shown(better(error, standard))]
        name = f"augmented, rates to {most:g}, any {budget} of {number}"
        lines.append("| " + " | ".join([name, str(budget), shown(error), *against, "", ""]) + " |")
    return "\n".join(lines)


def cell_table(grid: Grid, name: str, digits: int) -> str:
    lines = ["| forward \\ backward | " + " | ".join(f"{p:g}" for p in grid.rates) + " |"]
    lines.append("|---|" + "---:|" * len(grid.rates))
    failed = diverged(grid)
    for i, p_forward in enumerate(grid.rates):
        row = [f"{p_forward:g}"]
        for j in range(len(grid.rates)):
            k = i * len(grid.rates) + j
            if failed[k]:
                row.append(f"diverged {failed[k]}/{len(grid.seeds)}")
            else:
                values = grid.values[name][:, k]
                row.append(f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def diverged(grid: Grid) -> list[int]:
    """Return for each cell how many runs ended at the error of guessing."""
    return [int(n) for n in (grid.values["test_error"] > DIVERGED).sum(0)]


def map_figure(grid: Grid, title: str) -> Figure:
    means = np.where(np.array(diverged(grid)) > 0, math.nan, grid.values["test_error"].mean(0))
    names = [f"{p:g}" for p in grid.rates]
    return heatmap(
        grid.square(means),
        names,
        names,
        title=title,
        value_label="test error %, grey: diverged",
        x_label="rate of the backward pass",
        y_label="rate of the forward pass",
    )


def curves_figure(grids: dict[str, Grid]) -> Figure:
    """Draw the error of each family over its rate, with intervals over the seeds."""
    figure = new_figure(4.6 * len(grids) + 1.2, 4.0)
    colors = dict(zip(FAMILIES, color_cycle(len(FAMILIES)), strict=True))
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        decorate(axes, title=TITLES[name], x_label="rate", y_label="test error %")
        failed = np.array(diverged(grid))
        (none,) = grid.of("no dropout")
        mean, low, high = interval(grid.values["test_error"][:, none])
        axes.axhspan(low, high, color=MUTED, alpha=0.12, linewidth=0)
        axes.axhline(mean, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.1, label="no dropout")
        for family in ("standard", "forward only", "backward only"):
            cells = [i for i in grid.of(family) if not failed[i]]
            rates = [max(grid.cells[i]) for i in cells]
            bands = np.array([interval(grid.values["test_error"][:, i]) for i in cells])
            axes.plot(rates, bands[:, 0], color=colors[family], marker="o", markersize=3.5, label=family)
            axes.fill_between(rates, bands[:, 1], bands[:, 2], color=colors[family], alpha=0.15, linewidth=0)
        axes.set_xlim(0.15, 0.85)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5
    )
    return figure


def section(name: str, grid: Grid) -> str:
    minutes = grid.values["seconds"].sum() / 60
    often: Callable[[str], str] = lambda family: ", ".join(  # noqa: E731
        f"{p:g}/{q:g} ({n})"
        for (p, q), n in sorted(
            (
                (grid.cells[c], int(n))
                for c, n in zip(*np.unique(chosen(grid, grid.of(family)), return_counts=True), strict=True)
            ),
            key=lambda item: -item[1],
        )
    )
    return "\n\n".join(
        [
            f"## {TITLES[name]}",
            f"{len(grid.seeds)} seeds, {len(grid.cells)} pairs of rates each, {minutes:.0f} minutes of one thread. "
            "Rates chosen for each seed by its validation error:",
            choice_table(grid),
            f"Chosen how often (forward/backward): standard {often('standard')}; augmented {often('augmented')}.",
            "Test error % of every pair, mean ± standard deviation over the seeds:",
            cell_table(grid, "test_error", 2),
            "Test NLL:",
            cell_table(grid, "test_nll", 3),
            f"![Test error over both rates]({name}_map.png)",
        ]
    )


def main() -> None:
    grids = {n: Grid(HERE / "results" / f"{n}.csv") for n in TITLES if (HERE / "results" / f"{n}.csv").is_file()}
    for name, grid in grids.items():
        map_figure(grid, TITLES[name]).savefig(HERE / f"{name}_map.png", dpi=150)
    curves_figure(grids).savefig(HERE / "curves.png", dpi=150)
    parts = [(HERE / "reading.md").read_text().strip(), *(section(n, g) for n, g in grids.items())]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
