"""From the runs in a ledger to what may be concluded, and what may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_methods.reproducibility.aggregates import interquartile_mean, stratified_bootstrap, t_interval
from lightning_methods.reproducibility.driver import run_folder
from lightning_methods.reproducibility.functional import Array, Interval, Verdict, verdict
from lightning_methods.reproducibility.ledger import Ledger, Run
from lightning_methods.reproducibility.lints import lint_determinism, lint_effects, lint_environment
from lightning_methods.reproducibility.power import PowerCurve, power_curve
from lightning_methods.reproducibility.ranking import RankingStability, ranking_stability
from lightning_methods.reproducibility.settings import Settings
from lightning_methods.reproducibility.variance import (
    Component,
    SobolIndex,
    sobol_components,
    two_way_bootstrap,
    variance_components,
)
from lightning_methods.reproducibility.worker import load_examples

Key = tuple[str, int]  # part of the design, replicate

# parts in which all sources vary at once: what a verdict is about
_WHOLE = ("all", "A", "B")


@dataclass(frozen=True)
class Comparison:
    """One pipeline against the reference.

    Attributes:
        a, b: names of the pipeline and of the reference.
        verdict: on the pairs that are there; None with fewer than one pair.
        incomplete: why it is not the study's last word, None if it is.
        difference: mean of A - B with its t-interval, in units of the metric.
        power: at the observed effect; None with fewer than two pairs.
        scores: of the pairs, `(pairs, 2)`.
        unpaired: replicates that only one of both has.
        shared: sources whose fingerprints agree within every pair; None where runs have none.
        examples: intervals of the difference over runs, examples and both; None unless runs gave them.
    """

    a: str
    b: str
    verdict: Verdict | None
    incomplete: str | None
    difference: Interval | None
    power: PowerCurve | None
    scores: Array
    unpaired: list[str] = field(default_factory=list)
    shared: dict[str, bool] | None = None
    examples: dict[str, Interval] | None = None

    @property
    def decision(self) -> str:
        """What may be said: the verdict's decision, or that the study is incomplete."""
        if self.incomplete is not None:
            return "incomplete"
        return "not enough runs" if self.verdict is None else self.verdict.decision

    def sentence(self, metric: str) -> str:
        """Return the result in plain words."""
        if self.verdict is None:
            return f"{self.a} and {self.b} have no pair of finished runs yet."
        v = self.verdict
        text = (
            f"{self.a} beat {self.b} in {v.wins} of {v.runs} paired runs"
            f"{f' ({v.ties} ties)' if v.ties else ''} on {metric}; P({self.a}>{self.b}) = {v.probability:.2f}, "
            f"{100 * (1 - v.alpha):g}% interval [{v.low:.2f}, {v.high:.2f}]"
        )
        if self.incomplete is not None:
            return f"{text}; incomplete: {self.incomplete}."
        if v.decision == "not enough runs":
            return f"{text}; not enough runs to conclude ({v.runs}; need {v.needed} for gamma={v.gamma:g})."
        if v.low == v.high == 0.5:
            return f"{self.a} and {self.b} tie in all {v.runs} paired runs on {metric}: no difference measured."
        told = {
            "not significant": "not significant: no conclusion",
            "significant, not meaningful": f"significant, but not meaningful at gamma={v.gamma:g}",
            "significant and meaningful": f"significant and meaningful at gamma={v.gamma:g}",
        }[v.decision]
        return f"{text}: {told}."

    def advice(self) -> str:
        """Return how many more pairs it would take."""
        if self.power is None or self.verdict is None or self.verdict.decision.startswith("significant"):
            return ""
        if self.power.needed is None:
            if self.power.probability <= 0.5:
                return f"{self.a} did not do better than {self.b} on average: more runs of this kind would not show it."
            return "At the observed effect more than 2,000 pairs would be needed."
        return (
            f"Were the observed effect of {self.a} the true one, a verdict would take about {self.power.more} more "
            f"pairs ({self.power.needed} in all)."
        )


