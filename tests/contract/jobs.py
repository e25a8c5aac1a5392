"""What the contract runs in processes of its own: all recipes in one, since starting a process takes longest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_methods.errors import LightningMethodsError
from tests.contract.recipes import RECIPES, Recipe
from tests.contract.training import train
from tests.support.drawing import leave_undrawn
from tests.support.training import BATCH, Samples, Settings, loader

RANKS = 2
# joined batches of 16, 16 and 16 rows, or the last one of 8 + 4
SAMPLES = {"equal": 3 * RANKS * BATCH, "unequal": 2 * RANKS * BATCH + BATCH + BATCH // 2}


def distributed() -> dict[str, Any]:
    """Train every recipe with DDP; every process runs this."""
    return {
        f"{r.name} {k}": _outcome(lambda r=r, k=k: _train_with_ddp(r, SAMPLES[k])) for r in RECIPES for k in SAMPLES
    }


def foreign() -> dict[str, Any]:
    """Train every recipe and its reference with the Lightning that the environment names."""
    return {recipe.name: _outcome(lambda recipe=recipe: _train_twice(recipe)) for recipe in RECIPES}


def single(recipe: Recipe, folder: Path, samples: int) -> Any:
    """Train the recipe in one process on the joined batches."""
    data = loader(samples, batch_size=RANKS * BATCH, kind=recipe.samples)
    return train(recipe, folder, settings=Settings(divisor=RANKS * BATCH), data=data)


def shown_by(run: Any) -> dict[str, float]:
    """Return the logged scalars of the last epoch."""
    return {key: float(value) for key, value in run.trainer.callback_metrics.items()}


def _outcome(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    leave_undrawn()
    try:
        return job()
    except LightningMethodsError as error:  # raised again, where the recipe expects it
        return {"error": type(error).__name__, "message": str(error)}


def _train_with_ddp(recipe: Recipe, samples: int) -> dict[str, Any]:
    settings = {"strategy": "ddp", "devices": RANKS, "use_distributed_sampler": False}
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            recipe, Path(folder), settings=Settings(divisor=BATCH), data=_Shards(samples, recipe.samples), **settings
        )
    states = [callback.state_dict() for callback in run.trainer.callbacks[: len(recipe.callbacks())]]
    return {"module": dict(run.module.state_dict()), "states": states, "shown": shown_by(run)}


class _Shards:
    """The rows of this rank of every joined batch; lazily, since the rank is known when the fit has begun."""

    def __init__(self, samples: int, kind: Samples) -> None:
        self.samples = samples
        self.kind = kind

    def __len__(self) -> int:
        return -(-self.samples // (RANKS * BATCH))

    def __iter__(self) -> Any:
        rows = self.kind.dataset(self.samples)
        for start in range(dist.get_rank() * BATCH, self.samples, RANKS * BATCH):
            yield self.kind.collate([rows[i] for i in range(start, min(start + BATCH, self.samples))])


def _train_twice(recipe: Recipe) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ours, reference = train(recipe, Path(folder)), train(recipe, Path(folder), reference=True)
    ours.assert_equal(reference, exactly=recipe.probe)
    if recipe.callbacks():
        assert "training_step" not in vars(ours.module)
    return {"trainer": type(ours.trainer).__module__, "difference": ours.difference(reference)}
