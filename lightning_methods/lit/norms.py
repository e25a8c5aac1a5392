"""Which of several passes of a step updates the running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def statistics_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave running statistics as they are while layers in training mode run on their batch statistics.

    Batch norm (also synchronised) is told not to track; instance norm, which updates its buffers whatever it is told,
    gets momentum 0. Layers in eval mode are not touched.

    Args:
        modules: of which the normalisation layers are found.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> with statistics_kept([norm]):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean, int(norm.num_batches_tracked)
        (tensor([0., 0.]), 0)
    """
    undo: list[tuple[nn.Module, str, Any]] = []
    for module in modules:
        if not module.training:
            continue
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            undo.append((module, "track_running_stats", True))
            module.track_running_stats = False
        elif isinstance(module, _InstanceNorm) and module.running_mean is not None:
            undo.append((module, "momentum", module.momentum))
            module.momentum = 0.0
    try:
        yield
    finally:
        for module, attribute, value in undo:
            setattr(module, attribute, value)
