"""Write the results as a markdown report with tables, intervals and a figure."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_methods.report.style import MUTED, color_cycle, decorate, new_figure

PLAIN = "cross-entropy"
ENTANGLED = ("paper preset", "paper temperature", "safe preset", "weight -0.1")
TITLES = {"digits": "scikit-learn's digits", "mnist": "MNIST", "mnist-unit": "MNIST, pixels 0 to 1"}
SCORES = {
    "same_class_neighbors": "neighbours of the predicted class",
    "credibility": "credibility",
    "softmax": "largest softmax",
}
COMMANDS = (
    "python evidence/snnl/run.py --part claims",
    "python evidence/snnl/run.py --part safety --networks MLP SmallConvNet --temperatures optimal paper 100",
    "python evidence/snnl/run.py --part safety --networks ConvNet ResNet-8 --temperatures 100 --seeds 2",
    "python evidence/snnl/run.py --part safety --networks ConvNet ResNet-8 --temperatures median --seeds 2 "
    "--weights -0.000001 --repeated -0.000001",
    "python evidence/snnl/run.py --part safety --temperatures median --weights -0.3 -0.1 -0.03 --repeated -0.1",
    "python evidence/snnl/run.py --part safety --temperatures 'safe preset' --weights -0.03 --repeated -0.03",
    "python evidence/snnl/run.py --part robustness",
    "python evidence/snnl/run.py --part report",
)
NOT_WORSE = 0.5  # points of accuracy
NEAR_CHANCE = 0.9
DIVERGED = 0.2  # accuracy, of ten classes
HARM = 2.0  # points of accuracy against the paired run


def write_report(results: Path, readme: Path) -> None:
    """Read all tables in `results` and write the report and its figure."""
    claims = [json.loads((results / f"claims_{name}.json").read_text()) for name in TITLES if _there(results, name)]
    parts = [readme.with_name("introduction.md").read_text().strip()]
    if claims:
        figure_of(claims).savefig(readme.with_name("entanglement.png"), dpi=150)
        parts.append("![Entanglement of every hidden layer over the training](entanglement.png)")
        parts.append(
            "Held-out images, the soft nearest neighbour loss at its best temperature over the chance level: 1 is "
            "chance, 0 separated. Lines are means over the seeds, bands reach from the smallest to the largest."
        )
        parts += [verdicts(claims), readme.with_name("reading.md").read_text().strip()]
    for found in claims:
        parts += claims_tables(found)
    if (results / "safety.csv").exists():
        parts += safety_tables(results / "safety.csv")
    if (results / "robustness.csv").exists():
        parts += robustness_tables(results / "robustness.csv")
    parts += [setup_of(claims)]
    readme.write_text("\n\n".join(part for part in parts if part) + "\n")


def _there(results: Path, name: str) -> bool:
    return (results / f"claims_{name}.json").exists()


# -- numbers -----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """Return the mean and its 95% percentile bootstrap interval over the seeds."""
    sample = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).choice(sample, (resamples, len(sample))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(sample.mean()), float(low), float(high)


def shown(values: Sequence[float], digits: int = 2, sign: bool = True) -> str:
    plus = "+" if sign else ""
    mean, low, high = interval(values)
    return f"{mean:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def by_condition(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(found["runs"], key=lambda run: run["seed"]):
        grouped[run["condition"]].append(run)
    return dict(grouped)


def accuracy_gain(runs: dict[str, list[dict[str, Any]]], condition: str) -> list[float]:
    return [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs[condition], runs[PLAIN], strict=True)]


def auroc_gain(runs: dict[str, list[dict[str, Any]]], condition: str, kind: str, score: str) -> list[float]:
    pairs = zip(runs[condition], runs[PLAIN], strict=True)
    return [a["auroc"][kind][score] - b["auroc"][kind][score] for a, b in pairs]


def final(runs: Iterable[dict[str, Any]], temperature: str, layer: str) -> list[float]:
    return [run["entanglement"][temperature][layer][-1] for run in runs]


def layers_of(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    return list(runs[PLAIN][0]["entanglement"]["optimal"])


def sign_of(values: Sequence[float], margin: float = 0.0) -> str:
    """Say whether the interval shows more than `-margin`, less than 0, or neither."""
    _, low, high = interval(values)
    return "holds" if low > -margin else "does not hold" if high < 0 else "inside the noise"


# -- the claims --------------------------------------------------------------------------------------------------------


def verdicts(claims: list[dict[str, Any]]) -> str:
    rows = ["| claim | " + " | ".join(TITLES[c["about"]["data"]] for c in claims) + " |"]
    rows.append("|---|" + "---|" * len(claims))
    grouped = [by_condition(found) for found in claims]
    name = "C1: under cross-entropy alone the last hidden layer disentangles"
    rows.append(f"| {name} | " + " | ".join(_c1(runs) for runs in grouped) + " |")
    for condition in ENTANGLED:
        name = f"C2, {condition}: hidden layers near chance, accuracy not worse"
        rows.append(f"| {name} | " + " | ".join(_c2(runs, condition) for runs in grouped) + " |")
    for condition in ENTANGLED:
        name = f"C3, {condition}: neighbours of the predicted class tell outliers better than without"
        rows.append(f"| {name} | " + " | ".join(_c3(runs, condition) for runs in grouped) + " |")
    return "## Claims\n\n" + "\n".join(rows)


def _c1(runs: dict[str, list[dict[str, Any]]]) -> str:
    falls = [-change for change in changes(runs[PLAIN], layers_of(runs)[-1])]
    return (
        f"**{sign_of(falls)}**: {shown([-fall for fall in falls])}, falls in {sum(f > 0 for f in falls)}/{len(falls)}"
    )


def _c2(runs: dict[str, list[dict[str, Any]]], condition: str) -> str:
    if condition not in runs:
        return "not run"
    gain = accuracy_gain(runs, condition)
    words = [f"accuracy **{sign_of(gain, NOT_WORSE)}**: {shown(gain)} points"]
    for temperature, name in (("100.0", "T=100"), ("optimal", "best T")):
        values = [float(np.mean(final(runs[condition], temperature, layer))) for layer in layers_of(runs)]
        near = "near chance" if min(values) >= NEAR_CHANCE else "not near chance"
        words.append(f"{near} at {name} ({', '.join(f'{value:.2f}' for value in values)})")
    return "; ".join(words)


def _c3(runs: dict[str, list[dict[str, Any]]], condition: str) -> str:
    if condition not in runs:
        return "not run"
    words = []
    for kind in runs[PLAIN][0]["auroc"]:
        gain = auroc_gain(runs, condition, kind, "same_class_neighbors")
        words.append(f"{kind} **{sign_of(gain)}** ({np.mean(gain):+.3f})")
    return "; ".join(words)


def changes(runs: list[dict[str, Any]], layer: str) -> list[float]:
    curves = [run["entanglement"]["optimal"][layer] for run in runs]
    return [curve[-1] - curve[0] for curve in curves]


def claims_tables(found: dict[str, Any]) -> list[str]:
    about, runs = found["about"], by_condition(found)
    title = TITLES[about["data"]]
    return [
        f"## {title}: {about['network']}, {about['seeds']} seeds",
        accuracy_table(runs),
        f"### C1, {title}: cross-entropy alone, layer by layer",
        c1_table(runs),
        f"### C2, {title}: entanglement of the hidden layers after the last epoch",
        c2_table(runs),
        f"### C3, {title}: telling outliers from test images (AUROC)",
        c3_table(runs),
    ]


def accuracy_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| condition | test accuracy % | difference, points [95%] | wins / ties / losses | ECE |"]
    rows.append("|---|---:|---:|---:|---:|")
    for condition, own in runs.items():
        gain = accuracy_gain(runs, condition)
        wins, losses = sum(g > 0 for g in gain), sum(g < 0 for g in gain)
        against = ["", ""] if condition == PLAIN else [shown(gain), f"{wins} / {len(gain) - wins - losses} / {losses}"]
        accuracy = shown([100 * run["accuracy"] for run in own], sign=False)
        ece = f"{np.mean([run['ece'] for run in own]):.3f}"
        rows.append(f"| {condition} | {accuracy} | {against[0]} | {against[1]} | {ece} |")
    return "\n".join(rows)


def c1_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| layer | before | after | change [95%] | seeds where it fell |", "|---|---:|---:|---:|---:|"]
    for layer in layers_of(runs):
        curves = [run["entanglement"]["optimal"][layer] for run in runs[PLAIN]]
        change = changes(runs[PLAIN], layer)
        before, after = (float(np.mean([curve[i] for curve in curves])) for i in (0, -1))
        fell = f"{sum(c < 0 for c in change)} / {len(change)}"
        rows.append(f"| {short(layer)} | {before:.3f} | {after:.3f} | {shown(change, 3)} | {fell} |")
    return "\n".join(rows)


def c2_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    layers = layers_of(runs)
    heads = [f"{short(layer)}, {what}" for what in ("best T", "T=100") for layer in layers]
    rows = ["| condition | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for condition, own in runs.items():
        values = [np.mean(final(own, temperature, layer)) for temperature in ("optimal", "100.0") for layer in layers]
        rows.append(f"| {condition} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(rows)


def c3_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    heads = ["neighbours", "difference [95%]", "wins", *list(SCORES.values())[1:], "share of neighbours"]
    rows = ["| outliers | condition | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    for kind in runs[PLAIN][0]["auroc"]:
        for condition, own in runs.items():
            means = [f"{np.mean([run['auroc'][kind][score] for run in own]):.3f}" for score in SCORES]
            gain = auroc_gain(runs, condition, kind, "same_class_neighbors")
            against = ["", ""] if condition == PLAIN else [shown(gain, 3), f"{sum(g > 0 for g in gain)}/{len(gain)}"]
            share = " vs ".join(
                f"{np.mean([run['same_class_neighbors'][where] for run in own]):.2f}" for where in (kind, "test")
            )
            rows.append("| " + " | ".join([kind, condition, means[0], *against, *means[1:], share]) + " |")
    note = (
        "Neighbours: the share of a sample's nearest training samples, over all hidden layers, whose label is the "
        "class that the network predicts. The last column compares its mean on outliers with that on test images. "
        "Differences are paired with cross-entropy alone."
    )
    return "\n".join(rows) + "\n\n" + note


def short(layer: str) -> str:
    return layer.removeprefix("net.")


# -- which settings are safe -------------------------------------------------------------------------------------------


def paired_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows with their drop of accuracy in points, and the change of the last layer's entanglement."""
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    key = ("network", "optimizer", "seed", "epochs")
    plain = {tuple(row[k] for k in key): row for row in rows if not row["layers"]}
    paired = []
    for row in rows:
        if row["layers"]:
            base = plain[tuple(row[k] for k in key)]
            drop = 100 * (float(base["accuracy"]) - float(row["accuracy"]))
            effect = float(row["last_layer"]) - float(base["last_layer"])
            paired.append({**row, "drop": drop, "effect": effect})
    return paired


