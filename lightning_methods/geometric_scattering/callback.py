"""Show what scattering features say of the classes of a data set, and which nodes of a graph they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback, rank_zero_warn
from lightning_methods.core.batches import describe_batch
from lightning_methods.core.gather import gather_rows
from lightning_methods.core.passes import batches, preserved
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LightningMethodsWarning,
    NoEffect,
    ShapeMismatch,
    did_you_mean,
)
from lightning_methods.geometric_scattering.drawing import Panel, draw_graphs
from lightning_methods.geometric_scattering.module import ScatteringClassifier
from lightning_methods.geometric_scattering.subspaces import (
    ClassSubspaces,
    class_subspaces,
    filter_responses,
    pca_dimensions,
    z_scores,
)
from lightning_methods.geometric_scattering.transform import GeometricScattering
from lightning_methods.report import curves, heatmap, is_reporting, log_figure, log_table

# graphs of each class that are kept for drawing, and the largest that can still be looked at
_KEPT, _LARGEST = 100, 120


class ScatteringExplorer(Callback):
    r"""Show what scattering features say of the classes of graphs (section 4.3 of the paper), and which nodes they see.

    .. math:: D(i, j) = \frac{1}{|i|} \sum_{x \in i} \| x - C_j^T C_j x \|^2

    is the mean squared distance of the standardised features of class i to the principal subspace of class j. The
    features are those of a `ScatteringClassifier`, or else those that the graphs bring along (`data.scattering`), or
    else computed here. They are taken in an extra pass that leaves no trace in the training, at its end and, where
    asked for, every few epochs. Under DDP the graphs of all ranks are joined.

    Logs `scattering/dimension/<percent>` (principal components that hold so much of the variance) and
    `scattering/own_nearest` (share of graphs whose nearest subspace is that of their class) every few epochs; at the
    end the figures `distances`, `nearest`, `preference`, `filters` (frequency responses) and `attribution` (what each
    node adds to a moment, a typical graph of each class), and the tables `dimensions`, `distances_table`,
    `nearest_table`, `preference_table` and `moments_table` (which moments tell the classes apart).

    Args:
        scattering: computes the features; by default none where the module or the graphs have them, else sums of powers
            of `data.x`, or of eccentricity and clustering coefficient where there is none.
        data: `"train"`, `"val"`, `"test"` or a dataloader.
        class_names: of the classes 0, 1, ...
        shares: of the variance, whose dimensions are told.
        share: of the variance of a class that its subspace holds, 0.9 in the paper.
        moment: name of the moment whose nodes are drawn, as in `feature_names()`; by default the one that tells the
            classes best apart.
        drawn: how many classes to draw a graph of.
        every_n_epochs: log the scalars during the fit.
        log_prefix: first part of every logged key.

    Attributes:
        dimensions: share of the variance -> how many principal components hold it.
        subspaces: distances, nearest subspaces and preferences, `None` where there are no two classes of two graphs.
        telling: moments and how much they tell classes apart (F statistic), the best first.

    Raises:
        InvalidArgument: for settings that cannot be read, or for a moment that does not exist.
        BatchFormat: at the start of the fit, if batches are no graphs or have no class labels.
        ShapeMismatch: if there is not one row of features a label.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import ScatteringExplorer
        >>> trainer = Trainer(callbacks=ScatteringExplorer(), logger=False)

    Deviations from the paper: it explores enzymes by sums of powers; a `ScatteringClassifier` of normalised moments is
    explored by these.
    """

    method: ClassVar[str] = "geometric_scattering"

    def __init__(
        self,
        scattering: GeometricScattering | None = None,
        *,
        data: Any = "train",
        class_names: Sequence[str] | None = None,
        shares: Sequence[float] = (0.5, 0.8, 0.9, 0.99),
        share: float = 0.9,
        moment: str | None = None,
        drawn: int = 4,
        every_n_epochs: int | None = None,
        log_prefix: str = "scattering",
    ) -> None:
        for name, values in (("shares", shares), ("share", [share])):
            if not values or not all(0 <= value < 1 for value in values):
                raise InvalidArgument(f"{name}={values}: shares of the variance from 0 to below 1 are needed.")
        if isinstance(data, str) and data not in ("train", "val", "test"):
            raise InvalidArgument(f"data={data!r}: 'train', 'val', 'test' or a dataloader is needed.")
        if drawn < 0 or (every_n_epochs is not None and every_n_epochs < 1):
            raise InvalidArgument(f"drawn={drawn}, every_n_epochs={every_n_epochs}: at least 0 and 1 are needed.")
        self.scattering, self.data = scattering, data
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.shares, self.share, self.moment, self.drawn = tuple(shares), share, moment, drawn
        self.every_n_epochs, self.log_prefix = every_n_epochs, log_prefix
        self._reset()

    def _reset(self) -> None:
        self.dimensions: dict[float, int] = {}
        self.subspaces: ClassSubspaces | None = None
        self.telling: list[tuple[str, float]] = []
        self.figure_paths: list[Path] = []
        self._unchecked = False  # whether the first batch of the training is still to be looked at

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(log_prefix=self.log_prefix)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at one batch of other data than those of the training, to tell before it what cannot be explored."""
        self._reset()
        self._unchecked = self.data == "train"
        if not self._unchecked and not self._is_quiet(trainer):
            batch = next(batches(trainer, pl_module, self.data, description="ScatteringExplorer", limit=1), None)
            if batch is not None:
                self._check(pl_module, batch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the first batch: a pass of its own would move a loader that is to go on where a run stopped."""
        if self._unchecked and not self._is_quiet(trainer):
            self._check(pl_module, batch)
        self._unchecked = False

    def _check(self, pl_module: Any, batch: Any) -> None:
        with torch.no_grad(), preserved(pl_module):
            pl_module.eval()
            x, _ = self._read(pl_module, batch)
        names = self._source(pl_module, batch).names(x.shape[1])
        if self.moment is not None and self.moment not in names:
            raise InvalidArgument(f"moment={self.moment!r} is not known. {did_you_mean(self.moment, names)}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the scalars, if asked to."""
        every = self.every_n_epochs
        if not every or (trainer.current_epoch + 1) % every or self._is_quiet(trainer):
            return
        self._explore(trainer, pl_module)
        kept = {"on_step": False, "on_epoch": True, "batch_size": 1, "rank_zero_only": True}
        for share, count in self.dimensions.items():
            pl_module.log(f"{self.log_prefix}/dimension/{100 * share:g}", float(count), **kept)
        if self.subspaces is not None:
            own = float(self.subspaces.nearest.diagonal().mean())
            pl_module.log(f"{self.log_prefix}/own_nearest", own, **kept)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Explore the features, and show what was found."""
        if self._is_quiet(trainer):
            return
        found = self._explore(trainer, pl_module)
        if found is not None and is_reporting(trainer):
            self._show(trainer, found)

    @staticmethod
    def _is_quiet(trainer: Any) -> bool:
        """Tell whether nothing would be shown; the same on every rank, since all of them join their graphs."""
        return bool(trainer.fast_dev_run or getattr(trainer, "barebones", False))

    # -- features ----------------------------------------------------------------------------------------------------

    def _source(self, pl_module: Any, batch: Any) -> _Source:
        """Return what computes features, and names and attributes them."""
        if self.scattering is not None:
            return _Source(self.scattering)
        if isinstance(pl_module, ScatteringClassifier):
            return _Source(pl_module)
        if getattr(batch, "scattering", None) is not None:
            return _Source(None)
        signals: Any = ("x",) if getattr(batch, "x", None) is not None else ("eccentricity", "clustering")
        return _Source(GeometricScattering(normalized=False, signals=signals))

    def _read(self, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return features `(B, F)` and classes `(B,)` of a batch."""
        if getattr(batch, "edge_index", None) is None and getattr(batch, "scattering", None) is None:
            raise BatchFormat(
                f"ScatteringExplorer needs graphs of PyG with edge_index, or with their features as scattering; "
                f"the batch is {describe_batch(batch)}."
            )
        y = getattr(batch, "y", None)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.numel() != y.shape[:1].numel():
            raise BatchFormat(
                f"ScatteringExplorer needs class labels y (graphs,) of whole numbers; the batch is "
                f"{describe_batch(batch)}."
            )
        x = self._source(pl_module, batch).features(batch).detach().double()
        if len(x) != y.numel():
            raise ShapeMismatch(f"There are features of {len(x)} graphs and {y.numel()} labels; one each is needed.")
        return x, y.reshape(-1).long()

    def _explore(self, trainer: Any, pl_module: Any) -> _Found | None:
        """Take the features of all graphs and what follows from them."""
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        graphs: list[_Graph] = []
        names: list[str] = []
        for batch in batches(trainer, pl_module, self.data, description="ScatteringExplorer"):
            x, y = self._read(pl_module, batch)
            rows.append(x)
            labels.append(y)
            source = self._source(pl_module, batch)
            names = names or source.names(x.shape[1])
            graphs += _small_graphs(batch, x, y, Counter(graph.label for graph in graphs))
        if not rows:
            rank_zero_warn("ScatteringExplorer got no batch and shows nothing.", category=NoEffect)
            return None
        # joined over the ranks on their device, then studied on the CPU
        features, classes = gather_rows(torch.cat(rows)).cpu(), gather_rows(torch.cat(labels)).cpu()
        varied = features.square().sum(0) > 0
        if len(features) < 2 or not bool(varied.any()):
            rank_zero_warn(
                f"ScatteringExplorer shows nothing: {len(features)} graphs with {int(varied.sum())} features that are "
                f"not 0. At least two graphs with one are needed.",
                category=NoEffect,
            )
            return None
        z = z_scores(features)
        self.dimensions = dict(zip(self.shares, pca_dimensions(z, self.shares), strict=True))
        kept = self._large_classes(classes)
        self.subspaces = None if kept is None else class_subspaces(z[kept], classes[kept], self.share)
        left = [name for name, used in zip(names, varied.tolist(), strict=True) if used]
        strength = _f_statistic(z, classes)
        order = strength.argsort(descending=True, stable=True).tolist()
        self.telling = [(left[i], float(strength[i])) for i in order]
        return _Found(source, z, classes, names, graphs)

    @staticmethod
    def _large_classes(classes: Tensor) -> Tensor | None:
        """Return which graphs are of a class of two or more, `None` where there are no two such classes."""
        known, place, counts = torch.unique(classes, return_inverse=True, return_counts=True)
        small = known[counts < 2].tolist()
        if len(known) - len(small) < 2:
            rank_zero_warn(
                f"ScatteringExplorer compares no classes: of {len(known)} classes with {counts.tolist()} graphs at "
                f"least two of two graphs are needed.",
                category=NoEffect,
            )
            return None
        if small:
            rank_zero_warn(
                f"ScatteringExplorer leaves out the classes {small} of a single graph.",
                category=LightningMethodsWarning,
            )
        return counts[place] >= 2

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _show(self, trainer: Any, found: _Found) -> None:
        rows: list[list[Any]] = [["all", len(found.z), *self.dimensions.values()]]
        for c in torch.unique(found.classes).tolist():
            of_class = found.z[found.classes == c]
            rows.append([self._name(c), len(of_class), *pca_dimensions(of_class, self.shares)])
        self._table(trainer, "dimensions", ["class", "graphs", *(f"{100 * s:g}%" for s in self.shares)], rows)
        self._table(trainer, "moments_table", ["moment", "F"], self.telling[:20])
        if self.subspaces is not None:
            self._show_classes(trainer, self.subspaces)
        omega, response = found.source.responses()
        if omega is not None:
            lines = {f"psi{j}": (omega, values) for j, values in enumerate(response, start=1)}
            title, label = "What each filter makes of the eigenvalues of the walk", "eigenvalue, 1 is smooth"
            figure = curves(lines, title=title, x_label=label, y_label="response")
            self._figure(trainer, "filters", figure)
        panels = self._panels(found)
        if panels:
            title = f"What each node adds to {self._drawn_moment(found)}"
            self._figure(trainer, "attribution", draw_graphs(panels, title=title, value_label="contribution"))

    def _show_classes(self, trainer: Any, found: ClassSubspaces) -> None:
        names = [self._name(c) for c in found.classes.tolist()]
        axes: dict[str, Any] = {"x_label": "subspace of the class", "y_label": "graphs of the class"}
        relative = found.distances / found.distances.diagonal()[:, None].clamp(min=1e-300)
        shown = heatmap(
            relative, names, names, title="Distance to subspaces", value_label="over that to their own", **axes
        )
        self._figure(trainer, "distances", shown)
        shown = heatmap(
            found.nearest, names, names, title="Nearest subspace", value_label="share", vmin=0, vmax=1, **axes
        )
        self._figure(trainer, "nearest", shown)
        others = found.preference.clone().fill_diagonal_(torch.nan)
        shown = heatmap(
            others, names, names, title="Preference of i for j", x_label="class j", y_label="class i", vmin=0
        )
        self._figure(trainer, "preference", shown)
        columns = ["class", *names]
        for key, matrix in (("distances", found.distances), ("preference", found.preference)):
            rows = [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)]
            self._table(trainer, f"{key}_table", columns, rows)
        whole = zip(names, found.nearest.tolist(), found.second.tolist(), strict=True)
        rows = [[name, *row, second] for name, row, second in whole]
        self._table(trainer, "nearest_table", [*columns, "own is second"], rows)

    def _drawn_moment(self, found: _Found) -> str:
        return self.moment or self.telling[0][0]

    def _panels(self, found: _Found) -> list[Panel]:
        """Return a graph of each class whose moment is the median of its class, with what its nodes add."""
        moment = self._drawn_moment(found)
        column = found.names.index(moment)
        known = [graph for graph in found.graphs if found.source.attributes(graph.data)]
        panels: list[Panel] = []
        for c in torch.unique(found.classes).tolist():
            of_class = sorted((g for g in known if g.label == c), key=lambda g: float(g.features[column]))
            if of_class and len(panels) < self.drawn:
                graph = of_class[len(of_class) // 2]
                added = found.source.contributions(graph.data)[:, column]
                says = f"{moment.split('|')[-1]} {float(graph.features[column]):.3g}, {len(added)} nodes"
                panels.append(Panel(graph.data.edge_index, added, self._name(c), says))
        return panels

    def _name(self, label: int) -> str:
        known = self.class_names is not None and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and self.class_names is not None else f"class {label}"

    def _figure(self, trainer: Any, key: str, figure: Any) -> None:
        self.figure_paths += log_figure(trainer, f"{self.log_prefix}/{key}", figure)

    def _table(self, trainer: Any, key: str, columns: list[str], rows: Sequence[Sequence[Any]]) -> None:
        log_table(trainer, f"{self.log_prefix}/{key}", columns, rows)


class _Graph(NamedTuple):
    """A graph that may be drawn."""

    data: Any
    features: Tensor
    label: int


class _Found(NamedTuple):
    """Features of all graphs, their classes, the names of all columns, and graphs that may be drawn."""

    source: _Source
    z: Tensor
    classes: Tensor
    names: list[str]
    graphs: list[_Graph]


class _Source:
    """What the features come from: a transform, a `ScatteringClassifier`, or the graphs themselves (`None`)."""

    def __init__(self, origin: Any) -> None:
        self.origin = origin
        self.encoder = origin.encoder if isinstance(origin, ScatteringClassifier) else None

    def attributes(self, graph: Any) -> bool:
        """Tell whether the features of a graph can be computed again, node by node."""
        return self.origin is not None and (self.encoder is None or getattr(graph, "x", None) is not None)

    def features(self, batch: Any) -> Tensor:
        return batch.scattering if self.origin is None else self.origin.features(batch)

    def names(self, width: int) -> list[str]:
        """Return the names of the columns, numbers where nothing is known of them."""
        if self.encoder is not None:
            return list(self.encoder.feature_names())
        if self.origin is None:
            return [f"feature {i}" for i in range(width)]
        alone = len(self.origin.feature_names(1))
        by_signal = alone // len(self.origin.signals)
        others = len(self.origin.signals) - ("x" in self.origin.signals)
        return list(self.origin.feature_names(width // by_signal - others))

    def contributions(self, graph: Any) -> Tensor:
        if self.encoder is None:
            return self.origin.contributions(graph)
        device = next(self.origin.parameters()).device
        graph = graph.to(device)
        x = graph.x if self.encoder.learnable else graph.x.double()
        return self.encoder.contributions(x, graph.edge_index, getattr(graph, "edge_weight", None)).cpu()

    def responses(self) -> tuple[Any, Any]:
        """Return eigenvalues and the responses of the filters, `(None, None)` where they are not known."""
        if self.origin is None:
            return None, None
        if self.encoder is not None and self.encoder.learnable:
            return filter_responses(scales=self.encoder.scales(), alpha=float(self.encoder.alpha()))
        return filter_responses(self.encoder.J if self.encoder is not None else self.origin.filters["J"])


def _small_graphs(batch: Any, features: Tensor, labels: Tensor, known: Counter[int]) -> list[_Graph]:
    """Return the graphs of a batch that can be looked at, on the CPU, but of classes with enough of them."""
    if getattr(batch, "edge_index", None) is None:
        return []
    graphs = batch.to_data_list() if hasattr(batch, "to_data_list") else [batch]
    kept = []
    for graph, row, label in zip(graphs, features.cpu(), labels.tolist(), strict=True):
        if known[label] < _KEPT and 0 < int(graph.num_nodes or 0) <= _LARGEST:
            kept.append(_Graph(graph.cpu(), row, label))
            known[label] += 1
    return kept


def _f_statistic(z: Tensor, classes: Tensor) -> Tensor:
    """Return how much larger the variance between classes is than that within them, 0 where nothing varies."""
    known, place = torch.unique(classes, return_inverse=True)
    of_class = torch.nn.functional.one_hot(place).double()
    means = (of_class.T @ z) / of_class.sum(0)[:, None]
    between = (of_class.sum(0)[:, None] * (means - z.mean(0)).square()).sum(0)
    within = (z - means[place]).square().sum(0)
    degrees = (max(len(known) - 1, 1), max(len(z) - len(known), 1))
    ratio = (between / degrees[0]) / (within / degrees[1])
    return torch.where(between > 0, ratio, 0.0)  # endless where the classes are apart and each is of one value