@dataclass(frozen=True)
class Analysis:
    """What a study has found so far.

    Attributes:
        settings: of the study.
        names: pipelines, the reference last.
        scores: pipeline -> part of the design and replicate -> score, of the runs that are done.
        comparisons: of each pipeline with the reference, at a level divided by their number.
        components: pipeline -> source -> its standard deviation; of the design `one_at_a_time`.
        sobol: pipeline -> source -> its indices, or None without variance; of the design `sobol`.
        ranking: of all pipelines; None for one, or without complete replicates.
        best: pipelines that cannot be told from the best one.
        summary: pipeline -> mean, standard deviation, interquartile mean and its interval, over runs in which all vary.
        problems: failures, what is missing, what is not deterministic, sources without effect.
        notices: what is good to know.
        stale: (pipeline, hash, runs) of other configurations or code.
        rows: all runs of the design, for tables.
        environments: those of the runs, each once.
        seconds: of computing, in all.
    """

    settings: Settings
    names: list[str]
    scores: dict[str, dict[Key, float]]
    comparisons: list[Comparison]
    components: dict[str, dict[str, Component]]
    sobol: dict[str, dict[str, SobolIndex] | None]
    ranking: RankingStability | None
    best: list[str]
    summary: dict[str, dict[str, float]]
    problems: list[str]
    notices: list[str]
    stale: list[tuple[str, str, int]]
    rows: list[tuple[Key, Run]]
    environments: list[dict[str, str]]
    seconds: float

    @property
    def verdict(self) -> Verdict | None:
        """The verdict of the first comparison, also where the study is incomplete; None without a pair of runs."""
        return self.comparisons[0].verdict if self.comparisons else None

    @property
    def decision(self) -> str:
        """What may be said of the first comparison; `incomplete` if runs are missing or failed."""
        return self.comparisons[0].decision if self.comparisons else "nothing to compare"

    def whole(self, name: str) -> dict[Key, float]:
        """Return the scores of a pipeline's runs in which all sources vary."""
        return {key: x for key, x in self.scores[name].items() if key[0] in _WHOLE}


def analyse(
    settings: Settings,
    pipelines: Mapping[str, tuple[str, Sequence[str]]],
    run_ids: Mapping[tuple[str, str, int], str],
    ledger: Ledger,
) -> Analysis:
    """Return what the runs allow to conclude.

    Args:
        settings: of the study.
        pipelines: name -> hash, and what its runner has noticed.
        run_ids: (pipeline, part, replicate) -> run id.
        ledger: of the runs.
    """
    runs = ledger.runs()
    reference = settings.reference or list(pipelines)[-1]
    names = [n for n in pipelines if n != reference] + [reference]
    table = {name: {(p, r): runs[i] for (n, p, r), i in run_ids.items() if n == name and i in runs} for name in names}
    scores = {name: _scores(settings, table[name]) for name in names}
    if settings.failed == "worst":
        _fill_worst(settings, scores, table)
    level = settings.alpha / max(len(names) - 1, 1)
    missing = _missing(names, run_ids, runs, settings)
    comparisons = [_compare(settings, a, reference, scores, table, level, missing) for a in names[:-1]]
    oat = {n: _one_at_a_time(settings, scores[n]) for n in names} if settings.design == "one_at_a_time" else {}
    sobol = {n: _sobol(settings, scores[n]) for n in names} if settings.design == "sobol" else {}
    matrix = _matrix(names, scores)
    done = [run for group in table.values() for run in group.values() if run.status == "done"]
    unique = {run.run_id: run for run in done}.values()
    return Analysis(
        settings=settings,
        names=names,
        scores=scores,
        comparisons=comparisons,
        components={n: found for n, found in oat.items() if found},
        sobol=sobol,
        ranking=ranking_stability(matrix, mode=settings.mode) if len(names) > 1 and len(matrix) else None,  # type: ignore[arg-type]
        best=_best(names, matrix, settings),
        summary={n: _summary([x for k, x in scores[n].items() if k[0] in _WHOLE], settings) for n in names},
        problems=[*missing, *_failures(table), *_not_deterministic(table, settings), *_no_effect(table, scores, oat)],
        notices=_notices(settings, pipelines, table, comparisons),
        stale=_stale(pipelines, runs),
        rows=[(key, run) for name in names for key, run in table[name].items()],
        environments=[dict(e) for e in {tuple(sorted((r.environment or {}).items())) for r in unique}],
        seconds=sum(run.seconds or 0.0 for run in unique),
    )


