"""False and missed verdicts of three decision rules, by simulation, and of 400 studies of A against itself.

    python evidence/reproducibility/rules.py

Seconds on a CPU. Runs of A and B are normal with the same spread; the difference of the means sets the true P(A>B).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from scipy import stats

from lightning_methods.report import new_figure
from lightning_methods.report.style import MUTED, PALETTE, decorate
from lightning_methods.reproducibility import power_of_pairs, verdict
from lightning_methods.reproducibility.functional import critical_wins

HERE = Path(__file__).parent
TRUTH = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
THRESHOLD = 1.9952  # of the average rule, in standard deviations: what published improvements come to (MLSys 2021)


def chances(truth: float, runs: int, repetitions: int, rng: np.random.Generator, bias: float) -> dict[str, float]:
    """Return how often each rule concludes that A is better; `bias` is the spread of what all runs of a side share."""
    spread = np.sqrt(1 - bias**2)
    shift = np.sqrt(2) * stats.norm.ppf(truth)
    shared = bias * rng.normal(size=(2, repetitions, 1))
    a = shift + shared[0] + spread * rng.normal(size=(repetitions, runs))
    b = shared[1] + spread * rng.normal(size=(repetitions, runs))
    wins = (a > b).sum(1)
    return {
        "single run": float((a[:, 0] - b[:, 0] > THRESHOLD).mean()),
        "average": float((a.mean(1) - b.mean(1) > THRESHOLD).mean()),
        "P(A>B)": float((wins >= critical_wins(runs)).mean()),
    }


def against_itself(studies: int, runs: int, rng: np.random.Generator, rho: float) -> dict[str, float]:
    """Return how many studies of A against A claim a difference; pairs share a part of their variation."""
    claims = {"paired": 0, "unpaired": 0, "either way": 0}
    for _ in range(studies):
        shared = np.sqrt(rho) * rng.normal(size=runs)
        a, b = (shared + np.sqrt(1 - rho) * rng.normal(size=runs) for _ in range(2))
        a, b = (
            np.round(0.93 + 0.004 * a, 4),
            np.round(0.93 + 0.004 * b, 4),
        )  # accuracies of 10,000 examples tie at times
        claimed = verdict(a, b).decision.startswith("significant")
        claims["paired"] += claimed
        claims["either way"] += claimed or verdict(b, a).decision.startswith("significant")
        claims["unpaired"] += verdict(a, b, paired=False, resamples=1000, rng=rng).decision.startswith("significant")
    return {name: count / studies for name, count in claims.items()}


def draw(rows: list[dict[str, float | str]]) -> None:
    figure = new_figure(6.8, 3.8)
    axes = figure.add_subplot()
    decorate(axes, title="How often each rule says that A is better, 50 runs", x_label="true P(A>B)", y_label="share")
    for rule, color in zip(("single run", "average", "P(A>B)"), PALETTE, strict=False):
        found = [r for r in rows if r["runs"] == 50 and r["bias"] == 0 and r["rule"] == rule]
        x, y = [float(r["truth"]) for r in found], [float(r["claims"]) for r in found]
        axes.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.8, label=rule)
    axes.axvline(0.5, color=MUTED, linewidth=1)
    axes.axvline(0.75, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.savefig(HERE / "rules.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=20_000)
    parser.add_argument("--studies", type=int, default=400)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[dict[str, float | str]] = []
    for runs in (29, 50):
        for bias in (0.0, 0.4):
            for truth in TRUTH:
                found = chances(truth, runs, args.repetitions, rng, bias)
                exact = power_of_pairs(truth, runs) if bias == 0 else float("nan")
                rows += [
                    {"runs": runs, "bias": bias, "truth": truth, "rule": k, "claims": v, "exact": exact}
                    for k, v in found.items()
                ]
    with open(HERE / "results" / "rules.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**r, "exact": "" if r["rule"] != "P(A>B)" or r["bias"] else r["exact"]} for r in rows)
    itself = {
        f"rho {rho:g}": against_itself(args.studies, 29, np.random.default_rng(1), rho) for rho in (0.0, 0.5, 0.9)
    }
    (HERE / "results" / "against_itself.json").write_text(json.dumps(itself, indent=1) + "\n", encoding="utf-8")
    draw(rows)
    for bias in (0.0, 0.4):
        for runs in (29, 50):
            print(f"{runs} runs, shared spread {bias:g}")
            for rule in ("single run", "average", "P(A>B)"):
                cells = [f"{r['claims']:.3f}" for r in rows if (r["runs"], r["bias"], r["rule"]) == (runs, bias, rule)]
                print(f"  {rule:<12}", *cells)
    print(json.dumps(itself, indent=1))


if __name__ == "__main__":
    main()
