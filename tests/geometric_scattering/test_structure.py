"""Degree, clustering and eccentricity of many graphs at once equal those that NetworkX finds one by one."""

from __future__ import annotations

import networkx as nx
import pytest
import torch

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.geometric_scattering import structure
from lightning_methods.geometric_scattering.functional import transition
from lightning_methods.geometric_scattering.structure import clustering_coefficient, degree, eccentricity
from tests.geometric_scattering.oracle import undirected

FUNCTIONS = {"eccentricity": eccentricity, "degree": degree, "clustering": clustering_coefficient}
GRAPHS = {
    "alone": nx.empty_graph(1),
    "edge": nx.path_graph(2),
    "long path": nx.path_graph(90),
    "complete": nx.complete_graph(12),
    "star": nx.star_graph(200),
    "no edges": nx.empty_graph(4),
    "two parts": nx.disjoint_union(nx.cycle_graph(9), nx.complete_graph(5)),
    "random": nx.gnp_random_graph(60, 0.1, seed=1),
    "dense": nx.gnp_random_graph(40, 0.7, seed=2),
    "hubs": nx.barabasi_albert_graph(400, 3, seed=3),
    "karate": nx.karate_club_graph(),
}


def edges_of(graph: nx.Graph) -> torch.Tensor:
    return undirected(list(graph.edges()))


def expected(graph: nx.Graph, what: str) -> torch.Tensor:
    if what == "degree":
        found = dict(graph.degree())
    elif what == "clustering":
        found = nx.clustering(graph)
    else:
        reach = dict(nx.all_pairs_shortest_path_length(graph))
        found = {v: max(reach[v].values()) for v in graph}
    return torch.tensor([found[v] for v in sorted(graph)], dtype=torch.float64)


@pytest.mark.parametrize("what", ["degree", "clustering", "eccentricity"])
@pytest.mark.parametrize("name", GRAPHS)
def test_one_graph(name, what):
    graph = GRAPHS[name]
    found = FUNCTIONS[what](edges_of(graph), None, len(graph))
    assert torch.allclose(found, expected(graph, what), rtol=1e-12)


@pytest.mark.parametrize("elements", [2**22, 300], ids=["all at once", "a few at a time"])
@pytest.mark.parametrize("what", ["degree", "clustering", "eccentricity"])
def test_many_graphs_in_any_order_of_nodes(what, elements, monkeypatch):
    monkeypatch.setattr(structure, "_ELEMENTS", elements)
    graphs = list(GRAPHS.values())
    sizes = torch.tensor([len(g) for g in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    edges = torch.cat([edges_of(g) + s for g, s in zip(graphs, starts, strict=True)], 1)
    batch = torch.arange(len(graphs)).repeat_interleave(sizes)
    together = torch.cat([expected(g, what) for g in graphs])
    torch.manual_seed(0)
    order = torch.randperm(len(batch))
    place = torch.argsort(order)
    edges = place[edges][:, torch.randperm(edges.shape[1])]
    found = FUNCTIONS[what](edges, batch[order], None)
    assert torch.allclose(found, together[order], rtol=1e-12)


@pytest.mark.parametrize("dense", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("what", ["clustering", "eccentricity"])
def test_both_ways_agree(what, dense, monkeypatch):
    monkeypatch.setattr(structure, "_DENSE_FACTOR", dense)
    monkeypatch.setattr(structure, "_SMALL_NODES", dense)
    for graph in GRAPHS.values():
        found = FUNCTIONS[what](edges_of(graph), None, len(graph))
        assert torch.allclose(found, expected(graph, what), rtol=1e-12)


def test_loops_and_repeated_edges_do_not_count():
    edges = torch.tensor([[0, 1, 0, 1, 1, 1, 2], [1, 0, 1, 0, 1, 2, 1]])
    assert degree(edges).tolist() == [1, 2, 1]
    assert clustering_coefficient(edges).tolist() == [0, 0, 0]
    assert eccentricity(edges).tolist() == [2, 1, 2]


def test_nodes_beyond_the_last_edge_and_no_graph_at_all():
    edges = undirected([(0, 1)])
    for signal in FUNCTIONS.values():
        assert signal(edges, None, 4)[2:].tolist() == [0, 0]
        assert signal(torch.zeros(2, 0, dtype=torch.int64), None, 0).shape == (0,)


def test_bad_input():
    with pytest.raises(InvalidArgument, match="there are 2 nodes"):
        eccentricity(undirected([(0, 5)]), None, 2)
    with pytest.raises(ShapeMismatch, match="4 nodes"):
        eccentricity(undirected([(0, 1)]), torch.zeros(3, dtype=torch.int64), 4)


@pytest.mark.parametrize("scattered", [False, True])
def test_graphs_of_several_parts(scattered):
    # a path of 3, a path of 2 beside a node alone, a pair, and a graph of one node
    edges = torch.tensor([[0, 1, 1, 2, 3, 4, 6, 7], [1, 0, 2, 1, 4, 3, 7, 6]])
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)) if scattered else torch.arange(9)
    place = torch.argsort(order)
    edges, batch = place[edges], batch[order]
    zero = eccentricity(edges, batch, disconnected="zero")
    assert zero[place].tolist() == [2, 1, 2, 0, 0, 0, 1, 1, 0]
    assert eccentricity(edges, batch)[place].tolist() == [2, 1, 2, 1, 1, 0, 1, 1, 0]
    with pytest.raises(InvalidArgument, match="3 nodes are"):
        eccentricity(edges, batch, disconnected="error")
    connected = eccentricity(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 0, 1]), disconnected="error")
    assert connected.tolist() == [1, 1, 0]
    assert eccentricity(torch.zeros(2, 0, dtype=torch.int64), num_nodes=0, disconnected="error").shape == (0,)
    with pytest.raises(InvalidArgument, match="component"):
        eccentricity(edges, batch, disconnected="part")


def test_several_signals_are_those_one_by_one():
    edges = undirected([(0, 1), (1, 2), (2, 0), (2, 3), (4, 5)])
    batch = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    for simple in (False, True):
        found = structure.structural_signals(list(FUNCTIONS), transition(edges, None, 7)[0], batch, 7, simple=simple)
        for name, function in FUNCTIONS.items():
            assert torch.equal(found[name], function(edges, batch, 7))
