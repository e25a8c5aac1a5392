"""What a fitted ensemble says of the labels: how many are wrong, which, and into what they were changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_methods.report import heatmap, histograms
from lightning_methods.rog.ensemble import LayerEnsemble
from lightning_methods.rog.features import Collected

_ROWS = 16_384  # at a time


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
        columns = ["index", "given", "suggested", "distance", "margin"]
        values: list[Tensor] = [self.index, self.given, self.suggested, self.distance, self.margin]
        if self.true is not None:
            columns, values = [*columns, "true"], [*values, self.true]
        rows = self.suspected[:limit].tolist()
        return columns, [[value[i].item() for value in values] for i in rows]

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
    device = ensemble.weights.device
    suggested, distance, margin = [], [], []
    for start in range(0, len(collected.labels), _ROWS):
        own = slice(start, start + _ROWS)
        features = {name: x[own].to(device) for name, x in collected.features.items()}
        given = collected.labels[own].to(device)[:, None]
        posterior = ensemble(features)
        best, predicted = posterior.max(1)
        own_class = posterior.gather(1, given)[:, 0].clamp(min=torch.finfo(torch.float64).min)
        suggested.append(predicted.cpu())
        margin.append((best - own_class).cpu())
        distance.append(ensemble.distances(features).gather(1, given)[:, 0].cpu())
    return LabelAudit(
        collected.index,
        collected.labels,
        torch.cat(suggested),
        torch.cat(distance),
        torch.cat(margin),
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


def write_audit(found: LabelAudit, folder: Path) -> list[Path]:
    """Write the suspected labels and the transition as CSV, and both figures; return the files."""
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("suspects.csv", "transition.csv", "transition.png", "distances.png")]
    columns, rows = found.table()
    classes = [str(c) for c in range(found.num_classes)]
    for path, head, body in (
        (paths[0], columns, rows),
        (paths[1], ["class", *classes], [[c, *row] for c, row in zip(classes, found.transition.tolist(), strict=True)]),
    ):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *body])
    found.transition_figure().savefig(paths[2], dpi=150)
    found.distance_figure().savefig(paths[3], dpi=150)
    return paths
