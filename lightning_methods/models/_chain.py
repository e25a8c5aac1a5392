"""A chain of named layers whose slices are plain chains."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


class Chain(nn.Sequential):
    """`nn.Sequential` with a constructor of its own; torch would call that constructor to build a slice."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
