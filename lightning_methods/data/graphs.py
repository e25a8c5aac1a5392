"""Graph data sets with folds: the TU collection, and a small one that is made from a seed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_methods.core._lightning import LightningDataModule
from lightning_methods.data._checks import check_at_least
from lightning_methods.errors import InvalidArgument, check_choice, require

Transform = Callable[[Any], Any]
Indices = NDArray[np.int64]


class GraphDataModule(LightningDataModule):
    """Base of the graph DataModules: reads the graphs once, transforms them once, splits them into folds.

    Args:
        fold: which fold is the test part.
        num_folds: how many there are.
        val_fold: which of the other folds is for validation.
        protocol: `"stratified"` keeps the shares of the classes in every fold; `"gao2019"` splits at random, as the
            paper of geometric scattering; `"gin"` is stratified and validates on the test fold, as that of graph
            isomorphism networks, whose numbers are comparable so but no estimate of anything.
        seed: decides the folds.
        batch_size: graphs a batch.
        transform: applied to every graph once: one, or a list of them. One with `transform_dataset` gets all at once.
        num_workers: worker processes of every loader.
    """

    def __init__(
        self,
        *,
        fold: int,
        num_folds: int,
        val_fold: int,
        protocol: Literal["stratified", "gao2019", "gin"],
        seed: int,
        batch_size: int,
        transform: Transform | Sequence[Transform] | None,
        num_workers: int,
    ) -> None:
        super().__init__()
        check_choice("protocol", protocol, ("stratified", "gao2019", "gin"))
        check_at_least("num_folds", num_folds, 3)
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("seed", seed, 0)
        for name, number, most in (("fold", fold, num_folds), ("val_fold", val_fold, num_folds - 1)):
            if not 0 <= number < most:
                raise InvalidArgument(f"{name}={number}: from 0 to {most - 1} is needed with num_folds={num_folds}.")
        self.fold, self.num_folds, self.val_fold = fold, num_folds, val_fold
        self.protocol, self.seed = protocol, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.transforms: list[Transform] = [transform] if callable(transform) else list(transform or [])
        self._graphs: list[Any] | None = None

    @abstractmethod
    def _read(self) -> list[Any]:
        """Return all graphs, with their labels in `y`."""

    @property
    def graphs(self) -> list[Any]:
        """All graphs, transformed; read when they are first asked for."""
        if self._graphs is None:
            graphs = self._read()
            for transform in self.transforms:
                at_once = getattr(transform, "transform_dataset", None)
                graphs = [transform(graph) for graph in graphs] if at_once is None else at_once(graphs)
            self._graphs = graphs
        return self._graphs

    @property
    def labels(self) -> torch.Tensor:
        """Class of each graph."""
        return torch.cat([graph.y.reshape(-1)[:1] for graph in self.graphs])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    @property
    def num_features(self) -> int:
        """Number of node features, 0 without any."""
        x = self.graphs[0].x
        return 0 if x is None else 1 if x.ndim == 1 else x.shape[1]

    def setup(self, stage: str | None = None) -> None:
        """Read the graphs and split them."""
        folds = _folds(self.labels.numpy(), self.num_folds, self.protocol, self.seed)
        test = folds.pop(self.fold)
        val = test if self.protocol == "gin" else folds.pop(self.val_fold)
        self.splits = {"train": np.concatenate(folds), "val": val, "test": test}

    def train_dataloader(self) -> Any:
        """Return the shuffled loader of the training folds."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Return the loader of the validation fold."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """Return the loader of the test fold."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Return the loader of the test fold."""
        return self._loader("test")

    def _loader(self, split: str, *, shuffle: bool = False) -> Any:
        loader = require("torch_geometric.loader", extra="graph", why=type(self).__name__).DataLoader
        chosen = [self.graphs[i] for i in self.splits[split]]
        return loader(chosen, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class TUGraphDataModule(GraphDataModule):
    """A data set of the TU collection (Morris et al. 2020), as MUTAG, ENZYMES, PROTEINS or IMDB-BINARY, with folds.

    Works offline where the raw files are in `<root>/<name>/raw`.

    Shapes: batches of PyG graphs; `x` (nodes, labels) one-hot where nodes have labels, `y` (graphs,).

    Args:
        name: of the data set.
        root: folder that holds it. Default "data/TU".
        fold: which fold is the test part. Default 0.
        num_folds: how many there are. Default 10.
        val_fold: which of the other folds is for validation. Default 0.
        protocol: `"stratified"` keeps the shares of the classes in every fold; `"gao2019"` splits at random, as the
            paper of geometric scattering; `"gin"` is stratified and validates on the test fold.
        seed: decides the folds. Default 0.
        batch_size: graphs a batch. Default 64.
        transform: applied to every graph once and kept: one, or a list. Structural signals and scattering features
            are such transforms.
        cleaned: whether to leave out graphs that are isomorphic to another one (Ivanov et al. 2019). Default False.
        download: whether to download missing files. Default False.
        num_workers: worker processes of every loader. Default 0.

    Raises:
        InvalidArgument: if an argument is out of range, or the files are missing.
        MissingDependency: when the graphs are read, without torch-geometric.

    Example:
        >>> TUGraphDataModule("MUTAG", protocol="gao2019", fold=3).num_folds
        10
    """

    def __init__(
        self,
        name: str,
        root: str = "data/TU",
        *,
        fold: int = 0,
        num_folds: int = 10,
        val_fold: int = 0,
        protocol: Literal["stratified", "gao2019", "gin"] = "stratified",
        seed: int = 0,
        batch_size: int = 64,
        transform: Transform | Sequence[Transform] | None = None,
        cleaned: bool = False,
        download: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            fold=fold,
            num_folds=num_folds,
            val_fold=val_fold,
            protocol=protocol,
            seed=seed,
            batch_size=batch_size,
            transform=transform,
            num_workers=num_workers,
        )
        self.data_set, self.root, self.cleaned, self.download = name, root, cleaned, download

    def prepare_data(self) -> None:
        """Download the files where `download` asks for it and they are missing."""
        if self.download:
            self._dataset()

    def _read(self) -> list[Any]:
        raw = Path(self.root, self.data_set, "raw_cleaned" if self.cleaned else "raw")
        if not self.download and not list(raw.glob("*_A.txt")):
            raise InvalidArgument(
                f"root={self.root!r} does not hold {self.data_set}: {raw}/{self.data_set}_A.txt is missing. Set "
                f"download=True, or name the folder that holds it."
            )
        return list(self._dataset())

    def _dataset(self) -> Any:
        datasets = require("torch_geometric.datasets", extra="graph", why="TUGraphDataModule")
        return datasets.TUDataset(self.root, self.data_set, cleaned=self.cleaned)


class RandomGraphsDataModule(GraphDataModule):
    """Graphs of four random models, told apart by their structure alone: a set that needs no download.

    The classes are random edges (Erdos-Renyi), preferential attachment (Barabasi-Albert), two communities (a stochastic
    block model) and rings with a few shortcuts (Watts-Strogatz), of about the same sizes and numbers of edges.

    Shapes: batches of PyG graphs without `x`, `y` (graphs,): add signals by a transform.

    Args:
        graphs_per_class: how many of each class. Default 60.
        nodes: smallest and largest number of nodes. Default 20 to 40.
        fold: which fold is the test part. Default 0.
        num_folds: how many there are. Default 5.
        val_fold: which of the other folds is for validation. Default 0.
        protocol: as `TUGraphDataModule`.
        seed: decides graphs and folds. Default 0.
        batch_size: graphs a batch. Default 32.
        transform: applied to every graph once and kept: one, or a list.
        num_workers: worker processes of every loader. Default 0.

    Raises:
        InvalidArgument: if an argument is out of range.
        MissingDependency: when the graphs are made, without torch-geometric.

    Example:
        >>> data = RandomGraphsDataModule(graphs_per_class=5)
        >>> len(data.graphs), data.num_classes
        (20, 4)
    """

    def __init__(
        self,
        graphs_per_class: int = 60,
        nodes: tuple[int, int] = (20, 40),
        *,
        fold: int = 0,
        num_folds: int = 5,
        val_fold: int = 0,
        protocol: Literal["stratified", "gao2019", "gin"] = "stratified",
        seed: int = 0,
        batch_size: int = 32,
        transform: Transform | Sequence[Transform] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            fold=fold,
            num_folds=num_folds,
            val_fold=val_fold,
            protocol=protocol,
            seed=seed,
            batch_size=batch_size,
            transform=transform,
            num_workers=num_workers,
        )
        check_at_least("graphs_per_class", graphs_per_class, num_folds)
        if not 8 <= nodes[0] <= nodes[1]:
            raise InvalidArgument(f"nodes={tuple(nodes)}: a smallest number of at least 8 and a largest are needed.")
        self.graphs_per_class, self.nodes = graphs_per_class, tuple(nodes)

    def _read(self) -> list[Any]:
        data = require("torch_geometric.data", extra="graph", why="RandomGraphsDataModule").Data
        rng = np.random.default_rng(self.seed)
        graphs = []
        for _ in range(self.graphs_per_class):
            for label, model in enumerate((_random_edges, _preferential, _communities, _small_world)):
                n = int(rng.integers(self.nodes[0], self.nodes[1] + 1))
                adjacency = model(n, rng)
                edges = np.stack(np.nonzero(adjacency | adjacency.T))
                graphs.append(data(edge_index=torch.from_numpy(edges), y=torch.tensor([label]), num_nodes=n))
        return graphs


# -- random models, four neighbours on average -------------------------------------------------------------------------


def _random_edges(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    return np.triu(rng.random((n, n)) < 4 / (n - 1), 1)


def _preferential(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    edges = np.zeros((n, n), dtype=bool)
    ends = [0, 1]
    edges[0, 1] = True
    for node in range(2, n):
        for target in set(rng.choice(ends, 2).tolist()) | {int(rng.choice(ends))}:
            if edges[:, node].sum() < 2:
                edges[target, node] = True
                ends += [target, node]
    return edges


def _communities(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    side = np.arange(n) < n // 2
    inside, across = 3.5 / (n / 2 - 1), 0.5 / (n / 2)
    return np.triu(rng.random((n, n)) < np.where(side[:, None] == side, inside, across), 1)


def _small_world(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    edges = np.zeros((n, n), dtype=bool)
    for node in range(n):
        for step in (1, 2):
            target = int(rng.integers(n)) if rng.random() < 0.1 else (node + step) % n
            if target != node:
                edges[min(node, target), max(node, target)] = True
    return edges


# -- folds -------------------------------------------------------------------------------------------------------------


def _folds(labels: Indices, folds: int, protocol: str, seed: int) -> list[Indices]:
    rng = np.random.default_rng(seed)
    if len(labels) < folds:
        raise InvalidArgument(f"num_folds={folds}: there are {len(labels)} graphs.")
    if protocol == "gao2019":
        return np.array_split(rng.permutation(len(labels)), folds)
    # deal the graphs of each class out in turn, going on where the class before ended
    order = np.concatenate([rng.permutation(np.nonzero(labels == c)[0]) for c in np.unique(labels)])
    return [rng.permutation(order[k::folds]) for k in range(folds)]
