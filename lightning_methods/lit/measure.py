"""What a network costs: parameters, multiplications, depth, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lightning_methods.lit.sections import first_tensor

_RUNS = 5
_SAMPLES = 8


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        parameters: number of its parameters.
        macs: multiply-accumulate operations for one sample.
        depth: number of its convolutions and linear layers.
        seconds: of one forward pass in eval mode, the median of five, for one sample of those measured.
    """

    parameters: int
    macs: int
    depth: int
    seconds: float


class Example:
    """A few samples of what networks are given, kept to measure them by.

    Args:
        args: what a network was given.
        kwargs: what it was given by name.

    Example:
        >>> example = Example((torch.ones(20, 3), 0.5), {})
        >>> example.samples, example.arguments(nn.Linear(3, 1))[0][0].shape
        (8, torch.Size([8, 3]))
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_tensor((args, kwargs))
        rows = len(first) if first is not None and first.ndim else 1
        self.samples = min(rows, _SAMPLES)

        def some(x: Tensor) -> Tensor:
            few = x[: self.samples] if x.ndim and len(x) == rows else x
            return few.detach().clone()

        self._kept = tree_map_only(Tensor, some, (args, kwargs))

    def arguments(self, network: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to give to a network, on its device."""
        place = next(network.parameters(), torch.empty(0)).device
        return tree_map_only(Tensor, lambda x: x.to(place), self._kept)


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
