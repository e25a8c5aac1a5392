"""Time and memory of a step of the learned optimizer, and inner steps a second of its meta-training.

    python benchmarks/learned_optimizer.py                                       # 1.0 million parameters, ResNet-20
    python benchmarks/learned_optimizer.py --device cuda --markdown benchmarks/results/learned_optimizer_cuda.md

The naive form is what other libraries do, one tensor at a time: inputs beside inputs, `(n, 19)`, and two products. On a
CPU times are CPU time of the process, so that what else the machine does counts less. Each network has a process of its
own, as a training has: in one that ran a larger network before, the allocator keeps memory which the naive form else
asks the system for in every step. That is shown too.

The guard mixes Adam's step into that of wide networks, as both are here, and into all steps past the weights' clock.
The naive form knows no guard, and is compared with learned steps alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from timing import Table, environment, extra_memory, gate, in_fresh_process, synchronize, write_markdown
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods import LearnedOptimizer
from lightning_methods.learned_optimizer import Architecture, ModuleTask, load_weights
from lightning_methods.learned_optimizer.estimators import Episode, estimate
from lightning_methods.learned_optimizer.functional import DECAYS, time_features
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.weights import Weights
from lightning_methods.models import CIFARResNet

BARE = ", learned steps alone"  # what the guard leaves in small networks until the clock
OTHERS = {
    "19 inputs, 2 layers": Architecture(hidden_layers=2),
    "39 inputs, 2 layers": Architecture("small_fc", hidden_layers=2),
}


class Naive:
    """The paper's rule, tensor by tensor."""

    def __init__(self, params: Any, weights: Weights) -> None:
        self.params = list(params)
        self.device = self.params[0].device
        self.parts = {k: v.to(self.device) for k, v in weights.architecture.split(weights.theta).items()}
        self.architecture = weights.architecture
        self.momenta = [torch.zeros(p.numel(), len(DECAYS), device=self.device) for p in self.params]
        self.decays = torch.tensor(DECAYS, device=self.device)
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        w, a = self.parts, self.architecture
        time = time_features(self.t).to(self.device)
        for p, m in zip(self.params, self.momenta, strict=True):
            g = p.grad.reshape(-1, 1)
            m.mul_(self.decays).add_(g * (1 - self.decays))
            x = torch.cat([g, p.reshape(-1, 1), m], 1)
            x = x * torch.rsqrt(x.square().mean(0, keepdim=True) + a.eps)
            x = torch.cat([x, time.expand(len(x), -1)], 1)
            out = (x @ w["w0"] + w["b0"]).relu() @ w["w_out"] + w["b_out"]
            p.sub_((out[:, 0] * torch.exp(out[:, 1] * a.exp_mult) * a.step_mult).view_as(p))
        self.t += 1


def network(name: str, device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    sizes = {"MLP": [784, 700, 600, 64, 10], "10M": [2000, 2000, 2000, 1000, 10], "100M": [6000, 7000, 6000, 2500, 10]}
    if name == "ResNet":
        net: nn.Module = CIFARResNet(20)
    else:
        own = sizes[name]
        net = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(own)])
    params = list(net.to(device).parameters())
    for p in params:
        p.grad = torch.randn(p.shape, device=device) * 0.01
    return params


def made(architecture: Architecture) -> Weights:
    return Weights("made", architecture, architecture.initial(torch.Generator().manual_seed(0)))


def maker(form: str, name: str, device: str) -> Any:
    """Return an optimizer; its steps are made small, so that parameters stay what they are."""
    params = network(name, device)
    if form.startswith("Adam"):
        return torch.optim.Adam(params, lr=1e-9, foreach=form == "Adam, foreach", fused=form == "Adam, fused")
    if form == "naive":
        return Naive(params, load_weights("metz19"))
    name = form.removesuffix(BARE)
    weights = made(OTHERS[name]) if name in OTHERS else load_weights(name)
    return LearnedOptimizer(params, lr=1e-6, weights=weights, guard=not form.endswith(BARE))


def milliseconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return 1e3 * (clock() - start)


def times(forms: list[str], name: str, device: str, rounds: int) -> dict[str, float]:
    """Return the median time of a step of each, taken in turns."""
    optimizers = {form: maker(form, name, device) for form in forms}
    found: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(-2, rounds):
        for form, optimizer in optimizers.items():
            elapsed = min(milliseconds(optimizer.step, device) for _ in range(1 if form == "naive" else 3))
            if turn >= 0:
                found[form].append(elapsed)
    return {form: sorted(values)[len(values) // 2] for form, values in found.items()}


def largest_difference(name: str, device: str) -> float:
    """Return how far the naive form and ours are apart after three steps."""
    weights = load_weights("metz19")
    ours, naive = network(name, device), network(name, device)
    # the naive form knows no guard, which cuts large steps
    first, second = LearnedOptimizer(ours, weights=weights, guard=False), Naive(naive, weights)
    for _ in range(3):
        first.step()
        second.step()
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, naive, strict=True))


def state_size(optimizer: LearnedOptimizer) -> float:
    return sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())


