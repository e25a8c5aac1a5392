"""A LightningCLI configuration as a pipeline of a study: parsed once, built and trained with many seeds."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from lightning_methods.cli import PROGRAM
from lightning_methods.cli._messages import readable
from lightning_methods.cli.app import MethodsCLI, ReadableParser, as_process_arguments
from lightning_methods.errors import InvalidArgument, UnsupportedTraining, did_you_mean
from lightning_methods.reproducibility import SeedStreams, lint_config, lint_datamodule
from lightning_methods.reproducibility.pipelines import Pipeline, resolve
from lightning_methods.reproducibility.seeding import GlobalGenerators

# what belongs to a subcommand or to one seed for all, and not to a pipeline
_LEFT_OUT = ("seed_everything", "ckpt_path", "return_predictions", "weights_only", "verbose")
_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_SPLIT_KEY = "data.init_args.seed"


class _Deferred:
    """Parses like the LightningCLI that it is mixed into, and builds nothing before `build` is called."""

    parser: Any
    config: Any
    trainer: Any
    _of_study: SeedStreams | None = None
    _set_apart = False

    def before_instantiate_classes(self) -> None:
        if self._of_study is not None:
            super().before_instantiate_classes()  # type: ignore[misc]

    def instantiate_classes(self) -> None:
        if self._of_study is not None:
            if not self._set_apart:
                self._set_apart = True
                with warnings.catch_warnings():  # the way that all supported versions of jsonargparse know
                    warnings.simplefilter("ignore", DeprecationWarning)
                    self.parser.add_instantiator(self._build_study_data, LightningDataModule)
            self._of_study.seed("init")  # before the whole tree: nested modules are built first
            super().instantiate_classes()  # type: ignore[misc]

    def after_instantiate_classes(self) -> None:
        if self._of_study is not None:
            super().after_instantiate_classes()  # type: ignore[misc]

    def build(self, streams: SeedStreams) -> None:
        """Build model, data and trainer with the seeds of `streams`."""
        self._of_study = streams
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()

    def _build_study_data(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        # what the data draws is the split's, and does not shift what the model draws, whichever is built first
        assert self._of_study is not None
        outside = GlobalGenerators()
        self._of_study.seed("split")
        try:
            return class_type(*args, **kwargs)
        finally:
            outside.restore()


class ConfigRunner:
    """A configuration, parsed, as a pipeline; see `prepare`."""

    def __init__(self, pipeline: Pipeline, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.notices: list[str] = []
        contents = [_read(path) for path in pipeline.config]
        self._note_seeds(contents)
        self.cli = _parse(pipeline, contents, best=settings["checkpoint"] == "best")
        self.keys = self._config_keys()
        self._check_data()
        text = self.cli.parser.dump(self.cli.config, skip_none=False)
        resolved = yaml.safe_load(text)
        for name in ("seed_everything", "config"):
            resolved.pop(name, None)
        how = {k: settings[k] for k in ("stage", "checkpoint", "numerical_kind")}
        self.description = yaml.safe_dump({"cli": pipeline.cli, **how, "keys": self.keys, **resolved}, sort_keys=True)

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Train with the seeds of a task and return metrics and fingerprints."""
        seeds = dict(task["seeds"])
        streams = SeedStreams(**seeds, numerical_kind=self.settings["numerical_kind"], force=True)
        config = self.cli.config
        config["trainer"]["default_root_dir"] = task["folder"]
        config["trainer"]["logger"]["init_args"]["save_dir"] = task["folder"]
        for source, key in self.keys.items():
            config[key] = seeds[source] if source in seeds else config[key]
        # Lightning writes a hint for every trainer, and the log of a run is for what went wrong
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
            self.cli.build(streams)
            trainer, model, data = self.cli.trainer, self.cli.model, self.cli.datamodule
            _check_launcher(trainer)
            # the study has its own seeds, also where the configuration brings streams
            trainer.callbacks = [streams, *(c for c in trainer.callbacks if not isinstance(c, SeedStreams))]
            streams.seed("split")
            trainer.fit(model, datamodule=data)
            fingerprints = dict(streams.fingerprints)
            trained = _numbers(trainer.callback_metrics)
            measured = self._evaluate(trainer, model, data)
        metric = str(self.settings["metric"])
        if self.settings["stage"] != "fit" and metric not in measured and metric in trained:
            close = did_you_mean(metric, measured)
            raise InvalidArgument(f"metric {metric!r} is measured in training, not by {self._stage}. {close}")
        return {"metrics": {**trained, **measured}, "fingerprints": fingerprints}

    @property
    def _stage(self) -> str:
        return str(self.settings["stage"]).rpartition("+")[2]

    def _evaluate(self, trainer: Any, model: Any, data: Any) -> dict[str, float]:
        if self._stage == "fit":
            return {}
        path = "best" if self.settings["checkpoint"] == "best" else None
        results = getattr(trainer, self._stage)(model, datamodule=data, ckpt_path=path, verbose=False)
        return {k: v for loader in results for k, v in _numbers(loader).items()}

    def _note_seeds(self, contents: list[dict[str, Any]]) -> None:
        for content in contents:
            seed = content.get("seed_everything")
            if isinstance(seed, int) and not isinstance(seed, bool):
                self.notices.append(f"seed_everything: {seed} of the configuration is replaced by the study's seeds.")
            elif seed is True:
                self.notices += lint_config(content)

    def _config_keys(self) -> dict[str, str]:
        """Return which seeds of the configuration itself stand for a source: named ones, else the split's."""
        given = self.settings["config_keys"]
        keys = {"split": _SPLIT_KEY} if given is None else dict(given)
        for key in list(keys.values()):
            try:
                there = self.cli.config[key] is not None or given is not None
            except (KeyError, TypeError):
                there = False
            if not there and given is not None:
                raise InvalidArgument(f"config_keys: the configuration has no {key!r}.")
            if not there:
                keys = {}
        for source, key in keys.items():
            if source in self.settings["vary"]:
                self.notices.append(f"the seed of {source} is also given to {key}.")
        return keys

    def _check_data(self) -> None:
        path = (self.cli.config.get("data") or {}).get("class_path", "") if "data" in self.cli.config else ""
        module, _, name = str(path).rpartition(".")
        if module:
            with contextlib.suppress(ImportError, AttributeError):
                self.notices += lint_datamodule(getattr(importlib.import_module(module), name))


