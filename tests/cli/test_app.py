from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from lightning_methods.cli import main

SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.log_every_n_steps=1",
]
TOY = ["--model=toys.ToyModel", *SMALL]


def run(*argv):
    """Return the exit code, also where the parser leaves by itself."""
    try:
        return main(argv)
    except SystemExit as leave:
        return leave.code


def test_fit_saves_a_configuration_that_can_be_loaded_again(workshop):
    assert run("fit", *TOY, "--model.width=5", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=a") == 0
    (saved,) = workshop.glob("a/lightning_logs/version_0/config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["init_args"]["width"] == 5
    assert isinstance(config["seed_everything"], int)
    assert run("fit", "--config", str(saved), "--model.width=6") == 0
    (again,) = workshop.glob("a/lightning_logs/version_1/config.yaml")
    assert yaml.safe_load(again.read_text())["model"]["init_args"]["width"] == 6


def test_several_configs_short_names_and_a_second_run_in_the_same_folder(workshop):
    (workshop / "model.yaml").write_text("model: {class_path: toys.ToyModel}\n")
    (workshop / "trainer.yaml").write_text("trainer: {logger: false, callbacks: [{class_path: RichModelSummary}]}\n")
    configs = ["--config=model.yaml", "--config=trainer.yaml", "--trainer.callbacks+=LearningRateFinder"]
    for _ in range(2):
        assert run("fit", *configs[:2], *SMALL) == 0
    first = (workshop / "config.yaml").read_text()
    assert "RichModelSummary" in first
    # where there is no logger another subcommand must not replace the configuration of fit
    assert run("test", *configs[:2], *SMALL, "--trainer.limit_test_batches=1") == 0
    assert (workshop / "config.yaml").read_text() == first
    assert (workshop / "config_test.yaml").exists()


def test_short_names_of_the_catalog(workshop, capsys):
    arguments = ["--model=Classifier", "--model.net=SmallConvNet", "--data=DigitsDataModule"]
    assert run("fit", *arguments, *SMALL, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
               "--optimizer=SGD", "--optimizer.lr=0.1", "--print_config") == 0  # fmt: skip
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"] == "lightning_methods.Classifier"
    assert config["data"]["class_path"] == "lightning_methods.DigitsDataModule"
    assert config["optimizer"]["init_args"]["lr"] == 0.1
    assert not list(workshop.glob("lightning_logs"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model=Classifer"], "fit: error: model: there is no class 'Classifer'. Did you mean 'Classifier'"),
        (["--config=nope.yaml"], "config: File does not exist"),
        ([], "the following arguments are required"),
        ([*TOY, "--trainer.max_epochs=many"], "trainer.max_epochs: expected int, got 'many'"),
        ([*TOY, "--trainer.callbacks=EarlyStoping"], "trainer.callbacks: there is no class 'EarlyStoping'"),
        ([*TOY, "--model.wide=3"], "ToyModel has no option 'wide'. Did you mean 'width'"),
        ([*TOY, "--trainer.callbacks=toys.Troublesome", "--trainer.callbacks.then=3"], "Did you mean 'when'"),
        ([*TOY, "--nonsense=3"], "unrecognized arguments: --nonsense=3"),
        ([*TOY, "--model.width=0"], "fit: error: width=0 must be positive."),
        ([*TOY, "--trainer.callbacks=toys.Troublesome", "--trainer.callbacks.when=init"],
         "fit: error: trouble at once, [not markup]"),
        ([*TOY, "--trainer.callbacks=toys.Troublesome", "--trainer.callbacks.when=setup"], "fit: error: trouble later"),
        ([*TOY, "--trainer.callbacks=toys.Troublesome", "--trainer.callbacks.when=train"], "fit: error: trouble later"),
        ([*TOY, "--ckpt_path=nope.ckpt"], "ckpt_path='nope.ckpt': there is no such file"),
        ([*TOY, "--trainer.devices=0"], "Trainer(devices="),
    ],
)  # fmt: skip
def test_a_users_error_is_one_message_and_code_2(workshop, capsys, arguments, says):
    assert run("fit", *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    (line,) = [line for line in message.splitlines() if "error:" in line]
    assert line.startswith("lightning-methods")
    assert says in line
    assert "NoneType" not in message


def test_debugging_shows_the_traceback(workshop, monkeypatch):
    from lightning_methods.errors import InvalidArgument

    monkeypatch.setenv("LIGHTNING_METHODS_DEBUG", "1")
    with pytest.raises(InvalidArgument, match="width=0"):
        main(["fit", *TOY, "--model.width=0"])


def test_an_error_of_the_users_own_keeps_its_traceback(workshop):
    before = list(sys.argv), list(sys.path)
    with pytest.raises(KeyError, match="theirs"):
        main(["fit", *TOY, "--trainer.callbacks=toys.Troublesome", "--trainer.callbacks.when=train",
              "--trainer.callbacks.kind=theirs"])  # fmt: skip
    assert (sys.argv, sys.path) == before


@pytest.mark.slow
def test_the_command_line_end_to_end(workshop):
    command = [sys.executable, "-m", "lightning_methods", "fit", *TOY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "--model.width=0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lightning-methods fit: error: width=0 must be positive."
    # two processes: the second is started from the arguments of the first
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (workshop / "config.yaml").exists()
