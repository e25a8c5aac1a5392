"""Sections of a teacher and a student: found by name, by range, or by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import combinations
from typing import Any, Literal

from torch import Tensor, nn

from lightning_methods.core.layers import named_layers, named_layers_first
from lightning_methods.errors import InvalidArgument, LayerNotFound, did_you_mean

Sections = Sequence[str | Sequence[str]] | Literal["auto"]

_RANGE = re.compile(r"(?:(?P<container>.+)\.)?(?P<first>\d+):(?P<last>\d+)")


@dataclass(frozen=True)
class Stage:
    """One section of one network: a module, or neighbours in an `nn.Sequential`.

    Attributes:
        path: as the user gave it.
        modules: run one after the other.
        names: theirs in the network.
    """

    path: str
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the section."""
        x = self.modules[0](*args, **kwargs)
        for module in self.modules[1:]:
            x = module(x)
        return x

    def submodules(self) -> Iterator[nn.Module]:
        """Yield every module of the section."""
        for module in self.modules:
            yield from module.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter of the section."""
        for module in self.modules:
            yield from module.parameters()


@dataclass(frozen=True)
class Pair:
    """A section of the teacher and the student's that stands for it, under the name of the student's."""

    teacher: Stage
    student: Stage

    @property
    def name(self) -> str:
        """Return how the section is called in logs."""
        return self.student.path


def find_pairs(teacher: nn.Module, student: nn.Module, sections: Sections = "auto") -> list[Pair]:
    """Return the sections that are named, in the order given.

    Args:
        teacher: the deep network.
        student: the shallow one.
        sections: `"auto"`, see `auto_sections`; or for each section the name that it has in both networks, or
            (name in the teacher, name in the student). `"features.0:5"` is the modules 0 to 4 of the `nn.Sequential`
            `features`; `"0:5"` of the network itself.

    Raises:
        LayerNotFound: if a name is unknown.
        InvalidArgument: if there is no section, or two of them share a module.

    Example:
        >>> deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> shallow = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> (pair,) = find_pairs(deep, shallow, [("0:4", "0:2")])
        >>> pair.teacher.names, pair.student.names
        (('0', '1', '2', '3'), ('0', '1'))
    """
    if isinstance(sections, str):
        if sections != "auto":
            raise InvalidArgument(f"sections={sections!r}: a list of names is needed, or 'auto'.")
        sections = auto_sections(teacher, student)
    pairs = [_pair(teacher, student, entry) for entry in sections]
    if not pairs:
        raise InvalidArgument("sections names no section. Give the names of at least one, or 'auto'.")
    for kind in ("teacher", "student"):
        stages = [getattr(pair, kind) for pair in pairs]
        for one, other in combinations(stages, 2):
            if {id(m) for m in one.submodules()} & {id(m) for m in other.submodules()}:
                raise InvalidArgument(
                    f"The sections {one.path!r} and {other.path!r} of the {kind} share modules: each must stand for "
                    f"itself, and none lie in another."
                )
    return pairs


def auto_sections(teacher: nn.Module, student: nn.Module) -> list[str]:
    """Return the children that both networks have under one name and whose numbers of parameters differ.

    Where there is only one such child, its own children are looked at, as in a network inside of a wrapper.

    Raises:
        LayerNotFound: if there is none, with the children of both.

    Example:
        >>> from lightning_methods.models import CIFARResNet
        >>> auto_sections(CIFARResNet(20, width=4), CIFARResNet(8, width=4))
        ['layer1', 'layer2', 'layer3']
    """
    names = _differing(teacher, student, "")
    if not names:
        shown = [", ".join(f"{n} ({_count(m)})" for n, m in _children(net).items()) for net in (teacher, student)]
        raise LayerNotFound(
            f"sections='auto' finds no child of one name with different numbers of parameters. The teacher has: "
            f"{shown[0]}. The student has: {shown[1]}. Name the sections, for instance sections=['layer1', 'layer2']."
        )
    return names


def find_stage(network: nn.Module, path: str, kind: str) -> Stage:
    """Return the section of a network that `path` names.

    Args:
        network: where to look; names that wrappers add are left out.
        path: a name, or a range of an `nn.Sequential`.
        kind: what the network is, for the message.

    Raises:
        LayerNotFound: if the name is unknown.
        InvalidArgument: if a range is empty, or not of an `nn.Sequential`.
    """
    layers = dict(named_layers_first(network))
    found = _RANGE.fullmatch(path)
    if found is None:
        if path not in layers:
            raise LayerNotFound(f"The {kind} has no module {path!r}. {did_you_mean(path, layers)}")
        return Stage(path, (layers[path],), (path,))
    name = found["container"] or ""
    if name and name not in layers:
        raise LayerNotFound(f"The {kind} has no module {name!r} to take {path!r} from. {did_you_mean(name, layers)}")
    container = getattr(network, "_orig_mod", network) if not name else dict(named_layers(network))[name]
    first, last = int(found["first"]), int(found["last"])
    if not isinstance(container, nn.Sequential) or not first < last <= len(container):
        size = f" of {len(container)}" if isinstance(container, nn.Sequential) else ""
        raise InvalidArgument(
            f"{path!r} of the {kind}: a range first:last, first included and last not, of an nn.Sequential is needed; "
            f"{name or 'the network'!r} is a {type(container).__name__}{size}."
        )
    keys = list(container._modules)[first:last]
    names = tuple(f"{name}.{key}" if name else key for key in keys)
    return Stage(path, tuple(layers[n] for n in names), names)


def first_tensor(value: Any) -> Tensor | None:
    """Return a tensor itself, or the first one in a tuple, list, dict or model output; `None` where there is none.

    Example:
        >>> import torch
        >>> first_tensor((None, {"hidden": torch.ones(2)}))
        tensor([1., 1.])
    """
    return next(tensors_in(value), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts, dataclasses and model outputs."""
    if isinstance(value, Tensor):
        yield value
        return
    items: Any = ()
    if isinstance(value, Mapping):  # also the model outputs of transformers
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
    for item in items:
        yield from tensors_in(item)


def _pair(teacher: nn.Module, student: nn.Module, entry: str | Sequence[str]) -> Pair:
    names = (entry, entry) if isinstance(entry, str) else tuple(entry)
    if len(names) != 2 or not all(isinstance(n, str) and n for n in names):
        raise InvalidArgument(
            f"sections has {entry!r}: a name, or (name in the teacher, name in the student) is needed."
        )
    return Pair(find_stage(teacher, names[0], "teacher"), find_stage(student, names[1], "student"))


def _differing(teacher: nn.Module, student: nn.Module, prefix: str) -> list[str]:
    left, right = _children(teacher), _children(student)
    names = [n for n in left if n in right and _count(left[n]) != _count(right[n])]
    if len(names) == 1 and _children(left[names[0]]):
        name = names[0]
        inner = _differing(left[name], right[name], f"{prefix}{name}.")
        if len(inner) > 1:
            return inner
    return [f"{prefix}{n}" for n in names]


def _children(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in named_layers_first(network) if "." not in name}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
