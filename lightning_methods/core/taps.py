"""Layer names or patterns -> the tensors that flow there, without changing the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.core.layers import check_patterns, match_layers
from lightning_methods.errors import (
    InvalidArgument,
    ShapeMismatch,
    TapNotCalled,
    TensorOverwritten,
    UnsupportedTraining,
    check_choice,
    did_you_mean,
)

Pool = Literal["flatten", "gap", "none"] | Callable[[Tensor], Tensor]


class FeatureTaps:
    r"""Capture what chosen layers return (or receive) while a module runs.

    `attach` registers hooks, `recording` opens the window of one step, `read` returns the tensors of that step, and
    leaving the window drops them: between steps no tensor is held, so that the module can be deep-copied and pickled.
    Copies of a tapped module do not write into the taps.

    Shapes:
        captured tensor `(B, ...)`; `read` returns `(B, D)` with `pool="flatten"`, `(B, C)` with `"gap"`.

    Args:
        layers: names or patterns, see `lightning_methods.core.layers.match_layers`.
        capture: the layer's `"output"` or its `"input"` (which survives layers that overwrite in place what they get).
        select: index or key of the wanted tensor where a layer returns (receives) a tuple, a dict or a model output;
            `None` takes the first tensor with a batch dimension and at least one more.
        pool: `"flatten"` all dimensions after the batch, `"gap"` (mean over all dimensions after the channel, dimension
            1), `"none"`, or a function of the tensor.
        on_repeat: what to do with a layer that runs several times in a step: raise an `"error"`, keep the `"last"`
            call, or keep `"all"`, named `layer#0`, `layer#1`, ...
        detach: whether the tensors leave the graph at once (for probes).

    Raises:
        InvalidArgument: for settings that cannot be read.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> taps = FeatureTaps("0")
        >>> taps.attach(net)
        ['0']
        >>> with taps.recording():
        ...     _ = net(torch.ones(2, 3))
        ...     {name: tuple(tensor.shape) for name, tensor in taps.read().items()}
        {'0': (2, 4)}
        >>> taps.detach()
    """

    def __init__(
        self,
        layers: str | Sequence[str],
        *,
        capture: Literal["output", "input"] = "output",
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        detach: bool = False,
    ) -> None:
        check_choice("capture", capture, ("output", "input"))
        check_choice("on_repeat", on_repeat, ("error", "last", "all"))
        if not callable(pool):
            check_choice("pool", pool, ("flatten", "gap", "none"))
        self.patterns = check_patterns(layers)
        self.capture = capture
        self.select = select
        self.pool = pool
        self.on_repeat = on_repeat
        self.detach_tensors = detach
        self.names: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # layer name -> (tensor, its version when captured) of every call in this step; a dict keeps execution order
        self._captured: dict[str, list[tuple[Tensor, int | None]]] = {}
        self._recording = False
        self._with_grad = False

    def attach(self, module: nn.Module) -> list[str]:
        """Register the hooks on `module` and return the names of the tapped layers."""
        self.detach()
        layers = match_layers(module, self.patterns)
        self.names = list(layers)
        for name, layer in layers.items():
            hook = _Hook(self, name, layer)
            if self.capture == "output":
                handle = layer.register_forward_hook(hook, with_kwargs=True)
            else:
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        return self.names

    def detach(self) -> None:
        """Remove every hook and drop every tensor; harmless when called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()
        self._recording = False

    @contextmanager
    def recording(self) -> Iterator[FeatureTaps]:
        """Open the window of one step: only what runs inside is captured, and all of it is dropped at the end."""
        self._captured.clear()
        self._with_grad = torch.is_grad_enabled()
        self._recording = True
        try:
            yield self
        finally:
            self._recording = False
            self._captured.clear()

    def pause(self) -> None:
        """Capture nothing more until the window is opened again; what was captured in it can still be read."""
        self._recording = False

    def read(self, *, missing: Literal["error", "skip"] = "error", mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the pooled tensors of the open window in execution order.

        Args:
            missing: whether a layer that did not run is an `"error"` or left out (`"skip"`).
            mask: which positions of padded sequences are real, `(B, T)`: tensors `(B, T, ...)` are averaged over these
                before they are pooled. Tensors without positions, `(B, D)`, are as ever.

        Raises:
            InvalidArgument: for a mask of other values than 0 and 1, or a sample without a real position.
            ShapeMismatch: if the mask does not fit a tensor.
            TapNotCalled: if a tapped layer did not run.
            TensorOverwritten: if a tensor was changed in place since it was captured.
            UnsupportedTraining: if a layer ran several times with `on_repeat="error"`, or without a graph although the
                step has one (`torch.no_grad()`, reentrant activation checkpointing).
        """
        absent = [name for name in self.names if name not in self._captured]
        if absent and missing == "error":
            raise TapNotCalled(_NOT_CALLED.format(layers=", ".join(repr(name) for name in absent)))
        features: dict[str, Tensor] = {}
        for name, calls in self._captured.items():
            if len(calls) > 1 and self.on_repeat == "error":
                raise UnsupportedTraining(
                    f"The layer {name!r} ran {len(calls)} times in one step, and which of them to use was not said. "
                    "Set on_repeat='last' or on_repeat='all'."
                )
            for k, (tensor, version) in enumerate(calls if self.on_repeat == "all" else calls[-1:]):
                if version is not None and tensor._version != version:
                    raise TensorOverwritten(_OVERWRITTEN.format(layer=name, capture=self.capture))
                features[f"{name}#{k}" if self.on_repeat == "all" and len(calls) > 1 else name] = self._pooled(
                    name, tensor, mask
                )
        return features

    def _pooled(self, name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and tensor.ndim > 2:
            try:
                tensor = masked_mean(tensor, mask)
            except ShapeMismatch as error:
                raise ShapeMismatch(f"The layer {name!r}: {error}") from error
        if callable(self.pool):
            return self.pool(tensor)
        if self.pool == "none":
            return tensor
        if tensor.ndim < 2:
            raise ShapeMismatch(
                f"The layer {name!r} gave a tensor of shape {tuple(tensor.shape)}; (batch, features, ...) is needed. "
                "Tap another layer, or pass pool= a function that gives one row per sample."
            )
        if self.pool == "gap" and tensor.ndim > 2:
            return tensor.flatten(2).mean(2)
        return tensor.flatten(1)

    def _store(self, name: str, value: Any) -> None:
        tensor = _select_tensor(value, self.select, name)
        version: int | None = None
        if torch.compiler.is_compiling() or tensor.is_inference():
            # neither functionalised graphs nor inference tensors count versions: a copy made now cannot be overwritten
            tensor = tensor.detach().clone() if self.detach_tensors else tensor.clone()
        else:
            version = tensor._version
            if self._with_grad and not self.detach_tensors and not torch.is_grad_enabled():
                raise UnsupportedTraining(
                    f"The layer {name!r} ran without a graph inside a step that has one, so that no gradient could "
                    "reach it: under torch.no_grad(), or in reentrant activation checkpointing. Use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or tap a layer that is trained."
                )
            if self.detach_tensors:
                tensor = tensor.detach()  # shares the version counter with the original
        self._captured.setdefault(name, []).append((tensor, version))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    r"""Return the mean over the real positions of padded sequences.

    .. math:: \bar x_b = \sum_t m_{bt}\, x_{bt} \Big/ \sum_t m_{bt}

    Shapes:
        `x` `(B, T, ...)`, `mask` `(B, T)`; returns `(B, ...)`, in float32 or better.

    Args:
        x: features of every position; those of padded positions may be anything, also not finite.
        mask: 1 or True where a position is real, as the `attention_mask` of a tokenizer.

    Raises:
        InvalidArgument: for other values than 0 and 1, or a sample without a real position.
        ShapeMismatch: if the mask is not of the first two dimensions of `x`.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    if x.ndim < 2 or tuple(mask.shape) != tuple(x.shape[:2]):
        raise ShapeMismatch(
            f"features of shape {tuple(x.shape)} and a mask of shape {tuple(mask.shape)}; (B, T, ...) and (B, T) are "
            f"needed. Where time comes first or positions were merged, pass pool= a function instead of mask=."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidArgument(
            f"The mask holds {mask[(mask != 0) & (mask != 1)].flatten()[0].item():g}; 1 is needed where a position is "
            f"real and 0 where it is padding. Pass mask= a function of the batch, such as one that returns ids != pad."
        )
    real = mask.to(x.device).bool()
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InvalidArgument(
            f"Sample {empty[0]} of the batch has no real position ({len(empty)} of {len(real)} have none): its mask is "
            f"0 everywhere. Leave such samples out."
        )
    weights = real.reshape(*real.shape, *[1] * (x.ndim - 2))
    x = x if x.dtype == torch.float64 else x.float()
    # not times the mask: what is not finite in the padding would stay so
    return x.masked_fill(~weights, 0).sum(1) / weights.sum(1)


def joined(layer: str, pieces: Sequence[Tensor]) -> Tensor:
    """Return what a layer gave for several batches as one tensor.

    Args:
        layer: name of the layer, for the message.
        pieces: its pooled tensors, batch by batch.

    Raises:
        ShapeMismatch: if their rows have different lengths, as those of sequences that are padded batch by batch.

    Example:
        >>> import torch
        >>> joined("encoder", [torch.ones(2, 3), torch.ones(1, 3)]).shape
        torch.Size([3, 3])
    """
    shapes = sorted({tuple(x.shape[1:]) for x in pieces})
    if len(shapes) > 1:
        raise ShapeMismatch(
            f"The layer {layer!r} gave rows of shape {shapes[0]} in one batch and {shapes[1]} in another. Average over "
            f"the positions, with mask= for padded sequences or pool='gap' for maps, or pad all batches to one size."
        )
    return torch.cat(list(pieces))


class _Hook:
    """The forward (pre-)hook of one layer; an object, not a closure, so that copies of the module can get rid of it."""

    def __init__(self, taps: FeatureTaps, name: str, layer: nn.Module) -> None:
        self.taps = taps
        self.name = name
        self.layer = layer

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # a shallow copy of the layer (or torch.nn.utils.fusion) shares the hooks but is another module
        if not self.taps._recording or layer is not self.layer:
            return
        # activation checkpointing runs the layer again in the backward pass
        if not torch.compiler.is_compiling() and _in_backward():
            return
        if self.taps.capture == "output":
            self.taps._store(self.name, output)
        else:
            self.taps._store(self.name, _received(args, kwargs, self.taps.select))

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert_hook_factory, ()


def _inert_hook(*_: Any, **__: Any) -> None:
    """Stand-in for a tap in copies of the module."""


def _inert_hook_factory() -> Callable[..., None]:
    return _inert_hook


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _received(args: tuple[Any, ...], kwargs: Mapping[str, Any], select: int | str | None) -> Any:
    if isinstance(select, str):
        return kwargs if select in kwargs or not args else args[0]
    if isinstance(select, int) or len(args) > 1:
        return args
    return args[0] if args else dict(kwargs)


def _select_tensor(value: Any, select: int | str | None, layer: str) -> Tensor:
    """Return the tensor that a layer gave: itself, the selected item, or the first one with rows of features."""
    if isinstance(value, Tensor):
        return value
    items: dict[Any, Any]
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, (tuple, list)):
        items = dict(enumerate(value))
        fields: Sequence[str] = getattr(value, "_fields", ())
        if isinstance(select, str):
            items = {field: value[i] for i, field in enumerate(fields)}
    else:  # dataclasses and model outputs that are not mappings
        items = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
    if isinstance(select, int) and not isinstance(value, (tuple, list)):
        items = dict(enumerate(items.values()))
    if isinstance(select, int) and select < 0:
        select += len(items)

    tensors = {k: v for k, v in items.items() if isinstance(v, Tensor)}
    if select is not None:
        if select in tensors:
            return tensors[select]
        hint = did_you_mean(str(select), [str(k) for k in tensors])
        raise InvalidArgument(f"The layer {layer!r} has no tensor under select={select!r}. {hint}")
    rows = [v for v in tensors.values() if v.ndim >= 2]
    if rows:
        return rows[0]
    raise InvalidArgument(
        f"The layer {layer!r} gave a {type(value).__name__} without a tensor of at least two dimensions. "
        "Tap another layer, or name the item with select=."
    )


_NOT_CALLED = (
    "The tapped layer(s) {layers} did not run in the step. Either the step does not call them as modules (their "
    "weights are used by a function, or the branch is skipped): tap another layer. Or the step is compiled and the "
    "compiled code was traced before the tap was there: call torch._dynamo.reset() before fit, or set "
    "torch._dynamo.config.skip_nnmodule_hook_guards = False."
)
_OVERWRITTEN = (
    "The {capture} of the layer {layer!r} was overwritten in place after the layer ran: the captured values are gone. "
    "Usually a ReLU(inplace=True) or an in-place addition follows: tap that layer instead, or make it inplace=False."
)
