"""Weighted sampling that also works on several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_methods.core.gather import rank as own_rank
from lightning_methods.core.gather import world_size
from lightning_methods.errors import InvalidArgument
from lightning_methods.importance_weighting.functional import check_weights, check_whole


class DistributedWeightedSampler(DistributedSampler):
    r"""Draw samples with probability proportional to their weights, each rank its part of one common draw.

    .. math:: P(i) = w_i / \textstyle\sum_j w_j

    One draw of `num_samples` indices is made from `seed + epoch` on every rank alike, and rank r takes every R-th of it
    from r on. So the ranks together are exactly the sampler of one process (whose batches are the joined ones), and
    with replacement each index is expected `num_samples * P(i)` times an epoch. Lightning calls `set_epoch` by itself
    and leaves the sampler alone, whatever `use_distributed_sampler` says.

    Args:
        weights: one for each item of the dataset.
        num_samples: of all ranks in an epoch. Default as many as there are weights. Where it is no multiple of the
            ranks the first ones are drawn again to fill up, or `drop_last`.
        replacement: whether an item may come twice in an epoch. Default True; without it items of large weight come
            early, and with `num_samples` of all items the weights only order them.
        seed: of the draws.
        num_replicas: number of ranks. Default those of `torch.distributed`, asked for when it is needed.
        rank: of this process, likewise.
        drop_last: whether to leave out the rest rather than to fill up.

    Raises:
        InvalidArgument: for weights that are negative, not finite or all 0, and for a number of samples that cannot be
            drawn.

    Example:
        >>> sampler = DistributedWeightedSampler([0.0, 1.0, 0.0], num_samples=4)
        >>> list(sampler)
        [1, 1, 1, 1]
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        num_samples: int | None = None,
        *,
        replacement: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        # not DistributedSampler's own __init__, which needs the process group and the dataset at once; the base class
        # is what makes Lightning leave the sampler as it is
        self.weights = check_weights(weights)
        if self.weights.ndim != 1:
            raise InvalidArgument(
                f"The weights have the shape {tuple(self.weights.shape)}; one for each item is needed."
            )
        self.total = len(self.weights) if num_samples is None else num_samples
        check_whole("num_samples", self.total, 1)
        check_whole("seed", seed, 0)
        drawable = int((self.weights > 0).sum())
        if not replacement and self.total > drawable:
            raise InvalidArgument(
                f"num_samples={self.total}: without replacement at most {drawable} are there to draw, as many as have "
                f"a positive weight."
            )
        if (num_replicas is None) != (rank is None) or (rank is not None and not 0 <= rank < (num_replicas or 0)):
            raise InvalidArgument(f"num_replicas={num_replicas}, rank={rank}: both, with 0 <= rank < num_replicas.")
        self.replacement, self.seed, self.drop_last, self.shuffle = replacement, seed, drop_last, True
        self._given = (num_replicas, rank)
        self.dataset: Dataset = _Items(len(self.weights))
        self.epoch = 0
        self.start = 0
        self._taken = 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of ranks."""
        return self._given[0] or world_size()

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Of this process."""
        return own_rank() if self._given[1] is None else self._given[1]

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples of this rank in an epoch."""
        ranks = self.num_replicas
        return self.total // ranks if self.drop_last else -(-self.total // ranks)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of all ranks in an epoch."""
        return self.num_samples * self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        indices = self.drawn()
        if len(indices) < self.total_size:
            indices = torch.cat([indices, indices.repeat(-(-self.total_size // len(indices)))])
        own = indices[: self.total_size][self.rank :: self.num_replicas].tolist()
        start, self.start = self.start, 0
        for taken in range(start, len(own)):
            self._taken = taken + 1
            yield own[taken]

    def drawn(self) -> Tensor:
        """Return the indices of all ranks for this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        uniform = torch.rand(self.total if self.replacement else len(self.weights), generator=generator).double()
        # float32 has 24 bits: a second draw fills in the rest, so that no item of a large dataset is out of reach
        uniform += torch.rand(len(uniform), generator=generator).double() * 2.0**-24
        if self.replacement:
            # not torch.multinomial, which takes at most 2^24 weights and rounds them to float32
            cumulative = self.weights.cumsum(0)
            return torch.searchsorted(cumulative, uniform * cumulative[-1] / (1 + 2.0**-24), right=True).clamp(
                max=int(self.weights.nonzero()[-1])
            )
        # the smallest of exponential waiting times with the weights as rates (Efraimidis and Spirakis)
        waiting = torch.where(self.weights > 0, -torch.log1p(-uniform.clamp(max=1 - 1e-12)) / self.weights, torch.inf)
        return waiting.argsort()[: self.total]

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw; the same epoch gives the same indices."""
        check_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and position, for loaders that resume within an epoch."""
        return {"epoch": self.epoch, "position": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned: the next iteration goes on there.

        Raises:
            InvalidArgument: for the state of something else.
        """
        if not {"epoch", "position"} <= state_dict.keys():
            raise InvalidArgument(f"The state has {sorted(state_dict)}; 'epoch' and 'position' are needed.")
        self.epoch = state_dict["epoch"]
        self.start = state_dict["position"] % max(len(self), 1)


class _Items(Dataset):
    """Stands for the dataset, of which a sampler needs only the length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index
