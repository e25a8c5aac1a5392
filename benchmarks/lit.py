"""Time and memory of a step of LIT beside plain distillation, in the same process.

    python benchmarks/lit.py                                                     # ResNet-20 to ResNet-8
    python benchmarks/lit.py --device cuda --markdown benchmarks/results/lit_cuda.md   # ResNet-110 to ResNet-20

Plain distillation is written by hand: the teacher's forward pass without a graph, the student's, `kd_loss`. On a GPU
networks are compiled, in bf16 and channels_last. There is no other implementation of LIT to compare with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timing import (
    MEGABYTE,
    TIMING_COLUMNS,
    Table,
    compare,
    environment,
    extra_memory,
    gate,
    in_fresh_process,
    timing_rows,
    write_markdown,
)
from torch import nn
from torch.nn import functional as F

from lightning_methods.lit import LITDistiller, kd_loss
from lightning_methods.models import CIFARResNet

SECTIONS = ["layer1", "layer2", "layer3"]
FORMS: dict[str, dict[str, Any]] = {
    "LIT": {},
    "LIT, first section twice": {"reuse_first_section": False},
    "LIT, sequential backward": {"sequential_backward": True},
    "LIT, beta=0": {"beta": 0.0},
    "LITDistiller, mode kd": {"mode": "kd"},
    "LITDistiller, mode fitnets": {"mode": "fitnets"},
}
LIMITS = {"LIT": 1.35, "LIT, first section twice": 1.6, "LIT, beta=0": 0.95}


def networks(device: str) -> tuple[nn.Module, nn.Module]:
    """Return a teacher and a student from the same random state."""
    torch.manual_seed(0)
    deep, shallow = (110, 20) if device == "cuda" else (20, 8)
    teacher, student = CIFARResNet(deep).to(device), CIFARResNet(shallow).to(device)
    if device == "cuda":
        teacher, student = teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last)
        for network in (teacher, student):
            for name in SECTIONS:
                network.get_submodule(name).compile()
    return teacher.eval(), student.train()


def data(device: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    if device == "cuda":
        x = x.to(memory_format=torch.channels_last)
    return x, torch.randint(10, (batch,), generator=generator).to(device)


def precision(device: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def by_hand(device: str, batch: int, *, taught: bool) -> Callable[[], torch.Tensor]:
    """Return a step of distillation, or of plain cross-entropy, without any library around it."""
    teacher, student = networks(device)
    x, y = data(device, batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> torch.Tensor:
        with precision(device):
            logits = student(x)
            if taught:
                with torch.no_grad():
                    wanted = teacher(x)
                loss = kd_loss(logits, wanted, y)
            else:
                loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def distiller(device: str, batch: int, settings: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return a step of the module, as a Trainer makes it."""
    teacher, student = networks(device)
    x, y = data(device, batch)
    module = LITDistiller(teacher, student, SECTIONS, **settings)
    module._sections.attach()
    module._enter_phase()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> torch.Tensor:
        with precision(device):
            loss = module.training_step((x, y), 0)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        return loss.detach()

    return step


def maker(name: str, device: str, batch: int) -> Callable[[], torch.Tensor]:
    if name in FORMS:
        return distiller(device, batch, FORMS[name])
    return by_hand(device, batch, taught=name == "distillation by hand")


def first_losses(device: str, batch: int, steps: int = 5) -> float:
    """Return the largest relative difference of the losses with the first section run once and twice."""
    once, twice = (maker(name, device, batch) for name in ("LIT", "LIT, first section twice"))
    pairs = [(float(once()), float(twice())) for _ in range(steps)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    batch = options.batch or (512 if device == "cuda" else 64)
    torch.set_num_threads(1)
    if options.memory_of:
        maker(options.memory_of, device, 2)()  # what the first step of a process needs once
        print(json.dumps(extra_memory(maker(options.memory_of, device, batch), device)))
        return
    names = ["distillation by hand", "cross-entropy by hand", *FORMS]
    timings = compare({name: maker(name, device, batch) for name in names}, device=device, rounds=options.rounds)
    nets = "ResNet-110 to ResNet-20, bf16, channels_last, compiled" if device == "cuda" else "ResNet-20 to ResNet-8"
    table = Table(f"A training step, {nets}, batch {batch} of 3 x 32 x 32", ["", *TIMING_COLUMNS, "peak MB"])
    memory = {
        name: in_fresh_process(__file__, "--memory-of", name, "--device", device, "--batch", batch) / MEGABYTE
        for name in names
    }
    for name, row in timing_rows(timings).items():
        table.rows.append([name, *row, f"{memory[name]:.0f}"])
    table.note = (
        "Peak MB: what the first step adds to the memory in use before it, each measured in a process of its own."
    )
    gates = Table("Limits", ["", "measured", "limit", ""])
    for name, limit in ({"LIT": 1.3} if device == "cuda" else LIMITS).items():
        ratio = timings[name].median / timings["distillation by hand"].median
        gates.rows.append([f"{name} / distillation, time", f"{ratio:.2f}", f"{limit}", gate(ratio, limit)])
    ratio = memory["LIT, sequential backward"] / memory["distillation by hand"]
    gates.rows.append(["LIT, sequential backward / distillation, memory", f"{ratio:.2f}", "1.1", gate(ratio, 1.1)])
    difference = first_losses(device, batch)
    equal = "losses of five steps, first section once or twice: difference"
    gates.rows.append([equal, f"{difference:.1e}", "1e-5", gate(difference, 1e-5)])
    for shown in (table, gates):
        shown.show()
    if options.markdown:
        about = environment(device, ["torch", "lightning"])
        write_markdown(options.markdown, "LIT: time and memory of a step", about, [table, gates])


if __name__ == "__main__":
    main()
