"""`doctor`: what is installed, whether the parts fit together, and how to mend what does not.

Nothing that may be broken is imported here: versions come from the metadata of the packages, builds from their
`version.py` read as text, and whether torch, torchvision and lightning work is asked in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

DISTRIBUTION = "lightning-methods"
MALICIOUS = {"2.6.2", "2.6.3"}
OLDEST_SAFE = (2, 6, 6)
EXTRAS = {
    "vision": "image folders, MNIST and CIFAR-10",
    "graph": "geometric scattering on graphs",
    "wandb": "the Weights & Biases logger",
    "digits": "scikit-learn's digits, on which examples and the demo run",
}
_PATIENCE = 180  # seconds for an import on a cold disk
_PROBES = {
    "torch": (
        "import json, torch, torch.distributed as d; torch.ones(2) @ torch.ones(2);"
        "on = d.is_available(); cuda = torch.cuda.is_available();"
        "print(json.dumps({'version': torch.__version__, 'gloo': on and d.is_gloo_available(),"
        "'nccl': on and d.is_nccl_available(), 'built': torch.version.cuda,"
        "'devices': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []}))"
    ),
    "torchvision": "import torchvision; torchvision.ops.nms; print('{}')",
    "lightning": "import lightning.pytorch; print('{}')",
}


class Finding(NamedTuple):
    """One line of the report; `fix` says what to do about a warning or a failure."""

    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def examine(argv: Sequence[str]) -> int:
    """Print all findings and return 1 if one is a failure.

    Args:
        argv: the arguments after `doctor`.

    Example:
        >>> examine([])  # doctest: +SKIP
        ok    Python 3.11.7
        0
    """
    description = "Check this installation; each line says ok or how to mend it. The exit code is 1 if something fails."
    argparse.ArgumentParser(prog="lightning-methods doctor", description=description).parse_args(argv)
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    failed = False
    for check in CHECKS:
        for finding in _guarded(check):
            failed |= finding.status == "fail"
            console.print(Text.assemble((f"{finding.status:<5} ", styles[finding.status]), finding.text))
            if finding.fix:
                console.print(Text(f"      -> {finding.fix}"))
    return int(failed)


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = sys.version.split()[0]
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if _satisfies(version, wanted):
        yield Finding("ok", f"Python {version}")
    else:
        yield Finding("fail", f"Python {version} does not satisfy {wanted}", "make the environment with a newer Python")


def requirements() -> Iterator[Finding]:
    """What the package itself needs, with the versions it asks for."""
    for name, specifier, extra in _own_requirements():
        if extra:
            continue
        found = _version(name)
        if found is None:
            yield Finding("fail", f"{name} is not installed", f"pip install '{name}{specifier}'")
        elif not _satisfies(found, specifier):
            yield Finding("fail", f"{name} {found} does not satisfy {specifier}", f"pip install '{name}{specifier}'")
        else:
            yield Finding("ok", f"{name} {found}")
    # jsonargparse's extra `signatures`, without which LightningCLI starts and then cannot read docstrings
    missing = [name for name in ("docstring-parser", "typeshed-client") if _version(name) is None]
    if missing and _version("jsonargparse"):
        fix = "pip install 'jsonargparse[signatures]'"
        yield Finding("fail", f"jsonargparse lacks {' and '.join(missing)}: the command line cannot work", fix)


def torch_and_torchvision() -> Iterator[Finding]:
    """Whether the two were made for each other; `+cpu` beside `+cu` breaks `import lightning`."""
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None or vision is None:
        return
    for text in metadata.requires("torchvision") or ():
        name, specifier, extra = _parse_requirement(text)
        if name == "torch" and not extra and not _satisfies(torch, specifier):
            fix = "install both in one command: pip install --upgrade torch torchvision"
            yield Finding("fail", f"torchvision {vision} needs torch{specifier}, torch {torch} is installed", fix)
            return
    builds = {name: _build(name) for name in ("torch", "torchvision")}
    if None not in builds.values() and len(set(builds.values())) > 1:
        text = f"torch is built for {builds['torch']} and torchvision for {builds['torchvision']}"
        yield Finding(
            "fail",
            f"{text}: `import torchvision`, and with it `import lightning`, can die",
            "install both in one command, as pytorch.org says for your machine: "
            "pip install --force-reinstall torch torchvision",
        )
    else:
        build = f", both built for {builds['torch']}" if builds["torch"] and builds["torchvision"] else ""
        yield Finding("ok", f"torch {torch} and torchvision {vision} belong together{build}")


def lightning() -> Iterator[Finding]:
    """Releases of Lightning that stole tokens or hold known holes, and the two families side by side."""
    found = {name: _version(name) for name in ("lightning", "pytorch-lightning")}
    for name, version in found.items():
        if version is None:
            continue
        traces = _malware(name)
        if version in MALICIOUS or traces:
            seen = f": {', '.join(traces)}" if traces else ""
            yield Finding(
                "fail",
                f"{name} {version} is a malicious release that steals tokens{seen}",
                "remove this environment and the caches of pip, replace every token and key that this machine held, "
                "then pip install 'lightning>=2.6.6'",
            )
        elif _numbers(version) < OLDEST_SAFE:
            fix = f"pip install --upgrade '{name}>=2.6.6'"
            yield Finding("fail", f"{name} {version} has known holes that run code from a checkpoint", fix)
        else:
            yield Finding("ok", f"{name} {version} is no known malicious or vulnerable release")
    if None not in found.values():
        if len(set(found.values())) > 1:
            fix = "pip install --upgrade lightning pytorch-lightning"
            yield Finding("warn", f"lightning and pytorch-lightning differ: {found}", fix)
        else:
            yield Finding(
                "ok",
                "lightning and pytorch_lightning are both there (the first brings the second): import all from one, "
                "a module of one is refused by a Trainer of the other",
            )


def extras() -> Iterator[Finding]:
    """The optional packages and what they bring."""
    for extra, brings in EXTRAS.items():
        wanted = [(name, spec) for name, spec, of in _own_requirements() if of == extra]
        missing = [name for name, _ in wanted if _version(name) is None]
        old = [name for name, spec in wanted if name not in missing and not _satisfies(_version(name) or "0", spec)]
        fix = f"pip install 'lightning-methods[{extra}]'"
        if missing:
            yield Finding("warn", f"extra {extra} is missing ({', '.join(missing)}): {brings}", fix)
        elif old:
            yield Finding("fail", f"extra {extra}: {', '.join(old)} is too old or too new", fix)
        elif wanted:
            yield Finding("ok", f"extra {extra}: {brings}")


def wandb() -> Iterator[Finding]:
    """How Weights & Biases would run; asks no server."""
    if _version("wandb") is None:
        return
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in {"offline", "dryrun"}:
        yield Finding("ok", f"W&B mode {mode}: runs are kept in ./wandb, `wandb sync` sends them")
    elif mode == "disabled":
        yield Finding("warn", "W&B is disabled by WANDB_MODE: WandbLogger keeps nothing", "unset WANDB_MODE")
    elif _logged_in():
        yield Finding("ok", f"W&B mode {mode}, and a key is there")
    else:
        fix = "`wandb login`, or WANDB_MODE=offline to keep runs on disk"
        yield Finding("warn", f"W&B mode {mode}, and no key is there: WandbLogger would ask for one", fix)


def imports() -> Iterator[Finding]:
    """Whether torch, torchvision and lightning can be imported, and what torch can do here."""
    names = [name for name in _PROBES if _version(name) is not None]
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", _PROBES[name]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in names
    }
    for name, process in running.items():
        try:
            out, err = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield Finding("fail", f"`import {name}` took more than {_PATIENCE} seconds", "try it by hand")
            continue
        if process.returncode:
            last = next((line for line in reversed(err.strip().splitlines()) if line.strip()), "it died without a word")
            fix = f"python -c 'import {name}' shows all; reinstall torch, torchvision and lightning together"
            yield Finding("fail", f"`import {name}` fails: {last.strip()}", fix)
            continue
        yield Finding("ok", f"`import {name}` works")
        if name == "torch":
            yield from _abilities(json.loads(out.strip().splitlines()[-1]))


def compiler() -> Iterator[Finding]:
    """What torch.compile needs beside torch."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    found = next((path for path in map(shutil.which, filter(None, candidates)) if path), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found is None:
        yield Finding("warn", "no C++ compiler: torch.compile fails on the CPU", "install g++ or clang, or set CXX")
    elif not header.exists():
        yield Finding(
            "warn", f"Python.h is missing: torch.compile may fail ({header})", "install the headers of Python"
        )
    else:
        yield Finding("ok", f"C++ compiler for torch.compile: {found}")


