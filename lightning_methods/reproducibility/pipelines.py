"""What is compared: LightningCLI configurations, or Python functions of the seeds."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning_methods.errors import InvalidArgument

# who turns a configuration into a training; the command line provides it, which methods do not import
CONFIG_RUNNER = "lightning_methods.cli.study_run:prepare"

# values that are told apart by what they print
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))

PipelineFunction = Callable[[dict[str, int]], Any]


class Prepared(Protocol):
    """A pipeline ready to run: read and checked once, run with many seeds."""

    description: str

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Run it with `task["seeds"]` and return `metrics`, and `fingerprints` where there are some."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """One of the things compared.

    Args:
        name: of the pipeline.
        config: YAML files as for `fit`, later ones on top.
        overrides: further options of `fit`, as `--model.lr=0.1`.
        target: `package.module:function` or `file.py:function`, for a function.
        function: the function itself, where it was given as such.
        cli: `package.module:Class` of the user's own LightningCLI, default ours.
    """

    name: str
    config: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    target: str = ""
    function: PipelineFunction | None = field(default=None, compare=False)
    cli: str = ""

    def plain(self) -> dict[str, Any]:
        """Return what another process needs to prepare the same."""
        return {
            "name": self.name,
            "config": list(self.config),
            "overrides": list(self.overrides),
            "target": self.target,
            "cli": self.cli,
        }


def prepare(pipeline: Pipeline | Mapping[str, Any], settings: Mapping[str, Any]) -> Prepared:
    """Read and check a pipeline.

    Args:
        pipeline: or what `Pipeline.plain` made of it.
        settings: `metric`, `stage`, `checkpoint` and what else a configuration's runner reads.

    Raises:
        InvalidArgument: if its function or its configuration cannot be found or read.
    """
    if not isinstance(pipeline, Pipeline):
        lists = {key: tuple(pipeline[key]) for key in ("config", "overrides")}
        pipeline = Pipeline(**{**pipeline, **lists})
    if pipeline.config:
        runner = resolve(CONFIG_RUNNER)
        prepared: Prepared = runner(pipeline, settings)
        return prepared
    function = pipeline.function if pipeline.function is not None else resolve(pipeline.target)
    return FunctionRunner(function, str(settings["metric"]))


def fingerprint(prepared: Prepared) -> str:
    """Return the hash that names a pipeline: another configuration or another code is another pipeline."""
    return hashlib.sha256(prepared.description.encode()).hexdigest()[:16]


class FunctionRunner:
    """A Python function as a pipeline.

    Args:
        function: from the seed of each source to a score, or to a dictionary of scores; an entry `per_example` may
            hold 0 or 1 for every test example, the same for all runs.
        metric: name of the score, where the function returns only that.
    """

    def __init__(self, function: PipelineFunction, metric: str) -> None:
        self.function = function
        self.metric = metric
        self.description = describe_function(function)

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Run it with the seeds of a task."""
        found = self.function(dict(task["seeds"]))
        if not isinstance(found, Mapping):
            return {"metrics": {self.metric: found}}
        outcome = {k: v for k, v in found.items() if k != "per_example"}
        return {"metrics": outcome, "per_example": found.get("per_example")}


def describe_function(function: Any) -> str:
    """Return what identifies a function: its source, the plain values that it refers to, and the functions it calls.

    Of what it calls, functions of its own module count, and of theirs in turn; what is imported does not.
    """
    return "\n".join(_described(function, set()))


def _described(function: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield f"{function.args!r} {sorted(function.keywords.items())!r}"
        function = function.func
    if id(function) in seen:
        return
    seen.add(id(function))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", "")
    yield f"{module}:{name} {getattr(function, '__defaults__', None)!r}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    yield source
    if "<lambda>" in name or not source:  # several share a line; their code tells them apart
        yield repr(_code(getattr(function, "__code__", None)))
    if not inspect.isfunction(function):
        return
    found = inspect.getclosurevars(function)
    for key, value in sorted({**found.globals, **found.nonlocals}.items()):
        if isinstance(value, _PLAIN):
            yield f"{key}={value!r}"
        elif inspect.isfunction(value) and value.__module__ == module:
            yield from _described(value, seen)


def _code(code: Any) -> Any:
    if code is None:
        return None
    constants = [_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return code.co_code.hex(), constants, code.co_names


def target_of(function: Any) -> str:
    """Return `module:name` or `file.py:name` of a function that other processes can import, else an empty text."""
    name = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", ""))
    if not name or "<" in name or module is None:
        return ""
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    return f"{Path(file).resolve()}:{name}" if file else ""


def resolve(target: str) -> Any:
    """Return the object of `package.module:name` or `file.py:name`.

    Args:
        target: where it is.

    Raises:
        InvalidArgument: if there is no such module or name.

    Example:
        >>> resolve("math:sqrt")(4.0)
        2.0
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise InvalidArgument(f"{target!r} is no 'package.module:name' or 'file.py:name'.")
    try:
        found: Any = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError) as error:
        raise InvalidArgument(f"{target!r} cannot be imported: {error}") from error
    return found


@functools.cache
def _module_of_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"study_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
