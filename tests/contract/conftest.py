"""Every test of this folder that asks for a `recipe` runs with each of the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.recipes import RECIPES, Recipe
from tests.contract.training import Run, train
from tests.support.drawing import leave_undrawn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        metafunc.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty files in place of figures, unless a test is marked `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        leave_undrawn(monkeypatch.setattr)


@pytest.fixture
def runs(recipe: Recipe, tmp_path: Path) -> Callable[..., tuple[Run, Run]]:
    """Return a function that trains the recipe and its reference under the same settings."""

    def both(**settings: Any) -> tuple[Run, Run]:
        return train(recipe, tmp_path, **settings), train(recipe, tmp_path, reference=True, **settings)

    return both


@pytest.fixture
def assert_equal(recipe: Recipe, record_property: Callable[[str, object], None]) -> Callable[[Run, Run], None]:
    """Return the check that a run equals its reference as exactly as the recipe promises."""

    def check(ours: Run, reference: Run) -> None:
        record_property("difference", ours.difference(reference))
        ours.assert_equal(reference, exactly=recipe.probe)

    return check