def _scores(settings: Settings, group: Mapping[Key, Run]) -> dict[Key, float]:
    return {
        key: run.metrics[settings.metric]
        for key, run in group.items()
        if key[0] != "repeat" and run.status == "done" and run.metrics and settings.metric in run.metrics
    }


def _fill_worst(
    settings: Settings, scores: dict[str, dict[Key, float]], table: Mapping[str, Mapping[Key, Run]]
) -> None:
    """Give failed runs a score below all that were reached; only its order counts in P(A>B)."""
    reached = [x for group in scores.values() for x in group.values()]
    if not reached:
        return
    margin = max(reached) - min(reached) or 1.0
    worst = min(reached) - margin if settings.mode == "max" else max(reached) + margin
    for name, group in table.items():
        scores[name] |= {k: worst for k, run in group.items() if run.status == "failed" and k[0] != "repeat"}


def _missing(
    names: Sequence[str], run_ids: Mapping[tuple[str, str, int], str], runs: Mapping[str, Run], settings: Settings
) -> list[str]:
    """Say of each pipeline how many runs are not done, those left that the setting `failed` does not pass over."""
    found = []
    for name in names:
        ids = {i for (n, part, _), i in run_ids.items() if n == name and part != "repeat"}
        status = [runs[i].status if i in runs else "pending" for i in ids]
        failed, open_ = status.count("failed"), status.count("pending") + status.count("running")
        if failed and settings.failed == "incomplete":
            found.append(f"{failed} of {len(ids)} runs of {name} failed")
        if open_:
            found.append(f"{open_} of {len(ids)} runs of {name} are not done")
    return found


def _compare(
    settings: Settings,
    a: str,
    b: str,
    scores: Mapping[str, Mapping[Key, float]],
    table: Mapping[str, Mapping[Key, Run]],
    level: float,
    missing: Sequence[str],
) -> Comparison:
    left, right = ({k: x for k, x in scores[n].items() if k[0] in _WHOLE} for n in (a, b))
    keys = [k for k in left if k in right]
    pairs = np.array([[left[k], right[k]] for k in keys]).reshape(-1, 2)
    kwargs: dict[str, Any] = {"mode": settings.mode}
    found = power = difference = None
    if len(pairs):
        found = verdict(*pairs.T, gamma=settings.gamma, alpha=level, beta=settings.beta, **kwargs)
        difference = t_interval(pairs[:, 0] - pairs[:, 1], alpha=level)
    if len(pairs) > 1:
        power = power_curve(*pairs.T, alpha=level, beta=settings.beta, **kwargs)
        # as far as it takes, and a little beyond
        far = max(2 * len(pairs), 60, min(power.needed or 200, 400) + 20)
        power = power_curve(*pairs.T, sizes=range(2, far), alpha=level, beta=settings.beta, **kwargs)
    theirs = [m for m in missing if f" runs of {a} " in m or f" runs of {b} " in m]
    if settings.design == "one_at_a_time":
        theirs = ["the design one_at_a_time varies one source only; a verdict needs design all or sobol"]
    return Comparison(
        a=a,
        b=b,
        verdict=found,
        incomplete="; ".join(theirs) or None,
        difference=difference,
        power=power,
        scores=pairs,
        unpaired=sorted(f"{part}/{replicate}" for part, replicate in set(left) ^ set(right)),
        shared=_shared([(table[a][k], table[b][k]) for k in keys]),
        examples=_examples(settings, [(table[a][k], table[b][k]) for k in keys]),
    )