def _check_launcher(trainer: Any) -> None:
    """Refuse the launcher that starts the other ranks by running the command anew: that would be the whole study."""
    launcher = type(getattr(trainer.strategy, "launcher", None)).__name__
    if trainer.world_size > 1 and "Script" in launcher:
        raise UnsupportedTraining(
            f"trainer.strategy with {trainer.world_size} processes would start the study again for each of them. Set "
            "trainer.strategy to ddp_fork (CPU) or ddp_spawn, or trainer.devices to 1."
        )


def prepare(pipeline: Pipeline, settings: Mapping[str, Any]) -> ConfigRunner:
    """Parse the configuration of a pipeline.

    Args:
        pipeline: with `config`, `overrides` and perhaps the user's own `cli`.
        settings: `metric`, `stage`, `checkpoint`, `numerical_kind`, `config_keys`, `vary` of the study.

    Raises:
        InvalidArgument: if it cannot be read or parsed.
    """
    return ConfigRunner(pipeline, settings)


def _parse(pipeline: Pipeline, contents: list[dict[str, Any]], *, best: bool) -> Any:
    base = resolve(pipeline.cli) if pipeline.cli else MethodsCLI
    if not (isinstance(base, type) and issubclass(base, LightningCLI)):
        raise InvalidArgument(f"cli={pipeline.cli!r} of pipeline {pipeline.name!r} is no LightningCLI.")
    cls = type("StudyCLI", (_Deferred, base), {})
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    quiet += [] if best else ["--trainer.enable_checkpointing=false"]
    # curves of a run are kept, and callbacks that need a logger have one
    quiet += ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]
    with tempfile.TemporaryDirectory() as folder, as_process_arguments([]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
        configs = list(_written(contents, Path(folder)))
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                return cls(
                    args=[*configs, *quiet, *pipeline.overrides, "--seed_everything=false"],
                    run=False,
                    save_config_callback=None,
                    parser_class=ReadableParser,
                    parser_kwargs={"prog": PROGRAM},
                )
        except SystemExit as error:
            said = complaint.getvalue().strip().splitlines()
            text = said[-1].partition("error: ")[2] or said[-1] if said else f"code {error.code}"
            raise InvalidArgument(f"pipeline {pipeline.name!r}: {readable(text)}") from error


def _read(path: str) -> dict[str, Any]:
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path} cannot be read as a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InvalidArgument(f"{path} is no configuration of names and values.")
    # `fit` saves its own under the name of the subcommand
    inner: dict[str, Any] = next((content[name] for name in _SUBCOMMANDS if isinstance(content.get(name), dict)), {})
    return {**{k: v for k, v in content.items() if k not in _SUBCOMMANDS}, **inner}


def _written(contents: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    for i, content in enumerate(contents):
        kept = {k: v for k, v in content.items() if k not in _LEFT_OUT}
        # a logger of the configuration would start its own run for each of ours, and write over them
        if isinstance(kept.get("trainer"), dict):
            kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k not in ("logger", "enable_checkpointing")}
        file = folder / f"{i}.yaml"
        file.write_text(yaml.safe_dump(kept), encoding="utf-8")
        yield f"--config={file}"


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in values.items()}
