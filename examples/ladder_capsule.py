"""Train a ladder capsule network on digits, and show what its capsules and poses mean.

python examples/ladder_capsule.py                          figures and tables under runs/
WANDB_MODE=offline python examples/ladder_capsule.py       the same in W&B; send it later with `wandb sync`
"""

import os
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_methods import CapsuleMonitor, LadderCapsuleNetwork, PoseDataModule

SMALL = {"image_size": 8, "k": 16, "types": 8, "pose_dim": 8, "width": 32, "kernel_size": 3, "hidden": (32, 48, 64)}

if __name__ == "__main__":
    seed_everything(0)
    data = PoseDataModule("digits", train_rotation=(0, 0), test_rotations=(0, 15, 30, 45))
    model = LadderCapsuleNetwork(**SMALL, hyper="shared", lr=3e-3, decoder=True, decoder_hidden=(128,))
    loggers = [CSVLogger("runs", name="ladder_capsule")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="ladder_capsule", save_dir="runs"))
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=12, logger=loggers, callbacks=CapsuleMonitor(), **quiet)
    trainer.fit(model, data)
    results = {key: value for level in trainer.test(model, data, verbose=False) for key, value in level.items()}
    table = Table("test images turned by", "accuracy", title="Digits, trained upright")
    for level in data.levels:
        table.add_row(f"{level.value:g} degrees", f"{results[f'test/accuracy/{level.name}']:.3f}")
    Console(width=120).print(table, *sorted(Path(loggers[0].log_dir, "ladder_capsule").glob("*.*")), sep="\n")
