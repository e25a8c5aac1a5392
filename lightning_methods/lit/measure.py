"""What a network costs: parameters, multiplications, depth, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

_RUNS = 5


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        parameters: number of its parameters.
        macs: multiply-accumulate operations for one sample.
        depth: number of its convolutions and linear layers.
        seconds: of one forward pass in eval mode, the median of five, for one sample of the batch measured.
    """

    parameters: int
    macs: int
    depth: int
    seconds: float


def cost_of(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> NetworkCost:
    """Return what a network costs; its mode is to be eval, no gradient is taken.

    Args:
        network: what to measure.
        args: what it is given.
        kwargs: what it is given by name.
        samples: how many samples that is.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> cost = cost_of(net, (torch.zeros(10, 4),), {}, 10)
        >>> cost.parameters, cost.macs, cost.depth
        (23, 18, 2)
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:  # compiled code hides its operations
        network(*args, **kwargs)
    return NetworkCost(
        sum(p.numel() for p in network.parameters()),
        counter.get_total_flops() // 2 // samples,
        sum(isinstance(m, (_ConvNd, nn.Linear)) for m in network.modules()),
        seconds_of(lambda: network(*args, **kwargs)) / samples,
    )


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the median time of a run without gradient, after one that does not count."""
    times = []
    with torch.no_grad():
        for _ in range(_RUNS + 1):
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
