"""The paper's classifier: support vector machines on scattering features, tuned and voting within cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice, require

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: the paper's grid
GAMMAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
COSTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 25.0, 50.0, 100.0, 1000.0)


class CrossValidation(NamedTuple):
    """Accuracies of a nested cross-validation.

    Attributes:
        accuracies: of the vote on each test fold, `(folds,)`.
        single: mean accuracy of the models that vote, on each test fold, `(folds,)`.
        chosen: cost and gamma of every model, `(folds, models, 2)`.
    """

    accuracies: Array
    single: Array
    chosen: Array

    @property
    def mean(self) -> float:
        """Mean accuracy of the folds."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Standard deviation over the folds, not corrected, as the paper prints it."""
        return float(self.accuracies.std())


class ScatteringSVM:
    """Classify graphs by their scattering features with support vector machines that vote (the paper's classifier).

    The training graphs are split into so many parts as there are models; each model is tuned on one part and trained on
    the others, and the models vote. Distances are computed once and kernels from them, five to ten times as fast as
    fitting each machine on features.

    Shapes:
        features `(n, F)`, labels `(n,)`.

    Args:
        models: how many machines vote, nine in the paper.
        gammas: widths of the kernel `exp(-gamma * distance^2)` that are tried, the paper's by default.
        costs: costs that are tried, the paper's by default.
        scaler: whether features are standardised by the `"train"` part, or in `cross_validate` over all graphs,
            `"transductive"`, as in the paper.
        seed: of the splits.
        jobs: how many processes.

    Raises:
        InvalidArgument: for settings that cannot be read.
        MissingDependency: without scikit-learn.

    Example:
        >>> import torch
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 2
        >>> svm = ScatteringSVM(models=3, gammas=(0.1,), costs=(1.0, 10.0)).fit(x + 3 * y[:, None], y)
        >>> float((svm.predict(x + 3 * y[:, None]) == y).double().mean()) > 0.9
        True
    """

    def __init__(
        self,
        *,
        models: int = 9,
        gammas: Sequence[float] = GAMMAS,
        costs: Sequence[float] = COSTS,
        scaler: Literal["train", "transductive"] = "train",
        seed: int = 0,
        jobs: int = 1,
    ) -> None:
        if models < 2:
            raise InvalidArgument(f"models={models}: at least two parts are needed, one to tune on.")
        for name, values in (("gammas", gammas), ("costs", costs)):
            if not values or any(not value > 0 for value in values):
                raise InvalidArgument(f"{name}={list(values)}: at least one positive number is needed.")
        check_choice("scaler", scaler, ("train", "transductive"))
        self.models, self.gammas, self.costs = models, tuple(gammas), tuple(costs)
        self.scaler, self.seed, self.jobs = scaler, seed, jobs
        self._machines: list[_Machine] = []

    def fit(self, features: Tensor, labels: Tensor) -> ScatteringSVM:
        """Tune and train the machines."""
        x, y = _checked(features, labels)
        order = np.random.default_rng(self.seed).permutation(len(y))
        self._mean, self._scale = _statistics(x)
        x = (x - self._mean) * self._scale
        self._rows = x
        self._machines = self._tuned(_squared_distances(x, x), y, np.array_split(order, self.models))
        return self

    def predict(self, features: Tensor) -> Tensor:
        """Return the class that most machines vote for, in ties that of the first machine among them."""
        if not self._machines:
            raise InvalidArgument("There is no trained machine; call fit first.")
        x = np.asarray(features.detach().double().cpu())
        if x.ndim != 2 or x.shape[1] != len(self._mean):
            raise ShapeMismatch(f"The features have the shape {x.shape}; (n, {len(self._mean)}) is needed as in fit.")
        distances = _squared_distances((x - self._mean) * self._scale, self._rows)
        return torch.from_numpy(_vote([machine.predict(distances) for machine in self._machines]))

    def cross_validate(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        folds: int = 10,
        protocol: Literal["gao2019", "stratified"] = "stratified",
        progress: bool = False,
    ) -> CrossValidation:
        """Return the accuracies of a nested cross-validation.

        Args:
            features: one row a graph.
            labels: class of each graph.
            folds: how many test folds, ten in the paper; the machines vote over the parts of the other folds.
            protocol: `"gao2019"` splits at random, as the paper does, and has one fold less machines than folds;
                `"stratified"` keeps the shares of the classes.
            progress: whether to show a bar.

        Raises:
            InvalidArgument: for settings or labels that cannot be split.
            ShapeMismatch: if features and labels do not fit together.
        """
        check_choice("protocol", protocol, ("gao2019", "stratified"))
        x, y = _checked(features, labels)
        if not 2 < folds <= len(y):
            raise InvalidArgument(f"folds={folds}: from 3 to the number of graphs, {len(y)}, are needed.")
        parts = _folds(y, folds, protocol, self.seed)
        shared = None
        if self.scaler == "transductive":
            mean, scale = _statistics(x)
            scaled = (x - mean) * scale
            shared = _squared_distances(scaled, scaled)
        parallel = require("joblib", extra="graph", why="ScatteringSVM")
        jobs = (parallel.delayed(self._outer)(x, y, parts, k, shared) for k in range(folds))
        found = []
        with _bar(folds, shown=progress) as advance:
            for result in parallel.Parallel(n_jobs=self.jobs, return_as="generator")(jobs):
                found.append(result)
                advance()
        accuracies, single, chosen = zip(*found, strict=True)
        return CrossValidation(np.array(accuracies), np.array(single), np.array(chosen))

    def _outer(
        self, x: Array, y: Indices, parts: list[Indices], k: int, shared: Array | None
    ) -> tuple[float, float, list[tuple[float, float]]]:
        """Return the accuracy on one test fold."""
        test = parts[k]
        inner = [part for i, part in enumerate(parts) if i != k]
        if shared is None:
            mean, scale = _statistics(x[np.concatenate(inner)])
            scaled = (x - mean) * scale
            shared = _squared_distances(scaled, scaled)
        if len(inner) != self.models:
            inner = np.array_split(np.concatenate(inner), self.models)
        machines = self._tuned(shared, y, inner)
        votes = [machine.predict(shared[test]) for machine in machines]
        single = float(np.mean([(vote == y[test]).mean() for vote in votes]))
        return float((_vote(votes) == y[test]).mean()), single, [machine.chosen for machine in machines]

    def _tuned(self, distances: Array, y: Indices, parts: list[Indices]) -> list[_Machine]:
        """Return one machine for each part, tuned on it and trained on the others."""
        svc = require("sklearn.svm", extra="graph", why="ScatteringSVM").SVC
        machines = []
        for i, val in enumerate(parts):
            train = np.concatenate([part for j, part in enumerate(parts) if j != i])
            if len(np.unique(y[train])) < 2:
                raise InvalidArgument(
                    f"A training part has graphs of class {y[train][0]} only. Use fewer models or folds, or the "
                    f"stratified protocol."
                )
            scores = np.zeros((len(self.costs), len(self.gammas)))
            fitted: dict[tuple[int, int], Any] = {}
            for g, gamma in enumerate(self.gammas):
                kernel, val_kernel = (np.exp(-gamma * distances[np.ix_(rows, train)]) for rows in (train, val))
                for c, cost in enumerate(self.costs):
                    machine = svc(C=cost, kernel="precomputed").fit(kernel, y[train])
                    scores[c, g] = (machine.predict(val_kernel) == y[val]).mean()
                    fitted[c, g] = machine
            best = divmod(int(scores.argmax()), len(self.gammas))  # the first of the best, by cost, then by gamma
            machines.append(_Machine(fitted[best], train, self.costs[best[0]], self.gammas[best[1]]))
        return machines


