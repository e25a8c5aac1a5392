"""Scattering features inside a network: fixed scales, or scales and laziness that are learned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice
from lightning_methods.geometric_scattering.functional import (
    Isolated,
    Normalization,
    scatter,
    scattering_paths,
    stranded,
    transition,
)
from lightning_methods.geometric_scattering.moments import (
    feature_names,
    moment_contributions,
    scattering_moments,
    warn_of_moments,
)

# a one-hot row of the softmax up to 3e-8 for each other step: as good as fixed in single precision
_SHARPNESS = 17.5


class ScatteringEncoder(nn.Module):
    r"""Turn graphs into their scattering features, with gradient to the signals and, if wanted, learned scales.

    With `learnable="legs"` (Tong et al. 2020) each scale is a mixture of diffusion times,

    .. math:: \Psi_j = \Phi_{j-1} - \Phi_j, \quad \Phi_j = \sum_{t=1}^{2^J} \mathrm{softmax}(\theta_j)_t\, P_\alpha^t,
        \quad P_\alpha = \alpha I + (1 - \alpha) A D^{-1}

    which starts as the paper's :math:`\Phi_j = P^{2^j}`, :math:`\alpha = 1/2`.

    Shapes:
        `x` `(n, F)`, `edge_index` `(2, E)`, `edge_weight` `(E,)`, `batch` `(n,)`; returns `(B, F * paths * Q)`, for
        every signal all paths, for every path all moments.

    Args:
        in_channels: number of signals F.
        J: number of scales, 5 in the paper.
        Q: number of moments, 4 in the paper.
        order: longest path, 2 in the paper.
        normalized: whether the moments are mean, variance, skewness and kurtosis, or sums of powers.
        learnable: `"legs"` learns the scales.
        scale_mode: whether rows of the selector are a `"softmax"`, or `"free"` numbers.
        learn_laziness: whether :math:`\alpha` is learned too.
        normalization: the walk, see `lazy_random_walk`.
        isolated: whether a node without edges loses mass as in the paper, or keeps it.
        remove_self_loops: whether edges from a node to itself are left out.
        include_finest: whether there is the filter :math:`I - P` (with `"legs"`, :math:`I - \Phi_0`).
        include_lowpass: whether there is the filter :math:`P^{2^J}` (with `"legs"`, :math:`\Phi_J`).

    Raises:
        InvalidArgument: for settings that cannot be read; in `forward`, for bad edges or weights.
        ShapeMismatch: in `forward`, for another number of signals.

    Example:
        >>> import torch
        >>> encoder = ScatteringEncoder(2, learnable="legs")
        >>> encoder(torch.rand(3, 2), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])).shape
        torch.Size([1, 128])

    Deviations: the selector has a row for each of the `J + 1` low-pass filters; with the softmax it starts nearly
    one-hot, so that its gradients are as small as :math:`e^{-17.5}` times those of free numbers: give it an optimizer
    that does not care for scale, as `ScatteringClassifier` does.
    """

    def __init__(
        self,
        in_channels: int,
        J: int = 5,
        Q: int = 4,
        order: int = 2,
        *,
        normalized: bool = True,
        learnable: Literal["legs"] | bool = False,
        scale_mode: Literal["softmax", "free"] = "softmax",
        learn_laziness: bool = True,
        normalization: Normalization = "column",
        isolated: Isolated = "leak",
        remove_self_loops: bool = True,
        include_finest: bool = False,
        include_lowpass: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(in_channels, bool) or in_channels < 1:
            raise InvalidArgument(f"in_channels={in_channels!r}: at least one signal is needed.")
        if learnable not in (False, True):
            check_choice("learnable", learnable, ("legs",))
        check_choice("scale_mode", scale_mode, ("softmax", "free"))
        check_choice("normalization", normalization, ("column", "row", "symmetric"))
        check_choice("isolated", isolated, ("leak", "stay"))
        self.in_channels, self.J, self.scale_mode, self.isolated = in_channels, J, scale_mode, isolated
        self.include_finest, self.include_lowpass = include_finest, include_lowpass
        self.filters: dict[str, Any] = {"J": J, "order": order, "include_finest": include_finest}
        self.filters["include_lowpass"] = include_lowpass
        self.moments: dict[str, Any] = {"Q": Q, "normalized": normalized}
        warn_of_moments(Q, normalized=normalized, owner=type(self).__name__)
        self.walk: dict[str, Any] = {"normalization": normalization, "remove_self_loops": remove_self_loops}
        self.paths = scattering_paths(**self.filters)
        self.learnable = bool(learnable)
        if self.learnable:
            dyadic = torch.zeros(J + 1, 2**J)
            dyadic[torch.arange(J + 1), 2 ** torch.arange(J + 1) - 1] = 1
            self.selector = nn.Parameter(dyadic * _SHARPNESS if scale_mode == "softmax" else dyadic)
            self.laziness = nn.Parameter(torch.zeros(()), requires_grad=learn_laziness)

    @property
    def out_channels(self) -> int:
        """Number of features."""
        return self.in_channels * len(self.paths) * self.moments["Q"]

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return the features `(B, F')` of a batch of graphs."""
        x, edges, weight, stuck = self._prepared(x, edge_index, edge_weight)
        with torch.autocast(x.device.type, enabled=False):
            return self.from_transition(x, edges, weight, stuck, batch, batch_size)

    @torch.no_grad()
    def contributions(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Return what each node of one graph adds to its features, `(nodes, F')`, see `moment_contributions`."""
        x, edges, weight, stuck = self._prepared(x, edge_index, edge_weight)
        with torch.autocast(x.device.type, enabled=False):
            return moment_contributions(self._coefficients(x, edges, weight, stuck), **self.moments)

    def _prepared(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if x.ndim == 1:
            x = x[:, None]
        if x.ndim != 2 or x.shape[1] != self.in_channels:
            raise ShapeMismatch(
                f"The signals have the shape {tuple(x.shape)}; (n, {self.in_channels}) is needed, since in_channels="
                f"{self.in_channels}."
            )
        if not bool(x.isfinite().all()):
            bad = (~x.isfinite()).nonzero()[0].tolist()
            raise InvalidArgument(
                f"The signals are not finite, first at node {bad[0]} in column {bad[1]}: no moment is defined. Replace "
                f"missing values before."
            )
        # half precision has no sparse products and loses the long scales
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            edges, weight, nodes = transition(edge_index, edge_weight, len(x), dtype=x.dtype, **self.walk)
        return x, edges, weight, self._stuck(edges, nodes, x.dtype)

    def from_transition(
        self,
        x: Tensor,
        edges: Tensor,
        weight: Tensor,
        stuck: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return the features from the weights of the walk, the part that compiles into one graph.

        Args:
            x: signals `(n, F)` in float32 or float64.
            edges: edges as `functional.transition` returns them.
            weight: their weights in the walk.
            stuck: 1 at nodes without edges that keep their mass, `(n, 1)`.
            batch: to which graph each node belongs.
            batch_size: number of graphs; needed to compile.
        """
        return scattering_moments(self._coefficients(x, edges, weight, stuck), batch, batch_size, **self.moments)

    def _coefficients(self, x: Tensor, edges: Tensor, weight: Tensor, stuck: Tensor | None) -> Tensor:
        step = partial(self._step, edges=edges, weight=weight[:, None], stuck=stuck)
        return scatter(x, self.paths, partial(self._bank, step=step))

    def scales(self) -> Tensor:
        """Return how much each diffusion time 1, 2, ... is in each low-pass filter, `(J + 1, 2^J)`."""
        if not self.learnable:
            fixed = torch.zeros(self.J + 1, 2**self.J)
            fixed[torch.arange(self.J + 1), 2 ** torch.arange(self.J + 1) - 1] = 1
            return fixed
        return self.selector.softmax(1) if self.scale_mode == "softmax" else self.selector

    def alpha(self) -> Tensor:
        """Return how much stays in a step of the walk, 1/2 in the paper."""
        return self.laziness.sigmoid() if self.learnable else torch.tensor(0.5)

    def feature_names(self, signals: list[str] | None = None) -> list[str]:
        """Return the names of the features."""
        signals = [f"x{i}" for i in range(self.in_channels)] if signals is None else signals
        return feature_names(signals, **self.filters, **self.moments)

    def _stuck(self, edges: Tensor, nodes: int, dtype: torch.dtype) -> Tensor | None:
        if self.isolated == "leak":
            return None
        return stranded(edges, nodes, self.walk["normalization"]).to(dtype)[:, None]

    def _step(self, u: Tensor, *, edges: Tensor, weight: Tensor, stuck: Tensor | None) -> Tensor:
        """Take a step of the lazy walk, edge by edge: unlike sparse products this compiles."""
        moved = torch.zeros_like(u).index_add_(0, edges[1], weight * u[edges[0]])
        if stuck is not None:
            moved = moved + stuck * u
        alpha = self.alpha().to(u)
        return alpha * u + (1 - alpha) * moved

    def _bank(self, u: Tensor, *, step: Any) -> Iterator[tuple[int, Tensor]]:
        smooth = list(self._lowpass(u, step))
        if self.include_finest:
            yield 0, u - smooth[0]
        for j in range(1, self.J + 1):
            yield j, smooth[j - 1] - smooth[j]
        if self.include_lowpass:
            yield self.J + 1, smooth[-1]

    def _lowpass(self, u: Tensor, step: Any) -> list[Tensor]:
        """Return what each low-pass filter makes of the signals, the running sum of each held instead of all powers."""
        times = 2**self.J
        if not self.learnable:
            kept = []
            for t in range(1, times + 1):
                u = step(u)
                if t & (t - 1) == 0:
                    kept.append(u)
            return kept
        weights = self.scales().to(u)
        sums = [torch.zeros_like(u)] * (self.J + 1)
        for t in range(times):
            u = step(u)
            sums = [total + weights[j, t] * u for j, total in enumerate(sums)]
        return sums
