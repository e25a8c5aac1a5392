"""Pictures that several methods share: heat map, curves, reliability diagram, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.report.style import (
    BACKGROUND,
    DIVERGING,
    GRID,
    INK,
    MISSING,
    MUTED,
    PALETTE,
    SEQUENTIAL,
    color_cycle,
    decorate,
    new_figure,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Array = np.ndarray[Any, np.dtype[Any]]

_DIRECT_LABELS = len(PALETTE)  # more lines than this get a legend beside the axes
_SHOWN_TICKS = 40
_ANNOTATED_CELLS = 12  # a side


def heatmap(
    matrix: object,
    row_labels: Sequence[object] | None = None,
    column_labels: Sequence[object] | None = None,
    *,
    title: str = "",
    value_label: str = "",
    x_label: str = "",
    y_label: str = "",
    vmin: float | None = None,
    vmax: float | None = None,
    annotate: bool | None = None,
    diverging: float | None = None,
) -> Figure:
    """Draw a matrix as coloured cells; NaN cells are grey.

    Args:
        matrix: `(rows, columns)` numbers: an array, a tensor or nested lists.
        row_labels: one name a row, default 0, 1, ...
        column_labels: one name a column, default 0, 1, ...
        title: what is shown.
        value_label: what the colour means.
        x_label: what the columns are.
        y_label: what the rows are.
        vmin: value of the first colour, default the smallest value.
        vmax: value of the last colour, default the largest value.
        annotate: write the values into the cells; default: where the matrix is at most 12 x 12.
        diverging: the neutral value of a two-sided colour map, default a one-sided map.

    Raises:
        ShapeMismatch: if `matrix` is not two-dimensional or a list of labels does not fit.
        InvalidArgument: if it is empty or not numbers.

    Example:
        >>> figure = heatmap([[1.0, 0.2], [0.2, 1.0]], ["a", "b"], ["a", "b"], title="CKA", vmin=0, vmax=1)
    """
    values = _numbers("matrix", matrix, dimensions=2)
    rows, columns = values.shape
    row_names = _labels("row_labels", row_labels, rows)
    column_names = _labels("column_labels", column_labels, columns)
    figure = new_figure(*_heatmap_size(row_names, column_names))
    axes = figure.add_subplot()
    decorate(axes, title=title, x_label=x_label, y_label=y_label, grid=False)
    colors = colormaps[SEQUENTIAL if diverging is None else DIVERGING].with_extremes(bad=MISSING)
    norm = _norm(values, vmin, vmax, diverging)
    # square cells where rows and columns are the same kind of thing, else fill the axes
    aspect: Literal["equal", "auto"] = "equal" if rows == columns else "auto"
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colors, norm=norm, aspect=aspect, interpolation="nearest")
    _name_cells(axes, row_names, column_names)
    if max(rows, columns) <= _ANNOTATED_CELLS if annotate is None else annotate:
        _write_values(axes, image, values)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    bar.set_label(value_label, color=INK, fontsize=9.5)
    return figure


def curves(
    series: Mapping[str, tuple[object, object]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    reference: float | Mapping[str, float] | None = None,
) -> Figure:
    """Draw one line a name, labelled at its end, or in a legend beside the axes where there are many.

    Args:
        series: name -> `(x, y)`; NaN leaves a gap, a single point is drawn as a dot.
        title: what is shown.
        x_label: the x axis.
        y_label: the y axis.
        reference: a dashed horizontal line, or several by name (chance level, the paper's value).

    Raises:
        InvalidArgument: if there is no line or something is not a number.
        ShapeMismatch: if x and y of a line differ in length.

    Example:
        >>> figure = curves({"conv1": ([0, 1, 2], [2.3, 2.2, 1.9])}, x_label="epoch", reference={"chance": 2.3})
    """
    lines = {name: _line(name, line) for name, line in series.items()}
    if not lines:
        raise InvalidArgument("curves needs at least one line, got none.")
    many = len(lines) > _DIRECT_LABELS
    figure = new_figure(8.4 if many else 7.0, float(np.clip(0.155 * len(lines) + 0.9, 4.0, 8.0)))
    axes = figure.add_subplot()
    decorate(axes, title=title, x_label=x_label, y_label=y_label)
    longest = max(len(x) for x, _ in lines.values())
    colors, names = color_cycle(len(lines)), short_names(list(lines))
    for color, name, (x, y) in zip(colors, names, lines.values(), strict=True):
        width, marker = (1.0, "") if longest > 200 else (1.8, "o" if longest <= 30 else "")
        axes.plot(x, y, color=color, linewidth=width, marker=marker, markersize=3.5, label=name)
    references = reference if isinstance(reference, Mapping) else {} if reference is None else {"": reference}
    for value in references.values():
        axes.axhline(value, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    if all(float(value).is_integer() for x, _ in lines.values() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ends = [(value, name, MUTED) for name, value in references.items()]
    if many:
        figure.legend(loc="outside right upper", frameon=False, fontsize=7.5, labelcolor=INK, handlelength=1.4)
    else:
        ends += [(_last(y), name, color) for color, name, (_, y) in zip(colors, names, lines.values(), strict=True)]
    _label_right(figure, axes, ends)
    return figure


def reliability_diagram(confidence: object, correct: object, bins: int = 15, *, title: str = "") -> Figure:
    """Draw how often predictions of each confidence are right, with the expected calibration error.

    Args:
        confidence: `(N,)` confidences in [0, 1].
        correct: `(N,)` whether each prediction was right, booleans or 0 and 1.
        bins: number of equal intervals of confidence.
        title: what is shown.

    Raises:
        InvalidArgument: if a confidence is outside [0, 1] or NaN, there is none, or `bins` is below 1.
        ShapeMismatch: if the two differ in length.

    Example:
        >>> figure = reliability_diagram([0.9, 0.8, 0.6], [1, 1, 0], bins=10)
    """
    p, hit = _numbers("confidence", confidence, dimensions=1), _numbers("correct", correct, dimensions=1)
    if len(p) != len(hit):
        raise ShapeMismatch(f"confidence has {len(p)} values and correct has {len(hit)}.")
    if bins < 1:
        raise InvalidArgument(f"bins={bins} must be at least 1.")
    if not ((p >= 0) & (p <= 1)).all():
        raise InvalidArgument(f"confidence must lie in [0, 1], got values from {p.min():.4g} to {p.max():.4g}.")
    index = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    safe = np.maximum(count, 1)
    accuracy, mean = np.bincount(index, hit, bins) / safe, np.bincount(index, p, bins) / safe
    error = float((count * np.abs(accuracy - mean)).sum() / len(p))
    figure = new_figure(4.8, 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    summary = f"ECE {100 * error:.1f}%   accuracy {100 * hit.mean():.1f}%   n {len(p):,}"
    decorate(upper, title=title or "Reliability", subtitle=summary, y_label="accuracy")
    decorate(lower, x_label="confidence", y_label="share")
    left, width = np.arange(bins) / bins, 1 / bins
    low, high = np.minimum(accuracy, mean), np.maximum(accuracy, mean)
    style = {"width": width * 0.92, "align": "edge"}
    upper.bar(left[filled], accuracy[filled], color=PALETTE[0], label="accuracy", **style)
    # hatched: whether the gap is above the bar or inside it tells over- from underconfidence
    hatched = {"facecolor": "none", "edgecolor": PALETTE[1], "hatch": "/////", "linewidth": 1.0}
    upper.bar(left[filled], (high - low)[filled], bottom=low[filled], label="gap", **hatched, **style)
    upper.plot([0, 1], [0, 1], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="perfect")
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    lower.bar(left, count / len(p), color=MUTED, **style)
    return figure


def histograms(
    series: Mapping[str, object], *, title: str = "", x_label: str = "", bins: int = 40, log: bool = False
) -> Figure:
    """Draw the distributions of several sets of values over one axis, one row a name.

    Args:
        series: name -> values of any shape; values that are not finite are left out and counted in the label.
        title: what is shown.
        x_label: what the values are.
        bins: number of equal bins, shared by all rows.
        log: logarithmic counts.

    Raises:
        InvalidArgument: if there is no name, or a name has no finite value.

    Example:
        >>> figure = histograms({"known": [0.9, 0.8, 0.9], "outlier": [0.1, 0.3]}, x_label="credibility")
    """
    if not series:
        raise InvalidArgument("histograms needs at least one set of values, got none.")
    finite, labels = {}, {}
    for (name, given), short in zip(series.items(), short_names(list(series)), strict=True):
        values = _numbers(name, given, dimensions=None).ravel()
        finite[name] = values[np.isfinite(values)]
        if not finite[name].size:
            raise InvalidArgument(f"histograms: {name!r} holds no finite value.")
        left_out = values.size - finite[name].size
        labels[name] = f"{short}\nn {finite[name].size:,}" + (f", {left_out:,} not finite" if left_out else "")
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=bins)
    figure = new_figure(6.4, float(np.clip(0.8 * len(finite) + 1.4, 2.6, 12)))
    rows = figure.subplots(len(finite), 1, sharex=True, squeeze=False)[:, 0]
    for axes, color, (name, values) in zip(rows, color_cycle(len(finite)), finite.items(), strict=True):
        decorate(axes, x_label=x_label if axes is rows[-1] else "", title=title if axes is rows[0] else "")
        axes.hist(values, bins=edges, color=color, alpha=0.85, log=log)
        axes.axvline(float(np.median(values)), color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.text(1.01, 0.5, labels[name], transform=axes.transAxes, color=color, fontsize=8.5, va="center")
    return figure


def _numbers(name: str, values: Any, *, dimensions: int | None) -> Array:
    """Return values as float64; accepts tensors of any device and precision without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()  # NumPy has no bfloat16
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} must be numbers, got {type(values).__name__}: {error}") from error
    if dimensions is not None and array.ndim != dimensions:
        raise ShapeMismatch(f"{name} must have {dimensions} dimension(s), got the shape {array.shape}.")
    if not array.size:
        raise InvalidArgument(f"{name} is empty: its shape is {array.shape}.")
    return array


