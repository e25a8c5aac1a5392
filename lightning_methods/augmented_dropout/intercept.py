"""Dropout that is no module: calls of `F.dropout` and the dropout within attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_methods.augmented_dropout.consumers import consume_matmul
from lightning_methods.augmented_dropout.functional import Switch
from lightning_methods.augmented_dropout.layers import STANDARD, Kind, Noise
from lightning_methods.augmented_dropout.swap import Exchange

_FUSED_ATTENTION = F.scaled_dot_product_attention  # its name means another function while multi-head attention runs


class Interception(TorchFunctionMode):
    """Sees every call of a dropout function in a training step, and replaces it or only remembers that it was there.

    Args:
        exchange: whose notes the intercepted dropouts leave.
        noise_of: what to draw for a kind of dropout and the rate that the call asks for.
        functional: whether calls of `F.dropout` and its relatives are replaced.
        attention: whether attention with dropout is computed explicitly, so that its two passes can differ.
        faithful: whether layers may take the backward view.
    """

    def __init__(
        self,
        exchange: Exchange,
        noise_of: Callable[[Kind, float], Noise],
        *,
        functional: bool,
        attention: bool,
        faithful: bool,
    ) -> None:
        super().__init__()
        self.exchange = exchange
        self.noise_of = noise_of
        self.functional = functional
        self.attention = attention
        self.faithful = faithful
        #: names of the functions that were called with dropout and not replaced
        self.missed: dict[str, None] = {}
        self.replaced: dict[str, None] = {}
        self._handlers: dict[Any, Callable[..., Any]] = {
            function: partial(self._dropout, kind, function) for kind, function in STANDARD.items()
        }
        self._handlers[torch.dropout] = partial(self._dropout, "element", F.dropout)
        self._handlers[F.scaled_dot_product_attention] = self._attention
        self._handlers[F.multi_head_attention_forward] = self._multi_head_attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = None if self.exchange.in_known_module else self._handlers.get(func)
        return (handler or func)(*args, **(kwargs or {}))

    def _dropout(
        self,
        kind: Kind,
        function: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool | None = None,
        inplace: bool = False,
    ) -> Tensor:
        training = "alpha" not in kind if training is None else training  # the defaults of torch differ
        if not training or p == 0 or not self.functional:
            if training and p:
                self.missed[f"F.{function.__name__}"] = None
            return function(input, p, training, inplace)
        name = f"F.{function.__name__}"
        self.replaced[name] = None
        views = self.noise_of(kind, p).views(input, training=True, switch=self.exchange.switch)
        if not views.tied and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.exchange.put(name, views, faithful=self.faithful)
        return views.forward

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        name = "F.scaled_dot_product_attention"
        if not dropout_p or not self.attention:
            if dropout_p:
                self.missed[name] = None
            return _FUSED_ATTENTION(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.replaced[name] = None
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        noise = self.noise_of("element", dropout_p)
        return dual_attention(
            query,
            key,
            value,
            noise,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            faithful=self.faithful,
            switch=self.exchange.switch,
        )

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        # a mode does not see what torch's own Python functions call inside: their names are exchanged meanwhile
        inside: dict[str, Any] = {
            "dropout": partial(self._dropout, "element", F.dropout),
            "scaled_dot_product_attention": self._attention,
        }
        with _names(inside):
            return F.multi_head_attention_forward(*args, **kwargs)


@contextmanager
def _names(replacements: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(F, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(F, name, replacement)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    noise: Noise,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    faithful: bool = True,
    switch: Switch | None = None,
) -> Tensor:
    r"""Return scaled dot product attention whose weights are dropped differently in the two passes.

    .. math:: O = (A \odot m_f) V, \qquad
        \frac{\partial J}{\partial V} := (A \odot m_b)^\top \frac{\partial J}{\partial O}, \qquad
        \frac{\partial J}{\partial A} := \Bigl(\frac{\partial J}{\partial O} V^\top\Bigr) \odot m_b

    Fused kernels draw one mask for both passes; this one holds the `(L, S)` weights.

    Shapes:
        query `(..., L, E)`, key `(..., S, E)`, value `(..., S, E_v)`; returns `(..., L, E_v)`.

    Args:
        query, key, value, attn_mask, is_causal, scale: as in `F.scaled_dot_product_attention`.
        noise: the rates.
        faithful: whether the gradient of `value` takes the weights of the backward mask.
        switch: see `dual_views`.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.mT
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        bars = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if bars else scores + attn_mask
    # rows that may look at nothing give 0, as in torch
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1, dtype=_wide(scores)).to(scores.dtype).masked_fill(blind, 0.0)
    views = noise.views(weights, training=True, switch=switch)
    if views.tied or not faithful:
        return views.forward @ value
    return consume_matmul(views.forward, views.backward(), value, switch)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
