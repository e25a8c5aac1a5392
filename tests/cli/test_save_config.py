from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_methods import LoggerSaveConfig
from lightning_methods.cli.save_config import flat_config
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning
from tests.support.wandb_offline import read_runs


class Net(BoringModel):
    def __init__(self, width: int = 4, unset: float | None = None):
        super().__init__()


class Refusing(Logger):
    name, version = "refusing", "0"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        raise ValueError("values longer than 500 characters")


def fit(folder, logger, **save_config):
    cli = LightningCLI(
        Net,
        args={"model": {"width": 7}, "trainer": {"default_root_dir": str(folder), "callbacks": []}},
        save_config_callback=LoggerSaveConfig,
        save_config_kwargs=save_config,
        trainer_defaults={
            "max_steps": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "accelerator": "cpu",
        },
        run=False,
    )
    cli.trainer.loggers = [] if logger is None else logger
    cli.trainer.fit(cli.model)
    return cli


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tests"])


def test_csv_and_tensorboard_get_file_and_hyperparameters(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "tb")]
    fit(tmp_path, loggers)
    assert yaml.safe_load((Path(loggers[0].log_dir) / "config.yaml").read_text())["model"] == {
        "width": 7,
        "unset": None,
    }
    for logger in loggers:
        hyperparameters = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
        assert hyperparameters["model.width"] == 7
        assert hyperparameters["trainer.max_steps"] == 1
        assert "model.unset" not in hyperparameters


def test_wandb_runs_keep_a_file_each_and_get_the_configuration(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identities = []
    for _ in range(2):
        logger = WandbLogger(save_dir=tmp_path, project="p")
        fit(tmp_path, [logger], overwrite=False)
        identities.append(logger.version)
        wandb.finish()
    assert [run.config["model.width"] for run in read_runs(tmp_path)] == [7, 7]
    assert sorted(tmp_path.rglob("config.yaml")) == sorted(tmp_path / "p" / name / "config.yaml" for name in identities)


def test_without_a_logger_a_second_run_overwrites_unless_forbidden(tmp_path):
    for _ in range(2):
        fit(tmp_path, None)
    assert (tmp_path / "config.yaml").exists()
    with pytest.raises(InvalidArgument, match="earlier run"):
        fit(tmp_path, None, overwrite=False)


def test_a_refusing_logger_warns_and_the_others_are_served(tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.warns(LightningMethodsWarning, match="Refusing could not log a configuration"):
        fit(tmp_path, [Refusing(), logger], config_filename="all.yaml")
    assert (Path(logger.log_dir) / "hparams.yaml").exists()
    assert (tmp_path / "refusing/0/all.yaml").exists()


def test_the_file_can_be_left_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, None, save_to_log_dir=False)
    assert not list(tmp_path.iterdir())


def test_flat_names():
    stop = {"class_path": "lightning.EarlyStopping", "init_args": {"patience": 2, "stop": None}}
    assert flat_config(
        {
            "seed": 1,
            "none": None,
            "model": {"class_path": "a.b.Net", "init_args": {"sizes": [1, 2], "inner": {"class_path": "c.D"}}},
            "data": {"class_path": "x.Y", "dict_kwargs": {"size": 3}},
            "trainer": {"callbacks": [stop, stop], "pairs": [{"a": 1}]},
        }
    ) == {
        "seed": 1,
        "model": "Net",
        "model.sizes": [1, 2],
        "model.inner": "D",
        "data": "Y",
        "data.size": 3,
        "trainer.callbacks.EarlyStopping": True,
        "trainer.callbacks.EarlyStopping.patience": 2,
        "trainer.callbacks.EarlyStopping_2": True,
        "trainer.callbacks.EarlyStopping_2.patience": 2,
        "trainer.pairs.0.a": 1,
    }
