"""Tables and figures from `results/<size>.csv`, into README.md between its marks.

python evidence/ladder_capsule/report.py
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np
from scipy import stats

from lightning_methods.report import curves

HERE = Path(__file__).parent
Cells = dict[tuple[str, str, str], dict[int, dict[str, float]]]  # (protocol, model, level) -> seed -> values
MODELS = ["CNN", "CNN, large", "CapsNet", "L-CapsNet, shared trunk", "L-CapsNet"]

# the CNN with as many parameters
MATCHED = {"CapsNet": "CNN", "L-CapsNet, shared trunk": "CNN", "L-CapsNet": "CNN, large"}
MATCHED |= {"L-CapsNet, unit maps": "CNN, large", "L-CapsNet, unit maps, loss of the code": "CNN, large"}


def read(path: Path) -> Cells:
    cells: Cells = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            key = (row["protocol"], row["model"], row["level"])
            values = {
                name: float(row[name]) for name in row if name not in ("protocol", "model", "level") and row[name]
            }
            cells.setdefault(key, {})[int(row["seed"])] = values
    return cells


def levels(cells: Cells, protocol: str) -> list[str]:
    return list(dict.fromkeys(level for p, _, level in cells if p == protocol))


def models(cells: Cells, protocol: str) -> list[str]:
    found = dict.fromkeys(model for p, model, _ in cells if p == protocol)
    return [m for m in MODELS if m in found] + [m for m in found if m not in MODELS]


def interval(values: list[float], digits: int = 1) -> str:
    """Return mean and 95% t-interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def line(cells: Cells, protocol: str, model: str, level: str, name: str) -> list[float]:
    return [values[name] for values in cells.get((protocol, model, level), {}).values() if name in values]


def area(cells: Cells, protocol: str, model: str) -> dict[int, float]:
    """Return for each seed the mean accuracy over the range of levels, in percent."""
    names = levels(cells, protocol)
    at = np.array([float(level.rpartition("_")[2]) for level in names])
    seeds = set.intersection(*(set(cells[protocol, model, level]) for level in names))
    found = {}
    for seed in sorted(seeds):
        y = np.array([100 * cells[protocol, model, level][seed]["accuracy"] for level in names])
        found[seed] = float(((y[1:] + y[:-1]) / 2 * np.diff(at)).sum() / (at[-1] - at[0]))
    return found


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def accuracies(cells: Cells, protocol: str) -> str:
    """Return the table of accuracies, with the mean over the range and its paired difference to the matched CNN."""
    names = levels(cells, protocol)
    rows = []
    for model in models(cells, protocol):
        areas = area(cells, protocol, model)
        reference = area(cells, protocol, MATCHED[model]) if model in MATCHED else {}
        both = [areas[seed] - reference[seed] for seed in areas if seed in reference]
        against = interval(both) if both else ""
        shown = [interval([100 * x for x in line(cells, protocol, model, level, "accuracy")]) for level in names]
        rows.append([model, str(len(areas)), *shown, interval(list(areas.values())), against])
    titles = [level.rpartition("_")[2] for level in names]
    return markdown(["", "seeds", *titles, "mean over range", "minus matched CNN"], rows)


def equivariance(cells: Cells, protocol: str = "rotation") -> str:
    """Return the table of R2 and of the overlap of codes, both directions of a turn together."""
    angles = sorted({abs(float(level.rpartition("_")[2])) for level in levels(cells, protocol)} - {0.0})
    rows = []
    for model in models(cells, protocol):
        for name in ("r2", "identity", "shuffled", "overlap"):
            shown = []
            for angle in angles:
                values = [
                    x for sign in ("", "-") for x in line(cells, protocol, model, f"rotation_{sign}{angle:g}", name)
                ]
                shown.append(f"{np.mean(values):.2f}" if values else "")
            if any(shown):
                rows.append([f"{model}: {'R2' if name == 'r2' else name}", *shown])
    return markdown(["", *(f"{angle:g}" for angle in angles)], rows)


def costs(cells: Cells, times: Path) -> str:
    with times.open() as file:
        timed = {row["model"]: row for row in csv.DictReader(file)}
    rows = []
    for model in dict.fromkeys(m for protocol in ("rotation", "clean") for m in models(cells, protocol)):
        found = [v for (_, m, _), seeds in cells.items() if m == model for v in seeds.values()]
        row = timed[model]
        trained = [
            trained_to(cells, model, name, scale) for name, scale in (("train_loss", 1), ("train_accuracy", 100))
        ]
        rows.append([model, f"{int(found[0]['parameters']):,}", row["ms"], row["fast_quarter"], *trained])
    batch = next(iter(timed.values()))["batch"]
    columns = ["", "parameters", f"ms a step of {batch} images, median", "lower quartile"]
    return markdown([*columns, "training loss, in rotations", "training accuracy, %"], rows)


def trained_to(cells: Cells, model: str, name: str, scale: float) -> str:
    """Return what training on rotations came to at its end, where that was measured."""
    seeds = next((v for (p, m, _), v in cells.items() if (p, m) == ("rotation", model)), {})
    values = [scale * v[name] for v in seeds.values() if name in v]
    return interval(values, 3 if scale == 1 else 1) if values else ""


def contents(path: Path) -> str:
    """Return the table of `code_alone.py`."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kinds = dict.fromkeys((row["hyper"], row["loss"]) for row in rows)
    table = []
    for kind in kinds:
        own = [row for row in rows if (row["hyper"], row["loss"]) == kind]
        percent = [interval([100 * float(row[name]) for row in own]) for name in ("accuracy", "swapped")]
        sizes = [interval([float(row[name]) for row in own], 3) for name in ("kept_length", "err_true")]
        usual = [row for row in rows if (row["hyper"], row["loss"]) == (kind[0], "paper")]
        paper = {row["seed"]: float(row["accuracy"]) for row in usual}
        gaps = [100 * (float(row["accuracy"]) - paper[row["seed"]]) for row in own if row["seed"] in paper]
        gap = "" if kind[1] == "paper" else interval(gaps)
        table.append([f"{kind[0]}, loss of the {kind[1]}", str(len(own)), percent[0], gap, percent[1], *sizes])
    columns = ["", "seeds", "accuracy, %", "minus the paper's loss", "with content of another image, %"]
    return markdown([*columns, "length of a kept capsule", "true error"], table)


def draw(cells: Cells, protocol: str) -> None:
    names = levels(cells, protocol)
    at = [float(level.rpartition("_")[2]) for level in names]
    series = {
        model: (at, [100 * float(np.mean(line(cells, protocol, model, level, "accuracy"))) for level in names])
        for model in models(cells, protocol)
    }
    label = "degrees" if "rotation" in names[0] else "pixels"
    figure = curves(series, title=f"Test accuracy, {protocol}", x_label=label, y_label="%")
    figure.savefig(HERE / f"{protocol}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="reduced")
    options = parser.parse_args()
    cells = read(HERE / "results" / f"{options.size}.csv")
    parts = {"code_alone": contents(HERE / "results" / "code_alone.csv")}
    parts |= {"costs": costs(cells, HERE / "results" / "times.csv"), "equivariance": equivariance(cells)}
    for protocol in dict.fromkeys(key[0] for key in cells):
        parts[protocol] = accuracies(cells, protocol)
        draw(cells, protocol)
    path = HERE / "README.md"
    text = path.read_text()
    for name, table in parts.items():
        mark = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(mark, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.DOTALL)
        print(f"\n{name}\n\n{table}")
    path.write_text(text)


if __name__ == "__main__":
    main()
