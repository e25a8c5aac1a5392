"""The arrows of the house, read from the imports: errors <- core, report <- methods <- catalog <- cli."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_methods"
ROOMS = {"core", "report", "data", "models", "cli"}
METHODS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py") if p.parent.name not in ROOMS)
FILES = sorted(PACKAGE.rglob("*.py"))

# packages that an extra brings; they may be imported in functions, never by importing ours
OPTIONAL = {"PIL", "pandas", "sklearn", "torch_geometric", "torchvision", "wandb"}
LIGHT = {"lightning_methods", "lightning_methods.errors"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Return the modules that a file imports when it runs, `if TYPE_CHECKING:` left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(ast.Module(body=[other], type_ignores=[]))
                continue
            if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.add(child.module or "")
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def own(path: Path) -> set[str]:
    """Return which rooms of the package a file imports: `errors`, `core`, `core._lightning`, `snnl`, ..."""
    return {name.partition(".")[2] for name in imports(path) if name.split(".")[0] == "lightning_methods"} - {""}


def room(path: Path) -> str:
    """Return the first part of a file's path in the package, `errors` for `errors.py`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def allowed(path: Path) -> set[str]:
    """Return the rooms that a file may import."""
    return {
        "__init__": set(),
        "__main__": {"cli"},
        "errors": set(),
        "core": {"errors", "core"},
        "report": {"errors", "core._lightning", "report"},
        "data": {"errors", "core._lightning", "data"},
        "models": {"errors", "core._lightning", "models"},
        "catalog": {"errors", "data", "models", *METHODS},
        "cli": {"errors", "core", "report", "catalog", "data", "models", "cli", *METHODS},
    }.get(room(path), {"errors", "core", "report", room(path)})


def reaches(name: str, rooms: set[str]) -> bool:
    return any(name == r or name.startswith(f"{r}.") for r in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_arrows(path: Path) -> None:
    wrong = {name for name in own(path) if not reaches(name, allowed(path))}
    assert not wrong, f"{path.name} may import {sorted(allowed(path))}, and imports {sorted(wrong)}"


@pytest.mark.parametrize("method", METHODS)
def test_the_maths_needs_torch_and_errors_only(method: str) -> None:
    path = PACKAGE / method / "functional.py"
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "scipy", "lightning_methods"}
    assert own(path) <= {"errors"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_optional_packages_and_pyplot(path: Path) -> None:
    at_import = {name.split(".")[0] for name in imports(path, top_level=True)}
    assert not at_import & OPTIONAL
    assert not any("pyplot" in name for name in imports(path))


def test_lightning_is_imported_in_one_place() -> None:
    importers = {
        p.relative_to(PACKAGE).as_posix()
        for p in FILES
        if {name.split(".")[0] for name in imports(p)} & {"lightning", "pytorch_lightning"}
    }
    # the command line is LightningCLI, which has no counterpart in the other family's callbacks
    cli = {f"cli/{name}.py" for name in ("app", "save_config", "seed_streams", "study_run")}
    assert importers <= {"core/_lightning.py", *cli}
    assert "core/_lightning.py" in importers


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_card_example_and_config(method: str) -> None:
    root = PACKAGE.parent
    assert (PACKAGE / method / "README.md").is_file()
    assert list((root / "configs" / method).glob("*.yaml"))
    example = root / "examples" / f"{method}.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40


def test_every_export_is_typed_for_checkers() -> None:
    import lightning_methods

    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    for name, module in lightning_methods._EXPORTS.items():
        assert f"from lightning_methods.{module} import {name} as {name}" in text
