"""Label noise of a known kind over any labelled dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.data._checks import check_at_least
from lightning_methods.data._strata import apportion
from lightning_methods.data.images import TensorBatch, fetch
from lightning_methods.data.labels import count_classes, find_labels, with_label
from lightning_methods.errors import InvalidArgument, check_choice


class NoisyLabels(Dataset):
    """A dataset whose labels are partly wrong, by a known class-to-class transition.

    The numbers are exact, not sampled: of the n examples of class c, `round(n * (1 - T[c, c]))` get a wrong label, and
    these are shared among the other classes in proportion to row c of T by largest remainders. Which examples they
    are is drawn with `seed`; no global generator is read or moved. With `uniform` noise a wrong label is always
    another class, so `rate` is the share of wrong labels (some papers draw among all classes: multiply their rate by
    `(C - 1) / C`).

    Shapes: T is (C, C), rows true class, columns given class.

    Args:
        dataset: map-style; labels as `find_labels` finds them. Its items are passed on with the label replaced.
        rate: share of wrong labels, from 0 to 1. Give this or `transition`.
        kind: `uniform` over the other classes (default), or `pair_flip`, from c to c + 1 modulo C.
        transition: own T with rows that sum to 1, in place of `rate` and `kind`.
        seed: decides which labels become wrong. Default 0.
        num_classes: C; by default the largest label + 1.

    Attributes:
        targets: (N,) the labels that are handed out.
        true_targets: (N,) the labels before any noise, also when wrappers are nested.
        is_noisy: (N,) bool, where the two differ.
        transition: (C, C) float64, what was asked for.

    Raises:
        InvalidArgument: if `rate`, `kind`, `transition` or `num_classes` does not fit.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> clean = TensorDataset(torch.zeros(100, 2), torch.arange(100) % 4)
        >>> noisy = NoisyLabels(clean, rate=0.4)
        >>> int(noisy.is_noisy.sum())
        40
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        rate: float | None = None,
        kind: Literal["uniform", "pair_flip"] = "uniform",
        transition: Sequence[Sequence[float]] | Tensor | None = None,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        check_at_least("seed", seed, 0)
        given = find_labels(dataset)
        self.dataset = dataset
        self.num_classes = count_classes(given, num_classes)
        self.transition = _transition(self.num_classes, rate, kind, transition)
        self.true_targets = find_labels(dataset, true=True)
        self.targets = torch.from_numpy(_flip(given.numpy(), self.transition.numpy(), seed))
        self.is_noisy = self.targets != self.true_targets

    def observed_transition(self) -> Tensor:
        """Return the share of every true class (row) that bears every label (column): (C, C) float64.

        The row of a class without examples is zero.
        """
        c = max(self.num_classes, int(self.true_targets.max()) + 1)
        pairs = torch.bincount(self.true_targets * c + self.targets, minlength=c * c).view(c, c).double()
        return pairs / pairs.sum(1, keepdim=True).clamp(min=1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return with_label(self.dataset[index], int(self.targets[index]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        samples = fetch(self.dataset, indices)
        labels = self.targets[torch.as_tensor(indices, dtype=torch.long)]
        if isinstance(samples, TensorBatch):
            return TensorBatch(samples.inputs, labels.to(samples.inputs.device, non_blocking=True))
        return [with_label(item, label) for item, label in zip(samples, labels.tolist(), strict=True)]


def _transition(c: int, rate: float | None, kind: str, transition: Sequence[Sequence[float]] | Tensor | None) -> Tensor:
    check_choice("kind", kind, ("uniform", "pair_flip"))
    if (rate is None) == (transition is None):
        raise InvalidArgument(
            f"rate={rate} and transition={'None' if transition is None else 'a matrix'}: exactly one of the two is "
            "needed, for example rate=0.4."
        )
    if c < 2:
        raise InvalidArgument("The labels name one class only. Noise needs two; give num_classes if others exist.")
    if transition is not None:
        return _checked(torch.as_tensor(transition, dtype=torch.float64), c)
    assert rate is not None
    if not 0 <= rate <= 1:
        raise InvalidArgument(f"rate={rate} is not a share of the labels. A number from 0 to 1 is needed.")
    eye = torch.eye(c, dtype=torch.float64)
    wrong = eye.roll(1, dims=1) if kind == "pair_flip" else (1 - eye) / (c - 1)
    return (1 - rate) * eye + rate * wrong


def _checked(matrix: Tensor, c: int) -> Tensor:
    if matrix.shape != (c, c):
        raise InvalidArgument(f"transition has shape {tuple(matrix.shape)}. {c} classes need shape ({c}, {c}).")
    off = (matrix.sum(1) - 1).abs()
    if not bool((matrix >= 0).all()) or not bool((off < 1e-6).all()):
        row = int(torch.where((matrix < 0).any(1) | ~(off < 1e-6))[0][0])
        raise InvalidArgument(
            f"Row {row} of transition is {matrix[row].tolist()}. Every row is needed without negative numbers and with "
            "the sum 1: the shares of the labels that examples of that class get."
        )
    return matrix


def _flip(labels: NDArray[np.int64], transition: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    noisy = labels.copy()
    for c, row in enumerate(transition):
        members = rng.permutation(np.flatnonzero(labels == c))
        others = np.where(np.arange(len(row)) == c, 0.0, row)
        wrong = int(np.floor(len(members) * (1 - row[c]) + 0.5 + 1e-9))
        if wrong and others.sum() > 0:
            noisy[members[:wrong]] = np.repeat(np.arange(len(row)), apportion(others, wrong, rng))
    return noisy
