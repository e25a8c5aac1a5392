"""One quiet look for all pictures: a solid light background (readable in W&B's dark mode), few lines, safe colours.

Only `matplotlib.figure.Figure` is used: no pyplot, no backend choice, no change of global settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lightning_methods.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BACKGROUND = "#fbfbf9"
INK = "#24292f"
MUTED = "#6a737d"
GRID = "#e3e5e8"
MISSING = "#d0d3d8"  # NaN cells

# the hues of Okabe and Ito (2008), which all common kinds of colour blindness tell apart; yellow left out as too pale
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d")
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """Return an empty figure in the shared style.

    Args:
        width: in inches.
        height: in inches.

    Example:
        >>> axes = new_figure().add_subplot()
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width, height), layout=layout, facecolor=BACKGROUND)


def color_cycle(count: int) -> list[str]:
    """Return `count` distinct colours: the safe palette where it suffices, else an ordered scale (layers are ordered).

    Args:
        count: how many colours.

    Raises:
        InvalidArgument: if `count` is negative.

    Example:
        >>> color_cycle(2)
        ['#0072b2', '#d55e00']
    """
    if count < 0:
        raise InvalidArgument(f"count={count} must not be negative.")
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    # the last tenth of the scale is too pale on a light background
    return [to_hex(colormaps[SEQUENTIAL](0.9 * i / (count - 1))) for i in range(count)]


def shorten(name: str, length: int = 28) -> str:
    """Return a long name with its middle left out: the ends of layer names are what tells them apart.

    Args:
        name: any text.
        length: the most characters kept.

    Example:
        >>> shorten("backbone.encoder.layer.11.attention.output", 20)
        'backbone…tion.output'
    """
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 5 + 1
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def short_names(names: Sequence[str], length: int = 28) -> list[str]:
    """Return names that fit, still different from each other: what all of them share goes first, then their middles.

    Args:
        names: any texts, such as layer names.
        length: the most characters kept, exceeded where names would otherwise become equal.

    Example:
        >>> short_names([f"backbone.encoder.layers.{i}.attention.output" for i in range(2)])
        ['…layers.0…', '…layers.1…']
    """
    texts = [str(name) for name in names]
    distinct = len(set(texts))
    if max(map(len, texts), default=0) > length and distinct > 1:
        parts = [text.split(".") for text in texts]
        head = max(_shared(parts) - 1, 0)  # the word before a number stays: `layers.0`
        tail = min(_shared([part[::-1] for part in parts]), min(map(len, parts)) - head - 1)
        tail = max(tail, 0)
        texts = ["…" * (head > 0) + ".".join(part[head : len(part) - tail]) + "…" * (tail > 0) for part in parts]
    longest = max(map(len, texts), default=0)
    for limit in range(length, longest):
        short = [shorten(text, limit) for text in texts]
        if len(set(short)) == distinct:
            return short
    return texts


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Count the leading items that all sequences have in common."""
    return next((i for i, items in enumerate(zip(*parts, strict=False)) if len(set(items)) > 1), min(map(len, parts)))


def decorate(
    axes: Axes, *, title: str = "", subtitle: str = "", x_label: str = "", y_label: str = "", grid: bool = True
) -> None:
    """Give axes the shared look: no box, hairline grid behind the data, small grey labels, title on the left."""
    axes.set_facecolor(BACKGROUND)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3, width=0.8)
    if grid:
        axes.grid(visible=True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK, fontsize=9.5)
    axes.set_ylabel(y_label, color=INK, fontsize=9.5)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=24 if subtitle else 10)
    if subtitle:
        axes.annotate(
            subtitle, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=MUTED, fontsize=8.5
        )
