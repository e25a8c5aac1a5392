"""Learned against tuned optimizers on a module and data of the user's, tuned and reported on different seeds."""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from lightning_methods.core._lightning import Callback, Trainer
from lightning_methods.errors import InvalidArgument, check_choice, did_you_mean
from lightning_methods.learned_optimizer.optimizer import LearnedOptimizer
from lightning_methods.report import curves

Make = Callable[[Iterable[Any], float], torch.optim.Optimizer]

BASELINES: dict[str, Make] = {
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "SGD momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
}
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass
class OptimizerRun:
    """One training.

    Attributes:
        optimizer, lr, seed: what and with which random numbers.
        purpose: `"tuning"` or `"report"`.
        mean_val, final_val: of the validation losses; 1e3 at most, and where they are no number.
        test: of the test split, where there is one.
        seconds: of the training, without validation.
        steps, val: validated after which steps, and to what.
    """

    optimizer: str
    lr: float
    seed: int
    purpose: str
    mean_val: float
    final_val: float
    test: float
    seconds: float
    steps: list[int] = field(default_factory=list)
    val: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """All trainings of a comparison.

    Attributes:
        runs: in the order of training.
        chosen: learning rate of each optimizer.
        target: validation loss that `steps_to_target` asks for.
    """

    runs: list[OptimizerRun]
    chosen: dict[str, float]
    target: float

    def reported(self, optimizer: str) -> list[OptimizerRun]:
        """Return the trainings of an optimizer that are reported."""
        return [run for run in self.runs if run.optimizer == optimizer and run.purpose == "report"]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return the columns and a row for each optimizer: means with 95% t-intervals over the seeds."""
        columns = [
            "optimizer",
            "lr",
            "mean val",
            "final val",
            "test",
            "steps to target",
            "seconds to target",
            "ms/step",
        ]
        rows = []
        for name, lr in self.chosen.items():
            runs = self.reported(name)
            reached = [_reached(run, self.target) for run in runs]
            per_step = [run.seconds / run.steps[-1] for run in runs]
            steps = [math.inf if r is None else float(r) for r in reached]
            rows.append(
                [name, "none" if math.isnan(lr) else f"{lr:g}"]
                + [interval([getattr(run, key) for run in runs]) for key in ("mean_val", "final_val", "test")]
                + [_middle(steps), _middle([s * p for s, p in zip(steps, per_step, strict=True)], ".2f")]
                + [f"{1000 * float(np.median(per_step)):.2f}"]
            )
        return columns, rows

    def figure(self) -> Any:
        """Return the mean validation losses over the steps."""
        lines = {}
        for name in self.chosen:
            runs = self.reported(name)
            losses = np.minimum(np.array([run.val for run in runs]), 1e3)
            lines[name] = (runs[0].steps, losses.mean(0))
        return curves(lines, title="Validation loss", x_label="steps", y_label="mean over seeds")

    def save(self, folder: str | Path) -> list[Path]:
        """Write runs.csv, table.csv and curves.png, and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f.name for f in fields(OptimizerRun)][:-2]
        columns, rows = self.table()
        _write(folder / "runs.csv", names, [list(astuple(run))[:-2] for run in self.runs])
        _write(folder / "table.csv", columns, rows)
        self.figure().savefig(folder / "curves.png", dpi=150)
        return [folder / name for name in ("runs.csv", "table.csv", "curves.png")]


