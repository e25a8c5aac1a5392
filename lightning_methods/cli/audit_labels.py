"""`audit-labels`: which training labels look wrong, by the hidden layers of a network that was trained on them."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_methods.cka.weights import weights_in
from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.cli.app import build_with_callback
from lightning_methods.core._lightning import Callback, Trainer
from lightning_methods.errors import InvalidArgument
from lightning_methods.rog import RobustGenerativeClassifier, write_audit

_NAME = RobustGenerativeClassifier.__name__
_CHANGES = ("layers", "estimator", "support_fraction", "max_per_class", "seed")  # options that the callback takes
_CLASSES = 20  # that are printed


def audit(argv: Sequence[str]) -> int:
    """Audit the training labels of a configuration: print a table, write CSV files and pictures.

    Args:
        argv: the arguments after `audit-labels`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read.
        LayerNotFound: if a pattern matches no layer.
        UnsupportedTraining: if there are no training data.

    Example:
        >>> audit(["last.ckpt", "--config", "config.yaml"])  # doctest: +SKIP
        0
    """
    args = _parser().parse_args(argv)
    if not Path(args.checkpoint).is_file():
        raise InvalidArgument(f"{args.checkpoint}: there is no such checkpoint.")
    weights = weights_in(args.checkpoint)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    changed = {name: getattr(args, name) for name in _CHANGES if hasattr(args, name)}
    model, data, callback = build_with_callback(args.config, _NAME, **changed)
    rog: Any = callback
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidArgument(f"{args.checkpoint} does not fit the model of the config: {reason}") from error
    state = None if changed or args.refit else _state_in(args.checkpoint, rog)
    if state is not None:
        rog.load_state_dict(state)
    examiner = _Examiner(rog)
    _visit(model, data, examiner, args.device)
    try:
        paths = write_audit(rog.audit, Path(args.output), rog.ensemble)
    except OSError as error:
        raise InvalidArgument(f"--output {args.output} cannot be written: {error}") from error
    _print(rog, examiner.values)
    print(*paths, sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} audit-labels",
        description="Which labels of the training data look wrong? Fits RobustGenerativeClassifier on the hidden "
        "layers of a trained network, or takes what a checkpoint holds of such a fit, and compares every training "
        "sample. The callback's settings are those of the configuration, if its trainer has one; an option here fits "
        "anew.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="of the network, as Lightning saved it, or bare weights")
    parser.add_argument("--config", required=True, help="YAML with model and data, such as the config.yaml of the run")
    parser.add_argument("--refit", action="store_true", help="also if the checkpoint holds a fit of these weights")
    changes: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--layers", nargs="+", help="names or patterns; default the blocks before the head", **changes)
    parser.add_argument("--estimator", choices=["mcd", "official", "sample"], help="default mcd", **changes)
    parser.add_argument(
        "--support-fraction",
        type=_fraction,
        help="samples of each class that are trusted: auto, half, confirmed, or a share from 0.5 to 1; default auto",
        **changes,
    )
    parser.add_argument("--max-per-class", type=int, help="samples that are fitted; default 5000", **changes)
    parser.add_argument("--seed", type=int, help="of what is drawn at random; default 0", **changes)
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer: cpu, gpu, auto; default cpu")
    parser.add_argument("--output", default="label_audit", help="folder of CSV and pictures; default ./label_audit")
    return parser


def _fraction(text: str) -> float | str | None:
    if text in ("auto", "confirmed"):
        return text
    try:
        return None if text == "half" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: auto, half, confirmed, or a number from 0.5 to 1 is needed"
        ) from error


def _state_in(path: str, rog: RobustGenerativeClassifier) -> dict[str, Any] | None:
    """Return what the checkpoint holds of a fit: of the same callback, or, if the configuration has none, the only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None
    states = content.get("callbacks") if "state_dict" in content else None
    own = {key: s for key, s in (states or {}).items() if key.startswith(_NAME) and s.get("fitted")}
    if rog.state_key in own:
        return own[rog.state_key]
    return next(iter(own.values())) if len(own) == 1 and rog.layers is None else None


class _Nothing(IterableDataset):
    """Data of no batch: the Trainer sets up module and data, and then has nothing to predict."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Examiner(Callback):
    """Fit where that is needed, and examine all labels.

    Args:
        rog: what fits and examines.
    """

    def __init__(self, rog: RobustGenerativeClassifier) -> None:
        self.rog = rog
        self.values: dict[str, float] | None = None  # of a fit that was made here

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Do it when module and data are ready."""
        if not self.rog.is_current(pl_module):
            self.values = self.rog.fit(trainer, pl_module)
        self.rog.examine(trainer, pl_module)


def _visit(model: Any, data: Any, examiner: Callback, device: str) -> None:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    try:
        trainer = Trainer(accelerator=device, devices=1, callbacks=examiner, **quiet)
    except Exception as error:
        raise InvalidArgument(f"--device {device}: {' '.join(str(error).split())}") from error
    source = model if data is None else data
    source.predict_dataloader = lambda: DataLoader(_Nothing())
    trainer.predict(model, datamodule=data, return_predictions=False)


def _print(rog: Any, values: dict[str, float] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    found, console = rog.audit, Console(width=120)
    columns, rows = found.by_class()
    shown = sorted(rows, key=lambda row: -row[2])[:_CLASSES] if len(rows) > _CLASSES else rows
    table = Table(*columns, title=f"{len(found.given)} training labels, {found.noise_rate:.1%} suspected")
    for name, count, *shares in shown:
        table.add_row(str(name), str(count), *(f"{share:.1%}" for share in shares))
    console.print(table, markup=False)
    if len(rows) > len(shown):
        console.print(f"the {len(shown)} classes of most suspects; all {len(rows)} in classes.csv", markup=False)
    layers = zip(rog.ensemble.names, rog.ensemble.weights.tolist(), strict=True)
    console.print("layers: " + ", ".join(f"{name} {weight:.2f}" for name, weight in layers), markup=False)
    if values is None:
        console.print("the fit that the checkpoint holds was used", markup=False)
    elif "fit/accuracy" in values:
        agree = [f"{100 * values[f'fit/{name}']:.1f}%" for name in ("softmax", "accuracy")]
        console.print(f"agreement with the validation labels: softmax {agree[0]}, RoG {agree[1]}", markup=False)
    if quality := found.quality():
        told = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in quality.items())
        console.print(f"by the true labels that the data know: {told}", markup=False)
