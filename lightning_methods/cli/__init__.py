"""The command `lightning-methods`: a table of subcommands, each imported when it is called.

A new subcommand is one row of `COMMANDS`: its function gets the arguments after its name and returns the exit code.
This file imports neither torch nor lightning, so that `list`, `card` and `doctor` answer at once and on broken
installations.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_methods.errors import InvalidArgument, LightningMethodsError, did_you_mean

PROGRAM = "lightning-methods"
DEBUG = "LIGHTNING_METHODS_DEBUG"


class Command(NamedTuple):
    """A subcommand: `module:function`, called with the arguments after the name, and its line in the help."""

    target: str
    help: str


COMMANDS = {
    "fit": Command(
        "lightning_methods.cli.app:fit", "train a model; every option of the Trainer, short names of classes"
    ),
    "validate": Command("lightning_methods.cli.app:validate", "evaluate on the validation data"),
    "test": Command("lightning_methods.cli.app:test", "evaluate on the test data"),
    "predict": Command("lightning_methods.cli.app:predict", "predict with a trained model"),
    "similarity": Command("lightning_methods.cli.similarity:compare", "compare the layers of two checkpoints"),
    "layer-identification": Command(
        "lightning_methods.cli.similarity:identify", "whether each layer finds its twin in checkpoints of other seeds"
    ),
    "weight-effect": Command(
        "lightning_methods.cli.weight_effect:run", "whether importance weights keep their effect on your features"
    ),
    "dropout-map": Command(
        "lightning_methods.cli.dropout_map:draw", "which pass needs the noise of dropout, over a grid of both rates"
    ),
    "audit-labels": Command(
        "lightning_methods.cli.audit_labels:audit", "which training labels look wrong, by a network trained on them"
    ),
    "study": Command(
        "lightning_methods.cli.study:study",
        "run | plan | status | resume | report | diff: compare pipelines over seeds",
    ),
    "compare": Command(
        "lightning_methods.cli.study:compare", "train your configuration with and without a callback: is it worth it?"
    ),
    "compare-optimizers": Command(
        "lightning_methods.cli.compare_optimizers:compare", "learned against tuned optimizers on your model and data"
    ),
    "reproduce": Command("lightning_methods.cli.reproduce:run", "a paper's tables beside ours, cell by cell: enzymes"),
    "list": Command("lightning_methods.cli.cards:list_techniques", "the techniques, their classes and papers"),
    "card": Command(
        "lightning_methods.cli.cards:show_card", "all about one technique: use, settings, evidence, limits"
    ),
    "doctor": Command("lightning_methods.cli.doctor:examine", "check this installation and say how to mend it"),
}

_USAGE = f"""\
usage: {PROGRAM} <command> [options]

Ten training techniques as drop-in parts for any PyTorch Lightning Trainer.

commands:
{{commands}}

options:
  -h, --help  this text; `{PROGRAM} <command> --help` for a command's own
  --version   the version

example:
  {PROGRAM} fit --model=Classifier --model.net=SmallConvNet --data=DigitsDataModule \\
      --trainer.callbacks=SoftNearestNeighborLoss --trainer.max_epochs=5

{DEBUG}=1 shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 done, 1 `doctor` or `reproduce` found a fault, 2 a wrong request.

    Args:
        argv: the arguments, default those of the process.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        lightning-methods 0.1.0
        0
    """
    name, *rest = argv if argv is not None else sys.argv[1:] or ["--help"]
    try:
        return _run(name, rest)
    except LightningMethodsError as error:
        if os.environ.get(DEBUG):
            raise
        command = f" {name}" if name in COMMANDS else ""
        print(f"{PROGRAM}{command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader, such as `head`, has seen enough; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(name: str, rest: list[str]) -> int:
    if name in {"-h", "--help", "help"}:
        print(_USAGE.format(commands="\n".join(f"  {n:<20} {command.help}" for n, command in COMMANDS.items())))
        return 0
    if name == "--version":
        from lightning_methods import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        raise InvalidArgument(f"There is no command {name!r}. {did_you_mean(name, COMMANDS)}")
    module, function = COMMANDS[name].target.split(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return run(rest)
