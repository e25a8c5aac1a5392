"""Train a ResNet-20 on digits, and distil it into a ResNet-8 section by section.

python examples/lit.py                          figures and tables under runs/
WANDB_MODE=offline python examples/lit.py       the same in W&B; send it later with `wandb sync`
"""

import os
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_methods import DigitsDataModule, LITDistiller
from lightning_methods.models import CIFARResNet


def train(model, name, epochs):
    loggers = [CSVLogger("runs", name=name)]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name=name, save_dir="runs"))
    quiet = {"enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=epochs, logger=loggers if name == "lit" else False, **quiet)
    trainer.fit(model, DigitsDataModule())
    (result,) = trainer.test(model, DigitsDataModule(), verbose=False)
    return result["test/accuracy"], Path(loggers[0].log_dir)


if __name__ == "__main__":
    seed_everything(0)
    teacher, student = (CIFARResNet(depth, width=8, in_channels=1) for depth in (20, 8))
    taught, _ = train(LITDistiller(None, teacher, mode="scratch"), "teacher", 12)
    ours, folder = train(LITDistiller(teacher, student, stitch=True), "lit", 12)
    table = Table("network", "test accuracy", title="Digits")
    table.add_row("teacher, ResNet-20", f"{taught:.3f}")
    table.add_row("student, ResNet-8, by LIT", f"{ours:.3f}")
    Console(width=120).print(table, *sorted((folder / "lit").glob("*.*")), sep="\n")