def inner_steps(seconds: float = 10.0, pairs: int = 8) -> float:
    """Return inner steps a CPU second of noise-reuse evolution strategies on an MLP of 64-32-10."""
    generator = torch.Generator().manual_seed(0)
    x: Tensor = torch.randn(1000, 64, generator=generator)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    task = ModuleTask(net, x, torch.arange(1000) % 10, loss=F.cross_entropy)
    weights = load_weights("metz19")
    problem = InnerTraining(weights.architecture, task)
    episode = Episode(0, 10**9, problem.begin(weights.theta, range(pairs)))

    def window(turn: int) -> None:
        estimate(problem, weights.theta, episode, 20, [turn * pairs + i for i in range(pairs)], estimator="nres")

    window(0)
    turns, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        turns += 1
        window(turns)
    return turns * 20 * 2 * pairs / (time.process_time() - start)


def tables(device: str, rounds: int) -> list[Table]:
    shown = Table("Milliseconds of a step", ["", "MLP, 1.0 M", "ResNet-20, 65 tensors"])
    adam = "Adam, fused" if device == "cuda" else "Adam, foreach"
    forms = [adam, "naive", "metz19" + BARE, "metz19", "lm-small" + BARE, "lm-small", *OTHERS]
    options = ["--device", device, "--rounds", rounds]
    by_net = {
        name: in_fresh_process(__file__, "--times-of", name, *options, "--forms", *forms) for name in ("MLP", "ResNet")
    }
    shown.rows = [[form, *(f"{by_net[name][form]:.2f}" for name in by_net)] for form in forms]
    gates = Table("Limits", ["", "measured", "limit", ""])

    def at_least(what: str, value: float, least: float) -> None:
        gates.rows.append([what, f"{value:.1f}", f"at least {least:g}", gate(least, value)])

    mlp, resnet = by_net["MLP"], by_net["ResNet"]
    ours = "metz19" + BARE
    at_least("naive / ours, 1.0 M parameters", mlp["naive"] / mlp[ours], 8)
    at_least("naive / ours, ResNet-20", resnet["naive"] / resnet[ours], 5)
    after = in_fresh_process(__file__, "--times-of", "MLP", "ResNet", *options, "--forms", "naive", ours)
    gates.rows.append(["the same, after the larger network", f"{after['naive'] / after[ours]:.1f}", "none", ""])
    different = max(largest_difference(name, device) for name in ("MLP", "ResNet"))
    gates.rows.append(["naive and ours, three steps: difference", f"{different:.1e}", "1e-6", gate(different, 1e-6)])
    if device == "cuda":
        large = Table("Milliseconds of a step of large networks", ["", "10 M", "100 M"])
        forms = [adam, "metz19", "lm-small"]
        by_net = {name: times(forms, name, device, rounds) for name in ("10M", "100M")}
        large.rows = [[form, *(f"{by_net[name][form]:.2f}" for name in by_net)] for form in forms]
        return [shown, large, gates]
    ratio = mlp[ours] / mlp[adam]
    gates.rows.append(["ours / foreach Adam, 1.0 M parameters", f"{ratio:.1f}", "at most 18", gate(ratio, 18)])
    ratio = mlp["metz19"] / mlp[adam]
    gates.rows.append(["the same, with the guard", f"{ratio:.1f}", "at most 18", gate(ratio, 18)])
    ratio = mlp["lm-small"] / mlp[adam]
    gates.rows.append(["lm-small, with the guard / foreach Adam", f"{ratio:.1f}", "none", ""])
    for name in ("metz19", "lm-small"):
        share = sorted(in_fresh_process(__file__, "--memory-of", name) for _ in range(3))[1]
        gates.rows.append([f"{name}: extra memory / state", f"{share:.3f}", "at most 0.1", gate(share, 0.1)])
    at_least("inner steps a CPU second, NRES, 8 pairs", inner_steps(), 2500)
    return [shown, gates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--times-of", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--forms", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.times_of:  # the last one's are reported
        print(json.dumps([times(options.forms, n, options.device, options.rounds) for n in options.times_of][-1]))
        return
    if options.memory_of:
        optimizer = maker(options.memory_of, "MLP", "cpu")
        others = [nn.Parameter(torch.randn(n)) for n in (100, 30_000, 7)]
        for p in others:
            p.grad = torch.randn(p.shape)
        warm = LearnedOptimizer(others, weights=options.memory_of)
        warm.step()  # what the first step of a process needs once; it stays, so that its memory is not taken up again
        for p in optimizer.param_groups[0]["params"]:
            state = optimizer._state_of(p)
            state["momenta"].fill_(0.0)  # memory is the process's once it is written to
            state |= {"second_moment": torch.ones_like(p), "adam_step": torch.zeros((), dtype=torch.int64)}
        print(json.dumps(extra_memory(optimizer.step, "cpu") / state_size(optimizer)))
        return
    found = tables(options.device, options.rounds)
    for table in found:
        table.show()
    if options.markdown:
        about = environment(options.device, ["torch", "lightning"])
        write_markdown(options.markdown, "Learned optimizers: time and memory of a step", about, found)


if __name__ == "__main__":
    main()