def safety_tables(path: Path) -> list[str]:
    rows = paired_rows(path)
    cells = list(dict.fromkeys((row["network"], row["optimizer"]) for row in rows))
    heads = ["temperature", "weight", "runs", *(", ".join(cell) for cell in cells)]
    heads += ["mean drop", f"worse by over {HARM:g}", "not finite", "mean effect"]
    table = ["| " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * (len(heads) - 2)]
    table.append(_plain_row(path, cells))
    for (temperature, weight), own in _by_setting(rows):
        worst = [_worst(row for row in own if (row["network"], row["optimizer"]) == cell) for cell in cells]
        drops, effects = ([row[key] for row in own] for key in ("drop", "effect"))
        finite = np.isfinite(effects)
        counts = [str(sum(drop > HARM for drop in drops)), str(len(own) - int(finite.sum()))]
        summary = [f"{np.mean(drops):+.1f}", *counts, f"{np.asarray(effects)[finite].mean():+.3f}"]
        table.append("| " + " | ".join([temperature, f"{weight:g}", str(len(own)), *worst, *summary]) + " |")
    text = (
        f"{len(rows)} short trainings (5 epochs on the digits, 3 on 2,000 images of MNIST, batch 64) with the last "
        "hidden layer, all hidden layers, or all layers before their activation. The columns give the **largest drop "
        "of test accuracy in points** against the paired run without the callback, over layers and seeds (negative: "
        "every run gained); the first row has the accuracy without. One test image is 0.28 points on the digits and "
        "0.1 on MNIST. Effect: change of the last hidden layer's entanglement over chance, held out; above 0 is what "
        "a negative weight is for. Not finite: the network diverged. The first seed has the whole grid, the others "
        "the likely defaults at the median. A weight of -1e-06 changes nothing but rounding: its row is what chance "
        "does."
    )
    return [
        "## Which settings are safe",
        text,
        "\n".join(table),
        "### The same by layers and optimizer",
        by_layers(rows),
    ]