def compare_optimizers(
    make_module: Callable[[], Any],
    datamodule: Any,
    *,
    weights: Sequence[str] = ("lm-small",),
    baselines: Sequence[str] = tuple(BASELINES),
    learning_rates: Sequence[float] = LEARNING_RATES,
    steps: int = 200,
    points: int = 20,
    tuning_seeds: Sequence[int] = (100, 101),
    seeds: Sequence[int] = tuple(range(10)),
    criterion: str = "mean_val",
    monitor: str = "val/loss",
    test_metric: str | None = "test/loss",
    target: float | None = None,
    progress: Callable[[str], Any] | None = None,
) -> Comparison:
    """Train with learned and with tuned optimizers and compare them fairly.

    The learning rate of each baseline is the one of the best criterion on `tuning_seeds`; what is reported comes from
    `seeds`. A learned optimizer is not tuned. The module's own optimizer is not used.

    Args:
        make_module: returns a new LightningModule, initialised from torch's global generator.
        datamodule: with training and validation, and for `test_metric` test data.
        weights: of learned optimizers.
        baselines: which of Adam, AdamW, SGD momentum and RMSprop.
        learning_rates: that baselines choose from.
        steps: of each training.
        points: validations of a training.
        tuning_seeds: that learning rates are chosen by.
        seeds: that are reported.
        criterion: `"mean_val"`: the mean of the validation losses; `"final_val"`: the last.
        monitor: the logged validation loss.
        test_metric: the logged test loss; None to test nothing.
        target: a validation loss to reach; by default the mean final one of the best baseline.
        progress: called with a line before each training.

    Raises:
        InvalidArgument: if a setting is out of range, an optimizer is unknown, or `monitor` is not logged.

    Example:
        >>> from lightning_methods import Classifier, DigitsDataModule
        >>> from lightning_methods.models import MLP
        >>> result = compare_optimizers(
        ...     lambda: Classifier(MLP(64, (16,))), DigitsDataModule(), baselines=["Adam"], learning_rates=[0.01],
        ...     steps=4, points=2, tuning_seeds=[1], seeds=[2])
        >>> sorted(result.chosen)
        ['Adam', 'lm-small']
    """
    check_choice("criterion", criterion, ("mean_val", "final_val"))
    if unknown := set(baselines) - set(BASELINES):
        raise InvalidArgument(f"There is no baseline {sorted(unknown)}. {did_you_mean(unknown.pop(), BASELINES)}")
    if steps < 1 or not 1 <= points <= steps or not seeds or (baselines and not (tuning_seeds and learning_rates)):
        raise InvalidArgument(
            f"steps={steps}, points={points}: positive numbers, and at least one seed and learning rate, are needed."
        )
    run = partial(_train, make_module, datamodule, steps=steps, points=points, monitor=monitor, test_metric=test_metric)
    runs: list[OptimizerRun] = []
    chosen: dict[str, float] = {}

    def add(name: str, make: Make, lr: float, seed: int, purpose: str) -> OptimizerRun:
        if progress is not None:
            progress(f"{name}, lr {lr:g}, seed {seed} ({purpose})")
        runs.append(run(name, make, lr, seed, purpose))
        return runs[-1]

    for name in baselines:
        found = {
            lr: float(np.mean([getattr(add(name, BASELINES[name], lr, s, "tuning"), criterion) for s in tuning_seeds]))
            for lr in learning_rates
        }
        chosen[name] = min(found, key=lambda lr: found[lr])
    made: dict[str, Make] = {n: BASELINES[n] for n in baselines}
    for name in weights:
        made[name] = partial(_learned, name)
        chosen[name] = math.nan
    for name, make in made.items():
        for seed in seeds:
            add(name, make, chosen[name], seed, "report")
    result = Comparison(runs, chosen, math.nan)
    finals = {n: float(np.mean([r.final_val for r in result.reported(n)])) for n in baselines or weights}
    result.target = min(finals.values()) if target is None else target
    return result


def interval(values: Sequence[float]) -> str:
    """Return the mean and its 95% t-interval as text.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        '2.0000 ± 2.4841'
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return f"{x.mean():.4f}"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return f"{x.mean():.4f} ± {half:.4f}"


class _Recorder(Callback):
    """The validation losses, and the time of training without them."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.steps: list[int] = []
        self.val: list[float] = []
        self.seconds, self.begun = 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.begun

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise InvalidArgument(
                f"The module logs no {self.monitor!r} in validation. "
                f"{did_you_mean(self.monitor, [str(k) for k in trainer.callback_metrics])}"
            )
        self.steps.append(trainer.global_step)
        self.val.append(float(value))


def _train(
    make_module: Callable[[], Any],
    datamodule: Any,
    name: str,
    make: Make,
    lr: float,
    seed: int,
    purpose: str,
    *,
    steps: int,
    points: int,
    monitor: str,
    test_metric: str | None,
) -> OptimizerRun:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        module = make_module()
        module.configure_optimizers = lambda: make(module.parameters(), lr)
        recorder = _Recorder(monitor)
        trainer = _quiet(max_steps=steps, callbacks=[recorder], interval=max(1, steps // points))
        trainer.fit(module, datamodule=datamodule)
        test = math.nan
        if test_metric is not None and purpose == "report":
            shown = trainer.test(module, datamodule=datamodule, verbose=False)[0]
            test = float(shown.get(test_metric, math.nan))
    val = [v if v <= 1e3 else 1e3 for v in recorder.val]
    return OptimizerRun(
        name, lr, seed, purpose, float(np.mean(val)), val[-1], test, recorder.seconds, recorder.steps, val
    )


def _quiet(max_steps: int, callbacks: list[Any], interval: int) -> Trainer:
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=interval,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _learned(weights: str, params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return LearnedOptimizer(params, weights=weights)


def _reached(run: OptimizerRun, target: float) -> int | None:
    return next((step for step, loss in zip(run.steps, run.val, strict=True) if loss <= target), None)


def _middle(values: Sequence[float], form: str = ".0f") -> str:
    """Return the median, and how many of the trainings got there, where not all did."""
    finite = [v for v in values if v < math.inf]
    middle = float(np.median(values))
    told = format(middle, form) if middle < math.inf else "never"
    return told if len(finite) == len(values) else f"{told} ({len(finite)} of {len(values)})"


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
