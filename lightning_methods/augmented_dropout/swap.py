"""Put dual dropout into an unchanged module, and let the layers after it find both views of what they read.

A swapped dropout returns the features of the forward mask, whose errors get the backward mask whoever reads them. It
also leaves a note with the exchange; a swapped Linear or Conv that gets those very values (the same storage, under any
view) takes its weight gradient from the features of the backward mask instead. Where something was computed in between,
there is no such layer, and the errors are all there is to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_methods.augmented_dropout.consumers import consume_conv, consume_linear
from lightning_methods.augmented_dropout.functional import Rate, Switch, Views, masked
from lightning_methods.augmented_dropout.layers import Noise
from lightning_methods.errors import InvalidArgument

_LINEAR = (nn.Linear,)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONSUMERS = _LINEAR + _CONV
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity)


@dataclass
class _Note:
    """What is needed to make the features of the backward mask, in the memory layout of those of the forward mask."""

    dropout: str
    x: Tensor
    versions: tuple[int, int]  # of x and of what was handed out, when that happened
    mask: Tensor | None
    scale: Rate
    offset: Tensor | None
    layout: tuple[Any, Any, Any, torch.dtype]
    made: Tensor | None = None

    def features(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                made = masked(self.x, self.mask, self.scale, self.offset)
                if made.stride() != self.layout[1]:
                    laid = made.new_empty_strided(*self.layout[:2])
                    made = laid.copy_(made)
                self.made = made
        return self.made


@dataclass
class Exchange:
    """Where the layers of a step find the two views of what a dropout gave them.

    Attributes:
        switch: of this step, when its gradient is compared with that of standard dropout.
        matched: dropout -> the layers that took its backward view.
        seen: the dropouts that ran.
        overwritten: dropouts whose input or output was changed in place before a layer read it.
        watched: while not `None`, collects the graph node of every output, to find out who reads them.
        between_graphs: whether a dropout may have readers that only its output's storage tells.
        intercepted, in_known_module: whether calls of `F.dropout` are looked at, and whether one belongs to a module.
    """

    switch: Switch | None = None
    matched: dict[str, dict[str, None]] = field(default_factory=dict)
    seen: dict[str, None] = field(default_factory=dict)
    overwritten: dict[str, None] = field(default_factory=dict)
    watched: dict[Any, str] | None = None
    between_graphs: bool = False
    intercepted: bool = False
    in_known_module: bool = False
    slots: list[list[Tensor]] = field(default_factory=list)
    _notes: dict[StorageWeakRef, _Note] = field(default_factory=dict)

    def put(self, dropout: str, views: Views, *, faithful: bool = True) -> None:
        """Remember both views of what a dropout returns, for as long as its memory lives, if layers are to ask."""
        y, x = views.forward, views.x.detach()
        self.seen[dropout] = None
        if self.watched is not None and y.grad_fn is not None:
            self.watched[y.grad_fn] = dropout
        if not faithful:
            return
        for gone in [key for key in self._notes if key.expired()]:
            del self._notes[gone]
        key = _storage(y)
        if key is not None:
            layout = (y.size(), y.stride(), y.storage_offset(), y.dtype)
            versions = (x._version, y._version)
            self._notes[key] = _Note(dropout, x, versions, views.mask, views.scale, views.offset, layout)

    def take(self, layer: str, x: Tensor) -> Tensor | None:
        """Return the backward view of what a layer got, in the same shape, or `None` if no dropout gave it that."""
        key = _storage(x) if self._notes else None
        note = None if key is None else self._notes.get(key)
        if note is None or x.dtype != note.layout[3]:
            return None
        if (note.x._version, x._version) != note.versions:
            self.overwritten[note.dropout] = None
            return None
        self.matched.setdefault(note.dropout, {})[layer] = None
        features = note.features()
        return features.as_strided(x.size(), x.stride(), x.storage_offset() - note.layout[2])

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let calls of `F.dropout` pass that belong to a module which is known."""
        if not self.intercepted:
            yield
            return
        self.in_known_module, before = True, self.in_known_module
        try:
            yield
        finally:
            self.in_known_module = before

    def end_step(self) -> None:
        """Drop every tensor, and all that belonged to one step."""
        self._notes.clear()
        self.switch = self.watched = None
        self.intercepted = False
        for slot in self.slots:
            slot.clear()


