"""What became of each dropout: told once after the first batch, and as a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_methods.augmented_dropout.layers import Noise
from lightning_methods.augmented_dropout.swap import Exchange

# the graph nodes of our own layers, and of views and padding, behind which the reader is looked for
_OWN = {"_LinearBackward", "_ConvBackward", "_MatmulBackward"}
_VIEWS: tuple[str, ...] = (
    "View",
    "Reshape",
    "Transpose",
    "TBackward",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "UnsafeView",
    "AsStrided",
)
_VIEWS += ("Slice", "Select", "Split", "Chunk", "Unflatten", "Alias", "Expand", "MoveDim", "Narrow")
_VIEWS += ("ConstantPad", "ReflectionPad", "ReplicationPad", "torch::autograd::CopySlices")


@dataclass(frozen=True)
class Reading:
    """One dropout: its rates, and what the weights that read it see."""

    name: str
    kind: str
    p_forward: float
    p_backward: float
    weight_gradient: str

    @property
    def line(self) -> str:
        """What the log says of it."""
        return f"{self.name} ({self.p_forward:g}/{self.p_backward:g}): {self.weight_gradient}"


def readers_of(loss: Tensor, watched: dict[Any, str]) -> dict[str, dict[str, None]]:
    """Return which operations of a graph read the watched outputs, views left out, by the name of the dropout."""
    found: dict[str, dict[str, None]] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            stack.append(child)
            for source in () if node.name().startswith(_VIEWS) else _behind_views(child, watched):
                found.setdefault(watched[source], {})[node.name()] = None
    return found


def _behind_views(node: Any, watched: dict[Any, str]) -> Iterator[Any]:
    stack = [node]
    while stack:
        source = stack.pop()
        if source in watched:
            yield source
        elif source is not None and source.name().startswith(_VIEWS):
            stack += [child for child, _ in source.next_functions]


def reading_of(name: str, noise: Noise, exchange: Exchange, readers: Sequence[str], *, faithful: bool) -> Reading:
    """Return what is known of one dropout after a step."""
    p_forward, p_backward = noise.p_forward, noise.p_backward
    others = [reader.removesuffix("0").removesuffix("Backward").lstrip("_") for reader in readers if reader not in _OWN]
    layers = list(exchange.matched.get(name, ()))
    parts = []
    if noise.is_standard:
        parts.append("standard dropout")
    elif not faithful:
        parts.append("errors only, as weight_grad='forward' asks")
    else:
        if layers:
            parts.append(f"backward mask in {', '.join(layers)}")
        if name in exchange.overwritten:
            parts.append("errors only where its values were overwritten in place before a layer read them")
        elif others or (not layers and name in exchange.seen):
            parts.append("errors only" + (f" where read by {', '.join(others)}" if others else ""))
        if not parts:
            parts.append("did not run in the first batch")
    return Reading(name, noise.kind, p_forward, p_backward, "; ".join(parts))


def summary(readings: Sequence[Reading], others: Sequence[str], missed: Sequence[str]) -> str:
    """Return the text of the report."""
    lines = [f"  {reading.line}" for reading in readings]
    text = "AugmentedDropout: dropouts (rates of the forward/backward pass) and the weight gradient of what reads them:"
    if others:
        lines.append(f"  left alone: {', '.join(others)}")
    if missed:
        lines.append(f"  left alone, calls of {', '.join(missed)}: functional='patch' or attention='math' reach them")
    return "\n".join([text, *lines])


def hidden_dropouts(module: nn.Module, *, attention: bool) -> dict[str, str]:
    """Return the modules that hold a dropout which is no module, and why it cannot be swapped."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0 and not attention:
            found[name] = f"{name} (dropout within attention: attention='math' reaches it)"
        elif isinstance(layer, nn.RNNBase) and layer.dropout > 0:
            found[name] = f"{name} (dropout within {type(layer).__name__}: cannot be reached)"
    return found