CHECKS = (python, requirements, torch_and_torchvision, lightning, extras, wandb, imports, compiler)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; one that breaks on an odd installation must not silence the others."""
    try:
        yield from check()
    except metadata.PackageNotFoundError as error:
        # a source tree on the path: it works, and nothing says what it needs
        yield Finding("warn", f"{error.name} is not installed as a distribution", "pip install -e .")
    except Exception as error:
        yield Finding("warn", f"the check of {check.__name__} could not be finished: {type(error).__name__}: {error}")


def _abilities(found: dict[str, object]) -> Iterator[Finding]:
    devices = found["devices"]
    assert isinstance(devices, list)
    if devices:
        yield Finding("ok", f"CUDA {found['built']}: {', '.join(devices)}")
    elif shutil.which("nvidia-smi"):
        fix = "install a torch built for CUDA that fits the driver: https://pytorch.org/get-started"
        yield Finding("warn", f"there is an NVIDIA driver, and torch {found['version']} sees no GPU", fix)
    else:
        yield Finding("ok", "no GPU: trainings run on the CPU")
    if not found["gloo"]:
        fix = "reinstall torch from its official wheels"
        yield Finding("warn", "torch has no gloo: DDP on the CPU cannot run", fix)
    elif devices and not found["nccl"]:
        yield Finding("warn", "torch has no nccl: DDP on GPUs falls back to gloo and is slow", "use Linux wheels")
    else:
        yield Finding("ok", f"distributed: gloo{' and nccl' if found['nccl'] else ''}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own_requirements() -> list[tuple[str, str, str]]:
    """Return (name, specifier, extra) of what this distribution asks for."""
    return [_parse_requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]


def _parse_requirement(text: str) -> tuple[str, str, str]:
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
    return requirement.name, str(requirement.specifier), extra[1] if extra else ""


def _satisfies(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    return Path(str(metadata.distribution(name).locate_file(name.replace("-", "_"))))


def _build(name: str) -> str | None:
    """Return the build, such as cpu or cu126, that `version.py` or the metadata state, or None if neither does."""
    texts = [_version(name) or ""]
    with suppress(OSError):
        texts.insert(0, (_folder(name) / "version.py").read_text())
    tags = [found[1] for text in texts if (found := re.search(r"\d\+(\w+)", text))]
    return tags[0] if tags else None


def _malware(name: str) -> list[str]:
    """Return the files that the malicious releases carried."""
    folder = _folder(name)
    found = {path for path in (folder / "_runtime",) if path.exists()} | set(folder.rglob("router_runtime.js"))
    return sorted(str(path) for path in found)


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = re.sub(r"^https?://|[:/].*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/") + "/")
    files = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    for path in (Path(file).expanduser() for file in files if file):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False
