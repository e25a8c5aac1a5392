"""Gather rows of all ranks, in rank order, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_methods.errors import ShapeMismatch

_MOST_DIMENSIONS = 16  # of a row, when shapes are compared


def world_size() -> int:
    """Return the number of processes that train together, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_sizes(rows: int, device: torch.device) -> list[int]:
    """Return how many rows each rank holds; every rank must call it."""
    if world_size() == 1:
        return [rows]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(size) for size in sizes]


def gather_rows(x: Tensor, sizes: list[int] | None = None) -> Tensor:
    r"""Join the rows of all ranks in rank order; the gradient of every rank's loss flows back to the rows it used.

    The backward pass sums the gradients of all ranks. DistributedDataParallel then averages the parameters' gradients,
    so a rank's loss must be `world_size` times its share of a global sum for the step to be that of one process on the
    joined batch.

    Shapes:
        `x (B_r, ...)` -> `(B_0 + B_1 + ..., ...)`; the number of rows may differ between ranks and may be 0, all other
        dimensions must agree. Without `torch.distributed` `x` itself is returned.

    Args:
        x: the rows of this rank. Every rank must call, in the same order, with the same dtype.
        sizes: what `gather_sizes` returned, to ask once for several tensors.

    Raises:
        ShapeMismatch: on every rank, if the dimensions after the first differ between ranks.

    Example:
        >>> import torch
        >>> gather_rows(torch.arange(3.0))
        tensor([0., 1., 2.])
    """
    if world_size() == 1:
        return x
    if sizes is None:
        sizes = gather_sizes(len(x), x.device)
    _check_same_row_shape(x)
    gathered: Tensor = _GatherRows.apply(x, tuple(sizes))
    return gathered


def local_rows(sizes: list[int]) -> slice:
    """Return where the rows of this rank lie in what `gather_rows` returned."""
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def all_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over the ranks, without gradient."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def _check_same_row_shape(x: Tensor) -> None:
    # compared on every rank, so that all of them raise and none is left waiting in the next collective
    shape = torch.full((_MOST_DIMENSIONS,), -1, dtype=torch.int64, device=x.device)
    shape[: x.ndim - 1] = torch.tensor(x.shape[1:], dtype=torch.int64)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    known = {tuple(size for size in s.tolist() if size >= 0) for s in shapes}
    if len(known) > 1:
        raise ShapeMismatch(
            f"The ranks hold rows of different widths: {sorted(known)}. "
            "Pool the layer to a fixed width, for instance with pool='gap'."
        )


class _GatherRows(torch.autograd.Function):
    """`all_gather` of padded rows forward, sum over ranks and own slice backward.

    torch's own autograd version is deprecated, needs equal shapes, and its successor is private.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # all ranks take part, also one whose own rows got no gradient
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[local_rows(list(ctx.sizes))], None
