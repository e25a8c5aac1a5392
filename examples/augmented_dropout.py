"""Give the dropouts of an unchanged classifier less noise in the forward and more in the backward pass.

python examples/augmented_dropout.py                          curves and figures under runs/
WANDB_MODE=offline python examples/augmented_dropout.py       the same in W&B; send it later with `wandb sync`
"""

import os

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_methods import AugmentedDropout, Classifier, DigitsDataModule
from lightning_methods.augmented_dropout import LinearRate
from lightning_methods.models import MLP

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="augmented_dropout")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="augmented_dropout", save_dir="runs"))
    dropout = AugmentedDropout(p_forward=0.4, p_backward=0.6, schedule_backward=LinearRate(), compare_every_n_steps=5)
    trainer = Trainer(max_epochs=10, callbacks=[dropout], logger=loggers, enable_model_summary=False)
    model, digits = Classifier(MLP(64, dropout=0.5)), DigitsDataModule(flat=True)
    trainer.fit(model, digits)
    (result,) = trainer.test(model, digits, verbose=False)

    table = Table("dropout", "forward", "backward", "weight gradient", title="Dropouts of the classifier")
    for reading in dropout.readings:
        table.add_row(reading.name, f"{reading.p_forward}", f"{reading.p_backward}", reading.weight_gradient)
    cosine = dropout.comparison.history["grad_cosine"]
    console = Console(width=120)
    console.print(table, f"cosine to the standard gradient: first epoch {cosine[0]:.2f}, last {cosine[-1]:.2f}")
    console.print(f"test accuracy {result['test/accuracy']:.3f}", *dropout.figure_paths, sep="\n")
