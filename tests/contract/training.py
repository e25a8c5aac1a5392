"""Train a recipe or its reference, the same way in every case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.contract.recipes import Recipe
from tests.support.training import Settings, assert_identical, fit, largest_difference, pl, quiet_trainer

# float32 rounds at 6e-8 of a value; the parameters are of order 1
TOLERANCE = 3e-8


@dataclass(frozen=True)
class Run:
    """A training that has ended, and the random state that it left."""

    module: pl.LightningModule
    trainer: pl.Trainer
    random_state: Tensor

    def difference(self, other: Run) -> float:
        return largest_difference(self.module, other.module)

    def assert_equal(self, other: Run, *, exactly: bool) -> None:
        assert torch.equal(self.random_state, other.random_state)
        if exactly:
            assert_identical(self.module, other.module)
        assert self.difference(other) <= TOLERANCE


def build(recipe: Recipe, settings: Settings | None = None, *, reference: bool = False) -> pl.LightningModule:
    """Return the recipe's module, or its reference, from the same initial weights."""
    torch.manual_seed(1)
    kind = recipe.reference if reference and recipe.reference is not None else recipe.module
    return kind(settings or Settings())


def callbacks(recipe: Recipe, *, reference: bool = False) -> list[Any]:
    return [] if reference and recipe.reference is not None else recipe.callbacks()


def train(
    recipe: Recipe,
    folder: Path,
    *,
    reference: bool = False,
    settings: Settings | None = None,
    prepare: Callable[[pl.LightningModule], Any] | None = None,
    before: Callable[[], Sequence[Any]] = list,
    after: Callable[[], Sequence[Any]] = list,
    fresh: Callable[[], dict[str, Any]] = dict,
    data: Any = None,
    ckpt_path: Path | None = None,
    **trainer_settings: Any,
) -> Run:
    """Train the recipe, or its reference.

    `before` and `after` build neighbours in the callback list, `fresh` settings of the Trainer that one run uses up.
    """
    module = build(recipe, settings, reference=reference)
    if prepare is not None:
        prepare(module)
    attached = [*before(), *callbacks(recipe, reference=reference), *after()]
    trainer = quiet_trainer(folder, **{"callbacks": attached, **fresh(), **trainer_settings})
    fit(trainer, module, data, kind=recipe.samples, **({"ckpt_path": ckpt_path} if ckpt_path else {}))
    return Run(module, trainer, torch.get_rng_state())
