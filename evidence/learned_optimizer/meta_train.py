"""Make the shipped weights: meta-training on a CPU, each stage from a seed, and the choice on validation tasks.

    python evidence/learned_optimizer/meta_train.py lm-small first --seed 0     # and 1, and 2
    python evidence/learned_optimizer/meta_train.py lm-small choose
    python evidence/learned_optimizer/meta_train.py lm-small then
    python evidence/learned_optimizer/meta_train.py lm-small ship
    python evidence/learned_optimizer/meta_train.py metz19 first --seed 0
    python evidence/learned_optimizer/meta_train.py metz19 ship

A stage that was interrupted goes on from its checkpoint. Results of the choice: results/choice.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from sklearn.datasets import make_classification
from torch import Tensor

from lightning_methods import DigitsDataModule
from lightning_methods.learned_optimizer import ClassifierFamily, MetaTraining, TruncationSchedule
from lightning_methods.learned_optimizer.samples import samples_of
from lightning_methods.learned_optimizer.weights import Weights, load_weights, save_weights

HERE = Path(__file__).parent
RUNS = HERE / "runs"
PACKAGE = HERE.parents[1] / "lightning_methods" / "learned_optimizer" / "weights"
# (samples, inputs, of which informative, classes, clusters a class, separation)
SYNTHETIC = [
    (400, 8, 5, 2, 2, 1.0),
    (800, 16, 8, 3, 2, 1.5),
    (1500, 30, 10, 5, 1, 1.0),
    (600, 24, 12, 4, 2, 2.0),
    (2000, 50, 20, 10, 1, 1.5),
]


def digits() -> tuple[Tensor, Tensor]:
    """Return the training part of the digits; what is evaluated is another one."""
    data = DigitsDataModule(seed=0)
    data.setup("fit")
    return samples_of(data)


def synthetic(index: int) -> tuple[Tensor, Tensor]:
    samples, inputs, informative, classes, clusters, separation = SYNTHETIC[index]
    x, y = make_classification(
        samples,
        inputs,
        n_informative=informative,
        n_redundant=(inputs - informative) // 2,
        n_classes=classes,
        n_clusters_per_class=clusters,
        class_sep=separation,
        flip_y=0.02,
        random_state=100 + index,
    )
    x = torch.from_numpy(x).float()
    return (x - x.mean(0)) / x.std(0), torch.from_numpy(y).long()


def families(settings: dict[str, Any], max_parameters: int) -> list[ClassifierFamily]:
    """Return the digits, as often as all synthetic sets together, and those."""
    options = {**settings, "max_parameters": max_parameters}
    sets = [ClassifierFamily(*synthetic(i), **options, name=f"synthetic{i}") for i in range(len(SYNTHETIC))]
    return [ClassifierFamily(*digits(), **options, name="digits") for _ in SYNTHETIC] + sets


class Eval:
    """A task of the validation: a draw of a family that meta-training does not make."""

    def __init__(self, family: ClassifierFamily, draw: int) -> None:
        self.task = family.sample(1_000_000 + draw)
        self.name = self.task.name

    def sample(self, seed: int) -> Any:
        """Return the task."""
        return self.task


def evaluation_tasks(settings: dict[str, Any]) -> list[Eval]:
    every = families(settings, 8000)
    return [Eval(every[0], i) for i in range(2, 8)] + [Eval(f, i) for i, f in enumerate(every[len(SYNTHETIC) :])]


def schedule(value: Any) -> Any:
    return TruncationSchedule(**value) if isinstance(value, dict) else value


def build(name: str, stage: str, seed: int) -> tuple[MetaTraining, int]:
    config = yaml.safe_load((HERE / "meta_train.yaml").read_text())
    own = config[name][stage]
    steps = own["steps"] if stage == "then" else config[name]["seeds"][seed]
    settings = {k: schedule(v) for k, v in own["settings"].items()}
    start: dict[str, Any] = config[name]["architecture"]
    if stage == "then":
        start = {"start": str(RUNS / f"{name}_first_{chosen(name)}.json")}
    tasks = families(config["families"], own["max_parameters"])
    model = MetaTraining(
        tasks, **settings, **start, decay_steps=own.get("decay_steps", steps), steps_per_epoch=10, seed=seed
    )
    return model, steps


class Log(Callback):
    """Print and keep what every tenth outer step shows, with the CPU time so far, and write the weights."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Write a row."""
        row = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row |= {"step": int(module.outer_step), "cpu_seconds": round(time.process_time() - self.before, 1)}
        with self.path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["step"] % 50 == 0:
            trainer.save_checkpoint(self.path.with_suffix(".ckpt"))
            module.export(self.path.with_suffix(".json"))


def train(name: str, stage: str, seed: int) -> None:
    if stage == "then":
        seed = chosen(name)
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


def evaluate(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Return mean losses of the validation tasks over 100 and over 500 steps."""
    tasks = evaluation_tasks(settings)
    model = MetaTraining(tasks, start=str(path))
    losses = [model.evaluate(task, steps=500, seeds=1) for task in tasks]
    return {str(n): float(torch.stack([x[:, :n].mean() for x in losses]).mean()) for n in (100, 500)}


def choose(name: str) -> None:
    """Compare the seeds of the first stage by the mean of both horizons, and write the result."""
    config = yaml.safe_load((HERE / "meta_train.yaml").read_text())
    target = HERE / "results" / "choice.csv"
    target.parent.mkdir(exist_ok=True)
    done = target.is_file()
    with target.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(["weights", "seed", "outer_steps", "mean_100", "mean_500"])
        for seed, steps in config[name]["seeds"].items():
            found = evaluate(RUNS / f"{name}_first_{seed}.json", config["families"])
            writer.writerow([name, seed, steps, found["100"], found["500"]])
            print(name, seed, found)
            file.flush()


def ship(name: str) -> None:
    """Put the weights into the package, with what made them on their card."""
    config = yaml.safe_load((HERE / "meta_train.yaml").read_text())
    found = load_weights(RUNS / f"{name}_{config[name]['ships']}_{chosen(name)}.json")
    card = {
        **found.card,
        "horizon": config[name]["horizon"],
        "clock": config[name]["clock"],
        "tasks": sorted(set(found.card["tasks"])),
        "seeds_tried": len(config[name]["seeds"]),
        "command": f"python evidence/learned_optimizer/meta_train.py {name} ...",
        "measured": "evidence/learned_optimizer/README.md",
    }
    print(save_weights(PACKAGE / f"{name}.json", Weights(name, found.architecture, found.theta, card)))


def chosen(name: str) -> int:
    config = yaml.safe_load((HERE / "meta_train.yaml").read_text())
    if len(config[name]["seeds"]) == 1:
        return next(iter(config[name]["seeds"]))
    rows = list(csv.DictReader((HERE / "results" / "choice.csv").open()))
    own = [r for r in rows if r["weights"] == name]
    return int(min(own, key=lambda r: float(r["mean_100"]) + float(r["mean_500"]))["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["lm-small", "metz19"])
    parser.add_argument("stage", choices=["first", "choose", "then", "ship"])
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