def _by_setting(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, float], list[dict[str, Any]]]]:
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["temperature"], float(row["weight"])].append(row)
    return sorted(grouped.items())


def _plain_row(path: Path, cells: list[tuple[str, str]]) -> str:
    accuracies: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["layers"]:
                accuracies[row["network"], row["optimizer"]].append(100 * float(row["accuracy"]))
    shown = [", ".join(f"{value:.1f}" for value in accuracies[cell]) for cell in cells]
    return "| " + " | ".join(["none", "0", str(sum(map(len, accuracies.values()))), *shown, "", "", "", ""]) + " |"


def _worst(rows: Iterable[dict[str, Any]]) -> str:
    drops = [row["drop"] for row in rows]
    return f"{max(drops):+.1f}" if drops else "not run"


def by_layers(rows: list[dict[str, Any]]) -> str:
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    layers = list(dict.fromkeys(row["layers"] for row in rows))
    heads = [f"{layer}, {optimizer}" for layer in layers for optimizer in optimizers]
    table = ["| temperature | weight | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for (temperature, weight), own in _by_setting(rows):
        cells = [
            _worst(row for row in own if (row["layers"], row["optimizer"]) == (layer, optimizer))
            for layer in layers
            for optimizer in optimizers
        ]
        table.append(f"| {temperature} | {weight:g} | " + " | ".join(cells) + " |")
    return "\n".join(table)


# -- trainings that are fragile, and losses of other scales ------------------------------------------------------------


def robustness_tables(path: Path) -> list[str]:
    """Return one table of how often a fragile training diverges, and one of losses in other units."""
    grouped: dict[tuple[str, str], dict[str, dict[tuple[str, str], dict[str, Any]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cell = grouped.setdefault((row["network"] + ", " + row["optimizer"], row["loss_scale"]), {})
            cell.setdefault(row["condition"], {})[row["seed"], row["layers"]] = row
    heads = "| training | loss times | condition | runs | diverged | accuracy % | difference [95%] | worst |"
    table = [heads, "|---|---:|---|---:|---:|---:|---:|---:|"]
    for (training, scale), conditions in grouped.items():
        plain = {seed: row for (seed, _), row in conditions["none"].items()}
        for condition, rows in conditions.items():
            accuracy = [100 * float(row["accuracy"]) for row in rows.values()]
            gains = [100 * (float(r["accuracy"]) - float(plain[seed]["accuracy"])) for (seed, _), r in rows.items()]
            lost = sum(float(r["accuracy"]) < DIVERGED or not np.isfinite(float(r["loss"])) for r in rows.values())
            against = ["", ""] if condition == "none" else [_by_seed(rows, gains), f"{min(gains):+.1f}"]
            cells = [training, scale, condition, str(len(rows)), str(lost), f"{np.mean(accuracy):.1f}", *against]
            table.append("| " + " | ".join(cells) + " |")
    text = (
        "Seeds from 100, on which nothing was chosen, with the last hidden layer, all hidden layers, and all layers "
        "before their activation; differences in points against the paired run without the callback, intervals over "
        "seeds. "
        f"Diverged: accuracy below {100 * DIVERGED:g}% or a loss that is not finite. Rounding is a weight of -1e-06, "
        "which changes nothing else. In the lower rows the module's own loss is multiplied by a number, which Adam "
        "does not feel; the safe preset without its limit is `weight=-0.03` alone."
    )
    return ["## Trainings that are fragile, and losses in other units", text, "\n".join(table)]


def _by_seed(rows: dict[tuple[str, str], dict[str, Any]], gains: Sequence[float]) -> str:
    """Return the interval of the mean over seeds: runs of one seed on several layers are no independent samples."""
    of_seed: dict[str, list[float]] = defaultdict(list)
    for (seed, _), gain in zip(rows, gains, strict=True):
        of_seed[seed].append(gain)
    return shown([float(np.mean(values)) for values in of_seed.values()], 1)


# -- around ------------------------------------------------------------------------------------------------------------


def figure_of(claims: list[dict[str, Any]]) -> Figure:
    """Draw the entanglement of every layer (columns) on all data (rows), one line a condition."""
    grouped = [by_condition(found) for found in claims]
    columns = max(len(layers_of(runs)) for runs in grouped)
    figure = new_figure(3.1 * columns + 0.6, 2.8 * len(claims) + 0.8)
    axes = figure.subplots(len(claims), columns, squeeze=False, sharey="row")
    for row, found, runs in zip(axes, claims, grouped, strict=True):
        for axis, layer in zip(row, layers_of(runs), strict=True):
            first = axis is row[0]
            title = f"{TITLES[found['about']['data']]}: {short(layer)}"
            decorate(axis, title=title, x_label="epoch", y_label="loss / chance" if first else "")
            for color, (condition, own) in zip(color_cycle(len(runs)), runs.items(), strict=True):
                curves = np.array([run["entanglement"]["optimal"][layer] for run in own])
                epochs = np.arange(curves.shape[1])
                axis.plot(epochs, curves.mean(0), color=color, linewidth=1.8, label=condition)
                axis.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
            axis.axhline(1, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)))
            axis.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def setup_of(claims: list[dict[str, Any]]) -> str:
    lines = ["## How it was run", "", "```", *COMMANDS, "```", ""]
    for found in claims:
        about = found["about"]
        lines.append(
            f"- {TITLES[about['data']]}: {about['train_size']:,} training images, batch {about['batch_size']}, "
            f"{about['epochs']} epochs, {about['optimizer']}, seeds 0 to {about['seeds'] - 1}; entanglement of "
            f"{about['held_out']:,} test images in batches of {about['held_out_batch']}; {about['k']} neighbours among "
            f"at most {about['max_per_class']:,} training images a class; {about['minutes']:.0f} minutes on a busy "
            "machine."
        )
    if claims:
        about = claims[0]["about"]
        settings = "; ".join(
            f"{name}: " + (", ".join(f"{k} {v}" for k, v in given.items()) or "none")
            for name, given in about["conditions"].items()
        )
        lines += [f"- Settings of the loss, on all hidden layers: {settings}."]
        lines += [
            f"- Python {about['python']}, torch {about['torch']}, lightning {about['lightning']}; {about['device']}."
        ]
    lines.append(
        "- Intervals: 95% percentile bootstrap over the seeds (10,000 resamples); with 5 seeds they are on the short "
        "side. Seeds decide split, initial weights and batch order, the same for all conditions."
    )
    lines.append(
        "- Not run here: any row with `--device cuda`, the full width (`--width 1`) and all of MNIST "
        "(`--train-size 54000`); the scripts take these. The MLP has all temperatures with all weights from an earlier "
        "and larger plan."
    )
    lines.append(
        f"- Verdicts: C1 and C3 hold where the interval is above 0; C2 calls the accuracy not worse where the interval "
        f"is above -{NOT_WORSE:g} points, and a layer near chance from {NEAR_CHANCE:g}."
    )
    return "\n".join(lines)
