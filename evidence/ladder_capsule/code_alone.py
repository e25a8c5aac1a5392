"""How much of the decision is in the code vector alone: which capsules are kept, and not what they hold.

    python evidence/ladder_capsule/code_alone.py     # five minutes of one core

Digits, the small configuration. After training, test images are classified once as they are and once with what the kept
capsules of another image hold, while the code vector, and with it every map, stays. Both losses, of the paper's text
and of the official code, see the same images, batches and first weights.
"""

from __future__ import annotations

import csv
import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_methods import LadderCapsuleNetwork, PoseDataModule

PATH = Path(__file__).parent / "results" / "code_alone.csv"
FIELDS = ["hyper", "loss", "seed", "accuracy", "swapped", "kept_length", "err_true"]
SMALL: dict[str, Any] = {"image_size": 8, "k": 16, "types": 8, "pose_dim": 8, "width": 32, "kernel_size": 3}
SMALL |= {"hidden": (32, 48, 64), "lr": 3e-3, "map_init": "unit"}


@torch.no_grad()
def measure(model: LadderCapsuleNetwork, data: PoseDataModule) -> dict[str, float]:
    """Return accuracies with their own and with other content, the mean length of kept capsules, the true error."""
    found = []
    for x, y in data.test_dataloader()[0]:
        pruned = model.pruning(model.capsules(x))
        out = model.head(pruned)
        other = model.head(pruned._replace(active=pruned.active.roll(1, 0)))
        true = out.errors[torch.arange(len(y)), y]
        right, swapped = (o.errors.argmin(1) == y for o in (out, other))
        found.append(torch.stack([right.float(), swapped.float(), pruned.active.norm(dim=-1).mean(1), true]))
    return dict(zip(FIELDS[3:], torch.cat(found, 1).mean(1).tolist(), strict=True))


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    done = set()
    if PATH.exists():
        with PATH.open() as file:
            done = {(row["hyper"], row["loss"], row["seed"]) for row in csv.DictReader(file)}
    for seed in range(5):
        for hyper, loss in itertools.product(("shared", "per_class"), ("paper", "code")):
            if (hyper, loss, str(seed)) in done:
                continue
            pl.seed_everything(seed, verbose=False)
            data = PoseDataModule("digits", train_rotation=(0, 0), test_rotations=(0,), seed=seed)
            model: Any = LadderCapsuleNetwork(hyper=hyper, loss=loss, **SMALL)
            trainer = pl.Trainer(max_epochs=12, accelerator="cpu", limit_val_batches=0, barebones=True)
            trainer.fit(model, data)
            data.setup("test")
            row = {"hyper": hyper, "loss": loss, "seed": seed}
            row |= {name: round(value, 4) for name, value in measure(model.eval(), data).items()}
            PATH.parent.mkdir(exist_ok=True)
            new = not PATH.exists()
            with PATH.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