def _labels(argument: str, labels: Sequence[object] | None, count: int) -> list[str]:
    names = [str(i) for i in range(count)] if labels is None else short_names([str(label) for label in labels])
    if len(names) != count:
        raise ShapeMismatch(f"{argument} has {len(names)} names for {count} of them.")
    return names


def _line(name: str, line: tuple[object, object]) -> tuple[Array, Array]:
    if not isinstance(line, (tuple, list)) or len(line) != 2:
        raise InvalidArgument(f"The line {name!r} must be a pair (x, y), got {type(line).__name__}.")
    x, y = (_numbers(f"{axis} of {name!r}", values, dimensions=1) for axis, values in zip("xy", line, strict=True))
    if len(x) != len(y):
        raise ShapeMismatch(f"{name!r} has {len(x)} x and {len(y)} y values.")
    return x, y


def _last(y: Array) -> float:
    finite = y[np.isfinite(y)]
    return float(finite[-1]) if finite.size else float("nan")


def _heatmap_size(rows: list[str], columns: list[str]) -> tuple[float, float]:
    """Return inches for readable cells (fewer are larger) beside the longest label and the colour bar."""
    if len(rows) == len(columns):
        width = height = max(len(rows) * float(np.clip(6.4 / len(rows), 0.14, 0.6)), 1.8)
    else:
        width = float(np.clip(len(columns) * np.clip(6.0 / len(columns), 0.07, 0.62), 2.6, 9))
        height = float(np.clip(len(rows) * np.clip(6.0 / len(rows), 0.14, 0.42), 1.2, 12))
    row_text, column_text = (max(len(name) for name in names) for names in (rows, columns))
    below = 0.05 * column_text if column_text > 4 else 0.2
    return width + 0.075 * row_text + 1.5, min(height + below + 0.9, 14)


