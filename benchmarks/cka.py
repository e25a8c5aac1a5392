"""Speed, memory and correctness of similarity between all layers of two networks, beside a peer and plain loops.

    python benchmarks/cka.py --markdown benchmarks/results/cka_cpu.md
    python benchmarks/cka.py --device cuda --markdown benchmarks/results/cka_cuda.md

The peer is torch_cka, of the `bench` extra; without it its rows are left out. Features are made once, so that no
forward pass is timed. Limits are reported as ok or missed; nothing fails.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import math
import time
import warnings
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
    synchronize,
    timing_rows,
    write_markdown,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.cka import MinibatchCKA, StreamingCKA, similarity_matrix

LAYERS = 20
WIDTHS = (64, 512)
BATCH = 250
# of so many layers the slow candidates are measured, and scaled by the number of pairs
FEW = {"loop": 3, "peer": 5}
PEER = importlib.util.find_spec("torch_cka") is not None


def made_layers(samples: int, width: int, device: str, network: int) -> list[Tensor]:
    """Return ReLU features of layers that have something in common with each other and the other network."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(samples, 32, generator=generator)
    generator.manual_seed(1 + network)
    layers = []
    for _ in range(LAYERS):
        mixed = source @ torch.randn(32, width, generator=generator) / 32**0.5
        layers.append((mixed + torch.randn(samples, width, generator=generator)).relu().to(device))
    return layers


# -- the candidates ----------------------------------------------------------------------------------------------------


