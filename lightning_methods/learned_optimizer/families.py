"""Families of tasks: meta-training on many networks at once makes an optimizer that is of use beyond one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument
from lightning_methods.learned_optimizer.seeding import generator_of
from lightning_methods.learned_optimizer.tasks import ModuleTask

_ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU)
_INITIAL = ("default", "he", "lecun", "glorot")


class ClassifierFamily:
    """Classifiers of one data set: every episode draws a network, its initialisation, classes and batch size.

    Args:
        inputs: all samples, `(N, D)` or `(N, C, H, W)`; None for those of a datamodule.
        targets: class indices, `(N,)`.
        widths: least and most units a hidden layer, drawn log-uniformly.
        depths: least and most hidden layers.
        conv: share of convolutional networks, where the inputs are images: of 3 by 3 or 5 by 5 pixels, their sides
            halved by strides or by averages.
        batch_sizes: least and most, drawn log-uniformly.
        subsets: share of episodes on a part of the classes, at least two.
        label_noise: most wrong labels; the share is drawn uniformly in a third of the episodes.
        input_scales: least and most factor of the inputs, drawn log-uniformly.
        max_parameters: wider networks than that are made narrower.
        name: in logs.

    Raises:
        InvalidArgument: if a range is empty.

    Example:
        >>> family = ClassifierFamily(torch.randn(60, 4), torch.arange(60) % 3)
        >>> [type(layer).__name__ for layer in family.sample(0).module]
        ['Flatten', 'Linear', 'SiLU', 'Linear', 'SiLU', 'Linear']
    """

    def __init__(
        self,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        widths: Sequence[int] = (16, 128),
        depths: Sequence[int] = (1, 3),
        conv: float = 0.25,
        batch_sizes: Sequence[int] = (8, 128),
        subsets: float = 0.5,
        label_noise: float = 0.2,
        input_scales: Sequence[float] = (0.5, 2.0),
        max_parameters: int = 10_000,
        name: str = "family",
    ) -> None:
        ranges = {"widths": widths, "depths": depths, "batch_sizes": batch_sizes, "input_scales": input_scales}
        for argument, (low, high) in ((k, tuple(v)) for k, v in ranges.items()):
            if not 0 < low <= high:
                raise InvalidArgument(f"{argument}={(low, high)}: positive numbers, the larger last, are needed.")
        self.inputs, self.targets, self.name = inputs, targets, name
        self.widths, self.depths, self.batch_sizes, self.input_scales = widths, depths, batch_sizes, input_scales
        self.conv, self.subsets, self.label_noise, self.max_parameters = conv, subsets, label_noise, max_parameters

    def with_data(self, inputs: Tensor, targets: Tensor) -> ClassifierFamily:
        """Return the family on these samples, or itself where it has its own."""
        if self.inputs is not None:
            return self
        family = object.__new__(type(self))
        family.__dict__.update(self.__dict__, inputs=inputs, targets=targets)
        return family

    def sample(self, seed: int) -> ModuleTask:
        """Return the task of one episode.

        Args:
            seed: decides it.
        """
        if self.inputs is None or self.targets is None:
            raise InvalidArgument(f"The family {self.name!r} has no data: give it samples, or train with a datamodule.")
        draw = _Draw(seed)
        inputs, targets = self._samples(draw)
        classes = int(targets.max()) + 1
        shape, depth, activation = inputs.shape[1:], draw.integer(*self.depths), draw.of(_ACTIVATIONS)
        width, conv = round(draw.log_uniform(*self.widths)), len(shape) == 3 and draw.uniform() < self.conv
        make = partial(_conv_net, draw.of((3, 3, 5)), draw.uniform() < 0.5) if conv else _mlp
        while True:
            module = make(shape, width, depth, classes, activation)
            if width <= self.widths[0] or sum(p.numel() for p in module.parameters()) <= self.max_parameters:
                break
            width = max(self.widths[0], int(width * 0.8))
        scheme, gain = draw.of(_INITIAL), draw.log_uniform(0.7, 1.4)
        size = min(round(draw.log_uniform(*self.batch_sizes)), len(inputs))
        name = f"{self.name}/{'conv' if conv else 'mlp'}{depth}x{width}"
        return ModuleTask(
            module, inputs, targets, batch_size=size, initialize=partial(_initialize, scheme, gain), name=name
        )

    def _samples(self, draw: _Draw) -> tuple[Tensor, Tensor]:
        assert self.inputs is not None
        assert self.targets is not None
        inputs, targets = self.inputs * draw.log_uniform(*self.input_scales), self.targets
        classes = int(targets.max()) + 1
        if classes > 2 and draw.uniform() < self.subsets:
            kept = draw.order(classes)[: draw.integer(2, classes)]
            new = torch.full((classes,), -1).index_copy(0, kept, torch.arange(len(kept)))
            rows = new[targets] >= 0
            inputs, targets, classes = inputs[rows], new[targets[rows]], len(kept)
        if draw.uniform() < 1 / 3:
            wrong = draw.chance(len(targets), self.label_noise * draw.uniform())
            targets = torch.where(wrong, draw.integers(len(targets), classes), targets)
        return inputs, targets


class _Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = generator_of(seed, "family")

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(math.log(low) + self.uniform() * (math.log(high) - math.log(low)))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(int(low), int(high) + 1, (), generator=self.generator))

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def chance(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self.generator) < share

    def integers(self, count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator)


def _mlp(shape: Sequence[int], width: int, depth: int, classes: int, activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(size, width), activation()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


def _conv_net(
    kernel: int,
    averaged: bool,
    shape: Sequence[int],
    width: int,
    depth: int,
    classes: int,
    activation: type[nn.Module],
) -> nn.Module:
    """Return convolutions that halve the sides, a quarter as wide as the other networks, and means over places."""
    channels, side = shape[0], min(shape[1:])
    wide = max(4, width // 4)
    layers: list[nn.Module] = []
    for i in range(depth):
        by = 2 if i and side > 2 else 1
        layers += [nn.AvgPool2d(2, ceil_mode=True)] if averaged and by == 2 else []
        layers += [nn.Conv2d(channels, wide, kernel, 1 if averaged else by, kernel // 2), activation()]
        channels, side, wide = wide, -(-side // by), min(2 * wide, 32)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


def _initialize(scheme: str, gain: float, module: nn.Module) -> None:
    for part in module.modules():
        if not isinstance(part, (nn.Linear, nn.Conv2d)):
            continue
        if scheme == "default":
            part.reset_parameters()
            continue
        fan_in, fan_out = part.weight[0].numel(), part.weight.shape[0] * part.weight[0, 0].numel()
        square = {"he": 2 / fan_in, "lecun": 1 / fan_in, "glorot": 2 / (fan_in + fan_out)}[scheme]
        nn.init.normal_(part.weight, std=gain * math.sqrt(square))
        if part.bias is not None:
            nn.init.zeros_(part.bias)
