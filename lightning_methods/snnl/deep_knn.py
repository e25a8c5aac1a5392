"""Outliers by their neighbours in hidden layers: deep k-nearest neighbours on a trained module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from lightning_methods.core._lightning import Callback, LightningDataModule
from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.gather import world_size
from lightning_methods.core.passes import batches, preserved
from lightning_methods.core.taps import FeatureTaps, Pool
from lightning_methods.errors import InvalidArgument, ShapeMismatch, UnsupportedTraining, check_choice
from lightning_methods.report import histograms, log_figure, log_table, reliability_diagram
from lightning_methods.snnl.functional import Distance, class_labels

_QUERIES_AT_A_TIME = 256


@dataclass(frozen=True)
class NeighborScores:
    """What the neighbours say of `N` samples, all on the CPU.

    Attributes:
        predicted: `(N,)` class that the network predicts.
        softmax: `(N,)` the network's own largest probability.
        same_class_neighbors: `(N,)` share of the neighbours, over all layers, whose label is the predicted class.
        p_values: `(N, C)` conformal p-value of each class, in (0, 1].
    """

    predicted: Tensor
    softmax: Tensor
    same_class_neighbors: Tensor
    p_values: Tensor

    @property
    def credibility(self) -> Tensor:
        """`(N,)` the largest p-value: how well the training data support any prediction."""
        return self.p_values.amax(1)

    @property
    def confidence(self) -> Tensor:
        """`(N,)` one minus the second largest p-value: how clearly they rule out all other classes."""
        if self.p_values.shape[1] < 2:
            return torch.ones_like(self.p_values[:, 0])
        return 1 - self.p_values.topk(2, dim=1).values[:, 1]


class DeepKNN(Callback):
    r"""Score test samples by the labels of their nearest training samples in hidden layers.

    After `trainer.test` it logs how far the neighbours agree with the network, how calibrated the credibility is, and,
    given outliers, how well they are told from the test data. With :math:`\Omega_l(x)` the labels of the `k` nearest
    neighbours in layer `l`, and calibration data `A`:

    .. math:: a(x, j) = \sum_l |\{ i \in \Omega_l(x) : i \ne j \}|, \qquad
        p_j(x) = \frac{1 + |\{ (x', y') \in A : a(x', y') \ge a(x, j) \}|}{1 + |A|}

    Credibility is :math:`\max_j p_j`, confidence one minus the second largest (Papernot and McDaniel 2018). The soft
    nearest neighbour paper uses the share of neighbours that bear the class which the network predicts.

    Logs `deep_knn/accuracy`, `deep_knn/network_accuracy`, `deep_knn/credibility`, `deep_knn/same_class_neighbors`,
    `deep_knn/ece` and, with outliers, `deep_knn/auroc_same_class_neighbors`, `deep_knn/auroc_credibility` and, for
    comparison, `deep_knn/auroc_softmax`; a reliability diagram, a histogram, and the least credible samples as a table.
    The scores stay in `test_scores` and `outlier_scores`.

    Args:
        layers: names or patterns of the layers.
        k: number of neighbours in each layer (75 in the deep k-nearest neighbours paper).
        distance: squared Euclidean or `1 - cos` (cosine in that paper).
        max_per_class: training samples kept of each class, the first ones met.
        train: `"train"` or a dataloader of the training samples.
        calibration: `"val"` or a dataloader of labelled samples that were not trained on.
        outliers: a dataloader of outliers, or a datamodule whose test data are outliers. Labels are not used.
        inputs: where the inputs are in a batch: index, key or function.
        labels: where the targets are in a batch: index, key or function.
        select: item of a layer that returns a tuple or a dict.
        pool: `"flatten"`, `"gap"` or a function, see `lightning_methods.core.taps.FeatureTaps`.
        on_repeat: `"error"`, `"last"` or `"all"` for a layer that runs several times.
        log_prefix: first part of every logged key, to tell two callbacks in one trainer apart.

    Raises:
        InvalidArgument: for settings that cannot be read, or if there are fewer training samples than `k`.
        UnsupportedTraining: when tested on several devices; use `Trainer(devices=1)`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import DeepKNN
        >>> trainer = Trainer(callbacks=DeepKNN("backbone.*", k=25), logger=False)

    Deviations from the paper: p-values count the sample itself, which makes them valid; the original can be 0.
    """

    def __init__(
        self,
        layers: str | list[str],
        *,
        k: int = 75,
        distance: Distance = "cosine",
        max_per_class: int = 1000,
        train: str | DataLoader = "train",
        calibration: str | DataLoader = "val",
        outliers: DataLoader | LightningDataModule | None = None,
        inputs: int | str | Callable[[Any], Any] | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        log_prefix: str = "deep_knn",
    ) -> None:
        check_choice("distance", distance, ("sqeuclidean", "cosine"))
        for name, number in (("k", k), ("max_per_class", max_per_class)):
            if number < 1:
                raise InvalidArgument(f"{name}={number}: at least 1 is needed.")
        self.k = k
        self.distance: Distance = distance
        self.max_per_class = max_per_class
        self.log_prefix = log_prefix
        self.train = train
        self.calibration = calibration
        self.outliers = outliers
        self.inputs: Selector = inputs
        self.labels: Selector = labels
        self.taps = FeatureTaps(layers, select=select, pool=pool, on_repeat=on_repeat, detach=True)
        self.test_scores: NeighborScores | None = None
        self.outlier_scores: NeighborScores | None = None
        self.figure_paths: list[Path] = []
        self._banks: dict[str, _Bank] = {}
        self._calibration: Tensor = torch.zeros(0)

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart, by their layers."""
        return self._generate_state_key(layers=self.taps.patterns, log_prefix=self.log_prefix)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read training and calibration data, score the test data and the outliers, and log."""
        self.fit(trainer, pl_module)
        scores, targets = self._scored(trainer, pl_module, "test", "the test data", labelled=True)
        self.test_scores = scores
        right = scores.p_values.argmax(1) == targets
        credibility = scores.credibility
        logged = {
            "accuracy": right.double().mean(),
            "network_accuracy": (scores.predicted == targets).double().mean(),
            "credibility": credibility.mean(),
            "same_class_neighbors": scores.same_class_neighbors.mean(),
            "ece": binary_calibration_error(credibility, right.long(), n_bins=15),
        }
        shares = {"test data": scores.same_class_neighbors}
        if self.outliers is not None:
            outliers, _ = self._scored(trainer, pl_module, _loader_of(self.outliers), "the outliers", labelled=False)
            self.outlier_scores = outliers
            for name in ("same_class_neighbors", "credibility", "softmax"):
                logged[f"auroc_{name}"] = _auroc(getattr(scores, name), getattr(outliers, name))
            shares["outliers"] = outliers.same_class_neighbors
        for name, value in logged.items():
            pl_module.log(f"{self.log_prefix}/{name}", value.float(), batch_size=len(targets))
        self._show(trainer, targets, right, shares)

    def fit(self, trainer: Any, pl_module: Any) -> None:
        """Read the training data into the banks and the calibration data into the nonconformity scores.

        Raises:
            InvalidArgument: if there are fewer training samples than `k`, or no calibration sample.
            UnsupportedTraining: on several devices, where each process sees a part of the data.
        """
        if world_size() > 1:
            raise UnsupportedTraining(
                f"DeepKNN runs on one device and was given {world_size()}, each of which would see a part of the "
                f"neighbours. Test with Trainer(devices=1)."
            )
        self._banks = {}
        kept: dict[int, int] = {}
        with self._features(trainer, pl_module, self.train, "the training data", labelled=True) as passed:
            for features, _, targets in passed:
                wanted = self._within_quota(targets, kept)
                for layer, x in features.items():
                    self._banks.setdefault(layer, _Bank(self.distance)).add(x[wanted], targets[wanted])
        held = sum(kept.values())
        if held < self.k:
            raise InvalidArgument(
                f"k={self.k} neighbours are wanted of {held} training samples. Lower k, or raise max_per_class or "
                f"limit_train_batches."
            )
        with self._features(trainer, pl_module, self.calibration, "the calibration data", labelled=True) as passed:
            own = [
                self._nonconformity(features, int(targets.max()) + 1)[0].gather(1, targets[:, None])[:, 0]
                for features, _, targets in passed
            ]
        if not own:
            raise InvalidArgument(
                "The calibration data hold no batch. Pass calibration= a dataloader of labelled samples."
            )
        self._calibration = torch.cat(own).sort().values

    def score(self, pl_module: Any, inputs: Any) -> NeighborScores:
        """Return the scores of one batch of inputs, on the module's device; after `fit` or `trainer.test`.

        Raises:
            UnsupportedTraining: before that.
        """
        if not self._banks:
            raise UnsupportedTraining("DeepKNN has no neighbours yet. Run trainer.test with it, or call fit, first.")
        self.taps.attach(pl_module)
        try:
            with preserved(pl_module), torch.no_grad():
                pl_module.eval()
                features, logits = self._forward(pl_module, inputs)
        finally:
            self.taps.detach()
        return self._scores(features, logits)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _forward(self, pl_module: Any, inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
        with self.taps.recording():
            logits = pl_module(inputs)
            features = {layer: x.float() for layer, x in self.taps.read().items()}
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeMismatch(
                f"The module's forward returned {shape}; logits (B, C) are needed to know its prediction."
            )
        return features, logits.float()

    @contextmanager
    def _features(
        self, trainer: Any, pl_module: Any, loader: Any, what: str, *, labelled: bool
    ) -> Iterator[Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]]:
        """Give features, logits and targets (the row numbers where there are no labels) of each batch of a loader.

        At the end, also after an exception, the module is as it was.
        """

        def passed(found: Iterator[Any]) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
            for batch in found:
                features, logits = self._forward(pl_module, inputs_of(batch, self.inputs))
                targets = class_labels(targets_of(batch, self.labels)) if labelled else torch.arange(len(logits))
                if len(targets) and int(targets.min()) < 0:
                    raise InvalidArgument(
                        f"A label in {what} is {int(targets.min())}; classes from 0 are needed. Leave out samples "
                        f"without a class, with train= and calibration= dataloaders of your own."
                    )
                yield features, logits, targets.to(logits.device)

        self.taps.attach(pl_module)
        found: Any = batches(trainer, pl_module, loader, description=f"DeepKNN: {what}")
        try:
            with closing(found):
                yield passed(found)
        finally:
            self.taps.detach()

    def _scored(
        self, trainer: Any, pl_module: Any, loader: Any, what: str, *, labelled: bool
    ) -> tuple[NeighborScores, Tensor]:
        with self._features(trainer, pl_module, loader, what, labelled=labelled) as passed:
            scored = [(self._scores(features, logits), targets.cpu()) for features, logits, targets in passed]
        if not scored:
            raise InvalidArgument(
                f"There is no batch in {what}. Raise the trainer's limit, or pass another dataloader."
            )
        fields = ("predicted", "softmax", "same_class_neighbors", "p_values")
        joined = NeighborScores(*(torch.cat([getattr(s, field) for s, _ in scored]) for field in fields))
        return joined, torch.cat([targets for _, targets in scored])

    def _scores(self, features: dict[str, Tensor], logits: Tensor) -> NeighborScores:
        nonconformity, votes = self._nonconformity(features, logits.shape[1])
        predicted = logits.argmax(1)
        own = votes.gather(1, predicted[:, None])[:, 0] / (self.k * len(self._banks))
        # how many calibration samples conform at most as well
        calibration = self._calibration.to(nonconformity.device)
        at_least = len(calibration) - torch.searchsorted(calibration, nonconformity, side="left")
        p_values = (1 + at_least).double() / (1 + len(calibration))
        softmax = logits.softmax(1).amax(1)
        return NeighborScores(predicted.cpu(), softmax.cpu(), own.cpu(), p_values.cpu())

    def _nonconformity(self, features: dict[str, Tensor], num_classes: int = 0) -> tuple[Tensor, Tensor]:
        """Return for each sample and class how many neighbours have another label, and how many have this one."""
        classes = max(num_classes, *(bank.num_classes for bank in self._banks.values()))
        votes = sum(bank.votes(features[layer], self.k, classes) for layer, bank in self._banks.items())
        assert isinstance(votes, Tensor)
        return self.k * len(self._banks) - votes, votes

    def _within_quota(self, targets: Tensor, kept: dict[int, int]) -> Tensor:
        wanted = torch.zeros(len(targets), dtype=torch.bool)
        for i, target in enumerate(targets.tolist()):
            if kept.get(target, 0) < self.max_per_class:
                kept[target] = kept.get(target, 0) + 1
                wanted[i] = True
        return wanted.to(targets.device)

    def _show(self, trainer: Any, targets: Tensor, right: Tensor, shares: dict[str, Tensor]) -> None:
        assert self.test_scores is not None
        scores = self.test_scores
        credibility = scores.credibility
        diagram = reliability_diagram(credibility, right, bins=15, title="Credibility of the test data")
        written = log_figure(trainer, f"{self.log_prefix}/reliability", diagram)
        pictured = histograms(
            shares, title="Neighbours that bear the predicted class", x_label="share of the neighbours, all layers"
        )
        written += log_figure(trainer, f"{self.log_prefix}/same_class_neighbors", pictured)
        least = credibility.argsort(stable=True)[:20].tolist()
        columns = ["sample", "label", "network predicts", "neighbours predict", "credibility", "same-class neighbours"]
        values = (targets, scores.predicted, scores.p_values.argmax(1), credibility, scores.same_class_neighbors)
        rows = [[i, *(v[i].item() for v in values)] for i in least]
        written += log_table(trainer, f"{self.log_prefix}/least_credible", columns, rows)
        self.figure_paths = written


class _Bank:
    """Features and labels of one layer, searched exactly."""

    def __init__(self, distance: Distance) -> None:
        self.distance = distance
        self.pieces: list[tuple[Tensor, Tensor]] = []

    @property
    def num_classes(self) -> int:
        return int(self._joined()[1].max()) + 1

    def add(self, features: Tensor, labels: Tensor) -> None:
        x = self._rows(features)
        self.pieces.append((torch.nn.functional.normalize(x) if self.distance == "cosine" else x, labels))

    def votes(self, features: Tensor, k: int, num_classes: int) -> Tensor:
        """Return how many of the `k` nearest neighbours bear each class, `(N, C)`."""
        x = self._rows(features)
        # Lightning moves the module to the CPU after a test, and users move it further
        self.pieces = [(bank.to(x.device), labels.to(x.device)) for bank, labels in self.pieces]
        bank, labels = self._joined()
        half_lengths = torch.linalg.vecdot(bank, bank) / 2 if self.distance == "sqeuclidean" else None
        counts = torch.zeros(len(x), num_classes, dtype=torch.int64, device=x.device)
        for start in range(0, len(x), _QUERIES_AT_A_TIME):
            own = slice(start, start + _QUERIES_AT_A_TIME)
            # a query's own length changes no order
            closeness = x[own] @ bank.T if half_lengths is None else torch.addmm(-half_lengths, x[own], bank.T)
            nearest = labels[closeness.topk(k, dim=1, sorted=False).indices]
            counts[own].scatter_add_(1, nearest, torch.ones_like(nearest))
        return counts

    def _rows(self, features: Tensor) -> Tensor:
        x = features.flatten(1)
        width = self.pieces[0][0].shape[1] if self.pieces else x.shape[1]
        if x.shape[1] != width:
            raise ShapeMismatch(
                f"A layer gave {x.shape[1]} features per sample, and {width} for the first training data. Inputs of "
                f"one size are needed, or pool='gap'."
            )
        return x

    def _joined(self) -> tuple[Tensor, Tensor]:
        if len(self.pieces) > 1:
            self.pieces = [(torch.cat([x for x, _ in self.pieces]), torch.cat([y for _, y in self.pieces]))]
        return self.pieces[0]


def _loader_of(outliers: Any) -> Any:
    if not hasattr(outliers, "test_dataloader"):
        return outliers
    outliers.prepare_data()
    outliers.setup("test")
    return outliers.test_dataloader()


def _auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Return how often a test sample scores higher than an outlier, ties counted half."""
    scores = torch.cat([inside, outside]).double()
    if not bool(scores.isfinite().all()):
        return torch.tensor(math.nan)
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).long()
    return binary_auroc(scores, labels)
