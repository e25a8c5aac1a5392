"""Pictures of capsules: rows of images, and maps laid over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_methods.report import new_figure
from lightning_methods.report.style import INK, decorate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAP = 1  # pixels between images
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
    columns, (_, height, width) = len(rows[0]), rows[0].shape[1:]
    side = min(0.8, 9 / columns)
    figure = new_figure(side * columns + 1.8, side * len(rows) * height / width + 1.2)
    axes = _mosaic(figure, rows, title)
    axes.set_yticks([i * (height + GAP) + height / 2 for i in range(len(rows))], row_names)
    _name_columns(axes, column_names, width)
    axes.set_xlabel(x_label, fontsize=9.5, color=INK)
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
    height, width = images.shape[2:]
    side = min(1.2, 10 / len(images))
    figure = new_figure(side * len(images) + 1.8, 2 * side * height / width + 1.3)
    axes = _mosaic(figure, [images, images], title)
    left, right, bottom, top = (edge + 0.5 for edge in extent)
    for i, values in enumerate(maps):
        x, y = i * (width + GAP), height + GAP
        axes.imshow(
            values.cpu().double().numpy(),
            extent=(x + left, x + right, y + bottom, y + top),
            cmap="viridis",
            alpha=0.65,
            vmin=0,
            vmax=float(maps.max()) or 1.0,
            zorder=2,
        )
    axes.set(xlim=(0, len(images) * (width + GAP) - GAP), ylim=(2 * height + GAP, 0), yticks=[])
    _name_columns(axes, names, width)
    bar = figure.colorbar(axes.images[-1], ax=axes, shrink=0.7, pad=0.02, aspect=16)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5, length=0)
    bar.set_label(value_label, fontsize=9.5, color=INK)
    return figure


def _mosaic(figure: Figure, rows: Sequence[Tensor], title: str) -> Axes:
    """Draw all images in one picture, in pixels of these: an axes each would take seconds to lay out."""
    axes = figure.add_subplot()
    height, width = rows[0].shape[2:]
    pixels = torch.ones(len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3, dtype=torch.float64)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            y, x = i * (height + GAP), j * (width + GAP)
            pixels[y : y + height, x : x + width] = _stretched(image)
    axes.imshow(pixels.numpy(), extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")
    decorate(axes, title=title, grid=False)
    axes.tick_params(length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _name_columns(axes: Axes, names: Sequence[str], width: int) -> None:
    axes.set_xticks([i * (width + GAP) + width / 2 for i in range(len(names))], names)
    if len(names) > 6:
        axes.tick_params(axis="x", labelrotation=45)


def _stretched(image: Tensor) -> Tensor:
    """Return `(H, W, 3)` or `(H, W, 1)` from the darkest value of an image at 0 to its brightest at 1."""
    values = image.detach().cpu().double()
    low, high = values.min(), values.max()
    values = ((values - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0)
    return values if values.shape[2] == 3 else values.mean(2, keepdim=True)


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
