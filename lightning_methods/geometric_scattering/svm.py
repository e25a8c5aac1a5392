"""The paper's classifier: support vector machines on scattering features, tuned and voting within cross-validation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
    fitting each machine on features; and in the paper's protocol each machine serves two test folds.

    Shapes:
        features `(n, F)`, labels `(n,)`.

    Args:
        models: how many machines vote, nine in the paper.
        gammas: widths of the kernel `exp(-gamma * distance^2)` that are tried, the paper's by default.
        costs: costs that are tried, the paper's by default.
        scaler: whether features are standardised by the `"train"` part, or in `cross_validate` over all graphs,
            `"transductive"`, as in the paper, or taken as they are, `"none"`.
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
        scaler: Literal["train", "transductive", "none"] = "train",
        seed: int = 0,
        jobs: int = 1,
    ) -> None:
        if models < 2:
            raise InvalidArgument(f"models={models}: at least two parts are needed, one to tune on.")
        for name, values in (("gammas", gammas), ("costs", costs)):
            if not values or any(not value > 0 for value in values):
                raise InvalidArgument(f"{name}={list(values)}: at least one positive number is needed.")
        check_choice("scaler", scaler, ("train", "transductive", "none"))
        self.models, self.gammas, self.costs = models, tuple(gammas), tuple(costs)
        self.scaler, self.seed, self.jobs = scaler, seed, jobs
        self._machines: list[_Machine] = []

    def fit(self, features: Tensor, labels: Tensor) -> ScatteringSVM:
        """Tune and train the machines."""
        x, y = _checked(features, labels)
        order = np.random.default_rng(self.seed).permutation(len(y))
        self._mean, self._scale = self._statistics(x)
        self._rows = (x - self._mean) * self._scale
        distances, parts = _squared_distances(self._rows, self._rows), np.array_split(order, self.models)
        self._machines = []
        for i, val in enumerate(parts):
            train = _joined(parts, i)
            cost, gamma = self._best(self._predictions(distances, y, train, val), y[val])
            machine = self._svc(self.costs[cost]).fit(_kernel(self.gammas[gamma], distances, train, train), y[train])
            self._machines.append(_Machine(machine, train, self.gammas[gamma]))
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
        folder: str | Path | None = None,
    ) -> CrossValidation:
        """Return the accuracies of a nested cross-validation.

        Args:
            features: one row a graph.
            labels: class of each graph.
            folds: how many test folds, ten in the paper; the machines vote over the parts of the other folds.
            protocol: `"gao2019"` splits at random, as the paper does, and has one fold less machines than folds;
                `"stratified"` keeps the shares of the classes.
            progress: whether to show a bar.
            folder: where what has been computed is kept, so that an interrupted call goes on where it stopped; of the
                same features, labels and settings only.

        Raises:
            InvalidArgument: for settings or labels that cannot be split.
            ShapeMismatch: if features and labels do not fit together.
        """
        check_choice("protocol", protocol, ("gao2019", "stratified"))
        x, y = _checked(features, labels)
        if not 2 < folds <= len(y):
            raise InvalidArgument(f"folds={folds}: from 3 to the number of graphs, {len(y)}, are needed.")
        parts = _folds(y, folds, protocol, self.seed)
        distances = None
        if self.scaler != "train":
            mean, scale = self._statistics(x)
            distances = _squared_distances((x - mean) * scale, (x - mean) * scale)
        # what is tested on fold a and tuned on b is trained as what is tested on b and tuned on a
        paired = distances is not None and folds - 1 == self.models
        cells: list[tuple[int, ...]] = list(itertools.combinations(range(folds), 2 if paired else 1))
        kept = None if folder is None else Path(folder, self._fingerprint(x, y, parts))
        parallel = require("joblib", extra="graph", why="ScatteringSVM")
        jobs = (parallel.delayed(_kept)(kept, cell, self._cell, x, y, parts, distances) for cell in cells)
        votes: dict[tuple[int, int], _Vote] = {}
        with _bar(len(cells), shown=progress) as advance:
            for found in parallel.Parallel(n_jobs=self.jobs, return_as="generator")(jobs):
                votes.update({(vote.outer, vote.model): vote for vote in found})
                advance()
        tested = [[votes[k, i] for i in range(self.models)] for k in range(folds)]
        hits = [np.stack([vote.predicted for vote in tested[k]]) == y[parts[k]] for k in range(folds)]
        voted = [_vote([vote.predicted for vote in tested[k]]) == y[parts[k]] for k in range(folds)]
        return CrossValidation(
            np.array([v.mean() for v in voted]),
            np.array([h.mean() for h in hits]),
            np.array([[vote.chosen for vote in votes_of] for votes_of in tested]),
        )

    def _cell(
        self, x: Array, y: Indices, parts: list[Indices], distances: Array | None, cell: tuple[int, ...]
    ) -> list[_Vote]:
        """Return the votes of the machines of one test fold, or of the two that a pair of folds gives."""
        if len(cell) == 2:
            assert distances is not None
            a, b = cell
            train = np.concatenate([part for k, part in enumerate(parts) if k not in cell])
            both = self._predictions(distances, y, train, np.concatenate([parts[a], parts[b]]))
            on_a, on_b = both[..., : len(parts[a])], both[..., len(parts[a]) :]
            return [
                self._voted(b, a, on_a, y[parts[a]], on_b),
                self._voted(a, b - 1, on_b, y[parts[b]], on_a),
            ]
        (k,) = cell
        test, inner = parts[k], [part for i, part in enumerate(parts) if i != k]
        if distances is None:
            mean, scale = self._statistics(x[np.concatenate(inner)])
            distances = _squared_distances((x - mean) * scale, (x - mean) * scale)
        if len(inner) != self.models:
            inner = np.array_split(np.concatenate(inner), self.models)
        votes = []
        for i, val in enumerate(inner):
            both = self._predictions(distances, y, _joined(inner, i), np.concatenate([val, test]))
            votes.append(self._voted(k, i, both[..., : len(val)], y[val], both[..., len(val) :]))
        return votes

    def _voted(self, outer: int, model: int, on_val: Indices, labels: Indices, on_test: Indices) -> _Vote:
        best = self._best(on_val, labels)
        return _Vote(outer, model, on_test[best], (self.costs[best[0]], self.gammas[best[1]]))

    def _predictions(self, distances: Array, y: Indices, train: Indices, rows: Indices) -> Indices:
        """Return what a machine of each cost and gamma, trained on some graphs, says of others, `(C, G, rows)`."""
        if len(np.unique(y[train])) < 2:
            raise InvalidArgument(
                f"A training part has graphs of class {y[train][0]} only. Use fewer models or folds, or the "
                f"stratified protocol."
            )
        found = np.zeros((len(self.costs), len(self.gammas), len(rows)), dtype=np.int64)
        for g, gamma in enumerate(self.gammas):
            kernel, onto = (_kernel(gamma, distances, some, train) for some in (train, rows))
            for c, cost in enumerate(self.costs):
                found[c, g] = self._svc(cost).fit(kernel, y[train]).predict(onto)
        return found

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        """Return the mean of each feature and one over its deviation, 0 of what does not vary."""
        if self.scaler == "none":
            return np.zeros(x.shape[1]), np.ones(x.shape[1])
        mean, deviation = x.mean(0), x.std(0)
        varies = deviation > 1e-12 * np.abs(x).max(0)
        return mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)

    def _best(self, predicted: Indices, labels: Indices) -> tuple[int, int]:
        """Return cost and gamma of the best predictions, of equals the first by cost, then by gamma."""
        right = (predicted == labels).sum(2)
        cost, gamma = divmod(int(right.argmax()), right.shape[1])
        return cost, gamma

    @staticmethod
    def _svc(cost: float) -> Any:
        svm = require("sklearn.svm", extra="graph", why="ScatteringSVM")
        return svm.SVC(C=cost, kernel="precomputed", cache_size=1000)

    def _fingerprint(self, x: Array, y: Indices, parts: list[Indices]) -> str:
        """Return a name for these data, splits and settings."""
        settings = repr((self.models, self.gammas, self.costs, self.scaler, x.shape))
        digest = hashlib.sha256(settings.encode())
        for array in (x, y, *parts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


class _Machine(NamedTuple):
    svc: Any
    train: Indices
    gamma: float

    def predict(self, distances: Array) -> Indices:
        return self.svc.predict(np.exp(-self.gamma * distances[:, self.train]))


class _Vote(NamedTuple):
    """What machine number `model` of a test fold says of it, with the cost and gamma that it was tuned to."""

    outer: int
    model: int
    predicted: Indices
    chosen: tuple[float, float]


def _kept(folder: Path | None, cell: tuple[int, ...], compute: Callable[..., list[_Vote]], *given: Any) -> list[_Vote]:
    """Return what was computed of a cell before, or compute and keep it."""
    if folder is None:
        return compute(*given, cell)
    path = folder / f"{'_'.join(map(str, cell))}.npz"
    if not path.is_file():
        found = compute(*given, cell)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.array([getattr(vote, name) for vote in found]) for name in ("outer", "model", "chosen")}
        arrays |= {f"predicted_{i}": vote.predicted for i, vote in enumerate(found)}
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, **arrays)  # type: ignore[arg-type]
        unfinished.replace(path)  # at once: no file is half written
    with np.load(path) as file:
        rows = zip(file["outer"].tolist(), file["model"].tolist(), file["chosen"].tolist(), strict=True)
        return [_Vote(k, i, file[f"predicted_{n}"], tuple(chosen)) for n, (k, i, chosen) in enumerate(rows)]


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


def _joined(parts: list[Indices], without: int) -> Indices:
    return np.concatenate([part for i, part in enumerate(parts) if i != without])


def _kernel(gamma: float, distances: Array, rows: Indices, columns: Indices) -> Array:
    kernel = distances[np.ix_(rows, columns)]
    kernel *= -gamma
    return np.exp(kernel, out=kernel)


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
