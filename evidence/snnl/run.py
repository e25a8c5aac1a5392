"""Measure on real data what the soft nearest neighbour loss does to a training, and which settings are safe.

    python evidence/snnl/run.py                                   # everything, then the report
    python evidence/snnl/run.py --part claims --data digits       # one part
    python evidence/snnl/run.py --part claims --data mnist --device cuda --train-size 54000 --width 1 --seeds 10

All runs use the package as a user would: Trainer, Classifier, SoftNearestNeighborLoss, Entanglement and DeepKNN.
Conditions of one seed share data split, initial weights and batch order, hence the differences are paired.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from outliers import digit_outliers, mnist_outliers
from report import write_report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.classification import binary_auroc

from lightning_methods import DeepKNN, Entanglement, SoftNearestNeighborLoss
from lightning_methods.core.passes import batches
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.data import DigitsDataModule, MNISTDataModule
from lightning_methods.data.images import Preprocess, collate
from lightning_methods.models import MLP, CIFARResNet, Classifier, ConvNet, SmallConvNet

HERE = Path(__file__).parent
RESULTS = HERE / "results"

DATA = ("digits", "mnist", "mnist-unit")

#: the preset as it is, where the table of safe settings has a temperature
SAFE = "safe preset"

#: what tells the rows of the table of safe settings apart
KEYS = ("network", "optimizer", "seed", "epochs", "layers", "temperature", "weight")

ROBUSTNESS_KEYS = ("network", "optimizer", "loss_scale", "seed", "condition", "layers")

#: settings of the loss on every hidden layer; an empty dict is cross-entropy alone
CONDITIONS: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "paper preset": {"preset": "paper"},
    "paper temperature": {"weight": -10.0, "temperature": "paper"},
    "safe preset": {"preset": "safe"},
    "weight -0.1": {"weight": -0.1, "temperature": "median"},
    "positive weight": {"weight": 0.1, "temperature": "median"},
}
WITHOUT_LIMIT = "safe preset without its limit"

#: what a training that is fragile by itself, or has a loss of another scale, is tried with
TRIED: dict[str, dict[str, Any]] = {
    "none": {},
    "rounding": {"weight": -1e-6},
    "safe preset": {"preset": "safe"},
    WITHOUT_LIMIT: {"max_share": float("inf")},
}
OPTIMIZERS: dict[str, Callable] = {
    "Adam 1e-3": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SGD 0.1": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@dataclass(frozen=True)
class Claims:
    """What the claims are measured on."""

    data: Callable[[int], pl.LightningDataModule]
    net: Callable[[], nn.Module]
    outliers: Callable[[Any, int], dict[str, Tensor]]
    epochs: int
    seeds: int
    held_out: int  # test images for entanglement and outliers
    held_out_batch: int
    k: int
    max_per_class: int
    layers: str = "net.layer?"


@dataclass(frozen=True)
class Cell:
    """A network on some data, for the table of safe settings."""

    data: Callable[[int], pl.LightningDataModule]
    net: Callable[[], nn.Module]
    taps: dict[str, list[str]]
    last: str
    epochs: int
    test_batches: int


def claims_of(name: str, options: argparse.Namespace) -> Claims:
    if name == "digits":
        return Claims(
            data=lambda seed: DigitsDataModule(batch_size=64, seed=seed),
            net=lambda: SmallConvNet(width=options.width),
            outliers=digit_outliers,
            epochs=options.epochs or 10,
            seeds=options.seeds or 10,
            held_out=359,
            held_out_batch=359,
            k=25,
            max_per_class=1000,
        )
    return Claims(
        data=lambda seed: mnist(options.train_size, 128, seed, options.device, unit=name == "mnist-unit"),
        net=lambda: ConvNet(width=options.width),
        outliers=mnist_outliers,
        epochs=options.epochs or 6,
        seeds=options.seeds or 5,
        held_out=1000,
        held_out_batch=250,
        k=75,
        max_per_class=300,
    )


def mnist(train_size: int, batch_size: int, seed: int, device: str, *, unit: bool = False) -> MNISTDataModule:
    # 1,000 validation images, which calibrate DeepKNN
    data = MNISTDataModule(
        train_size=train_size,
        val_fraction=1 / 60,
        batch_size=batch_size,
        seed=seed,
        device="cuda" if device == "cuda" else None,
    )
    if unit:  # pixels from 0 to 1, as in the released example, whose temperature of 100 belongs to that scale
        data.setup()
        for part in (data.train_dataset, data.val_dataset, data.test_dataset):
            part.preprocess = Preprocess([0.0], [1.0]).to(part.pixels([0]).device)
    return data


def safety_cells(options: argparse.Namespace) -> dict[str, Cell]:
    def digits(seed: int) -> DigitsDataModule:
        return DigitsDataModule(batch_size=64, seed=seed)

    def few_mnist(seed: int) -> MNISTDataModule:
        return mnist(2000, 64, seed, options.device)

    conv = {"last": ["net.layer3"], "all": ["net.layer?"], "pre-activation": ["net.layer?.conv"]}
    linear = {"last": ["net.layer2"], "all": ["net.layer?"], "pre-activation": ["net.layer?.linear"]}
    residual = {
        "last": ["net.flatten"],
        "all": ["net.stem", "net.layer?"],
        "pre-activation": ["net.stem.conv", "net.layer?.block1.conv2"],
    }
    epochs = options.epochs or 5
    return {
        "digits MLP": Cell(digits, lambda: MLP(64, (128, 64)), linear, "net.layer2", epochs, 6),
        "digits SmallConvNet": Cell(digits, lambda: SmallConvNet(width=0.25), conv, "net.layer3", epochs, 6),
        "digits ResNet-8": Cell(
            digits, lambda: CIFARResNet(8, width=4, in_channels=1), residual, "net.flatten", epochs, 6
        ),
        "MNIST ConvNet": Cell(few_mnist, lambda: ConvNet(width=0.25), conv, "net.layer3", max(1, epochs * 3 // 5), 16),
    }


class ScaledClassifier(Classifier):
    """A classifier whose loss is counted in other units, as many hand-written ones are."""

    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss in these units."""
        return self.scale * super().training_step(batch, batch_idx)


