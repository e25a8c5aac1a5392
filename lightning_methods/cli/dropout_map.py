"""`dropout-map`: which pass of a module needs the noise of its dropouts, from trainings over a grid of both rates."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_methods.augmented_dropout import AugmentedDropout
from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.cli.app import MethodsCLI, ReadableParser, as_process_arguments
from lightning_methods.errors import InvalidArgument, did_you_mean
from lightning_methods.report import curves, heatmap

_FIELDS = ("seed", "p_forward", "p_backward", "value")
_KEYS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
_QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")

Runs = dict[tuple[int, float, float], float]


def draw(argv: Sequence[str]) -> int:
    """Train the module of a configuration at every pair of rates, and draw the heat map of what the validation gives.

    Args:
        argv: the arguments after `dropout-map`; those that it does not know go to every training, as for `fit`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read, or the validation gives no such metric.

    Example:
        >>> draw(["--config", "config.yaml", "--metric", "val/loss"])  # doctest: +SKIP
        0
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    for name in ("p_forward", "p_backward"):
        for rate in getattr(args, name):
            if not 0 <= rate <= 1:
                raise InvalidArgument(f"--{name.replace('_', '-')} {rate}: numbers from 0 to 1 are needed.")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    _same_study(folder / "study.json", args, rest)
    runs = _read(folder / "runs.csv")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # one line a training is enough
    for seed in args.seeds:
        for p_forward in args.p_forward:
            for p_backward in args.p_backward:
                key = (seed, p_forward, p_backward)
                if key not in runs:
                    runs[key] = _value(args, rest, *key)
                    _append(folder / "runs.csv", (*key, runs[key]))
                    print(f"seed {seed}, forward {p_forward:g}, backward {p_backward:g}: {runs[key]:.5g}", flush=True)
    wanted = {(s, f, b): runs[s, f, b] for s in args.seeds for f in args.p_forward for b in args.p_backward}
    print(*_summary(wanted, args), sep="\n")
    print(*_figures(wanted, args, folder), folder / "runs.csv", sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} dropout-map",
        description="Train at every pair of forward and backward rates, and draw the heat map of a validation metric. "
        "Runs that the output folder already has are not repeated. Other options go to the trainings, as for `fit`.",
    )
    parser.add_argument("--config", action="append", required=True, help="YAML as for fit; may be given several times")
    parser.add_argument(
        "--p-forward", nargs="+", type=float, default=[0.0, 0.2, 0.4, 0.6], help="default 0 0.2 0.4 0.6"
    )
    parser.add_argument("--p-backward", nargs="+", type=float, default=[0.0, 0.2, 0.4, 0.6], help="the same")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--metric", default="val/loss", help="as the validation logs it; default val/loss")
    parser.add_argument("--mode", choices=["min", "max"], default="min", help="which value is better; default min")
    parser.add_argument("--output", default="dropout_map", help="folder of figures and CSV; default ./dropout_map")
    return parser


def _value(args: argparse.Namespace, rest: list[str], seed: int, p_forward: float, p_backward: float) -> float:
    """Train once and return the metric."""
    quiet = [f"--trainer.{name}=false" for name in _QUIET]
    with tempfile.TemporaryDirectory() as folder, as_process_arguments([]):
        configs = list(_configs(args.config, Path(folder)))
        cli = MethodsCLI(
            args=[*configs, *quiet, *rest, f"--seed_everything={seed}"],
            run=False,
            save_config_callback=None,
            parser_class=ReadableParser,
            parser_kwargs={"prog": f"{PROGRAM} dropout-map"},
        )
    trainer: Any = cli.trainer
    callbacks = [c for c in trainer.callbacks if isinstance(c, AugmentedDropout)]
    if not callbacks:
        callbacks = [AugmentedDropout()]
        trainer.callbacks += callbacks
    for callback in callbacks:  # one of the configuration keeps its other settings
        callback.p_forward, callback.p_backward, callback.ratio = p_forward, p_backward, 1.0
    trainer.fit(cli.model, datamodule=cli.datamodule)
    found: dict[str, float] = {}
    for values in trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False):
        found |= values
    if args.metric not in found:
        raise InvalidArgument(f"The validation gives no {args.metric!r}. {did_you_mean(args.metric, found)}")
    return float(found[args.metric])


def _configs(paths: list[str], folder: Path) -> Iterator[str]:
    """Yield options with copies of the configurations that hold what a run without subcommand takes."""
    for i, content in enumerate(_contents(paths)):
        copy = folder / f"{i}.yaml"
        copy.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield f"--config={copy}"


