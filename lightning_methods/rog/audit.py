"""What a fitted ensemble says of the labels: how many are wrong, which, and into what they were changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_methods.report import heatmap, histograms
from lightning_methods.rog.ensemble import LayerEnsemble
from lightning_methods.rog.features import Collected

_ROWS = 16_384  # at a time
_COLUMNS = 3  # of a verdict


@dataclass(frozen=True)
class LabelAudit:
    """What the ensemble says of the labels of `n` samples, all on the CPU.

    Attributes:
        index: `(n,)` places in the dataset.
        given: `(n,)` their labels.
        suggested: `(n,)` the classes that the ensemble predicts.
        distance: `(n,)` squared Mahalanobis distance per feature to the given class, averaged over the layers.
        margin: `(n,)` log-probability of the suggested class minus that of the given one, 0 where they agree.
        true: `(n,)` labels before the noise, where the dataset knows them.
        num_classes: number of classes.
    """

    index: Tensor
    given: Tensor
    suggested: Tensor
    distance: Tensor
    margin: Tensor
    true: Tensor | None
    num_classes: int

    @property
    def suspected(self) -> Tensor:
        """`(m,)` rows whose label the ensemble contradicts, the surest first."""
        rows = torch.where(self.suggested != self.given)[0]
        return rows[self.margin[rows].argsort(descending=True, stable=True)]

    @property
    def noise_rate(self) -> float:
        """Estimated share of wrong labels: those that the ensemble contradicts."""
        return float((self.suggested != self.given).double().mean())

    @property
    def transition(self) -> Tensor:
        """`(C, C)` share of each predicted class (row) that bears each label; NaN for a class never predicted."""
        c = self.num_classes
        pairs = torch.bincount(self.suggested * c + self.given, minlength=c * c).view(c, c).double()
        return pairs / pairs.sum(1, keepdim=True)

    def by_class(self) -> tuple[list[str], list[list[Any]]]:
        """Return columns and a row for each class: how many samples bear it, and the share of them that is suspected.

        Where the true labels are known, also the share that is wrong.
        """
        suspected = self.suggested != self.given
        columns = ["class", "samples", "suspected"] + (["wrong"] if self.true is not None else [])
        rows = []
        for c in range(self.num_classes):
            own = self.given == c
            count = int(own.sum())
            shares = [suspected] + ([self.given != self.true] if self.true is not None else [])
            rows.append([c, count, *(float(share[own].double().mean()) if count else 0.0 for share in shares)])
        return columns, rows

    def quality(self) -> dict[str, float]:
        """Return, where the true labels are known, how well the suspected ones are the wrong ones.

        `precision` and `recall` of all suspected, and `precision_at_wrong`: of as many of the surest as are wrong.
        """
        if self.true is None:
            return {}
        wrong, suspected = self.given != self.true, self.suspected
        found = wrong[suspected].double()
        top = found[: max(int(wrong.sum()), 1)]
        values = {
            "suspects_precision": found.mean() if len(found) else torch.tensor(torch.nan),
            "suspects_recall": found.sum() / max(int(wrong.sum()), 1) if wrong.any() else torch.tensor(torch.nan),
            "precision_at_wrong": top.mean() if len(top) and wrong.any() else torch.tensor(torch.nan),
            "true_noise_rate": wrong.double().mean(),
        }
        return {name: float(value) for name, value in values.items() if not bool(value.isnan())}

    def table(self, limit: int | None = None) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of the suspected mislabels, the surest first."""
        return self._listed(self.suspected[:limit])

    def samples(self) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of all samples, in the order of the data."""
        return self._listed(torch.arange(len(self.given)))

    def _listed(self, rows: Tensor) -> tuple[list[str], list[list[Any]]]:
        columns = ["index", "given", "suggested", "distance", "margin"]
        values: list[Tensor] = [self.index, self.given, self.suggested, self.distance, self.margin]
        if self.true is not None:
            columns, values = [*columns, "true"], [*values, self.true]
        return columns, [list(row) for row in zip(*(value[rows].tolist() for value in values), strict=True)]

    def transition_figure(self) -> Figure:
        """Draw the estimated transition matrix."""
        return heatmap(
            self.transition,
            title=f"Estimated label noise: {100 * self.noise_rate:.1f}% wrong",
            value_label="share of the class",
            x_label="given label",
            y_label="class by RoG",
            vmin=0.0,
            vmax=1.0,
        )

    def distance_figure(self) -> Figure:
        """Draw how far samples are from the class of their label, by whether the ensemble agrees with it."""
        agree = self.suggested == self.given
        # on a logarithmic scale: a few samples lie very far away
        distance = self.distance.clamp(min=1e-12).log10()
        shown = {"label confirmed": distance[agree], "label suspected": distance[~agree]}
        return histograms(
            {name: values for name, values in shown.items() if bool(values.isfinite().any())},
            title="Distance to the class of the given label",
            x_label="log10 of the squared Mahalanobis distance per feature",
        )


@torch.no_grad()
def audit(ensemble: LayerEnsemble, collected: Collected, true: Tensor | None) -> LabelAudit:
    """Compare the labels of collected samples with what the ensemble says."""
    parts = [torch.zeros(0, _COLUMNS, dtype=torch.float64)]
    for start in range(0, len(collected.labels), _ROWS):
        own = slice(start, start + _ROWS)
        parts.append(verdict(ensemble, {name: x[own] for name, x in collected.features.items()}, collected.labels[own]))
    return _label_audit(ensemble, collected, torch.cat(parts), true)


@torch.no_grad()
def verdict(ensemble: LayerEnsemble, features: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return `(n, 3)` for a batch, on the CPU: the class suggested, the distance to the given one, and the margin."""
    here = {name: x.to(ensemble.weights.device) for name, x in features.items()}
    given = labels.to(ensemble.weights.device).clamp(min=0)[:, None]  # what is no class is dropped later
    posterior = ensemble(here)
    best, suggested = posterior.max(1)
    own = posterior.gather(1, given)[:, 0].clamp(min=torch.finfo(torch.float64).min)
    distance = ensemble.distances(here).gather(1, given)[:, 0]
    return torch.stack([suggested.double(), distance, best - own], 1).cpu()


def from_verdicts(ensemble: LayerEnsemble, collected: Collected, true: Tensor | None) -> LabelAudit:
    """Return the audit of samples of which only the verdict was kept."""
    return _label_audit(ensemble, collected, collected.features["verdict"], true)


def _label_audit(ensemble: LayerEnsemble, collected: Collected, verdicts: Tensor, true: Tensor | None) -> LabelAudit:
    suggested, distance, margin = verdicts.unbind(1)
    return LabelAudit(
        collected.index,
        collected.labels,
        suggested.long(),
        distance,
        margin,
        None if true is None else true[collected.index],
        ensemble.num_classes,
    )


def true_labels(dataset: Any) -> Tensor | None:
    """Return the labels before any noise of a dataset that knows them (`true_targets`), through subsets of it."""
    found = getattr(dataset, "true_targets", None)
    if found is not None:
        return torch.as_tensor(found).long().cpu()
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        inner = true_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices))]
    return None


def true_labels_of(loaders: list[Any]) -> Tensor | None:
    """Return the labels before any noise of the data of a single loader, if they are known."""
    return true_labels(getattr(loaders[0], "dataset", None)) if len(loaders) == 1 else None
