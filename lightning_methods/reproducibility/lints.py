"""What commonly makes runs less, or more, alike than their author believes."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_methods.reproducibility.fingerprints import differences

# what launchers set for each process that they start, beside Lightning's own and torchrun's
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")

# functions of a datamodule in which a split is made
_SPLITTING = ("__init__", "prepare_data", "setup")


def lint_config(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the seed in a LightningCLI configuration.

    Args:
        config: as read from YAML.

    Example:
        >>> lint_config({"seed_everything": 3})
        []
        >>> len(lint_config({"seed_everything": True}))
        1
    """
    given = config.get("seed_everything", True)
    if given is True:
        return [
            "seed_everything is true or left out, which does not draw a seed: LightningCLI takes 0, or what"
            " PL_GLOBAL_SEED says, so that every run is the same run. Give a number, or use SeedStreams."
        ]
    return []


def lint_environment(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return what in the environment makes runs alike, or ranks unlike.

    Args:
        environment: variables; those of this process by default.

    Example:
        >>> lint_environment({"PL_GLOBAL_SEED": "7"})[0].partition(":")[0]
        'PL_GLOBAL_SEED=7'
    """
    env = os.environ if environment is None else environment
    found = []
    if env.get("PL_GLOBAL_SEED"):
        found.append(
            f"PL_GLOBAL_SEED={env['PL_GLOBAL_SEED']}: a seed_everything of an earlier run in this process or shell is"
            " still set, and is what a run without a seed of its own takes. Remove the variable."
        )
    launched = next((name for name in _RANKS if name in env), None)
    if launched is not None and "RANK" not in env:
        found.append(
            f"{launched} is set and RANK is not: this launcher is not recognised, so that every process takes itself"
            " for rank 0 and trains, seeds and logs alone. Export RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and"
            " MASTER_PORT, or pass a ClusterEnvironment."
        )
    return found


def lint_datamodule(datamodule: Any) -> list[str]:
    """Return where a datamodule's source fixes the seed of its split, so that no seed from outside changes it.

    Args:
        datamodule: an instance or class; code that cannot be read is passed over.

    Example:
        >>> lint_datamodule(object)
        []
    """
    cls = datamodule if isinstance(datamodule, type) else type(datamodule)
    found = []
    for name in _SPLITTING:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(vars(cls)[name])))
        except (KeyError, OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            fixed = _fixed_seed(node)
            if fixed:
                found.append(
                    f"{cls.__name__}.{name} has {fixed}: its split is the same for every seed of `split`. Make the seed"
                    " an argument, or leave the generator out."
                )
    return found


def lint_effects(fingerprints: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """Return the sources that were varied and changed nothing.

    Args:
        fingerprints: source -> fingerprints of the runs in which it alone was varied.

    Example:
        >>> lint_effects({"dropout": [{"final": "aa"}, {"final": "aa"}]})[0].partition(":")[0]
        "source 'dropout' has no effect on this pipeline"
    """
    found = []
    for source, runs in fingerprints.items():
        finals = [run.get("final") for run in runs]
        if len(finals) > 1 and None not in finals and len(set(finals)) == 1:
            found.append(
                f"source {source!r} has no effect on this pipeline: {len(finals)} runs are bitwise identical. Nothing"
                " draws from it, or what does has a seed of its own."
            )
    return found


def lint_determinism(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Return where two runs with the same seeds differ.

    Args:
        first, second: their fingerprints.

    Example:
        >>> lint_determinism({"order": "1", "final": "a"}, {"order": "1", "final": "a"})
        []
    """
    changed = differences(first, second)
    if not changed:
        return []
    return [
        f"the pipeline is not deterministic: two runs with the same seeds differ in {', '.join(changed)}. A generator"
        " that is private to a library, threads, or operations without a deterministic form are behind it."
    ]


def _fixed_seed(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    seeds = [a for a in node.args[:1] if name in ("manual_seed", "default_rng", "seed", "RandomState", "Random")]
    seeds += [k.value for k in node.keywords if k.arg in ("random_state", "seed")]
    if any(isinstance(s, ast.Constant) and isinstance(s.value, int) for s in seeds):
        return ast.unparse(node)
    return ""
