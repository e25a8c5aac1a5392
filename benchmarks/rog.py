"""The minimum covariance determinant beside scikit-learn's, classes together beside one by one, and the extra pass.

    python benchmarks/rog.py --markdown benchmarks/results/rog_cpu.md
    python benchmarks/rog.py --device cuda --markdown benchmarks/results/rog_cuda.md

Limits are reported as ok or missed; nothing fails. Scikit-learn runs on one thread of the CPU, always.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from timing import (
    MEGABYTE,
    TIMING_COLUMNS,
    Table,
    Timing,
    compare,
    environment,
    extra_memory,
    gate,
    in_fresh_process,
    timing_rows,
    write_markdown,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods import Classifier
from lightning_methods.core.passes import batches
from lightning_methods.core.taps import FeatureTaps
from lightning_methods.models import CIFARResNet
from lightning_methods.rog import fast_mcd
from lightning_methods.rog.ensemble import fit_ensemble
from lightning_methods.rog.features import Collected, Reader, collect, mean_pool

SIZES = ((500, 64), (500, 32), (200, 32), (100, 16))  # samples of each of 100 classes, features
MEMORY = ((100, 500, 256, 512), (100, 500, 256, 8), (1, 5000, 512, 512))  # classes, samples, features, max MB
LAYERS = ["net.layer1", "net.layer2", "net.layer3"]


def contaminated(share: float, d: int, device: str = "cpu", n: int = 5000) -> tuple[Tensor, int]:
    """Return normal points of which a share is shifted by 3 in every feature, and how many."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bad = int(share * n)
    x[:bad] += 3.0
    return x.to(device), bad


def beside_scikit_learn(device: str) -> tuple[Table, float, int]:
    from sklearn.covariance import MinCovDet

    columns = [
        "outliers",
        "MinCovDet ms",
        "fast_mcd ms",
        "times faster",
        "outliers kept",
        "ours",
        "location error",
        "ours",
    ]
    table = Table("1. One class of 5,000 samples and 64 features", columns)
    for share in (0.0, 0.1, 0.3):
        x, bad = contaminated(share, 64, device)
        array, theirs, ours = x.cpu().numpy(), MinCovDet(random_state=0), {}
        timings = compare(
            {"sklearn": lambda: theirs.fit(array), "ours": lambda: ours.update(found=fast_mcd(x))},  # noqa: B023
            device=device,
            rounds=5 if share == 0.3 else 3,
            warmup=1,
        )
        found: Any = ours["found"]
        ratio = timings["sklearn"].median / timings["ours"].median
        kept = int(theirs.raw_support_[:bad].sum()), int(found.support[:bad].sum())
        errors = float(torch.as_tensor(theirs.raw_location_).norm()), float(found.location.norm())
        medians = [f"{timings[name].median:.0f}" for name in ("sklearn", "ours")]
        table.rows.append([f"{share:.0%}", *medians, f"{ratio:.1f}", *kept, *(f"{e:.3f}" for e in errors)])
    table.note = (
        "Outliers are shifted by 3 in every feature. Kept: in the support of the raw estimate, of all outliers."
    )
    return table, ratio, kept[1]


def wide(device: str) -> tuple[Table, Timing]:
    x, bad = contaminated(0.3, 512, device)
    ours: dict[str, Any] = {}
    timings = compare({"fast_mcd": lambda: ours.update(found=fast_mcd(x))}, device=device, rounds=5, warmup=1)
    table = Table(
        "2. One class of 5,000 samples and 512 features, 30% outliers", ["", *TIMING_COLUMNS, "outliers kept"]
    )
    table.rows += [[name, *row, int(ours["found"].support[:bad].sum())] for name, row in timing_rows(timings).items()]
    table.note = "MinCovDet takes minutes here and is not timed; its parts of some 300 samples are singular."
    return table, timings["fast_mcd"]


