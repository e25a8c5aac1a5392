"""The plain Classifier: it learns, logs what it says, saves safely, and refuses clearly."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.data import DigitsDataModule, NoisyLabels
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch
from lightning_methods.models import MLP, Classifier, SmallConvNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def trainer(path: Path, **kwargs: object) -> Trainer:
    quiet: dict = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=path, **{**quiet, "max_epochs": 1, **kwargs})


def made(n: int = 40, c: int = 3) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 6, generator=g), torch.arange(n) % c), batch_size=16)


def test_digits_are_learned_and_every_quantity_is_logged(tmp_path: Path) -> None:
    seed_everything(1)
    model, digits = Classifier(MLP(64)), DigitsDataModule(flat=True)
    run = trainer(tmp_path, max_epochs=5)
    run.fit(model, digits)
    assert set(run.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/ece"}
    assert run.callback_metrics["val/accuracy"] > 0.9
    (result,) = run.test(model, digits, verbose=False)
    assert set(result) == {"test/loss", "test/accuracy", "test/ece"}
    assert result["test/accuracy"] > 0.9
    predictions = torch.cat(run.predict(model, digits))
    assert predictions.shape == (359, 10)
    assert torch.allclose(predictions.sum(1), torch.ones(359))
    accuracy = (predictions.argmax(1) == digits.test_dataset.targets).float().mean()
    assert float(accuracy) == pytest.approx(result["test/accuracy"], abs=1e-6)


def test_images_and_noise_are_learned_too(tmp_path: Path) -> None:
    seed_everything(1)
    digits = DigitsDataModule(wrap_train=partial(NoisyLabels, rate=0.2))
    run = trainer(tmp_path, max_epochs=4)
    run.fit(Classifier(SmallConvNet(width=0.25)), digits)
    assert run.callback_metrics["val/accuracy"] > 0.85
    assert run.callback_metrics["train/accuracy"] < 0.85


def test_logged_numbers_are_those_of_the_whole_set(tmp_path: Path) -> None:
    model = Classifier(MLP(6, num_classes=3), num_classes=3, label_smoothing=0.3)
    (result,) = trainer(tmp_path).validate(model, made(), verbose=False)
    x, y = made().dataset.tensors
    with torch.no_grad():
        logits = model(x)
    assert result["val/loss"] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-6)
    assert result["val/accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()), abs=1e-6)
    confidence, guess = logits.softmax(1).max(1)
    bins = (confidence * 15).long()
    gap = sum(
        abs(float((guess == y)[bins == b].float().mean() - confidence[bins == b].mean())) * int((bins == b).sum())
        for b in bins.unique()
    )
    assert result["val/ece"] == pytest.approx(gap / len(y), abs=1e-5)


def test_a_step_without_a_trainer_returns_the_loss_with_smoothing() -> None:
    model = Classifier(MLP(6, num_classes=3), num_classes=3, label_smoothing=0.3)
    x, y = made().dataset.tensors
    assert torch.equal(model.training_step((x, y), 0), F.cross_entropy(model(x), y, label_smoothing=0.3))


@pytest.mark.parametrize(
    "how",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"barebones": True},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"accumulate_grad_batches": 2},
    ],
)
def test_trainer_settings(how: dict, tmp_path: Path) -> None:
    model = Classifier(MLP(6, num_classes=3), num_classes=3)
    if "barebones" in how:
        run = Trainer(accelerator="cpu", max_epochs=1, **how)
    else:
        run = trainer(tmp_path, **how)
    run.fit(model, made(), made())
    assert run.state.finished
    assert model.train_accuracy._update_count == 0


def test_scheduler_steps_once_an_epoch(tmp_path: Path) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    model = Classifier(MLP(6, num_classes=3), partial(torch.optim.SGD, lr=0.8), scheduler, num_classes=3)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, made())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)


def test_plateau_scheduler_watches_the_validation_loss(tmp_path: Path) -> None:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0, threshold_mode="abs")
    model = Classifier(MLP(6, num_classes=3), partial(torch.optim.SGD, lr=0.1), scheduler, num_classes=3)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, made(), made())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_checkpoint_holds_plain_values_and_loads_again(tmp_path: Path) -> None:
    model = Classifier(MLP(6, num_classes=3), num_classes=3, label_smoothing=0.1)
    run = trainer(tmp_path)
    run.fit(model, made())
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)
    assert dict(state["hyper_parameters"]) == {"num_classes": 3, "label_smoothing": 0.1}
    assert set(state["state_dict"]) == {f"net.{k}" for k in model.net.state_dict()}
    again = Classifier.load_from_checkpoint(path, net=MLP(6, num_classes=3))
    assert torch.equal(again.net.head.weight, model.net.head.weight)
    assert again.label_smoothing == 0.1


def test_yaml_gives_optimizer_and_scheduler(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("""
seed_everything: 1
model:
  class_path: lightning_methods.Classifier
  init_args:
    net: {class_path: lightning_methods.models.MLP, init_args: {in_features: 64, hidden: [32], norm: batch}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
    scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 2}}
