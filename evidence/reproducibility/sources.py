"""How much of the variation each source brings, on digits and MNIST.

    python evidence/reproducibility/sources.py --data digits
    python evidence/reproducibility/sources.py --data mnist --root data
    python evidence/reproducibility/sources.py --data digits --design sobol --replicates 16

Runs are kept in the ledger under `runs/`, so that a study that was stopped goes on; results are written to `results/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

from lightning_methods import Study

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--design", choices=["one_at_a_time", "sobol"], default="one_at_a_time")
    parser.add_argument("--replicates", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runs", default="runs/reproducibility", help="folder of the ledger")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    name = f"{args.data}_{args.design}"
    study = Study(
        name,
        # of MNIST 30,000 images are held out, for less noise of the test set
        metric="test/accuracy" if args.data == "digits" else "val/accuracy",
        stage="fit+test" if args.data == "digits" else "fit+validate",
        vary=["init", "split", "order", "augment", "dropout"],
        design=args.design,
        replicates=args.replicates,
        folder=f"{args.runs}/{name}",
        engine={"workers": args.workers, "timeout": 600},
    )
    overrides = [f"--data.init_args.root={args.root}"] if args.data == "mnist" else []
    study.add("MLP", config=str(HERE / f"{args.data}.yaml"), overrides=overrides)
    study.run(tell=lambda p: print(f"{p.done}/{p.total} {p.error or ''}", flush=True))
    files = study.report()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    shutil.copy(next(f for f in files if f.name == "sources.png"), HERE / f"{name}.png")
    shutil.copy(next(f for f in files if f.name == "runs.csv"), results / f"{name}.csv")
    found = json.loads(next(f for f in files if f.name == "report.json").read_text(encoding="utf-8"))
    kept = {k: found[k] for k in ("components", "sobol", "pipelines", "problems", "seconds")}
    (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
