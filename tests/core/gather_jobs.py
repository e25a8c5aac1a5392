"""What the tests of gathering run on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_methods.core.gather import all_sum, gather_rows, gather_sizes, local_rows, rank, world_size
from lightning_methods.errors import ShapeMismatch

# rows of each rank; the first so many are used
SIZES = {"equal": (4, 4, 4), "unequal": (5, 1, 3), "one without rows": (3, 0, 2), "nobody has rows": (0, 0, 0)}
# shape on rank 0, and on the others
MISFITS = {
    "width": ((2, 3), (2, 4)),
    "dimensions": ((2, 3, 1), (2, 3)),
    "transposed": ((2, 3, 4), (2, 4, 3)),
    "no rows": ((2, 3), (0, 1)),
}


def joined(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pairwise(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return a sum over own rows that every other row has a part in."""
    flat = x.flatten(1)
    return (flat[rows, None] - flat).square().sum(2).exp().neg().exp().sum()


def on_every_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"rank": rank(), "world size": world_size(), "sum": all_sum(torch.tensor(rank() + 1.0))}
    for name, sizes in SIZES.items():
        sizes = sizes[: world_size()]
        mine = slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))
        x = joined(sizes)[mine].requires_grad_()
        assert gather_sizes(len(x), x.device) == list(sizes)
        assert local_rows(list(sizes)) == mine
        together = gather_rows(x)
        pairwise(together, mine).backward()
        found[name] = {"rows": together.detach(), "gradient": x.grad, "labels": gather_rows(torch.arange(len(x)))}
    for name, shape in MISFITS.items():
        try:
            gather_rows(torch.zeros(shape[min(rank(), 1)]))
        except ShapeMismatch as error:
            found[name] = str(error)
    dist.destroy_process_group()
    return found
