"""Train digits by an optimizer without a learning rate, and see why such optimizers are hard to train.

python examples/learned_optimizer.py                          figures and tables under runs/
WANDB_MODE=offline python examples/learned_optimizer.py       the same in W&B; send it later with `wandb sync`
"""

import os
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_methods import Classifier, DigitsDataModule, LearnedOptimizer, LearnedOptimizerMonitor
from lightning_methods.learned_optimizer import ModuleTask, showing
from lightning_methods.learned_optimizer.samples import samples_of
from lightning_methods.models import MLP

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="learned_optimizer")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="learned_optimizer", save_dir="runs"))
    data, model = DigitsDataModule(batch_size=32), Classifier(MLP(64, (32,)))
    model.configure_optimizers = lambda: LearnedOptimizer(model.parameters())
    trainer = Trainer(max_epochs=4, logger=loggers, callbacks=[LearnedOptimizerMonitor()], enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.test(model, data)

    folder = Path(loggers[0].log_dir) / "learned_optimizer"
    task, rule = ModuleTask(MLP(64, (8,)), *samples_of(data), batch_size=16), showing.chaotic(factor=6.0)
    rows = showing.estimator_variances(task, *rule, [5, 10, 20, 40, 80])
    showing.variance_figure(rows).savefig(folder / "variances.png", dpi=150)
    offsets = torch.linspace(-0.1, 0.1, 41)
    raw, smoothed = showing.loss_slice(task, *rule, 40, offsets, samples=8)
    showing.slice_figure(offsets, raw, smoothed).savefig(folder / "slice.png", dpi=150)
    print(*sorted(folder.glob("*.*")), sep="\n")
