"""`Study`: pipelines, a design over the sources of variation, the runs in a ledger, and what they allow to conclude."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_methods.errors import InvalidArgument, did_you_mean
from lightning_methods.reproducibility.analysis import Analysis, analyse
from lightning_methods.reproducibility.design import Cell, cells, run_id
from lightning_methods.reproducibility.driver import Progress, drive, run_folder
from lightning_methods.reproducibility.executors import (
    Executor,
    ForkExecutor,
    RayExecutor,
    ReuseExecutor,
    SpawnExecutor,
    SubmititExecutor,
)
from lightning_methods.reproducibility.fingerprints import differences
from lightning_methods.reproducibility.ledger import Ledger, Run
from lightning_methods.reproducibility.pipelines import (
    Pipeline,
    PipelineFunction,
    Prepared,
    fingerprint,
    prepare,
    resolve,
    target_of,
)
from lightning_methods.reproducibility.settings import Engine, Settings, engine_of, flat_options, read_yaml


class Study:
    """Compare pipelines over many runs in which the sources of variation vary, each on its own seeds, in pairs.

    Replicate i of every pipeline has the same seeds; they do not depend on the number of replicates, so that a study
    can be enlarged. Runs are kept in a ledger: what is done is never run again, and a study that was killed goes on
    where it was. Another configuration or another code is another pipeline; its old runs stay, listed as stale.

    Args:
        name: of the study.
        metric: by which runs are compared, as the module logs it or as the function returns it.
        mode: `"max"` if higher is better.
        vary: the sources that vary; the others keep one seed.
        design: `"all"`, every replicate changes all of them: what a verdict needs; `"one_at_a_time"`, how much each
            brings alone; `"sobol"`, also their interactions, at sources + 2 runs a replicate.
        replicates: how many; 29 is the paper's for gamma 0.75.
        stage: what measures the metric after `fit`: `"fit+validate"`, `"fit+test"`, or nothing more, `"fit"`.
        checkpoint: of which weights, `"last"` or `"best"`.
        folder: of ledger, logs and report; default `studies/<name>`.
        root_seed: from which all seeds are derived.
        numerical_kind: of numerical noise, where it varies: `"ulp"`, `"threads"` or `"hardware"`.
        config_keys: source -> the configuration's own seed that stands for it, as `{"split": "data.init_args.seed"}`;
            by default that of `split`, where the data has an argument `seed`.
        check_repeat: make the first run twice, to see whether the pipeline is deterministic.
        gamma: P(A>B) from which on a difference is meaningful.
        alpha: one minus the confidence.
        beta: chance to miss an effect, for planning.
        reference: the pipeline that the others are compared with; default the last.
        failed: what failed runs do: `"incomplete"` leaves the verdict open, `"worst"` counts them as lost, `"drop"`
            leaves out their pairs and says so.
        engine: an `Engine`, or its arguments.
        wandb: `project`, `mode` and further arguments of `wandb.init`, to track the study in W&B; None for not.

    Raises:
        InvalidArgument: for whatever is not known or out of range.

    Example:
        >>> import random, tempfile
        >>> def score(seeds, shift):
        ...     return shift + random.Random(seeds["init"]).random()
        >>> study = Study("demo", metric="score", vary=["init"], replicates=8, folder=tempfile.mkdtemp())
        >>> _ = study.add("A", lambda seeds: score(seeds, 0.1)).add("B", lambda seeds: score(seeds, 0.0))
        >>> print(study.run().verdict)
        significant and meaningful at gamma=0.75: paired P(A>B) = 1.000, 95% interval [1.000, 1.000]
    """

    def __init__(
        self, name: str, *, metric: str, engine: Engine | Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        known = [k for k in Settings.__dataclass_fields__ if k not in ("name", "metric", "engine")]
        for key in settings:
            if key not in known:
                raise InvalidArgument(f"Study has no argument {key!r}. {did_you_mean(key, known)}")
        if "vary" in settings:
            vary = settings["vary"]
            settings["vary"] = (vary,) if isinstance(vary, str) else tuple(vary)
        if "folder" in settings:
            settings["folder"] = str(settings["folder"])
        engine = engine if isinstance(engine, Engine) else engine_of(engine or {})
        self.settings = Settings(name=name, metric=metric, engine=engine, **settings)
        self.pipelines: dict[str, Pipeline] = {}
        self.file: Path | None = None
        self._prepared: dict[str, Prepared] = {}

    @classmethod
    def from_yaml(cls, path: str | Path, **changed: Any) -> Study:
        """Return the study of a `study.yaml`.

        Args:
            path: of the file.
            changed: settings that replace those of the file.

        Raises:
            InvalidArgument: if it cannot be read, or holds what is not known.
        """
        settings, pipelines = read_yaml(path)
        study = cls(**{**settings, **changed})
        for name, given in pipelines.items():
            study.add(name, **given)
        study.file = Path(path)
        return study

    def add(
        self,
        name: str,
        function: PipelineFunction | None = None,
        *,
        config: str | Sequence[str] | None = None,
        overrides: Mapping[str, Any] | Sequence[str] | None = None,
        cli: str = "",
        target: str = "",
    ) -> Study:
        """Add a pipeline, and return the study.

        Args:
            name: of the pipeline.
            function: from a dictionary source -> seed to a score, or to a dictionary of scores.
            config: instead, YAML files as for `lightning-methods fit`.
            overrides: of the configuration, nested or dotted, or options as on the command line.
            cli: `package.module:Class` of your own LightningCLI, for the configuration.
            target: instead, `package.module:function` or `file.py:function`.

        Raises:
            InvalidArgument: if the name is taken, or it is not exactly one of function, target and config.
        """
        if name in self.pipelines:
            raise InvalidArgument(f"There is a pipeline {name!r} already.")
        if sum(bool(x) for x in (function, config, target)) != 1:
            raise InvalidArgument(f"Pipeline {name!r} needs either a config or a function, one of them.")
        if function is not None and not callable(function):
            raise InvalidArgument(f"The function of pipeline {name!r} is a {type(function).__name__}.")
        self.pipelines[name] = Pipeline(
            name=name,
            config=(config,) if isinstance(config, str) else tuple(config or ()),
            overrides=flat_options(overrides),
            target=target or (target_of(function) if function is not None else ""),
            function=function,
            cli=cli,
        )
        return self

    # -- what there is to do -------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger of the study's folder."""
        return Ledger(self.settings.path / "ledger.sqlite")

    @property
    def prepared(self) -> dict[str, Prepared]:
        """The pipelines, read and checked.

        Raises:
            InvalidArgument: if there is none, two are the same, or the reference is none of them.
        """
        if not self.pipelines:
            raise InvalidArgument("The study has no pipelines; add one at least.")
        reference = self.settings.reference
        if reference is not None and reference not in self.pipelines:
            raise InvalidArgument(f"reference={reference!r} is no pipeline. {did_you_mean(reference, self.pipelines)}")
        for name, pipeline in self.pipelines.items():
            if name not in self._prepared:
                self._prepared[name] = prepare(pipeline, self._run_settings())
        seen: dict[str, str] = {}
        for name, key in self.hashes.items():
            if key in seen:
                raise InvalidArgument(f"{seen[key]} and {name} are the same: nothing in their configuration differs.")
            seen[key] = name
        return self._prepared

    @property
    def hashes(self) -> dict[str, str]:
        """Pipeline -> the hash of what it does."""
        return {name: fingerprint(prepared) for name, prepared in self._prepared.items()}

    @property
    def cells(self) -> list[Cell]:
        """The design: the runs of each pipeline."""
        s = self.settings
        return cells(
            vary=s.vary,
            design=s.design,  # type: ignore[arg-type]
            replicates=s.replicates,
            root_seed=s.root_seed,
            check_repeat=s.check_repeat,
        )

    def run_ids(self) -> dict[tuple[str, str, int], str]:
        """Return (pipeline, part of the design, replicate) -> run id, in the order in which runs are made."""
        hashes = {name: self.hashes[name] for name in self.prepared}
        return {(name, c.part, c.replicate): run_id(hashes[name], c) for c in self.cells for name in self.pipelines}

    def enter(self) -> list[str]:
        """Write the runs of the design into the ledger, those that are not there yet, and return all their ids."""
        rows: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            for name, prepared in self.prepared.items():
                key = fingerprint(prepared)
                row = {"pipeline": name, "pipeline_hash": key, "seeds": cell.seeds}
                rows.setdefault(run_id(key, cell), row)
        ledger = self.ledger
        ledger.describe({fingerprint(p): (name, p.description) for name, p in self.prepared.items()})
        ledger.add([{"run_id": i, **row} for i, row in rows.items()])
        return list(rows)

    # -- doing it ------------------------------------------------------------------------------------------------------

    def run(
        self, *, only: Sequence[str] | None = None, retry: bool = False, tell: Callable[[Progress], None] | None = None
    ) -> Analysis:
        """Make the runs that are not done yet, and return what all of them allow to conclude.

        Args:
            only: ids of some runs.
            retry: try also those again that failed.
            tell: called after every run.

        Raises:
            InvalidArgument: if the engine cannot compute these pipelines.
        """
        wanted = self.enter()
        ledger = self.ledger
        if only is not None:
            for given in only:
                if given not in wanted:
                    raise InvalidArgument(f"The study has no run {given!r}. {did_you_mean(given, wanted)}")
            wanted = list(only)
        if retry:
            ledger.retry_failed(wanted)
        engine = self.settings.engine
        counts = ledger.counts(wanted)
        if counts.get("pending") or counts.get("running"):
            drive(
                ledger,
                wanted,
                self._task,
                self._executor(),
                workers=engine.workers,
                timeout=engine.timeout,
                retries=engine.retries,
                lease=engine.lease,
                tell=tell,
            )
        return self.analyse()

    def resume(self, *, tell: Callable[[Progress], None] | None = None) -> Analysis:
        """Go on with a study, and try failed runs again."""
        return self.run(retry=True, tell=tell)

    def analyse(self) -> Analysis:
        """Return what the runs in the ledger allow to conclude, also while others are still made."""
        prepared = self.prepared
        return analyse(
            self.settings,
            {name: (fingerprint(p), list(getattr(p, "notices", []))) for name, p in prepared.items()},
            self.run_ids(),
            self.ledger,
        )

    def report(self) -> list[Path]:
        """Write the report (Markdown, one HTML page, CSV, JSON, figures) and return its files."""
        from lightning_methods.reproducibility.report import write_report

        return write_report(self.analyse(), self.settings.path)

    def track(self, files: Sequence[Path] = ()) -> None:
        """Send the study to W&B, also offline: one run a replicate in a group, and a summary with the report.

        Args:
            files: of the report, to go with the summary.

        Raises:
            MissingDependency: without wandb.
        """
        from lightning_methods.reproducibility.tracking import track_study

        track_study(self.analyse(), self.settings, files)

    def commands(self) -> list[str]:
        """Return one command for every run that is not done, for any scheduler.

        Raises:
            InvalidArgument: if the study was not read from a file, which the commands read again.
        """
        if self.file is None:
            raise InvalidArgument("Commands need a study that was read from a YAML file.")
        wanted = self.enter()
        rows = self.ledger.runs(wanted)
        words = ["lightning-methods", "study", "run", str(self.file.resolve()), "--only"]
        return [shlex.join([*words, i]) for i in wanted if rows[i].status != "done"]

    def sweep(self) -> dict[str, Any]:
        """Return the configuration of a W&B sweep whose agents make the runs that are not done."""
        ids = [command.rpartition(" ")[2] for command in self.commands()]
        assert self.file is not None
        return {
            "program": "lightning-methods",
            "method": "grid",
            "name": self.settings.name,
            "parameters": {"only": {"values": ids}},
            "command": ["${env}", "lightning-methods", "study", "run", str(self.file.resolve()), "${args}"],
        }

    def diff(self, first: str, second: str) -> list[str]:
        """Return in which sources two runs differ, by what they really drew.

        Args:
            first: id of a run, or `pipeline/replicate`.
            second: likewise.

        Raises:
            InvalidArgument: if there is no such run, or it has no fingerprints.
        """
        found = []
        for given in (first, second):
            run = self._find(given)
            if run.fingerprints is None:
                what = "is not done" if run.status != "done" else "has no fingerprints: it is a function's"
                raise InvalidArgument(f"Run {given} {what}.")
            found.append(run.fingerprints)
        return differences(*found)

    def _find(self, given: str) -> Run:
        rows = self.ledger.runs()
        if given in rows:
            return rows[given]
        names = {f"{name}/{replicate}": i for (name, part, replicate), i in self.run_ids().items() if part != "repeat"}
        names |= {f"{name}/{part}/{replicate}": i for (name, part, replicate), i in self.run_ids().items()}
        if given not in names or names[given] not in rows:
            raise InvalidArgument(f"There is no run {given!r}. {did_you_mean(given, [*names, *rows])}")
        return rows[names[given]]

    def _run_settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "metric": s.metric,
            "stage": s.stage,
            "checkpoint": s.checkpoint,
            "numerical_kind": s.numerical_kind,
            "config_keys": None if s.config_keys is None else dict(s.config_keys),
            "vary": list(s.vary),
            "threads": s.engine.threads_per_run,
        }

    def _task(self, run: Run) -> dict[str, Any]:
        return {
            "run_id": run.run_id,
            "attempt": run.attempt,
            # by what it does: a pipeline may have got another name since
            "pipeline": self.pipelines[{key: name for name, key in self.hashes.items()}[run.pipeline_hash]].plain(),
            "seeds": run.seeds,
            "settings": self._run_settings(),
            "folder": str(run_folder(self.settings.path.resolve(), run.run_id)),
        }

    def _executor(self) -> Executor:
        engine, folder = self.settings.engine, self.settings.path
        # one of the printed commands makes its run here, as a local study would
        if engine.kind in ("local", "commands") and engine.process != "spawn":
            _check_fork()
            if engine.threads_per_run > 1 and any(p.function is None for p in self.pipelines.values()):
                _check_threads()
            return ReuseExecutor(self.prepared) if engine.process == "reuse" else ForkExecutor(self.prepared)
        for pipeline in self.pipelines.values():
            if not pipeline.config:
                _check_importable(pipeline, engine)
        if engine.kind == "slurm":
            options = dict(engine.options)
            return SubmititExecutor(folder / "submitit", cluster=options.pop("cluster", "slurm"), parameters=options)
        if engine.kind == "ray":
            return RayExecutor(engine.workers, address=engine.options.get("address"))
        return SpawnExecutor()


def _check_fork() -> None:
    import torch

    if sys.platform == "win32":
        raise InvalidArgument("Windows cannot fork processes; set engine.process=spawn.")
    if torch.cuda.is_initialized():
        raise InvalidArgument("CUDA was used in this process, which a forked one cannot use; set engine.process=spawn.")


def _check_threads() -> None:
    """Refuse to fork after parallel work of this process where the runs would work in parallel: they would hang."""
    import torch

    if torch.get_num_threads() > 1 and torch.backends.openmp.is_available() and _has_threads():
        raise InvalidArgument(
            "This process has run parallel work, after which a forked one with threads_per_run above 1 would hang; set "
            "engine.process=spawn, or threads_per_run=1."
        )


def _has_threads() -> bool:
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) > 1


def _check_importable(pipeline: Pipeline, engine: Engine) -> None:
    where = f"engine.kind={engine.kind}" if engine.kind != "local" else f"engine.process={engine.process}"
    advice = "define it at the top of a module, or use the local engine with process=fork."
    if not pipeline.target:
        raise InvalidArgument(f"{where}: other processes cannot import the function of {pipeline.name!r}; {advice}")
    try:
        resolve(pipeline.target)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error} For {pipeline.name!r}: {advice}") from error
