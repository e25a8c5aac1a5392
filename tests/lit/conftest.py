"""Small pairs of networks, and a fit that shows nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.lit import LITDistiller

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}


def dense(depth: int, *, norm: type[nn.Module] | None = None, width: int = 8, classes: int = 3) -> nn.Sequential:
    """Return stem, two sections of some layers, and a head."""

    def section() -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), *([norm(width)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers)

    stem = nn.Sequential(nn.Linear(6, width), *([norm(width)] if norm else []), nn.ReLU())
    parts = {"stem": stem, "layer1": section(), "layer2": section(), "head": nn.Linear(width, classes)}
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


def made_data(samples: int = 48, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (samples,), generator=generator)
    x = torch.randn(samples, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6)
    return TensorDataset(x, y)


def loader(samples: int = 48, batch: int = 16) -> DataLoader:
    return DataLoader(made_data(samples), batch_size=batch)


def distiller(norm: type[nn.Module] | None = None, *, seed: int = 0, **settings: Any) -> LITDistiller:
    torch.manual_seed(seed)
    teacher, student = dense(3, norm=norm), dense(1, norm=norm)
    for module in teacher.modules():  # running statistics that differ from those of a batch
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return LITDistiller(teacher, student, **settings)


def fit(module: LITDistiller, folder: Path, *, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 4, "default_root_dir": folder, **settings})
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data or loader(), loader(16), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def made():
    return distiller
