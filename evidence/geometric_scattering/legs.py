"""Learned scales against the paper's, in pairs that share the folds and the initial weights of the head."""

from __future__ import annotations

import argparse
import time
from functools import cache
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_methods import (
    ClusteringCoefficient,
    Eccentricity,
    GeometricScattering,
    ScatteringClassifier,
    TUGraphDataModule,
)

SETTINGS: dict[str, Any] = {"hidden": (64,), "dropout": 0.3, "lr": 3e-3, "weight_decay": 1e-4, "J": 4}


@cache
def data_of(name: str, root: str, *, learnable: bool) -> TUGraphDataModule:
    signals = [Eccentricity(), ClusteringCoefficient()] if name.startswith(("IMDB", "COLLAB")) else []
    ready = [] if learnable else [GeometricScattering(J=SETTINGS["J"])]
    return TUGraphDataModule(name, root, transform=[*signals, *ready])


def trained(args: argparse.Namespace, name: str, seed: int, *, learnable: bool) -> dict[str, Any]:
    """Return the test accuracy at the epoch of the best validation accuracy."""
    data = data_of(name, args.root, learnable=learnable)
    data.fold, data.seed = seed % data.num_folds, seed // data.num_folds
    data.setup()
    seed_everything(seed, verbose=False)
    model = ScatteringClassifier(
        data.num_classes, data.num_features, learnable="legs" if learnable else False, **SETTINGS
    )
    best = ModelCheckpoint("runs/geometric_scattering/legs", monitor="val/accuracy", mode="max", save_weights_only=True)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["default_root_dir"] = "runs/geometric_scattering/legs"
    trainer = Trainer(max_epochs=args.epochs, accelerator=args.device, devices=1, callbacks=[best], **quiet)
    start = time.monotonic()
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, ckpt_path=best.best_model_path, verbose=False)
    found: dict[str, Any] = {"accuracy": tested["test/accuracy"], "seconds": round(time.monotonic() - start, 1)}
    if learnable:
        weights = model.encoder.scales().detach().cpu()
        times = 1.0 + weights.new_tensor(range(weights.shape[1]))
        found |= {"scales": (weights @ times).tolist(), "laziness": float(model.encoder.alpha())}
    return found


def run(args: argparse.Namespace, results: Any) -> None:
    """Train all pairs that are not in the results yet."""
    for seed in range(args.seeds or 10):
        for name in args.names:
            for kind in ("fixed", "learned"):
                if results.missing(name, str(seed), kind):
                    found = trained(args, name, seed, learnable=kind == "learned")
                    results.add({**found, "epochs": args.epochs}, name, str(seed), kind)
