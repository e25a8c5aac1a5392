"""Measure RoG on networks that memorised wrong labels, beside the softmax, LDA and the released code's estimator.

python evidence/rog/run.py --data digits --seeds 10 11 12 13 14       some ten minutes of one core
python evidence/rog/run.py --data mnist                               5,000 training images; half an hour of one core
python evidence/rog/run.py --data cifar10 --device gpu                the paper's data, a residual network
python evidence/rog/report.py                                         tables and figures of README.md

Each network is trained once and kept under `runs/rog`; every classifier is then measured on that same network. Cells
that `results/<data>.json` already has are kept, so that an interrupted run goes on; `--again` measures them anew on the
networks that were kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from networks import CHOSEN, noisy, quiet, trained
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import RobustGenerativeClassifier

HERE = Path(__file__).parent
CONDITIONS = [
    ("uniform", 0.6),
    ("uniform", 0.4),
    ("uniform", 0.2),
    ("pair_flip", 0.4),
    ("pair_flip", 0.2),
    ("uniform", 0.0),
]
# arm -> arguments of the callback
ARMS: dict[str, dict[str, Any]] = {
    "sample": {"estimator": "sample"},
    "official": {"estimator": "official"},
    "robust": {"support_fraction": None},
    "ours": {},
}


class WithTruth(TensorDataset):
    """Samples with their given labels that also know the right ones."""

    def __init__(self, given: TensorDataset, right: Tensor) -> None:
        super().__init__(*given.tensors)
        self.true_targets = right


def measure(args: argparse.Namespace, seed: int, kind: str, rate: float) -> dict[str, Any]:
    """Train once, then test with every arm on the same network."""
    parts, right = noisy(args, seed, kind, rate)
    model, best_epoch, seconds = trained(args, seed, kind, rate, parts)
    start = time.monotonic()
    train, validation = (WithTruth(part, labels) for part, labels in zip(parts[:2], right, strict=True))
    loaders = {"train": DataLoader(train, 500), "validation": DataLoader(validation, 500)}
    blocks = [f"net.{name}" for name, _ in model.net.named_children() if name.startswith("layer")]
    # beside the layers that the callback takes by itself, the last two alone: the paper's choice is among late layers
    sets = {"": None, "last two, ": blocks[-2:]}
    arms = {
        prefix + arm: RobustGenerativeClassifier(layers, log_prefix=prefix + arm, **loaders, **settings)
        for prefix, layers in sets.items()
        for arm, settings in ARMS.items()
    }
    tester = Trainer(callbacks=list(arms.values()), **quiet(args))
    (result,) = tester.test(model, DataLoader(parts[2], 500), verbose=False)
    (fit,) = Trainer(**quiet(args)).test(model, DataLoader(train, 500), verbose=False)
    ours = arms["ours"]
    accuracy = {"softmax": result["ours/test/softmax"], "best epoch": best_epoch}
    accuracy |= {arm: result[f"{arm}/test/accuracy"] for arm in arms}
    accuracy["ours or softmax"] = accuracy["softmax" if ours.prefers_softmax else "ours"]
    return {
        "kind": kind, "rate": rate, "seed": seed, "fit": fit["test/accuracy"], "accuracy": accuracy,
        "layers": {name: result[f"ours/test/layer/{name}"] for name in ours.ensemble.names},
        "weights": dict(zip(ours.ensemble.names, ours.ensemble.weights.tolist(), strict=True)),
        "support_fraction": ours.chosen_fraction, "prefers_softmax": ours.prefers_softmax,
        "noise_rate": ours.audit.noise_rate, **ours.audit.quality(),
        "seconds_training": seconds, "seconds_arms": time.monotonic() - start,
    }  # fmt: skip


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(CHOSEN), default="digits")
    parser.add_argument("--root", default="data", help="folder of the data sets; default ./data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer, cpu or gpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, on the networks kept")
    args = parser.parse_args()
    chosen = CHOSEN[args.data]
    args.epochs, args.batch, args.lr = args.epochs or chosen["epochs"], chosen["batch"], chosen["lr"]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.device == "cpu":
        torch.set_num_threads(1)
    path = args.results / f"{args.data}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in args.seeds:
        for kind, rate in CONDITIONS:
            same = [r for r in runs if (r["kind"], r["rate"], r["seed"]) == (kind, rate, seed)]
            if same and not args.again:
                continue
            found = rounded(measure(args, seed, kind, rate))
            runs = [r for r in runs if r not in same] + [found]
            told = {k: round(100 * v, 1) for k, v in found["accuracy"].items()}
            print(seed, kind, rate, f"fit {100 * found['fit']:.1f}", told, flush=True)
            settings = {k: getattr(args, k) for k in ("data", "epochs", "batch", "lr", "device", "precision")}
            path.parent.mkdir(exist_ok=True)
            text = json.dumps({"settings": settings, "torch": torch.__version__, "runs": runs}, indent=1)
            path.write_text(text + "\n")


if __name__ == "__main__":
    main()
