"""`list` and `card`: what the techniques' cards say, read from their files without importing any of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_methods.errors import InvalidArgument, did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
_FENCE = "---"


@dataclass(frozen=True)
class Card:
    """A technique's card: the front matter of `lightning_methods/<method>/README.md` and the text below it."""

    method: str
    technique: str
    paper: str
    classes: Mapping[str, tuple[str, str]]  # name -> (kind, one line)
    text: str


def read_cards(package: Path | None = None) -> list[Card]:
    """Read the cards of all techniques, in the order of their names.

    Args:
        package: the folder that holds a folder a method, default ours.

    Raises:
        InvalidArgument: if the front matter of a card is not as it must be.

    Example:
        >>> names = [card.method for card in read_cards()]
    """
    return [read_card(path) for path in sorted((package or PACKAGE).glob("*/README.md"))]


def read_card(path: Path) -> Card:
    """Read one card.

    Args:
        path: a `README.md` that begins with YAML between two lines `---`: technique, paper, classes.

    Raises:
        InvalidArgument: if the front matter is missing or incomplete.
    """
    import yaml

    lines = path.read_text(encoding="utf-8").splitlines()
    fences = [i for i, line in enumerate(lines) if line.rstrip() == _FENCE][:2]
    if len(fences) < 2 or fences[0] != 0:
        raise InvalidArgument(f"{path} must begin with YAML between two lines {_FENCE!r}.")
    try:
        front: Any = yaml.safe_load("\n".join(lines[1 : fences[1]]))
        classes = {str(name): (str(kind), str(line)) for name, (kind, line) in front["classes"].items()}
        technique, paper = str(front["technique"]), str(front["paper"])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"The front matter of {path} needs technique, paper and classes "
            f"(name: [kind, one line]): {type(error).__name__}: {error}"
        ) from error
    return Card(path.parent.name, technique, paper, classes, "\n".join(lines[fences[1] + 1 :]).strip() + "\n")


def list_techniques(argv: Sequence[str]) -> int:
    """Print the table of techniques.

    Args:
        argv: the arguments after `list`.
    """
    description = "The techniques, their classes and papers. `card METHOD` tells all about one."
    argparse.ArgumentParser(prog="lightning-methods list", description=description).parse_args(argv)
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    cards = read_cards()
    if not cards:
        print(f"No technique is installed: there is no card under {PACKAGE}.")
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header, whole in (("method and its classes", True), ("kind", True), ("what it does", False)):
        table.add_column(header, no_wrap=whole)
    for card in cards:
        # a row for the technique and its paper: a column for each would not fit a terminal of 80 characters
        table.add_row(escape(card.method), "", escape(f"{card.technique}. {card.paper}"), style="bold")
        for name, (kind, line) in card.classes.items():
            table.add_row(*map(escape, (f"  {name}", kind, line)))
        table.add_section()
    # a pipe has no width: let no cell be folded there
    Console(width=None if sys.stdout.isatty() else 320, highlight=False).print(table)
    return 0


def show_card(argv: Sequence[str]) -> int:
    """Print the card of one technique: formatted on a terminal, as it stands in the file otherwise.

    Args:
        argv: the arguments after `card`.

    Raises:
        InvalidArgument: if there is no such method.
    """
    parser = argparse.ArgumentParser(prog="lightning-methods card", description="All about one technique.")
    parser.add_argument("method", metavar="METHOD", help="a name of the first column of `lightning-methods list`")
    wanted = parser.parse_args(argv).method
    cards = {card.method: card for card in read_cards()}
    # a class name is as good: users meet these first
    owners = {name: card for card in cards.values() for name in card.classes}
    card = cards.get(wanted) or owners.get(wanted)
    if card is None:
        raise InvalidArgument(f"There is no card {wanted!r}. {did_you_mean(wanted, [*cards, *owners])}")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(card.text))
    else:
        print(card.text, end="")
    return 0
