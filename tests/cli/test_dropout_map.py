"""`dropout-map` trains at every pair of rates, goes on where it stopped, and never mixes two studies."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from lightning_methods.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = {
    "seed_everything": 3,
    "ckpt_path": None,  # as a configuration that `fit` saved has it
    "trainer": {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"},
    "model": {
        "class_path": "Classifier",
        "init_args": {
            "net": {
                "class_path": "lightning_methods.models.MLP",
                "init_args": {"in_features": 64, "hidden": [16], "dropout": 0.5},
            }
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"flat": True}},
}
SMALL = ["--p-forward", "0", "0.5", "--p-backward", "0", "0.5", "--seeds", "0", "1"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def rows(folder="dropout_map"):
    with open(f"{folder}/runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_and_its_continuation(config, capsys):
    assert main(["dropout-map", "--config", config, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert [name in printed for name in ("standard dropout", "forward pass only", "backward pass only")] == [True] * 3
    first = rows()
    assert len(first) == 8
    assert len({row["value"] for row in first if row["seed"] == "0"}) == 4, "every pair of rates trains otherwise"
    for name in ("heatmap.png", "curves.png"):
        assert Path("dropout_map", name).read_bytes().startswith(b"\x89PNG")
    assert main(["dropout-map", "--config", config, *SMALL, "--p-backward", "0", "0.5", "0.7"]) == 0
    assert rows()[:8] == first
    assert len(rows()) == 12


def test_equal_rates_are_the_training_without_the_callback(config, tmp_path):
    given = ["--p-forward", "0.5", "--p-backward", "0.5", "--seeds", "3", "--metric", "val/loss"]
    assert main(["dropout-map", "--config", config, *given]) == 0
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    values = []

    from lightning_methods import Classifier

    class Seen(Classifier):
        def on_validation_epoch_end(self):
            values.append(self.trainer.callback_metrics)

    saved = Classifier.on_validation_epoch_end
    try:
        Classifier.on_validation_epoch_end = Seen.on_validation_epoch_end
        assert main(["fit", "--config", config, *quiet]) == 0
    finally:
        Classifier.on_validation_epoch_end = saved
    assert float(rows()[0]["value"]) == pytest.approx(float(values[-1]["val/loss"]), rel=1e-6)


def test_the_callback_of_the_configuration_keeps_its_settings(config, capsys):
    changed = yaml.safe_load(Path(config).read_text())
    callback = {"class_path": "AugmentedDropout", "init_args": {"include": "net.none", "ratio": 0.5}}
    changed["trainer"]["callbacks"] = [callback]
    Path(config).write_text(yaml.safe_dump(changed))
    assert main(["dropout-map", "--config", config, *SMALL]) == 2
    assert "net.none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--p-forward", "1.5"], "--p-forward 1.5"),
        (["--p-backward", "nan"], "--p-backward nan"),
        (["--metric", "val/los"], "Did you mean 'val/loss'"),
        (["--trainer.max_epoks=1"], "max_epoks"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--mode", "least"], "least"),
    ],
)
def test_bad_requests(config, capsys, arguments, message):
    try:
        code = main(["dropout-map", "--config", config, *SMALL[:6], "--seeds", "0", *arguments])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_two_studies_are_not_mixed(config, capsys):
    one = ["--p-forward", "0", "--p-backward", "0", "--seeds", "0"]
    assert main(["dropout-map", "--config", config, *one]) == 0
    assert main(["dropout-map", "--config", config, *one, "--metric", "val/accuracy"]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["dropout-map", "--config", config, *one, "--metric", "val/accuracy", "--output", "other"]) == 0
    assert main(["dropout-map", "--config", config, *one, "--trainer.max_epochs=2"]) == 2


def test_a_study_that_diverges_says_so(config, capsys):
    one = ["--p-forward", "0", "--p-backward", "0", "--seeds", "0"]
    optimizer = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    assert main(["dropout-map", "--config", config, *one, *optimizer]) == 2
    assert "diverged" in capsys.readouterr().err
