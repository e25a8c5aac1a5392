"""Measure again what the paper claims of CKA, on networks of several seeds.

python evidence/cka/run.py --data digits                     some three minutes of CPU time
python evidence/cka/run.py --data cifar10 --device gpu       the paper's data; downloads it to ./data
python evidence/cka/run.py --data cifar10 --folder data/cifar10 --networks 8 --train-size 10000 --epochs 6 \\
    --samples 400 --seeds 1 --parts identification to_initialisation       at a size for a CPU, on its JPEG copy

Writes `results/<data>.json` and the figures beside this file, and prints the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Subset

from lightning_methods import (
    CIFAR10DataModule,
    Classifier,
    DigitsDataModule,
    ImageFolderDataModule,
    RepresentationSimilarity,
)
from lightning_methods.cka import similarity_matrix
from lightning_methods.cka.identification import decisions
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.data.images import collate
from lightning_methods.errors import LightningMethodsWarning
from lightning_methods.report import curves, heatmap

HERE = Path(__file__).parent
HIDDEN = ["net.layer*", "net.pool"]  # the logits are left out, as in the paper
# out channels, stride, kernel and padding of the eight convolutions of Tiny-10
TINY = [(16, 1, 3, 1), (16, 1, 3, 1), (32, 2, 3, 1), (32, 1, 3, 1), (32, 1, 3, 1), (64, 2, 3, 1), (64, 1, 3, 0)]
TINY.append((64, 1, 1, 0))

INDICES: dict[str, dict[str, Any]] = {
    "CCA, mean correlation": {"index": "cca", "statistic": "rho"},
    "CCA, mean squared correlation": {"index": "cca", "statistic": "r2"},
    "SVCCA, mean correlation": {"index": "svcca", "statistic": "rho"},
    "SVCCA, mean squared correlation": {"index": "svcca", "statistic": "r2"},
    "PWCCA": {"index": "pwcca"},
    "linear regression": {"index": "linear_regression"},
    "Procrustes": {"index": "procrustes"},
    "linear HSIC": {"index": "hsic"},
    "linear CKA": {"index": "cka"},
    "linear CKA, debiased": {"index": "cka", "debiased": True},
    "RBF CKA, 0.2": {"index": "cka", "kernel": "rbf", "bandwidth": 0.2},
    "RBF CKA, 0.4": {"index": "cka", "kernel": "rbf", "bandwidth": 0.4},
    "RBF CKA, 0.8": {"index": "cka", "kernel": "rbf", "bandwidth": 0.8},
}


class Plain(nn.Sequential):
    """The Tiny-10 of plain convolutions with batch norm and ReLU, each repeated `depth` times."""

    def __init__(self, channels: int, *, depth: int = 1, small: bool = False) -> None:
        super().__init__()
        number = 0
        for out, stride, kernel, padding in TINY:
            for repeat in range(depth):
                number += 1
                # images of 8x8 are too small for the convolution without padding, as are repetitions of it
                pad = kernel // 2 if small or repeat else padding
                conv = nn.Conv2d(channels, out, kernel, 1 if repeat else stride, pad, bias=False)
                self.add_module(f"layer{number}", nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
                channels = out
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.logits = nn.Linear(channels, 10)


def data_of(args: argparse.Namespace) -> LightningDataModule:
    if args.data == "digits":
        return DigitsDataModule(val_fraction=0.0, test_fraction=0.2)
    given: dict[str, Any] = {"batch_size": 128, "augment": True, "train_size": args.train_size, "val_fraction": 0.0}
    if args.folder:
        return ImageFolderDataModule(args.folder, image_size=32, in_memory=True, **given)
    return CIFAR10DataModule(root="data", download=True, **given)


def train(args: argparse.Namespace, seed: int, *callbacks: Any, depth: int = 1) -> tuple[Classifier, float]:
    """Return a trained network and its test accuracy."""
    seed_everything(seed, verbose=False)
    digits = args.data == "digits"
    module = Classifier(Plain(1 if digits else 3, depth=depth, small=digits), partial(SGD, **args.sgd))
    quiet: dict[str, Any] = {
        "default_root_dir": "runs",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator=args.device,
        devices=1,
        callbacks=list(callbacks),
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module, args.datamodule)
    (result,) = trainer.test(module, args.datamodule, verbose=False)
    return module, float(result["test/accuracy"])


def probe_of(args: argparse.Namespace) -> DataLoader:
    """Return test images, evenly spread: a folder of images lists them class by class."""
    data = args.datamodule.test_dataset
    chosen = range(0, len(data), len(data) // args.samples)[: args.samples]
    return DataLoader(Subset(data, chosen), batch_size=200, collate_fn=collate)


@torch.no_grad()
def features_of(module: Classifier, images: Tensor, device: str, pool: Any = "flatten") -> dict[str, Tensor]:
    module = module.to(device).eval()
    taps = FeatureTaps(HIDDEN, pool=pool, detach=True)
    taps.attach(module)
    collected: dict[str, list[Tensor]] = {}
    for part in images.split(500):
        with taps.recording():
            module(part.to(device))
            for name, x in taps.read().items():
                collected.setdefault(name, []).append(x.clone())
    taps.detach()
    return {name: torch.cat(parts) for name, parts in collected.items()}


def interval(found: Tensor, networks: int) -> tuple[float, float]:
    """Return the 95% interval of the share of right decisions, by drawing networks: their pairs are no samples."""
    rates = torch.zeros(networks, networks, dtype=torch.float64)
    rates[~torch.eye(networks, dtype=torch.bool)] = found.cpu().double().mean(1)
    drawn = torch.randint(networks, (2000, networks), generator=torch.Generator().manual_seed(0))
    counts = nn.functional.one_hot(drawn, networks).sum(1).double()
    pairs = counts[:, :, None] * counts[:, None] * (1 - torch.eye(networks, dtype=torch.float64))
    means = (pairs * rates).sum((1, 2)) / pairs.sum((1, 2))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def identification(args: argparse.Namespace, images: Tensor) -> dict[str, Any]:
    accuracies: list[float] = []
    networks: dict[str, list[dict[str, Tensor]]] = {"flatten": [], "gap": []}
    for seed in range(args.networks):
        module, accuracy = train(args, seed)
        accuracies.append(accuracy)
        for pool, members in networks.items():
            members.append(features_of(module, images, args.torch_device, pool))
    results: dict[str, Any] = {"accuracies": accuracies}
    for pool, members in networks.items():
        widths = {name: x.shape[1] for name, x in members[0].items()}
        results[pool] = {"widths": widths, "indices": {}}
        for name, settings in INDICES.items():
            found = decisions(members, **settings)
            low, high = interval(found, args.networks)
            rate = float(found.double().mean())
            results[pool]["indices"][name] = {"rate": rate, "low": low, "high": high}
            print(f"| {pool} | {name} | {100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}] |", flush=True)
    return results


def to_initialisation(args: argparse.Namespace, _: Tensor) -> dict[str, Any]:
    histories = []
    for seed in range(args.seeds):
        similarity = RepresentationSimilarity(
            [*HIDDEN, "net.logits"], compare="init", data=args.probe, max_samples=args.samples
        )
        train(args, seed, similarity)
        histories.append(similarity.history)
    epochs = [epoch + 1 for epoch, _ in histories[0]["net.pool"]]
    means = {
        layer.removeprefix("net."): torch.tensor([[v for _, v in h[layer]] for h in histories]).mean(0).tolist()
        for layer in histories[0]
    }
    figure = curves(
        {layer: ([0, *epochs], [1.0, *values]) for layer, values in means.items()},
        title=f"Similarity of each layer to its initialisation, {_mean_of(args.seeds)}",
        x_label="epoch",
        y_label="linear CKA, debiased",
    )
    figure.savefig(HERE / f"to_init_{args.data}.png", dpi=150)
    return {"epochs": epochs, "means": means, "seeds": args.seeds}


def _mean_of(seeds: int) -> str:
    return f"mean of {seeds} seeds" if seeds > 1 else "one seed"


def depths(args: argparse.Namespace, images: Tensor) -> dict[str, Any]:
    results = {}
    for depth in (1, 4):
        matrices, accuracies = [], []
        for seed in range(args.seeds):
            module, accuracy = train(args, seed, depth=depth)
            features = features_of(module, images, args.torch_device)
            matrices.append(similarity_matrix(features, debiased=True).cpu())
            accuracies.append(accuracy)
        names = [name.removeprefix("net.") for name in features]
        mean = torch.stack(matrices).mean(0)
        figure = heatmap(
            mean,
            names,
            names,
            title=f"A plain network at {depth}x depth, {_mean_of(args.seeds)}",
            value_label="linear CKA, debiased",
            vmin=0.0,
            vmax=1.0,
        )
        figure.savefig(HERE / f"depth_{depth}x_{args.data}.png", dpi=150)
        neighbours = torch.stack([m.diagonal(1) for m in matrices])
        half = neighbours.shape[1] // 2
        results[f"{depth}x"] = {
            "accuracies": accuracies,
            "neighbours, first half": neighbours[:, :half].mean(1).tolist(),
            "neighbours, second half": neighbours[:, half:].mean(1).tolist(),
            "share of pairs above 0.95": [float((m > 0.95).double().mean()) for m in matrices],
        }
        print(depth, results[f"{depth}x"], flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer: cpu, gpu, ...")
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="of the two other measurements")
    parser.add_argument("--epochs", type=int, help="default 8 on digits, 60 on CIFAR-10")
    parser.add_argument("--samples", type=int, help="default 200 on digits, 2000 on CIFAR-10")
    parser.add_argument("--folder", help="CIFAR-10 as folders of images, <folder>/{train,test}/<class>/*")
    parser.add_argument("--train-size", type=int, help="of CIFAR-10; default all")
    parts = {"identification": identification, "depth": depths, "to_initialisation": to_initialisation}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default all")
    args = parser.parse_args()
    on_digits = args.data == "digits"
    args.epochs = args.epochs or (8 if on_digits else 60)
    args.samples = args.samples or (200 if on_digits else 2000)
    settings = dict(vars(args))
    args.torch_device = "cuda" if args.device in ("gpu", "cuda") else "cpu"
    args.sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    args.datamodule = data_of(args)
    args.datamodule.prepare_data()
    args.datamodule.setup()
    args.probe = probe_of(args)
    images = torch.cat([batch[0] for batch in args.probe])
    warnings.simplefilter("ignore", LightningMethodsWarning)  # that CCA is trivial in wide layers is the point
    path = HERE / "results" / f"{args.data}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for part in args.parts:
        found = parts[part](args, images)
        results[part] = {"settings": {**settings, "sgd": args.sgd}, "torch": torch.__version__, **found}
        path.write_text(json.dumps(results, indent=1) + "\n")
