"""Put weights into the loss functions that run inside somebody else's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.importance_weighting.functions import LOSSES, Catcher, LossKind, thread
from lightning_methods.importance_weighting.losses import LDAMLoss, PolyTailLoss, VSLoss


class LossCall(NamedTuple):
    """One call of a loss function, before it is reduced.

    Attributes:
        name: of the function or class.
        losses: what it gave without reduction.
        target: its targets, `None` if they are unknown.
        kind: the function of torch, `None` for a module.
        num_classes: logits a sample, where the targets are classes.
        ignore_index: target that does not count, where the targets are classes.
        by_class: whether class weights are in the losses already (class probabilities as targets).
    """

    name: str
    losses: Tensor
    target: Tensor | None
    kind: LossKind | None = None
    num_classes: int | None = None
    ignore_index: int | None = None
    by_class: bool = False


class Weigher(Protocol):
    """Knows the weights of a call."""

    #: whether losses are only measured, and returned as they are
    measuring: bool
    #: whether losses count that train nothing, as in validation
    evaluating: bool
    #: the class weights, on a CPU and in float32, where no other weights act and none normalises them
    quick: Tensor | None
    #: the latest weighted loss
    result: Tensor | None

    def measure(self, call: LossCall) -> None:
        """Add a call to the weighted risk."""

    def give(self, result: Tensor) -> Tensor:
        """Take note of a weighted loss, and return it."""

    def counts(self, name: str, x: Tensor) -> bool:
        """Tell whether the call of this name on this input is to be weighted, having counted it."""

    def neutral(self) -> bool:
        """Tell whether all weights are 1, so that the call can stay as it is."""

    def class_table(self, x: Tensor) -> Tensor | None:
        """Return the class weights on the device of `x`."""

    def check_classes(self, name: str, table: Tensor | None, classes: int) -> None:
        """Refuse weights of another number of classes than there are logits."""

    def refuse_unknown(self, labels: Tensor, classes: int) -> None:
        """Refuse labels that are no classes, naming one."""

    def weigh(self, call: LossCall) -> tuple[Tensor, Tensor | int]:
        """Return the weighted losses, and by what a mean divides their sum."""


class LossInterception:
    """While it is entered, the loss functions of torch that this thread calls are weighted.

    Their `StandIns` must be in place. Functions are caught by their code, so that `F.cross_entropy`, a name imported
    from there and `nn.CrossEntropyLoss` are all the same.
    """

    def __init__(self, weigher: Weigher, name: str | None = None) -> None:
        self.weigher = weigher
        self.name = name  # of the calls, instead of the function's
        self.suspended = 0  # inside of a call, or of a loss module that is weighted as a whole
        self._before: list[Catcher | None] = []

    def __enter__(self) -> None:
        self._before.append(thread.catcher)
        thread.catcher = self

    def __exit__(self, *_: object) -> None:
        thread.catcher = self._before.pop()

    def on_call(self, kind: LossKind, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Weigh a call; what the function itself calls, as subclasses of tensors may, is a part of it."""
        if self.suspended:
            return function(*args, **kwargs)
        weigher, table = self.weigher, self.weigher.quick
        self.suspended += 1
        try:
            # the case of almost every step, by itself: Python that is not in the processor's caches, as after a
            # backward pass, costs more than the arithmetic of a loss, and what is not run costs nothing
            if table is not None and kind.classes and len(args) == 2 and (not kwargs or _is_mean(kwargs)):
                x, target = args
                plain = type(x) is Tensor and x.dtype is table.dtype and target.dtype is torch.long
                if plain and target.ndim == 1 and x.ndim == 2 and x.shape[1] == table.shape[0]:
                    try:
                        weight = table.index_select(0, target)
                    except (IndexError, RuntimeError):  # ignored and unknown labels, another device
                        weight = None
                    if weight is not None:
                        if not weigher.counts(self.name or kind.name, x):
                            return function(x, target, **kwargs)
                        kwargs["reduction"] = "none"
                        weigher.result = loss = (weight * function(x, target, **kwargs)).mean()
                        return loss
            # inside compiled code the call is left alone: traced, the weights of this step would stay in it
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return self._loss(kind, function, args, kwargs)
        finally:
            self.suspended -= 1

    def _loss(self, kind: LossKind, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(kind.arguments, args, strict=False), **kwargs)
        x, target = given["input"], given["target"]
        if not self.weigher.counts(self.name or kind.name, x):
            return func(*args, **kwargs)
        measuring = self.weigher.measuring
        if self.weigher.neutral():
            return self.weigher.give(func(*args, **kwargs))
        reduction = _reduction(given)
        given["reduction"] = "none"
        if not kind.classes:
            call = LossCall(kind.name, func(**given), target, kind)
            return (
                self._measured(call, func, args, kwargs) if measuring else reduced(call, self.weigher, reduction, given)
            )
        table = self.weigher.class_table(x)
        ignore_index = given.get("ignore_index", -100)
        number = x.shape[min(1, x.ndim - 1)]
        soft = target.is_floating_point()
        if soft and table is not None:
            # E[w_c loss_c] over the classes of a soft target, which is what torch's own class weights are
            own = given.get("weight")
            given["weight"] = table.to(x.dtype) if own is None else own * table.to(own.dtype)
        self.weigher.check_classes(kind.name, table, number)
        try:
            losses = func(**given)
        except (IndexError, RuntimeError):
            if not soft:
                self.weigher.refuse_unknown(target[target != ignore_index], number)
            raise
        call = LossCall(kind.name, losses, target, kind, number, None if soft else ignore_index, soft)
        return self._measured(call, func, args, kwargs) if measuring else reduced(call, self.weigher, reduction, given)

    def _measured(self, call: LossCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.weigher.measure(call)
        return func(*args, **kwargs)


def reduced(call: LossCall, weigher: Weigher, reduction: str, given: dict[str, Any]) -> Tensor:
    """Return the weighted loss in the type that the unweighted one has."""
    weighted, number = weigher.weigh(call)
    if reduction != "mean" and reduction != "batchmean":
        return weigher.give((weighted if reduction == "none" else weighted.sum()).to(call.losses.dtype))
    own = given.get("weight") if call.kind is not None and call.kind.classes and not call.by_class else None
    if own is not None and call.target is not None:
        # torch divides by the user's own weights of the targets
        counted = torch.ne(call.target, -100 if call.ignore_index is None else call.ignore_index)
        number = torch.where(counted, own[torch.where(counted, call.target, 0)], 0).sum()
    elif reduction == "batchmean":
        number = len(call.losses)
    if type(number) is int and number == weighted.numel():  # the same bits as with the weights written by hand
        return weigher.give(weighted.mean().to(call.losses.dtype))
    return weigher.give((weighted.sum() / number).to(call.losses.dtype))


def _is_mean(kwargs: dict[str, Any]) -> bool:
    """Tell whether further arguments of a call with classes leave a plain mean: what `nn.CrossEntropyLoss` gives."""
    return (
        kwargs.get("weight") is None
        and kwargs.get("reduction", "mean") == "mean"
        and kwargs.get("ignore_index", -100) < 0
        and kwargs.get("size_average") is None
        and kwargs.get("reduce") is None
    )


def _reduction(given: dict[str, Any]) -> str:
    """Return the reduction, also where it is given by the two deprecated booleans."""
    average, reduce = given.pop("size_average", None), given.pop("reduce", None)
    if average is not None or reduce is not None:
        return "none" if reduce is False else "sum" if average is False else "mean"
    reduction = given.get("reduction", "mean")
    if reduction not in ("mean", "sum", "none", "batchmean"):
        raise InvalidArgument(f"reduction={reduction!r} is not known. 'mean', 'sum' or 'none' is needed.")
    return str(reduction)


class TorchModuleInterception:
    """Hooks that let the functions of torch be caught inside of one of its own loss modules, with all its settings."""

    def __init__(self, module: Any, weigher: Weigher, name: str) -> None:
        self.functions = LossInterception(weigher, name)
        self.entered = 0
        self.handles = [
            module.register_forward_pre_hook(_Part(self.before)),
            module.register_forward_hook(_Part(self.after), always_call=True),
        ]

    def before(self, *_: Any) -> None:
        """Begin to catch."""
        self.functions.__enter__()
        self.entered += 1

    def after(self, *_: Any) -> None:
        """End it, also after an exception."""
        self.functions.__exit__()
        self.entered -= 1

    def remove(self) -> None:
        """Take the hooks away."""
        while self.entered:
            self.after()
        for handle in self.handles:
            handle.remove()


class ModuleInterception:
    """Hooks that weigh a loss module as a whole: anything with a `reduction` that gives one loss a sample for `none`.

    For losses that are no function of torch, such as those that somebody wrote.
    """

    def __init__(self, module: Any, weigher: Weigher, functions: LossInterception | None, name: str = "") -> None:
        self.module, self.weigher, self.functions = module, weigher, functions
        self.name = name or type(module).__name__
        self.reduction: str | None = None
        self.handles = [
            module.register_forward_pre_hook(_Part(self.before)),
            module.register_forward_hook(_Part(self.after), with_kwargs=True),
        ]

    def before(self, module: Any, args: Any) -> None:
        """Ask the module for one loss a sample."""
        if self.reduction is not None or not (torch.is_grad_enabled() or self.weigher.evaluating):
            return
        self.reduction = module.reduction
        if not self.weigher.measuring:
            module.reduction = "none"
        if self.functions is not None:
            self.functions.suspended += 1

    def after(self, module: Any, args: Any, kwargs: Any, losses: Any) -> Any:
        """Weigh and reduce them."""
        reduction, name = self.reduction, self.name
        if reduction is None:
            return losses
        result = losses
        if self.weigher.measuring:  # a second time, so that what the user sees is exactly what it was
            module.reduction = "none"
            losses = module.forward(*args, **kwargs)
        self.restore()
        if not isinstance(losses, Tensor):
            raise InvalidArgument(f"{name} returned {type(losses).__name__}; a tensor of one loss a sample is needed.")
        counts = self.weigher.counts(name, losses)
        if not counts and not self.weigher.measuring:
            return {"mean": losses.mean, "sum": losses.sum}.get(reduction, losses.clone)()
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        target = target if isinstance(target, Tensor) else None
        kind = _OF_TORCH.get(type(module))
        if kind is not None and kind.classes and (target is None or target.is_floating_point()):
            kind = None
        call = LossCall(name, losses, target, kind, ignore_index=getattr(module, "ignore_index", None))
        if isinstance(module, _BY_CLASS) and args and args[0].ndim == losses.ndim + 1:
            self.weigher.check_classes(name, self.weigher.class_table(losses), args[0].shape[1])
        if not self.weigher.measuring:
            return reduced(call, self.weigher, reduction, {"weight": getattr(module, "weight", None)})
        if counts:
            self.weigher.measure(call)
        return result

    def restore(self) -> None:
        """Give the module its reduction back; harmless when called twice, needed after an exception."""
        if self.reduction is not None:
            self.module.reduction = self.reduction
            self.reduction = None
            if self.functions is not None:
                self.functions.suspended -= 1

    def remove(self) -> None:
        """Take the hooks away."""
        self.restore()
        for handle in self.handles:
            handle.remove()


class GradientInterception:
    """A hook that multiplies the gradient that comes back into one layer's output by the weight of each sample.

    For losses that nothing else can take apart: they must be a mean of one loss a sample, which is what arrives here
    already multiplied by 1 / B.
    """

    def __init__(self, layer: torch.nn.Module, weights: Callable[[Tensor], Tensor], select: int | str | None) -> None:
        self.weights, self.select = weights, select
        self.calls = 0
        self.handle = layer.register_forward_hook(_Part(self.after))

    def after(self, layer: Any, args: Any, output: Any) -> None:
        """Wait for the gradient of the output."""
        x = output if self.select is None else output[self.select]
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"The head returned a {type(x).__name__}; say which item is the tensor with select=.")
        if x.requires_grad:
            self.calls += 1
            weights = self.weights(x)
            if weights.shape != x.shape[:1]:
                raise ShapeMismatch(f"The head gave {tuple(x.shape)} and there are {len(weights)} samples to weight.")
            factor = weights.to(x.device, torch.promote_types(x.dtype, torch.float32)).view(-1, *[1] * (x.ndim - 1))
            x.register_hook(lambda gradient: (gradient * factor).to(gradient.dtype))

    def remove(self) -> None:
        """Take the hook away."""
        self.handle.remove()


