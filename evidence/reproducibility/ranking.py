"""How often the ranking of models by one seed is wrong, and how it changes between data sets and by tuning.

    python evidence/reproducibility/ranking.py --root data
    python evidence/reproducibility/ranking.py --root data --show      # the tables alone

Four networks on five small data sets, each trained with a default learning rate and with the best of four by
validation. Runs are kept in ledgers, so that it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from scipy import stats

from lightning_methods import SeedStreams, Study
from lightning_methods.models import MLP
from lightning_methods.reproducibility import ranking_stability

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

DATA = ("digits", "wine", "breast_cancer", "mnist", "cifar10")
MODELS = {
    "linear": {"hidden": []},
    "MLP 32": {"hidden": [32]},
    "MLP 256-256": {"hidden": [256, 256]},
    "MLP 256, dropout": {"hidden": [256], "dropout": 0.5},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DEFAULT_RATE = 1e-3
SOURCES = ("init", "split", "order", "augment", "dropout")


@functools.cache
def arrays(data: str, root: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return 1,500 images at 14x14 (MNIST) or 8x8 (CIFAR-10), None for a set of scikit-learn."""
    if data not in ("mnist", "cifar10"):
        return None
    from torchvision import datasets

    if data == "mnist":
        source = datasets.MNIST(root, train=True)
        x, y = source.data[:1500, None].float(), source.targets[:1500].numpy()
    else:  # folders of pictures, <root>/cifar10/train/<class>/*, the first 150 of each
        folder = datasets.ImageFolder(f"{root}/cifar10/train")
        places = [np.flatnonzero(np.asarray(folder.targets) == c)[:150] for c in range(10)]
        chosen = np.concatenate(places)
        x = torch.stack([torch.as_tensor(np.asarray(folder[int(i)][0])) for i in chosen]).permute(0, 3, 1, 2).float()
        y = np.asarray(folder.targets)[chosen]
    return torch.nn.functional.avg_pool2d(x, 2 if data == "mnist" else 4).flatten(1).numpy(), y


def train(seeds: dict[str, int], *, data: str, model: str, lr: float, root: str) -> dict[str, float]:
    """Train one network for 15 epochs and return its accuracies."""
    from modules import NoisyClassifier, SmallSet

    streams = SeedStreams(**seeds, fingerprint="off")
    streams.seed("split")
    parts = SmallSet(data, seeds["split"], arrays(data, root))
    x, y = parts.parts["train"].tensors
    streams.seed("init")
    net = MLP(x.shape[1], num_classes=int(y.max()) + 1, **MODELS[model]) if MODELS[model]["hidden"] else None
    net = net or torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    module = NoisyClassifier(net, noise=0.3, lr=lr, num_classes=int(y.max()) + 1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(max_epochs=15, accelerator="cpu", barebones=True, callbacks=[streams])
    trainer.fit(module, parts.train_dataloader())
    module.eval()
    with torch.no_grad():
        return {
            part: float((net(parts.parts[part].tensors[0]).argmax(1) == parts.parts[part].tensors[1]).float().mean())
            for part in ("val", "test")
        }


def study(args: argparse.Namespace, name: str, metric: str, replicates: int, entries: dict[str, dict[str, Any]]) -> Any:
    """Run one study and return its scores."""
    found = Study(
        name,
        metric=metric,
        vary=SOURCES,
        replicates=replicates,
        folder=f"{args.runs}/{name}",
        check_repeat=False,
        engine={"process": "reuse", "workers": args.workers},
    )
    for key, kwargs in entries.items():
        found.add(key, functools.partial(train, root=args.root, **kwargs))
    analysis = found.run(tell=lambda p: print(f"{name} {p.done}/{p.total} {p.error or ''}", flush=True))
    if any(run.status != "done" for _, run in analysis.rows):
        raise SystemExit("\n".join(analysis.problems))
    return {key: [x for _, x in sorted(analysis.scores[key].items())] for key in entries}


def measure(args: argparse.Namespace, data: str) -> list[dict[str, Any]]:
    """Return the test accuracies of all models on one data set, before and after tuning."""
    grid = {f"{m} at {lr:g}": {"data": data, "model": m, "lr": lr} for m in MODELS for lr in RATES}
    tuned = study(args, f"tune_{data}", "val", 2, grid)
    rates = {m: max(RATES, key=lambda lr, m=m: float(np.mean(tuned[f"{m} at {lr:g}"]))) for m in MODELS}
    rows = []
    for kind, chosen in (("default", dict.fromkeys(MODELS, DEFAULT_RATE)), ("tuned", rates)):
        entries = {m: {"data": data, "model": m, "lr": chosen[m]} for m in MODELS}
        scores = study(args, f"{kind}_{data}", "test", args.replicates, entries)
        rows += [
            {"data": data, "rate": kind, "model": m, "lr": chosen[m], "replicate": i, "accuracy": x}
            for m, values in scores.items()
            for i, x in enumerate(values)
        ]
    return rows


def tables(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Return what is found as Markdown and as numbers."""
    lines = ["| data | learning rate | " + " | ".join(MODELS) + " | one seed gives this order | and this winner |"]
    lines.append("|---" * (4 + len(MODELS)) + "|")
    order: dict[tuple[str, str], np.ndarray] = {}
    told: dict[str, Any] = {}
    for data in dict.fromkeys(r["data"] for r in rows):
        for kind in ("default", "tuned"):
            chosen = [r for r in rows if r["data"] == data and r["rate"] == kind]
            matrix = np.array([[float(r["accuracy"]) for r in chosen if r["model"] == m] for m in MODELS]).T
            stability = ranking_stability(matrix)
            order[data, kind] = matrix.mean(0)
            cells = [f"{100 * x.mean():.1f} ± {100 * x.std(ddof=1):.1f}" for x in matrix.T]
            share = f"{100 * stability.single_run_agrees:.0f}% | {100 * stability.single_run_winner:.0f}%"
            lines.append(f"| {data} | {kind} | " + " | ".join(cells) + f" | {share} |")
            told[f"{data} {kind}"] = {
                "single_run_agrees": stability.single_run_agrees,
                "single_run_winner": stability.single_run_winner,
                "kendall_tau_between_seeds": stability.kendall_tau,
            }
    names = list(dict.fromkeys(d for d, _ in order))
    for kind in ("default", "tuned"):
        taus = [_tau(order[a, kind], order[b, kind]) for i, a in enumerate(names) for b in names[:i]]
        told[f"tau_between_data_{kind}"] = float(np.mean(taus))
    told["tau_default_tuned"] = {d: _tau(order[d, "default"], order[d, "tuned"]) for d in names}
    return lines, told


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.kendalltau(a, b).statistic)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="data")
    parser.add_argument("--replicates", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--runs", default="runs/reproducibility", help="folder of the ledgers")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    file = HERE / "results" / "ranking.csv"
    if not args.show:
        rows = [row for data in args.data for row in measure(args, data)]
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(file, newline="", encoding="utf-8") as stored:
        lines, told = tables(list(csv.DictReader(stored)))
    print(*lines, json.dumps(told, indent=1), sep="\n")
    (HERE / "results" / "ranking.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
