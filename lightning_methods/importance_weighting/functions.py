"""The loss functions of torch, and how their calls are caught, by whatever name and module they are called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, Protocol

from torch.nn import functional as F

_TAIL = ("size_average", "reduce", "reduction")


class LossKind(NamedTuple):
    """A loss function of torch: its name, the order of its arguments, and whether its targets are classes."""

    name: str
    arguments: tuple[str, ...]
    classes: bool = False
    binary: bool = False


_CLASSES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
LOSSES: dict[Any, LossKind] = {
    F.cross_entropy: LossKind("cross_entropy", _CLASSES, classes=True),
    F.nll_loss: LossKind("nll_loss", _CLASSES[:-1], classes=True),
    F.binary_cross_entropy: LossKind("binary_cross_entropy", ("input", "target", "weight", *_TAIL), binary=True),
    F.binary_cross_entropy_with_logits: LossKind(
        "binary_cross_entropy_with_logits", ("input", "target", "weight", *_TAIL, "pos_weight"), binary=True
    ),
    F.mse_loss: LossKind("mse_loss", ("input", "target", *_TAIL, "weight")),
    F.l1_loss: LossKind("l1_loss", ("input", "target", *_TAIL, "weight")),
    F.smooth_l1_loss: LossKind("smooth_l1_loss", ("input", "target", *_TAIL, "beta")),
    F.huber_loss: LossKind("huber_loss", ("input", "target", "reduction", "delta", "weight")),
    F.kl_div: LossKind("kl_div", ("input", "target", *_TAIL, "log_target")),
}


class Catcher(Protocol):
    """What the calls of a thread go to."""

    def on_call(self, kind: LossKind, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return what the call is to return; `function` is the function as it is while nobody catches."""


class _Thread(threading.local):
    catcher: Catcher | None = None


#: `catcher`: what the calls of this thread go to
thread = _Thread()


def _stand_in(*args: Any, **kwargs: Any) -> Any:
    entry: Any = "the entry"  # this constant is replaced by the entry of the function
    catcher = entry.thread.catcher
    if catcher is None:
        return entry.original(*args, **kwargs)
    return catcher.on_call(entry.kind, entry.original, args, kwargs)


class _Entry:
    """A loss function, what it is while nobody catches, and the code that else stands in for its own."""

    def __init__(self, function: FunctionType, kind: LossKind) -> None:
        self.function, self.kind, self.thread = function, kind, thread
        self.original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self.original.__kwdefaults__ = function.__kwdefaults__
        code = _stand_in.__code__
        # as a constant the entry is there without a name among the globals of torch.nn.functional
        constants = tuple(self if constant == "the entry" else constant for constant in code.co_consts)
        self.stand_in = code.replace(co_consts=constants, co_name=function.__name__)


_ENTRIES = [
    _Entry(function, kind)
    for function, kind in LOSSES.items()
    if isinstance(function, FunctionType) and not function.__code__.co_freevars  # else somebody has replaced it
]
_lock = threading.Lock()
_in_place = 0


class StandIns:
    """The code that stands in for that of the loss functions, so that a catcher gets their calls.

    The functions stay the objects that they are: names imported from torch, partials, default arguments and the modules
    of torch all reach the stand-ins, and no other operation costs anything. Where there is no catcher, as in other
    threads and between the steps, a call does what it always does. Copies have nothing in place.
    """

    def __init__(self) -> None:
        self.placed = False

    def put_in_place(self) -> None:
        """Replace the code; harmless when called twice."""
        global _in_place
        with _lock:
            if not self.placed and _in_place == 0:
                for entry in _ENTRIES:
                    entry.original.__code__, entry.function.__code__ = entry.function.__code__, entry.stand_in
            _in_place += not self.placed
            self.placed = True

    def put_back(self) -> None:
        """Give the functions their own code back, unless another fit needs the stand-ins; harmless again."""
        global _in_place
        with _lock:
            _in_place -= self.placed
            if self.placed and _in_place == 0:
                for entry in _ENTRIES:
                    entry.function.__code__ = entry.original.__code__
            self.placed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return StandIns, ()