class HeldOutEntanglement(pl.Callback):
    """Measure layers on held-out images before the training and after every epoch, or at its end only.

    The same measure for all conditions: the minimum over temperatures, and the paper's fixed 100, both over chance.
    """

    temperatures = ("optimal", 100.0)

    def __init__(self, layers: str, loader: DataLoader, *, only_end: bool = False) -> None:
        self.taps = FeatureTaps(layers, detach=True)
        self.loader = loader
        self.only_end = only_end
        self.values: dict[str, dict[str, list[float]]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the untrained network."""
        if not self.only_end:
            self.measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure after an epoch."""
        if not self.only_end or trainer.current_epoch + 1 == trainer.max_epochs:
            self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Append the value of every layer at every temperature."""
        names = self.taps.attach(module)
        metrics = {(t, name): Entanglement(temperature=t) for t in self.temperatures for name in names}
        try:
            for x, y in batches(trainer, module, self.loader, description="entanglement of held-out images"):
                with self.taps.recording():
                    module(x)
                    for (_, name), metric in metrics.items():
                        metric.to(x.device).update(self.taps.read()[name], y)
        finally:
            self.taps.detach()
        for (t, name), metric in metrics.items():
            self.values.setdefault(str(t), {}).setdefault(name, []).append(float(metric.compute()))


class OutlierScores(pl.Callback):
    """Tell sets of outliers from test images by `DeepKNN`, at the end of the test."""

    def __init__(self, knn: DeepKNN, test: Tensor, outliers: dict[str, Tensor]) -> None:
        self.knn = knn
        self.test = test
        self.outliers = outliers
        self.auroc: dict[str, dict[str, float]] = {}
        self.shares: dict[str, float] = {}

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score test images and outliers."""
        self.knn.fit(trainer, pl_module)
        inside = self.scores(pl_module, self.test)
        self.shares["test"] = float(inside["same_class_neighbors"].mean())
        for kind, images in self.outliers.items():
            outside = self.scores(pl_module, images)
            self.shares[kind] = float(outside["same_class_neighbors"].mean())
            self.auroc[kind] = {name: auroc(inside[name], outside[name]) for name in inside}

    def scores(self, module: pl.LightningModule, images: Tensor) -> dict[str, Tensor]:
        """Return what tells inliers, one number per image and kind."""
        parts = [self.knn.score(module, x.to(module.device)) for x in images.split(500)]
        names = ("same_class_neighbors", "credibility", "softmax")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how often a test image scores higher than an outlier, ties counted half."""
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).long()
    return float(binary_auroc(torch.cat([inside, outside]).double(), labels))


def loss_callback(layers: str | list[str], settings: dict[str, Any]) -> SoftNearestNeighborLoss:
    callback = SoftNearestNeighborLoss(layers, **settings)
    callback.show = lambda trainer: None  # hundreds of runs: no pictures
    return callback


def train(
    data: pl.LightningDataModule,
    net: Callable[[], nn.Module],
    optimizer: Callable,
    callbacks: list[pl.Callback],
    *,
    epochs: int,
    seed: int,
    device: str,
    test_batches: int | None = None,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Train from one seed and return what the test measured."""
    torch.manual_seed(seed)
    module = ScaledClassifier(net(), optimizer)
    module.scale = loss_scale
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            callbacks=callbacks,
            limit_val_batches=0,
            limit_test_batches=test_batches,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, datamodule=data)
        return trainer.test(module, datamodule=data, verbose=False)[0]


