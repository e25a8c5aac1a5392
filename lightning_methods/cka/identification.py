"""The check of a similarity index: does it find which layers of two trainings correspond?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_methods.cka.matrix import similarity_matrix
from lightning_methods.errors import InvalidArgument

# two values closer than this, relative to the larger, are equal but for the rounding of float32
_TIE = 1e-6


def layer_identification(networks: Sequence[dict[str, Tensor]], *, index: str = "cka", **kwargs: Any) -> float:
    """Return how often a layer is most similar to its twin in another training of the same architecture.

    The protocol of the paper: for every ordered pair of networks and every layer of the first, the most similar layer
    of the second must be the one at the same place. A layer that ties with its twin, or has no value, is a failure.
    Chance is one over the number of layers.

    Shapes:
        features `(n, ...)` of the same layers in every network, on the same samples in the same order.

    Args:
        networks: name -> features of each network, at least two, as `RepresentationSimilarity` and taps give them.
        index: as in `similarity_matrix`.
        kwargs: arguments of the index.

    Returns:
        The share of right decisions, from 0 to 1.

    Raises:
        InvalidArgument: for less than two networks or layers, layers that differ, an unknown index, or a distance.
        ShapeMismatch: if the numbers of samples differ.

    Example:
        >>> import torch
        >>> net = {"a": torch.randn(50, 3), "b": torch.randn(50, 4)}
        >>> layer_identification([net, {name: 2 * x for name, x in net.items()}])
        1.0
    """
    return float(decisions(networks, index=index, **kwargs).double().mean())


def decisions(networks: Sequence[dict[str, Tensor]], *, index: str = "cka", **kwargs: Any) -> Tensor:
    """Return each decision: `(ordered pairs of networks, layers)` booleans, pairs in the order (0, 1), (0, 2), ...

    Args:
        networks: as in `layer_identification`.
        index: as in `similarity_matrix`.
        kwargs: arguments of the index.

    Raises:
        InvalidArgument: as `layer_identification`.
    """
    names = _common_layers(networks)
    if kwargs.get("kind", "similarity") != "similarity":
        raise InvalidArgument(f"kind={kwargs['kind']!r} grows with the difference; kind='similarity' is needed.")
    # all at once: what an index needs of a layer is computed once, not for each pair
    layers = {f"{name} of network {i}": x for i, network in enumerate(networks) for name, x in network.items()}
    values = similarity_matrix(layers, index=index, **kwargs)
    count = len(names)
    blocks = values.unflatten(0, (-1, count)).unflatten(2, (-1, count)).transpose(1, 2)  # (A, B, layers of A, of B)
    twins = blocks.diagonal(dim1=2, dim2=3)
    same = torch.eye(count, dtype=torch.bool, device=values.device)
    others = blocks.masked_fill(same, -torch.inf).amax(3)
    # comparisons with NaN are false
    found = twins - others > _TIE * torch.maximum(twins.abs(), others.abs())
    return found[~torch.eye(len(networks), dtype=torch.bool, device=values.device)]


def _common_layers(networks: Sequence[dict[str, Tensor]]) -> list[str]:
    if len(networks) < 2:
        raise InvalidArgument(f"There is {len(networks)} network; at least two of different seeds are needed.")
    names = list(networks[0])
    if len(names) < 2:
        raise InvalidArgument(f"The layers are {names}; at least two are needed to tell one from another.")
    for number, network in enumerate(networks):
        if list(network) != names:
            raise InvalidArgument(f"Network {number} has the layers {list(network)}, and the first one {names}.")
    return names