def _norm(values: Array, vmin: float | None, vmax: float | None, center: float | None) -> Normalize:
    finite = values[np.isfinite(values)]
    low = vmin if vmin is not None else float(finite.min()) if finite.size else 0.0
    high = vmax if vmax is not None else float(finite.max()) if finite.size else 1.0
    if center is None:
        return Normalize(low, high if high > low else low + 1e-9)
    # both sides equally far, so that equally strong colours mean equally large differences
    reach = max(center - low, high - center, 1e-9)
    return TwoSlopeNorm(center, center - reach, center + reach)


def _name_cells(axes: Axes, rows: list[str], columns: list[str]) -> None:
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        every = -(-len(names) // _SHOWN_TICKS)
        axis.set_ticks(range(0, len(names), every), names[::every])
        axis.set_tick_params(length=0, labelsize=8.5 if len(names) <= 25 else 6.5)
    if max(len(name) for name in columns) > 4:
        axes.tick_params(axis="x", labelrotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    for spine in axes.spines.values():
        spine.set_visible(False)
    # hairlines between the cells, as long as these are large enough
    if max(len(rows), len(columns)) <= 25:
        axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color=BACKGROUND, linewidth=1.2)
        axes.tick_params(which="minor", length=0)


def _write_values(axes: Axes, image: AxesImage, values: Array) -> None:
    rgb = np.asarray(image.cmap(image.norm(np.nan_to_num(values))))[..., :3]
    dark = rgb @ np.array([0.299, 0.587, 0.114]) < 0.55
    largest = float(np.abs(np.where(np.isfinite(values), values, 0)).max())
    form = ".2f" if 0.1 <= largest < 10 else ".1f" if 10 <= largest < 100 else ".0f" if 100 <= largest < 1e5 else ".1e"
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if dark[row, column] else INK
            axes.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=8.5, color=color)


def _label_right(figure: Figure, axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write names at the right edge, at the height where their lines end, moved apart where they would overlap."""
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    named = sorted((end for end in ends if end[1]), key=lambda end: end[0])
    heights = [
        float(np.clip((value - low) / (high - low), 0, 1)) if np.isfinite(value) else 0.5 for value, _, _ in named
    ]
    gap = 0.16 / (float(figure.get_size_inches()[1]) - 0.9)  # one line of text, in parts of the axes' height
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    overflow = max(placed, default=0) - 1
    if overflow > 0:  # the stack grew past the top: push it down as far as it must
        limit = 1.0
        for i in reversed(range(len(placed))):
            placed[i] = min(placed[i], limit)
            limit = placed[i] - gap
    for (_, name, color), true, height in zip(named, heights, placed, strict=True):
        axes.annotate(
            name,
            (1, true),
            (1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8.5,
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )
