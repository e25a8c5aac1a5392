"""Walk, coefficients and moments equal independent float64 values and keep the invariants of the transform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.geometric_scattering import (
    feature_names,
    lazy_random_walk,
    scattering_coefficients,
    scattering_moments,
    scattering_paths,
    wavelets,
)
from tests.geometric_scattering import oracle
from tests.geometric_scattering.oracle import complete, path_graph, random_graph, star, undirected

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def moments(edges: Tensor, x: Tensor, *, J: int = 5, Q: int = 4, normalized: bool = False, **walk: object) -> Tensor:
    """Return the features of one graph of one signal as `(paths, Q)`."""
    P = lazy_random_walk(edges, num_nodes=len(x), **walk)
    u = scattering_coefficients(P, x, J=J)
    return scattering_moments(u, Q=Q, normalized=normalized).reshape(u.shape[1], Q)


def values(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- values computed elsewhere -----------------------------------------------------------------------------------------


def test_delta_on_a_path():
    P = lazy_random_walk(path_graph(4))
    expected = values([[0.5, 0.25, 0, 0], [0.5, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.5], [0, 0, 0.25, 0.5]])
    assert torch.equal(P.to_dense(), expected)
    delta = torch.eye(4, dtype=torch.float64)[:, :1]
    psi = wavelets(P, delta, J=3)[..., 0].T
    expected = values(
        [
            [0.125, 0, -0.125, 0],
            [0.1015625, 0.0625, -0.1015625, -0.0625],
            [0.073394775390625, 0.07080078125, -0.073394775390625, -0.07080078125],
        ]
    )
    torch.testing.assert_close(psi, expected, **EXACT)
    expected = values(
        [
            [1, 1],
            [0.25, 0.03125],
            [0.328125, 0.0284423828125],
            [0.28839111328125, 0.02079908736050129],
            [0.0205078125, 0.00011110305786132812],
            [0.018024444580078125, 8.124643500195816e-05],
            [0.005632638931274414, 7.976934313091988e-06],
        ]
    )
    torch.testing.assert_close(moments(path_graph(4), delta, J=3, Q=2), expected, **EXACT)


def test_star():
    expected = values(
        [
            [15, 55, 225, 979],
            [1, 0.3125, 0.109375, 0.0400390625],
            [0.75, 0.17578125, 0.046142578125, 0.012668609619140625],
            [0.09375, 0.002197265625, 5.14984130859375e-05, 1.2069940567016602e-06],
        ]
    )
    torch.testing.assert_close(moments(star(5), torch.arange(1.0, 6), J=2), expected, **EXACT)


@pytest.mark.parametrize(
    ("isolated", "expected"),
    [
        ("leak", [[6, 14], [0.75, 0.5625], [0.5625, 0.31640625], [0.140625, 0.019775390625]]),
        ("stay", [[6, 14], [0, 0], [0, 0], [0, 0]]),
    ],
)
def test_isolated_node(isolated, expected):
    found = moments(undirected([(0, 1)]), torch.tensor([1, 2, 3]), J=2, Q=2, isolated=isolated)
    torch.testing.assert_close(found, values(expected), **EXACT)


def test_weights():
    edges, weight = path_graph(3), torch.tensor([2.0, 0.5, 2.0, 0.5])
    P = lazy_random_walk(edges, weight)
    torch.testing.assert_close(P.to_dense(), values([[0.5, 0.4, 0], [0.5, 0.5, 0.5], [0, 0.1, 0.5]]), **EXACT)
    found = moments(edges, torch.tensor([1.0, -1, 2]), J=2, Q=2, edge_weight=weight)
    expected = values([[4, 6], [0.7, 0.245], [0.525, 0.1378125], [0.07875, 0.00310078125]])
    torch.testing.assert_close(found, expected, **EXACT)


def karate_club() -> tuple[Tensor, Tensor, Tensor]:
    import networkx as nx

    graph = nx.karate_club_graph()
    edges = undirected(list(graph.edges()))
    eccentricity = torch.tensor(list(nx.eccentricity(graph).values()), dtype=torch.float64)
    return edges, eccentricity, torch.tensor(list(nx.clustering(graph).values()), dtype=torch.float64)


def test_karate_club_unnormalised():
    edges, eccentricity, clustering = karate_club()
    found = moments(edges, eccentricity)
    expected = values(
        [
            [137, 569, 2429, 10625],
            [15.702945261437907, 11.39682928633301, 11.213596148525287, 13.778060344695772],
            [10.581262091052722, 4.632738183095631, 2.670928084293047, 1.858611377949314],
        ]
    )
    torch.testing.assert_close(found[:3], expected, **EXACT)
    totals = values([[183.62485602822596, 590.1215137601004, 2445.0360062789046, 10641.784203760759]])
    torch.testing.assert_close(found.sum(0, keepdim=True), totals, **EXACT)
    found = moments(edges, clustering)
    expected = values([[3.362735759714115, 0.4791585193673806, 0.08553211049748727, 0.018191862802348656]])
    torch.testing.assert_close(found[1:2], expected, **EXACT)
    totals = values([[29.420895723117486, 15.994012680194734, 13.32861474748009, 12.291556839818703]])
    torch.testing.assert_close(found.sum(0, keepdim=True), totals, **EXACT)


def test_karate_club_normalised():
    edges, eccentricity, _ = karate_club()
    found = moments(edges, eccentricity, normalized=True)
    expected = values(
        [
            [4.029411764705882, 0.49913494809688586, -0.04350159830909533, -0.9965428064241926],
            [0.461851331218762, 0.12189420921419304, 1.5349315459971034, 2.952641372521337],
            [0.012372728654817242, 0.00012276852000836096, 1.692492800698501, 1.863560064609219],
        ]
    )
    torch.testing.assert_close(found[[0, 1, -1]], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("n", "p"), [(1, 0), (2, 1.0), (3, 0.9), (9, 0.3), (30, 0.1), (60, 0.5)])
def test_equals_dense_powers(n, p, normalized):
    edges, x = random_graph(n, p, seed=n), torch.rand(n, 3, dtype=torch.float64)
    found = moments_of(edges, x, normalized=normalized)
    expected = torch.from_numpy(oracle.features(edges, x, normalized=normalized))
    if n < 3 and normalized:  # where SciPy has no value
        expected = torch.where(expected.isnan(), torch.tensor([0.0, 0, 0, -3], dtype=torch.float64), expected)
    # on small graphs the walk mixes so fast that both sides have rounding errors only at long scales
    kept = expected[..., 0] > 1e-9
    assert kept[:, :2].all() or n < 3
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-9 if not normalized else 1e-6, atol=1e-12)


def moments_of(edges: Tensor, x: Tensor, **settings: object) -> Tensor:
    """Return the features of one graph, `(F, paths, Q)`."""
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=len(x)), x)
    return scattering_moments(u, **settings).reshape(x.shape[1], u.shape[1], -1)


# -- invariants --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return random_graph(25, 0.2, seed=3), torch.rand(25, 2, dtype=torch.float64)


def test_mass_is_kept_and_degrees_are_still(graph):
    edges, x = graph
    P = lazy_random_walk(edges, num_nodes=25, isolated="stay")
    torch.testing.assert_close(P.to_dense().sum(0), torch.ones(25, dtype=torch.float64), **EXACT)
    psi = wavelets(P, x)
    assert psi.sum(0).abs().max() < 1e-14
    degree = torch.bincount(edges[0], minlength=25).double()[:, None]
    assert wavelets(P, degree).abs().max() < 1e-14
    torch.testing.assert_close(psi.sum(1), P @ x - torch.linalg.matrix_power(P.to_dense(), 32) @ x, **EXACT)


def test_finest_and_lowpass_complete_the_bank(graph):
    edges, x = graph
    P = lazy_random_walk(edges, num_nodes=25)
    psi = wavelets(P, x, J=4, include_finest=True, include_lowpass=True)
    assert psi.shape[1] == 6
    torch.testing.assert_close(psi.sum(1), x, **EXACT)
    torch.testing.assert_close(psi[:, 0], x - P @ x, **EXACT)
    paths = scattering_paths(4, 2, include_finest=True, include_lowpass=True)
    u = scattering_coefficients(P, x, J=4, include_finest=True, include_lowpass=True)
    torch.testing.assert_close(u[:, paths.index((0,))], psi[:, 0].abs(), **EXACT)
    low = torch.linalg.matrix_power(P.to_dense(), 16) @ psi[:, 2].abs()
    torch.testing.assert_close(u[:, paths.index((2, 5))], low, **EXACT)


@pytest.mark.parametrize("normalization", ["row", "symmetric"])
def test_other_walks(graph, normalization):
    edges, _ = graph
    n = 25
    a = torch.zeros(n, n, dtype=torch.float64)
    a[edges[1], edges[0]] = 1
    d = a.sum(0)
    scaled = a / d[:, None] if normalization == "row" else a / (d[:, None] * d).sqrt()
    expected = (torch.eye(n, dtype=torch.float64) + scaled.nan_to_num(nan=0.0)) / 2
    torch.testing.assert_close(lazy_random_walk(edges, normalization=normalization, num_nodes=n).to_dense(), expected)


def test_directed_edges_carry_mass_from_source_to_target():
    edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    expected = values([[0.5, 0, 0], [0.25, 0.5, 0], [0.25, 0.5, 0.5]])
    assert torch.equal(lazy_random_walk(edges).to_dense(), expected)
    stays = lazy_random_walk(edges, isolated="stay").to_dense()
    assert torch.equal(stays.sum(0), torch.ones(3, dtype=torch.float64))
    assert lazy_random_walk(edges, isolated="stay", normalization="row").to_dense()[0, 0] == 1  # nothing comes in


def test_relabelling_changes_nothing(graph):
    edges, x = graph
    order = torch.randperm(25)
    place = torch.argsort(order)
    for normalized in (False, True):
        torch.testing.assert_close(
            moments_of(place[edges], x[order], normalized=normalized),
            moments_of(edges, x, normalized=normalized),
            rtol=1e-10,
            atol=1e-12,
        )


def test_scale_of_the_signal(graph):
    edges, x = graph
    plain, scaled = moments_of(edges, x, normalized=False), moments_of(edges, -3 * x, normalized=False)
    torch.testing.assert_close(scaled, plain * 3.0 ** torch.arange(1, 5), rtol=1e-12, atol=0)


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    starts = np.cumsum([0, *[len(x) for _, x in parts]])
    edges = torch.cat([e + int(s) for (e, _), s in zip(parts, starts, strict=False)], 1)
    batch = torch.cat([torch.full((len(x),), i) for i, (_, x) in enumerate(parts)])
    return edges, torch.cat([x for _, x in parts]), batch


@pytest.mark.parametrize("normalized", [False, True])
def test_a_batch_equals_its_graphs_one_by_one_in_any_order_of_nodes(normalized):
    torch.manual_seed(1)
    sizes = [1, 2, 40, 7, 300, 3]
    parts = [(random_graph(n, min(1.0, 4 / n), seed=n), torch.rand(n, 2, dtype=torch.float64)) for n in sizes]
    edges, x, batch = joined(parts)
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=len(x)), x)
    together = scattering_moments(u, batch, len(sizes), normalized=normalized)
    alone = torch.stack([moments_of(e, s, normalized=normalized).flatten() for e, s in parts])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-11)
    order = torch.randperm(len(x))
    shuffled = scattering_moments(u[order], batch[order], len(sizes), normalized=normalized)
    torch.testing.assert_close(shuffled, together, rtol=1e-10, atol=1e-11)


def test_sums_of_a_disjoint_union_add():
    a, b = (random_graph(9, 0.4, 1), torch.rand(9, 1)), (random_graph(14, 0.3, 2), torch.rand(14, 1))
    edges, x, _ = joined([a, b])
    separate = moments_of(*a, normalized=False) + moments_of(*b, normalized=False)
    torch.testing.assert_close(moments_of(edges, x, normalized=False), separate, **EXACT)


def test_does_not_expand_in_the_norm_weighted_by_degree(graph):
    edges, x = graph
    degree = torch.bincount(edges[0], minlength=25).double()
    assert (degree > 0).all()
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=25), x)
    energy = (u.square() / degree[:, None, None]).sum(0)
    assert (energy[1:6].sum(0) <= energy[0]).all()


def test_third_order_and_counts():
    assert len(scattering_paths()) == 16
    assert scattering_paths(4, 2)[5:] == [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]
    third = scattering_paths(4, 3)[11:]
    assert third == [(1, 2, 3), (1, 2, 4), (1, 3, 4), (2, 3, 4)]
    edges, x = random_graph(12, 0.3, 5), torch.rand(12, 1, dtype=torch.float64)
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=12), x, J=4, order=3)
    dense = oracle.coefficients(oracle.walk(edges, 12), x[:, 0].numpy(), 4, 3)
    for i, path in enumerate(scattering_paths(4, 3)):
        np.testing.assert_allclose(u[:, i, 0].numpy(), dense[path], rtol=1e-11, atol=1e-14)
    assert scattering_coefficients(lazy_random_walk(edges, num_nodes=12), x, order=0).shape == (12, 1, 1)
    assert scattering_coefficients(lazy_random_walk(edges, num_nodes=12), x, J=1).shape == (12, 2, 1)


def test_names_are_those_of_the_columns():
    names = feature_names(["ecc", "clustering"], J=3, Q=2, normalized=False)
    assert names[:4] == ["ecc|x|q1", "ecc|x|q2", "ecc|psi1|q1", "ecc|psi1|q2"]
    assert names[14] == "clustering|x|q1"
    edges, x = random_graph(9, 0.5, 1), torch.rand(9, 2, dtype=torch.float64)
    flat = scattering_moments(scattering_coefficients(lazy_random_walk(edges, num_nodes=9), x), normalized=False)[0]
    place = feature_names(["a", "b"], normalized=False).index("b|psi2>psi4|q3")
    path = oracle.coefficients(oracle.walk(edges, 9), x[:, 1].numpy(), 5)[2, 4]
    assert float(flat[place]) == pytest.approx((path**3).sum(), rel=1e-12)
    assert feature_names(["a"], J=1, include_finest=True, include_lowpass=True, Q=1, order=1) == [
        f"a|{p}|mean" for p in ("x", "psi0", "psi1", "low")
    ]


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 7, 50, 136])
def test_a_constant_on_a_complete_graph_has_no_coefficients(n, dtype):
    P = lazy_random_walk(complete(n), dtype=dtype)
    x = torch.full((n, 1), 3.7, dtype=dtype)
    u = scattering_coefficients(P, x)
    sums = scattering_moments(u, normalized=False).reshape(16, 4)
    assert (sums[1:] == 0).all()
    normal = scattering_moments(u).reshape(16, 4)
    nothing = torch.tensor([0.0, 0, 0, -3], dtype=dtype)
    assert torch.equal(normal[1:], nothing.expand(15, 4))
    torch.testing.assert_close(normal[0], torch.tensor([3.7, 0, 0, -3], dtype=dtype))
    raw = scattering_moments(u, normalized=False, noise_floor=False).reshape(16, 4)
    assert raw[1:, 0].max() < 200 * n * torch.finfo(dtype).eps


def test_the_floor_is_that_of_each_graph_and_signal():
    edges, x, batch = joined(
        [
            (complete(5), torch.full((5, 2), 1e6, dtype=torch.float64)),
            (path_graph(4), torch.tensor([[1.0, 2], [3, 7], [2, 0], [4, 1]]).double() * 1e-6),
        ]
    )
    u = scattering_coefficients(lazy_random_walk(edges, num_nodes=9), x)
    found = scattering_moments(u, batch, 2, normalized=False).reshape(2, 2, 16, 4)
    assert (found[0, :, 1:] == 0).all()
    assert (found[1, :, 1:6, 0] > 1e-12).all()


def test_single_precision():
    edges, x = random_graph(60, 0.1, 0), torch.rand(60, 2)
    double = moments_of(edges, x.double(), normalized=False)
    single = scattering_moments(
        scattering_coefficients(lazy_random_walk(edges, num_nodes=60, dtype=torch.float32), x), normalized=False
    ).reshape(2, 16, 4)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients(normalized):
    torch.manual_seed(4)
    P = lazy_random_walk(random_graph(8, 0.5, 4), num_nodes=8)
    x = torch.rand(8, 2, dtype=torch.float64, requires_grad=True)
    batch = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def features(x: Tensor) -> Tensor:
        return scattering_moments(scattering_coefficients(P, x, J=3), batch, 2, normalized=normalized)

    assert torch.autograd.gradcheck(features, x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_are_finite_on_regular_graphs_and_constants(normalized):
    x = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    P = lazy_random_walk(complete(6))
    scattering_moments(scattering_coefficients(P, x), normalized=normalized).sum().backward()
    assert x.grad.isfinite().all()


# -- edges of all kinds ------------------------------------------------------------------------------------------------


def test_empty_graphs_keep_their_rows():
    u = scattering_coefficients(lazy_random_walk(path_graph(3), num_nodes=3), torch.rand(3, 1))
    sums = scattering_moments(u, torch.tensor([1, 1, 1]), 4, normalized=False).reshape(4, 16, 4)
    assert (sums[[0, 2, 3]] == 0).all()
    normal = scattering_moments(u, torch.tensor([1, 1, 1]), 4).reshape(4, 16, 4)
    assert torch.equal(normal[[0, 2, 3]], torch.tensor([0.0, 0, 0, -3]).double().expand(3, 16, 4))
    nothing = scattering_coefficients(
        lazy_random_walk(torch.zeros(2, 0, dtype=torch.int64), num_nodes=0), torch.rand(0, 1)
    )
    assert scattering_moments(nothing, torch.zeros(0, dtype=torch.int64), 2).shape == (2, 64)


def test_edges_listed_twice_and_loops():
    edges = path_graph(3)
    twice = torch.cat([edges, edges[:, :2], torch.tensor([[1], [1]])], 1)
    assert torch.equal(lazy_random_walk(twice).to_dense(), lazy_random_walk(edges).to_dense())
    weight = torch.ones(twice.shape[1])
    summed = lazy_random_walk(twice, weight).to_dense()
    assert torch.equal(summed, lazy_random_walk(edges, torch.tensor([2.0, 2, 1, 1])[[0, 1, 2, 3]]).to_dense())
    loops = lazy_random_walk(twice, remove_self_loops=False).to_dense()
    torch.testing.assert_close(loops[:, 1], values([[1 / 6, 0.5 + 1 / 6, 1 / 6]])[0], **EXACT)


def test_weights_of_zero_are_no_edges():
    weight = torch.tensor([1.0, 0, 1, 0])
    P = lazy_random_walk(path_graph(3), weight, isolated="stay")
    assert torch.equal(P.to_dense(), lazy_random_walk(undirected([(0, 1)]), num_nodes=3, isolated="stay").to_dense())


def test_integers_and_booleans_are_signals_too():
    P = lazy_random_walk(path_graph(4))
    for x in (torch.tensor([1, 0, 0, 0]), torch.tensor([True, False, False, False])):
        u = scattering_coefficients(P, x, J=1)
        assert torch.equal(u[:, 1, 0], values([[0.125, 0, 0.125, 0]])[0])


def test_powers_above_the_fourth():
    edges, x = random_graph(20, 0.3, 1), torch.rand(20, 1, dtype=torch.float64)
    found = moments_of(edges, x, Q=6)[0, 1]
    u = oracle.coefficients(oracle.walk(edges, 20), x[:, 0].numpy(), 5)[1,]
    d = u - u.mean()
    expected = [(d**q).mean() / u.var() ** (q / 2) for q in (5, 6)]
    np.testing.assert_allclose(found[4:].numpy(), expected, rtol=1e-10)


def P3() -> Tensor:
    return lazy_random_walk(path_graph(3))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: lazy_random_walk(path_graph(3), torch.tensor([1.0, -2, 1, 1])), InvalidArgument, "-2"),
        (lambda: lazy_random_walk(path_graph(3), torch.tensor([1.0, math.nan, 1, 1])), InvalidArgument, "nan"),
        (lambda: lazy_random_walk(path_graph(3), torch.tensor([1.0, math.inf, 1, 1])), InvalidArgument, "inf"),
        (lambda: lazy_random_walk(path_graph(3), torch.ones(3)), ShapeMismatch, r"\(4,\) is needed"),
        (lambda: lazy_random_walk(path_graph(3), num_nodes=2), InvalidArgument, "there are 2 nodes"),
        (lambda: lazy_random_walk(path_graph(3).float()), InvalidArgument, "float32"),
        (lambda: lazy_random_walk(torch.zeros(3, 4, dtype=torch.int64)), ShapeMismatch, r"\(2, E\)"),
        (lambda: lazy_random_walk(path_graph(3), normalization="colum"), InvalidArgument, "column"),
        (lambda: lazy_random_walk(path_graph(3), isolated="leaks"), InvalidArgument, "leak"),
        (lambda: scattering_coefficients(P3(), torch.rand(4, 1)), ShapeMismatch, "4 rows"),
        (lambda: scattering_coefficients(P3(), torch.rand(3, 1, 1)), ShapeMismatch, "F"),
        (lambda: scattering_coefficients(P3(), torch.rand(3), J=0), InvalidArgument, "J=0"),
        (
            lambda: scattering_coefficients(P3(), torch.rand(3), order=4),
            InvalidArgument,
            "4",
        ),
        (lambda: scattering_moments(torch.rand(3, 2)), ShapeMismatch, "paths"),
        (lambda: scattering_moments(torch.rand(3, 2, 1), Q=0), InvalidArgument, "Q=0"),
        (lambda: scattering_moments(torch.rand(3, 2, 1), torch.tensor([0, 1])), ShapeMismatch, "3 nodes"),
        (lambda: scattering_moments(torch.rand(3, 2, 1), torch.tensor([0, 1, 2]), 2), InvalidArgument, "batch_size=2"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
