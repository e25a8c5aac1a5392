"""The table says what the outcomes say, is written between its markers only, and cannot go stale unnoticed."""

from __future__ import annotations

import pytest

from tests.contract import matrix
from tests.contract.plugin import MatrixKeeper
from tests.contract.recipes import RECIPES, Recipe

TWO = [
    Recipe("a-one", "a", "`A`"),
    Recipe("a-two", "a", "`A`", refused={"clip": ValueError}),
    Recipe("b", "b", "`B`", refused={"manual": ValueError}),
]
OUTCOMES = {(r.name, g): "refused" if g in r.refused else "yes" for r in TWO for g in matrix.GROUPS}
PAGE = f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("README.md", "lightning_methods/a/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PAGE)
    return tmp_path


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return dict(zip(matrix.GROUPS, [cell.strip() for cell in line.split("|")[2:-1]], strict=True))


def test_the_table_has_a_row_per_use_and_a_column_per_group():
    text = matrix.table(OUTCOMES, TWO)
    assert len(text.splitlines()) == 4
    assert len({line.count("|") for line in text.splitlines()}) == 1
    first, second = cells(text, "`A`"), cells(text, "`B`")
    assert {group for group, cell in first.items() if cell != "✓"} == {"clip"}
    assert (first["clip"], second["clip"], second["manual"]) == ("in part", "✓", "refused")


def test_writing_keeps_the_rest_and_then_nothing_is_stale(folder):
    stale = matrix.update(folder, OUTCOMES, TWO, write=False)
    assert [path.parent.name for path in stale.paths] == [folder.name, "a"]
    assert (folder / "README.md").read_text() == PAGE
    matrix.update(folder, OUTCOMES, TWO, write=True)
    assert matrix.update(folder, OUTCOMES, TWO, write=False).paths == []
    readme, card = ((folder / name).read_text() for name in ("README.md", "lightning_methods/a/README.md"))
    assert readme.startswith(f"before\n{matrix.BEGIN}\n")
    assert readme.endswith(f"{matrix.END}\nafter\n")
    assert "old" not in readme
    assert "`B`" in readme
    assert "`B`" not in card


def test_an_absent_file_or_marker_is_told_and_nothing_is_created(folder):
    update = matrix.update(folder, OUTCOMES, TWO, write=True)
    assert any(line.startswith("lightning_methods/b/README.md: no place") for line in update.lines)
    assert not (folder / "lightning_methods/b").exists()
    (folder / "README.md").write_text("no markers")
    assert matrix.update(folder, OUTCOMES, TWO, write=True).lines[0].startswith("README.md: no place")
    assert (folder / "README.md").read_text() == "no markers"


def test_only_a_complete_run_decides():
    assert matrix.missing(OUTCOMES, TWO) == []
    assert matrix.missing({k: v for k, v in OUTCOMES.items() if k != ("b", "ddp")}, TWO) == ["b: ddp"]
    assert matrix.missing({**OUTCOMES, ("b", "new"): "yes"}, TWO) == ["b: new"]


class Session:
    testsfailed = 0
    exitstatus = pytest.ExitCode.OK


@pytest.mark.parametrize("write", [False, True])
def test_a_stale_table_fails_the_session_unless_it_is_written(tmp_path, monkeypatch, write):
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    keeper, session = MatrixKeeper(write=write), Session()
    keeper.outcomes = {(r.name, g): "refused" if g in r.refused else "yes" for r in RECIPES for g in matrix.GROUPS}
    keeper.pytest_sessionfinish(session)
    assert session.exitstatus == (pytest.ExitCode.OK if write else pytest.ExitCode.TESTS_FAILED)
    assert any(line.startswith("README.md: " + ("written" if write else "stale")) for line in keeper.lines)
