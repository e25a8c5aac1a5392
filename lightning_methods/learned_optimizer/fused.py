"""The step on a GPU: two launches of Triton kernels for all tensors together, three where steps are normalised."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.chunks import Entry
from lightning_methods.learned_optimizer.fast import Engine, Settings
from lightning_methods.learned_optimizer.functional import ADAM, TIMES, time_features


@cache
def kernels() -> Any:
    """Return the module of kernels, or None where Triton is not installed or does not load."""
    try:
        return import_module("lightning_methods.learned_optimizer.kernels")
    except (ImportError, RuntimeError, OSError):
        return None


def is_usable(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether there are kernels for it; the same numbers come from torch's operations where there are none.

    Args:
        architecture: with one hidden layer, and the inputs of the paper with or without signals.
        dtype: float32, the precision of the computation.
        device: a GPU.
    """
    has = architecture.features in ("paper", "signal") and architecture.hidden_layers == 1 and dtype == torch.float32
    return has and device.type == "cuda" and kernels() is not None


class FusedEngine(Engine):
    """An engine whose step is two launches, whatever the number of tensors.

    Args:
        architecture: of the optimizer; `is_usable`.
        theta: its weights.
        dtype: of the computation.
        device: of the parameters.
    """

    def __init__(self, architecture: Architecture, theta: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(architecture, theta, dtype, device)
        a = architecture
        w0 = self.weights["w0"]
        self._first = w0[: a.elements].mT.contiguous()
        # without signals never read, but there has to be an address
        self._signals = w0[a.inputs - 8 :].mT.contiguous() if a.features == "signal" else self._first
        self._decays = self.kept.flatten()
        # on the CPU: one small copy a step is less than the launches to compute it there
        self._times, self._bias = self.exact["w0"][a.elements : a.elements + len(TIMES)].cpu(), self.exact["b0"].cpu()
        self._blocks: dict[tuple[int, ...], Tensor] = {}
        self._table: tuple[list[list[int]], Tensor] | None = None

    def _together(self, entries: Sequence[Entry], settings: Settings, room: int) -> None:
        device = self.like.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._launch(entries, settings)

    def _launch(self, entries: Sequence[Entry], settings: Settings) -> None:
        """Update tensors that flatten without a copy, all of one type, with gradients of one type."""
        own, a, count = kernels(), self.architecture, len(entries)
        table, blocks = self._addresses(entries), self._blocks_of(tuple(e.parameter.numel() for e in entries))
        squares, totals = self.like.new_zeros(10 * count, dtype=torch.float64).split([8 * count, 2 * count])
        types = {"P": own.TYPES[entries[0].parameter.dtype], "G": own.TYPES[entries[0].gradient.dtype]}
        grid, types["BLOCK"] = (len(blocks),), own.BLOCK
        own.advance[grid](table, blocks, self._decays, squares, settings.gradient, **types)
        bias = self._bias + time_features(settings.time, dtype=torch.float64) @ self._times
        mixes = [x for e in entries for x in (e.share, 1 / (1 - ADAM[1] ** e.age) if e.age else 1.0)]
        moved = torch.cat([bias, torch.tensor(mixes, dtype=torch.float64)]).to(self.like)
        bias, shares = moved.split([a.hidden_size, 2 * count])
        network = (self._first, self._signals, bias, self.last, shares)
        adam = (settings.adam_lr, 1 / (1 - ADAM[0] ** (settings.time + 1)))
        numbers = (settings.gradient, a.step_mult * settings.size, settings.limit, a.eps, *adam)
        arguments = (table, blocks, squares, totals, *network, *numbers)
        form = types | {"H": a.hidden_size, "SIGNAL": a.features == "signal", "NORMALIZE": a.normalize_step}
        form["ADAM"] = any(e.age for e in entries)
        if a.normalize_step:
            own.move[grid](*arguments, ADD=True, **form)
        own.move[grid](*arguments, ADD=False, **form)

    def _addresses(self, entries: Sequence[Entry]) -> Tensor:
        """Return where parameter, gradient and momenta of each tensor are, its size, and where Adam's moment is."""
        table = []
        for p, g, state, _, age in entries:
            second = state["second_moment"].data_ptr() if age else 0
            table.append([p.data_ptr(), g.data_ptr(), state["momenta"].data_ptr(), p.numel(), second])
        if self._table is None or self._table[0] != table:
            self._table = table, torch.tensor(table, dtype=torch.int64, device=self.like.device)
        return self._table[1]

    def _blocks_of(self, sizes: tuple[int, ...]) -> Tensor:
        """Return the tensor of each block, and the first of its elements, `(blocks, 2)`."""
        if sizes not in self._blocks:
            if len(self._blocks) >= 64:
                self._blocks.clear()
            size = kernels().BLOCK
            counts = torch.tensor([-(-n // size) for n in sizes])
            tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            begin = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
            self._blocks[sizes] = torch.stack([tensors, size * begin], 1).contiguous().to(self.like.device)
        return self._blocks[sizes]
