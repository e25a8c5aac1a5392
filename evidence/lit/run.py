"""Measure LIT beside distillation, with and without copied ends, FitNets and training from scratch.

    python evidence/lit/run.py --data digits                    # 10 seeds, a quarter of an hour of one core
    python evidence/lit/run.py --data cifar16                   # CIFAR-10 at 16x16, 5 seeds; hours of one core
    python evidence/lit/run.py --data cifar10 --device cuda     # ResNet-110 to ResNet-32 and ResNet-20; meant for a GPU
    python evidence/lit/run.py --data digits --show             # tables of what is there

The runs of one seed share the teacher, the student's first weights, the batches and their augmentation, hence their
differences are paired. What `results/<data>.json` already has is kept, so that an interrupted run goes on. CIFAR-10 is
read from folders of pictures, `<root>/cifar10/{train,test}/<class>/*`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.lit import LITDistiller
from lightning_methods.models import CIFARResNet

HERE = Path(__file__).parent
MODES = ["scratch", "kd", "kd_copied_ends", "fitnets", "lit"]
NAMES = {"kd": "KD", "kd_copied_ends": "KD, copied ends", "fitnets": "FitNets", "lit": "LIT", "scratch": "scratch"}


@dataclass(frozen=True)
class Setup:
    """What is trained on what, and for how long."""

    seeds: int
    train: int
    batch: int
    epochs: tuple[int, int]
    lr: float
    finetune_lr: float
    teacher: int
    students: tuple[int, ...]
    width: int
    channels: int
    shift: int
    mirror: bool


SETUPS = {
    "digits": Setup(10, 500, 64, (20, 10), 0.1, 0.01, 20, (8,), 8, 1, 1, False),
    "cifar16": Setup(5, 5000, 64, (20, 10), 0.1, 0.01, 20, (8,), 8, 3, 2, True),
    "cifar10": Setup(3, 50000, 128, (70, 50), 0.1, 0.01, 110, (32, 20), 16, 3, 4, True),
}


class Augmented(LITDistiller):
    """Shifts and mirrors every batch by random numbers of its own, the same ones in every mode."""

    def __init__(self, *args: Any, shift: int, mirror: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.shift, self.mirror = shift, mirror

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches."""
        x, y = batch
        if not self.trainer.training:
            return x, y
        generator = torch.Generator().manual_seed(1_000_003 * self.current_epoch + self.global_step)
        height, width = x.shape[-2:]
        padded = F.pad(x, [self.shift] * 4)
        down, right = torch.randint(0, 2 * self.shift + 1, (2, len(x)), generator=generator).to(x.device)
        rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
        x = padded[
            torch.arange(len(x), device=x.device)[:, None, None, None],
            torch.arange(x.shape[1], device=x.device)[None, :, None, None],
            rows,
            columns,
        ]
        flipped = (torch.rand(len(x), generator=generator) < 0.5).to(x.device) & self.mirror
        return torch.where(flipped[:, None, None, None], x.flip(-1), x), y