def _storage(x: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(x.untyped_storage())
    except (RuntimeError, NotImplementedError):  # a tensor within torch.func, or of a class without storage
        return None


@torch.compiler.disable
def _put_between_graphs(exchange: Exchange, dropout: str, views: Views) -> None:
    exchange.put(dropout, views)


@torch.compiler.disable
def _take_between_graphs(exchange: Exchange, layer: str, x: Tensor) -> Tensor | None:
    return exchange.take(layer, x)


# -- the swapped classes -----------------------------------------------------------------------------------------------


@dataclass
class _Attached:
    """What a swapped module knows.

    `faithful` says whether layers may take the backward view of this dropout. `slot` passes the backward view on within
    one compiled graph, where storages cannot be asked for: from a dropout to the layer that follows it in an
    `nn.Sequential`, with nothing but the reshaping modules `between` them.
    """

    name: str
    exchange: Exchange
    original: type[nn.Module]
    noise: Noise | None = None
    faithful: bool = True
    slot: list[Tensor] | None = None
    between: list[nn.Module] = field(default_factory=list)


class _Swapped(nn.Module):
    """Copies and pickles of a swapped module are of its own class."""

    _dual: _Attached

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, (cls, *args), state, *rest = reduced
        state = {key: value for key, value in state.items() if key != "_dual"}
        original = self._dual.original
        return _new, (original if cls is type(self) else cls, *args), state, *rest


def _new(cls: Any, *args: Any) -> Any:
    return cls.__new__(cls, *args)


class _SwappedDropout(_Swapped):
    def forward(self, input: Tensor) -> Tensor:
        own = self._dual
        assert own.noise is not None
        with own.exchange.passing():
            views = own.noise.views(input, training=self.training, switch=own.exchange.switch)
        if not views.tied and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                own.exchange.put(own.name, views, faithful=own.faithful)
            elif own.slot is not None:
                own.slot[:] = [views.backward()]
            elif own.faithful:
                _put_between_graphs(own.exchange, own.name, views)
        return views.forward


class _SwappedPath(_Swapped):
    """A stochastic depth module; its own forward reads its rate from an attribute, which compiled code would keep."""

    def forward(self, input: Tensor) -> Tensor:
        noise = self._dual.noise
        assert noise is not None
        if not noise.in_graph(input):
            return super().forward(input)
        return noise.views(input, training=self.training).forward


class _Untouched(_Swapped):
    """A dropout that is not ours, whose call of `F.dropout` must not be taken for one of the user's own."""

    def forward(self, input: Tensor) -> Tensor:
        with self._dual.exchange.passing():
            return super().forward(input)


class _SwappedConsumer(_Swapped):
    weight: Tensor

    def _backward_view(self, x: Tensor) -> Tensor | None:
        own = self._dual
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return None
        compiling = torch.compiler.is_compiling()
        found = None if compiling else own.exchange.take(own.name, x)
        if found is None and own.slot:
            found = own.slot.pop()
            for module in own.between:
                found = module(found)
            return found if found.shape == x.shape else None
        if compiling and own.exchange.between_graphs:
            return _take_between_graphs(own.exchange, own.name, x)
        return found


class _SwappedLinear(_SwappedConsumer):
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        x_backward = self._backward_view(input)
        if x_backward is None:
            return super().forward(input)
        return consume_linear(input, x_backward, self.weight, self.bias, self._dual.exchange.switch)


class _SwappedConv(_SwappedConsumer):
    bias: Tensor | None
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        x_backward = self._backward_view(input)
        if x_backward is None:
            return super().forward(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            sides = self._reversed_padding_repeated_twice
            input = nn.functional.pad(input, sides, self.padding_mode)
            x_backward = nn.functional.pad(x_backward, sides, self.padding_mode)
            padding = 0
        conv: Any = self
        return consume_conv(
            input,
            x_backward,
            self.weight,
            self.bias,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            self._dual.exchange.switch,
        )


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has outside of a training."""
    return module._dual.original if isinstance(module, _Swapped) else type(module)


_SWAPPED_CLASSES: dict[tuple[Any, Any], Any] = {}


def _swapped_class(cls: Any, mixin: Any) -> Any:
    """Return the class that is `mixin` before `cls`, the same one every time, since compiled code is guarded by it."""
    if (cls, mixin) not in _SWAPPED_CLASSES:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _SWAPPED_CLASSES[cls, mixin] = type(cls.__name__, (mixin, cls), names)
    return _SWAPPED_CLASSES[cls, mixin]


# -- putting them in and taking them out -------------------------------------------------------------------------------


class Swapper:
    """Changes the classes of chosen modules, and changes them back; objects, keys, hooks and references stay.

    Args:
        exchange: what the swapped modules share.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._modules: list[nn.Module] = []

    def swap_dropout(self, name: str, module: nn.Module, noise: Noise, *, faithful: bool = True) -> None:
        """Give one dropout two rates."""
        self._swap(module, _SwappedDropout, _Attached(name, self.exchange, own_class(module), noise, faithful))

    def swap_path(self, name: str, module: nn.Module, noise: Noise) -> None:
        """Let compiled code read the rate of a stochastic depth module from a tensor."""
        self._swap(module, _SwappedPath, _Attached(name, self.exchange, own_class(module), noise))

    def protect(self, name: str, module: nn.Module) -> None:
        """Leave a dropout as it is, also where calls of `F.dropout` are intercepted."""
        self._swap(module, _Untouched, _Attached(name, self.exchange, own_class(module)))

    def swap_consumers(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        """Let every linear or convolutional layer ask for the backward view."""
        for name, module in named:
            for classes, mixin in ((_LINEAR, _SwappedLinear), (_CONV, _SwappedConv)):
                # layers that compute something else in their forward (LoRA, quantised) are none of ours
                same = any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes)
                if same and "forward" not in vars(module) and not isinstance(module, _Swapped):
                    self._swap(module, mixin, _Attached(name, self.exchange, own_class(module)))

    def join_neighbours(self, root: nn.Module) -> None:
        """Let dropouts and layers that follow each other in a Sequential do so within one compiled graph."""
        for module in root.modules():
            if type(module).forward is not nn.Sequential.forward:
                continue
            leaves = list(_leaves(module))
            for i, dropout in enumerate(leaves):
                if not (isinstance(dropout, _SwappedDropout) and dropout._dual.faithful and _plain(dropout)):
                    continue
                j = i + 1
                while j < len(leaves) and isinstance(leaves[j], _VIEWS) and _plain(leaves[j]):
                    j += 1
                if j < len(leaves) and isinstance(leaves[j], _SwappedConsumer) and not leaves[j]._forward_pre_hooks:
                    self._join(dropout, leaves[i + 1 : j], leaves[j])
        self.exchange.between_graphs = any(
            isinstance(m, _SwappedDropout) and m._dual.slot is None for m in self._modules
        )

    @property
    def active(self) -> bool:
        """Whether anything is swapped at this moment."""
        return bool(self._modules)

    def restore(self) -> None:
        """Give every module its own class back; harmless when called twice."""
        for module in reversed(self._modules):
            attached = vars(module).pop("_dual", None)
            if attached is not None:
                module.__class__ = attached.original
        self._modules.clear()
        self.exchange.end_step()

    def _swap(self, module: nn.Module, mixin: Any, attached: _Attached) -> None:
        if isinstance(module, _Untouched):  # by a callback that leaves it to this one
            module.__class__ = own_class(module)  # type: ignore[assignment]
        if isinstance(module, _Swapped):
            raise InvalidArgument(
                f"Another callback has already changed the dropout {attached.name!r}. Attach one of them, with a "
                f"schedule where rates should move, or divide the dropouts between them with include and exclude."
            )
        vars(module)["_dual"] = attached  # past nn.Module.__setattr__
        module.__class__ = _swapped_class(attached.original, mixin)
        self._modules.append(module)

    def _join(self, dropout: Any, between: list[nn.Module], consumer: Any) -> None:
        if dropout._dual.slot is None:
            dropout._dual.slot = []
            self.exchange.slots.append(dropout._dual.slot)
        consumer._dual.slot, consumer._dual.between = dropout._dual.slot, between
        self.exchange.matched.setdefault(dropout._dual.name, {})[consumer._dual.name] = None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what a module runs one after the other, with the Sequentials in it opened."""
    for child in module.children():
        if type(child).forward is nn.Sequential.forward and _plain(child):
            yield from _leaves(child)
        else:
            yield child


def _plain(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)