def _means(runs: Runs) -> dict[tuple[float, float], list[float]]:
    """Return the values of each cell over the seeds."""
    cells: dict[tuple[float, float], list[float]] = {}
    for (_, p_forward, p_backward), value in runs.items():
        cells.setdefault((p_forward, p_backward), []).append(value)
    return cells


def _families(cells: dict[tuple[float, float], list[float]]) -> dict[str, dict[tuple[float, float], list[float]]]:
    def family(p_forward: float, p_backward: float) -> str:
        if p_forward == p_backward:
            return "standard dropout" if p_forward else "no dropout"
        if not p_backward:
            return "forward pass only"
        return "augmented" if p_forward else "backward pass only"

    found: dict[str, dict[tuple[float, float], list[float]]] = {}
    for rates, values in cells.items():
        found.setdefault(family(*rates), {})[rates] = values
    return found


def _summary(runs: Runs, args: argparse.Namespace) -> Iterator[str]:
    best = max if args.mode == "max" else min
    yield f"best {args.metric} of each family (mean and standard deviation over {len(args.seeds)} seeds):"
    for family, cells in _families(_means(runs)).items():
        finite = {rates: values for rates, values in cells.items() if all(map(math.isfinite, values))}
        if not finite:
            yield f"  {family:<20} diverged"
            continue
        rates = best(finite, key=lambda r, finite=finite: statistics.fmean(finite[r]))  # type: ignore[misc]
        values = finite[rates]
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        at = f"forward {rates[0]:g}, backward {rates[1]:g}"
        yield f"  {family:<20} {statistics.fmean(values):.5g}{spread}   at {at} (best of {len(cells)})"
    yield "the best of many is chosen on what it is judged by here: judge the chosen rates on test data"


def _figures(runs: Runs, args: argparse.Namespace, folder: Path) -> list[Path]:
    cells = {rates: statistics.fmean(values) for rates, values in _means(runs).items()}
    finite = [v for v in cells.values() if math.isfinite(v)]
    if not finite:
        raise InvalidArgument(
            f"Every training diverged ({args.metric} is not finite), so that there is nothing to draw."
        )
    matrix = [
        [cells[f, b] if math.isfinite(cells[f, b]) else math.nan for b in args.p_backward] for f in args.p_forward
    ]
    figure = heatmap(
        matrix,
        [f"{p:g}" for p in args.p_forward],
        [f"{p:g}" for p in args.p_backward],
        title="Noise of both passes",
        value_label=f"{args.metric}, mean of {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}",
        x_label="rate of the backward pass",
        y_label="rate of the forward pass",
    )
    paths = [folder / "heatmap.png"]
    figure.savefig(paths[0], dpi=150)
    series: dict[str, tuple[object, object]] = {}
    for family, members in _families(_means(runs)).items():
        points = sorted((max(rates), cells[rates]) for rates in members if math.isfinite(cells[rates]))
        if family not in ("augmented", "no dropout") and points:
            series[family] = [rate for rate, _ in points], [value for _, value in points]
    if series:
        paths.append(folder / "curves.png")
        reference = {"no dropout": cells[0.0, 0.0]} if math.isfinite(cells.get((0.0, 0.0), math.nan)) else None
        curves(
            series, title="Noise of one pass and of both", x_label="rate", y_label=args.metric, reference=reference
        ).savefig(paths[1], dpi=150)
    return paths


def _same_study(path: Path, args: argparse.Namespace, rest: list[str]) -> None:
    """Remember what is studied, and refuse to mix the runs of two studies."""
    study = {"configs": _contents(args.config), "options": rest, "metric": args.metric}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != study:
        raise InvalidArgument(
            f"{path.parent} holds runs of other configurations, options or another metric. Give another --output, or "
            f"remove that folder."
        )
    path.write_text(json.dumps(study, indent=1), encoding="utf-8")


def _contents(paths: list[str]) -> list[Any]:
    contents = []
    for path in paths:
        try:
            config: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InvalidArgument(
                f"{path} cannot be read as a configuration: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(config, dict):
            raise InvalidArgument(f"{path} is no configuration; a mapping with model, data and trainer is needed.")
        # what else a configuration of `fit` holds belongs to that command alone
        contents.append({key: config[key] for key in _KEYS if key in config})
    return contents


def _read(path: Path) -> Runs:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(int(r["seed"]), float(r["p_forward"]), float(r["p_backward"])): float(r["value"]) for r in rows}


def _append(path: Path, row: Sequence[object]) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_FIELDS)
        writer.writerow(row)
