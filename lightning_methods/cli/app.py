"""`fit`, `validate`, `test` and `predict`: LightningCLI with the catalog imported and errors that can be read."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_methods.catalog  # noqa: F401  (short names of classes)
from lightning_methods.cli import PROGRAM
from lightning_methods.cli._messages import readable
from lightning_methods.cli.save_config import LoggerSaveConfig
from lightning_methods.cli.seed_streams import SeedStreamsCLI
from lightning_methods.errors import InvalidArgument, LightningMethodsError

# what `ckpt_path` may be beside a file
_CHECKPOINT_WORDS = {"best", "last", "hpc"}


class ReadableParser(LightningArgumentParser):
    """The parser of LightningCLI with one short message in place of the usage of 80 options and a dump of types."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print what is wrong and leave with code 2; nested parsers, whose errors are caught, raise as before."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"{self.prog.replace(' [options]', '')}: error: {readable(message)}\n")


class MethodsCLI(SeedStreamsCLI):
    """LightningCLI that looks at the checkpoint's path before any work and unwraps errors of constructors."""

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there before data is read and a model built."""
        super().before_instantiate_classes()
        path = str(self._get(self.config, "ckpt_path") or "best")
        elsewhere = path in _CHECKPOINT_WORDS or "://" in path or path.startswith("registry")
        if not elsewhere and not Path(path).exists():
            raise InvalidArgument(f"ckpt_path={path!r}: there is no such file.")

    def instantiate_classes(self) -> None:
        """Build the classes; jsonargparse folds what a constructor raises into a long text about types."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            ours = _ours_within(error)
            if ours is not None:
                raise ours from error
            if "Does not validate against" in str(error):
                raise InvalidArgument(readable(str(error))) from error
            raise


def run(command: str, argv: Sequence[str]) -> int:
    """Run a method of the Trainer as configured by arguments and YAML files.

    Args:
        command: fit, validate, test or predict.
        argv: the arguments after the command.

    Raises:
        InvalidArgument: if the Trainer refuses its settings.

    Example:
        >>> run("fit", ["--config", "configs/snnl/digits.yaml"])  # doctest: +SKIP
        0
    """
    with as_process_arguments([command, *argv]):
        try:
            MethodsCLI(
                save_config_callback=LoggerSaveConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=ReadableParser,
                parser_kwargs={"prog": PROGRAM},
            )
        except MisconfigurationException as error:
            raise InvalidArgument(str(error)) from error
    return 0


def build(path: str) -> tuple[LightningModule, LightningDataModule | None]:
    """Build the model and the data of a configuration that `fit` saved or takes, without a run.

    Args:
        path: a YAML file with `model` and, for data beside the model, `data`.

    Raises:
        InvalidArgument: if there is no such file, or it describes no model.

    Example:
        >>> model, data = build("configs/cka/digits.yaml")  # doctest: +SKIP
    """
    cli = _without_run(_described(path), [])
    return cli.model, cli.datamodule


def build_with_callback(
    path: str, name: str, **changed: Any
) -> tuple[LightningModule, LightningDataModule | None, Callback]:
    """Build also a callback: the first of the class `name` in the configuration's trainer, or else a new one.

    Args:
        path: a YAML file with `model` and, for data beside the model, `data`.
        name: of the class, as in the catalog.
        changed: arguments of the callback that replace those of the configuration.

    Raises:
        InvalidArgument: if there is no such file, it describes no model, or an argument is wrong.

    Example:
        >>> build_with_callback("configs/rog/digits.yaml", "RobustGenerativeClassifier")  # doctest: +SKIP
    """
    config = _described(path)
    found = (config.get("trainer") or {}).get("callbacks") or []
    entries = [e if isinstance(e, dict) else {"class_path": e} for e in (found if isinstance(found, list) else [found])]
    own = [e for e in entries if str(e.get("class_path")).rpartition(".")[2] == name]
    entry: dict[str, Any] = dict(own[0]) if own else {"class_path": name}
    entry["init_args"] = {**(entry.get("init_args") or {}), **changed}
    cli = _without_run(config, [entry])
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return cli.model, cli.datamodule, next(c for c in callbacks if type(c).__name__ == name)


def _described(path: str) -> dict[str, Any]:
    try:
        config: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path} cannot be read as a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not config.get("model"):
        raise InvalidArgument(f"{path} describes no model; the config.yaml of a run is needed.")
    return config


def _without_run(config: dict[str, Any], callbacks: list[Any]) -> MethodsCLI:
    # neither the run's trainer, whose loggers would start, nor what belongs to one subcommand only
    wanted: dict[str, Any] = {k: config[k] for k in ("model", "data") if config.get(k)}
    wanted["seed_everything"] = False
    wanted["trainer"] = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False, "callbacks": callbacks}
    with as_process_arguments([]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
        return MethodsCLI(
            args=wanted,
            run=False,
            save_config_callback=None,
            parser_class=ReadableParser,
            parser_kwargs={"prog": PROGRAM},
        )


fit, validate, test, predict = (partial(run, command) for command in ("fit", "validate", "test", "predict"))


@contextmanager
def as_process_arguments(argv: list[str]) -> Iterator[None]:
    """Make `argv` the arguments of the process, which Lightning replays to start the other ranks."""
    before, path = sys.argv, list(sys.path)
    sys.argv = [before[0], *argv]
    # a console script, unlike `python -m`, does not find the modules of the user's own folder
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path


def _ours_within(error: BaseException | None) -> LightningMethodsError | None:
    while error is not None and not isinstance(error, LightningMethodsError):
        error = error.__cause__
    return error