def _shared(pairs: Sequence[tuple[Run, Run]]) -> dict[str, bool] | None:
    """Tell for each source whether the runs of every pair drew the same from it."""
    prints = [(a.fingerprints, b.fingerprints) for a, b in pairs]
    if not prints or any(not x or not y for x, y in prints):
        return None
    sources = [s for s in ("split", "order", "augment", "init", "dropout") if all(s in x and s in y for x, y in prints)]  # type: ignore[operator]
    return {s: all(x[s] == y[s] for x, y in prints) for s in sources}  # type: ignore[index]


def _examples(settings: Settings, pairs: Sequence[tuple[Run, Run]]) -> dict[str, Interval] | None:
    root = settings.path
    loaded = [[load_examples(run_folder(root, run.run_id)) for run in pair] for pair in pairs]
    if not loaded or any(x is None for pair in loaded for x in pair):
        return None
    if len({len(x) for pair in loaded for x in pair}) != 1:  # type: ignore[arg-type]
        return None
    a, b = (np.stack([pair[i] for pair in loaded]) for i in (0, 1))  # type: ignore[misc]
    return two_way_bootstrap(a, b, alpha=settings.alpha)


def _one_at_a_time(settings: Settings, scores: Mapping[Key, float]) -> dict[str, Component]:
    samples = {s: [x for (part, _), x in scores.items() if part == s] for s in settings.vary}
    usable = {s: x for s, x in samples.items() if len(x) > 1}
    return variance_components(usable, reference="split" if "split" in usable else None, alpha=settings.alpha)


def _sobol(settings: Settings, scores: Mapping[Key, float]) -> dict[str, SobolIndex] | None:
    parts = ["A", "B", *(f"AB:{s}" for s in settings.vary)]
    rows = [r for r in range(settings.replicates) if all((p, r) in scores for p in parts)]
    if len(rows) < 2:
        return None
    column = {p: [scores[p, r] for r in rows] for p in parts}
    swapped = {s: column[f"AB:{s}"] for s in settings.vary}
    return sobol_components(column["A"], column["B"], swapped, alpha=settings.alpha)


def _matrix(names: Sequence[str], scores: Mapping[str, Mapping[Key, float]]) -> Array:
    keys = [k for k in scores[names[0]] if k[0] in _WHOLE and all(k in scores[n] for n in names)]
    return np.array([[scores[n][k] for n in names] for k in keys]).reshape(len(keys), len(names))


def _best(names: Sequence[str], matrix: Array, settings: Settings) -> list[str]:
    """Return the pipeline with the best mean and those that it does not significantly outperform."""
    if not len(matrix) or len(names) < 2:
        return list(names[:1])
    means = matrix.mean(0)
    first = int(means.argmax() if settings.mode == "max" else means.argmin())
    level = settings.alpha / (len(names) - 1)
    found = []
    for i, name in enumerate(names):
        told = verdict(matrix[:, first], matrix[:, i], alpha=level, gamma=settings.gamma, mode=settings.mode)  # type: ignore[arg-type]
        if i == first or not told.decision.startswith("significant"):
            found.append(name)
    return found


def _summary(values: Sequence[float], settings: Settings) -> dict[str, float]:
    if not values:
        return {"runs": 0}
    x = np.asarray(values)
    middle = stratified_bootstrap(x, interquartile_mean, alpha=settings.alpha, resamples=1000)
    return {
        "runs": len(x),
        "mean": float(x.mean()),
        "std": float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        "min": float(x.min()),
        "max": float(x.max()),
        "iqm": middle.estimate,
        "iqm_low": middle.low,
        "iqm_high": middle.high,
    }


