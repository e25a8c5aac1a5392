"""`compare-optimizers`: learned against tuned optimizers on the module and the data of a configuration."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence

import torch

from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.cli.app import build
from lightning_methods.errors import InvalidArgument
from lightning_methods.learned_optimizer.comparison import BASELINES, LEARNING_RATES, compare_optimizers


def compare(argv: Sequence[str]) -> int:
    """Train with each optimizer, print a table, and write the trainings, the table and the curves.

    Args:
        argv: the arguments after `compare-optimizers`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read, or nothing is logged under the metric's name.

    Example:
        >>> compare(["--config", "configs/learned_optimizer/digits.yaml", "--steps", "200"])  # doctest: +SKIP
        0
    """
    args = _parser().parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a line a training is enough
    torch.manual_seed(0)
    _, data = build(args.config)
    if data is None:
        raise InvalidArgument(f"{args.config} has no data beside the model; a section `data` is needed.")
    result = compare_optimizers(
        lambda: build(args.config)[0],
        data,
        weights=args.weights,
        baselines=args.baselines,
        learning_rates=args.learning_rates,
        steps=args.steps,
        points=min(args.points, args.steps),
        seeds=range(args.seeds),
        tuning_seeds=range(1000, 1000 + args.tuning_seeds),
        criterion=args.criterion,
        monitor=args.monitor,
        test_metric=args.test_metric or None,
        target=None if math.isnan(args.target) else args.target,
        progress=print,
    )
    _show(result, args.steps)
    print(*result.save(args.output), sep="\n")
    return 0


def _show(result: object, steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    columns, rows = result.table()  # type: ignore[attr-defined]
    table = Table(*columns, title=f"{steps} steps; mean and 95% interval over seeds")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} compare-optimizers",
        description="Learned against tuned optimizers: learning rates chosen on tuning seeds, reported on others.",
    )
    parser.add_argument("--config", required=True, help="config of a model and data, as for fit")
    parser.add_argument("--weights", nargs="*", default=["lm-small"], help="of learned optimizers, names or files")
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), help=f"of {', '.join(BASELINES)}")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=200, help="of a training")
    parser.add_argument("--points", type=int, default=20, help="validations of a training")
    parser.add_argument("--seeds", type=int, default=10, help="trainings that are reported")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="trainings a learning rate is chosen by")
    parser.add_argument("--criterion", default="mean_val", help="mean_val or final_val")
    parser.add_argument("--monitor", default="val/loss", help="name under which the module logs its validation loss")
    parser.add_argument("--test-metric", default="test/loss", help="and its test loss; empty for no test")
    parser.add_argument("--target", type=float, default=math.nan, help="validation loss to reach")
    parser.add_argument("--output", default="optimizers", help="folder; default ./optimizers")
    return parser
