"""Scattering features and structural signals as transforms of PyG graphs, one by one or whole data sets at once."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_methods.core._lightning import rank_zero_warn
from lightning_methods.core.batches import describe_batch
from lightning_methods.errors import BatchFormat, InvalidArgument, LightningMethodsWarning, check_choice, require
from lightning_methods.geometric_scattering.functional import (
    Isolated,
    Normalization,
    checked_edges,
    fixed_signals,
    lazy_matrix,
    scattering_coefficients,
    scattering_paths,
    transition,
)
from lightning_methods.geometric_scattering.moments import (
    feature_names,
    moment_contributions,
    scattering_moments,
    warn_of_moments,
)
from lightning_methods.geometric_scattering.structure import (
    SIGNALS,
    Disconnected,
    clustering_coefficient,
    eccentricity,
    structural_signals,
)

# entries of all coefficients that are held at a time
_ELEMENTS = 2**23


class GraphTransform:
    """What PyG calls with a graph or a batch of graphs: changes a shallow copy, as its own transforms do."""

    def __call__(self, data: Any) -> Any:
        """Return a transformed copy."""
        return self.forward(copy.copy(data))

    @abstractmethod
    def forward(self, data: Any) -> Any:
        """Transform a graph in place and return it."""


class GeometricScattering(GraphTransform):
    r"""Add the scattering features of a graph to it, as `data.scattering`.

    .. math:: S x(p, q) = \sum_l |U[p]x(v_l)|^q, \quad U[j, j']x = |\Psi_{j'}|\Psi_j x||
        \qquad \text{(equations 2 and 4 to 6)}

    Works on `Data`, on a `Batch`, and fastest on a whole data set with `transform_dataset`.

    Shapes:
        `data.scattering` `(1, F')`, of a batch `(B, F')`; `F'` is signals x paths x Q, 64 for each signal by default.

    Args:
        J: number of scales, 5 in the paper.
        Q: number of moments, 4 in the paper.
        order: longest path, 2 in the paper.
        normalized: whether the moments are mean, variance, skewness and kurtosis, as in the paper's classification, or
            sums of powers, as in its exploration.
        signals: which signals: `"x"` (`data.x`), `"eccentricity"`, `"degree"` and `"clustering"`. Degree gives nothing
            but its own moments: the walk leaves it as it is.
        normalization: the walk, see `lazy_random_walk`.
        isolated: whether a node without edges loses mass as in the paper, or keeps it.
        remove_self_loops: whether edges from a node to itself are left out.
        use_edge_weight: whether `data.edge_weight` weights the edges, where there is one.
        to_undirected: whether edges in one direction go both ways; by default they carry mass from source to target.
        include_finest: whether there is the filter :math:`I - P`.
        include_lowpass: whether there is the filter :math:`P^{2^J}`.
        dtype: of the computation and the features; single precision loses the longest scales.
        attr: where the features go.

    Raises:
        InvalidArgument: for settings that cannot be read, signals that are not finite, or weights that are negative.
        BatchFormat: for a graph without what a signal needs.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> path = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> GeometricScattering(signals=("eccentricity", "clustering"))(path).scattering.shape
        torch.Size([1, 128])
    """

    def __init__(
        self,
        J: int = 5,
        Q: int = 4,
        order: int = 2,
        *,
        normalized: bool = True,
        signals: Sequence[Literal["x", "eccentricity", "degree", "clustering"]] = ("x",),
        normalization: Normalization = "column",
        isolated: Isolated = "leak",
        remove_self_loops: bool = True,
        use_edge_weight: bool = True,
        to_undirected: bool = False,
        include_finest: bool = False,
        include_lowpass: bool = False,
        dtype: torch.dtype = torch.float64,
        attr: str = "scattering",
    ) -> None:
        self.signals = [signals] if isinstance(signals, str) else list(signals)
        if not self.signals or len(set(self.signals)) < len(self.signals):
            raise InvalidArgument(f"signals={signals!r}: at least one is needed, each once.")
        for signal in self.signals:
            check_choice("signals", signal, ("x", *SIGNALS))
        check_choice("normalization", normalization, ("column", "row", "symmetric"))
        check_choice("isolated", isolated, ("leak", "stay"))
        if not dtype.is_floating_point:
            raise InvalidArgument(f"dtype={dtype}: a floating-point type is needed, float64 by default.")
        self.filters: dict[str, Any] = {
            "J": J,
            "order": order,
            "include_finest": include_finest,
            "include_lowpass": include_lowpass,
        }
        self.paths = scattering_paths(**self.filters)
        self.moments: dict[str, Any] = {"Q": Q, "normalized": normalized}
        scattering_moments(torch.zeros(1, 1, 1), **self.moments)  # checks Q
        warn_of_moments(Q, normalized=normalized, owner=type(self).__name__)
        self.walk: dict[str, Any] = {
            "normalization": normalization,
            "isolated": isolated,
            "remove_self_loops": remove_self_loops,
            "dtype": dtype,
        }
        self.use_edge_weight, self.to_undirected = use_edge_weight, to_undirected
        self.attr = attr
        self._warned = False

    def forward(self, data: Any) -> Any:
        """Return the graph, or batch of graphs, with its features."""
        setattr(data, self.attr, self.features(data))
        return data

    @torch.no_grad()
    def features(self, data: Any) -> Tensor:
        """Return the features `(B, F')` of a graph or of a batch of graphs."""
        nodes, batch, graphs = _nodes_of(data)
        P, signals = self._walk_and_signals(data, nodes, batch)
        still = fixed_signals(P, signals)
        if self.filters["include_lowpass"] or not bool(still.any()):
            return self._moments(P, signals, batch, graphs)
        # of what the walk leaves as it is, as it does the degree, every wavelet coefficient is 0
        shape = (graphs, signals.shape[1], len(self.paths), self.moments["Q"])
        found = scattering_moments(signals.new_zeros(1, 1, 1), **self.moments).expand(shape).clone()
        found[:, ~still] = self._moments(P, signals[:, ~still], batch, graphs).reshape(graphs, -1, *shape[2:])
        own = scattering_moments(signals[:, None, still], batch, graphs, **self.moments)
        found[:, still, 0] = own.reshape(graphs, -1, shape[3])
        return found.flatten(1).to(self.walk["dtype"])

    def _moments(self, P: Tensor, signals: Tensor, batch: Tensor, graphs: int) -> Tensor:
        width = max(1, _ELEMENTS // max(1, len(signals) * len(self.paths)))
        parts = [
            scattering_moments(scattering_coefficients(P, some, **self.filters), batch, graphs, **self.moments)
            for some in signals.split(width, 1)
        ]
        return torch.cat(parts, 1).to(self.walk["dtype"])

    @torch.no_grad()
    def contributions(self, data: Any) -> Tensor:
        """Return what each node of one graph adds to its features, `(nodes, F')`, see `moment_contributions`."""
        nodes, batch, graphs = _nodes_of(data)
        if graphs != 1:
            raise BatchFormat(f"There are {graphs} graphs; one is needed. Take them one by one from to_data_list().")
        P, signals = self._walk_and_signals(data, nodes, batch)
        return moment_contributions(scattering_coefficients(P, signals, **self.filters), **self.moments)

    def _walk_and_signals(self, data: Any, nodes: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        edge_index = edges_of(data)
        weight = data.edge_weight if self.use_edge_weight and "edge_weight" in data else None
        if self.to_undirected:
            utils = require("torch_geometric.utils", extra="graph", why="to_undirected")
            edge_index, weight = utils.to_undirected(edge_index, weight, nodes, reduce="max")
        self._warn_of_direction(edge_index, weight, nodes)
        walk = {key: value for key, value in self.walk.items() if key != "isolated"}
        edges, shares, nodes = transition(edge_index, weight, nodes, **walk)
        kinds = {key: self.walk[key] for key in ("normalization", "isolated")}
        simple = weight is None and self.walk["remove_self_loops"]  # else loops, or edges of weight 0, are still there
        signals = self._signals(data, edges if simple else edge_index, nodes, batch, simple=simple)
        return lazy_matrix(edges, shares, nodes, **kinds), signals

    def transform_dataset(self, dataset: Iterable[Any], batch_nodes: int = 40_000) -> list[Any]:
        """Return copies of all graphs with their features, many graphs at a time.

        Args:
            dataset: the graphs.
            batch_nodes: how many nodes to treat together.

        Raises:
            InvalidArgument: as the transform, and for `batch_nodes` below 1.
            BatchFormat: as the transform.

        Example:
            >>> import torch
            >>> from torch_geometric.data import Data
            >>> edge = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), x=torch.ones(2, 1))
            >>> [graph.scattering.shape for graph in GeometricScattering().transform_dataset([edge, edge])]
            [torch.Size([1, 64]), torch.Size([1, 64])]
        """
        done: list[Any] = []
        for graphs, features in self._groups(dataset, batch_nodes):
            for graph, row in zip(graphs, features, strict=True):
                copied = copy.copy(graph)  # shares the tensors of the graph, as all transforms of PyG do
                setattr(copied, self.attr, row[None].clone())
                done.append(copied)
        return done

    def dataset_features(self, dataset: Iterable[Any], batch_nodes: int = 40_000) -> Tensor:
        """Return the features `(graphs, F')` of a whole data set, many graphs at a time.

        Args:
            dataset: the graphs.
            batch_nodes: how many nodes to treat together.

        Raises:
            InvalidArgument: as the transform, for `batch_nodes` below 1, and without any graph.
            BatchFormat: as the transform.

        Example:
            >>> import torch
            >>> from torch_geometric.data import Data
            >>> edge = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), x=torch.ones(2, 1))
            >>> GeometricScattering().dataset_features([edge, edge, edge]).shape
            torch.Size([3, 64])
        """
        parts = [features for _, features in self._groups(dataset, batch_nodes)]
        if not parts:
            raise InvalidArgument("The data set has no graph; at least one is needed.")
        return torch.cat(parts)

    def _groups(self, dataset: Iterable[Any], batch_nodes: int) -> Iterator[tuple[list[Any], Tensor]]:
        if batch_nodes < 1:
            raise InvalidArgument(f"batch_nodes={batch_nodes}: at least 1 is needed.")
        make = require("torch_geometric.data", extra="graph", why=type(self).__name__).Batch
        names = [*(["x"] if "x" in self.signals else []), *(["edge_weight"] if self.use_edge_weight else [])]
        for graphs, counts in _grouped(dataset, batch_nodes):
            yield graphs, self.features(make(**_joined(graphs, counts, names)))

    def feature_names(self, in_channels: int = 1) -> list[str]:
        """Return the names of the features.

        Args:
            in_channels: how many columns `data.x` has.

        Example:
            >>> GeometricScattering(signals=("degree",)).feature_names()[4:6]
            ['degree|psi1|mean', 'degree|psi1|variance']
        """
        names = [[f"x{i}" for i in range(in_channels)] if s == "x" else [s] for s in self.signals]
        return feature_names([name for part in names for name in part], **self.filters, **self.moments)

    def _signals(self, data: Any, edge_index: Tensor, nodes: int, batch: Tensor, *, simple: bool) -> Tensor:
        dtype = self.walk["dtype"]
        found = structural_signals([s for s in self.signals if s != "x"], edge_index, batch, nodes, simple=simple)
        columns = [signal_of(data) if name == "x" else found[name][:, None] for name in self.signals]
        signals = torch.cat([column.to(dtype) for column in columns], 1)
        if not bool(signals.isfinite().all()):
            bad = (~signals.isfinite()).nonzero()[0].tolist()
            raise InvalidArgument(
                f"The signals are not finite, first at node {bad[0]} in column {bad[1]}: no moment is defined. Replace "
                f"missing values before the transform."
            )
        return signals

    def _warn_of_direction(self, edge_index: Tensor, weight: Tensor | None, nodes: int) -> None:
        if self._warned or _is_symmetric(edge_index, weight, nodes):
            return
        self._warned = True
        rank_zero_warn(
            "GeometricScattering: the edges are directed, and the paper's walk is that of undirected ones. Mass flows "
            "from source to target; set to_undirected=True if that is not meant.",
            category=LightningMethodsWarning,
        )

    def __repr__(self) -> str:
        settings = {**self.filters, **self.moments, "signals": self.signals}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


class _Structural(GraphTransform):
    """A transform that adds a structural signal to the node features."""

    signal: Callable[[Tensor, Tensor | None, int | None], Tensor]

    def __init__(self, *, cat: bool = True) -> None:
        self.cat = cat

    def forward(self, data: Any) -> Any:
        """Return the graph, or batch of graphs, with the signal in `data.x`."""
        nodes, batch, _ = _nodes_of(data)
        signal = self.signal(edges_of(data), batch, nodes)[:, None]
        x = data.x if self.cat and data.x is not None else None
        if x is None:
            data.x = signal.to(torch.get_default_dtype())
        else:
            x = x[:, None] if x.ndim == 1 else x
            x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
            data.x = torch.cat([x, signal.to(x.dtype)], 1)
        return data


class Eccentricity(_Structural):
    """Add the number of edges to the farthest node that can be reached to the node features.

    Batches of many graphs are treated at once.

    Args:
        cat: whether to append to `data.x`, or to replace it.
        disconnected: what a graph of several parts gets: each `"component"` by itself, `"zero"` at all nodes, or an
            `"error"`.

    Raises:
        InvalidArgument: where asked for, of a graph that is not connected.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> path = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> Eccentricity()(path).x.flatten()
        tensor([2., 1., 2.])
    """

    def __init__(self, *, cat: bool = True, disconnected: Disconnected = "component") -> None:
        super().__init__(cat=cat)
        check_choice("disconnected", disconnected, ("component", "zero", "error"))
        self.signal = partial(eccentricity, disconnected=disconnected)


class ClusteringCoefficient(_Structural):
    """Add the share of pairs of neighbours that are neighbours of each other to the node features.

    It is 0 of nodes with less than two neighbours. Batches of many graphs are treated at once.

    Args:
        cat: whether to append to `data.x`, or to replace it.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> triangle = Data(edge_index=torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]]), num_nodes=3)
        >>> ClusteringCoefficient()(triangle).x.flatten()
        tensor([1., 1., 1.])
    """

    signal = staticmethod(clustering_coefficient)


# -- graphs ------------------------------------------------------------------------------------------------------------


def signal_of(data: Any) -> Tensor:
    """Return `data.x` as columns.

    Raises:
        BatchFormat: if there is none, or it is not one row a node.
    """
    x = getattr(data, "x", None)
    if x is None:
        raise BatchFormat(
            f"There are no node features x in what was given, {describe_batch(data)}. Use "
            f"signals=('eccentricity', 'clustering'), or add such signals with the transforms of these names."
        )
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2:
        raise BatchFormat(f"The node features have the shape {tuple(x.shape)}; (nodes, features) is needed.")
    return x


def edges_of(data: Any) -> Tensor:
    """Return `data.edge_index`.

    Raises:
        BatchFormat: if there is none.
    """
    edge_index = getattr(data, "edge_index", None)
    if edge_index is None:
        raise BatchFormat(
            f"There is no edge_index in what was given, {describe_batch(data)}. A graph or batch of PyG is needed; of "
            f"one with adj_t make edges with torch_geometric.utils.to_edge_index."
        )
    return edge_index


def _nodes_of(data: Any) -> tuple[int, Tensor, int]:
    """Return the number of nodes, to which graph each belongs, and the number of graphs."""
    edge_index = edges_of(data)
    nodes = int(data.num_nodes or 0)
    batch = getattr(data, "batch", None)
    if batch is None:
        return nodes, torch.zeros(nodes, dtype=torch.int64, device=edge_index.device), 1
    # not what batch holds: the last graph may be empty
    return nodes, batch, int(data.num_graphs)


def _is_symmetric(edge_index: Tensor, weight: Tensor | None, nodes: int) -> bool:
    there, back = edge_index[0] * nodes + edge_index[1], edge_index[1] * nodes + edge_index[0]
    if weight is None:
        in_order = bool((there[1:] >= there[:-1]).all())
        return torch.equal(there if in_order else there.sort().values, back.sort().values)
    first, second = torch.argsort(there, stable=True), torch.argsort(back, stable=True)
    same = torch.equal(there[first], back[second])
    return same and bool(torch.allclose(weight[first], weight[second]))


def _grouped(dataset: Iterable[Any], batch_nodes: int) -> Iterator[tuple[list[Any], list[int]]]:
    """Yield graphs of so many nodes together, or one of more, and how many nodes each has."""
    group: list[Any] = []
    counts: list[int] = []
    nodes = 0
    for graph in dataset:
        size = int(graph.num_nodes or 0)
        if group and nodes + size > batch_nodes:
            yield group, counts
            group, counts, nodes = [], [], 0
        group.append(graph)
        counts.append(size)
        nodes += size
    if group:
        yield group, counts


def _joined(graphs: list[Any], counts: list[int], names: list[str]) -> dict[str, Any]:
    """Return what a batch of graphs holds of edges and named attributes; PyG's own takes three times as long."""
    edges = [edges_of(graph) for graph in graphs]
    for e in edges:
        if e.shape[:-1] != (2,) or e.dtype != torch.int64:
            checked_edges(e, None)
    joined, lengths = torch.cat(edges, 1).long(), [e.shape[1] for e in edges]
    sizes, own = torch.tensor([counts, lengths], device=joined.device)
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    batch = torch.arange(len(graphs), device=sizes.device).repeat_interleave(sizes, output_size=sum(counts))
    first, most = torch.stack([ptr[:-1], sizes]).repeat_interleave(own, 1, output_size=sum(lengths))
    if bool(((joined < 0) | (joined >= most)).any()):
        for e, count in zip(edges, counts, strict=True):
            checked_edges(e, count)
    found: dict[str, Any] = {"edge_index": joined + first, "ptr": ptr, "batch": batch, "num_nodes": sum(counts)}
    for name in names:
        parts = [value for graph in graphs if (value := getattr(graph, name, None)) is not None]
        if not parts:
            continue
        if len(parts) < len(graphs) or len({part.shape[1:] for part in parts}) > 1:
            forms = sorted({str(tuple(part.shape[1:])) for part in parts})
            raise BatchFormat(
                f"{len(parts)} of {len(graphs)} graphs have {name}, each row of the shape {' or '.join(forms)}; all of "
                f"them with one shape, or none, are needed."
            )
        rows = [len(part) for part in parts]
        if rows != (wanted := counts if name == "x" else lengths):
            g = next(i for i, (a, b) in enumerate(zip(rows, wanted, strict=True)) if a != b)
            raise BatchFormat(f"Graph {g} has {rows[g]} rows of {name}, and {wanted[g]} are needed.")
        found[name] = torch.cat(parts)
    return found