def together(device: str) -> tuple[Table, dict[tuple[int, int], float]]:
    table = Table("3. 100 classes", ["samples a class, features", "one by one ms", "together ms", "times faster"])
    ratios = {}
    for n, d in SIZES:
        x = torch.randn(100 * n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        y = torch.arange(len(x), device=device) % 100
        settings: dict[str, Any] = {"shrinkage": 0.0}  # else alone and together are not the same
        parts = [x[y == c] for c in range(100)]
        timings = compare(
            {
                "alone": lambda: [fast_mcd(part, **settings) for part in parts],  # noqa: B023
                "together": lambda: fast_mcd(x, y, **settings),  # noqa: B023
            },
            device=device,
            rounds=5,
            warmup=1,
        )
        ratios[n, d] = timings["alone"].median / timings["together"].median
        medians = [f"{timings[name].median:.0f}" for name in ("alone", "together")]
        table.rows.append([f"{n} x {d}", *medians, f"{ratios[n, d]:.1f}"])
    return table, ratios


class Passes(Callback):
    """Time a plain evaluation pass and the pass that collects features, in a Trainer.

    Args:
        loader: what is read.
        device: where.
    """

    def __init__(self, loader: DataLoader, device: str) -> None:
        self.loader, self.device = loader, device
        self.timings: dict[str, Timing] = {}
        self.found: Collected | None = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Do it."""
        taps = FeatureTaps(LAYERS, pool=mean_pool, detach=True)
        taps.attach(pl_module)

        def plain() -> None:
            right = 0
            for x, y in batches(trainer, pl_module, self.loader, description="plain"):
                right += int((pl_module(x).argmax(1) == y).sum())

        def collecting() -> None:
            self.found = collect(trainer, pl_module, [self.loader], Reader(taps), description="", limit=lambda _: None)

        self.timings = compare({"plain": plain, "features": collecting}, device=self.device, rounds=7, warmup=1)
        taps.detach()


def extra_pass(device: str) -> tuple[Table, float]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2000, 3, 32, 32), torch.arange(2000) % 10)
    measure = Passes(DataLoader(data, 100), device)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = Trainer(accelerator=accelerator, devices=1, callbacks=measure, limit_val_batches=1, **off)
    trainer.validate(Classifier(CIFARResNet(depth=8)), DataLoader(data, 100), verbose=False)
    found = measure.found
    assert found is not None
    x = {name: value.to(device) for name, value in found.features.items()}
    y = found.labels.to(device)
    held_out = {name: value[:500] for name, value in x.items()}, y[:500], found.predicted[:500]
    fits = {
        "fit, support_fraction=None": lambda: fit_ensemble(x, y, 10, validation=held_out, support_fraction=None),
        'fit, "auto"': lambda: fit_ensemble(x, y, 10, validation=held_out),
    }
    timings = measure.timings | compare(fits, device=device, rounds=5, warmup=1)
    rows = timing_rows(timings)
    table = Table("4. ResNet-8 on 2,000 images of 3x32x32, three layers read", ["", *TIMING_COLUMNS])
    names = {"plain": "plain evaluation pass", "features": "pass that collects features"}
    table.rows += [[names.get(name, name), *row] for name, row in rows.items()]
    return table, timings["features"].median / timings["plain"].median


def memory(device: str) -> Table:
    table = Table("5. Extra memory of fast_mcd", ["classes x samples x features", "max_bytes", "points MB", "peak MB"])
    for case in MEMORY:
        classes, n, d, limit = case
        used = in_fresh_process(__file__, "--device", device, "--memory", *case) / MEGABYTE
        points = classes * n * d * 8 / MEGABYTE
        table.rows.append([f"{classes} x {n} x {d}", f"{limit} MB", f"{points:.0f}", f"{used:.0f}"])
    table.note = "Each in a fresh process, the points made before. Points and results are float64."
    return table


def one_memory(device: str, case: list[int]) -> float:
    classes, n, d, limit = case
    x = torch.randn(classes * n, d, dtype=torch.float64).to(device)
    y = torch.arange(len(x), device=device) % classes
    fast_mcd(x[:: max(n // 20, 1), :4], None)  # loads what is loaded at first use
    return extra_memory(lambda: fast_mcd(x, y, max_bytes=limit * MEGABYTE), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--markdown", help="file to write the tables to")
    parser.add_argument("--memory", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.memory:
        print(json.dumps(one_memory(args.device, args.memory)))
        return
    first, ratio, kept = beside_scikit_learn(args.device)
    second, seconds = wide(args.device)
    third, ratios = together(args.device)
    fourth, share = extra_pass(args.device)
    fifth = memory(args.device)
    limits = Table("Limits", ["", "measured", "limit", ""])
    limits.rows.append(
        ["fast_mcd / MinCovDet, 64 features, 30% outliers", f"{1 / ratio:.4f}", "0.0250", gate(1 / ratio, 1 / 40)]
    )
    limits.rows.append(["outliers kept, of 1,500", kept, "0", gate(kept, 0)])
    limits.rows.append(["512 features, seconds", f"{seconds.median / 1e3:.2f}", "3", gate(seconds.median, 3e3)])
    for (n, d), faster in ratios.items():
        name = f"100 classes of {n} x {d}, together / one by one"
        limits.rows.append([name, f"{1 / faster:.3f}", "0.333", gate(1 / faster, 1 / 3)])
    limits.rows.append(["collecting pass / plain pass", f"{share:.2f}", "1.20", gate(share, 1.2)])
    tables = (first, second, third, fourth, fifth, limits)
    for table in tables:
        table.show()
    if args.markdown:
        command = f"- `python benchmarks/rog.py --device {args.device} --markdown {args.markdown}`"
        about = [*environment(args.device, ("torch", "lightning", "scikit-learn")), command]
        write_markdown(args.markdown, "Robust generative classifier: speed and memory", about, tables)


if __name__ == "__main__":
    main()
