"""`LoggerSaveConfig`: the resolved configuration as a file of the run and as hyperparameters in every logger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lightning_methods.errors import InvalidArgument
from lightning_methods.report import attempt


class LoggerSaveConfig(SaveConfigCallback):
    """Save the resolved configuration of a LightningCLI as a file and send it to every logger as hyperparameters.

    The file lies in the run's own folder, also for loggers without a `log_dir` such as WandbLogger, where Lightning
    writes all runs over each other (Lightning #7679): there it goes beside the checkpoints. `fit` writes
    `config.yaml`, the other subcommands `config_<subcommand>.yaml`, which would otherwise replace the one of `fit`
    where there is no logger. Loggers get it flat and short (`model.lr`, `trainer.callbacks.EarlyStopping.patience`),
    without what is unset; a logger that refuses is warned about and never stops the run. With `fast_dev_run`
    LightningCLI leaves it out.

    Args:
        parser: the parser, given by LightningCLI.
        config: the parsed configuration, given by LightningCLI.
        config_filename: name of the file.
        overwrite: replace the file of an earlier run in the same folder, rather than refuse.
        multifile: keep the structure of several input files.
        save_to_log_dir: write the file at all.

    Raises:
        InvalidArgument: when a run starts, if the file is there and `overwrite` is off.

    Example:
        >>> LightningCLI(save_config_callback=LoggerSaveConfig)  # doctest: +SKIP
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = True,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        # the base class would choose the folder; it leaves rank zero's `save_config` to us this way
        super().__init__(parser, config, config_filename, overwrite, multifile, save_to_log_dir=False)
        self.write_file = save_to_log_dir

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file and tell the loggers; called by the base class on rank zero, once."""
        if self.write_file:
            self._write(run_folder(trainer), str(getattr(stage, "value", stage)))  # an enumeration of strings
        hyperparameters = flat_config(yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml")))
        for logger in trainer.loggers:
            attempt(logger, "configuration", partial(logger.log_hyperparams, hyperparameters))

    def _write(self, folder: str, stage: str) -> None:
        from lightning.fabric.utilities.cloud_io import get_filesystem

        name = Path(self.config_filename)
        file = name.name if stage == "fit" else f"{name.stem}_{stage}{name.suffix}"
        path, files = f"{folder.rstrip('/')}/{file}", get_filesystem(folder)
        if files.isfile(path) and not self.overwrite:
            raise InvalidArgument(f"{path} is the configuration of an earlier run: choose another folder or overwrite.")
        files.makedirs(folder, exist_ok=True)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)


def run_folder(trainer: Trainer) -> str:
    """Return the folder of this run alone, as far as its first logger has one, without a collective.

    Args:
        trainer: the trainer.
    """
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    if getattr(logger, "log_dir", None):
        return str(logger.log_dir)
    # where ModelCheckpoint puts the checkpoints of loggers without a folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return "/".join([str(logger.save_dir or trainer.default_root_dir), str(logger.name), version])


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration as dotted names, with classes in place of `class_path` and `init_args`.

    Args:
        config: plain dictionaries, lists and scalars.

    Example:
        >>> flat_config({"model": {"class_path": "a.Net", "init_args": {"lr": 0.1, "width": None}}})
        {'model': 'Net', 'model.lr': 0.1}
    """
    return dict(_items("", config))


def _items(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and "class_path" in value:
        yield prefix, value["class_path"].rpartition(".")[2]
        value = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _items(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield from _list_items(prefix, value)
    elif value is not None:  # what is unset would bury what is set; the file has it all
        yield prefix, value


def _list_items(prefix: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for position, item in enumerate(values):
        path = item.get("class_path") if isinstance(item, dict) else None
        name = path.rpartition(".")[2] if path else str(position)
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        if path:  # the name says the class
            yield f"{prefix}.{name}", True
            arguments = {**(item.get("init_args") or {}), **(item.get("dict_kwargs") or {})}
            yield from _items(f"{prefix}.{name}", arguments)
        else:
            yield from _items(f"{prefix}.{name}", item)
