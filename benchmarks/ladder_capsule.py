"""Time and memory of the ladder head and of dynamic routing, beside their direct forms.

    python benchmarks/ladder_capsule.py --markdown benchmarks/results/ladder_capsule_cpu.md
    python benchmarks/ladder_capsule.py --device cuda --markdown benchmarks/results/ladder_capsule_gpu.md

The direct form of the head is a loop over the classes: each of its networks reads the dense code vector, each map is
laid out, and capsules are multiplied one by one. That of the routing loops over the classes, each with votes of its
own. All take the weights of ours, and must give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
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
    timing_of,
    timing_rows,
    write_markdown,
)
from torch import Tensor, nn

from lightning_methods import CapsuleNetwork, Classifier, LadderCapsuleNetwork, LadderHead
from lightning_methods.ladder_capsule import DynamicRouting, Pruned, PruningLayer, ladder_loss, squash
from lightning_methods.ladder_capsule.functional import safe_norm
from lightning_methods.ladder_capsule.hyper import GroupedLinear, MapMixer

CAPS, K, CLASSES, DIM, POSE = 1152, 70, 10, 8, 16  # of the official code
TIMES = 8.0  # how much faster the head was to be
EQUAL = 1e-5
HIDDEN = (128, 256, 384)


def direct_ladder(active: Tensor, forward: Tensor, inverse: Tensor, share: Tensor) -> Tensor:
    """Return the errors `(B,)` of one class, whose maps are laid out."""
    votes = (active[:, :, None] @ forward).squeeze(2)
    summed = (share[..., None] * votes).sum(1)
    pose = summed / (safe_norm(summed, keepdim=True) + 1e-8)
    back = squash((inverse @ pose[:, None, :, None]).squeeze(-1))
    return safe_norm(active - back).mean(1)


class DirectHead(nn.Module):
    """The head as the paper writes it, on the weights of `head`."""

    def __init__(self, head: LadderHead) -> None:
        super().__init__()
        hyper: Any = head.hyper
        (groups, width), (classes, narrow) = hyper.code.blocks
        self.k = head.k
        weight, bias = hyper.code.weight.detach(), hyper.code.bias.detach()
        lasts = [_last(mixer, j) for mixer in (hyper.forward_maps, hyper.inverse_maps) for j in range(classes)]
        self.maps = nn.ModuleList(
            _network(weight[:, c], bias[c], hyper.hidden, j, last)
            for j, (c, last) in enumerate(zip(_columns(0, groups, width), lasts, strict=True))
        )
        self.coupling = nn.ModuleList(
            _network(weight[:, c], bias[c], hyper.coupling, j)
            for j, c in enumerate(_columns(groups * width, classes, narrow))
        )

    def forward(self, pruned: Pruned) -> Tensor:
        """Return the errors."""
        code, shape = pruned.code, (-1, self.k, DIM, POSE)
        errors = []
        for j in range(CLASSES):
            forward, inverse = self.maps[j](code).view(shape), self.maps[CLASSES + j](code).view(shape)
            errors.append(direct_ladder(pruned.active, forward, inverse, self.coupling[j](code).sigmoid()))
        return torch.stack(errors, 1)


class DirectShared(nn.Module):
    """The head with a shared trunk, its maps laid out for a class after the other, on the weights of `head`."""

    def __init__(self, head: LadderHead) -> None:
        super().__init__()
        hyper: Any = head.hyper
        self.k = head.k
        self.trunk = _network(hyper.code.weight.detach(), hyper.code.bias.detach(), hyper.trunk, 0).append(nn.ReLU())
        self.mixture = nn.ModuleList(_linear_of(hyper.mixture, j) for j in range(2 * CLASSES))
        self.lasts = nn.ModuleList(_last(mixer, 0) for mixer in (hyper.forward_maps, hyper.inverse_maps))
        self.coupling = nn.ModuleList(_linear_of(hyper.coupling, j) for j in range(CLASSES))

    def forward(self, pruned: Pruned) -> Tensor:
        """Return the errors."""
        trunk, shape = self.trunk(pruned.code), (-1, self.k, DIM, POSE)
        errors = []
        for j in range(CLASSES):
            forward = self.lasts[0](self.mixture[j](trunk)).view(shape)
            inverse = self.lasts[1](self.mixture[CLASSES + j](trunk)).view(shape)
            errors.append(direct_ladder(pruned.active, forward, inverse, self.coupling[j](trunk).sigmoid()))
        return torch.stack(errors, 1)


def _columns(start: int, groups: int, width: int) -> list[slice]:
    return [slice(start + j * width, start + (j + 1) * width) for j in range(groups)]


def _last(mixer: MapMixer, group: int) -> nn.Linear:
    """Return the layer that lays the maps of one class out."""
    rows, width = mixer.weight.shape[1], mixer.bias.shape[2]
    weight = mixer.weight.detach()[group].view(rows, -1, width).transpose(0, 1).flatten(1)
    return _linear(weight, mixer.bias.detach()[group].flatten())


def _network(
    weight: Tensor, bias: Tensor, layers: nn.Sequential, group: int, last: nn.Linear | None = None
) -> nn.Sequential:
    """Return a plain network with the weights of one group."""
    made: list[nn.Module] = [_linear(weight, bias)]
    for layer in layers:
        if isinstance(layer, GroupedLinear):
            made += [nn.ReLU(), _linear_of(layer, group)]
    return nn.Sequential(*made, *([] if last is None else [nn.ReLU(), last]))


def _linear_of(layer: GroupedLinear, group: int) -> nn.Linear:
    return _linear(layer.weight.detach()[group], layer.bias.detach()[group, 0])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    layer.weight = nn.Parameter(weight.T.contiguous())
    layer.bias = nn.Parameter(bias.clone())
    return layer


def direct_routing(capsules: Tensor, weight: Tensor, iters: int = 3) -> Tensor:
    """Route by a loop over the classes, the votes of each in a product of its own."""
    votes = [torch.einsum("bnd,dne->bne", capsules, maps) for maps in weight]
    logits = [torch.zeros(capsules.shape[:2], device=capsules.device) for _ in votes]
    poses: list[Tensor] = []
    for i in range(iters):
        shares = torch.stack(logits).softmax(0)
        last = i == iters - 1
        routed = votes if last else [u.detach() for u in votes]
        poses = [squash((share[..., None] * u).sum(1)) for share, u in zip(shares, routed, strict=True)]
        if not last:
            logits = [b + (u * v[:, None]).sum(-1) for b, u, v in zip(logits, routed, poses, strict=True)]
    return torch.stack(poses, 1)


def made_pruned(device: str, batch: int, caps: int = CAPS) -> Pruned:
    torch.manual_seed(1)
    capsules = torch.randn(batch, caps, DIM, device=device).relu()
    return PruningLayer(K)(capsules)


def heads(device: str, batch: int, caps: int = CAPS) -> dict[str, Callable[[], Any]]:
    """Return forward passes and training steps of the head in both forms, and the share of its first layers."""
    torch.manual_seed(0)
    head = LadderHead(caps, CLASSES, K, DIM, POSE, hidden=HIDDEN).to(device)
    direct = DirectHead(head).to(device)
    pruned = made_pruned(device, batch, caps)
    firsts = nn.ModuleList(network[0] for network in [*direct.maps, *direct.coupling])
    no_grad = torch.no_grad()
    return {
        **both("head", head, direct, pruned),
        "first layers, forward, direct": no_grad(lambda: torch.cat([layer(pruned.code) for layer in firsts], 1)),
        "first layers, forward": no_grad(lambda: _joined(head.hyper.code(pruned.indices))),
    }


def both(name: str, head: LadderHead, direct: nn.Module, pruned: Pruned) -> dict[str, Callable[[], Any]]:
    """Return forward passes and training steps of two forms."""
    y = torch.arange(len(pruned.active), device=pruned.active.device) % CLASSES

    def step(module: nn.Module, function: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            ladder_loss(function(), y).backward()

        return run

    no_grad = torch.no_grad()
    return {
        f"{name}, forward, direct": no_grad(lambda: direct(pruned)),
        f"{name}, forward": no_grad(lambda: head(pruned).errors),
        f"{name}, step, direct": step(direct, lambda: direct(pruned)),
        f"{name}, step": step(head, lambda: head(pruned).errors),
    }


def _joined(blocks: list[Tensor]) -> Tensor:
    return torch.cat([x.transpose(0, 1).flatten(1) for x in blocks], 1)


def shared(device: str, batch: int, caps: int = CAPS) -> dict[str, Callable[[], Any]]:
    """Return forward passes and training steps of the head with a shared trunk in both forms."""
    torch.manual_seed(0)
    head = LadderHead(caps, CLASSES, K, DIM, POSE, hidden=HIDDEN, hyper="shared").to(device)
    direct = DirectShared(head).to(device)
    return both("head, shared trunk", head, direct, made_pruned(device, batch, caps))


def multiplications(caps: int, *, direct: bool) -> dict[str, float]:
    """Return the millions of multiplications an image, forward, in the first, the hidden and the last layers."""
    first, second, third = HIDDEN
    rows = caps if direct else 0  # ours sums K rows, without a multiplication
    return {
        "first": rows * CLASSES * (2 * first + K) / 1e6,
        "hidden": CLASSES * (2 * (first * second + second * third) + 3 * K * K) / 1e6,
        "last": 2 * CLASSES * third * K * DIM * POSE / 1e6,
    }


def routings(device: str, batch: int) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    layer = DynamicRouting(CAPS, CLASSES, DIM, POSE).to(device)
    capsules = squash(torch.randn(batch, CAPS, DIM, device=device))

    def step(function: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad()
            function().square().sum().backward()

        return run

    no_grad = torch.no_grad()
    return {
        "routing, forward, direct": no_grad(lambda: direct_routing(capsules, layer.weight)),
        "routing, forward": no_grad(lambda: layer(capsules)),
        "routing, step, direct": step(lambda: direct_routing(capsules, layer.weight)),
        "routing, step": step(lambda: layer(capsules)),
    }


def differences(device: str, batch: int) -> dict[str, float]:
    """Return the largest difference between each form and its direct one."""
    work = {**heads(device, batch), **shared(device, batch), **routings(device, batch)}
    return {
        name: float((work[name]() - work[f"{name}, direct"]()).abs().max())
        for name in ("head, forward", "first layers, forward", "head, shared trunk, forward", "routing, forward")
    }


def networks(batch: int) -> dict[str, Callable[[], Any]]:
    """Return training steps of whole networks of the paper's size, for a GPU."""
    convolutions = nn.Sequential(nn.Conv2d(1, 256, 9), nn.ReLU(), nn.Conv2d(256, 256, 9, 2), nn.ReLU(), nn.Flatten())
    cnn = Classifier(nn.Sequential(convolutions, nn.Linear(9216, 192), nn.ReLU(), nn.Linear(192, 10)))
    made = {"L-CapsNet": LadderCapsuleNetwork(), "L-CapsNet, shared": LadderCapsuleNetwork(hyper="shared")}
    made |= {"CapsNet": CapsuleNetwork(), "CNN": cnn}
    x, y = torch.rand(batch, 1, 28, 28, device="cuda"), torch.arange(batch, device="cuda") % 10

    def step(module: Any) -> Callable[[], None]:
        module = module.cuda()
        optimizer = torch.optim.Adam(module.parameters(), fused=True)

        def run() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = module.training_step((x, y), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    return {name: step(module) for name, module in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, batch = options.device, options.batch
    torch.set_num_threads(1)
    makers = (heads, shared, routings)
    if options.memory_of:
        # made once: what an earlier one gave back would hide what this one takes
        make = shared if "shared" in options.memory_of else routings if "routing" in options.memory_of else heads
        print(json.dumps(extra_memory(make(device, batch)[options.memory_of], device)))
        return
    work = {name: run for make in makers for name, run in make(device, batch).items()}
    tables = [times_table(work, device, options)]
    if device == "cuda":
        tables.append(images_table(options.rounds))
    else:
        tables += [sizes_table(min(5, options.rounds)), floors_table(tables[0], batch)]
    tables.append(gates_table(tables[0], differences(device, batch)))
    for table in tables:
        table.show()
    if options.markdown:
        about = environment(device, ["torch", "lightning"])
        write_markdown(options.markdown, "Ladder capsules: time and memory", about, tables)


def times_table(work: dict[str, Callable[[], Any]], device: str, options: Any) -> Table:
    """Time every form beside its direct one, and measure what each adds to the memory."""
    # large blocks go back to the system when they are freed, and cannot hide what is taken afterwards
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    title = f"{CAPS} capsules of which {K} are kept, {CLASSES} classes, batch {options.batch}"
    table = Table(title, ["", *TIMING_COLUMNS[:3], "times faster than direct", "peak MB"])
    for group in dict.fromkeys(name.removesuffix(", direct") for name in work):
        pair = {name: work[name] for name in (f"{group}, direct", group) if name in work}
        timings = (
            compare(pair, device=device, rounds=options.rounds) if device == "cuda" else on_cpu(pair, options.rounds)
        )
        first = next(iter(timings.values())).median
        for name, row in timing_rows(timings).items():
            arguments = ("--memory-of", name, "--device", device, "--batch", options.batch)
            memory = in_fresh_process(__file__, *arguments) / MEGABYTE
            ratio = f"{first / timings[name].median:.2f}" if len(pair) > 1 else ""
            table.rows.append([name, *row[:3], ratio, f"{memory:.0f}"])
    table.note = (
        "On a CPU milliseconds of its clock, of one thread. Peak MB: what the first call adds to the memory in use "
        "before it, each in a process of its own."
    )
    return table


def sizes_table(rounds: int) -> Table:
    """Time predictions where the dense product with the code vector has more, and less, of a share."""
    columns = ["capsules, batch", "", "direct ms", "ours ms", "times faster", "multiplications, direct / ours"]
    table = Table("Forward, by the number of capsules and the size of the batch", columns)
    for caps in (CAPS, 4 * CAPS):  # 28x28 images, and 40x40, as in affNIST
        dense, sparse = (sum(multiplications(caps, direct=direct).values()) for direct in (True, False))
        for batch in (1, 50):
            for make in (heads, shared):
                work = make("cpu", batch, caps)
                for name in [n for n in work if n.endswith("forward")]:
                    pair = on_cpu({x: work[x] for x in (f"{name}, direct", name)}, rounds)
                    direct, ours = (pair[x].median for x in (f"{name}, direct", name))
                    count = f"{dense:.1f} / {sparse:.1f} million" if name == "head, forward" else ""
                    row = [f"{caps:,}, {batch}", name.removesuffix(", forward"), f"{direct:.2f}", f"{ours:.2f}"]
                    table.rows.append([*row, f"{direct / ours:.2f}", count])
    table.note = "The dense product is one of N rows, ours a sum of k of them; all else is the same arithmetic."
    return table


def floors_table(times: Table, batch: int) -> Table:
    """Set the times beside those of the multiplications alone, at the rate of a large product on this processor."""
    x = torch.randn(1024, 1024)
    fastest = on_cpu({"product": torch.no_grad()(lambda: x @ x)}, 15)["product"].smallest
    rate = 1024**3 / fastest / 1e6  # thousands of millions a second
    measured = {row[0]: float(row[2]) for row in times.rows}
    title = f"What multiplications alone would take, at {rate:.0f} thousand million a second (a product of 1024x1024)"
    table = Table(title, ["", "million", "floor ms", "direct, min ms", "ours, min ms", "most times faster possible"])
    whole = sum(multiplications(CAPS, direct=False).values()) * batch
    for name, times_each in (("head, forward", 1), ("head, step", 3)):  # value, and both gradients
        floor = times_each * whole / rate
        direct, ours = measured[f"{name}, direct"], measured[name]
        row = [name, f"{times_each * whole:,.0f}", f"{floor:.0f}", f"{direct:.0f}", f"{ours:.0f}"]
        table.rows.append([*row, f"{direct / floor:.1f}"])
    parts = multiplications(CAPS, direct=True)
    table.note = (
        f"Of the direct form's {sum(parts.values()):.1f} million multiplications an image, {parts['last']:.1f} are "
        f"those of the last layers, which the sum of rows leaves; it spares {parts['first']:.1f}. No form of dense "
        "products can be more times faster than the last column says."
    )
    return table


def on_cpu(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time candidates in turns by the processor's clock, which stands still while others have the processor."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, rounds):
        for name, work in candidates.items():
            start = time.process_time()
            work()
            if turn >= 0:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: timing_of(values) for name, values in times.items()}


def gates_table(times: Table, found: dict[str, float]) -> Table:
    table = Table("Limits", ["", "measured", "limit", ""])
    ratios = {row[0]: float(row[4]) for row in times.rows if row[4]}
    for name in ("head, forward", "head, step"):
        value = ratios[name]
        table.rows.append([f"{name}, times faster than direct", f"{value:.2f}", f"{1.0}", gate(1.0, value)])
        table.rows.append([f"{name}, times faster than direct", f"{value:.2f}", f"{TIMES}", gate(TIMES, value)])
    for name, value in found.items():
        table.rows.append([f"{name}, difference to direct", f"{value:.1e}", f"{EQUAL}", gate(value, EQUAL)])
    return table


def images_table(rounds: int, batch: int = 200) -> Table:
    timings = compare(networks(batch), device="cuda", rounds=rounds)
    table = Table(f"A training step of the paper's size, bf16, batch {batch}", ["", "median ms", "images a second"])
    table.rows += [[name, f"{t.median:.1f}", f"{1e3 * batch / t.median:.0f}"] for name, t in timings.items()]
    return table


if __name__ == "__main__":
    main()
