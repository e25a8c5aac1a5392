from __future__ import annotations

import importlib
import sys

import pytest

from lightning_methods import catalog
from lightning_methods.errors import MissingDependency


def test_every_technique_is_imported_or_named():
    for name in catalog.techniques():
        assert f"lightning_methods.{name}" in sys.modules or catalog.SKIPPED[name]
    assert not {"core", "report", "cli", "data", "models"} & set(catalog.techniques())


@pytest.fixture
def importing(monkeypatch):
    """Let the import of one technique raise."""

    def prepare(error):
        def fake(name):
            if name == "lightning_methods.scattering":
                raise error

        monkeypatch.setattr(catalog, "techniques", lambda: ["scattering", "other"])
        monkeypatch.setattr(importlib, "import_module", fake)
        return catalog._import_all

    return prepare


def test_a_missing_extra_is_skipped_and_named(importing):
    assert importing(MissingDependency("needs torch_geometric"))() == {"scattering": "needs torch_geometric"}
    absent = ModuleNotFoundError("No module named 'torch_geometric.data'", name="torch_geometric.data")
    assert list(importing(absent)()) == ["scattering"]


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torhc'", name="torhc"),
        ImportError("cannot import name 'x' from 'torch_geometric'", name="torch_geometric"),
    ],
)
def test_any_other_import_error_is_shown(importing, error):
    with pytest.raises(ImportError):
        importing(error)()
