"""Make the shipped weights: meta-training on a CPU, each stage from a seed, and the choice on validation tasks.

    python evidence/learned_optimizer/meta_train.py lm-small first --seed 0     # and 1, and 2
    python evidence/learned_optimizer/meta_train.py lm-small then --seed 0      # and 1, and 2
    python evidence/learned_optimizer/meta_train.py lm-small long --seed 0      # and 1, and 2
    python evidence/learned_optimizer/meta_train.py lm-small whole --seed 0     # and 1, and 2
    python evidence/learned_optimizer/meta_train.py lm-small choose
    python evidence/learned_optimizer/meta_train.py lm-small ship
    python evidence/learned_optimizer/meta_train.py metz19 first --seed 0       # and 1, and 2
    python evidence/learned_optimizer/meta_train.py metz19 choose
    python evidence/learned_optimizer/meta_train.py metz19 ship

A stage that was interrupted goes on from its checkpoint. The choice rests on results/choice.csv and choice_tasks.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import run as evidence
import torch
import validate
import yaml
from lightning.pytorch import Callback, Trainer
from sklearn.datasets import make_classification
from torch import Tensor

from lightning_methods.learned_optimizer import ClassifierFamily, MetaTraining, TruncationSchedule
from lightning_methods.learned_optimizer.weights import Weights, load_weights, save_weights

HERE = Path(__file__).parent
RUNS = HERE / "runs"
PACKAGE = HERE.parents[1] / "lightning_methods" / "learned_optimizer" / "weights"
CONFIG = yaml.safe_load((HERE / "meta_train.yaml").read_text())
STAGES = ("first", "then", "long", "whole")
CHOICE = HERE / "results" / "choice.csv"


def digits() -> tuple[Tensor, Tensor]:
    """Return the training part of the digits as run.py divides them: what is reported there is on other images."""
    x, y = evidence.digits().train
    return x.unflatten(1, (1, 8, 8)), y


def synthetic(index: int, random_state: int) -> tuple[Tensor, Tensor]:
    """Return a set of Gaussian clusters, standardised; the small ones are soon overfitted."""
    samples, inputs, informative, classes, clusters, separation = CONFIG["synthetic"][index]
    x, y = make_classification(
        samples,
        inputs,
        n_informative=informative,
        n_redundant=(inputs - informative) // 2,
        n_classes=classes,
        n_clusters_per_class=clusters,
        class_sep=separation,
        flip_y=0.02,
        random_state=random_state + index,
    )
    x = torch.from_numpy(x).float()
    return (x - x.mean(0)) / x.std(0), torch.from_numpy(y).long()


def families(name: str, max_parameters: int, random_state: int = 100, **settings: Any) -> list[ClassifierFamily]:
    """Return the digits, as often as all synthetic sets together, and those; or the digits alone."""
    own = CONFIG["families"][name]
    options = {**own["settings"], "max_parameters": max_parameters, **settings}
    count = len(CONFIG["synthetic"]) if own["synthetic"] else 0
    sets = [ClassifierFamily(*synthetic(i, random_state), **options, name=f"synthetic{i}") for i in range(count)]
    return [ClassifierFamily(*digits(), **options, name="digits") for _ in range(max(count, 1))] + sets


def schedule(value: Any) -> Any:
    return TruncationSchedule(**value) if isinstance(value, dict) else value


def build(name: str, stage: str, seed: int) -> tuple[MetaTraining, int]:
    own = CONFIG[name][stage]
    settings = {k: schedule(v) for k, v in own["settings"].items()}
    start: dict[str, Any] = CONFIG[name]["architecture"]
    if before(name, stage, seed) is not None:
        start = {"start": str(RUNS / "{}_{}_{}.json".format(name, *before(name, stage, seed)))}
    tasks = families(own["family"], own["max_parameters"])
    if "large" in own:  # a fifth of the episodes
        tasks += families(own["family"], **own["large"])[:: round(len(tasks) / 5)]
    return MetaTraining(tasks, **settings, **start, steps_per_epoch=10, seed=seed), own["steps"]


class Log(Callback):
    """Keep the mean of every ten outer steps with the CPU time so far, and write checkpoint and weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = path.with_suffix(".jsonl").read_text().splitlines() if path.with_suffix(".ckpt").is_file() else []
        self.before = time.process_time() - (json.loads(rows[-1])["cpu_seconds"] if rows else 0.0)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Write a row."""
        row = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row |= {"step": int(module.outer_step), "cpu_seconds": round(time.process_time() - self.before, 1)}
        with self.path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["step"] % 50 < 10:  # after a resumption epochs end at other steps
            trainer.save_checkpoint(self.path.with_suffix(".ckpt"))
            module.export(self.path.with_suffix(".json"))


def train(name: str, stage: str, seed: int) -> None:
    path = RUNS / f"{name}_{stage}_{seed}"
    RUNS.mkdir(parents=True, exist_ok=True)
    model, steps = build(name, stage, seed)
    checkpoint = path.with_suffix(".ckpt")
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Log(path)],
        default_root_dir=RUNS,
    )
    trainer.fit(model, ckpt_path=str(checkpoint) if checkpoint.is_file() else None, weights_only=True)
    model.export(path.with_suffix(".json"))
    print(path.with_suffix(".json"))


def choose(name: str) -> None:
    """Compare what was made on the validation tasks at 200 and 2,000 steps, and in wide networks, under the guard."""
    made = [RUNS / f"{name}_{candidate}.json" for candidate in CONFIG[name]["candidates"]]
    for guard in CONFIG[name]["guards"]:
        own = validate.compare(validate.tasks(), made, guard, validate.LONG)
        wide = validate.compare(validate.wide_tasks(), made, guard, validate.WIDE)
        for path, rows, wide_rows in zip(made, own, wide, strict=True):
            place = {"weights": path.stem, **guard, **spent(path)}
            means = {f"mean_{validate.SHORT}": validate.overall(rows, "first")}
            means |= {f"mean_{validate.LONG}": validate.overall(rows, "mean"), "last": validate.overall(rows, "last")}
            means |= {"wide": validate.overall(wide_rows, "mean")}
            validate.write(CHOICE, [place | {column: f"{value:.4f}" for column, value in means.items()}])
            validate.write(CHOICE.with_stem("choice_tasks"), [place | row for row in rows + wide_rows])
            print(place, means, flush=True)


def spent(path: Path) -> dict[str, float]:
    """Return the outer steps and seconds of the stages that led to a file."""
    name, stage, seed = path.stem.split("_")
    total = {"outer_steps": 0, "cpu_seconds": 0.0}
    while True:
        last = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])
        total = {
            "outer_steps": total["outer_steps"] + last["step"],
            "cpu_seconds": total["cpu_seconds"] + last["cpu_seconds"],
        }
        if before(name, stage, seed) is None:
            return total
        stage, seed = before(name, stage, seed)
        path = RUNS / f"{name}_{stage}_{seed}.json"


def before(name: str, stage: str, seed: Any) -> Any:
    """Return the stage and the seed that a stage goes on from, None where it begins anew."""
    given = CONFIG[name][stage].get("from")
    return given and (given["stage"], given.get("seed", seed))


def chosen(name: str) -> dict[str, str]:
    """Return the row of the least product of three means (200 steps, 2,000, wide), or that of what is named to ship."""
    wanted = f"{name}_{CONFIG[name].get('shipped', '')}"
    own = [row for row in csv.DictReader(CHOICE.open()) if row["weights"].startswith(wanted)]
    return min(own, key=lambda row: float(row["mean_200"]) * float(row["mean_2000"]) * float(row["wide"]))


def ship(name: str) -> None:
    """Put the chosen weights into the package, with what made them on their card."""
    row = chosen(name)
    found = load_weights(RUNS / f"{row['weights']}.json")
    card = {
        **found.card,
        "outer_steps": int(row["outer_steps"]),
        "cpu_seconds": round(float(row["cpu_seconds"])),
        "clock": int(row["clock"]),
        "width": int(row["width"]),
        "tasks": sorted(set(found.card["tasks"])),
        "seeds_tried": len(CONFIG[name]["seeds"]),
        "command": f"python evidence/learned_optimizer/meta_train.py {name} ...",
        "measured": "evidence/learned_optimizer/README.md",
    }
    print(save_weights(PACKAGE / f"{name}.json", Weights(name, found.architecture, found.theta, card)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["lm-small", "metz19"])
    parser.add_argument("stage", choices=[*STAGES, "choose", "ship"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "choose":
        choose(args.name)
    elif args.stage == "ship":
        ship(args.name)
    else:
        train(args.name, args.stage, args.seed)


if __name__ == "__main__":
    main()
