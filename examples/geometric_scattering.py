"""Classify random graphs by their scattering features, by a network in a Trainer and by the paper's machines."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_methods import (
    ClusteringCoefficient,
    Eccentricity,
    GeometricScattering,
    RandomGraphsDataModule,
    ScatteringClassifier,
    ScatteringSVM,
)
from lightning_methods.geometric_scattering import class_subspaces, z_scores
from lightning_methods.report import heatmap


def main() -> None:
    seed_everything(0)
    data = RandomGraphsDataModule(transform=[Eccentricity(), ClusteringCoefficient()])
    model = ScatteringClassifier(num_classes=4, in_channels=2, lr=3e-3)
    trainer = Trainer(max_epochs=20, accelerator="cpu", default_root_dir="runs", logger=False)
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)

    graphs = GeometricScattering().transform_dataset(data.graphs)
    features = torch.cat([graph.scattering for graph in graphs])
    machines = ScatteringSVM(models=4, gammas=(1e-3, 1e-2, 1e-1), costs=(1.0, 10.0, 100.0))
    found = machines.cross_validate(features, data.labels, folds=5)
    print(f"network, one fold {100 * tested['test/accuracy']:.1f}%; machines, five folds {100 * found.mean:.1f}%")
    distances = class_subspaces(z_scores(features), data.labels).distances
    Path("runs").mkdir(exist_ok=True)
    heatmap(distances, title="Distance of the classes (rows) to their subspaces").savefig("runs/scattering.png")
    print("runs/scattering.png")


if __name__ == "__main__":
    main()
