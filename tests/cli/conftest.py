from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CARD = """---
technique: Soft nearest neighbour loss
paper: Frosst, Papernot and Hinton, ICML 2019, arXiv:1902.01889
classes:
  SoftNearestNeighborLoss: [Callback, "measures or changes how classes mix [per layer]"]
  Entanglement: [Metric, "the same as a metric"]
---

# Soft nearest neighbour loss

Text of the **card**.
"""


@pytest.fixture
def package(tmp_path):
    """A folder with the card of one method."""
    (tmp_path / "package/snnl").mkdir(parents=True)
    (tmp_path / "package/snnl/README.md").write_text(CARD)
    return tmp_path / "package"


@pytest.fixture
def light(tmp_path, package):
    """Run a command in a process where importing torch or lightning raises, and check that nobody tried."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("torch", "torchvision", "lightning", "pytorch_lightning"):
        (broken / f"{name}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")

    def run(*argv):
        code = (
            "import sys; from pathlib import Path; from lightning_methods.cli import cards, main;"
            f"cards.PACKAGE = Path({str(package)!r}); code = main({list(argv)!r});"
            "heavy = {'torch', 'torchvision', 'lightning', 'pytorch_lightning', 'matplotlib', 'numpy'};"
            "heavy &= set(sys.modules);"
            "assert not heavy, heavy; sys.exit(code)"
        )
        paths = os.pathsep.join([str(broken), str(Path(__file__).parents[2])])
        env = {**os.environ, "PYTHONPATH": paths, "HOME": str(tmp_path), "WANDB_MODE": "offline", "COLUMNS": "100"}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    return run


TOY = """
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_methods.errors import InvalidArgument


class ToyModel(BoringModel):
    def __init__(self, width: int = 4, optional: float | None = None):
        super().__init__()
        if width < 1:
            raise InvalidArgument(f"width={width} must be positive.")
        self.save_hyperparameters()


class Troublesome(Callback):
    def __init__(self, when: str = "never", kind: str = "ours"):
        if when == "init":
            raise InvalidArgument("trouble at once, [not markup]")
        self.when, self.kind = when, kind

    def setup(self, trainer, pl_module, stage):
        self._raise("setup")

    def on_train_start(self, trainer, pl_module):
        self._raise("train")

    def _raise(self, now):
        if self.when == now:
            raise {"ours": InvalidArgument("trouble later"), "theirs": KeyError("theirs")}[self.kind]
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A user's folder with a module `toys` in it, as the working folder."""
    folder = tmp_path / "workshop"
    folder.mkdir()
    (folder / "toys.py").write_text(TOY)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIGHTNING_METHODS_DEBUG", raising=False)
    yield folder
    sys.modules.pop("toys", None)
