"""Dropout modules with one rate for each pass, in place of those of `torch.nn`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.augmented_dropout.functional import (
    Coupling,
    Rate,
    Scale,
    Switch,
    Views,
    check_rate,
    check_settings,
    dual_views,
)
from lightning_methods.errors import InvalidArgument, ShapeMismatch

Kind = Literal["element", "1d", "2d", "3d", "alpha", "feature alpha", "sample", "batch"]

STANDARD: dict[Kind, Any] = {
    "element": F.dropout,
    "1d": F.dropout1d,
    "2d": F.dropout2d,
    "3d": F.dropout3d,
    "alpha": F.alpha_dropout,
    "feature alpha": F.feature_alpha_dropout,
}


@dataclass
class Noise:
    """The rates of one dropout, what they are multiplied by at this moment, and how masks are drawn.

    Attributes:
        kind: what is dropped.
        p_forward, p_backward: the rates at full strength.
        coupling, scale: as in `dual_dropout`.
        inplace: of standard dropout, as the user's module has it.
        factors: of both rates, in `[0, 1]`.
        graphed: the same as a tensor `(2,)`, read by compiled code and by CUDA graphs, which would keep a number for
            good (or be compiled again for every new one).
        one_schedule: whether both factors are always equal.
    """

    kind: Kind
    p_forward: float
    p_backward: float
    coupling: Coupling = "nested"
    scale: Scale = "inverted"
    inplace: bool = False
    factors: tuple[float, float] = (1.0, 1.0)
    graphed: Tensor | None = field(default=None, repr=False)
    one_schedule: bool = True

    def __post_init__(self) -> None:
        check_settings(self.p_forward, self.p_backward, self.coupling, self.scale)
        if "alpha" in self.kind and self.scale == "classic":
            raise InvalidArgument(
                "scale='classic' has no meaning for alpha dropout, which keeps mean and variance itself."
            )

    @property
    def is_standard(self) -> bool:
        """Whether this is the dropout of `torch.nn`, at whatever rate."""
        same = self.p_forward == self.p_backward and self.one_schedule
        return same and self.coupling == "nested" and self.scale == "inverted"

    @property
    def rates(self) -> tuple[float, float]:
        """Both rates at this moment."""
        return self.p_forward * self.factors[0], self.p_backward * self.factors[1]

    def in_graph(self, x: Tensor) -> bool:
        """Whether rates change and a graph is being made, which must read them from a tensor."""
        return self.graphed is not None and (torch.compiler.is_compiling() or _capturing(x))

    def views(self, x: Tensor, *, training: bool, switch: Switch | None = None) -> Views:
        """Return what the two passes see of `x`."""
        in_graph = self.in_graph(x)
        if in_graph and not training and self.scale != "classic":
            return Views(x, x, tied=True)  # whatever the rates: nothing here is guarded by their values
        if self.is_standard and not in_graph:
            p = self.rates[0]
            return Views(STANDARD[self.kind](x, p, training, self.inplace), x, tied=True)
        p_forward: Rate
        p_backward: Rate | None
        if in_graph and self.graphed is not None:
            # the numbers must not be looked at here: compiled code would be guarded by their values
            p_forward, p_backward = self.p_forward * self.graphed[0], self.p_backward * self.graphed[1]
        else:
            p_forward, p_backward = self.rates
        return dual_views(
            x,
            p_forward,
            None if self.is_standard else p_backward,
            training=training,
            coupling=self.coupling,
            scale=self.scale,
            mask_shape=mask_shape(self.kind, x),
            alpha="alpha" in self.kind,
            switch=switch,
        )


def mask_shape(kind: Kind, x: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a mask, `None` for one of each element; unbatched inputs are read as torch reads them.

    Raises:
        ShapeMismatch: if features of this kind have other dimensions.
    """
    if kind in ("element", "alpha"):
        return None
    if kind in ("sample", "batch"):
        return (x.shape[0] if kind == "sample" else 1, *[1] * (x.ndim - 1))
    unbatched = {"1d": x.ndim == 2, "3d": x.ndim != 5}.get(kind, False)
    if x.ndim < 2 or (kind == "1d" and x.ndim > 3):
        needed = "(N, C, L) or (C, L)" if kind == "1d" else "(N, C, ...)"
        raise ShapeMismatch(f"Dropout of channels got features of shape {tuple(x.shape)}; {needed} is needed.")
    kept = 1 if unbatched else 2
    return (*x.shape[:kept], *[1] * (x.ndim - kept))


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def backward_rate(p_forward: float, p_backward: float | None, ratio: float, *, where: str = "") -> float:
    """Return the backward rate that was given, or `ratio` times the forward one.

    Raises:
        InvalidArgument: if that is no probability.
    """
    if p_backward is not None:
        return p_backward
    p = ratio * p_forward
    if p > 1:
        raise InvalidArgument(
            f"ratio={ratio:g} times the forward rate {p_forward:g}{where} is {p:g}, which is no probability. "
            f"At most ratio={1 / p_forward:.4g} fits, or give p_backward."
        )
    return p


