"""Two methods in one training, in both orders."""

from __future__ import annotations

import pytest

from tests.contract.recipes import RECIPES, Recipe
from tests.contract.training import train
from tests.support.training import TinyModule, fingerprint

SUMMED = 1e-6  # terms are added in another order


def partner_of(recipe: Recipe, *, probe: bool) -> Recipe:
    """Return the next recipe in the registry that can be put beside it, so that the number of pairs stays linear."""
    place = RECIPES.index(recipe)
    for other in RECIPES[place + 1 :] + RECIPES[:place]:
        # what its callbacks look for is in this module too
        fits = other.name in recipe.beside if recipe.beside else other.module in (TinyModule, recipe.module)
        if fits and other.probe is probe and other.callbacks():
            return other
    pytest.skip("the registry has no other one")


@pytest.mark.case("beside")
@pytest.mark.parametrize("probe", [False, True], ids=["a loss", "a probe"])
def test_the_order_does_not_matter(recipe: Recipe, probe, tmp_path):
    other = partner_of(recipe, probe=probe)
    first = train(recipe, tmp_path, before=other.callbacks)
    second = train(recipe, tmp_path, after=other.callbacks)
    assert first.difference(second) <= SUMMED
    if recipe.probe or other.probe:
        first.assert_equal(second, exactly=True)
    if other.probe:  # it does nothing to the training of its neighbour
        first.assert_equal(train(recipe, tmp_path), exactly=True)
    assert fingerprint(first.module)["hooks"] == {}
    assert "training_step" not in vars(first.module)
