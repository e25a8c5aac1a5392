"""Weighted means over an epoch of what is measured at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_methods.core.gather import all_sum


class EpochMeans:
    """Sums of the running epoch, in float64 and on their device until they are read.

    `log` at every step costs more than a small network's step; this costs an addition a value, and `log` is called
    once an epoch.

    Example:
        >>> means = EpochMeans()
        >>> means.add({"loss": 1.0}, weight=3)
        >>> means.add({"loss": 5.0}, weight=1)
        >>> means.close()
        {'loss': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: int) -> None:
        """Add the values of a step, which stands for `weight` samples."""
        for key, value in values.items():
            value = torch.as_tensor(value).detach().double() * weight
            before = self._sums.get(key)
            self._sums[key] = value if before is None else before.to(value.device) + value
            self._weights[key] = self._weights.get(key, 0) + weight

    def close(self) -> dict[str, float]:
        """Return the means over all ranks and start anew; every rank must call it."""
        if not self._sums:
            return {}
        keys = list(self._sums)
        device = next((s.device for s in self._sums.values() if s.device.type != "cpu"), torch.device("cpu"))
        sums = torch.stack([self._sums[key].to(device) for key in keys])
        weights = torch.tensor([self._weights[key] for key in keys], dtype=torch.float64, device=device)
        totals = all_sum(torch.stack([sums, weights]))
        self._sums, self._weights = {}, {}
        return dict(zip(keys, (totals[0] / totals[1]).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, as tensors and plain builtins."""
        return {"sums": {key: value.cpu() for key, value in self._sums.items()}, "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])