# -- the claims --------------------------------------------------------------------------------------------------------


def run_claims(name: str, options: argparse.Namespace) -> None:
    setup = claims_of(name, options)
    path = RESULTS / f"claims_{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else {"about": {"minutes": 0.0}, "runs": []}
    runs = [run for run in before["runs"] if run["condition"] not in options.conditions]
    minutes = before["about"]["minutes"] if runs else 0.0
    started = time.perf_counter()
    for seed in range(setup.seeds):
        data = setup.data(seed)
        data.setup()
        for condition in options.conditions:
            settings = CONDITIONS[condition]
            runs.append({"seed": seed, "condition": condition, **claims_run(setup, data, settings, seed, options)})
            print(
                name,
                seed,
                condition,
                f"{runs[-1]['accuracy']:.4f}",
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    about = {
        "data": name,
        "network": f"{type(setup.net()).__name__}(width={options.width:g})",
        "train_size": len(data.train_dataset),
        "batch_size": data.batch_size,
        "epochs": setup.epochs,
        "seeds": setup.seeds,
        "optimizer": "Adam 1e-3",
        "k": setup.k,
        "max_per_class": setup.max_per_class,
        "held_out": setup.held_out,
        "held_out_batch": setup.held_out_batch,
        "conditions": CONDITIONS,
        "minutes": minutes + (time.perf_counter() - started) / 60,
        **versions(options.device),
    }
    RESULTS.mkdir(exist_ok=True)
    runs.sort(key=lambda run: (run["seed"], list(CONDITIONS).index(run["condition"])))
    path.write_text(json.dumps(rounded({"about": about, "runs": runs}), indent=1) + "\n")


def claims_run(
    setup: Claims, data: Any, settings: dict[str, Any], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    held_out = Subset(data.test_dataset, range(setup.held_out))
    measured = HeldOutEntanglement(setup.layers, DataLoader(held_out, setup.held_out_batch, collate_fn=collate))
    knn = DeepKNN(
        setup.layers,
        k=setup.k,
        max_per_class=setup.max_per_class,
        train=data.train_dataloader(),
        calibration=data.val_dataloader(),
    )
    test = data.test_dataset.__getitems__(range(setup.held_out)).inputs
    outliers = OutlierScores(knn, test, setup.outliers(data.test_dataset, setup.held_out))
    callbacks = [measured, outliers, *([loss_callback(setup.layers, settings)] if settings else [])]
    tested = train(data, setup.net, torch.optim.Adam, callbacks, epochs=setup.epochs, seed=seed, device=options.device)
    return {
        "accuracy": tested["test/accuracy"],
        "ece": tested["test/ece"],
        "entanglement": measured.values,
        "auroc": outliers.auroc,
        "same_class_neighbors": outliers.shares,
    }


# -- which settings are safe -------------------------------------------------------------------------------------------


def run_safety(options: argparse.Namespace) -> None:
    """Train every network with every planned setting; rows that the table already has are kept."""
    path = RESULTS / f"{options.name}.csv"
    rows = read_csv(path)
    done = {tuple(str(row[key]) for key in KEYS) for row in rows}
    started = time.perf_counter()
    for (name, cell), optimizer, seed in itertools.product(
        safety_cells(options).items(), OPTIMIZERS, range(options.seeds or 3)
    ):
        if name.split()[0].lower() not in options.data or name.split()[1] not in options.networks:
            continue
        data = cell.data(seed)
        data.setup()
        for layers, temperature, weight in planned(seed, options):
            row = {"network": name, "optimizer": optimizer, "seed": seed, "epochs": cell.epochs}
            row |= {"layers": layers, "temperature": temperature, "weight": weight}
            if tuple(str(row[key]) for key in KEYS) not in done:
                rows.append(row | safety_run(cell, data, row, options))
        print(name, optimizer, seed, f"{time.perf_counter() - started:.0f} s", flush=True)
        write_csv(path, rows)


def planned(seed: int, options: argparse.Namespace) -> list[tuple[str, Any, float]]:
    """Return the settings to train with one seed: the first has the whole grid, others what might become a default."""
    plan: list[tuple[str, Any, float]] = [("", "", 0.0)]  # cross-entropy alone, which all others are paired with
    for layers, temperature, weight in itertools.product(options.layers, options.temperatures, options.weights):
        likely = weight in options.repeated
        scale_free = temperature in ("median", SAFE)
        if (likely and (scale_free or seed == 0)) or (seed == 0 and temperature in ("median", SAFE, 100.0)):
            plan.append((layers, temperature, weight))
    return plan


def safety_run(cell: Cell, data: Any, row: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    held_out = DataLoader(Subset(data.test_dataset, range(256)), 256, collate_fn=collate)
    callbacks: list[pl.Callback] = [HeldOutEntanglement(cell.last, held_out, only_end=True)]
    if row["layers"]:
        preset = row["temperature"] == SAFE
        settings = {"preset": "safe"} if preset else {k: row[k] for k in ("weight", "temperature")}
        callbacks.append(loss_callback(cell.taps[row["layers"]], settings))
    tested = train(
        data,
        cell.net,
        OPTIMIZERS[row["optimizer"]],
        callbacks,
        epochs=cell.epochs,
        seed=row["seed"],
        device=options.device,
        test_batches=cell.test_batches,
    )
    return {"accuracy": tested["test/accuracy"], "last_layer": callbacks[0].values["optimal"][cell.last][-1]}


# -- trainings that are fragile, and losses of other scales ------------------------------------------------------------


def run_robustness(options: argparse.Namespace) -> None:
    """Train with seeds that no setting was chosen on; rows that the table already has are kept."""
    path = RESULTS / "robustness.csv"
    rows = read_csv(path)
    done = {tuple(str(row[key]) for key in ROBUSTNESS_KEYS) for row in rows}
    cells = safety_cells(options)
    # one training diverges now and then by itself, others have their loss in other units
    fragile = itertools.product(["MNIST ConvNet"], ["SGD 0.1"], [1.0], range(100, 100 + (options.seeds or 60)))
    networks = ["digits MLP", "digits SmallConvNet", "MNIST ConvNet"]
    scaled = itertools.product(networks, ["Adam 1e-3"], [1.0, 1e-2, 1e-4], range(100, 105))
    for name, optimizer, scale, seed in itertools.chain(fragile, scaled):
        cell = cells[name]
        data = cell.data(seed)
        data.setup()
        left_out = WITHOUT_LIMIT if optimizer == "SGD 0.1" else "rounding"
        for condition, settings in TRIED.items():
            for layers in cell.taps if settings else ("",):
                if condition == left_out:
                    continue
                row: dict[str, Any] = dict(
                    zip(ROBUSTNESS_KEYS, (name, optimizer, scale, seed, condition, layers), strict=True)
                )
                if tuple(str(row[key]) for key in ROBUSTNESS_KEYS) in done:
                    continue
                tested = train(
                    data,
                    cell.net,
                    OPTIMIZERS[optimizer],
                    [loss_callback(cell.taps[layers], settings)] if settings else [],
                    epochs=cell.epochs,
                    seed=seed,
                    device=options.device,
                    test_batches=cell.test_batches,
                    loss_scale=scale,
                )
                rows.append(row | {"accuracy": tested["test/accuracy"], "loss": tested["test/loss"]})
        write_csv(path, rows)
    print("robustness", len(rows), "rows", flush=True)


def read_csv(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))


# -- around ------------------------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def versions(device: str) -> dict[str, str]:
    import lightning

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": where,
    }


def temperature_of(text: str) -> float | str:
    return float(text) if text.replace(".", "").isdigit() else text


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("claims", "safety", "robustness", "report")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, default=tuple(CONDITIONS), help="claims: run again, others stay"
    )
    parser.add_argument("--seeds", type=int, help="default: claims 10 on digits and 5 on MNIST, safety 3")
    parser.add_argument("--epochs", type=int, help="default: claims 10 and 6, safety 5")
    parser.add_argument("--width", type=float, default=0.25, help="claims: factor on the channels")
    parser.add_argument("--train-size", type=int, default=10_000, help="claims: images of MNIST, stratified")
    parser.add_argument("--name", default="safety", help="safety: name of the table")
    parser.add_argument("--layers", nargs="+", default=("last", "all", "pre-activation"))
    parser.add_argument("--weights", nargs="+", type=float, default=(-1.0, -0.1, -0.03, -0.01))
    parser.add_argument("--temperatures", nargs="+", type=temperature_of, default=("median", "optimal", "paper", 100.0))
    networks = ("MLP", "SmallConvNet", "ResNet-8", "ConvNet")
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks, help="safety")
    parser.add_argument("--repeated", nargs="+", type=float, default=(-0.1, -0.03), help="weights that get all seeds")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    os.chdir(HERE.parents[1])  # the data lie under the project's root
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "claims" in options.part:
        for name in options.data:
            run_claims(name, options)
    if "safety" in options.part:
        run_safety(options)
    if "robustness" in options.part:
        run_robustness(options)
    if "report" in options.part:
        write_report(RESULTS, HERE / "README.md")


if __name__ == "__main__":
    main()