def images(data: str, root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images, standardised, with their labels; of digits all, to be split by seed."""
    if data == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        pictures = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        return (pictures - 0.3) / 0.38, torch.tensor(y), torch.empty(0), torch.empty(0)
    parts: list[Tensor] = []
    for split in ("train", "test"):
        x, y = _pictures(root / "cifar10" / split, halve=data == "cifar16")
        mean, std = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.2435, 0.2616])
        parts += [(x - mean[:, None, None]) / std[:, None, None], y]
    return parts[0], parts[1], parts[2], parts[3]


def _pictures(folder: Path, *, halve: bool) -> tuple[Tensor, Tensor]:
    """Return the pictures of one folder a class; decoded once, then kept in a file beside the folder."""
    import numpy as np
    from PIL import Image

    kept = folder.with_name(f"{folder.name}.pt")
    if not kept.exists():
        pixels, labels = [], []
        for label, name in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
            for file in sorted(name.iterdir()):
                pixels.append(np.asarray(Image.open(file).convert("RGB")))
                labels.append(label)
        torch.save((torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)), kept)
    x, y = torch.load(kept, weights_only=True)
    x = x.float() / 255
    return (F.avg_pool2d(x, 2) if halve else x), y


def split(setup: Setup, parts: tuple[Tensor, ...], seed: int, data: str) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test set of a seed, both with every class alike."""
    x, y, x_test, y_test = parts
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen, rest = [], []
    for label in y.unique():
        of_class = order[y[order] == label]
        count = round(setup.train * float((y == label).float().mean()))
        chosen.append(of_class[:count])
        rest.append(of_class[count:])
    train, left = torch.cat(chosen), torch.cat(rest)
    test = TensorDataset(x[left], y[left]) if data == "digits" else TensorDataset(x_test, y_test)
    return TensorDataset(x[train], y[train]), test


def network(setup: Setup, depth: int) -> CIFARResNet:
    return CIFARResNet(depth, width=setup.width, in_channels=setup.channels)


def train(
    setup: Setup,
    mode: str,
    teacher: nn.Module | None,
    student: nn.Module,
    sets: Any,
    seed: int,
    device: str,
    root: Path,
) -> tuple[Augmented, float]:
    """Train one student and return its module and the seconds it took."""

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=setup.lr, momentum=0.9, weight_decay=1e-4)

    module = Augmented(
        teacher,
        student,
        ["layer1", "layer2", "layer3"],
        mode=mode,  # type: ignore[arg-type]
        lit_epochs=setup.epochs[0],
        finetune_epochs=setup.epochs[1],
        optimizer=sgd,
        finetune_lr=setup.finetune_lr,
        loss_scale=0.5,  # the paper's code halves the loss
        shift=setup.shift,
        mirror=setup.mirror,
    )
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(sets[0], batch_size=setup.batch, shuffle=True, generator=order)
    trainer = pl.Trainer(
        max_epochs=sum(setup.epochs),
        accelerator="gpu" if device == "cuda" else "cpu",
        precision="bf16-mixed" if device == "cuda" else "32-true",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=root / "runs",
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    (measured,) = trainer.test(module, DataLoader(sets[1], batch_size=512), verbose=False)
    module.measured = measured
    module.phase_one = {k: v for k, v in module.history.state_dict().items() if k.startswith("lit/ir_rel/")}
    return module, seconds


def cells(data: str, device: str, root: Path, seeds: list[int]) -> None:
    """Train what is missing, and write every run down as it ends."""
    setup = SETUPS[data]
    file = HERE / "results" / f"{data}.json"
    held = json.loads(file.read_text()) if file.exists() else {"setup": asdict(setup), "runs": []}
    parts = images(data, root)
    for seed in seeds:
        sets = split(setup, parts, seed, data)
        torch.manual_seed(seed)
        teacher = network(setup, setup.teacher)
        kept = root / "lit_teachers" / f"{data}_{seed}.pt"
        if not kept.exists():
            module, seconds = train(setup, "scratch", None, teacher, sets, seed, device, root)
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(teacher.cpu().state_dict(), kept)
            held["runs"].append(row(seed, "teacher", setup.teacher, module, seconds))
            file.write_text(json.dumps(held, indent=1))
        teacher.load_state_dict(torch.load(kept, weights_only=True))
        for depth in setup.students:
            for mode in MODES:
                if any((r["seed"], r["mode"], r["depth"]) == (seed, mode, depth) for r in held["runs"]):
                    continue
                torch.manual_seed(100 + seed)
                student = network(setup, depth)
                module, seconds = train(setup, mode, teacher, student, sets, seed, device, root)
                held["runs"].append(row(seed, mode, depth, module, seconds))
                file.write_text(json.dumps(held, indent=1))
                print(
                    held["runs"][-1]["seed"],
                    mode,
                    depth,
                    round(held["runs"][-1]["accuracy"], 2),
                    round(seconds),
                    flush=True,
                )


def row(seed: int, mode: str, depth: int, module: Any, seconds: float) -> dict[str, Any]:
    found = {"seed": seed, "mode": mode, "depth": depth, "accuracy": 100 * module.measured["test/accuracy"]}
    found |= {"loss": module.measured["test/loss"], "seconds": round(seconds, 1)}
    if "test/agreement" in module.measured:
        found["agreement"] = 100 * module.measured["test/agreement"]
    errors = {k.rpartition("/")[2]: list(v.values()) for k, v in module.phase_one.items()}
    if errors:
        found["section_errors"] = {k: [round(x, 4) for x in (v[0], v[-1])] for k, v in errors.items()}
    return found


def tables(data: str) -> str:
    """Return the tables of README.md."""
    held = json.loads((HERE / "results" / f"{data}.json").read_text())
    runs = held["runs"]
    lines: list[str] = []
    for depth in held["setup"]["students"]:
        by_mode = {m: {r["seed"]: r for r in runs if r["mode"] == m and r["depth"] == depth} for m in MODES}
        seeds = sorted(set.intersection(*(set(rows) for rows in by_mode.values())))
        taught = [r["accuracy"] for r in runs if r["mode"] == "teacher" and r["seed"] in seeds]
        lines += [
            f"ResNet-{held['setup']['teacher']} to ResNet-{depth}, {len(seeds)} seeds; teacher {_mean_sd(taught)}",
            "",
        ]
        lines += [
            "| | accuracy, % | agreement with the teacher, % | LIT minus this, points | seconds |",
            "|---|---|---|---|---|",
        ]
        for mode in MODES:
            accuracy = [by_mode[mode][s]["accuracy"] for s in seeds]
            agree = [by_mode[mode][s].get("agreement") for s in seeds]
            ours = [by_mode["lit"][s]["accuracy"] - by_mode[mode][s]["accuracy"] for s in seeds]
            difference = "" if mode == "lit" else _interval(ours)
            shown = "" if None in agree else f"{statistics.mean(agree):.2f}"
            seconds = statistics.median(by_mode[mode][s]["seconds"] for s in seeds)
            lines.append(f"| {NAMES[mode]} | {_mean_sd(accuracy)} | {shown} | {difference} | {seconds:.0f} |")
        errors = [by_mode["lit"][s]["section_errors"] for s in seeds]
        falls = [
            f"{k} {statistics.mean(e[k][0] for e in errors):.3f} to {statistics.mean(e[k][1] for e in errors):.3f}"
            for k in errors[0]
        ]
        lines += ["", "Relative section errors of LIT, first to last epoch of phase 1: " + ", ".join(falls) + ".", ""]
    return "\n".join(lines)


def _mean_sd(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"


def _interval(differences: list[float]) -> str:
    """Return the mean of paired differences with its 95% t-interval, and in how many pairs it is positive."""
    n, mean = len(differences), statistics.mean(differences)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], {sum(d > 0 for d in differences)} of {n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETUPS, default="digits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--show", action="store_true", help="only print the tables")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not options.show:
        cells(options.data, options.device, options.root, options.seeds or list(range(SETUPS[options.data].seeds)))
    print(tables(options.data))


if __name__ == "__main__":
    main()
