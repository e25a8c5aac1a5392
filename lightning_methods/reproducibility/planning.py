"""What a study will cost and how many runs it needs, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lightning_methods.errors import InvalidArgument
from lightning_methods.reproducibility.functional import power_of_pairs, required_runs

if TYPE_CHECKING:
    from lightning_methods.reproducibility.study import Study


def plan_lines(study: Study, *, brief: bool = False) -> Iterator[str]:
    """Yield what the study will do, how long it takes, and what it can find.

    Args:
        study: with its pipelines.
        brief: only what there is to do.
    """
    s = study.settings
    ids = study.enter()
    rows = study.ledger.runs(ids)
    done = [r for r in rows.values() if r.status == "done"]
    yield (
        f"{s.name}: {len(ids)} runs of {', '.join(study.pipelines)}; {len(done)} done. "
        f"Design {s.design}, {s.replicates} replicates; varied: {', '.join(s.vary)}."
    )
    seconds = [r.seconds for r in done if r.seconds is not None]
    if seconds:
        left = (len(ids) - len(done)) * float(np.mean(seconds)) / s.engine.workers
        at_once = s.engine.workers
        yield f"A run takes {np.mean(seconds):.1f} s; what is left about {left / 60:.1f} min with {at_once} at once."
    if brief:
        return
    yield (
        f"To find a true P(A>B) of {s.gamma:g} with chance {1 - s.beta:g} takes "
        f"{_required(s.gamma, s.alpha, s.beta)} pairs by the rule that is used "
        f"({required_runs(s.gamma, s.alpha, s.beta)} by Noether's formula, of unpaired runs)."
    )
    chances = ", ".join(
        f"{p:g}: {power_of_pairs(p, s.replicates, alpha=s.alpha):.2f}" for p in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
    )
    yield f"With {s.replicates} pairs the chance to conclude A>B, by the true P(A>B): {chances}."
    for comparison in study.analyse().comparisons if len(study.pipelines) > 1 else []:
        if comparison.power is not None:
            yield f"{comparison.a} against {comparison.b} so far: {comparison.advice() or 'decided.'}"
    if s.design == "all":
        kinds = len(s.vary) + 2
        yield (
            f"design one_at_a_time would take {len(s.vary) * s.replicates} runs a pipeline and tell how much each "
            f"source brings; sobol {kinds * s.replicates}, with interactions and a verdict."
        )


def status_lines(study: Study) -> Iterator[str]:
    """Yield how many runs are in which state, what failed, and the verdict so far.

    Args:
        study: with its pipelines.
    """
    ids = study.enter()
    counts = study.ledger.counts(ids)
    shown = ", ".join(f"{counts[k]} {k}" for k in ("done", "running", "pending", "failed") if counts.get(k))
    yield f"{study.settings.name}: {len(ids)} runs: {shown}."
    analysis = study.analyse()
    yield from (f"problem: {text}" for text in analysis.problems)
    yield from (f"stale: {count} runs of an earlier {name} ({key})" for name, key, count in analysis.stale)
    for comparison in analysis.comparisons:
        yield comparison.sentence(study.settings.metric)


def _required(gamma: float, alpha: float, beta: float) -> str:
    try:
        return str(required_runs(gamma, alpha, beta, rule="paired"))
    except InvalidArgument:
        return "more than 2,000"
