"""Attach the soft nearest neighbour loss to an unchanged classifier, and see how entangled each layer is.

python examples/snnl.py                          curves and figures under runs/
WANDB_MODE=offline python examples/snnl.py       the same in W&B; send it later with `wandb sync`
"""

import os

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_methods import Classifier, DigitsDataModule, SoftNearestNeighborLoss
from lightning_methods.models import SmallConvNet

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="snnl")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="snnl", save_dir="runs"))
    snnl = SoftNearestNeighborLoss("net.layer*")
    trainer = Trainer(max_epochs=10, callbacks=[snnl], logger=loggers, enable_model_summary=False, log_every_n_steps=10)
    model, digits = Classifier(SmallConvNet()), DigitsDataModule()
    trainer.fit(model, digits)
    (result,) = trainer.test(model, digits, verbose=False)

    table = Table("layer", "entanglement, first epoch", "last epoch", title="Soft nearest neighbour loss / chance")
    for layer, series in snnl.history.items():
        table.add_row(layer, f"{series['normalized'][0]:.3f}", f"{series['normalized'][-1]:.3f}")
    console = Console(width=120)
    console.print(table, f"test accuracy {result['test/accuracy']:.3f}", *snnl.figure_paths, sep="\n")
