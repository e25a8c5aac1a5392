"""The settings of a study, from Python or from `study.yaml`, checked before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_methods.errors import InvalidArgument, check_choice, did_you_mean
from lightning_methods.reproducibility.design import DESIGNS
from lightning_methods.reproducibility.functional import required_runs
from lightning_methods.reproducibility.numerical import KINDS
from lightning_methods.reproducibility.seeding import SOURCES

STAGES = ("fit", "fit+validate", "fit+test")
ENGINES = ("local", "slurm", "ray", "commands")
PROCESSES = ("fork", "reuse", "spawn")

_SECTIONS: dict[str, dict[str, str]] = {
    "study": {k: k for k in ("name", "metric", "mode", "stage", "checkpoint", "folder")},
    "sources": {
        **{k: k for k in ("vary", "design", "replicates", "root_seed", "numerical_kind", "config_keys")},
        "check_repeat": "check_repeat",
    },
    "test": {k: k for k in ("gamma", "alpha", "beta", "reference", "failed")},
}


@dataclass(frozen=True)
class Engine:
    """Where and how many runs are computed at once.

    Args:
        kind: `local`, `slurm` (through submitit), `ray`, or `commands`, which prints one command a run.
        process: of a local run: `fork`, a fresh process forked from this warmed one; `reuse`, a few processes for all;
            `spawn`, a fresh interpreter, as CUDA needs it once it was used here.
        workers: runs at once.
        threads_per_run: of torch.
        timeout: seconds for a run; none by default.
        retries: how often a failed run is tried again.
        lease: seconds after which another driver may take over the runs of one that died.
        options: for Slurm, of submitit (`slurm_partition`, `timeout_min`, ...; `cluster: local` to try it); for Ray,
            `address` of a cluster.
    """

    kind: str = "local"
    process: str = "fork"
    workers: int = 1
    threads_per_run: int = 1
    timeout: float | None = None
    retries: int = 1
    lease: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("engine.kind", self.kind, ENGINES)
        check_choice("engine.process", self.process, PROCESSES)
        for name in ("workers", "threads_per_run"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"engine.{name}={getattr(self, name)} must be at least 1.")
        if self.retries < 0:
            raise InvalidArgument(f"engine.retries={self.retries} must not be negative.")
        if self.lease <= 0 or (self.timeout is not None and self.timeout <= 0):
            raise InvalidArgument("engine.lease and engine.timeout must be positive.")


@dataclass(frozen=True)
class Settings:
    """All of a study but its pipelines; the arguments of `Study` say what each is."""

    name: str
    metric: str
    mode: str = "max"
    stage: str = "fit+validate"
    checkpoint: str = "last"
    folder: str = ""
    vary: tuple[str, ...] = ("init", "split", "order", "augment", "dropout")
    design: str = "all"
    replicates: int = 29
    root_seed: int = 20190609
    numerical_kind: str = "ulp"
    config_keys: Mapping[str, str] | None = None
    check_repeat: bool = True
    gamma: float = 0.75
    alpha: float = 0.05
    beta: float = 0.05
    reference: str | None = None
    failed: str = "incomplete"
    engine: Engine = field(default_factory=Engine)
    wandb: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.metric:
            raise InvalidArgument("A study needs a name, and a metric as the runs log it.")
        for name, choices in (
            ("mode", ("max", "min")),
            ("stage", STAGES),
            ("checkpoint", ("last", "best")),
            ("design", DESIGNS),
            ("numerical_kind", KINDS),
            ("failed", ("incomplete", "worst", "drop")),
        ):
            check_choice(name, getattr(self, name), choices)
        if not self.vary:
            raise InvalidArgument(f"vary is empty: name sources of variation. {did_you_mean('', SOURCES)}")
        for source in [*self.vary, *(self.config_keys or {})]:
            check_choice("source of variation", source, SOURCES)
        if len(set(self.vary)) < len(self.vary):
            raise InvalidArgument(f"vary={list(self.vary)} names a source twice.")
        if self.replicates < 2:
            raise InvalidArgument(f"replicates={self.replicates}: one run says nothing about variation; 2 at least.")
        required_runs(self.gamma, self.alpha, self.beta)  # says which bound is out of range

    @property
    def path(self) -> Path:
        """The folder of the study."""
        return Path(self.folder or f"studies/{self.name}")


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings and the pipelines of a `study.yaml`, as arguments of `Study` and of `Study.add`.

    Args:
        path: of the file.

    Raises:
        InvalidArgument: if it cannot be read, or holds a key that is not known.
    """
    content = _mapping(_content(path), str(path))
    known = [*_SECTIONS, "pipelines", "engine", "track"]
    for name in content:
        if name not in known:
            raise InvalidArgument(f"{path}: there is no section {name!r}. {did_you_mean(str(name), known)}")
    found: dict[str, Any] = {}
    for section, names in _SECTIONS.items():
        for key, value in _mapping(content.get(section), section).items():
            if key not in names:
                raise InvalidArgument(f"{path}: {section} has no {key!r}. {did_you_mean(str(key), names)}")
            found[names[key]] = value
    found["engine"] = engine_of(_mapping(content.get("engine"), "engine"))
    found["wandb"] = _mapping(content.get("track"), "track").get("wandb")
    for needed in ("name", "metric"):
        if needed not in found:
            raise InvalidArgument(f"{path}: study.{needed} is missing.")
    pipelines = _mapping(content.get("pipelines"), "pipelines")
    return found, {str(k): pipeline_of(str(k), _mapping(v, f"pipelines.{k}")) for k, v in pipelines.items()}


def engine_of(given: Mapping[str, Any]) -> Engine:
    """Return the engine of a mapping, or say which key is not known."""
    known = list(Engine.__dataclass_fields__)
    for key in given:
        if key not in known:
            raise InvalidArgument(f"engine has no {key!r}. {did_you_mean(str(key), known)}")
    return Engine(**given)


def pipeline_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Study.add` for a pipeline of `study.yaml`."""
    known = ("config", "overrides", "function", "cli")
    for key in given:
        if key not in known:
            raise InvalidArgument(f"pipelines.{name} has no {key!r}. {did_you_mean(str(key), known)}")
    return {("target" if key == "function" else key): value for key, value in given.items()}


def flat_options(overrides: Mapping[str, Any] | Sequence[str] | None) -> tuple[str, ...]:
    """Return overrides as options of `fit`: nested or dotted names become `--model.init_args.lr=0.1`.

    Args:
        overrides: a mapping, or options as they are.

    Example:
        >>> flat_options({"model": {"init_args": {"p": 0.0}}, "trainer.max_epochs": 2})
        ('--model.init_args.p=0.0', '--trainer.max_epochs=2')
    """
    if overrides is None:
        return ()
    if not isinstance(overrides, Mapping):
        return tuple(str(option) for option in overrides)
    found: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and "class_path" not in value:
            found += [f"--{key}.{inner.removeprefix('--')}" for inner in flat_options(value)]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            found.append(f"--{key}={text}")
    return tuple(found)


def _content(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} must hold names and values, got {value!r}.")
    return value
