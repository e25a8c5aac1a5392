"""Runs the Triton kernels in the interpreter, on a CPU, against torch's operations; prints the largest differences.

The interpreter rounds to bfloat16 towards zero, a GPU to the nearest: the difference there is a few units of the last
place.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import torch
from torch import nn

from lightning_methods import LearnedOptimizer
from lightning_methods.learned_optimizer import Architecture
from lightning_methods.learned_optimizer.fused import FusedEngine
from lightning_methods.learned_optimizer.weights import Weights

SHAPES = [(3,), (), (33, 32), (4, 3, 3, 3), (0,)]
CASES = {
    "paper": {"max_grad_norm": 0.5, "maximize": True, "weight_decay": 0.1},
    "normalised": {"features": "signal", "normalize_step": True, "step_mult": 1e-2, "scale": 1e25},
    "bf16": {"dtype": torch.bfloat16, "step_mult": 1e-2},
    "adam": {"trust": 0.5},
    "late": {"features": "signal", "normalize_step": True, "step_mult": 1e-2, "clock": 1, "steps": 4, "maximize": True},
    "wide": {"width": 10, "steps": 3},
    "nan": {"scale": float("nan"), "steps": 1, "nonfinite": "propagate"},
}


def run(kernels: bool, *, dtype=torch.float32, scale=1.0, trust=1.0, steps=2, clock=None, width=None, **settings):
    names = ("max_grad_norm", "maximize", "weight_decay", "nonfinite")
    options = {k: settings.pop(k) for k in names if k in settings}
    a = Architecture(hidden_size=3, **settings)
    weights = Weights("made", a, a.initial(torch.Generator().manual_seed(1)), {"clock": clock, "width": width})
    generator = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    params[3] = nn.Parameter(params[3].detach().to(memory_format=torch.channels_last))
    with patch("lightning_methods.learned_optimizer.optimizer.is_usable", lambda *_: kernels):
        optimizer = LearnedOptimizer(params, weights=weights, **options)
        optimizer.guard.trust = trust
        for _ in range(steps):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
            optimizer.step()
    assert isinstance(next(iter(optimizer._networks.values())), FusedEngine) == kernels
    names = ("momenta", "second_moment")
    return params, [s[name] for s in optimizer.state.values() for name in names if name in s]


def difference(case: dict) -> float:
    (params, momenta), (others, rows) = run(True, **case), run(False, **case)
    scale = case.get("scale", 1.0)
    pairs = list(zip(params, others, strict=True))
    pairs += [(a / scale, b / scale) for a, b in zip(momenta, rows, strict=True)]
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs if a.numel())


if __name__ == "__main__":
    run(False, steps=1)
    assert not any(name.startswith("lightning_methods.learned_optimizer.kernels") for name in sys.modules)
    assert all(bool(p.isnan().all()) for p in run(True, **CASES.pop("nan"))[0])
    print(json.dumps({name: difference(case) for name, case in CASES.items()}))
