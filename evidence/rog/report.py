"""Write the tables of README.md and the figures from `results/*.json`.

python evidence/rog/report.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from lightning_methods.report import curves

HERE = Path(__file__).parent
CONDITIONS = [(kind, rate) for kind in ("uniform", "pair_flip") for rate in (0.6, 0.4, 0.2)] + [("uniform", 0.0)]
NAMES = {
    "softmax": "softmax, last epoch",
    "best epoch": "softmax, best epoch (oracle)",
    "sample": "LDA",
    "official": "released estimator",
    "robust": "half support",
    "ours": "ours",
    "ours or softmax": "ours or softmax, as chosen",
}
PAIRS = [
    ("ours", "softmax"),
    ("ours", "sample"),
    ("ours", "official"),
    ("ours", "robust"),
    ("ours or softmax", "softmax"),
]
FOUND = {
    "true_noise_rate": "wrong labels",
    "noise_rate": "suspected",
    "suspects_precision": "of these wrong",
    "suspects_recall": "of the wrong suspected",
    "precision_at_wrong": "wrong among as many of the surest as are wrong",
}
Groups = dict[str, list[dict[str, Any]]]


def groups_of(runs: list[dict[str, Any]]) -> Groups:
    groups = {}
    for kind, rate in CONDITIONS:
        own = [r for r in runs if (r["kind"], r["rate"]) == (kind, rate)]
        if own:
            groups["none" if rate == 0 else f"{kind.replace('pair_', '')} {rate:.0%}"] = own
    return groups


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    more = f"±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{more}"


def interval(values: list[float]) -> str:
    """Return mean and 95% interval (Student's t) in points."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = 100 * float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def accuracy_table(groups: Groups, prefix: str = "") -> str:
    names = [n for n in NAMES if f"{prefix}{n}" in next(iter(groups.values()))[0]["accuracy"]]
    head = ["wrong labels", *([] if prefix else ["fit of the noisy labels"]), *(NAMES[n] for n in names)]
    rows = []
    for title, group in groups.items():
        fit = [] if prefix else [f"{100 * statistics.fmean(r['fit'] for r in group):.1f}"]
        rows.append([title, *fit, *(spread([r["accuracy"][prefix + n] for r in group]) for n in names)])
    return table(head, rows)


def paired_table(groups: Groups) -> str:
    rows = [
        [title, *(interval([r["accuracy"][a] - r["accuracy"][b] for r in group]) for a, b in PAIRS)]
        for title, group in groups.items()
    ]
    return table(["wrong labels", *(f"{a} - {NAMES[b]}" for a, b in PAIRS)], rows)


def audit_table(groups: Groups) -> str:
    rows = []
    for title, group in groups.items():
        cells = [[r[name] for r in group if name in r] for name in FOUND]
        chosen = [str(r["support_fraction"] or "half") + ", softmax" * r["prefers_softmax"] for r in group]
        rows.append([title, *(spread(values) if values else "" for values in cells), "; ".join(chosen)])
    return table(["noise", *FOUND.values(), "support chosen, by seed"], rows)


def layer_table(groups: Groups) -> str:
    layers = list(next(iter(groups.values()))[0]["layers"])
    rows = [
        [
            title,
            *(
                f"{spread([r['layers'][n] for r in group])} ({statistics.fmean(r['weights'][n] for r in group):.2f})"
                for n in layers
            ),
        ]
        for title, group in groups.items()
    ]
    return table(["wrong labels", *(f"`{n}` (weight)" for n in layers)], rows)


def picture(title: str, groups: Groups, path: Path) -> None:
    uniform = {0.0: groups.get("none"), **{r: groups.get(f"uniform {r:.0%}") for r in (0.2, 0.4, 0.6)}}
    known = {rate: group for rate, group in uniform.items() if group}
    lines = {
        NAMES[name]: (list(known), [100 * statistics.fmean(r["accuracy"][name] for r in g) for g in known.values()])
        for name in ("softmax", "sample", "official", "ours")
    }
    figure = curves(
        lines,
        title=f"{title}: classifiers on one network",
        x_label="share of wrong training labels (uniform)",
        y_label="right on the test set, %",
    )
    figure.savefig(path, dpi=150)


def section(data: str) -> str:
    content = json.loads((HERE / "results" / f"{data}.json").read_text())
    groups, settings = groups_of(content["runs"]), content["settings"]
    title = {"digits": "scikit-learn's digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}[data]
    picture(title, groups, HERE / f"{data}.png")
    seeds = sorted({r["seed"] for r in content["runs"]})
    minutes = sum(r["seconds_training"] + r["seconds_arms"] for r in content["runs"]) / 60
    told = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in ("data",))
    return "\n\n".join(
        [
            f"![Test accuracy of four classifiers on {title} by the share of wrong labels]({data}.png)",
            f"Seeds {', '.join(map(str, seeds))}. Test accuracy in percent, mean ± standard deviation over the seeds:",
            accuracy_table(groups),
            "Paired differences in points, with 95% intervals over the seeds:",
            paired_table(groups),
            "What the audit says of the training labels, in percent:",
            audit_table(groups),
            "Test accuracy of each layer's classifier alone, with its mean weight in `ours`:",
            layer_table(groups),
            "All of it from the last two hidden layers alone:",
            accuracy_table(groups, "last two, "),
            f"Settings: {told}; torch {content['torch']}; {minutes:.0f} minutes in all.",
        ]
    )


def main() -> None:
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for path in sorted((HERE / "results").glob("*.json")):
        begin, end = f"<!-- {path.stem}:begin -->", f"<!-- {path.stem}:end -->"
        found = f"{begin}\n\n{section(path.stem)}\n\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: found, text, flags=re.DOTALL)  # noqa: B023
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
