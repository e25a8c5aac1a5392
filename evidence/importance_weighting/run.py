"""Measure again whether importance weights keep their effect, with several seeds.

python evidence/importance_weighting/run.py --part logistic      half a minute
python evidence/importance_weighting/run.py --part digits        some five minutes
python evidence/importance_weighting/run.py --part exponents     likewise
python evidence/importance_weighting/run.py --part mnist         half an hour; reads --root, default ./data
python evidence/importance_weighting/run.py --part cifar10       an hour and a half at the reduced size
python evidence/importance_weighting/run.py --part cifar10 --full --device cuda    the paper's network and data

Writes `results/<part>.json`; `tables.py` makes the tables and figures of it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import heads
import torch

HERE = Path(__file__).parent


def write(part: str, args: argparse.Namespace, numbers: dict[str, Any], seconds: float) -> None:
    settings = {**vars(args), "part": part, "torch": torch.__version__, "seconds": round(seconds)}
    settings.pop("root")
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps({"settings": settings, "results": rounded(numbers)}, indent=1)
    (HERE / "results" / f"{part}.json").write_text(text + "\n")


def started(args: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Return what an earlier run with these settings has left, and its seconds; it goes on from there."""
    path = HERE / "results" / f"{args.part}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"settings": {}, "results": {}}
    same = all(kept["settings"].get(k) == v for k, v in vars(args).items() if k not in ("root", "seeds"))
    return (kept["results"], kept["settings"]["seconds"]) if same else ({}, 0.0)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None  # a head that has diverged
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["logistic", "digits", "exponents", "mnist", "cifar10"], required=True)
    parser.add_argument("--root", default="data", help="folder of the data sets; default ./data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, help="default 600 for digits and exponents, 100 for MNIST, 80 for CIFAR-10"
    )
    parser.add_argument("--images", type=int, default=250, help="of each class of CIFAR-10, unless --full")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate on CIFAR-10")
    parser.add_argument("--every", type=int, default=5, help="epochs between measurements on CIFAR-10")
    parser.add_argument("--full", action="store_true", help="CIFAR-10 at the paper's size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    if args.part == "logistic":
        numbers = heads.logistic(args.seeds)
    elif args.part == "exponents":
        args.epochs = args.epochs or 600
        numbers = heads.exponents(args.seeds, args.epochs, args.device)
    elif args.part == "cifar10":
        import images

        args.epochs = args.epochs or 80
        results, before = started(args)
        images.cifar10(args, results, lambda n: write(args.part, args, n, before + time.monotonic() - start))
        return
    else:
        args.epochs = args.epochs or (600 if args.part == "digits" else 100)
        numbers = heads.images(args.part, args.root, args.seeds, args.epochs, args.device)
    write(args.part, args, numbers, time.monotonic() - start)


if __name__ == "__main__":
    main()
