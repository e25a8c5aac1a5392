"""Scalars, figures and tables are really there afterwards, on disk and readable, whatever the logger."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from tests.contract.recipes import Recipe
from tests.contract.training import train
from tests.support.wandb_offline import read_runs

pytestmark = pytest.mark.drawn
STEP = 10  # the last one of two epochs


def assert_files(recipe: Recipe, folder: Path) -> None:
    for key in recipe.figures:
        assert (folder / f"{key}_{STEP}.png").read_bytes().startswith(b"\x89PNG")
    for key in recipe.tables:
        rows = list(csv.reader((folder / f"{key}_{STEP}.csv").open()))
        assert len(rows) >= 2
        assert len({len(row) for row in rows}) == 1


@pytest.mark.case("loggers")
def test_no_logger(recipe, tmp_path):
    train(recipe, tmp_path, logger=False)
    assert_files(recipe, tmp_path)


@pytest.mark.case("loggers")
def test_csv(recipe, tmp_path):
    logger = CSVLogger(tmp_path)
    train(recipe, tmp_path, logger=logger)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    for key in recipe.scalars:
        assert len([float(row[key]) for row in rows if row[key]]) == 2, "once per epoch"
    assert_files(recipe, Path(logger.log_dir))


@pytest.mark.case("loggers")
def test_tensorboard(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    train(recipe, tmp_path, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    for key in recipe.scalars:
        assert len(events.Scalars(key)) == 2, "once per epoch"
    for key in recipe.figures:
        (image,) = events.Images(key)
        assert min(image.width, image.height) > 100
    for key in recipe.tables:
        (table,) = events.Tensors(f"{key}/text_summary")
        assert re.match(r"\|.*\|\n\| --- ", table.tensor_proto.string_val[0].decode())


@pytest.mark.case("loggers")
@pytest.mark.timeout(120)
def test_wandb_offline(recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(recipe, tmp_path, logger=WandbLogger(save_dir=tmp_path, project="contract"))
    wandb.finish()
    (run,) = read_runs(tmp_path)
    for key in recipe.scalars:
        assert len(run.column(key)) == 2, "once per epoch"
    for key in recipe.figures:
        (image,) = run.media(key)
        assert image.read_bytes().startswith(b"\x89PNG")
    for key in recipe.tables:
        (table,) = run.tables(key)
        assert table["data"]
        assert {len(row) for row in table["data"]} == {len(table["columns"])}
