"""Disturbances as small as rounding, which show how far a training amplifies them."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from typing import Literal

import torch
from torch import nn

from lightning_methods.errors import UnsupportedTraining
from lightning_methods.reproducibility.seeding import Stream

Kind = Literal["ulp", "threads", "hardware"]
KINDS = ("ulp", "threads", "hardware")

# so many weights are drawn in search of one that is not zero, whose neighbour is a denormal number
_TRIES = 1000


def disturb(kind: Kind, stream: Stream, module: nn.Module) -> str:
    """Disturb a training before its first step, and return what was done.

    Args:
        kind: `"ulp"`, `"threads"` or `"hardware"`, see `SeedStreams`.
        stream: which weight, or how many threads, is drawn from it.
        module: whose weight is moved.

    Raises:
        UnsupportedTraining: for `"ulp"`, if no weight is trained.
    """
    if kind == "threads":
        threads = 1 + stream.key() % (os.cpu_count() or 1)
        torch.set_num_threads(threads)
        return f"threads{threads}"
    return one_ulp(stream, module) if kind == "ulp" else "hardware"


def one_ulp(stream: Stream, module: nn.Module) -> str:
    """Move one trained weight to the next larger number of its type, and return its name and place."""
    trained = [(k, p) for k, p in module.named_parameters() if p.requires_grad and p.is_floating_point() and p.numel()]
    ends = list(accumulate(p.numel() for _, p in trained))
    for i in range(_TRIES if ends else 0):
        place = stream.key(i) % ends[-1]
        which = bisect_right(ends, place)
        name, parameter = trained[which]
        place -= ends[which] - parameter.numel()
        at = torch.unravel_index(torch.tensor(place), parameter.shape)
        weight = parameter.data[at]
        if weight != 0:
            parameter.data[at] = torch.nextafter(weight, torch.full_like(weight, torch.inf))
            return f"{name}[{place}]"
    raise UnsupportedTraining("numerical_kind='ulp' moves a trained weight that is not zero; the module has none.")