def check_rates(p_forward: float | None, p_backward: float | None, ratio: float) -> None:
    """Raise `InvalidArgument` for rates that cannot be read, or two of them for the backward pass."""
    check_rate("p_forward", p_forward)
    check_rate("p_backward", p_backward)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < math.inf:
        raise InvalidArgument(f"ratio={ratio!r}: a number from 0 on is needed, by which p_forward is multiplied.")
    if p_backward is not None and ratio != 1.0:
        raise InvalidArgument(
            f"p_backward={p_backward!r} and ratio={ratio!r} both say how much the backward pass drops. Give one of "
            f"them."
        )


class _Dual(nn.Module):
    """What the modules below have in common; each is one of `torch.nn` too, with its `p` the forward rate."""

    kind: Kind

    def __init__(
        self,
        p_forward: float = 0.5,
        p_backward: float | None = None,
        *,
        ratio: float = 1.0,
        coupling: Coupling = "nested",
        scale: Scale = "inverted",
    ) -> None:
        nn.Module.__init__(self)
        check_rates(p_forward, p_backward, ratio)
        self.inplace = False
        self.noise = Noise(self.kind, p_forward, backward_rate(p_forward, p_backward, ratio), coupling, scale)

    @property
    def p(self) -> float:
        """The forward rate, as in `torch.nn.Dropout`."""
        return self.noise.p_forward

    @p.setter
    def p(self, value: float) -> None:
        check_rate("p", value)
        self.noise.p_forward = value

    @property
    def p_forward(self) -> float:
        """Probability of dropping a feature in the forward pass."""
        return self.noise.p_forward

    @p_forward.setter
    def p_forward(self, value: float) -> None:
        check_rate("p_forward", value)
        self.noise.p_forward = value

    @property
    def p_backward(self) -> float:
        """Probability of dropping its error in the backward pass."""
        return self.noise.p_backward

    @p_backward.setter
    def p_backward(self, value: float) -> None:
        check_rate("p_backward", value)
        self.noise.p_backward = value

    def forward(self, x: Tensor) -> Tensor:
        """Return what the forward pass leaves of `x`."""
        return self.noise.views(x, training=self.training).forward

    def extra_repr(self) -> str:
        """Return both rates and the modes."""
        n = self.noise
        return f"p_forward={n.p_forward}, p_backward={n.p_backward}, coupling={n.coupling!r}, scale={n.scale!r}"


class DualDropout(_Dual, nn.Dropout):
    r"""Drop elements with one mask in the forward pass and their errors with another one in the backward pass.

    See `dual_dropout` for the equation. A module that knows nothing of the layer after it changes the errors, not that
    layer's weight gradient; in a training with the callback `AugmentedDropout` it does both.

    Shapes:
        any -> the same.

    Args:
        p_forward: probability of dropping a feature in the forward pass. Default 0.5.
        p_backward: probability of dropping its error in the backward pass. Default `ratio * p_forward`.
        ratio: the backward rate as a multiple of the forward rate, once, when the module is made. Default 1, standard
            dropout.
        coupling: `"nested"`, `"independent"` or `"complementary"`, see `dual_dropout`.
        scale: `"inverted"`, `"none"`, `"classic"` or `"forward_only"`, see `dual_dropout`.

    Raises:
        InvalidArgument: for a rate outside [0, 1], both `p_backward` and `ratio`, or an unknown mode.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), DualDropout(0.2, 0.5), nn.Linear(8, 2))
        >>> net(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    kind = "element"


class DualDropout1d(_Dual, nn.Dropout1d):
    """`DualDropout` of whole channels of `(N, C, L)` or `(C, L)`.

    Example:
        >>> import torch
        >>> (DualDropout1d(0.5, 0.2)(torch.ones(2, 3, 5)).std(2) == 0).all()
        tensor(True)
    """

    kind = "1d"


class DualDropout2d(_Dual, nn.Dropout2d):
    """`DualDropout` of whole channels of `(N, C, H, W)`, or of `(N, C, L)` as torch has it.

    Example:
        >>> import torch
        >>> DualDropout2d(0.5, 0.2)(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
    """

    kind = "2d"


class DualDropout3d(_Dual, nn.Dropout3d):
    """`DualDropout` of whole channels of `(N, C, D, H, W)` or `(C, D, H, W)`.

    Example:
        >>> import torch
        >>> DualDropout3d(0.5, 0.2)(torch.ones(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    kind = "3d"


class DualAlphaDropout(_Dual, nn.AlphaDropout):
    """`DualDropout` for self-normalising networks, see `dual_alpha_dropout`.

    Example:
        >>> import torch
        >>> DualAlphaDropout(0.1, 0.3)(torch.zeros(5)).shape
        torch.Size([5])
    """

    kind = "alpha"


#: the exact types that are known -> what they drop
KINDS: dict[type[nn.Module], Kind] = {
    nn.Dropout: "element",
    nn.Dropout1d: "1d",
    nn.Dropout2d: "2d",
    nn.Dropout3d: "3d",
    nn.AlphaDropout: "alpha",
    nn.FeatureAlphaDropout: "feature alpha",
    **{cls: cls.kind for cls in (DualDropout, DualDropout1d, DualDropout2d, DualDropout3d, DualAlphaDropout)},
}