def _failures(table: Mapping[str, Mapping[Key, Run]]) -> list[str]:
    failed = {run.run_id: run for group in table.values() for run in group.values() if run.status == "failed"}
    return [f"run {i} of {run.pipeline} failed: {run.error} (log: {run.log})" for i, run in failed.items()]


def _not_deterministic(table: Mapping[str, Mapping[Key, Run]], settings: Settings) -> list[str]:
    found = []
    for name, group in table.items():
        again = group.get(("repeat", 0))
        first = next((run for (part, replicate), run in group.items() if part != "repeat" and replicate == 0), None)
        if again is None or first is None or again.status != "done" or first.status != "done":
            continue
        if first.fingerprints and again.fingerprints:
            found += [f"{name}: {text}" for text in lint_determinism(first.fingerprints, again.fingerprints)]
        elif _metric(first, settings) != _metric(again, settings):
            values = f"{_metric(first, settings)!r} and {_metric(again, settings)!r}"
            found.append(f"{name}: the pipeline is not deterministic: two runs with the same seeds gave {values}.")
    return found


def _metric(run: Run, settings: Settings) -> float | None:
    return (run.metrics or {}).get(settings.metric)


def _no_effect(
    table: Mapping[str, Mapping[Key, Run]],
    scores: Mapping[str, Mapping[Key, float]],
    components: Mapping[str, Mapping[str, Component]],
) -> list[str]:
    found = []
    for name, sources in components.items():
        alone = {
            s: [dict(r.fingerprints or {}) for (part, _), r in table[name].items() if part == s and r.status == "done"]
            for s in sources
        }
        told = lint_effects(alone)
        found += [f"{name}: {text}" for text in told]
        for source, component in sources.items():
            if not component.effect and not any(repr(source) in text for text in told):
                found.append(
                    f"{name}: source {source!r} has no effect on this pipeline: {component.runs} runs score the same."
                )
    return found


def _notices(
    settings: Settings,
    pipelines: Mapping[str, tuple[str, Sequence[str]]],
    table: Mapping[str, Mapping[Key, Run]],
    comparisons: Sequence[Comparison],
) -> list[str]:
    found = [f"{name}: {text}" for name, (_, notes) in pipelines.items() for text in notes]
    found += lint_environment()
    made = {tuple(sorted((r.environment or {}).items())) for g in table.values() for r in g.values() if r.environment}
    if len(made) > 1:
        found.append(f"The runs were made in {len(made)} different environments; see the table of them.")
    for c in comparisons:
        apart = [s for s, same in (c.shared or {}).items() if not same and s in settings.vary]
        if apart:
            found.append(
                f"{c.a} and {c.b} have the same seeds, and drew different numbers from {', '.join(apart)}: they are "
                "not paired in these (another architecture, batch size, number of workers or length of the data set)."
            )
        if c.unpaired:
            found.append(f"{c.a} and {c.b}: without partner, and so left out: {', '.join(c.unpaired)}.")
    if settings.failed != "incomplete":
        count = sum(run.status == "failed" for group in table.values() for run in group.values())
        how = "counted as the worst" if settings.failed == "worst" else "left out with their partners"
        found += [f"{count} failed runs were {how}."] if count else []
    fixed = [s for s in ("init", "split", "order", "augment", "dropout") if s not in settings.vary]
    if fixed and settings.design != "one_at_a_time":
        found.append(f"Not varied: {', '.join(fixed)}. The verdict holds for this one choice of them.")
    found.append("Hyper-parameters were not searched anew in each replicate: their choice is not among the variation.")
    return found


def _stale(pipelines: Mapping[str, tuple[str, Sequence[str]]], runs: Mapping[str, Run]) -> list[tuple[str, str, int]]:
    current = {key for key, _ in pipelines.values()}
    old = [(run.pipeline, run.pipeline_hash) for run in runs.values() if run.pipeline_hash not in current]
    return [(name, key, old.count((name, key))) for name, key in sorted(set(old))]
