"""`similarity` and `layer-identification`: compare the layers of trained networks from their checkpoints."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_methods.cka import layer_identification, similarity_matrix
from lightning_methods.cka.weights import weights_in
from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.cli.app import build
from lightning_methods.core.batches import inputs_of, mask_of
from lightning_methods.core.taps import FeatureTaps, joined
from lightning_methods.errors import InvalidArgument
from lightning_methods.report import heatmap, shorten

_INDICES = ("cka", "hsic", "cca", "svcca", "pwcca", "linear_regression", "procrustes")


def compare(argv: Sequence[str]) -> int:
    """Compare the layers of two checkpoints: print a table, write a heat map and all pairs.

    Args:
        argv: the arguments after `similarity`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read.
        LayerNotFound: if a pattern matches no layer.

    Example:
        >>> compare(["a.ckpt", "b.ckpt", "--config", "config.yaml", "--layers", "net.*"])  # doctest: +SKIP
        0
    """
    parser = _parser("similarity", "Compare the layers of two checkpoints on the same samples.")
    parser.add_argument("checkpoints", nargs=2, metavar="CKPT", help="of the rows and of the columns")
    parser.add_argument("--other-config", help="config of the second network, where it is another one")
    parser.add_argument("--other-layers", nargs="+", help="its layers; default those of the first")
    parser.add_argument("--output", default="similarity", help="folder of heat map and CSV; default ./similarity")
    args = parser.parse_args(argv)
    model, samples = _model_and_samples(args)
    first = _features(model, args.checkpoints[0], samples, args.layers, args.pool)
    if args.other_config:
        model, _ = build(args.other_config)
    second = _features(model, args.checkpoints[1], samples, args.other_layers or args.layers, args.pool)
    matrix = similarity_matrix(first, second, index=args.index, **_settings(args.index))
    _print_table(matrix, list(first), list(second), args)
    print(*_write(matrix, list(first), list(second), args), sep="\n")
    return 0


def identify(argv: Sequence[str]) -> int:
    """Print how often each layer is most similar to its twin in checkpoints of other seeds.

    Args:
        argv: the arguments after `layer-identification`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read.
        LayerNotFound: if a pattern matches no layer.
    """
    parser = _parser("layer-identification", "Is each layer most similar to its twin in networks of other seeds?")
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="of one architecture, at least two")
    args = parser.parse_args(argv)
    model, samples = _model_and_samples(args)
    networks = [_features(model, path, samples, args.layers, args.pool) for path in args.checkpoints]
    rate = layer_identification(networks, index=args.index, **_settings(args.index))
    layers = len(networks[0])
    print(
        f"{args.index}: {100 * rate:.1f}% of the layers are most similar to their twin (chance {100 / layers:.1f}%), "
        f"{len(networks)} networks, {layers} layers, {len(next(iter(networks[0].values())))} samples"
    )
    return 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(prog=f"{PROGRAM} {command}", description=description)
    parser.add_argument("--config", required=True, help="YAML with model and data, such as the config.yaml of the run")
    parser.add_argument("--layers", nargs="+", required=True, help="names or patterns, as in the callback")
    parser.add_argument("--index", choices=_INDICES, default="cka", help="default cka, debiased")
    parser.add_argument("--pool", choices=["flatten", "gap"], default="flatten", help="of maps; default flatten")
    parser.add_argument("--mask", help="key of the mask of padded sequences in a batch, such as attention_mask")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="which data; default val")
    parser.add_argument("--max-samples", type=int, default=1024, help="default 1024")
    return parser


def _settings(index: str) -> dict[str, Any]:
    return {"debiased": True} if index == "cka" else {}


def _model_and_samples(args: argparse.Namespace) -> tuple[Any, list[tuple[Any, Tensor | None]]]:
    """Return the model, and the first samples as batches of inputs with their mask."""
    if args.max_samples < 4:
        raise InvalidArgument(f"--max-samples {args.max_samples}: at least 4 are needed.")
    for path in args.checkpoints:
        if not Path(path).is_file():
            raise InvalidArgument(f"{path}: there is no such checkpoint.")
    model, data = build(args.config)
    if data is None:
        raise InvalidArgument(f"{args.config} describes no data; `data:` with a LightningDataModule is needed.")
    data.prepare_data()
    data.setup("fit" if args.split == "val" else "test")
    loader = getattr(data, f"{args.split}_dataloader")()
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    batches: list[tuple[Any, Tensor | None]] = []
    rows = 0
    for batch in loader or ():
        # the hooks that a Trainer calls around moving a batch, of the data or of the model, see it too
        for owner in (data, model):
            batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
        inputs, mask = inputs_of(batch), mask_of(batch, args.mask)
        batches.append((inputs, mask))
        rows += len(inputs) if isinstance(inputs, Tensor) else 1
        if rows >= args.max_samples:
            break
    if not batches:
        raise InvalidArgument(f"The data of {args.config} gave no {args.split} batch. Try another --split.")
    if isinstance(inputs, Tensor) and rows > args.max_samples:
        wanted = len(inputs) - (rows - args.max_samples)
        batches[-1] = inputs[:wanted], None if mask is None else mask[:wanted]
    return model, batches


@torch.no_grad()
def _features(
    model: Any, checkpoint: str, batches: list[tuple[Any, Tensor | None]], layers: list[str], pool: Any
) -> dict[str, Tensor]:
    try:
        model.load_state_dict(weights_in(checkpoint))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"{checkpoint} does not fit the model of the config: {reason[:300]}") from error
    model.eval()
    taps = FeatureTaps(layers, pool=pool, detach=True)
    taps.attach(model)
    collected: dict[str, list[Tensor]] = {}
    for inputs, mask in batches:
        with taps.recording():
            model(inputs)
            for name, x in taps.read(mask=mask).items():
                collected.setdefault(name, []).append(x.clone())
    taps.detach()
    return {name: joined(name, parts) for name, parts in collected.items()}


def _print_table(matrix: Tensor, rows: list[str], columns: list[str], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "similarity to its namesake", "most similar layer", "similarity")
    for i, row in enumerate(rows):
        own = f"{float(matrix[i, columns.index(row)]):.3f}" if row in columns else ""
        best = int(matrix[i].nan_to_num(nan=-torch.inf).argmax())
        known = bool(matrix[i].isfinite().any())
        table.add_row(row, own, columns[best] if known else "", f"{float(matrix[i, best]):.3f}" if known else "nan")
    table.title = f"{args.index}: rows of {args.checkpoints[0]}, against {args.checkpoints[1]}"
    Console(width=120).print(table, markup=False)


def _write(matrix: Tensor, rows: list[str], columns: list[str], args: argparse.Namespace) -> list[Path]:
    folder = Path(args.output)
    share = args.index != "hsic"
    y_label, x_label = (shorten(path, 40) for path in args.checkpoints)
    figure = heatmap(
        matrix,
        rows,
        columns,
        title="Similarity of the layers",
        value_label=args.index,
        x_label=x_label,
        y_label=y_label,
        vmin=0.0 if share else None,
        vmax=1.0 if share else None,
    )
    picture, numbers = folder / "similarity.png", folder / "similarity.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=150)
        with numbers.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", "other", args.index])
            writer.writerows([r, c, float(matrix[i, j])] for i, r in enumerate(rows) for j, c in enumerate(columns))
    except OSError as error:
        raise InvalidArgument(f"--output {folder} cannot be written: {error}") from error
    return [picture, numbers]
