"""Weight the loss of an unchanged classifier on rare classes, and watch whether the weights keep an effect.

python examples/importance_weighting.py                          curves and figures under runs/
WANDB_MODE=offline python examples/importance_weighting.py       the same in W&B; send it later with `wandb sync`
"""

import os
from functools import partial

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_methods import (
    Classifier,
    DigitsDataModule,
    ImbalancedSubset,
    ImportanceWeighting,
    WeightEffectMonitor,
)
from lightning_methods.models import SmallConvNet

if __name__ == "__main__":
    seed_everything(0)
    loggers = [CSVLogger("runs", name="importance_weighting")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="importance_weighting", save_dir="runs"))
    data = DigitsDataModule(wrap_train=partial(ImbalancedSubset, ratio=30))
    monitor = WeightEffectMonitor(every_n_epochs=2)
    callbacks = [ImportanceWeighting("balanced"), monitor]
    trainer = Trainer(max_epochs=20, callbacks=callbacks, logger=loggers, enable_model_summary=False)
    model = Classifier(SmallConvNet())
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    print(f"test accuracy {result['test/accuracy']:.3f}")
    print(*monitor.figure_paths, sep="\n")