data: {class_path: lightning_methods.DigitsDataModule, init_args: {flat: true}}
""")
    cli = LightningCLI(
        run=False,
        args=["--config", str(config)],
        save_config_callback=None,
        trainer_defaults={
            "accelerator": "cpu",
            "max_epochs": 2,
            "default_root_dir": str(tmp_path),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.callback_metrics["val/accuracy"] > 0.85
    assert cli.trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    torch.load(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)


def test_module_copies_and_pickles() -> None:
    model = Classifier(MLP(6, num_classes=3), num_classes=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is other.__class__ is Classifier
        assert torch.equal(other.net.head.weight, model.net.head.weight)


def test_class_can_be_changed_as_wrappers_do() -> None:
    model = Classifier(MLP(6))
    changed = type("Changed", (Classifier,), {})
    model.__class__ = changed
    assert type(model) is model.__class__ is changed


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(4, 6), BatchFormat, "Tensor of 4"),
        ([torch.zeros(4, 6)], BatchFormat, "list of 1"),
        ({"x": torch.zeros(4, 6)}, BatchFormat, "dict of 1"),
        ((torch.zeros(4, 6), torch.zeros(4).long()), ShapeMismatch, r"\(4, 10\).*num_classes=3"),
    ],
)
def test_batches_that_do_not_fit(batch: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Classifier(MLP(6), num_classes=3).validation_step(batch, 0)


@pytest.mark.parametrize("arguments", [{"num_classes": 1}, {"label_smoothing": 1.1}, {"label_smoothing": -0.1}])
def test_refusals(arguments: dict) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(arguments))}="):
        Classifier(MLP(6), **arguments)


def test_a_trainer_of_the_other_family_is_told_the_import() -> None:
    pytest.importorskip("pytorch_lightning")
    code = """
import pytorch_lightning
from lightning_methods.errors import UnsupportedTraining
from lightning_methods.models import MLP, Classifier
trainer = pytorch_lightning.Trainer(barebones=True, accelerator="cpu")
for run in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
    try:
        run(Classifier(MLP(4)), [])
    except UnsupportedTraining as error:
        assert "from lightning.pytorch import Trainer" in str(error), error
    else:
        raise AssertionError(run)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


DDP = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import Trainer
from lightning_methods.models import MLP, Classifier

def main():
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    model = Classifier(MLP(6, num_classes=3), num_classes=3)
    trainer = Trainer(accelerator="cpu", devices=int(sys.argv[1]), strategy=sys.argv[2], max_epochs=1, logger=False,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=32 // int(sys.argv[1]))
    trainer.fit(model, loader, loader)
    if trainer.is_global_zero:
        print("RESULT", *(f"{k}={float(v):.5f}" for k, v in sorted(trainer.callback_metrics.items())))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_log_what_one_logs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DDP)

    def run(devices: str, strategy: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), devices, strategy], capture_output=True, text=True, timeout=120, check=True
        )
        return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))

    assert run("2", "ddp") == run("1", "auto")
