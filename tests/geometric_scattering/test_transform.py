"""The transforms give the same features one by one, in batches and on whole data sets, and refuse what has none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import Compose

from lightning_methods.errors import BatchFormat, InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.geometric_scattering import (
    ClusteringCoefficient,
    Eccentricity,
    GeometricScattering,
    ScatteringEncoder,
    clustering_coefficient,
    degree,
    eccentricity,
    lazy_random_walk,
    scattering_coefficients,
    scattering_moments,
)
from tests.geometric_scattering import oracle
from tests.geometric_scattering.oracle import complete, path_graph, random_graph, star, undirected


def graphs() -> list[Data]:
    torch.manual_seed(0)
    edges = [random_graph(n, 3 / n, seed=n) for n in (4, 30, 1, 11, 7)]
    sizes = [4, 30, 1, 11, 7]
    return [
        Data(edge_index=e, x=torch.rand(n, 2), y=torch.tensor([i % 2]), num_nodes=n)
        for i, (e, n) in enumerate(zip(edges, sizes, strict=True))
    ]


@pytest.mark.parametrize("normalized", [False, True])
def test_one_by_one_in_batches_and_whole_data_sets(normalized):
    transform = GeometricScattering(normalized=normalized)
    alone = torch.cat([transform(graph).scattering for graph in graphs()])
    assert alone.shape == (5, 128) == (5, len(transform.feature_names(2)))
    assert alone.dtype == torch.float64
    torch.testing.assert_close(transform(Batch.from_data_list(graphs())).scattering, alone, rtol=1e-10, atol=1e-11)
    for batch_nodes in (1, 12, 40_000):
        done = transform.transform_dataset(graphs(), batch_nodes=batch_nodes)
        torch.testing.assert_close(torch.cat([g.scattering for g in done]), alone, rtol=1e-10, atol=1e-11)
        assert all(torch.equal(a.x, b.x) for a, b in zip(done, graphs(), strict=True))
    batch = next(iter(DataLoader(done, batch_size=5)))
    torch.testing.assert_close(batch.scattering, alone, rtol=1e-10, atol=1e-11)
    if not normalized:
        for i, graph in enumerate(graphs()):
            expected = oracle.features(graph.edge_index, graph.x)
            torch.testing.assert_close(alone[i], torch.from_numpy(expected).flatten(), rtol=1e-9, atol=1e-9)


def test_the_graph_that_is_given_stays_as_it_is():
    graph = graphs()[0]
    GeometricScattering()(graph)
    GeometricScattering().transform_dataset([graph])
    Eccentricity()(graph)
    assert "scattering" not in graph
    assert graph.x.shape == (4, 2)


def test_empty_graphs_at_the_end_of_a_batch_keep_their_rows():
    empty = Data(edge_index=torch.zeros(2, 0, dtype=torch.int64), x=torch.zeros(0, 2), y=torch.tensor([0]), num_nodes=0)
    found = GeometricScattering(normalized=False)(Batch.from_data_list([*graphs(), empty])).scattering
    assert found.shape == (6, 128)
    assert (found[-1] == 0).all()
    assert torch.equal(GeometricScattering(normalized=False).dataset_features([*graphs(), empty]), found)


def test_weights_of_a_whole_data_set():
    given = graphs()
    for i, graph in enumerate(given):
        graph.edge_weight = torch.rand(graph.num_edges, generator=torch.Generator().manual_seed(i))
    transform = GeometricScattering(signals=("x", "degree"), to_undirected=True)
    alone = torch.cat([transform.features(graph) for graph in given])
    torch.testing.assert_close(transform.dataset_features(given), alone, rtol=1e-10, atol=1e-11)
    plain = GeometricScattering(use_edge_weight=False)
    torch.testing.assert_close(plain.dataset_features(given), plain.dataset_features(graphs()), rtol=0, atol=0)


def test_structural_signals():
    graph = Data(edge_index=random_graph(20, 0.2, 1), num_nodes=20)
    transform = GeometricScattering(signals=("degree", "clustering", "eccentricity"), normalized=False)
    signals = torch.stack([f(graph.edge_index, None, 20) for f in (degree, clustering_coefficient, eccentricity)], 1)
    expected = GeometricScattering(normalized=False)(Data(edge_index=graph.edge_index, x=signals)).scattering
    assert torch.equal(transform(graph).scattering, expected)
    assert transform.feature_names()[64] == "clustering|x|q1"
    # the walk leaves the degrees as they are
    assert (transform(graph).scattering[0, 4:64] == 0).all()


def test_signals_side_by_side():
    graph = graphs()[1]
    both = Compose([Eccentricity(), ClusteringCoefficient()])(graph)
    assert both.x.shape == (30, 4)
    assert both.x.dtype == torch.float32
    torch.testing.assert_close(both.x[:, 2].double(), eccentricity(graph.edge_index, None, 30))
    assert Eccentricity(cat=False)(graph).x.shape == (30, 1)
    found = GeometricScattering(signals=("x", "eccentricity"))(graph).scattering
    torch.testing.assert_close(found, GeometricScattering()(Eccentricity()(graph)).scattering, rtol=1e-6, atol=1e-6)
    batch = ClusteringCoefficient(cat=False)(Batch.from_data_list(graphs()))
    alone = torch.cat([ClusteringCoefficient(cat=False)(g).x for g in graphs()])
    assert torch.equal(batch.x, alone)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("settings", [{}, {"include_lowpass": True}, {"include_finest": True, "order": 1, "Q": 3}])
def test_signals_that_the_walk_leaves_as_they_are_have_the_features_of_the_definition(normalized, settings):
    # the degree is one for the column walk, a constant for the row walk; beside others and by themselves
    batch = Batch.from_data_list([graph for graph in graphs() if graph.num_edges])
    constant = torch.full((batch.num_nodes, 1), 3.0)
    for walk, still in (("column", degree(batch.edge_index, batch.num_nodes)[:, None]), ("row", constant)):
        for x in (torch.cat([batch.x, still, batch.x[:, :1]], 1), still, torch.zeros_like(still)):
            transform = GeometricScattering(normalized=normalized, normalization=walk, isolated="stay", **settings)
            batch_of_x = Batch.from_data_list([graph for graph in graphs() if graph.num_edges])
            batch_of_x.x = x
            P = lazy_random_walk(batch.edge_index, num_nodes=batch.num_nodes, normalization=walk, isolated="stay")
            coefficients = scattering_coefficients(P, x, **transform.filters)
            expected = scattering_moments(coefficients, batch.batch, **transform.moments)
            torch.testing.assert_close(transform.features(batch_of_x), expected, rtol=1e-12, atol=1e-12)


def test_one_dimensional_and_integer_features():
    graph = Data(edge_index=path_graph(3), x=torch.tensor([1, 0, 2]))
    assert GeometricScattering()(graph).scattering.shape == (1, 64)
    assert Eccentricity()(graph).x.tolist() == [[1.0, 2.0], [0.0, 1.0], [2.0, 2.0]]


def test_weights_and_settings_matter():
    graph = Data(edge_index=star(5), x=torch.rand(5, 1), edge_weight=torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4]))
    plain = GeometricScattering(use_edge_weight=False)(graph).scattering
    assert not torch.allclose(GeometricScattering()(graph).scattering, plain)
    assert GeometricScattering(J=3, Q=2, order=1, include_lowpass=True)(graph).scattering.shape == (1, 10)
    assert GeometricScattering(dtype=torch.float32)(graph).scattering.dtype == torch.float32
    assert GeometricScattering(attr="features")(graph).features.shape == (1, 64)
    assert "order=2" in repr(GeometricScattering())


def test_directed_edges_are_told_once():
    graph = Data(edge_index=torch.tensor([[0, 1], [1, 2]]), x=torch.rand(3, 1))
    transform = GeometricScattering()
    with pytest.warns(LightningMethodsWarning, match="to_undirected=True"):
        transform(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(graph)
        GeometricScattering()(Data(edge_index=complete(4)[:, torch.randperm(12)], x=torch.rand(4, 1)))


def test_directed_edges_can_go_both_ways():
    one_way = Data(edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]), x=torch.rand(3, 1), num_nodes=3)
    both = Data(edge_index=undirected([(0, 1), (1, 2), (0, 2)]), x=one_way.x)
    settings = {"signals": ("x", "eccentricity"), "normalized": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GeometricScattering(**settings, to_undirected=True).features(one_way)
    torch.testing.assert_close(ours, GeometricScattering(**settings).features(both))
    one_way.edge_weight, both.edge_weight = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 3, 1, 2, 3])
    ours = GeometricScattering(**settings, to_undirected=True).features(one_way)
    torch.testing.assert_close(ours, GeometricScattering(**settings).features(both))


def test_parts_of_a_graph_as_asked_for():
    apart = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=3)
    assert Eccentricity(disconnected="zero")(apart).x.flatten().tolist() == [0, 0, 0]
    assert Eccentricity()(apart).x.flatten().tolist() == [1, 1, 0]
    with pytest.raises(InvalidArgument, match="not connected"):
        Eccentricity(disconnected="error")(apart)
    with pytest.raises(InvalidArgument, match="component"):
        Eccentricity(disconnected="none")


@pytest.mark.parametrize("make", [lambda **s: GeometricScattering(**s), lambda **s: ScatteringEncoder(1, **s)])
def test_normalised_moments_above_the_fourth_are_told(make):
    with pytest.warns(LightningMethodsWarning, match="Q=5"):
        make(Q=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(Q=5, normalized=False)
        make(Q=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_signals_that_are_not_finite(bad):
    graph = Data(edge_index=path_graph(3), x=torch.tensor([[0.0], [bad], [1.0]]))
    with pytest.raises(InvalidArgument, match="first at node 1"):
        GeometricScattering()(graph)


def whole_set(graph, **changed):
    """Return the features of a changed graph with one that is as it was."""
    wrong = graph.clone()
    for name, value in changed.items():
        wrong[name] = value
    wrong.num_nodes = 4
    return GeometricScattering().dataset_features([wrong, graph])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda g: GeometricScattering(signals=("excentricity",)), InvalidArgument, "eccentricity"),
        (lambda g: GeometricScattering(signals=()), InvalidArgument, "at least one"),
        (lambda g: GeometricScattering(signals=("x", "x")), InvalidArgument, "each once"),
        (lambda g: GeometricScattering(J=0), InvalidArgument, "J=0"),
        (lambda g: GeometricScattering(Q=0), InvalidArgument, "Q=0"),
        (lambda g: GeometricScattering(order=5), InvalidArgument, "order=5"),
        (lambda g: GeometricScattering(isolated="stays"), InvalidArgument, "stay"),
        (lambda g: GeometricScattering(normalization="sym"), InvalidArgument, "symmetric"),
        (lambda g: GeometricScattering(dtype=torch.int64), InvalidArgument, "float64"),
        (lambda g: GeometricScattering()(Data(edge_index=g.edge_index)), BatchFormat, "no node features"),
        (lambda g: GeometricScattering()(Data(x=g.x)), BatchFormat, "no edge_index"),
        (lambda g: GeometricScattering()(Data(edge_index=g.edge_index, x=torch.rand(4, 1, 1))), BatchFormat, "nodes"),
        (lambda g: GeometricScattering().transform_dataset([g], batch_nodes=0), InvalidArgument, "batch_nodes=0"),
        (lambda g: GeometricScattering().dataset_features([]), InvalidArgument, "no graph"),
        (lambda g: GeometricScattering().dataset_features([g, Data(x=g.x)]), BatchFormat, "no edge_index"),
        (
            lambda g: GeometricScattering().dataset_features([g, Data(edge_index=g.edge_index, num_nodes=4)]),
            BatchFormat,
            r"1 of 2 graphs have x, each row of the shape \(2,\)",
        ),
        (
            lambda g: GeometricScattering().dataset_features([g, Data(edge_index=g.edge_index, x=torch.rand(4, 3))]),
            BatchFormat,
            r"\(2,\) or \(3,\)",
        ),
        (lambda g: whole_set(g, edge_index=g.edge_index + 1), InvalidArgument, "there are 4 nodes"),
        (lambda g: whole_set(g, edge_index=g.edge_index - 1), InvalidArgument, "-1 to 2"),
        (lambda g: whole_set(g, edge_index=g.edge_index > 0), InvalidArgument, "torch.bool"),
        (lambda g: whole_set(g, edge_index=g.edge_index[:1]), ShapeMismatch, r"\(2, E\)"),
        (lambda g: whole_set(g, x=torch.rand(3, 2)), BatchFormat, "Graph 0 has 3 rows of x, and 4"),
        (lambda g: whole_set(g, edge_weight=torch.rand(2)), BatchFormat, "1 of 2 graphs have edge_weight"),
        (
            lambda g: GeometricScattering()(Data(edge_index=g.edge_index, x=torch.rand(2, 1))),
            InvalidArgument,
            "2 nodes",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(graphs()[0])
