"""The shapes of the sections of two networks beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_methods.core.passes import preserved
from lightning_methods.lit.capture import Call, SectionTap
from lightning_methods.lit.sections import Pair, Sections, find_pairs

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SectionMatch:
    """One section of a teacher beside the student's.

    Attributes:
        teacher, student: names.
        inputs, outputs: the teacher's shape and the student's.
        parameters: the numbers of theirs.
    """

    teacher: str
    student: str
    inputs: tuple[Shape, Shape]
    outputs: tuple[Shape, Shape]
    parameters: tuple[int, int]

    @property
    def fits(self) -> bool:
        """Tell whether the student's section can stand in for the teacher's."""
        return self.inputs[0] == self.inputs[1] and self.outputs[0] == self.outputs[1]


class SectionTable(tuple[SectionMatch, ...]):
    """The sections of two networks; printed, it is a Markdown table."""

    __slots__ = ()

    @property
    def fits(self) -> bool:
        """Tell whether all sections fit."""
        return all(match.fits for match in self)

    def __str__(self) -> str:
        lines = ["| teacher | student | inputs | outputs | parameters | |", "|---|---|---|---|---|---|"]
        for m in self:
            shapes = [f"{_shape(a)} / {_shape(b)}" if a != b else _shape(a) for a, b in (m.inputs, m.outputs)]
            mark = "fits" if m.fits else "differs"
            lines.append(
                f"| {m.teacher} | {m.student} | {shapes[0]} | {shapes[1]} | {m.parameters[0]:,} / {m.parameters[1]:,} "
                f"| {mark} |"
            )
        return "\n".join(lines)


def match_sections(
    teacher: nn.Module, student: nn.Module, example_input: Any, sections: Sections = "auto"
) -> SectionTable:
    """Run both networks once and return the shapes of their sections; nothing of either is changed.

    Args:
        teacher: the deep network.
        student: the shallow one.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        sections: names, pairs of names, ranges, or `"auto"`, see `LITDistiller`.

    Raises:
        LayerNotFound: if a name is unknown, or `"auto"` finds nothing.
        TapNotCalled: if a section does not run.
        UnsupportedTraining: if a section runs several times or in another order.

    Example:
        >>> from lightning_methods.models import CIFARResNet
        >>> print(match_sections(CIFARResNet(20, width=4), CIFARResNet(8, width=4), torch.zeros(1, 3, 8, 8)))
        | teacher | student | inputs | outputs | parameters | |
        |---|---|---|---|---|---|
        | layer1 | layer1 | 1x4x8x8 | 1x4x8x8 | 912 / 304 | fits |
        | layer2 | layer2 | 1x4x8x8 | 1x8x4x4 | 3,264 / 896 | fits |
        | layer3 | layer3 | 1x8x4x4 | 1x16x2x2 | 12,864 / 3,520 | fits |
    """
    pairs = find_pairs(teacher, student, sections)
    args, kwargs = call_arguments(example_input)
    left = observed(teacher, SectionTap([p.teacher for p in pairs], "teacher"), args, kwargs)
    right = observed(student, SectionTap([p.student for p in pairs], "student"), args, kwargs)
    return section_table(pairs, left, right)


def section_table(pairs: Sequence[Pair], teacher: Sequence[Call], student: Sequence[Call]) -> SectionTable:
    """Return the table of two recorded passes.

    Args:
        pairs: the sections.
        teacher: the teacher's calls, one a section.
        student: the student's.
    """
    return SectionTable(
        SectionMatch(
            pair.teacher.path,
            pair.student.path,
            (tuple(a.input.shape), tuple(b.input.shape)),
            (tuple(a.tensor.shape), tuple(b.tensor.shape)),
            (sum(p.numel() for p in pair.teacher.parameters()), sum(p.numel() for p in pair.student.parameters())),
        )
        for pair, a, b in zip(pairs, teacher, student, strict=True)
    )


def observed(network: nn.Module, tap: SectionTap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Run a network in eval mode without gradient and return its sections' calls; nothing of it is changed.

    Args:
        network: what to run.
        tap: of its sections; attached for the time of the run.
        args: what the network is given.
        kwargs: what it is given by name.
    """
    tap.attach()
    try:
        with preserved(network), torch.no_grad(), tap.recording(clone=True) as calls:
            network.eval()
            network(*args, **kwargs)
            return calls()
    finally:
        tap.detach()


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments: a tuple or list is several, a dict is named ones.

    Example:
        >>> call_arguments({"x": 1}), call_arguments((1, 2)), call_arguments(3)
        (((), {'x': 1}), ((1, 2), {}), ((3,), {}))
    """
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if hasattr(inputs, "keys") and hasattr(inputs, "items"):
        return (), dict(inputs.items())
    return (inputs,), {}


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))
