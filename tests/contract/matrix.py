"""The compatibility matrix: from the contract's outcomes to a table in README.md and in each method's card.

`python -m tests.contract.matrix` runs the contract and writes the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.contract.recipes import Recipe

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- compatibility:begin -->", "<!-- compatibility:end -->"

# group of cases -> its column
GROUPS = {
    "plain": "fit",
    "accumulate": "accumulate",
    "precision": "bf16, fp16",
    "clip": "clip",
    "compile": "compile",
    "checkpointing": "activation ckpt",
    "resume": "resume",
    "ddp": "DDP",
    "manual": "manual opt.",
    "averaging": "SWA, EMA",
    "beside": "other methods",
    "detach": "clean detach",
    "modes": "trainer modes",
    "loggers": "loggers",
    "foreign": "`pytorch_lightning`",
}

SIGNS = {"yes": "✓", "refused": "refused"}

Outcomes = Mapping[tuple[str, str], str]


class Update(NamedTuple):
    """The files whose table was not that of the outcomes, and what to tell about all files."""

    paths: list[Path]
    lines: list[str]


def missing(outcomes: Outcomes, recipes: Iterable[Recipe]) -> list[str]:
    """Return which cases did not run (or are in no column), as `recipe: group`."""
    wanted = {(recipe.name, group) for recipe in recipes for group in GROUPS}
    return [f"{recipe}: {group}" for recipe, group in sorted(wanted ^ set(outcomes))]


def table(outcomes: Outcomes, recipes: Iterable[Recipe]) -> str:
    """Return the Markdown table: a row per class or use of it, a column per group of cases."""
    rows: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        rows.setdefault(recipe.row, []).append(recipe)
    lines = [["", *GROUPS.values()], ["---", *[":-:"] * len(GROUPS)]]
    for row, members in rows.items():
        lines.append([row])
        for group in GROUPS:
            found = {outcomes[recipe.name, group] for recipe in members}
            lines[-1].append(SIGNS[found.pop()] if len(found) == 1 else "in part")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def update(root: Path, outcomes: Outcomes, recipes: Iterable[Recipe], *, write: bool) -> Update:
    """Compare the tables between the markers with the outcomes, and write them if asked to.

    A file that is absent or has no markers is only told about.
    """
    recipes = list(recipes)
    documents = {root / "README.md": recipes}
    for method in dict.fromkeys(recipe.method for recipe in recipes):
        card = root / "lightning_methods" / method / "README.md"
        documents[card] = [recipe for recipe in recipes if recipe.method == method]
    paths, lines = [], []
    for path, shown in documents.items():
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if BEGIN not in text or END not in text:
            lines.append(f"{name}: no place for the matrix ({BEGIN} ... {END})")
            continue
        new = re.sub(
            f"{re.escape(BEGIN)}.*?{re.escape(END)}",
            lambda _, shown=shown: f"{BEGIN}\n\n{table(outcomes, shown)}\n\n{END}",
            text,
            flags=re.DOTALL,
        )
        if new == text:
            continue
        paths.append(path)
        if write:
            path.write_text(new, encoding="utf-8")
        lines.append(f"{name}: {'written' if write else 'stale; run `python -m tests.contract.matrix`'}")
    return Update(paths, lines)


if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main([str(ROOT / "tests" / "contract"), "--write-matrix", "-q", *sys.argv[1:]]))
