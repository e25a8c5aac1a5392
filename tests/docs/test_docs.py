"""What the documents show works: code blocks, configs, examples, docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torchvision import datasets

from lightning_methods.cli import main
from tests.support.datasets import write_cifar10, write_mnist

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "lightning_methods").glob("*/README.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *CARDS]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
SHORT = {"augmented_dropout.py", "cka.py"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = sorted((ROOT / "lightning_methods").rglob("*.py"))
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# what a document may show and a test cannot run: it changes the machine, or asks a server
NOT_RUN = {"pip", "uv", "git", "wandb", "cd", "source"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def slow_where(long: Callable[[Path], bool], paths: list[Path]) -> list[Any]:
    """Return the cases, of which `make test` leaves the long ones to `make test-slow`."""
    return [pytest.param(path, marks=pytest.mark.slow) if long(path) else path for path in paths]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the configs, examples and evidence of the project, and write nothing into the project."""
    for folder in ("configs", "examples", "lightning_methods"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def blocks(path: Path) -> list[tuple[str, str]]:
    return [(m.group(1), m.group(2)) for m in FENCE.finditer(path.read_text(encoding="utf-8"))]


def short(command: list[str]) -> list[str]:
    """Return a command of ours so that a training takes a moment."""
    if command[:1] == ["lightning-methods"] and len(command) > 1 and command[1] in ("fit", "validate", "test"):
        return [*command, "--trainer.fast_dev_run=true"]
    return command


@pytest.mark.parametrize("path", slow_where(CARDS.__contains__, DOCUMENTS), ids=name_of)
def test_python_and_yaml_blocks_run(path: Path, at_home: Path) -> None:
    """Python blocks of a document run one after the other, as a reader would type them; YAML is what fit accepts."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__document__"}
    for language, text in blocks(path):
        if language == "python":
            exec(compile(text, name_of(path), "exec"), names)
        elif language == "yaml" and "callbacks" in text:
            (at_home / "shown.yaml").write_text(text, encoding="utf-8")
            shown = ["--config=configs/snnl/digits.yaml", "--config=shown.yaml"]
            assert main(["fit", *shown, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0
    assert names


@pytest.mark.parametrize("path", slow_where((ROOT / "README.md").__eq__, DOCUMENTS), ids=name_of)
def test_commands_run(path: Path, at_home: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for language, text in blocks(path):
        if language != "bash":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = [w for w in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
            if not words or words[0] in NOT_RUN:
                continue
            if words[0] == "make":
                assert set(words[1:]) <= set(targets)
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
            else:
                assert words[0] == "lightning-methods", f"{name_of(path)}: no test knows how to run {line!r}"
                assert main(short(words)[1:]) in (0, 1 if words[1] == "doctor" else 0)


@pytest.mark.parametrize("path", [c for c in CONFIGS if "sweep" not in c.name], ids=name_of)
def test_configs_run(path: Path, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = ["fit", f"--config={name_of(path)}"]
    if "data" not in settings:  # a shared part, to be put on top of another
        command.insert(1, "--config=configs/snnl/digits.yaml")
    elif "root" in settings["data"].get("init_args", {}):
        write_mnist(at_home / "data")
        write_cifar10(at_home / "data")
        monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        command.append("--data.download=false")
        if "train_size" in settings["data"]["init_args"]:  # the files hold 200 images
            command.append("--data.train_size=100")
    assert main([*command, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0


@pytest.mark.parametrize("path", [c for c in CONFIGS if "sweep" in c.name], ids=name_of)
def test_sweeps_call_what_exists(path: Path, at_home: Path) -> None:
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    chosen = [f"--{name}={spec['values'][0]}" for name, spec in sweep["parameters"].items()]
    words = {"${env}": [], "${program}": [], "${args}": chosen}
    command = [w for part in sweep["command"] for w in words.get(part, [part])]
    assert sweep["program"] == "lightning-methods"
    assert main([*command, "--trainer.fast_dev_run=true"]) == 0


@pytest.mark.parametrize("path", slow_where(lambda path: path.name not in SHORT, EXAMPLES), ids=name_of)
def test_examples_run(path: Path, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With W&B offline, as the README shows it: curves, pictures and a table are on disk."""
    import wandb

    wandb.teardown()  # it keeps the settings of the first test that used it
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    shown = re.findall(r"\S+\.(?:png|csv)", Console(width=200).render_str(printed).plain)
    assert shown
    assert all((at_home / file).is_file() for file in shown)
    wandb.finish()
    media = {file.suffix for file in (at_home / "runs" / "wandb").rglob("files/media/**/*") if file.is_file()}
    assert {".png", ".json"} <= media


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstring_examples(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if path.name == "__main__.py":
        pytest.skip("running it is its only content")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_import_is_light() -> None:
    code = "import sys, lightning_methods; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "[]"
