"""Measure RoG on networks that memorised noisy labels, beside the softmax, LDA and the released code's estimator.

python evidence/rog/run.py --data digits --seeds 10 11 12 13 14       some ten minutes of CPU time
python evidence/rog/run.py --data mnist                               some twenty; MNIST under ./data
python evidence/rog/run.py --data cifar10 --device gpu                the paper's data, a residual network

Writes `results/<data>.json` after every training and prints tables; with `--show` only the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scipy.stats import t as student
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import CIFAR10DataModule, Classifier, MNISTDataModule, NoisyLabels, RobustGenerativeClassifier
from lightning_methods.models import MLP, CIFARResNet
from lightning_methods.report import curves

HERE = Path(__file__).parent
CONDITIONS = [
    ("uniform", 0.6),
    ("uniform", 0.4),
    ("uniform", 0.2),
    ("pair_flip", 0.4),
    ("pair_flip", 0.2),
    ("uniform", 0.0),
]
# arm -> arguments of the callback; the first five are read from all blocks, the others from the last two
ARMS: dict[str, dict[str, Any]] = {
    "sample": {"estimator": "sample"},
    "official": {"estimator": "official"},
    "robust": {"support_fraction": None},
    "ours": {},
}
CHOSEN = {
    "digits": {"epochs": 250, "batch": 256, "lr": 2e-3},
    "mnist": {"epochs": 100, "batch": 256, "lr": 1e-3},
    "cifar10": {"epochs": 120, "batch": 128, "lr": 0.1},
}


class BestEpoch(Callback):
    """The test accuracy after every epoch, which nobody could choose by: an oracle."""

    def __init__(self, test: TensorDataset) -> None:
        self.x, self.y = test.tensors
        self.seen: list[float] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        pl_module.eval()
        parts = [pl_module(x.to(pl_module.device)).argmax(1).cpu() for x in self.x.split(2000)]
        pl_module.train()
        self.seen.append(float((torch.cat(parts) == self.y).double().mean()))


def digits(seed: int) -> list[TensorDataset]:
    """Return train, validation and test: images are split before each is also shifted down and right by a pixel."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = []
    for own, copies in ((order[630:], 3), (order[500:630], 3), (order[:500], 1)):
        right, down = torch.zeros(2, len(own), 8, 8)
        right[:, :, 1:], down[:, 1:] = x[own, :, :-1], x[own, :-1]
        images = torch.cat([x[own], right, down][:copies]).flatten(1)
        parts.append(TensorDataset(images, y[own].repeat(copies)))
    return parts


