"""`weight-effect`: whether importance weights keep their effect on the user's own features, for all weights at once."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_methods.cka.weights import weights_in
from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.cli.app import build
from lightning_methods.core.batches import inputs_of, targets_of
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.errors import InvalidArgument
from lightning_methods.importance_weighting.sweep import (
    Fading,
    HeadSettings,
    fading_figure,
    ratio_weights,
    sweep_heads,
)

_RATIOS = [256.0, 16.0, 1.0, 1 / 16, 1 / 256]
_OTHER, _HELD, _NOISE = "other classes", "held out", "noise"


def run(argv: Sequence[str]) -> int:
    """Train heads of every weighting and seed on frozen features: print a table, write curves and all numbers.

    Args:
        argv: the arguments after `weight-effect`.

    Raises:
        InvalidArgument: if a file or an argument cannot be read.

    Example:
        >>> run(["--features", "features.npz", "--classes", "3", "5"])  # doctest: +SKIP
        0
    """
    args = _parser().parse_args(argv)
    settings = HeadSettings(
        hidden=args.hidden,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        dropout=args.dropout,
        batch_norm=args.batch_norm,
        loss=args.loss,
    )
    x, y, probes = _task(_read(args), args.classes, args.max_samples)
    moved = {k: tuple(t.to(args.device) for t in v) if isinstance(v, tuple) else v.to(args.device) for k, v in probes}
    found = sweep_heads(
        x.to(args.device),
        y.to(args.device),
        ratio_weights(args.ratios),
        probes=moved,
        seeds=args.seeds,
        settings=settings,
    )
    shown = next(name for name in (_OTHER, _HELD, _NOISE) if name in found.fraction)
    _print(found, shown)
    print(*_write(found, Path(args.output), args.loss), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} weight-effect",
        description="Do importance weights keep their effect on these features? Heads of all ratios and seeds are "
        "trained at once, as in Byrd and Lipton (2019).",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--features", help=".npz or .pt with x and y; optional x_test, y_test and x_other")
    source.add_argument("--config", help="instead, YAML with model and data, such as the config.yaml of a run")
    parser.add_argument("--checkpoint", help="weights of that model; default as it is initialised")
    parser.add_argument("--layer", help="whose output is the features; default the inputs themselves")
    parser.add_argument("--classes", nargs=2, type=int, help="which two, if there are more; the others are a probe")
    parser.add_argument("--ratios", nargs="+", type=float, default=_RATIOS, help="weight of the first class over the "
                        "second; default 256 16 1 1/16 1/256")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--epochs", type=int, default=100, help="default 100")
    parser.add_argument(
        "--hidden", nargs="*", type=int, default=[], help="widths of hidden layers; default a linear head"
    )
    parser.add_argument("--loss", choices=["ce", "poly"], default="ce", help="default ce")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="default 0")
    parser.add_argument("--dropout", type=float, default=0.0, help="of hidden units; default 0")
    parser.add_argument("--batch-norm", action="store_true", help="in hidden layers")
    parser.add_argument("--lr", type=float, default=0.1, help="default 0.1")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--max-samples", type=int, default=5000, help="of each set; default 5000")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--output", default="weight_effect", help="folder of curves and CSV; default ./weight_effect")
    return parser


def _read(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return x and y of the training part, and x_test, y_test, x_other where there are such."""
    if args.seeds < 1 or args.max_samples < 2:
        raise InvalidArgument(f"--seeds {args.seeds} --max-samples {args.max_samples}: at least 1 and 2 are needed.")
    if args.features:
        if args.checkpoint or args.layer:
            raise InvalidArgument("--checkpoint and --layer belong to --config; --features are features already.")
        return _from_file(Path(args.features))
    return _from_model(args)


def _from_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as file:
                found: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            found = torch.load(path, weights_only=True)
    except Exception as error:
        raise InvalidArgument(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict) or not {"x", "y"} <= set(found) or ("x_test" in found) != ("y_test" in found):
        held = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InvalidArgument(f"{path} holds {held}; x and y are needed, and x_test only with y_test.")
    return found


@torch.no_grad()
def _from_model(args: argparse.Namespace) -> dict[str, Tensor]:
    model, data = build(args.config)
    if data is None:
        raise InvalidArgument(f"{args.config} describes no data; `data:` with a LightningDataModule is needed.")
    if args.checkpoint:
        if not args.layer or not Path(args.checkpoint).is_file():
            raise InvalidArgument(f"--checkpoint {args.checkpoint} needs --layer, and must be a file.")
        try:
            model.load_state_dict(weights_in(args.checkpoint))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InvalidArgument(f"{args.checkpoint} does not fit the model of the config: {reason}") from error
    model.eval()
    taps = None if args.layer is None else FeatureTaps(args.layer, detach=True)
    if taps is not None:
        taps.attach(model)
    data.prepare_data()
    data.setup("fit")
    found = dict(zip(("x", "y"), _features(model, taps, data, data.train_dataloader()), strict=True))
    held = data.val_dataloader()
    if held:
        found |= zip(("x_test", "y_test"), _features(model, taps, data, held), strict=True)
    if taps is not None:
        taps.detach()
    return found


