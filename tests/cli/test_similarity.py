"""`similarity` and `layer-identification` on small checkpoints."""

from __future__ import annotations

import csv

import pytest
import torch

from lightning_methods import Classifier, DigitsDataModule
from lightning_methods.cka import layer_identification, similarity_matrix
from lightning_methods.cli import main
from lightning_methods.models import MLP, SmallConvNet

CONFIG = """
seed_everything: 3
trainer: {max_epochs: 3, logger: {class_path: WandbLogger}}
model:
  class_path: lightning_methods.Classifier
  init_args:
    net: {class_path: lightning_methods.models.NET}
data: {class_path: lightning_methods.DigitsDataModule, init_args: {flat: FLAT, batch_size: 50}}
ckpt_path: null
"""
CONV = "{class_path: lightning_methods.models.SmallConvNet, init_args: {width: 0.1}}"
LAYERS = ["--layers", "net.layer*", "net.head"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three checkpoints of one small network, one of another, and their configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_METHODS_DEBUG", raising=False)
    for name, seed in zip("abc", range(3), strict=True):
        torch.manual_seed(seed)
        torch.save({"state_dict": Classifier(SmallConvNet(width=0.1)).state_dict()}, f"{name}.ckpt")
    torch.save(Classifier(torch.nn.Sequential(torch.nn.Flatten(), MLP(64))).state_dict(), "mlp.ckpt")
    config = CONFIG.replace("{class_path: lightning_methods.models.NET}", CONV).replace("FLAT", "false")
    (tmp_path / "config.yaml").write_text(config)
    return tmp_path


def run(*argv):
    try:
        return main(argv)
    except SystemExit as leave:
        return leave.code


def features(path, samples=180):
    model = Classifier(SmallConvNet(width=0.1)).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    data = DigitsDataModule()
    data.setup("fit")
    x = torch.cat([batch[0] for batch in data.val_dataloader()])[:samples]
    found = {}
    with torch.no_grad():
        for name, layer in model.net.named_children():
            x = layer(x)
            if name != "flatten":
                found[f"net.{name}"] = x.flatten(1)
    return found


def test_similarity_prints_a_table_and_writes_heat_map_and_csv(folder, capsys):
    assert run("similarity", "a.ckpt", "b.ckpt", "--config", "config.yaml", *LAYERS, "--output", "out/deep") == 0
    printed = capsys.readouterr().out
    assert "net.layer2" in printed
    assert printed.split()[-2:] == ["out/deep/similarity.png", "out/deep/similarity.csv"]
    assert (folder / "out/deep/similarity.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "out/deep/similarity.csv").open()))
    expected = similarity_matrix(features("a.ckpt"), features("b.ckpt"), debiased=True)
    assert [float(row["cka"]) for row in rows] == pytest.approx(expected.flatten().tolist(), abs=1e-6)
    assert f"{float(expected[1, 1]):.3f}" in printed
    assert not (folder / "wandb").exists()  # the loggers of the run are not started


def test_other_samples_and_another_index(folder):
    arguments = ["--split", "test", "--max-samples", "60", "--index", "procrustes", "--pool", "gap"]
    assert run("similarity", "a.ckpt", "a.ckpt", "--config", "config.yaml", *LAYERS, *arguments) == 0
    rows = list(csv.DictReader((folder / "similarity/similarity.csv").open()))
    assert [float(row["procrustes"]) for row in rows if row["layer"] == row["other"]] == pytest.approx([1] * 4)


def test_another_network(folder, capsys):
    (folder / "mlp.py").write_text(
        "import torch\nfrom lightning_methods.models import MLP\n\n\nclass Flat(torch.nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(torch.nn.Flatten(), MLP(64))\n"
    )
    config = CONFIG.replace("lightning_methods.models.NET", "mlp.Flat").replace("FLAT", "false")
    (folder / "mlp.yaml").write_text(config)
    other = ["--other-config", "mlp.yaml", "--other-layers", "net.1.*"]
    assert run("similarity", "a.ckpt", "mlp.ckpt", "--config", "config.yaml", *LAYERS, *other) == 0
    assert "net.1." in capsys.readouterr().out


def test_layer_identification(folder, capsys):
    assert run("layer-identification", "a.ckpt", "b.ckpt", "c.ckpt", "--config", "config.yaml", *LAYERS) == 0
    rate = layer_identification([features(f"{name}.ckpt") for name in "abc"], debiased=True)
    assert capsys.readouterr().out.startswith(f"cka: {100 * rate:.1f}% of the layers")


@pytest.mark.parametrize("command", ["similarity", "layer-identification"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.ckpt", "b.ckpt", *LAYERS], "--config"),
        (["a.ckpt", "b.ckpt", "--config", "config.yaml"], "--layers"),
        (["a.ckpt", "nope.ckpt", "--config", "config.yaml", *LAYERS], "nope.ckpt: there is no such checkpoint"),
        (["a.ckpt", "b.ckpt", "--config", "nope.yaml", *LAYERS], "nope.yaml cannot be read"),
        (["a.ckpt", "b.ckpt", "--config", "empty.yaml", *LAYERS], "describes no model"),
        (["a.ckpt", "b.ckpt", "--config", "wrong.yaml", *LAYERS], "there is no class 'Clasifier'"),
        (["a.ckpt", "b.ckpt", "--config", "nodata.yaml", *LAYERS], "describes no data"),
        (["a.ckpt", "b.ckpt", "--config", "config.yaml", "--layers", "net.leyer1"], "net.layer1"),
        (["a.ckpt", "b.ckpt", "--config", "config.yaml", *LAYERS, "--index", "nope"], "invalid choice: 'nope'"),
        (["a.ckpt", "b.ckpt", "--config", "config.yaml", *LAYERS, "--max-samples", "3"], "at least 4"),
        (["a.ckpt", "mlp.ckpt", "--config", "config.yaml", *LAYERS], "mlp.ckpt does not fit the model"),
        (["a.ckpt", "text.ckpt", "--config", "config.yaml", *LAYERS], "text.ckpt cannot be read"),
    ],
)
def test_a_users_error_is_one_line_and_code_2(folder, capsys, command, arguments, says):
    (folder / "empty.yaml").write_text("data: {}\n")
    (folder / "wrong.yaml").write_text("model: {class_path: Clasifier}\n")
    (folder / "nodata.yaml").write_text((folder / "config.yaml").read_text().replace("\ndata:", "\nnothing:"))
    (folder / "text.ckpt").write_text("no checkpoint")
    assert run(command, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-methods")
    assert says in lines[0]


def test_one_checkpoint_is_not_enough(folder, capsys):
    assert run("layer-identification", "a.ckpt", "--config", "config.yaml", *LAYERS) == 2
    assert "at least two" in capsys.readouterr().err


def test_padded_sequences(folder):
    (folder / "sequences.py").write_text(
        "import lightning.pytorch as pl\nimport torch\nfrom torch.utils.data import DataLoader\n\n\n"
        "class Words(pl.LightningModule):\n"
        "    def __init__(self):\n        super().__init__()\n        self.embed = torch.nn.Embedding(20, 5)\n"
        "        self.deep = torch.nn.Linear(5, 4)\n\n"
        "    def forward(self, ids):\n        return self.deep(self.embed(ids))\n\n\n"
        "class Sequences(pl.LightningDataModule):\n"
        "    def __init__(self, padding: int = 0):\n        super().__init__()\n        self.padding = padding\n\n"
        "    def val_dataloader(self):\n"
        "        ids = torch.arange(1, 13).repeat(4, 1).roll(3) * torch.arange(1, 5)[:, None] % 19 + 1\n"
        "        mask = torch.arange(12) < torch.tensor([[12], [9], [10], [6]])\n"
        "        rows = ids.masked_fill(~mask, self.padding)\n"
        "        return DataLoader([{'input_ids': rows, 'attention_mask': mask.long()}] * 2, batch_size=None)\n"
    )
    for padding in (0, 7):
        data = f"data: {{class_path: sequences.Sequences, init_args: {{padding: {padding}}}}}"
        (folder / f"{padding}.yaml").write_text(f"model: {{class_path: sequences.Words}}\n{data}\n")
    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(20, 5), "deep.weight": torch.randn(4, 5), "deep.bias": torch.randn(4)}
    torch.save({"state_dict": weights}, "words.ckpt")
    found = {}
    for padding, mask in ((0, True), (7, True), (0, False), (7, False)):
        arguments = ["--config", f"{padding}.yaml", "--layers", "embed", "deep"]
        arguments += ["--mask", "attention_mask"] if mask else []
        assert run("similarity", "words.ckpt", "words.ckpt", *arguments) == 0
        found[padding, mask] = (folder / "similarity/similarity.csv").read_text()
    assert found[0, True] == found[7, True]
    assert found[0, False] != found[7, False]
