"""A multilayer perceptron with names that are easy to tap."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.models._chain import Chain


class MLP(Chain):
    """A multilayer perceptron with ReLU: `flatten`, `layer1`, `layer2`, ..., `head`.

    Each layer is `linear`, then `norm` and `dropout` where asked for around `act`; the output of `layer2` is what the
    next layer reads.

    Shapes: (B, ...) with in_features numbers an example -> (B, num_classes) logits.

    Args:
        in_features: numbers an example.
        hidden: width of every hidden layer. Default (256, 256).
        num_classes: number of logits. Default 10.
        dropout: probability of dropping a hidden unit. Default 0.
        norm: `batch` or `layer` normalisation before every ReLU; None for none (default).

    Raises:
        InvalidArgument: if a size is not positive, `dropout` is no probability, or `norm` is unknown.

    Example:
        >>> import torch
        >>> net = MLP(64, hidden=(128, 32))
        >>> net(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (256, 256),
        num_classes: int = 10,
        *,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
    ) -> None:
        if norm is not None:
            check_choice("norm", norm, ("batch", "layer"))
        if min(in_features, num_classes, *hidden) < 1:
            raise InvalidArgument(
                f"in_features={in_features}, hidden={tuple(hidden)}, num_classes={num_classes}: positive numbers are "
                "needed."
            )
        if not 0 <= dropout < 1:
            raise InvalidArgument(f"dropout={dropout} is no probability below 1.")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        widths = [in_features, *hidden]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            layers[f"layer{i}"] = _layer(before, after, dropout, norm)
        layers["head"] = nn.Linear(widths[-1], num_classes)
        super().__init__(layers)


def _layer(before: int, after: int, dropout: float, norm: str | None) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(before, after))
    if norm is not None:
        parts["norm"] = nn.BatchNorm1d(after) if norm == "batch" else nn.LayerNorm(after)
    parts["act"] = nn.ReLU()
    if dropout:
        parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)
