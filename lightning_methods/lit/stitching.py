"""Mixtures of a teacher and its student: each trained section can stand in for the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.core.gather import all_sum
from lightning_methods.core.passes import batches
from lightning_methods.errors import InvalidArgument
from lightning_methods.lit.functional import IGNORED
from lightning_methods.lit.measure import seconds_of
from lightning_methods.lit.sections import Pair, Stage, first_tensor

_MOST_SECTIONS = 6


@dataclass(frozen=True)
class Hybrid:
    """A teacher with some of its sections replaced by the student's.

    Attributes:
        replaced: names of the sections that are the student's.
        accuracy: of its predictions on validation data, from 0 to 1.
        parameters: number of its parameters.
        seconds: of a forward pass, for one sample.
        pareto: whether no other one is both faster and at least as accurate.
    """

    replaced: tuple[str, ...]
    accuracy: float
    parameters: int
    seconds: float
    pareto: bool = False


def stitched(teacher: nn.Module, pairs: Sequence[Pair], replaced: Sequence[str]) -> nn.Module:
    """Return a copy of the teacher in which the sections named are copies of the student's.

    Args:
        teacher: the deep network.
        pairs: its sections and the student's.
        replaced: names of the sections to replace.

    Raises:
        InvalidArgument: if a name is not of a section.
    """
    unknown = [name for name in replaced if name not in [p.name for p in pairs]]
    if unknown:
        raise InvalidArgument(f"{unknown} are no sections. There are: {[p.name for p in pairs]}.")
    with replacing(teacher, [p for p in pairs if p.name in replaced]):
        return copy.deepcopy(teacher)


@contextmanager
def replacing(teacher: nn.Module, pairs: Sequence[Pair]) -> Iterator[None]:
    """Put the student's sections in the place of the teacher's, and the teacher's back at the end.

    Args:
        teacher: the network that is changed for the time.
        pairs: the sections to replace.
    """
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    root = getattr(teacher, "_orig_mod", teacher)
    try:
        for pair in pairs:
            for i, name in enumerate(pair.teacher.names):
                parent, child = _place(root, name)
                undo.append((parent, child, parent._modules[child]))  # type: ignore[arg-type]
                parent._modules[child] = _Stand(pair.student) if i == 0 else nn.Identity()
        yield
    finally:
        for parent, child, module in reversed(undo):
            parent._modules[child] = module


def check_stitching(pairs: Sequence[Pair], adapters: str) -> None:
    """Raise `InvalidArgument` where sections cannot be mixed, or in too many ways."""
    if adapters != "none":
        raise InvalidArgument("stitch=True needs sections of one width; with adapters they do not fit each other.")
    if len(pairs) > _MOST_SECTIONS:
        raise InvalidArgument(
            f"stitch=True with {len(pairs)} sections makes {2 ** len(pairs)} mixtures; at most {_MOST_SECTIONS} "
            f"sections are evaluated. Use lightning_methods.lit.stitched for the mixtures that you want."
        )


def stitching_report(
    trainer: Any,
    module: Any,
    arguments_of: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Tensor | None]],
) -> list[Hybrid]:
    """Return all mixtures with their accuracy on the validation data; empty where there are none, or no targets.

    Args:
        trainer: the running trainer.
        module: the `LITDistiller`.
        arguments_of: from a batch to the arguments of the networks, and the targets.
    """
    teacher, pairs = module.teacher, module.pairs
    choices = [
        tuple(p for p, taken in zip(pairs, mask, strict=True) if taken) for mask in product((0, 1), repeat=len(pairs))
    ]
    right = torch.zeros(len(choices), dtype=torch.float64)
    counted = torch.zeros((), dtype=torch.float64)
    seconds = [0.0] * len(choices)
    for batch in batches(trainer, module, "val", description="LIT: stitching report"):
        args, kwargs, target = arguments_of(batch)
        if target is None or target.is_floating_point():
            return []
        for i, chosen in enumerate(choices):
            with replacing(teacher, chosen), torch.compiler.set_stance("force_eager"):
                output = first_tensor(teacher(*args, **kwargs))
                assert output is not None
                right[i] += ((output.argmax(1) == target) & (target != IGNORED)).sum().cpu()
                if not seconds[i]:
                    seconds[i] = seconds_of(lambda: teacher(*args, **kwargs)) / len(output)  # noqa: B023
        counted += (target != IGNORED).sum().cpu()
    totals = all_sum(torch.cat([right, counted[None]]).to(module.device))
    if not totals[-1]:
        return []
    accuracies = (totals[:-1] / totals[-1]).tolist()
    hybrids = []
    for chosen, accuracy, time in zip(choices, accuracies, seconds, strict=True):
        with replacing(teacher, chosen):
            parameters = sum(p.numel() for p in teacher.parameters())
        hybrids.append(Hybrid(tuple(p.name for p in chosen), accuracy, parameters, time))
    return [_marked(hybrid, hybrids) for hybrid in hybrids]


class _Stand(nn.Module):
    """A section of the student in the place of one of the teacher's."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage.modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self.stages[0](*args, **kwargs)
        for module in list(self.stages)[1:]:
            x = module(x)
        return x


def _marked(hybrid: Hybrid, others: Sequence[Hybrid]) -> Hybrid:
    beaten = any(
        (o.accuracy >= hybrid.accuracy and o.parameters < hybrid.parameters)
        or (o.accuracy > hybrid.accuracy and o.parameters <= hybrid.parameters)
        for o in others
    )
    return Hybrid(hybrid.replaced, hybrid.accuracy, hybrid.parameters, hybrid.seconds, not beaten)


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds what the user calls `name`, and the attribute that it is under."""
    *path, child = name.split(".")
    parent = root
    for part in path:
        parent = getattr(parent, "_orig_mod", parent)
        parent = parent.get_submodule(part)
    return getattr(parent, "_orig_mod", parent), child