class _Part:
    """A hook, as an object so that copies of the module get rid of it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_factory, ()


def _inert(*_: Any, **__: Any) -> None:
    """Stand-in for a hook in copies of the module."""


def _inert_factory() -> Callable[..., None]:
    return _inert


_OF_TORCH = {
    torch.nn.CrossEntropyLoss: LOSSES[F.cross_entropy],
    torch.nn.NLLLoss: LOSSES[F.nll_loss],
    torch.nn.BCELoss: LOSSES[F.binary_cross_entropy],
    torch.nn.BCEWithLogitsLoss: LOSSES[F.binary_cross_entropy_with_logits],
    torch.nn.MSELoss: LOSSES[F.mse_loss],
    torch.nn.L1Loss: LOSSES[F.l1_loss],
    torch.nn.SmoothL1Loss: LOSSES[F.smooth_l1_loss],
    torch.nn.HuberLoss: LOSSES[F.huber_loss],
    torch.nn.KLDivLoss: LOSSES[F.kl_div],
}
#: losses whose first argument is known to be logits; those of others may be features
_BY_CLASS = (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss, PolyTailLoss, VSLoss, LDAMLoss)


class LossModule(NamedTuple):
    """A loss module, and whether it is to be weighted as a whole rather than by the functions that it calls."""

    module: Any
    whole: bool


def intercept(found: LossModule, weigher: Weigher, functions: LossInterception | None, match: str) -> Any:
    """Return what weighs a loss module."""
    name = type(found.module).__name__ if match in ("auto", "all", "first") else match
    if found.whole:
        return ModuleInterception(found.module, weigher, functions, name)
    return TorchModuleInterception(found.module, weigher, name)


def loss_modules(root: torch.nn.Module, *, all_of_them: bool) -> dict[str, LossModule]:
    """Return the loss modules in a module: those with a `reduction` that are named or made as losses.

    Without `all_of_them` those are left out whose function of torch is caught by itself.
    """
    return {
        name: LossModule(module, type(module) not in _OF_TORCH or _compiled(root, name))
        for name, module in root.named_modules()
        if name
        and getattr(module, "reduction", None) in ("mean", "sum", "none")
        and "loss" in type(module).__name__.lower()
        and (all_of_them or type(module) not in _OF_TORCH)
    }


def _compiled(root: torch.nn.Module, name: str) -> bool:
    """Tell whether a submodule runs inside of compiled code, where no function is caught but hooks are traced."""
    parts = name.split(".")
    parents = (root.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))
    return "_orig_mod" in parts or any(getattr(m, "_compiled_call_impl", None) is not None for m in parents)
