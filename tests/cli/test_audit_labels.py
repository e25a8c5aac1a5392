"""`audit-labels` on small networks that were trained on wrong labels."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch
from torch.optim import Adam

from lightning_methods import Classifier, DigitsDataModule, NoisyLabels, RobustGenerativeClassifier
from lightning_methods.cli import main
from lightning_methods.models import MLP
from tests.support.training import quiet_trainer

NOISE = 0.3
DATA = """
import lightning.pytorch as pl
import torch
from functools import partial
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import DigitsDataModule, NoisyLabels


class Noisy(DigitsDataModule):
    def __init__(self, rate: float = RATE):
        super().__init__(128, flat=True, wrap_train=partial(NoisyLabels, rate=rate))


class Scaled(pl.LightningDataModule):
    '''No validation data, dict batches, one label that is no class, and inputs that a hook must shrink.'''

    def train_dataloader(self):
        data = DigitsDataModule(flat=True)
        data.setup("fit")
        x, y = next(iter(DataLoader(data.train_dataset, 300)))
        y[7] = -1
        rows = [{"pixels": 100 * a, "class": b} for a, b in zip(x, y)]
        return DataLoader(rows, batch_size=50, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "pixels": batch["pixels"] / 100}


class Empty(pl.LightningDataModule):
    pass
""".replace("RATE", str(NOISE))
CONFIG = """
seed_everything: 3
trainer: {max_epochs: 3, logger: {class_path: WandbLogger}, callbacks: CALLBACKS}
model:
  class_path: lightning_methods.Classifier
  init_args: {net: {class_path: lightning_methods.models.MLP, init_args: {in_features: 64, hidden: [64, 32]}}}
