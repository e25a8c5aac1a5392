"""Figures and tables of a distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_methods.core.passes import preserved
from lightning_methods.lit.history import History
from lightning_methods.lit.measure import Example, NetworkCost, cost_of
from lightning_methods.lit.sections import Pair
from lightning_methods.lit.stitching import Hybrid
from lightning_methods.report import PALETTE, curves, is_reporting, log_figure, log_table, new_figure
from lightning_methods.report.style import decorate


def show_history(trainer: Any, history: History, pairs: Sequence[Pair], *, prefix: str = "lit") -> None:
    """Draw the sections' errors by epoch, and list the last ones.

    Args:
        trainer: the running trainer.
        history: what was measured.
        pairs: the sections.
        prefix: first part of every key.
    """
    if not is_reporting(trainer):
        return
    errors = history.lines("lit/ir_rel/")
    if errors:
        figure = curves(
            errors, title="Error of each section on the teacher's input", x_label="epoch", y_label="share of the target"
        )
        log_figure(trainer, f"{prefix}/section_errors", figure)
    fed, alone = history.lines("lit/teacher_fed/"), history.lines("lit/student_fed/")
    if fed:
        lines = {f"{name}, teacher-fed": line for name, line in fed.items()}
        lines |= {f"{name}, student-fed": line for name, line in alone.items()}
        title = "How far errors carry: validation data"
        log_figure(
            trainer, f"{prefix}/drift", curves(lines, title=title, x_label="epoch", y_label="share of the target")
        )
    rows = []
    for pair in pairs:
        counts = [sum(p.numel() for p in stage.parameters()) for stage in (pair.teacher, pair.student)]
        keys = ("ir_rel", "teacher_fed", "student_fed")
        rows.append([pair.teacher.path, pair.name, *counts, *[history.last(f"lit/{k}/{pair.name}") for k in keys]])
    columns = ["teacher", "student", "teacher_parameters", "student_parameters"]
    log_table(trainer, f"{prefix}/sections", [*columns, "error", "teacher_fed", "student_fed"], rows)


def show_networks(
    trainer: Any, networks: Mapping[str, nn.Module], example: Example | None, *, prefix: str = "lit"
) -> None:
    """List what the networks cost on some samples.

    Args:
        trainer: the running trainer.
        networks: by name; the first one is what the others are compared with.
        example: what they are given.
        prefix: first part of every key.
    """
    if example is None or not is_reporting(trainer):
        return
    costs: dict[str, NetworkCost] = {}
    with trainer.precision_plugin.forward_context():
        for name, network in networks.items():
            with preserved(network):
                costs[name] = cost_of(network.eval(), *example.arguments(network), example.samples)
    first = next(iter(costs.values()))
    rows = [
        [name, c.parameters, c.macs, c.depth, 1e3 * c.seconds, first.parameters / max(c.parameters, 1)]
        for name, c in costs.items()
    ]
    columns = ["network", "parameters", "macs", "depth", "milliseconds_per_sample", "compression"]
    log_table(trainer, f"{prefix}/networks", columns, rows)


def show_stitching(trainer: Any, hybrids: Sequence[Hybrid]) -> None:
    """List and draw the mixtures of teacher and student.

    Args:
        trainer: the running trainer.
        hybrids: what was measured.
    """
    if not hybrids or not is_reporting(trainer):
        return
    rows = [
        [" ".join(h.replaced) or "none", h.accuracy, h.parameters, 1e3 * h.seconds, "yes" if h.pareto else "no"]
        for h in sorted(hybrids, key=lambda h: h.parameters)
    ]
    columns = ["student_sections", "accuracy", "parameters", "milliseconds_per_sample", "pareto"]
    log_table(trainer, "lit/stitching", columns, rows)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for pareto in (False, True):
        shown = [h for h in hybrids if h.pareto is pareto]
        axes.scatter(
            [h.parameters / 1e3 for h in shown],
            [100 * h.accuracy for h in shown],
            color=PALETTE[0] if pareto else "0.6",
            label="Pareto" if pareto else "others",
        )
        if pareto:
            for h in shown:
                text = " ".join(h.replaced) or "teacher"
                place = (h.parameters / 1e3, 100 * h.accuracy)
                axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    title = "Sections of the student in the teacher"
    decorate(axes, title=title, x_label="thousand parameters", y_label="accuracy, %")
    axes.legend(frameon=False)
    log_figure(trainer, "lit/stitching", figure)
