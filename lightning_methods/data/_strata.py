"""Whole numbers from proportions, and draws that keep the proportions of the classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def apportion(weights: NDArray[np.floating], total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Split `total` into whole parts proportional to `weights` by largest remainders, ties broken by `rng`."""
    quota = weights / weights.sum() * total
    # 1e-9: a quota of 2.9999999999 is 3 that lost its last bit
    parts = np.floor(quota + 1e-9).astype(np.int64)
    remainder = np.round(quota - parts, 9)
    order = np.lexsort((rng.random(len(parts)), -remainder))
    parts[order[: total - parts.sum()]] += 1
    return parts


def draw_stratified(labels: NDArray[np.int64], size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw `size` positions of `labels` with the classes in proportion.

    Args:
        labels: (N,) class of every example.
        size: how many to draw, at most N.
        seed: decides the draw alone; no global generator is read or moved.

    Returns:
        The positions drawn and those left, both ascending.
    """
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    drawn = [
        rng.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(classes, apportion(counts.astype(float), size, rng), strict=True)
    ]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(drawn)] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
