from __future__ import annotations

import csv
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.report import is_reporting, log_figure, log_table, log_text, new_figure
from tests.support.wandb_offline import read_runs


def picture():
    figure = new_figure(2, 1)
    figure.add_subplot().plot([0, 1], [0, 1])
    return figure


class FakeTrainer:
    is_global_zero = True

    def __init__(self, folder, loggers, step, attributes):
        self.default_root_dir, self.loggers, self.global_step = str(folder), loggers, step
        self.__dict__.update(attributes)


def trainer(folder, *loggers, step=7, **attributes):
    return FakeTrainer(folder, list(loggers), step, attributes)


def log_all(owner):
    return [
        *log_figure(owner, "snnl/layers", picture()),
        *log_table(owner, "snnl/final", ["layer", "value"], [["conv1", torch.tensor(0.5)], ["a|b", np.float32(1)]]),
        *log_text(owner, "snnl/note", "**bold**"),
    ]


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


EXPECTED_FILES = ["snnl/layers_7.png", "snnl/final_7.csv", "snnl/note_7.md"]


def test_without_a_logger_files_are_written_under_the_root_folder(tmp_path):
    paths = log_all(trainer(tmp_path))
    assert names(paths, tmp_path) == EXPECTED_FILES
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert list(csv.reader(paths[1].open())) == [["layer", "value"], ["conv1", "0.5"], ["a|b", "1.0"]]
    assert paths[2].read_text() == "**bold**\n"


def test_csv_logger_gets_files_in_its_version_folder(tmp_path):
    logger = CSVLogger(tmp_path, name="runs")
    assert names(log_all(trainer(tmp_path, logger)), Path(logger.log_dir)) == EXPECTED_FILES


def test_an_explicit_step_wins_and_odd_keys_stay_inside_the_folder(tmp_path):
    (path,) = log_text(trainer(tmp_path), "../../etc/a b:*?/..", "x", step=3)
    assert path == tmp_path / "etc/a_b_3.md"


def test_the_step_is_the_one_of_lightnings_metrics(tmp_path):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=4))
    (path,) = log_text(trainer(tmp_path, step=8, fit_loop=loop), "a", "x")  # two optimizers count twice in global_step
    assert path.name == "a_4.md"


