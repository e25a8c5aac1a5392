"""Is dropout worth it on digits? Six pairs of runs, each source of variation on its own seeds, and a verdict.

python examples/reproducibility.py                          report, figures and tables under runs/study
WANDB_MODE=offline python examples/reproducibility.py       the same in W&B; send it later with `wandb sync`
"""

import os

import lightning.pytorch as pl
from rich.console import Console

from lightning_methods import Classifier, DigitsDataModule, SeedStreams, Study
from lightning_methods.models import MLP


def accuracy(seeds, p):
    streams = SeedStreams(**seeds)
    streams.seed("init")
    model = Classifier(MLP(64, [64], dropout=p))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": "runs/study", "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[streams], **quiet)
    data = DigitsDataModule(flat=True, seed=seeds["split"])
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    return result


if __name__ == "__main__":
    wandb = {"project": "lightning-methods", "dir": "runs"} if "WANDB_MODE" in os.environ else None
    study = Study("dropout", metric="test/accuracy", replicates=6, folder="runs/study", wandb=wandb)
    study.add("dropout", lambda seeds: accuracy(seeds, 0.3)).add("none", lambda seeds: accuracy(seeds, 0.0))
    analysis = study.run(tell=lambda p: print(f"{p.done} of {p.total}, {p.seconds_left:.0f} s left"))
    files = study.report()
    if wandb:
        study.track(files)
    print(analysis.comparisons[0].sentence("test/accuracy"), analysis.comparisons[0].advice(), sep="\n")
    Console(width=120).print(*files, sep="\n")