def _features(model: Any, taps: FeatureTaps | None, data: Any, loader: Any) -> tuple[Tensor, Tensor]:
    x, y = [], []
    for batch in loader:
        # the hooks that a Trainer calls around moving a batch, of the data or of the model, see it too
        for owner in (data, model):
            batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
        inputs = inputs_of(batch)
        if taps is not None:
            with taps.recording():
                model(inputs)
                (inputs,) = taps.read().values()
        x.append(inputs.flatten(1).clone())
        y.append(targets_of(batch))
    if not x:
        raise InvalidArgument("The data gave no batch.")
    return torch.cat(x), torch.cat(y)


def _task(found: dict[str, Tensor], classes: list[int] | None, most: int) -> tuple[Tensor, Tensor, list[Any]]:
    """Return the training part of two classes as 0 and 1, standardised, and the probes."""
    x, y = found["x"].flatten(1).float(), found["y"].long()
    present = sorted(set(y.tolist()))
    chosen = classes or present
    if len(chosen) != 2 or not set(chosen) <= set(present) or chosen[0] == chosen[1]:
        raise InvalidArgument(f"--classes {chosen}: two of the classes {present} are needed.")
    if len(x) != len(y):
        raise InvalidArgument(f"There are {len(x)} features and {len(y)} labels.")
    mine = (y == chosen[0]) | (y == chosen[1])
    mean, scale = x[mine].mean(0), x[mine].std(0)
    scale = torch.where(scale > 1e-6, scale, 1.0)

    def ready(features: Tensor) -> Tensor:
        return ((features.flatten(1).float() - mean) / scale)[:most]

    generator = torch.Generator().manual_seed(0)
    order = mine.nonzero()[:, 0]
    order = order[torch.randperm(len(order), generator=generator)][:most]
    probes: list[Any] = []
    if "x_test" in found:
        tested = (found["y_test"] == chosen[0]) | (found["y_test"] == chosen[1])
        probes.append((_HELD, (ready(found["x_test"][tested]), (found["y_test"][tested] == chosen[1]).long()[:most])))
    other = found.get("x_other", x[~mine])
    if len(other):
        probes.append((_OTHER, ready(other)))
    probes.append((_NOISE, torch.randn(1000, x.shape[1], generator=generator)))
    return ready(x[order]), (y[order] == chosen[1]).long(), [p for p in probes if len(p[1]) and len(p[1][0])]


def _print(found: Fading, probe: str) -> None:
    from rich.console import Console
    from rich.table import Table

    share = 100 * found.fraction[probe][..., 0].mean(2)
    table = Table("epoch", *found.names, title=f"% of {probe} predicted as the first class, by weights")
    for epoch, row in zip(found.epochs, share.tolist(), strict=True):
        table.add_row(str(epoch), *(f"{value:.1f}" for value in row))
    console = Console(width=120)
    console.print(table, markup=False)
    spread = share.max(1).values - share.min(1).values
    console.print(
        f"largest difference between weights: {spread.max():.1f} points, after the last epoch {spread[-1]:.1f}; "
        f"training accuracy {100 * found.train_accuracy[-1].min():.1f} to {100 * found.train_accuracy[-1].max():.1f}%"
    )


def _write(found: Fading, folder: Path, loss: str) -> list[Path]:
    names = {"ce": "cross-entropy", "poly": "polynomial tail"}
    written = [folder / "weight_effect.csv"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for probe in found.fraction:
            written.append(folder / f"fading_{probe.replace(' ', '_')}.png")
            fading_figure(found, probe, title=f"Effect of the weights, {names[loss]}").savefig(written[-1], dpi=150)
        with written[0].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["weights", "seed", "epoch", "quantity", "value"])
            writer.writerows(_rows(found))
    except OSError as error:
        raise InvalidArgument(f"--output {folder} cannot be written: {error}") from error
    return written


def _rows(found: Fading) -> list[list[Any]]:
    quantities = {
        "train_accuracy": found.train_accuracy,
        "margin": found.margin,
        "effect": found.effect,
        **{f"fraction/{name}": values[..., 0] for name, values in found.fraction.items()},
        **{f"accuracy/{name}": values for name, values in found.accuracy.items()},
    }
    return [
        [name, seed, epoch, quantity, float(values[e, r, seed])]
        for quantity, values in quantities.items()
        for e, epoch in enumerate(found.epochs)
        for r, name in enumerate(found.names)
        for seed in range(found.seeds)
    ]