def test_tensorboard_reads_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, prefix="run")
    assert log_all(trainer(tmp_path, logger)) == []
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    (image,) = events.Images("run-snnl/layers")
    assert (image.step, image.width, image.height) == (7, 260, 130)
    (table,) = events.Tensors("run-snnl/final/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["| layer | value |", "| --- | --- |", "| conv1 | 0.5 |", "| a\\|b | 1 |"]
    assert events.Tensors("run-snnl/note/text_summary")[0].step == 7


def test_wandb_offline_reads_back_and_its_own_step_stays_monotonic(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="p")
    owner = trainer(tmp_path, logger)
    logger.log_metrics({"loss": 1.0}, step=9)
    assert log_all(owner) == []  # an earlier trainer step than the metric's must not be dropped
    assert log_table(owner, "snnl/mixed", ["a", "b"], [["x", 1.0], [2, None]]) == []
    logger.log_metrics({"loss": 0.5}, step=10)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert run.column("loss") == [1, 0.5]
    assert run.column("trainer/global_step") == [9, 7, 7, 7, 7, 10]
    assert run.column("_step") == [0, 1, 2, 3, 4, 5]
    (image,) = run.media("snnl/layers")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert run.tables("snnl/final") == [{"columns": ["layer", "value"], "data": [["conv1", 0.5], ["a|b", 1.0]]}]
    assert run.tables("snnl/note")[0]["data"] == [["**bold**"]]
    assert run.tables("snnl/mixed")[0]["data"] == [["x", 1.0], ["2", None]]


class FakeMLflowClient:
    def __init__(self):
        self.calls = []

    def log_figure(self, run_id, figure, artifact_file):
        self.calls.append((run_id, artifact_file))

    def log_text(self, run_id, text, artifact_file):
        self.calls.append((run_id, artifact_file, text))


def test_mlflow_gets_artifacts(tmp_path):
    class Logger:
        experiment = FakeMLflowClient()
        run_id = property(lambda self: "r1")

    assert log_all(trainer(tmp_path, Logger())) == []
    assert Logger.experiment.calls == [
        ("r1", "snnl/layers_7.png"),
        ("r1", "snnl/final_7.csv", "layer,value\nconv1,0.5\na|b,1.0\n"),
        ("r1", "snnl/note_7.md", "**bold**"),
    ]


def test_mlflow_itself_stores_the_artifacts(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the other local store needs a database package
    assert log_all(trainer(tmp_path, MLFlowLogger(save_dir=str(tmp_path)))) == []
    found = sorted(path.name for path in tmp_path.glob("**/artifacts/snnl/*"))
    assert found == ["final_7.csv", "layers_7.png", "note_7.md"]


class FakeComet:
    def __init__(self):
        self.calls = {}

    def log_figure(self, figure_name, figure, step):
        self.calls["figure"] = (figure_name, step)

    def log_table(self, filename, tabular_data, headers):
        self.calls["table"] = (filename, headers, tabular_data)

    def log_text(self, text, step, metadata):
        self.calls["text"] = (text, step, metadata)


def test_comet_gets_all_three(tmp_path):
    logger = type("Comet", (), {"experiment": FakeComet()})()
    assert log_all(trainer(tmp_path, logger)) == []
    assert logger.experiment.calls == {
        "figure": ("snnl/layers", 7),
        "table": ("snnl/final_7.csv", ["layer", "value"], [["conv1", 0.5], ["a|b", 1.0]]),
        "text": ("**bold**", 7, {"key": "snnl/note"}),
    }


class Broken:
    save_dir = None

    @property
    def experiment(self):
        raise ConnectionError("no network")


def test_a_failing_logger_warns_once_a_kind_and_its_share_goes_to_files(tmp_path):
    broken, csv_logger = Broken(), CSVLogger(tmp_path / "csv")
    owner = trainer(tmp_path, broken, csv_logger)
    with pytest.warns(LightningMethodsWarning, match="Broken could not log a figure: ConnectionError: no network"):
        paths = log_figure(owner, "a", picture())
    assert paths == [tmp_path / "a_7.png", Path(csv_logger.log_dir) / "a_7.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(log_figure(owner, "b", picture())) == 2
    with pytest.warns(LightningMethodsWarning, match="could not log a text"):
        log_text(owner, "c", "x")


def test_a_folder_that_cannot_be_written_warns_and_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    owner = trainer(tmp_path / "file")
    with pytest.warns(LightningMethodsWarning, match="could not log a text file"):
        assert log_text(owner, "a", "x") == []
    with pytest.warns(LightningMethodsWarning, match="remote folder"):
        assert log_text(trainer("s3://bucket/runs"), "a", "x") == []


@pytest.mark.parametrize(
    "state", [{"is_global_zero": False}, *({n: True} for n in ("sanity_checking", "fast_dev_run", "barebones"))]
)
def test_nothing_is_shown_where_nothing_should_be(tmp_path, state):
    owner = trainer(tmp_path, Broken(), **state)
    assert not is_reporting(owner)
    assert log_all(owner) == []
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_on_every_rank(tmp_path):
    owner = trainer(tmp_path, is_global_zero=False)
    with pytest.raises(InvalidArgument, match="got Axes"):
        log_figure(owner, "a", picture().axes[0])
    with pytest.raises(ShapeMismatch, match="Row 1 of table 'a' has 1 cells for 2 columns"):
        log_table(owner, "a", ["x", "y"], [[1, 2], [3]])
    with pytest.raises(InvalidArgument, match="string"):
        log_text(owner, "a", 3)
    with pytest.raises(InvalidArgument, match="key"):
        log_text(owner, " / ", "x")


class Reporter(pl.Callback):
    def __init__(self):
        self.paths = []

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("measured", 1.0)
        self.paths += log_all(trainer)


@pytest.mark.parametrize("setting", [{}, {"fast_dev_run": 2}, {"barebones": True}])
def test_in_a_real_training(tmp_path, setting):
    reporter = Reporter()
    loggers = {} if setting else {"logger": [CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "tb")]}
    common = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu"}
    if "barebones" not in setting:
        common |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    pl.Trainer(default_root_dir=tmp_path, callbacks=[reporter], **common, **loggers, **setting).fit(BoringModel())
    if setting:
        assert not reporter.paths
        assert not list(tmp_path.rglob("snnl"))
        return
    (run,) = tmp_path.glob("lightning_logs/version_*")
    with (run / "metrics.csv").open() as file:
        (step,) = {row["step"] for row in csv.DictReader(file) if row.get("measured")}
    # beside the metrics and under their step, TensorBoard has its own, and the sanity check left nothing
    assert names(reporter.paths, run) == [name.replace("_7", f"_{step}") for name in EXPECTED_FILES]
    assert len(list(tmp_path.rglob("*.png"))) == 1
