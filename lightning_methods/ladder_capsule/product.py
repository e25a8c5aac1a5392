"""Products with weights so large that making room for their gradients takes as long as the product."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 2**25  # bytes; the C library keeps smaller blocks and gives them out again
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class GradientMemory:
    """Memory for one gradient of a weight after another.

    Every training step frees the gradient and allocates it anew; the system then hands it out a page of 4 kB at a
    time, which for hundreds of megabytes takes as long as the product itself. Here the same memory is given out again
    as soon as no tensor lies in it, and never before.

    Example:
        >>> memory = GradientMemory()
        >>> first = memory.take((2, 3), torch.float32)
        >>> memory.take((2, 3), torch.float32).data_ptr() == first.data_ptr()
        False
    """

    def __init__(self) -> None:
        self._whole: np.ndarray | None = None
        self._user: weakref.ref[np.ndarray] | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        kind = _NUMPY[dtype]
        used = self._user is not None and self._user() is not None
        if used or self._whole is None or self._whole.shape != tuple(shape) or self._whole.dtype != kind:
            self._whole = np.empty(tuple(shape), kind)
        # the storage of the tensor, and that of all its views, keeps this object and no other alive
        user = self._whole.view()
        self._user = weakref.ref(user)
        return torch.from_numpy(user)

    def release(self) -> None:
        """Give the memory back; a tensor that lies in it keeps its own."""
        self._whole = self._user = None

    def __reduce__(self) -> tuple[type[GradientMemory], tuple[()]]:
        """Leave the memory behind where the module is copied or saved."""
        return GradientMemory, ()


def product(x: Tensor, weight: Tensor, memory: GradientMemory, *, transposed: bool = False) -> Tensor:
    """Return `x @ weight`, or `x @ weight.mT`; the gradient of a large weight on a CPU lies in `memory`.

    Shapes:
        x `(G, B, n)`, weight `(G, n, m)` -> `(G, B, m)`; transposed x `(G, B, m)` -> `(G, B, n)`.

    Example:
        >>> product(torch.ones(1, 2, 3), torch.ones(1, 3, 4), GradientMemory()).shape
        torch.Size([1, 2, 4])
    """
    special = (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.dtype in _NUMPY
        and weight.nbytes >= LARGE
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    if special:
        return _Product.apply(x, weight, memory, transposed)
    return x @ (weight.mT if transposed else weight)


class _Product(torch.autograd.Function):
    """`x @ weight`, and where the gradient of the weight goes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, memory: GradientMemory, transposed: bool) -> Tensor:
        return x @ (weight.mT if transposed else weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, GradientMemory, bool], output: Tensor) -> None:
        x, weight, ctx.memory, ctx.transposed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ (weight if ctx.transposed else weight.mT)
        if ctx.needs_input_grad[1]:
            left, right = (gradient, x) if ctx.transposed else (x, gradient)
            # a gradient that is itself to be differentiated cannot be written into given memory
            room = None if torch.is_grad_enabled() else ctx.memory.take(weight.shape, weight.dtype)
            of_weight = left.mT @ right if room is None else torch.bmm(left.mT, right, out=room)
        return of_x, of_weight, None, None
