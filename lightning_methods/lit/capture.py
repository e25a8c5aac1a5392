"""What goes into the sections of a network and comes out of them while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_methods.errors import BatchFormat, TapNotCalled, UnsupportedTraining
from lightning_methods.lit.sections import Stage, first_tensor, tensors_in

_NOT_CALLED = (
    "The sections {names} of the {kind} did not run in its forward. Either it does not call them (name others), or it "
    "was compiled as a whole before: then call torch._dynamo.reset() first, or compile its sections instead."
)


@dataclass
class Call:
    """One run of a section: what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int] | None
    output: Any = None

    @property
    def tensor(self) -> Tensor:
        """Return the first tensor of the output."""
        return _needed(self.output, "returned")

    @property
    def input(self) -> Tensor:
        """Return the first tensor of the input."""
        return _needed((self.args, self.kwargs), "was given")

    def is_overwritten(self) -> bool:
        """Tell whether a tensor was changed in place since the section got or returned it."""
        return self.versions is not None and self.versions != versions_of((self.args, self.kwargs, self.output))


class SectionTap:
    """Records every section's input and output in the forward passes that run inside of `recording`.

    Args:
        stages: the sections, in the order in which they are to run.
        kind: what the network is, for messages.

    Example:
        >>> from lightning_methods.lit.sections import find_stage
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> tap = SectionTap([find_stage(net, "0", "teacher")], "teacher")
        >>> tap.attach()
        >>> with tap.recording() as calls:
        ...     _ = net(torch.ones(2, 3))
        ...     [tuple(call.tensor.shape) for call in calls()]
        [(2, 4)]
        >>> tap.detach()
    """

    def __init__(self, stages: Sequence[Stage], kind: str) -> None:
        self.stages = list(stages)
        self.kind = kind
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: dict[int, list[Call]] = {}
        self._open = self._clone = False

    def __getstate__(self) -> dict[str, Any]:
        # the hooks of a copied network do nothing: its tap has yet to attach its own, and holds no features
        return {**vars(self), "_handles": [], "_calls": {}, "_open": False}

    def attach(self) -> None:
        """Register the hooks; harmless when called twice."""
        if self._handles:
            return
        for i, stage in enumerate(self.stages):
            first, last = stage.modules[0], stage.modules[-1]
            self._handles.append(first.register_forward_pre_hook(_Entry(self, i, first), with_kwargs=True))
            self._handles.append(last.register_forward_hook(_Exit(self, i, last)))

    def detach(self) -> None:
        """Remove the hooks and drop what was recorded; harmless when called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    @contextmanager
    def recording(self, *, clone: bool = False) -> Iterator[Callable[[], list[Call]]]:
        """Record what runs inside, and yield the function that ends it and returns one call a section, in their order.

        Args:
            clone: keep copies, which later in-place operations of the network cannot change.

        Raises:
            TapNotCalled: from that function, if a section did not run.
            UnsupportedTraining: from that function, if a section ran several times, or not in the order given.
        """
        self._calls.clear()
        # inference tensors count no versions: a copy made now cannot be overwritten
        self._open, self._clone = True, clone or torch.is_inference_mode_enabled()
        try:
            yield self._read
        finally:
            self._open = False
            self._calls.clear()

    def pause(self) -> None:
        """Record nothing more until `recording` is entered again; what was recorded can still be read."""
        self._open = False

    def _read(self) -> list[Call]:
        self.pause()
        absent = [stage.path for i, stage in enumerate(self.stages) if i not in self._calls]
        if absent:
            raise TapNotCalled(_NOT_CALLED.format(names=absent, kind=self.kind))
        for i, stage in enumerate(self.stages):
            if len(self._calls[i]) > 1:
                raise UnsupportedTraining(
                    f"The section {stage.path!r} of the {self.kind} ran {len(self._calls[i])} times in one forward; "
                    f"once is needed. Name the modules above or below those that are shared."
                )
        order = [self.stages[i].path for i in self._calls]
        if order != [stage.path for stage in self.stages]:
            raise UnsupportedTraining(
                f"The sections of the {self.kind} ran in the order {order}. Name them in this order in sections=."
            )
        return [self._calls[i][0] for i in range(len(self.stages))]

    def _entered(self, i: int, args: Any, kwargs: Any) -> None:
        if self._clone:
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        self._calls.setdefault(i, []).append(Call(args, dict(kwargs), versions_of((args, kwargs))))

    def _left(self, i: int, output: Any) -> None:
        if i not in self._calls:
            return
        call = self._calls[i][-1]
        call.output = tree_map_only(Tensor, torch.clone, output) if self._clone else output
        if call.versions is not None:  # those of the input are from before the section ran
            call.versions = [*call.versions, *(versions_of(call.output) or [])]

    def _listens_to(self, hooked: nn.Module, module: nn.Module) -> bool:
        # a shallow copy of a network shares its hooks; activation checkpointing runs it again in the backward pass
        return self._open and module is hooked and (torch.compiler.is_compiling() or not _in_backward())


class _Hook:
    """A hook of one section; an object, not a closure, so that copies of the network can get rid of it."""

    def __init__(self, tap: SectionTap, place: int, module: nn.Module) -> None:
        self.tap = tap
        self.place = place
        self.module = module

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert_hook_factory, ()


class _Entry(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.tap._listens_to(self.module, module):
            self.tap._entered(self.place, args, kwargs)


class _Exit(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.tap._listens_to(self.module, module):
            self.tap._left(self.place, output)


def versions_of(value: Any) -> list[int] | None:
    """Return how often each tensor was changed in place; `None` in compiled code."""
    if torch.compiler.is_compiling():  # functionalised graphs do not count versions, and overwrite nothing
        return None
    return [0 if x.is_inference() else x._version for x in tensors_in(value)]


def _needed(value: Any, verb: str) -> Tensor:
    tensor = first_tensor(value)
    if tensor is None:
        raise BatchFormat(f"A section {verb} a {type(value).__name__} without a tensor, so that it has no features.")
    return tensor


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _inert_hook(*_: Any, **__: Any) -> None:
    """Stand-in for a hook in copies of the network."""


def _inert_hook_factory() -> Callable[..., None]:
    return _inert_hook
