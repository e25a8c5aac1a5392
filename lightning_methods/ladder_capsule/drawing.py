"""Pictures of capsules: rows of images, and maps laid over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_methods.report import new_figure
from lightning_methods.report.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Extent = tuple[float, float, float, float]


def image_grid(
    rows: Sequence[Tensor], row_names: Sequence[str], column_names: Sequence[str], *, title: str, x_label: str = ""
) -> Figure:
    """Draw images in rows and columns.

    Args:
        rows: for each row its images, `(columns, channels, H, W)`.
        row_names: at the left of each row.
        column_names: above each column.
        title: what is shown.
        x_label: what the columns are.

    Example:
        >>> figure = image_grid([torch.rand(3, 1, 8, 8)], ["image"], ["a", "b", "c"], title="Images")
    """
    columns = len(rows[0])
    side = min(0.8, 9 / columns)
    figure = new_figure(side * columns + 1.6, side * len(rows) + 1.2)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, images, name in zip(grid, rows, row_names, strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            show(axes, image)
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5, color=INK)
    for axes, name in zip(grid[0], column_names, strict=True):
        axes.set_title(name, fontsize=8.5, color=INK)
    figure.suptitle(title, fontsize=11, color=INK)
    figure.supxlabel(x_label, fontsize=9.5, color=INK)
    return figure


def overlay(
    images: Tensor, maps: Tensor, names: Sequence[str], extent: Extent, *, title: str, value_label: str
) -> Figure:
    """Draw images, and below each the same with a map laid over it.

    Args:
        images: `(M, channels, H, W)`.
        maps: `(M, h, w)` values of the positions.
        names: one an image.
        extent: (left, right, bottom, top) of the map in pixels of the image.
        title: what is shown.
        value_label: what the colour means.

    Example:
        >>> figure = overlay(torch.rand(2, 1, 8, 8), torch.rand(2, 3, 3), ["a", "b"], (0, 7, 7, 0), title="Kept",
        ...     value_label="capsules")
    """
    side = min(1.2, 10 / len(images))
    figure = new_figure(side * len(images) + 1.6, 2 * side + 1.3)
    grid = figure.subplots(2, len(images), squeeze=False)
    height, width = images.shape[2:]
    drawn = None
    for axes, below, image, values, name in zip(grid[0], grid[1], images, maps, names, strict=True):
        show(axes, image)
        axes.set_title(name, fontsize=8.5, color=INK)
        show(below, image)
        top = float(maps.max()) or 1.0
        drawn = below.imshow(
            values.cpu().double().numpy(), extent=extent, cmap="viridis", alpha=0.65, vmin=0, vmax=top, zorder=2
        )
        below.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    bar = figure.colorbar(drawn, ax=list(grid[1]), shrink=0.9, pad=0.02, aspect=12)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8.5, length=0)
    bar.set_label(value_label, fontsize=9.5, color=INK)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def show(axes: Axes, image: Tensor) -> None:
    """Draw one image, from its darkest to its brightest value."""
    values = image.detach().cpu().double()
    low, high = values.min(), values.max()
    values = ((values - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0)
    pixels: Any = values.numpy() if values.shape[2] == 3 else values.mean(2).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def entropy(frequencies: Tensor) -> float:
    r"""Return :math:`-\sum p_i \log p_i / \log N` of frequencies, from 0 (one capsule alone) to 1 (all alike).

    Example:
        >>> entropy(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    total = frequencies.sum()
    if total == 0 or len(frequencies) < 2:
        return 0.0
    p = frequencies.double() / total
    return float(torch.special.entr(p).sum() / torch.log(torch.tensor(len(p), dtype=torch.float64)))
