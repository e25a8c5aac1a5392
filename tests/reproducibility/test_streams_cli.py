"""The command line seeds model and data from the streams, each from its own."""

from __future__ import annotations

import warnings

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_methods.cli.seed_streams import SeedStreamsCLI
from lightning_methods.reproducibility import SeedStreams
from tests.reproducibility.training import Net, Split


class DrawingSplit(Split):
    """Draws in its constructor, once or five times."""

    def __init__(self, workers: int = 0, draws: int = 1) -> None:
        super().__init__(workers)
        self.drawn = float(torch.rand(draws)[0])


@pytest.fixture
def run(tmp_path):
    def build(seeds, how=SeedStreamsCLI, draws=1, callbacks=None):
        trainer = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
        entry = {"class_path": "lightning_methods.SeedStreams", "init_args": seeds}
        trainer["callbacks"] = [entry] if callbacks is None else callbacks
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"trainer": trainer, "data": {"draws": draws}}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return how(Net, DrawingSplit, args=["fit", "--config", str(path)], save_config_callback=None)

    return build


def _found(cli):
    (streams,) = [c for c in cli.trainer.callbacks if isinstance(c, SeedStreams)]
    return streams.fingerprints


def test_each_is_built_from_its_own_stream(run):
    base, again, init, split = (run(s) for s in ({}, {}, {"init": 1}, {"split": 1}))
    assert _found(base) == _found(again)
    changed = {name for name, digest in _found(base).items() if _found(init)[name] != digest}
    assert changed == {"init", "final"}
    changed = {name for name, digest in _found(base).items() if _found(split)[name] != digest}
    assert changed == {"split", "final"}
    assert base.datamodule.drawn == init.datamodule.drawn != split.datamodule.drawn


def test_what_the_data_draw_does_not_reach_the_model(run):
    assert _found(run({})) == _found(run({}, draws=5))


def test_it_equals_seeding_by_hand(run):
    cli = run({"init": 3, "split": 4})
    streams = SeedStreams(init=3, split=4)
    streams.seed("init")
    module = Net()
    streams.seed("split")
    data = DrawingSplit()
    streams.seed("split")
    trainer = type(cli.trainer)(
        max_epochs=1, callbacks=streams, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=data)
    assert streams.fingerprints == _found(cli)


def test_without_streams_it_is_a_lightning_cli(run):
    ours, plain = run({}, callbacks=[]), run({}, how=LightningCLI, callbacks=[])
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
