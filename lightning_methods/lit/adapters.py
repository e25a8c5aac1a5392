"""Between sections of different widths: an extension, since the paper's students are as wide as their teachers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument, ShapeMismatch

Adapters = Literal["none", "conv1x1", "select"]


class ChannelMap(nn.Module):
    """A linear map along the one dimension in which two shapes differ: a 1x1 convolution for images.

    Shapes:
        any tensor with `before` entries in dimension `dim` -> the same with `after`.

    Args:
        dim: the dimension, which is not the batch's.
        before: entries of the input.
        after: entries of the output.

    Example:
        >>> ChannelMap(1, 4, 6)(torch.ones(2, 4, 5, 5)).shape
        torch.Size([2, 6, 5, 5])
    """

    def __init__(self, dim: int, before: int, after: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped tensor."""
        return self.linear(x.movedim(self.dim, -1)).movedim(-1, self.dim)


class ChannelSelection(nn.Module):
    """Every n-th entry of the one dimension in which two shapes differ: no parameter, and signs stay.

    Shapes:
        any tensor with `before` entries in dimension `dim` -> the same with `after`.

    Args:
        dim: the dimension, which is not the batch's.
        before: entries of the input.
        after: entries of the output, at most `before`.

    Raises:
        InvalidArgument: if `after` is more than `before`.

    Example:
        >>> ChannelSelection(1, 6, 3)(torch.arange(6.0)[None])
        tensor([[0., 2., 4.]])
    """

    index: Tensor

    def __init__(self, dim: int, before: int, after: int) -> None:
        super().__init__()
        if after > before:
            raise InvalidArgument(
                f"adapters='select' cannot choose {after} channels out of {before}: the student must be the narrower "
                f"one. Use adapters='conv1x1'."
            )
        self.dim = dim
        self.register_buffer("index", torch.arange(after) * before // after, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the selected entries."""
        return x.index_select(self.dim, self.index)


class Adapter(nn.Module):
    """What stands between one section's pair: on the teacher's input, the student's output and the teacher's output.

    Args:
        kind: `"conv1x1"` maps the teacher's input to the student's width and the student's output to the teacher's,
            both learned; `"select"` takes a fixed choice of the teacher's channels for both.
        given: the teacher's and the student's shape of the section's input; `None` where it gets the student's own.
        returned: theirs of its output.

    Raises:
        ShapeMismatch: if shapes differ in more than one dimension.

    Example:
        >>> adapter = Adapter("conv1x1", ((2, 8, 4, 4), (2, 6, 4, 4)), ((2, 8, 4, 4), (2, 6, 4, 4)))
        >>> adapter.input(torch.ones(2, 8, 4, 4)).shape
        torch.Size([2, 6, 4, 4])
        >>> output, target = adapter.pair(torch.ones(2, 6, 4, 4), torch.ones(2, 8, 4, 4))
        >>> output.shape == target.shape
        True
    """

    def __init__(
        self,
        kind: Literal["conv1x1", "select"],
        given: tuple[tuple[int, ...], tuple[int, ...]] | None,
        returned: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> None:
        super().__init__()
        channels = ChannelMap if kind == "conv1x1" else ChannelSelection
        self.input: nn.Module = nn.Identity() if given is None else _between(channels, *given)
        self.output: nn.Module = nn.Identity()
        self.target: nn.Module = nn.Identity()
        if kind == "conv1x1":
            self.output = _between(channels, returned[1], returned[0])
        else:
            self.target = _between(channels, *returned)

    def pair(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's output and the teacher's, of one shape."""
        return self.output(output), self.target(target)


def _between(
    channels: type[ChannelMap] | type[ChannelSelection], before: tuple[int, ...], after: tuple[int, ...]
) -> nn.Module:
    differing = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if len(before) != len(after) or len(differing) > 1 or 0 in differing:
        raise ShapeMismatch(
            f"An adapter maps one dimension, not the batch's; it cannot go from {before} to {after}. Cut the networks "
            f"where their maps have the same size."
        )
    return channels(differing[0], before[differing[0]], after[differing[0]]) if differing else nn.Identity()
