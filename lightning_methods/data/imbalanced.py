"""A part of a labelled dataset with chosen class sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from lightning_methods.data._checks import check_at_least
from lightning_methods.data.labels import count_classes, find_labels
from lightning_methods.errors import InvalidArgument, check_choice


class ImbalancedSubset(Subset):
    """The part of a dataset that has exactly the class sizes asked for.

    With `ratio` r, the size of class c out of C is, rounded down,

    - `exponential` (long-tailed): `n * r ** (-c / (C - 1))`,
    - `step`: n for the first C // 2 classes, `n / r` for the others,

    with n as large as the dataset allows. On CIFAR-10 with r = 100 this gives the usual 5000, 2997, ..., 50. For one
    seed a smaller class is a part of the larger one that another setting draws.

    Args:
        dataset: map-style; labels as `find_labels` finds them.
        counts: examples of every class in order, or a mapping from class to examples (the classes it does not name
            keep all). Give this or `ratio`.
        ratio: size of the largest class over that of the smallest, 1 or more.
        profile: how the sizes fall with the class number, `exponential` (default) or `step`; used with `ratio`.
        seed: decides which examples stay. Default 0; no global generator is read or moved.

    Attributes:
        targets: (N,) labels of the examples that stay.
        indices: their positions in `dataset`, ascending.
        counts: size of every class.

    Raises:
        InvalidArgument: if the sizes are impossible with this dataset.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> whole = TensorDataset(torch.zeros(400, 2), torch.arange(400) % 4)
        >>> ImbalancedSubset(whole, ratio=8).counts
        [100, 50, 25, 12]
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        counts: Sequence[int] | Mapping[int, int] | None = None,
        ratio: float | None = None,
        profile: Literal["exponential", "step"] = "exponential",
        seed: int = 0,
    ) -> None:
        check_choice("profile", profile, ("exponential", "step"))
        if (counts is None) == (ratio is None):
            raise InvalidArgument(f"counts={counts} and ratio={ratio}: exactly one of the two is needed.")
        check_at_least("seed", seed, 0)
        labels = find_labels(dataset)
        available = torch.bincount(labels, minlength=count_classes(labels, None)).numpy()
        if counts is not None:
            self.counts = _given_counts(counts, available)
        else:
            assert ratio is not None
            self.counts = _profile_counts(ratio, profile, available)
        kept = [
            np.random.default_rng([seed, c]).permutation(np.flatnonzero(labels.numpy() == c))[:n]
            for c, n in enumerate(self.counts)
        ]
        super().__init__(dataset, np.sort(np.concatenate(kept)).tolist())
        self.targets = labels[torch.as_tensor(self.indices, dtype=torch.long)]


def _given_counts(counts: Sequence[int] | Mapping[int, int], available: np.ndarray) -> list[int]:
    if isinstance(counts, Mapping):
        unknown = sorted(set(counts) - set(range(len(available))))
        if unknown:
            raise InvalidArgument(f"counts names the classes {unknown}. The dataset has 0 to {len(available) - 1}.")
        sizes = [int(counts.get(c, n)) for c, n in enumerate(available)]
    else:
        sizes = [int(n) for n in counts]
    if len(sizes) != len(available):
        raise InvalidArgument(f"counts holds {len(sizes)} sizes. The dataset has {len(available)} classes.")
    for c, (size, n) in enumerate(zip(sizes, available, strict=True)):
        if not 0 <= size <= n:
            raise InvalidArgument(f"counts asks for {size} examples of class {c}. From 0 to {n} are possible.")
    if sum(sizes) == 0:
        raise InvalidArgument("counts asks for no example at all. At least one class needs a positive size.")
    return sizes


def _profile_counts(ratio: float, profile: str, available: np.ndarray) -> list[int]:
    if ratio < 1:
        raise InvalidArgument(
            f"ratio={ratio} is below 1. The size of the largest class over that of the smallest is needed, as 100."
        )
    c = len(available)
    place = np.arange(c) / max(c - 1, 1) if profile == "exponential" else (np.arange(c) >= c // 2).astype(float)
    share = ratio**-place
    head = np.floor((available / share).min() + 1e-6)
    # 1e-6: 5000 / 100 is 50, whatever the last bit of the power says
    sizes = np.floor(head * share + 1e-6).astype(int).tolist()
    if min(sizes) < 1:
        raise InvalidArgument(
            f"ratio={ratio} leaves no example of the smallest class, the largest having {int(head)}. "
            f"At most {int(head)} is possible."
        )
    return sizes