def exact(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    return similarity_matrix(a, b, debiased=True)


def exact_rbf(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    return similarity_matrix(a, b, kernel="rbf", debiased=True)


def batches(metric: Any, a: list[Tensor], b: list[Tensor]) -> Tensor:
    metric.to(a[0].device)
    for start in range(0, len(a[0]), BATCH):
        rows = slice(start, start + BATCH)
        metric.update([x[rows] for x in a], [y[rows] for y in b])
    return metric.compute()


def minibatch(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return batches(MinibatchCKA(), a, b)


def streaming(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return batches(StreamingCKA(max_width=10**9), a, b)


def loop_of_pairs(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The definition for one pair after the other: U-centred Gram matrices and three inner products."""
    return torch.stack([torch.stack([_pair(x, y) for y in b]) for x in a])


def _pair(x: Tensor, y: Tensor) -> Tensor:
    k, m = _u_centred(x), _u_centred(y)
    return (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()


def _u_centred(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    gram, n = x @ x.T, len(x)
    gram.fill_diagonal_(0)
    means = gram.sum(0) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    return (gram - means - means[:, None]).fill_diagonal_(0)


class Tapped(nn.Module):
    """A network whose layers give features that were made before, for the peer's hooks."""

    def __init__(self, layers: list[Tensor]) -> None:
        super().__init__()
        self.features = layers
        self.layer = nn.ModuleList([nn.Identity() for _ in layers])

    def forward(self, rows: Tensor) -> Tensor:
        """Call every layer with the features of some samples."""
        for features, layer in zip(self.features, self.layer, strict=True):
            layer(features[rows])
        return rows


def peer(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return what torch_cka computes, which is the same minibatch CKA where all batches are of one size."""
    from torch_cka import CKA

    device = str(a[0].device)
    loader = DataLoader(TensorDataset(torch.arange(len(a[0]))), batch_size=BATCH)
    names = [[f"layer.{i}" for i in range(len(side))] for side in (a, b)]
    with contextlib.redirect_stderr(io.StringIO()):
        tool = CKA(Tapped(a), Tapped(b), "a", "b", names[0], names[1], device=device)
        with torch.no_grad():  # which it does not do itself
            tool.compare(loader, loader)
    return tool.export()["CKA"]


# -- what cannot be saved ----------------------------------------------------------------------------------------------


def feature_floor(a: list[Tensor], b: list[Tensor]) -> Callable[[], object]:
    """Products of all features with all features, and of each layer with itself; nothing else."""
    joined_a, joined_b = torch.cat(a, 1), torch.cat(b, 1)
    return lambda: (joined_a.T @ joined_b, [x.T @ x for x in a + b])


def sample_floor(a: list[Tensor], b: list[Tensor], *, half: bool) -> Callable[[], object]:
    """Gram matrices of all layers in blocks of rows, and their products; in full, or from the diagonal on."""
    n, size = len(a[0]), 250 if a[0].device.type == "cpu" else 1000
    buffer = a[0].new_empty(len(a) + len(b), size * n)

    def products() -> Tensor:
        total = buffer.new_zeros(len(a), len(b))
        for start in range(0, n, size):
            first = start if half else 0
            block = buffer[:, : size * (n - first)]
            for out, x in zip(block, a + b, strict=True):
                torch.mm(x[start : start + size], x[first:].T, out=out.view(size, n - first))
            total += block[: len(a)] @ block[len(a) :].T
        return total

    return products


# -- table 1: speed ----------------------------------------------------------------------------------------------------


def speed(device: str, samples: int, width: int, rounds: int, gates: Table) -> Table:
    a, b = (made_layers(samples, width, device, network) for network in (0, 1))
    floors = {
        "products of features alone": feature_floor(a, b),
        "Gram matrices alone, from the diagonal on": sample_floor(a, b, half=True),
        "Gram matrices alone, in full": sample_floor(a, b, half=False),
    }
    few = {kind: (a[:count], b[:count]) for kind, count in FEW.items()}
    work: dict[str, Callable[[], object]] = {
        "exact debiased": lambda: exact(a, b),
        "exact debiased, one network with itself": lambda: exact(a, None),
        **floors,
        "MinibatchCKA": lambda: minibatch(a, b),
    }
    quick = compare(work, device=device, rounds=rounds, warmup=1)
    slow: dict[str, Callable[[], object]] = {"loop over pairs": lambda: loop_of_pairs(*few["loop"])}
    if PEER:
        slow["torch_cka, minibatch"] = lambda: peer(*few["peer"])
    timings = {**quick, **compare(slow, device=device, rounds=max(3, rounds // 3), warmup=1)}
    for name, kind in (("loop over pairs", "loop"), ("torch_cka, minibatch", "peer")):
        if name in timings:
            times = (LAYERS / FEW[kind]) ** 2
            t = timings.pop(name)
            scaled = Timing(times * t.median, times * t.smallest, times * t.spread)
            timings[f"{name} ({FEW[kind]} x {FEW[kind]} layers, times {times:.0f})"] = scaled
    table = Table(f"{LAYERS} x {LAYERS} layers, n={samples:,}, d={width}", ["", *TIMING_COLUMNS], note=_note())
    table.rows = [[name, *row] for name, row in timing_rows(timings).items()]
    medians = {name: t.median for name, t in timings.items()}
    floor = min(floors, key=lambda name: medians[name])
    limits = [(f"exact / {floor}", medians["exact debiased"] / medians[floor], 1.5)]
    own = medians["exact debiased, one network with itself"] / medians["exact debiased"]
    limits.append(("one network with itself / two networks", own, 0.6))
    limits += [
        ("MinibatchCKA / torch_cka", medians["MinibatchCKA"] / value, 1 / 15)
        for name, value in medians.items()
        if name.startswith("torch_cka")
    ]
    gates.rows += [[f"d={width}: {name}", f"{v:.3f}", f"{limit:.3f}", gate(v, limit)] for name, v, limit in limits]
    return table


def _note() -> str:
    return (
        f"Batches of {BATCH}. The slow ones are measured on fewer layers and scaled by the number of pairs. 'Alone': "
        "matrix products with nothing else, the least that an exact matrix of two networks takes."
    )


def further(device: str, samples: int) -> Table:
    a, b = (made_layers(samples, WIDTHS[0], device, network) for network in (0, 1))
    names = ("cca", "svcca", "pwcca", "linear_regression", "procrustes")
    work: dict[str, Callable[[], object]] = {
        "StreamingCKA, exact": lambda: streaming(a, b),
        "MinibatchCKA": lambda: minibatch(a, b),
        "cka, rbf, exact": lambda: exact_rbf(a, b),
        **{name: functools.partial(similarity_matrix, a, b, index=name) for name in names},
    }
    table = Table(f"Other indices and ways, n={samples:,}, d={WIDTHS[0]}", ["", *TIMING_COLUMNS])
    table.rows = [[name, *row] for name, row in timing_rows(compare(work, device=device, rounds=3, warmup=1)).items()]
    return table


# -- table 2: exactness ------------------------------------------------------------------------------------------------


def exactness(device: str, samples: int, gates: Table) -> Table:
    table = Table(
        "Largest difference of any entry",
        ["", *(f"d={width}" for width in WIDTHS)],
        note="From the same in float64, where nothing else is said. torch_cka does not centre features, which changes "
        "nothing but rounding. Means: 100 added to all features, whose spread is about 1; "
        "nan: it raises an error that says its result was NaN.",
    )
    rows: dict[str, list[float]] = {}
    for width in WIDTHS:
        a, b = (made_layers(samples, width, device, network) for network in (0, 1))
        moved = [x + 100 for x in a], [y + 100 for y in b]
        found = {
            "exact debiased": _difference(exact, a, b),
            "exact debiased, large means": _difference(exact, *moved),
            "MinibatchCKA": _difference(minibatch, a, b),
            "MinibatchCKA, large means": _difference(minibatch, *moved),
        }
        count = FEW["peer"]
        if PEER:
            ours = minibatch(a[:count], b[:count])
            middled = ([x - x.mean(0) for x in side[:count]] for side in (a, b))
            found["torch_cka from MinibatchCKA"] = _largest(peer(a[:count], b[:count]), ours)
            found["torch_cka on centred features from MinibatchCKA"] = _largest(peer(*middled), ours)
            gates.rows.append(_exact_row(f"d={width}: torch_cka on centred features from MinibatchCKA", found, 3e-6))
            moved_few = moved[0][:count], moved[1][:count]
            try:
                value = _largest(peer(*moved_few), minibatch(*moved_few))
            except AssertionError:  # "HSIC computation resulted in NANs"
                value = math.nan
            found["torch_cka from MinibatchCKA, large means"] = value
        for name in ("exact debiased, large means", "MinibatchCKA, large means"):
            gates.rows.append(_exact_row(f"d={width}: {name}", found, 1e-6))
        found["MinibatchCKA from the exact value of all samples"] = _largest(minibatch(a, b), exact(a, b))
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    table.rows = [[name, *(f"{value:.1e}" for value in values)] for name, values in rows.items()]
    return table


def _exact_row(title: str, found: dict[str, float], limit: float) -> list[str]:
    value = found[title.partition(": ")[2]]
    return [title, f"{value:.1e}", f"{limit:.0e}", gate(value, limit)]


def _difference(f: Callable[[list[Tensor], list[Tensor]], Tensor], a: list[Tensor], b: list[Tensor]) -> float:
    return _largest(f(a, b), f([x.double() for x in a], [y.double() for y in b]))


def _largest(x: Tensor, y: Tensor) -> float:
    return float((x.double().cpu() - y.cpu()).abs().max())


# -- table 3: memory ---------------------------------------------------------------------------------------------------

MEASURED: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "exact debiased": exact,
    "exact, rbf": exact_rbf,
    "MinibatchCKA": minibatch,
    "StreamingCKA": streaming,
}


def memory(device: str, samples: int, gates: Table) -> Table:
    table = Table(
        f"Extra memory, n={samples:,}",
        ["", "d", "MB", "features MB", "seconds"],
        note="Each in a fresh process: its peak over what it held before, after imports and with the features made.",
    )
    for width in WIDTHS:
        for name in MEASURED:
            arguments = ("--memory-of", name, "--width", width, "--samples", samples)
            taken = in_fresh_process(__file__, "--device", device, *arguments)
            own = 2 * LAYERS * samples * width * 4 / MEGABYTE
            used = taken["bytes"] / MEGABYTE
            table.rows.append([name, width, f"{used:,.0f}", f"{own:,.0f}", f"{taken['seconds']:.1f}"])
            if width == WIDTHS[-1] and name in ("exact debiased", "MinibatchCKA") and samples == 2000:
                gates.rows.append([f"d={width}: memory of {name}", f"{used:.0f} MB", "700 MB", gate(used, 700)])
    return table


def give_back() -> None:
    """Return what making the features left in the allocator to the system, where it would hide what is taken next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def report_memory(device: str, name: str, samples: int, width: int) -> None:
    """Print what one candidate takes, for the process that asked."""
    a, b = (made_layers(samples, width, device, network) for network in (0, 1))
    few = [x[:300, :8].contiguous() for x in a]
    MEASURED[name](few, few)  # libraries load and open their buffers at the first call
    give_back()
    start = time.perf_counter()
    taken = extra_memory(lambda: MEASURED[name](a, b), device)
    synchronize(device)
    print(json.dumps({"bytes": taken, "seconds": time.perf_counter() - start}))


# -- all of it ---------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--samples", type=int, help="2,000 on a CPU, 10,000 on CUDA")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", help="also write the tables to this file")
    parser.add_argument("--memory-of", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.samples = options.samples or (2000 if options.device == "cpu" else 10_000)
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    device, samples = options.device, options.samples
    if options.memory_of:
        return report_memory(device, options.memory_of, samples, options.width)
    gates = Table("Limits", ["", "measured", "limit", ""])
    tables = [speed(device, samples, width, options.rounds, gates) for width in WIDTHS]
    tables += [further(device, samples), exactness(device, samples, gates), memory(device, samples, gates), gates]
    for table in tables:
        table.show()
    if options.markdown:
        command = f"python benchmarks/cka.py --device {device} --markdown {options.markdown}"
        about = environment(device, ["torch", "torchmetrics", *(["torch_cka"] if PEER else [])])
        other = "cuda" if device == "cpu" else "cpu"
        about += [f"- `{command}`", f"- rows for `--device {other}` are not part of this run"]
        write_markdown(options.markdown, "Similarity of representations: speed and memory", about, tables)
    return None


if __name__ == "__main__":
    main()
