"""Hyper-networks: what the code vector, which tells the capsules that are present, makes the maps of every class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.ladder_capsule.product import GradientMemory, product

MapInit = Literal["xavier", "unit"]


class Mixture(NamedTuple):
    r"""Maps that are mixtures of others, and are never laid out.

    .. math:: W = \sum_r a_r U_r + U_0, \qquad W^\top v = \sum_r a_r (U_r^\top v) + U_0^\top v, \qquad
        W d = \sum_r U_r (a_r d) + U_0 d

    take as many multiplications as W itself would, and no memory for it.

    Shapes:
        weights `(C, B, R)`; basis `(G, k * d, R * D)` and offset `(G, k * d, D)`, with G = C, or 1 for the same basis
        of all classes; capsule `(k, d)`.
    """

    weights: Tensor
    basis: Tensor
    offset: Tensor
    capsule: tuple[int, int]
    memory: GradientMemory

    @property
    def shape(self) -> torch.Size:
        """(C, B, k, d, D)."""
        return torch.Size((*self.weights.shape[:2], *self.capsule, self.offset.shape[2]))

    def summed(self, votes: Tensor) -> Tensor:
        """Return the poses `(C, B, D)` of capsules `(C, B, k * d)`, summed over these."""
        classes, batch, rank, width = *self.weights.shape, self.offset.shape[2]
        rows = votes.to(self.basis.dtype).reshape(len(self.basis), -1, votes.shape[2])
        mixed = product(rows, self.basis, self.memory).reshape(classes, batch, rank, width)
        offset = (rows @ self.offset).reshape(classes, batch, width)
        return (self.weights[:, :, None] @ mixed).squeeze(2) + offset

    def spread(self, poses: Tensor) -> Tensor:
        """Return the capsules `(C, B, k * d)` of poses `(C, B, D)`."""
        groups, poses = len(self.basis), poses.to(self.basis.dtype)
        mixed = (self.weights[..., None] * poses[:, :, None]).reshape(groups, -1, self.basis.shape[2])
        offset = poses.reshape(groups, -1, poses.shape[2]) @ self.offset.mT
        spread = product(mixed, self.basis, self.memory, transposed=True) + offset
        return spread.reshape(*poses.shape[:2], self.basis.shape[1])


class Maps(NamedTuple):
    """Forward and inverse maps `(C, B, k, d, D)` and the coupling `(C, B, k)`."""

    forward_maps: Mixture
    inverse_maps: Mixture
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


class MapMixer(nn.Module):
    """The last layer of networks that make maps: from its inputs `(C, B, R)` to maps `(C, B, k, d, D)`.

    Args:
        groups: number of classes, or 1 for the same layer of all.
        n_in: number of inputs R.
        shape: (k, d, D).
        init: `"xavier"` or `"unit"`, see `LadderHead`.
    """

    def __init__(self, groups: int, n_in: int, shape: tuple[int, int, int], init: MapInit) -> None:
        super().__init__()
        k, in_dim, out_dim = shape
        self.capsule, self._memory = (k, in_dim), GradientMemory()
        self.weight = nn.Parameter(torch.empty(groups, k * in_dim, n_in * out_dim))
        self.bias = nn.Parameter(torch.empty(groups, k * in_dim, out_dim))
        xavier_(self.weight, n_in, math.prod(shape))
        vector_xavier_(self.bias, math.prod(shape))
        if init == "unit":
            # a pose of length 1 is mapped to a capsule of about length 1
            nn.init.normal_(self.bias, std=1 / math.sqrt(in_dim))

    def forward(self, weights: Tensor) -> Mixture:
        """Return the maps."""
        return Mixture(weights, self.weight, self.bias, self.capsule, self._memory)

    def train(self, mode: bool = True) -> MapMixer:
        """Set the mode; no memory is held for gradients that do not come."""
        if not mode:
            self._memory.release()
        return super().train(mode)


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
        self.num_classes = num_classes
        self.code = CodeLinear(num_caps, [(2 * num_classes, hidden[0]), (num_classes, coupling_hidden[0])])
        self.hidden = _chain(2 * num_classes, hidden).append(nn.ReLU())
        self.forward_maps, self.inverse_maps = (
            MapMixer(num_classes, hidden[-1], (k, in_dim, out_dim), map_init) for _ in range(2)
        )
        self.coupling = _chain(num_classes, [*coupling_hidden, k])

    def forward(self, indices: Tensor) -> Maps:
        """Return the maps and the coupling for the codes at `indices` `(B, k)`."""
        code, coupling = self.code(indices)
        forward, inverse = self.hidden(code).split(self.num_classes)
        return Maps(self.forward_maps(forward), self.inverse_maps(inverse), self.coupling(coupling).sigmoid())


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
        self.num_classes = num_classes
        self.code = CodeLinear(num_caps, [(1, hidden[0])])
        self.trunk = _chain(1, hidden).append(nn.ReLU())
        self.mixture = GroupedLinear(2 * num_classes, hidden[-1], rank)
        self.forward_maps, self.inverse_maps = (MapMixer(1, rank, (k, in_dim, out_dim), map_init) for _ in range(2))
        self.coupling = GroupedLinear(num_classes, hidden[-1], k)

    def forward(self, indices: Tensor) -> Maps:
        """Return the maps and the coupling for the codes at `indices` `(B, k)`."""
        (code,) = self.code(indices)
        trunk = self.trunk(code)
        forward, inverse = self.mixture(trunk.expand(2 * self.num_classes, -1, -1)).split(self.num_classes)
        coupling = self.coupling(trunk.expand(self.num_classes, -1, -1))
        return Maps(self.forward_maps(forward), self.inverse_maps(inverse), coupling.sigmoid())


def _chain(groups: int, widths: Sequence[int]) -> nn.Sequential:
    """Return a ReLU and a linear layer a step from a width to the next."""
    steps = ((nn.ReLU(), GroupedLinear(groups, a, b)) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*itertools.chain.from_iterable(steps))


def xavier_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill with Glorot and Bengio's uniform distribution."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


def vector_xavier_(bias: Tensor, width: int) -> None:
    """Fill biases as the official code does, for whose initialiser both fans of a vector are its length."""
    limit = math.sqrt(3 / width)
    nn.init.uniform_(bias, -limit, limit)
