"""Hyper-networks: what the code vector, which tells the capsules that are present, makes the maps of every class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MapInit = Literal["xavier", "unit"]


class Maps(NamedTuple):
    """Forward and inverse maps `(C, B, k, d, D)` and the coupling `(C, B, k)`."""

    forward_maps: Tensor
    inverse_maps: Tensor
    coupling: Tensor


class GroupedLinear(nn.Module):
    """Linear layers side by side, one a group, in one product: `(G, B, n_in)` -> `(G, B, n_out)`."""

    def __init__(self, groups: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(groups, 1, n_out))
        xavier_(self.weight, n_in, n_out)
        vector_xavier_(self.bias, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return what every group makes of its own rows."""
        return torch.baddbmm(self.bias, x, self.weight)


class CodeLinear(nn.Module):
    """The first layers of all networks that read the code vector, as a sum of k rows instead of a dense product.

    Shapes:
        positions `(B, k)` -> a list of `(G, B, width)`, one a pair (G, width) of `blocks`.

    Args:
        num_caps: number of capsules, the length of the code vector.
        blocks: (groups, width) of networks that read it.
    """

    def __init__(self, num_caps: int, blocks: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        total = sum(groups * width for groups, width in blocks)
        self.weight = nn.Parameter(torch.empty(num_caps, total))
        self.bias = nn.Parameter(torch.empty(total))
        for (_, width), rows, shift in zip(blocks, self._split(self.weight), self._split(self.bias), strict=True):
            xavier_(rows, num_caps, width)
            vector_xavier_(shift, width)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([groups * width for groups, width in self.blocks], dim=-1)

    def forward(self, indices: Tensor) -> list[Tensor]:
        """Return the products of the code vector with the weights of every group."""
        summed = F.embedding_bag(indices, self.weight, mode="sum") + self.bias
        shaped = (x.unflatten(1, block) for x, block in zip(self._split(summed), self.blocks, strict=True))
        return [x.transpose(0, 1) for x in shaped]


class PerClassHyperNetworks(nn.Module):
    """Three networks a class as in the paper, no weight shared: 75.5 million parameters at the official size.

    Args:
        num_caps: number of capsules N.
        num_classes: number of classes C.
        k: number of capsules that are kept.
        in_dim: dimension d of a capsule.
        out_dim: dimension D of a pose.
        hidden: hidden widths of the networks that make the maps.
        coupling_hidden: hidden widths of the network that makes the coupling.
        map_init: `"xavier"` for all layers as in the official code; `"unit"`, which see in `LadderHead`.
    """

    def __init__(
        self,
        num_caps: int,
        num_classes: int,
        k: int,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int],
        coupling_hidden: Sequence[int],
        map_init: MapInit,
    ) -> None:
        super().__init__()
        self.shape = (k, in_dim, out_dim)
        self.num_classes = num_classes
        self.code = CodeLinear(num_caps, [(2 * num_classes, hidden[0]), (num_classes, coupling_hidden[0])])
        last = GroupedLinear(2 * num_classes, hidden[-1], math.prod(self.shape))
        self.maps = _chain(2 * num_classes, hidden).append(nn.ReLU()).append(last)
        self.coupling = _chain(num_classes, [*coupling_hidden, k])
        if map_init == "unit":
            unit_maps_(last, in_dim)

    def forward(self, indices: Tensor) -> Maps:
        """Return the maps and the coupling for the codes at `indices` `(B, k)`."""
        maps, coupling = self.code(indices)
        maps = self.maps(maps).unflatten(-1, self.shape)
        forward_maps, inverse_maps = maps.split(self.num_classes)
        return Maps(forward_maps, inverse_maps, self.coupling(coupling).sigmoid())


class SharedHyperNetworks(nn.Module):
    r"""One trunk for all classes, and maps of low rank: 2.2 million parameters in place of 75.5 million (ours).

    .. math:: W_j = \sum_r a_{jr}(c)\, U_r + U_0, \qquad a_j(c) = A_j\, h(c) + b_j

    with a trunk :math:`h` that reads the code vector, a mixture :math:`A_j` of each class and `rank` maps
    :math:`U_r` that all classes share; likewise the inverse maps. The coupling is linear in :math:`h` before its
    sigmoid.

    Args:
        rank: number of maps that are mixed.
        num_caps, num_classes, k, in_dim, out_dim, hidden, map_init: as in `PerClassHyperNetworks`.
    """

    def __init__(
        self,
        num_caps: int,
        num_classes: int,
        k: int,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int],
        rank: int,
        map_init: MapInit,
    ) -> None:
        super().__init__()
        self.shape = (k, in_dim, out_dim)
        self.num_classes = num_classes
        self.code = CodeLinear(num_caps, [(1, hidden[0])])
        self.trunk = nn.Sequential(*_chain(1, hidden), nn.ReLU())
        self.mixture = GroupedLinear(2 * num_classes, hidden[-1], rank)
        self.basis = GroupedLinear(2, rank, math.prod(self.shape))
        self.coupling = GroupedLinear(num_classes, hidden[-1], k)
        if map_init == "unit":
            unit_maps_(self.basis, in_dim)

    def forward(self, indices: Tensor) -> Maps:
        """Return the maps and the coupling for the codes at `indices` `(B, k)`."""
        (code,) = self.code(indices)
        trunk = self.trunk(code)
        mixture = self.mixture(trunk.expand(2 * self.num_classes, -1, -1))
        maps = self.basis(mixture.reshape(2, -1, mixture.shape[-1]))
        forward_maps, inverse_maps = maps.reshape(2, self.num_classes, -1, *self.shape)
        coupling = self.coupling(trunk.expand(self.num_classes, -1, -1))
        return Maps(forward_maps, inverse_maps, coupling.sigmoid())


def _chain(groups: int, widths: Sequence[int]) -> nn.Sequential:
    """Return a ReLU and a linear layer a step from a width to the next."""
    steps = ((nn.ReLU(), GroupedLinear(groups, a, b)) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*itertools.chain.from_iterable(steps))


def unit_maps_(last: GroupedLinear, in_dim: int) -> None:
    """Draw biases that map a pose of length 1 to a capsule of about length 1."""
    nn.init.normal_(last.bias, std=1 / math.sqrt(in_dim))


def xavier_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill with Glorot and Bengio's uniform distribution."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


def vector_xavier_(bias: Tensor, width: int) -> None:
    """Fill biases as the official code does, for whose initialiser both fans of a vector are its length."""
    limit = math.sqrt(3 / width)
    nn.init.uniform_(bias, -limit, limit)
