"""Choose the learning rate of the long runs, by validation images and a seed that `run.py` does not use.

    python evidence/ladder_capsule/choose.py

Runs that `results/choice.csv` already has are left out.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import replace

from run import CODE, PROTOCOLS, RESULTS, SIZES, UNIT, add, calm, data_of, finished, measured, networks, trained

RATES = (1e-2, 3e-3, 1e-3)
EPOCHS = 5  # half of those of `run.py`
SEED = 100
FIELDS = ["model", "lr", "seed", "parameters", "ms_step", "train_loss", "train_accuracy", "val_accuracy", "images"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds MNIST/raw")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    calm()
    path = RESULTS / "choice.csv"
    done = finished(path, "model", "lr")
    for rate in RATES:
        for name in reversed(networks(SIZES["long"])):
            if name in (UNIT, CODE) or (name, str(rate)) in done:
                continue
            size = replace(SIZES["long"], lr=rate, epochs=EPOCHS)
            data = data_of(size, options.root, SEED, PROTOCOLS["rotation"])
            model, about = trained(SEED, networks(size)[name], data, size.epochs, "cpu")
            data.setup("validate")
            _, accuracy, images = measured(model, data.val_dataloader(), "cpu")
            row = {"model": name, "lr": rate, "seed": SEED, **about, "val_accuracy": round(accuracy, 4)}
            add(path, [{**row, "images": images}], FIELDS)
            print(row, flush=True)


if __name__ == "__main__":
    main()
