"""The pictures of a study: scores, paired differences, sources of variation, ranks, profiles, power."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_methods.report import color_cycle, new_figure, shorten
from lightning_methods.report.style import GRID, INK, MUTED, PALETTE, decorate
from lightning_methods.reproducibility.aggregates import performance_profile
from lightning_methods.reproducibility.analysis import Analysis, Comparison


def study_figures(analysis: Analysis) -> dict[str, Figure]:
    """Return the figures that the study's design and runs allow, by the name of their file.

    Args:
        analysis: of the study.
    """
    found: dict[str, Figure] = {}
    if any(analysis.whole(name) for name in analysis.names):
        found["scores"] = scores_figure(analysis)
    for i, comparison in enumerate(analysis.comparisons):
        suffix = "" if i == 0 else f"_{i + 1}"
        if len(comparison.scores) > 1:
            found[f"differences{suffix}"] = differences_figure(comparison, analysis.settings.metric)
        if comparison.power is not None:
            found[f"power{suffix}"] = power_figure(comparison, analysis.settings.beta)
    if analysis.components:
        found["sources"] = components_figure(analysis)
    if any(analysis.sobol.values()):
        found["sources"] = sobol_figure(analysis)
    if analysis.ranking is not None:
        found["ranks"] = ranks_figure(analysis)
        found["profiles"] = profiles_figure(analysis)
    return found


def scores_figure(analysis: Analysis) -> Figure:
    """Draw every run as a dot and the middle half of each pipeline as a box."""
    names = [n for n in analysis.names if analysis.whole(n)]
    figure = new_figure(6.8, 1.4 + 0.62 * len(names))
    axes = figure.add_subplot()
    decorate(axes, title="Every run", subtitle="box: middle half and median", x_label=analysis.settings.metric)
    rng = np.random.default_rng(0)  # of the jitter alone
    for row, (name, color) in enumerate(zip(names, color_cycle(len(names)), strict=True)):
        values = np.array(list(analysis.whole(name).values()))
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        axes.barh(row, high - low, left=low, height=0.5, facecolor=color, alpha=0.18, edgecolor=color, linewidth=1)
        axes.plot([middle, middle], [row - 0.25, row + 0.25], color=color, linewidth=2.2)
        axes.plot(values, row + rng.uniform(-0.16, 0.16, len(values)), "o", color=color, markersize=4, alpha=0.75)
    axes.set_yticks(range(len(names)), [shorten(n) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure


def differences_figure(comparison: Comparison, metric: str) -> Figure:
    """Draw the difference of every pair, in order, and the mean with its interval."""
    difference = np.sort(comparison.scores[:, 0] - comparison.scores[:, 1])
    figure = new_figure(6.8, 3.4)
    axes = figure.add_subplot()
    mean = comparison.difference
    told = "" if mean is None else f"mean {mean.estimate:+.4g}  [{mean.low:+.4g}, {mean.high:+.4g}]"
    decorate(
        axes,
        title=f"{shorten(comparison.a)} minus {shorten(comparison.b)}, pair by pair",
        subtitle=told,
        x_label="pairs, in order of their difference",
        y_label=f"difference of {metric}",
    )
    place = np.arange(1, len(difference) + 1)
    colors = [PALETTE[0] if d > 0 else PALETTE[1] if d < 0 else MUTED for d in difference]
    axes.vlines(place, 0, difference, color=colors, linewidth=1.6)
    axes.scatter(place, difference, color=colors, s=22, zorder=3)
    axes.axhline(0, color=INK, linewidth=1)
    if mean is not None:
        axes.axhspan(mean.low, mean.high, color=MUTED, alpha=0.16, linewidth=0)
        axes.axhline(mean.estimate, color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def components_figure(analysis: Analysis) -> Figure:
    """Draw the standard deviation that each source brings alone, with its interval."""
    groups = analysis.components
    sources = [s for s in analysis.settings.vary if any(s in found for found in groups.values())]
    figure = new_figure(6.8, 1.3 + 0.34 * len(sources) * max(len(groups), 1) + 0.2 * len(sources))
    axes = figure.add_subplot()
    decorate(
        axes,
        title="What each source brings alone",
        subtitle="all others fixed; bars do not add up",
        x_label=f"standard deviation of {analysis.settings.metric}",
    )
    height = 0.8 / len(groups)
    for i, (name, color) in enumerate(zip(groups, color_cycle(len(groups)), strict=True)):
        for row, source in enumerate(sources):
            c = groups[name].get(source)
            if c is None:
                continue
            y = row + (i - (len(groups) - 1) / 2) * height
            axes.barh(y, c.std, height=0.86 * height, color=color, alpha=0.85, label=name if row == 0 else None)
            axes.plot([c.low, c.high], [y, y], color=INK, linewidth=1.1)
    _source_rows(axes, sources, legend=len(groups) > 1)
    return figure


def sobol_figure(analysis: Analysis) -> Figure:
    """Draw first-order and total indices of each source."""
    groups = {name: found for name, found in analysis.sobol.items() if found}
    sources = list(analysis.settings.vary)
    figure = new_figure(6.8, 1.3 + 0.34 * len(sources) * len(groups) + 0.2 * len(sources))
    axes = figure.add_subplot()
    decorate(
        axes,
        title="Share of the variance",
        subtitle="solid: by the source alone; pale: with its interactions; line: interval of the latter",
        x_label=f"share of the variance of {analysis.settings.metric}",
    )
    height = 0.8 / len(groups)
    for i, (name, color) in enumerate(zip(groups, color_cycle(len(groups)), strict=True)):
        for row, source in enumerate(sources):
            index = groups[name][source]
            y = row + (i - (len(groups) - 1) / 2) * height
            axes.barh(y, max(index.total, 0), height=0.86 * height, color=color, alpha=0.3)
            axes.barh(y, max(index.first, 0), height=0.5 * height, color=color, label=name if row == 0 else None)
            axes.plot(index.total_interval, [y, y], color=INK, linewidth=1.1)
    _source_rows(axes, sources, legend=len(groups) > 1)
    return figure


def ranks_figure(analysis: Analysis) -> Figure:
    """Draw how often each pipeline takes each rank in studies of the same size."""
    assert analysis.ranking is not None
    table = analysis.ranking.rank_probability
    names = analysis.names
    figure = new_figure(6.8, 1.5 + 0.5 * len(names))
    axes = figure.add_subplot()
    decorate(
        axes,
        title="Which rank, were the study done again",
        subtitle=f"single runs have the order of the means in {100 * analysis.ranking.single_run_agrees:.0f}% of cases",
        x_label="share of resampled studies",
    )
    left = np.zeros(len(names))
    shades = np.linspace(1.0, 0.18, len(names))
    for rank in range(len(names)):
        axes.barh(
            range(len(names)),
            table[:, rank],
            left=left,
            color=PALETTE[0],
            alpha=shades[rank],
            height=0.6,
            edgecolor=GRID,
            label=f"rank {rank + 1}",
        )
        left += table[:, rank]
    axes.set_yticks(range(len(names)), [shorten(n) for n in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=min(len(names), 6), frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def profiles_figure(analysis: Analysis) -> Figure:
    """Draw the share of runs of each pipeline that score above each threshold, with its band."""
    everything = np.array([x for name in analysis.names for x in analysis.whole(name).values()])
    margin = float(np.ptp(everything)) * 0.04
    thresholds = np.linspace(everything.min() - margin, everything.max() + margin, 200)
    figure = new_figure(6.8, 3.6)
    axes = figure.add_subplot()
    decorate(
        axes, title="Performance profiles", x_label=f"threshold of {analysis.settings.metric}", y_label="share above"
    )
    for name, color in zip(analysis.names, color_cycle(len(analysis.names)), strict=True):
        values = list(analysis.whole(name).values())
        if values:
            profile = performance_profile(values, thresholds, resamples=500)
            axes.step(thresholds, profile.fraction, where="post", color=color, linewidth=1.8, label=shorten(name))
            axes.fill_between(thresholds, profile.low, profile.high, step="post", color=color, alpha=0.14, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def power_figure(comparison: Comparison, beta: float) -> Figure:
    """Draw the chance of a significant verdict over the number of pairs, at the observed effect."""
    power = comparison.power
    assert power is not None
    figure = new_figure(6.8, 3.4)
    axes = figure.add_subplot()
    decorate(
        axes,
        title=f"{shorten(comparison.a)} against {shorten(comparison.b)}: chance of a verdict",
        subtitle=_more(comparison, beta),
        x_label="pairs",
        y_label="chance of a significant verdict",
    )
    axes.plot(power.sizes, power.power, color=PALETTE[0], linewidth=1.6)
    axes.axhline(1 - beta, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.axvline(len(comparison.scores), color=PALETTE[1], linewidth=1.4)
    axes.annotate(
        "this study", (len(comparison.scores), 0.02), (4, 0), textcoords="offset points", color=PALETTE[1], fontsize=8.5
    )
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlim(left=0)
    return figure


def _more(comparison: Comparison, beta: float) -> str:
    power = comparison.power
    assert power is not None
    effect = f"were P = {power.probability:.2f} the truth"
    if power.more is None:
        return effect
    return f"{effect}: {power.more} more pairs for a chance of {100 * (1 - beta):g}%" if power.more else effect


def _source_rows(axes: object, sources: list[str], *, legend: bool) -> None:
    axes.set_yticks(range(len(sources)), sources)  # type: ignore[attr-defined]
    axes.invert_yaxis()  # type: ignore[attr-defined]
    axes.grid(visible=False, axis="y")  # type: ignore[attr-defined]
    axes.set_xlim(left=0)  # type: ignore[attr-defined]
    if legend:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")  # type: ignore[attr-defined]