def from_module(data: Any, validation: int) -> list[TensorDataset]:
    """Return train, validation (the first so many) and test of a data module, standardised."""
    data.prepare_data()
    data.setup()
    found = []
    for dataset in (data.train_dataset, data.val_dataset, data.test_dataset):
        batches = list(DataLoader(dataset, 1000, collate_fn=data.train_dataloader().collate_fn))
        batches = [data.on_after_batch_transfer(batch, 0) for batch in batches]
        found.append(TensorDataset(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
    found[1] = TensorDataset(*(t[:validation] for t in found[1].tensors))
    return found


def parts_of(args: argparse.Namespace, seed: int) -> list[TensorDataset]:
    if args.data == "digits":
        return digits(seed)
    if args.data == "mnist":
        return from_module(MNISTDataModule(args.root, flat=True, train_size=5000, seed=seed), 1000)
    return from_module(CIFAR10DataModule(args.root, seed=seed), 1000)


def module_of(args: argparse.Namespace) -> Classifier:
    if args.data == "cifar10":
        sgd = partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=5e-4)
        steps = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[args.epochs // 3, 2 * args.epochs // 3])
        return Classifier(CIFARResNet(depth=32), sgd, steps)
    widths = (256, 64, 64) if args.data == "digits" else (512, 128, 64)
    return Classifier(MLP(64 if args.data == "digits" else 784, widths), partial(torch.optim.Adam, lr=args.lr))


def measure(args: argparse.Namespace, seed: int, kind: str, rate: float) -> dict[str, Any]:
    """Train once, then test with every arm on the same network."""
    seed_everything(seed, verbose=False)
    start = time.monotonic()
    train, validation, test = parts_of(args, seed)
    noise: dict[str, Any] = {"rate": rate, "kind": kind, "num_classes": 10}
    noisy, held_out = NoisyLabels(train, seed=seed, **noise), NoisyLabels(validation, seed=seed + 1, **noise)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": args.device, "devices": 1, "default_root_dir": "runs"}
    oracle, model = BestEpoch(test), module_of(args)
    trainer = Trainer(max_epochs=args.epochs, callbacks=oracle, precision=args.precision, **quiet)
    trainer.fit(model, DataLoader(noisy, args.batch, shuffle=True))
    trained = time.monotonic() - start
    blocks = [name for name, _ in model.net.named_children() if name.startswith("layer")]
    sets = {"": [f"net.{b}" for b in blocks], "last two, ": [f"net.{b}" for b in blocks[-2:]]}
    loaders = {"train": DataLoader(noisy, 512), "validation": DataLoader(held_out, 512)}
    arms = {
        prefix + arm: RobustGenerativeClassifier(layers, log_prefix=prefix + arm, **loaders, **settings)
        for prefix, layers in sets.items()
        for arm, settings in ARMS.items()
    }
    tester = Trainer(callbacks=list(arms.values()), **quiet)
    (result,) = tester.test(model, DataLoader(test, 512), verbose=False)
    fit = Trainer(**quiet).test(model, DataLoader(noisy, 512), verbose=False)[0]["test/accuracy"]
    ours = arms["ours"]
    found = {"softmax": result["ours/test/softmax"], "best epoch": max(oracle.seen)}
    found |= {arm: result[f"{arm}/test/accuracy"] for arm in arms}
    found["ours or softmax"] = found["softmax" if ours.prefers_softmax else "ours"]
    layers = {name: result[f"ours/test/layer/{name}"] for name in sets[""]}
    return {
        "kind": kind, "rate": rate, "seed": seed, "fit": fit, "accuracy": found, "layers": layers,
        "weights": dict(zip(ours.ensemble.names, ours.ensemble.weights.tolist(), strict=True)),
        "support_fraction": ours.chosen_fraction, "prefers_softmax": ours.prefers_softmax,
        "noise_rate": ours.audit.noise_rate, **ours.audit.quality(),
        "seconds_training": trained, "seconds_in_all": time.monotonic() - start,
    }  # fmt: skip


def interval(values: list[float]) -> str:
    """Return mean and 95% interval (Student's t) in points."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def show(runs: list[dict[str, Any]]) -> None:
    columns = ["softmax", "best epoch", "sample", "official", "robust", "ours", "ours or softmax"]
    rest = ["last two, sample", "last two, official", "last two, robust", "last two, ours"]
    groups = {c: [r for r in runs if (r["kind"], r["rate"]) == c] for c in CONDITIONS}
    groups = {f"{kind.replace('_', ' ')} {rate:.0%}": g for (kind, rate), g in groups.items() if g}
    for names in (columns, rest):
        print("\n| noise | fit of noisy labels | " + " | ".join(names) + " |\n|---|---:|" + "---:|" * len(names))
        for title, group in groups.items():
            cells = [f"{100 * statistics.fmean(r['fit'] for r in group):.1f}"]
            for name in names:
                values = [100 * r["accuracy"][name] for r in group]
                cells.append(
                    f"{statistics.fmean(values):.1f}" + (f"±{statistics.stdev(values):.1f}" if len(values) > 1 else "")
                )
            print(f"| {title} | " + " | ".join(cells) + " |")
    pairs = [("ours", "softmax"), ("ours", "sample"), ("ours", "official"), ("ours or softmax", "softmax")]
    print("\n| noise | " + " | ".join(f"{a} - {b}" for a, b in pairs) + " |\n|---|" + "---:|" * len(pairs))
    for title, group in groups.items():
        cells = [interval([r["accuracy"][a] - r["accuracy"][b] for r in group]) for a, b in pairs]
        print(f"| {title} | " + " | ".join(cells) + " |")
    names = ["noise_rate", "suspects_precision", "suspects_recall", "precision_at_wrong"]
    print(
        "\n| noise | true rate | estimated | precision | recall | precision of as many as are wrong | support chosen |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for title, group in groups.items():
        cells = [f"{100 * statistics.fmean(r['true_noise_rate'] for r in group):.1f}"]
        for name in names:
            values = [100 * r[name] for r in group if name in r]
            cells.append(f"{statistics.fmean(values):.1f}" if values else "")
        chosen = [f"{r['support_fraction'] or 'half'}{', softmax' * r['prefers_softmax']}" for r in group]
        print(f"| {title} | " + " | ".join(cells) + f" | {'; '.join(chosen)} |")


def picture(data: str, runs: list[dict[str, Any]]) -> None:
    rates = sorted({r["rate"] for r in runs if r["kind"] == "uniform"})
    if len(rates) < 2:
        return
    lines = {}
    for name, label in (
        ("softmax", "softmax"),
        ("sample", "LDA"),
        ("official", "released estimator"),
        ("ours", "ours"),
    ):
        means = [
            100 * statistics.fmean(r["accuracy"][name] for r in runs if (r["kind"], r["rate"]) == ("uniform", rate))
            for rate in rates
        ]
        lines[label] = ([100 * rate for rate in rates], means)
    figure = curves(lines, title=f"{data}: one network, four classifiers on it", x_label="wrong labels, % (uniform)",
                    y_label="test accuracy, %")  # fmt: skip
    figure.savefig(HERE / f"{data}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(CHOSEN), default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer, cpu or gpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--show", action="store_true", help="print what was measured before")
    args = parser.parse_args()
    chosen = CHOSEN[args.data]
    args.epochs, args.batch, args.lr = args.epochs or chosen["epochs"], chosen["batch"], chosen["lr"]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    path = HERE / "results" / f"{args.data}.json"
    runs: list[dict[str, Any]] = []
    if args.show:
        runs = json.loads(path.read_text())["runs"]
    for seed in [] if args.show else args.seeds:
        for kind, rate in CONDITIONS:
            runs.append(measure(args, seed, kind, rate))
            print(seed, kind, rate, {k: round(100 * v, 1) for k, v in runs[-1]["accuracy"].items()}, flush=True)
            settings = {k: v for k, v in vars(args).items() if k != "show"}
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                json.dumps({"settings": settings, "torch": torch.__version__, "runs": runs}, indent=1) + "\n"
            )
    show(runs)
    picture(args.data, runs)


if __name__ == "__main__":
    main()