data: {class_path: noisy.DATA}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One network with and without the state of the callback, and the callback."""
    folder = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    model = Classifier(MLP(64, (64, 32)), partial(Adam, lr=3e-3))
    rog = RobustGenerativeClassifier("net.layer*")
    trainer = quiet_trainer(folder, max_epochs=12, callbacks=[rog])
    trainer.fit(model, DigitsDataModule(128, flat=True, wrap_train=partial(NoisyLabels, rate=NOISE)))
    trainer.save_checkpoint(folder / "fitted.ckpt")
    torch.save(model.state_dict(), folder / "bare.pt")
    return folder, rog


@pytest.fixture
def folder(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_METHODS_DEBUG", raising=False)
    (tmp_path / "noisy.py").write_text(DATA)
    own = "[{class_path: EarlyStopping, init_args: {monitor: x}}, {class_path: RobustGenerativeClassifier, init_args: "
    for name, callbacks, data in (
        ("with", own + '{layers: "net.layer*"}}]', "Noisy"),
        ("without", "null", "Noisy"),
        ("scaled", own + "{inputs: pixels, labels: class}}]", "Scaled"),
        ("empty", "null", "Empty"),
    ):
        (tmp_path / f"{name}.yaml").write_text(CONFIG.replace("CALLBACKS", callbacks).replace("DATA", data))
    for name in ("fitted.ckpt", "bare.pt"):
        (tmp_path / name).symlink_to(trained[0] / name)
    return tmp_path


def run(*argv):
    try:
        return main(["audit-labels", *argv])
    except SystemExit as leave:
        return leave.code


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", ["with", "without"])
def test_the_fit_of_the_checkpoint_is_used(folder, trained, capsys, config):
    assert run("fitted.ckpt", "--config", f"{config}.yaml", "--output", "out/deep") == 0
    printed = capsys.readouterr().out
    assert "the fit that the checkpoint holds was used" in printed
    assert "suspects precision" in printed
    names = ["suspects.csv", "samples.csv", "classes.csv", "transition.csv", "layers.csv"]
    names += ["transition.png", "distances.png", "layers.png"]
    assert printed.split()[-8:] == [f"out/deep/{name}" for name in names]
    for name in names[5:]:
        assert (folder / "out/deep" / name).read_bytes().startswith(b"\x89PNG")
    expected = trained[1].audit
    rows = rows_of(folder / "out/deep/suspects.csv")
    assert [int(r["index"]) for r in rows] == expected.index[expected.suspected].tolist()
    assert [float(r["margin"]) for r in rows] == pytest.approx(expected.margin[expected.suspected].tolist())
    assert len(rows_of(folder / "out/deep/samples.csv")) == len(expected.given)
    layers = {r["layer"]: float(r["weight"]) for r in rows_of(folder / "out/deep/layers.csv")}
    assert layers == pytest.approx(
        dict(zip(trained[1].ensemble.names, trained[1].ensemble.weights.tolist(), strict=True))
    )
    assert not (folder / "wandb").exists()  # the loggers of the run are not started


def test_bare_weights_are_fitted_to_and_say_the_same(folder, trained, capsys):
    assert run("bare.pt", "--config", "with.yaml") == 0
    printed = capsys.readouterr().out
    assert "agreement with the validation labels: softmax" in printed
    rows = rows_of(folder / "label_audit/suspects.csv")
    expected = trained[1].audit
    assert [int(r["index"]) for r in rows] == expected.index[expected.suspected].tolist()
    wrong = [r["given"] != r["true"] for r in rows]
    assert sum(wrong) / len(wrong) > 0.6 > NOISE
    assert sum(int(r["samples"]) for r in rows_of(folder / "label_audit/classes.csv")) == len(expected.given)


@pytest.mark.parametrize(
    "option",
    [
        "--refit",
        *(
            pytest.param(option, marks=pytest.mark.slow)
            for option in ("--estimator=sample", "--support-fraction=half", "--layers=net.layer1")
        ),
    ],
)
def test_an_option_fits_anew(folder, capsys, option):
    assert run("fitted.ckpt", "--config", "with.yaml", option) == 0
    assert "agreement with the validation labels" in capsys.readouterr().out


def test_all_samples_are_examined_though_few_are_fitted(folder, trained):
    with pytest.warns(UserWarning, match="leaves out"):
        assert run("fitted.ckpt", "--config", "with.yaml", "--max-per-class=40") == 0
    rows = rows_of(folder / "label_audit/samples.csv")
    assert [int(r["index"]) for r in rows] == list(range(len(trained[1].audit.given)))


def test_a_state_of_other_weights_is_not_used(folder, capsys):
    content = torch.load("fitted.ckpt", weights_only=True)
    content["state_dict"]["net.head.bias"] += 0.1
    torch.save(content, "moved.ckpt")
    assert run("moved.ckpt", "--config", "with.yaml") == 0
    assert "agreement with the validation labels" in capsys.readouterr().out


def test_dict_batches_hooks_labels_that_are_no_class_and_no_validation_data(folder, capsys):
    with (
        pytest.warns(UserWarning, match="no validation data"),
        pytest.warns(UserWarning, match="1 training samples have no label"),
    ):
        assert run("bare.pt", "--config", "scaled.yaml") == 0
    rows = rows_of(folder / "label_audit/samples.csv")
    assert [int(r["index"]) for r in rows] == [i for i in range(300) if i != 7]
    # clean labels, and a network that knows these digits: nearly all are confirmed, which without the hook they are not
    assert sum(r["given"] == r["suggested"] for r in rows) > 0.9 * len(rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fitted.ckpt"], "--config"),
        (["nope.ckpt", "--config", "with.yaml"], "nope.ckpt: there is no such checkpoint"),
        (["text.ckpt", "--config", "with.yaml"], "text.ckpt cannot be read"),
        (["other.ckpt", "--config", "with.yaml"], "other.ckpt does not fit the model"),
        (["fitted.ckpt", "--config", "nope.yaml"], "nope.yaml cannot be read"),
        (["fitted.ckpt", "--config", "nomodel.yaml"], "describes no model"),
        (["fitted.ckpt", "--config", "nodata.yaml"], "no train dataloader"),
        (["fitted.ckpt", "--config", "empty.yaml"], "no train dataloader"),
        (["fitted.ckpt", "--config", "with.yaml", "--layers", "net.leyer1"], "net.layer1"),
        (["fitted.ckpt", "--config", "with.yaml", "--support-fraction", "most"], "'most': auto, half, confirmed"),
        (["fitted.ckpt", "--config", "with.yaml", "--support-fraction", "0.2"], "support_fraction=0.2"),
        (["fitted.ckpt", "--config", "with.yaml", "--estimator", "mdc"], "invalid choice: 'mdc'"),
        (["fitted.ckpt", "--config", "with.yaml", "--max-per-class", "1"], "max_per_class=1"),
        (["fitted.ckpt", "--config", "with.yaml", "--device", "abacus"], "--device abacus"),
        (["fitted.ckpt", "--config", "with.yaml", "--output", "with.yaml"], "cannot be written"),
    ],
)
def test_a_users_error_is_one_line_and_code_2(folder, capsys, arguments, says):
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "nomodel.yaml").write_text("data: {}\n")
    (folder / "nodata.yaml").write_text((folder / "without.yaml").read_text().replace("\ndata:", "\nnothing:"))
    torch.save(Classifier(MLP(64, (16,))).state_dict(), "other.ckpt")
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-methods")
    assert says in lines[0]
