"""`study run | plan | status | resume | report | diff`, and `compare`: is this technique worth it for me?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_methods.cli import PROGRAM
from lightning_methods.cli._parser import OneLineParser
from lightning_methods.errors import InvalidArgument, did_you_mean
from lightning_methods.reproducibility import Study
from lightning_methods.reproducibility.analysis import Analysis
from lightning_methods.reproducibility.driver import Progress
from lightning_methods.reproducibility.planning import plan_lines, status_lines
from lightning_methods.reproducibility.settings import ENGINES, PROCESSES

_VERBS = {
    "run": "make the runs that are not done, and write the report",
    "plan": "how many runs, how long, and how many a verdict needs",
    "status": "what is done, failed and missing, and the verdict so far",
    "resume": "as run, and try failed runs again",
    "report": "write the report of what is done",
    "diff": "in which sources of variation two runs differ",
}


def study(argv: Sequence[str]) -> int:
    """Run a verb on a `study.yaml`: 0 if all is well, 1 if runs failed.

    Args:
        argv: the arguments after `study`.

    Raises:
        InvalidArgument: if the file or an argument cannot be read.

    Example:
        >>> study(["plan", "configs/reproducibility/study.yaml"])  # doctest: +SKIP
        0
    """
    args = _study_parser().parse_args(argv)
    engine = {
        key: value
        for key, value in (("workers", args.workers), ("kind", args.engine), ("process", args.process))
        if value is not None
    }
    found = Study.from_yaml(args.file)
    if engine or args.replicates is not None:
        found = _changed(args.file, found, engine, args.replicates)
    if args.verb == "diff":
        if len(args.runs) != 2:
            raise InvalidArgument("diff needs two runs, as `A/0` and `B/0`, or their ids.")
        told = found.diff(*args.runs)
        print("these runs differ in: " + ", ".join(told) if told else "these runs drew the same from every source")
        return 0
    if args.runs:
        raise InvalidArgument(f"{args.verb} takes no runs, got {' '.join(args.runs)}.")
    if args.verb == "plan":
        print(*plan_lines(found), sep="\n")
        return 0
    if args.verb == "status":
        print(*status_lines(found), sep="\n")
        return 0
    if args.verb == "report":
        return _finish(found, found.analyse())
    if found.settings.engine.kind == "commands" and not args.only:
        return _print_commands(found)
    with _progress() as tell:
        analysis = found.run(only=args.only or None, retry=args.verb == "resume", tell=tell)
    if args.only:  # a part of a study that is made elsewhere; its report comes at the end
        failed = [run for _, run in analysis.rows if run.run_id in args.only and run.status != "done"]
        print(*(f"run {run.run_id}: {run.error}" for run in failed), sep="\n")
        return int(bool(failed))
    return _finish(found, analysis)


def compare(argv: Sequence[str]) -> int:
    """Train a configuration with and without a callback, in pairs, and say whether it is worth it.

    Args:
        argv: the arguments after `compare`; those that it does not know go to both trainings, as for `fit`.

    Raises:
        InvalidArgument: if the configuration has the callback already, or an argument is wrong.

    Example:
        >>> compare(["--config", "config.yaml", "--with", "AugmentedDropout"])  # doctest: +SKIP
        0
    """
    args, rest = _compare_parser().parse_known_args(argv)
    if bool(args.with_) == bool(args.without):
        raise InvalidArgument("Either --with CALLBACK or --without CALLBACK is needed.")
    name = args.with_ or args.without
    own = [option for option in rest if option.startswith(("--with.", "--without."))]
    common = [option for option in rest if option not in own]
    short = str(name).rpartition(".")[2]
    entries = _callbacks_of(args.config)
    there = [e for e in entries if _class_name(e) == short]
    if args.with_:
        if there:
            raise InvalidArgument(
                f"The configuration has {short} already; `--without {short}` compares with leaving it out."
            )
        added = [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{o.removeprefix('--with.')}" for o in own)]
        sides = {short: [*common, *added], "without": common}
    else:
        if not there:
            raise InvalidArgument(
                f"The configuration has no callback {short!r}. {did_you_mean(short, map(_class_name, entries))}"
            )
        left = yaml.safe_dump([e for e in entries if e not in there], default_flow_style=True, width=10**6).strip()
        sides = {short: common, "without": [*common, f"--trainer.callbacks={left}"]}
    folder = Path(args.output or f"studies/compare_{short}")
    content = _study_content(args, folder, sides)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    found = Study.from_yaml(file)
    print(*plan_lines(found, brief=True), sep="\n")
    with _progress() as tell:
        analysis = found.resume(tell=tell)
    return _finish(found, analysis)


def _study_content(args: argparse.Namespace, folder: Path, sides: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "study": {
            "name": folder.name,
            "metric": args.metric,
            "mode": args.mode,
            "stage": args.stage,
            "folder": str(folder),
        },
        "pipelines": {name: {"config": args.config, "overrides": options} for name, options in sides.items()},
        "sources": {"vary": args.vary, "replicates": args.replicates},
        "test": {"gamma": args.gamma, "reference": "without"},
        "engine": {"workers": args.workers},
        **({"track": {"wandb": {"project": args.wandb}}} if args.wandb else {}),
    }


def _callbacks_of(paths: Sequence[str]) -> list[Any]:
    """Return the callbacks of the last configuration that has some."""
    entries: Any = []
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InvalidArgument(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        entries = (content.get("fit") or content).get("trainer", {}).get("callbacks") or entries
    return list(entries) if isinstance(entries, list) else [entries]


def _class_name(entry: Any) -> str:
    path = entry.get("class_path") if isinstance(entry, dict) else entry
    return str(path).rpartition(".")[2]


def _changed(file: str, found: Study, engine: dict[str, Any], replicates: int | None) -> Study:
    from dataclasses import replace

    changed: dict[str, Any] = {"engine": replace(found.settings.engine, **engine)}
    if replicates is not None:
        changed["replicates"] = replicates
    return Study.from_yaml(file, **changed)


def _print_commands(found: Study) -> int:
    print(*found.commands(), sep="\n")
    sweep = found.settings.path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(found.sweep(), sort_keys=False), encoding="utf-8")
    print(f"# the same for W&B agents: wandb sweep {sweep}", file=sys.stderr)
    print(f"# then: {PROGRAM} study report {found.file}", file=sys.stderr)
    return 0


def _finish(found: Study, analysis: Analysis) -> int:
    files = found.report()
    for comparison in analysis.comparisons:
        print(comparison.sentence(found.settings.metric))
        if comparison.advice():
            print(comparison.advice())
    print(*(f"problem: {text}" for text in analysis.problems), sep="\n" if analysis.problems else "")
    if found.settings.wandb is not None:
        found.track(files)
    print(*files, sep="\n")
    return int(any(run.status == "failed" for _, run in analysis.rows))


@contextmanager
def _progress() -> Iterator[Any]:
    """Show a line for every run, or a bar with the time left in a terminal."""
    if not sys.stdout.isatty():
        yield lambda p: print(_line(p), flush=True)
        return
    from rich.progress import Progress as Bar
    from rich.progress import TimeRemainingColumn

    with Bar(*Bar.get_default_columns()[:-1], TimeRemainingColumn()) as bar:
        task = bar.add_task("runs", total=None)

        def tell(p: Progress) -> None:
            bar.update(task, completed=p.done + p.failed, total=p.total)
            bar.console.print(_line(p), markup=False)

        yield tell


def _line(p: Progress) -> str:
    told = p.error if p.error else ", ".join(f"{k} {v:.5g}" for k, v in list((p.metrics or {}).items())[:4])
    left = "" if p.seconds_left is None else f", {_duration(p.seconds_left)} left"
    failed = f", {p.failed} failed" if p.failed else ""
    return f"[{p.done}/{p.total}{failed}{left}] {p.run.pipeline} {p.run.run_id}: {told}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _study_parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:<8} {text}" for name, text in _VERBS.items())
    parser = OneLineParser(
        prog=f"{PROGRAM} study",
        description=f"Compare pipelines over runs in which every source of variation has its own seeds.\n\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB")
    parser.add_argument("file", help="study.yaml")
    parser.add_argument("runs", nargs="*", help="for diff: two runs, as `A/0`, or their ids")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="for run: this run alone")
    parser.add_argument("--replicates", type=int, help="in place of those of the file")
    parser.add_argument("--workers", type=int, help="runs at once, in place of those of the file")
    parser.add_argument("--engine", choices=ENGINES, help="in place of the file's")
    parser.add_argument("--process", choices=PROCESSES, help="in place of the file's")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} compare",
        description="Train a configuration with and without a callback on the same seeds, and say whether it is worth "
        "it. Arguments of the callback: --with.NAME=VALUE. Other options go to both, as for `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="YAML as for fit; may be given several times")
    parser.add_argument("--with", dest="with_", metavar="CALLBACK", help="class to add, short name or path")
    parser.add_argument("--without", metavar="CALLBACK", help="class in the configuration to leave out")
    parser.add_argument("--metric", default="val/accuracy", help="as the module logs it; default val/accuracy")
    parser.add_argument("--mode", choices=["max", "min"], default="max", help="which is better; default max")
    parser.add_argument(
        "--stage", choices=["fit+validate", "fit+test"], default="fit+validate", help="what measures it"
    )
    parser.add_argument("--replicates", type=int, default=29, help="pairs; default 29")
    parser.add_argument("--vary", nargs="+", default=["init", "split", "order", "augment", "dropout"], help="sources")
    parser.add_argument("--gamma", type=float, default=0.75, help="P(A>B) that would matter; default 0.75")
    parser.add_argument("--workers", type=int, default=1, help="runs at once; default 1")
    parser.add_argument("--wandb", metavar="PROJECT", help="also track in W&B")
    parser.add_argument("--output", help="folder; default studies/compare_<callback>")
    return parser
