"""Signals that the structure of a graph has by itself: degree, clustering coefficient and eccentricity, batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.geometric_scattering.functional import sparse_matrix, transition
from lightning_methods.geometric_scattering.moments import checked_batch

Disconnected = Literal["component", "zero", "error"]
# what is computed of blocks of many graphs, and of the edges of one graph
Kind = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]

# small graphs, and larger ones with more than 1/16 of all edges, are cheaper as dense blocks of many graphs at once
_SMALL_NODES, _DENSE_FACTOR, _DENSE_NODES = 64, 16, 1024
# entries that are held at a time
_ELEMENTS = 2**21


def degree(edge_index: Tensor, batch: Tensor | None = None, num_nodes: int | None = None) -> Tensor:
    """Return the number of neighbours of each node, loops and repeated edges left out.

    Shapes:
        `edge_index` `(2, E)`; returns `(num_nodes,)` in float64.

    Args:
        edge_index: the edges, an undirected one in both directions.
        batch: not needed here.
        num_nodes: number of nodes; by default one more than the largest index.

    Raises:
        InvalidArgument: for an index outside the nodes.

    Example:
        >>> import torch
        >>> degree(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        tensor([1., 2., 1.], dtype=torch.float64)
    """
    edges, _, size = transition(edge_index, None, num_nodes)
    return torch.bincount(edges[0], minlength=size).double()


def clustering_coefficient(edge_index: Tensor, batch: Tensor | None = None, num_nodes: int | None = None) -> Tensor:
    r"""Return which share of the pairs of its neighbours are neighbours of each other, 0 below two neighbours.

    .. math:: c_v = \frac{2\, |\{\text{triangles at } v\}|}{d_v (d_v - 1)}

    Shapes:
        `edge_index` `(2, E)`, `batch` `(num_nodes,)`; returns `(num_nodes,)` in float64.

    Args:
        edge_index: the edges, an undirected one in both directions.
        batch: to which graph each node belongs, which makes many graphs fast; by default all to one.
        num_nodes: number of nodes; by default that of `batch`, or one more than the largest index.

    Raises:
        InvalidArgument: for an index outside the nodes.
        ShapeMismatch: if batch and nodes do not fit together.

    Example:
        >>> import torch
        >>> triangle_and_tail = torch.tensor([[0, 1, 1, 2, 2, 0, 2, 3], [1, 0, 2, 1, 0, 2, 3, 2]])
        >>> clustering_coefficient(triangle_and_tail)
        tensor([1.0000, 1.0000, 0.3333, 0.0000], dtype=torch.float64)
    """
    graphs = _Graphs(edge_index, batch, num_nodes)
    (triangles,) = graphs.apply((_triangles_of_dense, _triangles_of_sparse))
    return _share_of_pairs(triangles, graphs.degree)


def _share_of_pairs(triangles: Tensor, degree: Tensor) -> Tensor:
    pairs = degree * (degree - 1)
    return torch.where(pairs > 0, 2 * triangles / pairs.clamp(min=1), 0.0)


def eccentricity(
    edge_index: Tensor,
    batch: Tensor | None = None,
    num_nodes: int | None = None,
    *,
    disconnected: Disconnected = "component",
) -> Tensor:
    """Return the number of edges to the farthest node that can be reached, 0 of a node alone.

    Shapes:
        `edge_index` `(2, E)`, `batch` `(num_nodes,)`; returns `(num_nodes,)` in float64.

    Args:
        edge_index: the edges, an undirected one in both directions; directed ones are followed from source to target.
        batch: to which graph each node belongs, which makes many graphs fast; by default all to one.
        num_nodes: number of nodes; by default that of `batch`, or one more than the largest index.
        disconnected: what a graph of several parts gets: each `"component"` by itself, `"zero"` at all nodes, or an
            `"error"`. The paper has no eccentricity of such graphs.

    Raises:
        InvalidArgument: for an index outside the nodes, or where asked for, a graph that is not connected.
        ShapeMismatch: if batch and nodes do not fit together.

    Example:
        >>> import torch
        >>> eccentricity(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        tensor([2., 1., 2.], dtype=torch.float64)
    """
    check_choice("disconnected", disconnected, ("component", "zero", "error"))
    graphs = _Graphs(edge_index, batch, num_nodes)
    (found,) = graphs.apply((_eccentricity_of_dense, _eccentricity_of_sparse))
    if disconnected == "component":
        return found
    apart = graphs.apart()
    if disconnected == "error" and bool(apart.any()):
        raise InvalidArgument(
            f"Node {int(apart.nonzero()[0])} is in a graph that is not connected ({int(apart.sum())} nodes are), and "
            f"disconnected='error'. Take its components by themselves with 'component', or 'zero'."
        )
    return found.masked_fill(apart, 0)


SIGNALS = ("eccentricity", "degree", "clustering")


def structural_signals(
    names: Sequence[str], edge_index: Tensor, batch: Tensor, num_nodes: int, *, simple: bool = False
) -> dict[str, Tensor]:
    """Return several signals, `(num_nodes,)` each, of graphs that are read once.

    Args:
        names: of `SIGNALS`.
        edge_index: the edges.
        batch: to which graph each node belongs.
        num_nodes: number of nodes.
        simple: whether the edges are those that `transition` returned, without loops, each once.
    """
    if not names:
        return {}
    graphs = _Graphs(edge_index, batch, num_nodes, simple=simple)
    kinds = {
        "eccentricity": (_eccentricity_of_dense, _eccentricity_of_sparse),
        "clustering": (_triangles_of_dense, _triangles_of_sparse),
    }
    wanted = [name for name in names if name in kinds]
    found = dict(zip(wanted, graphs.apply(*(kinds[name] for name in wanted)), strict=True))
    if "clustering" in found:
        found["clustering"] = _share_of_pairs(found["clustering"], graphs.degree)
    return {**found, "degree": graphs.degree}


# -- many graphs at once -----------------------------------------------------------------------------------------------


class _Graphs:
    """The nodes sorted by graph, with what is needed to treat graphs of one size together."""

    def __init__(
        self, edge_index: Tensor, batch: Tensor | None, num_nodes: int | None, *, simple: bool = False
    ) -> None:
        if num_nodes is None and batch is not None:
            num_nodes = len(batch)
        if simple and num_nodes is not None:
            edges, self.size = edge_index, num_nodes
        else:
            edges, _, self.size = transition(edge_index, None, num_nodes)
        batch, graphs = checked_batch(batch, None, self.size, edges.device)
        self.degree: Tensor = torch.bincount(edges[0], minlength=self.size).double()
        self.order = torch.arange(self.size, device=batch.device)
        if not bool((batch[1:] >= batch[:-1]).all()):
            self.order = torch.argsort(batch, stable=True)
            rank = torch.empty_like(self.order)
            rank[self.order] = torch.arange(self.size, device=batch.device)
            edges = rank[edges]
        if not bool((edges[0, 1:] >= edges[0, :-1]).all()):
            edges = edges[:, torch.argsort(edges[0], stable=True)]
        self.edges = edges
        self.counts = torch.bincount(batch, minlength=graphs)
        self.starts = self.counts.cumsum(0) - self.counts
        ends = torch.searchsorted(self.edges[0].contiguous(), self.starts + self.counts)
        self.edge_starts = torch.searchsorted(self.edges[0].contiguous(), self.starts)
        self.edge_counts = ends - self.edge_starts

    def apply(self, *kinds: Kind) -> list[Tensor]:
        """Return what each kind of function makes of each graph: of blocks `(graphs, n, n)`, or of its edges."""
        results = [torch.zeros(self.size, dtype=torch.float64, device=self.order.device) for _ in kinds]
        full = self.counts * self.counts <= _DENSE_FACTOR * self.edge_counts
        dense = (self.counts <= _SMALL_NODES) | (full & (self.counts <= _DENSE_NODES))
        for chosen in self._alike(dense & (self.edge_counts > 0)):
            n = int(self.counts[chosen].max())
            blocks, inside, nodes = self._blocks(chosen, n), self._inside(chosen, n), self._nodes(chosen)
            for result, (of_dense, _) in zip(results, kinds, strict=True):
                result[nodes] = of_dense(blocks)[inside].double()
        for g in (~dense & (self.edge_counts > 0)).nonzero().flatten().tolist():
            start, count = int(self.starts[g]), int(self.counts[g])
            first, edges = int(self.edge_starts[g]), int(self.edge_counts[g])
            of_graph = self.edges[:, first : first + edges] - start
            for result, (_, of_sparse) in zip(results, kinds, strict=True):
                result[start : start + count] = of_sparse(of_graph, count).double()
        return [torch.empty_like(result).index_copy_(0, self.order, result) for result in results]

    def apart(self) -> Tensor:
        """Return which nodes are in a graph that is not connected."""
        source, target = self.edges.cpu().numpy()
        links = coo_array((np.ones(len(source), dtype=np.int8), (source, target)), (self.size, self.size))
        parts = torch.from_numpy(connected_components(links, directed=False)[1].astype(np.int64)).to(self.order.device)
        graph = torch.arange(len(self.counts), device=parts.device).repeat_interleave(self.counts)
        torn = torch.zeros(len(self.counts), dtype=torch.bool, device=parts.device)
        torn[graph[parts != parts[self.starts[graph]]]] = True
        back = torch.empty(self.size, dtype=torch.bool, device=parts.device)
        back[self.order] = torn[graph]
        return back

    def _alike(self, wanted: Tensor) -> Iterator[Tensor]:
        """Yield graphs of similar size, as many as bounded memory holds."""
        graphs = wanted.nonzero().flatten()
        graphs = graphs[torch.argsort(self.counts[graphs], descending=True)]
        while len(graphs):
            largest = int(self.counts[graphs[0]])
            # much smaller ones would be filled up with zeros at the cost of the largest
            alike = int((self.counts[graphs] > 0.75 * largest - 4).sum())
            together = min(alike, max(1, _ELEMENTS // largest**2))
            yield graphs[:together]
            graphs = graphs[together:]

    def _inside(self, chosen: Tensor, n: int) -> Tensor:
        return torch.arange(n, device=chosen.device) < self.counts[chosen][:, None]

    def _nodes(self, chosen: Tensor) -> Tensor:
        counts = self.counts[chosen]
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        return self.starts[chosen].repeat_interleave(counts) + torch.arange(len(first), device=first.device) - first

    def _blocks(self, chosen: Tensor, n: int) -> Tensor:
        counts = self.edge_counts[chosen]
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = self.edge_starts[chosen].repeat_interleave(counts) + torch.arange(len(first), device=first.device)
        source, target = self.edges[:, place - first] - self.starts[chosen].repeat_interleave(counts)
        graph = torch.arange(len(chosen), device=chosen.device).repeat_interleave(counts)
        # float32 holds the counts that follow exactly
        blocks = torch.zeros(len(chosen), n, n, device=chosen.device)
        blocks[graph, source, target] = 1
        return blocks


# -- triangles ---------------------------------------------------------------------------------------------------------


def _triangles_of_dense(blocks: Tensor) -> Tensor:
    return ((blocks @ blocks) * blocks).sum(2, dtype=torch.float64) / 2


def _triangles_of_sparse(edges: Tensor, n: int) -> Tensor:
    """Count each triangle once, at its node of the smallest degree: what hubs cost is bounded so."""
    place = torch.empty(n, dtype=torch.int64, device=edges.device)
    degrees = torch.bincount(edges[0], minlength=n)
    place[torch.argsort(degrees, stable=True)] = torch.arange(n, device=edges.device)
    source, target = edges[:, place[edges[0]] < place[edges[1]]]
    order = torch.argsort(source * n + target)
    source, target = source[order], target[order]
    keys = source * n + target
    later = torch.bincount(source, minlength=n)
    ends = later.cumsum(0)[source]
    # each edge with those that leave its source after it
    partners = ends - 1 - torch.arange(len(source), device=edges.device)
    triangles = torch.zeros(n, dtype=torch.float64, device=edges.device)
    for some in _bounded(partners):
        counts = partners[some]
        one = torch.arange(some.start, some.stop, device=edges.device).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        two = one + 1 + torch.arange(len(one), device=edges.device) - first
        a, b = target[one], target[two]
        low, high = torch.where(place[a] < place[b], a, b), torch.where(place[a] < place[b], b, a)
        wanted = low * n + high
        found = keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted
        for node in (source[one], a, b):
            triangles += torch.bincount(node[found], minlength=n)
    return triangles


def _bounded(counts: Tensor) -> Iterator[slice]:
    """Yield slices whose counts add up to no more than what is held at a time, or of one item."""
    total = counts.cumsum(0)
    start = 0
    while start < len(counts):
        done = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(total, done + _ELEMENTS // 4, right=True)))
        yield slice(start, stop)
        start = stop


# -- distances ---------------------------------------------------------------------------------------------------------


def _eccentricity_of_dense(blocks: Tensor) -> Tensor:
    steps = torch.zeros(blocks.shape[:2], device=blocks.device)
    reached = torch.eye(blocks.shape[1], device=blocks.device).expand_as(blocks).contiguous()
    return _farthest(reached, steps, lambda seen: seen @ blocks, of_sources=2)


def _eccentricity_of_sparse(edges: Tensor, n: int) -> Tensor:
    """Search from a block of sources at a time, so that no matrix of all pairs is held."""
    onward = sparse_matrix(edges[1], edges[0], torch.ones(edges.shape[1], device=edges.device), n)
    found = torch.zeros(n, device=edges.device)
    width = max(1, min(n, _ELEMENTS // n))
    for first in range(0, n, width):
        sources = torch.arange(first, min(first + width, n), device=edges.device)
        reached = torch.zeros(n, len(sources), device=edges.device)
        reached[sources, torch.arange(len(sources), device=edges.device)] = 1
        steps = torch.zeros(len(sources), device=edges.device)
        found[sources] = _farthest(reached, steps, lambda seen: onward @ seen, of_sources=0)
    return found


def _farthest(reached: Tensor, steps: Tensor, onward: Callable[[Tensor], Tensor], *, of_sources: int) -> Tensor:
    """Return after how many steps each source reaches nothing new, along the dimension of what is reached."""
    counts = reached.sum(of_sources)
    while True:
        reached = (reached + onward(reached)).clamp_(max=1)
        more = reached.sum(of_sources)
        growing = more > counts
        if not growing.any():
            return steps
        steps += growing
        counts = more
