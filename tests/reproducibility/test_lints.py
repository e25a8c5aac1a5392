"""What makes runs alike, or unlike, without their author's knowledge."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import random_split

from lightning_methods import SeedStreams
from lightning_methods.reproducibility import (
    differences,
    lint_config,
    lint_datamodule,
    lint_determinism,
    lint_effects,
    lint_environment,
)
from tests.reproducibility.training import Net, Noisy, Run, Split


@pytest.mark.parametrize(("config", "count"), [({}, 1), ({"seed_everything": True}, 1), ({"seed_everything": 4}, 0)])
def test_a_seed_that_is_always_zero(config, count):
    found = lint_config(config)
    assert len(found) == count
    assert all("takes 0" in text for text in found)


def test_lightning_takes_zero(monkeypatch):
    """The fact behind the lint."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with pytest.warns(UserWarning, match="seed set to 0"):
        assert pl.seed_everything(None, verbose=True) == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")
    monkeypatch.delenv("PL_SEED_WORKERS")


def test_environment():
    assert lint_environment({}) == []
    assert "PL_GLOBAL_SEED=7" in lint_environment({"PL_GLOBAL_SEED": "7"})[0]
    assert "rank 0" in lint_environment({"OMPI_COMM_WORLD_RANK": "3"})[0]
    assert lint_environment({"OMPI_COMM_WORLD_RANK": "3", "RANK": "3"}) == []


class FixedGenerator(Split):
    def setup(self, stage):
        self.train, self.val = random_split(Noisy(), [32, 16], torch.Generator().manual_seed(42))


class FixedState(Split):
    def setup(self, stage):
        order = np.random.default_rng(0).permutation(48)
        self.train, self.val = (torch.utils.data.Subset(Noisy(), part.tolist()) for part in (order[:32], order[32:]))


class GivenSeed(Split):
    def __init__(self, seed=0):
        super().__init__()
        self.seed = seed

    def setup(self, stage):
        self.train, self.val = random_split(Noisy(), [32, 16], torch.Generator().manual_seed(self.seed))


def test_a_split_with_a_fixed_seed_is_found():
    assert "manual_seed(42)" in lint_datamodule(FixedGenerator())[0]
    assert "default_rng(0)" in lint_datamodule(FixedState)[0]
    assert lint_datamodule(GivenSeed()) == lint_datamodule(Split()) == []


def test_a_source_without_effect_is_found(tmp_path):
    runs = {
        source: [
            Run(tmp_path, {source: seed}, data=FixedGenerator(), net={"p": 0.0}, max_epochs=1).found for seed in (0, 1)
        ]
        for source in ("split", "dropout", "order")
    }
    found = lint_effects(runs)
    assert [text.split("'")[1] for text in found] == ["split", "dropout"]
    assert lint_effects({"order": [{}]}) == []


def test_a_pipeline_that_is_not_deterministic_is_found(tmp_path):
    class Private(Net):
        generator = np.random.default_rng()

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float(1 + self.generator.random())

    def run(kind):
        streams = SeedStreams()
        streams.seed("init")
        module = kind()
        trainer = pl.Trainer(
            max_epochs=1, callbacks=streams, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
        )
        streams.seed("split")
        trainer.fit(module, datamodule=Split())
        return streams.fingerprints

    assert lint_determinism(run(Net), run(Net)) == []
    (text,) = lint_determinism(run(Private), run(Private))
    assert "differ in final" in text


def test_differences_name_what_only_one_run_has():
    assert differences({"a": "1"}, {"a": "1", "b": "2"}) == ["b"]
