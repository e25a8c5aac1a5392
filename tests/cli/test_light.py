"""What must run on a broken installation: help, list, card and doctor."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

import lightning_methods
from lightning_methods.cli import COMMANDS, cards, main
from lightning_methods.errors import InvalidArgument


def test_importing_the_package_costs_nothing():
    code = (
        "import sys; before = set(sys.modules); import lightning_methods; dir(lightning_methods);"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "assert new == {'lightning_methods'}, new;"
        "assert not [name for name in sys.modules if name.startswith('lightning_methods.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(light, argv):
    done = light(*(argv or ["--help"]))
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_python_m_is_the_command(tmp_path):
    command = [sys.executable, "-m", "lightning_methods"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout == (
        f"lightning-methods {lightning_methods.__version__}\n"
    )
    assert "commands:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_list_on_a_broken_installation(light):
    done = light("list")
    assert done.returncode == 0, done.stderr
    header, *rows = [line for line in done.stdout.splitlines() if line.strip() and "──" not in line]
    assert header.split() == ["method", "and", "its", "classes", "kind", "what", "it", "does"]
    # nothing is folded in a pipe, and brackets are text
    assert rows[0].rstrip().split(maxsplit=1) == [
        "snnl",
        "Soft nearest neighbour loss. Frosst, Papernot and Hinton, ICML 2019, arXiv:1902.01889",
    ]
    assert rows[1].split(maxsplit=2)[:2] == ["SoftNearestNeighborLoss", "Callback"]
    assert "how classes mix [per layer]" in rows[1]
    assert rows[2].split(maxsplit=2)[:2] == ["Entanglement", "Metric"]


def test_card_on_a_broken_installation(light):
    for name in ("snnl", "Entanglement"):
        done = light("card", name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "# Soft nearest neighbour loss\n\nText of the **card**.\n"


def test_an_unknown_card_or_command_names_the_closest_and_exits_with_2(light):
    done = light("card", "snl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lightning-methods card: error: There is no card 'snl'. Did you mean 'snnl'?\n"
    done = light("fitt")
    assert done.returncode == 2
    assert "There is no command 'fitt'. Did you mean 'fit'" in done.stderr
    assert light("card").returncode == 2


def test_doctor_on_a_broken_installation(light):
    done = light("doctor")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    failures = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert [line.split("`")[1] for line in failures] == ["import torch", "import torchvision", "import lightning"]
    assert all("torchvision::nms does not exist" in line for line in failures)
    assert "-> python -c 'import torch' shows all" in done.stdout


def test_a_terminal_gets_the_card_formatted(monkeypatch, package):
    monkeypatch.setattr(cards, "PACKAGE", package)
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["card", "snnl"]) == 0
        terminal.flush()
        shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "Text of the" in shown
    assert "**" not in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# no front matter\n", "must begin with YAML"),
        ("---\ntechnique: x\npaper: y\n---\n", "KeyError: 'classes'"),
        ("---\ntechnique: x\npaper: y\nclasses: {A: Callback}\n---\n", r"needs technique, paper and classes"),
        ("---\n: : :\n---\n", "needs technique"),
    ],
)
def test_a_card_with_bad_front_matter_says_which_and_what(package, text, says):
    (package / "snnl/README.md").write_text(text)
    with pytest.raises(InvalidArgument, match=says) as error:
        cards.read_cards(package)
    assert "snnl/README.md" in str(error.value)


def test_the_cards_of_the_house_can_be_read():
    from lightning_methods import catalog

    known = {card.method for card in cards.read_cards()}
    assert known <= set(catalog.techniques())
    for card in cards.read_cards():
        assert card.classes


def test_a_house_without_cards_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cards, "PACKAGE", tmp_path)
    assert main(["list"]) == 0
    assert "No technique is installed" in capsys.readouterr().out
