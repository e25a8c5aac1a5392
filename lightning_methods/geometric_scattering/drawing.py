"""Graphs as pictures: where the nodes go, and how much each of them adds to a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lightning_methods.errors import InvalidArgument
from lightning_methods.report.style import DIVERGING, GRID, INK, MUTED, SEQUENTIAL, decorate, new_figure

Array = NDArray[Any]


class Panel(NamedTuple):
    """A graph to draw: edges `(2, E)`, a value of each node `(n,)`, and what is said of it."""

    edge_index: Tensor
    values: Tensor
    title: str
    subtitle: str = ""


def draw_graphs(panels: Sequence[Panel], *, title: str = "", value_label: str = "") -> Figure:
    """Draw graphs side by side, their nodes coloured by a value.

    Args:
        panels: the graphs.
        title: of the figure.
        value_label: what the colours are.

    Raises:
        InvalidArgument: if there is none, or one without nodes.

    Example:
        >>> import torch
        >>> figure = draw_graphs([Panel(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.2, 0.8]), "a pair")])
    """
    if not panels or any(not len(panel.values) for panel in panels):
        raise InvalidArgument("There is no graph to draw, or one without nodes.")
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.4 * columns, 3.2 * rows + 0.4)
    if title:
        figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=11, fontweight="bold")
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        decorate(axes, title=panel.title, subtitle=panel.subtitle, grid=False)
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")
        places = spring_layout(panel.edge_index, len(panel.values))
        values = panel.values.detach().cpu().double().numpy()
        signed = bool((values < 0).any())
        reach = max(float(np.abs(values).max()), 1e-30)
        norm = TwoSlopeNorm(0.0, -reach, reach) if signed else Normalize(0.0, reach)
        source, target = panel.edge_index.cpu().numpy()
        ends = places[np.stack([source, target], 1)[source < target]]
        if len(ends):
            axes.plot(*ends.transpose(2, 1, 0), color=GRID, linewidth=0.9, zorder=1)
        dots = axes.scatter(
            places[:, 0],
            places[:, 1],
            c=values,
            norm=norm,
            cmap=colormaps[DIVERGING if signed else SEQUENTIAL],
            s=float(np.clip(1500 / len(values), 14, 70)),
            edgecolors=MUTED,
            linewidths=0.5,
            zorder=2,
        )
        bar = figure.colorbar(dots, ax=axes, shrink=0.8, pad=0.02, aspect=20)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, labelsize=7.5, length=0)
        if place % columns == columns - 1 or place == len(panels) - 1:
            bar.set_label(value_label, color=INK, fontsize=9)
    return figure


def spring_layout(edge_index: Tensor, nodes: int, *, steps: int = 150) -> Array:
    """Return places of the nodes where neighbours are near and others apart, the same ones every time, `(nodes, 2)`.

    Args:
        edge_index: the edges.
        nodes: how many there are.
        steps: how often to move the nodes (Fruchterman and Reingold 1991).

    Example:
        >>> import torch
        >>> spring_layout(torch.tensor([[0, 1], [1, 0]]), 2).shape
        (2, 2)
    """
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    source, target = edge_index.cpu()
    adjacency[source, target] = adjacency[target, source] = 1
    near = adjacency.fill_diagonal_(0).numpy()
    angle = 2 * np.pi * np.arange(nodes) / max(nodes, 1)
    places = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * np.random.default_rng(0).standard_normal((nodes, 2))
    ideal = 1 / np.sqrt(max(nodes, 1))
    for step in range(steps):
        apart = places[:, None] - places[None]
        distance = np.sqrt((apart**2).sum(2)).clip(1e-6)
        # neighbours attract, all repel, and a weak pull to the middle keeps parts together that have no edge between
        force = ideal**2 / distance**2 - near * distance / ideal
        moved = (apart * force[..., None]).sum(1) - 0.5 * places
        length = np.sqrt((moved**2).sum(1, keepdims=True)).clip(1e-12)
        places = places + moved / length * np.minimum(length, 0.12 * (1 - step / steps))
    return places
