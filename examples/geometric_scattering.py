"""Classify random graphs by their scattering features, by a network in a Trainer and by the paper's machines."""

import os

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import lightning_methods as lm
from lightning_methods.geometric_scattering import class_subspaces, z_scores
from lightning_methods.report import heatmap, log_figure, log_table


def main() -> None:
    seed_everything(0)
    loggers = [CSVLogger("runs", name="scattering")]
    if "WANDB_MODE" in os.environ:
        loggers.append(WandbLogger(project="lightning-methods", name="scattering", save_dir="runs"))
    data = lm.RandomGraphsDataModule(transform=[lm.Eccentricity(), lm.ClusteringCoefficient()])
    model = lm.ScatteringClassifier(num_classes=4, in_channels=2, lr=3e-3)
    trainer = Trainer(max_epochs=20, accelerator="cpu", logger=loggers, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)

    graphs = lm.GeometricScattering().transform_dataset(data.graphs)
    features = torch.cat([graph.scattering for graph in graphs])
    machines = lm.ScatteringSVM(models=4, gammas=(1e-3, 1e-2, 1e-1), costs=(1.0, 10.0, 100.0))
    found = machines.cross_validate(features, data.labels, folds=5)
    print(f"network, one fold {100 * tested['test/accuracy']:.1f}%; machines, five folds {100 * found.mean:.1f}%")

    distances = class_subspaces(z_scores(features), data.labels).distances
    figure = heatmap(distances, title="Distance of the classes (rows) to their subspaces")
    written = log_figure(trainer, "scattering/classes", figure)
    written += log_table(trainer, "scattering/distances", ["random", "hubs", "blocks", "ring"], distances.tolist())
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
