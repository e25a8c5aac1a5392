"""Write the tables and the figures of the README again from what `run.py` has left in `results/`.

python evidence/importance_weighting/tables.py      prints the tables, and draws the figures beside this file
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from lightning_methods.importance_weighting.sweep import Fading, fading_figure
from lightning_methods.report import color_cycle

HERE = Path(__file__).parent
STRONG, WEAK = "256:1", "1:256"
OTHER, HELD, NOISE = "other digits", "held-out 3 and 5", "noise"


def read(part: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{part}.json").read_text())["results"]


def numbers(values: Any) -> np.ndarray:
    """Return nested lists as an array, with NaN for what is null: a head that has diverged."""
    return np.array(values, dtype=float)


def row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def spread(head: dict[str, Any], probe: str, at: int, names: tuple[str, str] = (STRONG, WEAK)) -> float:
    """Return the share of the first class under the first weighting minus under the second, in points."""
    share = numbers(head["fraction of the first class"][probe])[at]
    first, second = (share[head["names"].index(name)] for name in names)
    return float(np.mean(first - second))


def fading() -> None:
    print("\ndata, head, held out first, held out last, other digits last, noise last, diverged heads\n")
    for data in ("digits", "mnist"):
        for name, head in read(data).items():
            diverged = int(np.isnan(numbers(head["train accuracy"])[-1]).sum())
            cells = [spread(head, HELD, 0), *(spread(head, probe, -1) for probe in (HELD, OTHER, NOISE))]
            row(data, name, *(f"{x:.1f}" for x in cells), diverged)


def exponents() -> None:
    found = read("exponents")
    powers = list(dict.fromkeys(name.partition(" ^ ")[2] for name in next(iter(found.values()))["names"]))
    for strong, weak in ((STRONG, WEAK), ("16:1", "1:16")):
        print(f"\nspread {strong} - {weak}: head, then held out | other digits by exponent {powers}\n")
        for name, head in found.items():
            cells = []
            for probe in (HELD, OTHER):
                for power in powers:
                    names = (f"{strong} ^ {power}", f"{weak} ^ {power}")
                    cells.append(f"{spread(head, probe, -1, names):.1f}")
            fitted = numbers(head["train accuracy"])[-1]
            worst = {p: [] for p in powers}
            for i, label in enumerate(head["names"]):
                ratio, _, power = label.partition(" ^ ")
                if ratio in (strong, weak):
                    worst[power] += fitted[i].tolist()
            row(name, *cells, "training accuracy", *(f"{np.mean(worst[p]):.1f}" for p in powers))


def logistic() -> None:
    print("\nangle in degrees after steps\n")
    for name, found in read("logistic").items():
        row(name, *(f"{x:.1f}" for x in np.mean(found["angle"], 1)))


def cifar10() -> None:
    print("\nnetwork, weights, training accuracy, held-out predicted cat, other classes predicted cat, effect, test\n")
    for condition, ratios in read("cifar10").items():
        for ratio, runs in ratios.items():
            if runs:
                keys = ("accuracy", "fraction/in_domain/0", "fraction/out_of_domain/0", "effect", "test accuracy")
                last = {k: [run[k][-1] if run[k] else np.nan for run in runs] for k in keys}
                shown = [", ".join(f"{100 * v:.0f}" for v in last[k]) for k in keys if k != "effect"]
                effect = ", ".join(f"{v:.2f}" for v in last["effect"])
                row(condition, ratio, *shown[:3], effect, shown[3])

    print("\nnetwork, points between 16:1 and 1:16 in held-out images predicted cat: mean, 95% interval (t)\n")
    for condition, ratios in read("cifar10").items():
        share = [[100 * run["fraction/in_domain/0"][-1] for run in ratios[ratio]] for ratio in ("16:1", "1:16")]
        gap = np.subtract(*share)
        half = stats.t.ppf(0.975, len(gap) - 1) * stats.sem(gap)
        row(condition, f"{gap.mean():.1f}", f"[{gap.mean() - half:.1f}, {gap.mean() + half:.1f}]")


def cifar10_figure() -> Figure:
    """Draw the share of held-out images predicted as cats over the epochs, a line a run."""
    found = {name: ratios for name, ratios in read("cifar10").items() if ratios}
    figure = Figure(figsize=(2.6 * len(found) + 0.8, 2.8), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    colors = dict(zip(("16:1", "1:1", "1:16"), color_cycle(3), strict=True))
    for axis, (name, ratios) in zip(axes, found.items(), strict=True):
        for ratio, runs in ratios.items():
            for i, run in enumerate(runs):
                shares = 100 * numbers(run["fraction/in_domain/0"])
                axis.plot(run["epochs"], shares, color=colors[ratio], lw=1, label=None if i else ratio)
        axis.set(title=name, xlabel="epoch", ylim=(0, 100))
    axes[0].set_ylabel("% predicted as cat")
    figure.legend(*axes[0].get_legend_handles_labels(), title="cat : dog", loc="outside right center")
    figure.suptitle("CIFAR-10, held-out cats and dogs")
    return figure


def of_json(head: dict[str, Any]) -> Fading:
    """Return the curves that `run.py` has written, two classes each."""
    shares = {k: torch.tensor(numbers(v)) / 100 for k, v in head["fraction of the first class"].items()}
    fraction = {k: torch.stack([v, 1 - v], -1) for k, v in shares.items()}
    seeds = next(iter(shares.values())).shape[-1]
    return Fading(head["names"], seeds, head["epochs"], fraction)


def main() -> None:
    fading()
    exponents()
    logistic()
    cifar10()
    for data in ("digits", "mnist"):
        for name in ("plain", "L2 1e-2"):
            figure = fading_figure(of_json(read(data)[name]), OTHER, title=f"{data}, 3 against 5: {name}")
            figure.savefig(HERE / f"fading_{data}_{name.split()[0].lower()}.png", dpi=150)
    cifar10_figure().savefig(HERE / "fading_cifar10.png", dpi=150)


if __name__ == "__main__":
    main()
