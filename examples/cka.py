"""Attach the comparison to an unchanged classifier, and see how far each layer moves from its initialisation.

python examples/cka.py                          curves and figures under runs/
WANDB_MODE=offline python examples/cka.py       the same in W&B; send it later with `wandb sync`
"""

import os

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_methods import Classifier, DigitsDataModule, RepresentationSimilarity
from lightning_methods.models import SmallConvNet

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="cka")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="cka", save_dir="runs"))
    similarity = RepresentationSimilarity(["net.layer*", "net.head"], compare="init")
    trainer = Trainer(max_epochs=6, callbacks=[similarity], logger=loggers, enable_model_summary=False)
    trainer.fit(Classifier(SmallConvNet()), DigitsDataModule())

    table = Table("layer", "first epoch", "last epoch", title="CKA to the initial network")
    for layer, series in similarity.history.items():
        table.add_row(layer, f"{series[0][1]:.3f}", f"{series[-1][1]:.3f}")
    console = Console(width=120)
    console.print(table, *similarity.figure_paths, sep="\n")