class _Machine(NamedTuple):
    svc: Any
    train: Indices
    cost: float
    gamma: float

    @property
    def chosen(self) -> tuple[float, float]:
        return self.cost, self.gamma

    def predict(self, distances: Array) -> Indices:
        return self.svc.predict(np.exp(-self.gamma * distances[:, self.train]))


# -- splits, distances, votes ------------------------------------------------------------------------------------------


def _checked(features: Tensor, labels: Tensor) -> tuple[Array, Indices]:
    if features.ndim != 2 or labels.shape != (len(features),):
        raise ShapeMismatch(
            f"The features have the shape {tuple(features.shape)} and the labels {tuple(labels.shape)}; (n, F) and "
            f"(n,) are needed."
        )
    x, y = np.asarray(features.detach().double().cpu()), np.asarray(labels.detach().cpu())
    if not np.isfinite(x).all():
        raise InvalidArgument(f"Feature {np.argwhere(~np.isfinite(x))[0][1]} is not finite in every graph.")
    if len(np.unique(y)) < 2:
        raise InvalidArgument("All graphs have the same label; at least two classes are needed.")
    return x, y.astype(np.int64)


def _statistics(x: Array) -> tuple[Array, Array]:
    """Return the mean of each feature and one over its deviation, 0 of what does not vary."""
    mean, deviation = x.mean(0), x.std(0)
    varies = deviation > 1e-12 * np.abs(x).max(0)
    return mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)


def _squared_distances(a: Array, b: Array) -> Array:
    distances = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.maximum(distances, 0, out=distances)


def _folds(y: Indices, folds: int, protocol: str, seed: int) -> list[Indices]:
    if protocol == "gao2019":
        return np.array_split(np.random.default_rng(seed).permutation(len(y)), folds)
    least = int(np.unique(y, return_counts=True)[1].min())
    if least < folds:
        raise InvalidArgument(f"The smallest class has {least} graphs; {folds} stratified folds need one in each.")
    splits = require("sklearn.model_selection", extra="graph", why="ScatteringSVM")
    stratified = splits.StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [np.asarray(test) for _, test in stratified.split(y, y)]


def _vote(votes: list[Indices]) -> Indices:
    """Return the class of most votes, among equals that which was voted for first."""
    cast = np.stack(votes)
    counts = (cast[:, None] == cast[None]).sum(0)  # how many agree with each vote
    return cast[counts.argmax(0), np.arange(cast.shape[1])]


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar for the folds, if wanted."""
    from rich.progress import Progress

    with Progress(disable=not shown, transient=True) as progress:
        task = progress.add_task("folds", total=total)
        yield lambda: progress.advance(task)
