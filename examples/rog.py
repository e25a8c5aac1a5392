"""Memorise digits of which 40% bear a wrong label, and classify the test images by softmax and by RoG.

python examples/rog.py                          figures and tables under runs/
WANDB_MODE=offline python examples/rog.py       the same in W&B; send it later with `wandb sync`
"""

import os
from functools import partial

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from torch.optim import Adam

from lightning_methods import Classifier, DigitsDataModule, NoisyLabels, RobustGenerativeClassifier
from lightning_methods.models import MLP

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="rog")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="rog", save_dir="runs"))
    rog = RobustGenerativeClassifier()
    trainer = Trainer(max_epochs=80, callbacks=[rog], logger=loggers, enable_model_summary=False, log_every_n_steps=5)
    digits = DigitsDataModule(128, flat=True, wrap_train=partial(NoisyLabels, rate=0.4))
    model = Classifier(MLP(64, (256, 64, 64)), partial(Adam, lr=2e-3))
    trainer.fit(model, digits)
    known = trainer.callback_metrics["train/accuracy"]
    (result,) = trainer.test(model, digits, verbose=False)

    table = Table("classifier", "test accuracy", title="Digits with 40% wrong labels")
    table.add_row("its softmax", f"{result['rog/test/softmax']:.3f}")
    table.add_row("RoG on its layers", f"{result['rog/test/accuracy']:.3f}")
    console = Console(width=120)
    noise, true = rog.audit.noise_rate, rog.audit.quality()["true_noise_rate"]
    found = f"learned of the noisy labels: {known:.1%}; wrong: {noise:.1%} estimated, {true:.1%} in truth"
    console.print(table, found, *rog.figure_paths, sep="\n")
