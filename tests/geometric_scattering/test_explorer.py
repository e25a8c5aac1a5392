"""The explorer shows what the functions find, leaves the training alone, and says what it cannot explore."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader as TensorLoader
from torch.utils.data import TensorDataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from lightning_methods import GeometricScattering, RandomGraphsDataModule, ScatteringClassifier, ScatteringExplorer
from lightning_methods.errors import BatchFormat, InvalidArgument, LightningMethodsWarning, NoEffect, ShapeMismatch
from lightning_methods.geometric_scattering import (
    ScatteringEncoder,
    class_subspaces,
    filter_responses,
    lazy_random_walk,
    moment_contributions,
    pca_dimensions,
    scattering_coefficients,
    scattering_moments,
    z_scores,
)
from lightning_methods.geometric_scattering.drawing import Panel, draw_graphs, spring_layout
from tests.geometric_scattering.oracle import path_graph
from tests.geometric_scattering.test_module import SIGNALS, data, model
from tests.support.training import assert_identical, quiet_trainer

NAMES = ["random", "hubs", "blocks", "ring"]


class Plain(pl.LightningModule):
    """A module that knows nothing of scattering: it counts nodes and edges."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)

    def training_step(self, batch, batch_idx):
        sizes = torch.bincount(batch.batch, minlength=batch.num_graphs)
        edges = torch.bincount(batch.batch[batch.edge_index[0]], minlength=batch.num_graphs)
        return nn.functional.cross_entropy(self.head(torch.stack([sizes, edges], 1) / 100), batch.y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def explored(tmp_path, explorer, module=None, source=None, **settings):
    torch.manual_seed(1)
    trainer = quiet_trainer(tmp_path, callbacks=[explorer] if explorer else [], **settings)
    module = model() if module is None else module
    trainer.fit(module, datamodule=data() if source is None else source)
    return trainer, module


def rows_of(tmp_path, key):
    (path,) = (tmp_path / "scattering").glob(f"{key}_[0-9]*.csv")
    return list(csv.reader(path.open()))


# -- what nodes add ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("nodes", [1, 2, 3, 9])
def test_contributions_of_nodes_add_up_to_the_moments(nodes, normalized):
    torch.manual_seed(nodes)
    x = torch.randn(nodes, 2, dtype=torch.float64)
    coefficients = scattering_coefficients(lazy_random_walk(path_graph(nodes), num_nodes=nodes), x, J=3)
    for q in (1, 2, 4, 6):
        added = moment_contributions(coefficients, Q=q, normalized=normalized)
        moments = scattering_moments(coefficients, Q=q, normalized=normalized)[0].clone()
        if normalized and q >= 4:
            moments.reshape(-1, q)[:, 3] += 3
        torch.testing.assert_close(added.sum(0), moments, rtol=1e-9, atol=1e-12)
        assert added.shape == (nodes, len(moments))


def test_contributions_of_constants_are_zero_and_those_of_no_nodes_are_none():
    complete = torch.tensor([[i, j] for i in range(4) for j in range(4) if i != j]).T
    coefficients = scattering_coefficients(lazy_random_walk(complete), torch.ones(4, 1), J=2)
    added = moment_contributions(coefficients, normalized=True)
    torch.testing.assert_close(added[:, :4], torch.tensor([[0.25, 0, 0, 0]], dtype=torch.float64).expand(4, 4))
    assert not added[:, 4:].any()
    assert moment_contributions(torch.zeros(0, 3, 1)).shape == (0, 12)


@pytest.mark.parametrize("learnable", [False, "legs"])
def test_encoder_and_transform_attribute_alike(learnable):
    graph = Data(edge_index=path_graph(6), x=torch.rand(6, 2, dtype=torch.float64))
    transform = GeometricScattering(J=3)
    encoder = ScatteringEncoder(2, J=3, learnable=learnable).double()
    ours, theirs = transform.contributions(graph), encoder.contributions(graph.x, graph.edge_index)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    batch = next(iter(DataLoader([graph, graph], 2)))
    with pytest.raises(BatchFormat, match="2 graphs"):
        transform.contributions(batch)


def test_learned_scales_at_their_start_respond_as_the_fixed_ones():
    encoder = ScatteringEncoder(1, J=3, learnable="legs")
    _, fixed = filter_responses(3, 50)
    _, learned = filter_responses(points=50, scales=encoder.scales(), alpha=float(encoder.alpha()))
    torch.testing.assert_close(learned, fixed, rtol=0, atol=1e-6)
    _, lazier = filter_responses(points=50, scales=encoder.scales(), alpha=0.7)
    assert (lazier[0] - fixed[0]).abs().max() > 0.05


# -- what is found -----------------------------------------------------------------------------------------------------


def test_what_is_found_is_what_the_functions_find(tmp_path):
    source = data()
    explorer = ScatteringExplorer(class_names=NAMES)
    explored(tmp_path, explorer, source=source)
    chosen = [source.graphs[i] for i in source.splits["train"]]
    features = torch.cat([GeometricScattering(J=3).features(graph) for graph in chosen])
    z, labels = z_scores(features), torch.cat([graph.y for graph in chosen])
    assert explorer.dimensions == dict(zip((0.5, 0.8, 0.9, 0.99), pca_dimensions(z), strict=True))
    expected = class_subspaces(z, labels)
    torch.testing.assert_close(explorer.subspaces.distances, expected.distances, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(explorer.subspaces.nearest, expected.nearest)
    # the strongest moment is that of the largest F statistic
    from sklearn.feature_selection import f_classif

    strength = f_classif(z.numpy(), labels.numpy())[0]
    assert explorer.telling[0][1] == pytest.approx(np.nanmax(strength), rel=1e-4)


def test_tables_and_figures(tmp_path):
    explorer = ScatteringExplorer(class_names=NAMES, moment="x1|psi1>psi2|variance", every_n_epochs=1)
    trainer, _ = explored(tmp_path, explorer)
    figures = {path.name.rpartition("_")[0] for path in explorer.figure_paths}
    assert figures == {"distances", "nearest", "preference", "filters", "attribution"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in explorer.figure_paths)
    dimensions = rows_of(tmp_path, "dimensions")
    assert dimensions[0] == ["class", "graphs", "50%", "80%", "90%", "99%"]
    assert [row[:2] for row in dimensions[1:]] == [["all", "48"], *([name, "12"] for name in NAMES)]
    nearest = rows_of(tmp_path, "nearest_table")
    assert nearest[0] == ["class", *NAMES, "own is second"]
    assert all(sum(map(float, row[1:5])) == pytest.approx(1) for row in nearest[1:])
    distances = np.array([row[1:] for row in rows_of(tmp_path, "distances_table")[1:]], dtype=float)
    np.testing.assert_allclose(distances, explorer.subspaces.distances)
    assert len(rows_of(tmp_path, "preference_table")) == 5
    assert len(rows_of(tmp_path, "moments_table")) == 21
    assert trainer.callback_metrics["scattering/dimension/90"] == explorer.dimensions[0.9]
    assert trainer.callback_metrics["scattering/own_nearest"] == pytest.approx(
        float(explorer.subspaces.nearest.diagonal().mean())
    )


@pytest.mark.parametrize("kind", ["x", "structure", "ready", "given"])
def test_any_module_whose_graphs_have_what_is_needed(tmp_path, kind):
    transform = {"x": SIGNALS, "structure": [], "ready": [*SIGNALS, GeometricScattering(J=2)], "given": SIGNALS}[kind]
    given = GeometricScattering(J=2, signals=("x", "degree")) if kind == "given" else None
    explorer = ScatteringExplorer(given, data="val")
    explored(tmp_path, explorer, Plain(), data(transform=transform))
    names = [name for name, _ in explorer.telling]
    assert len(names) > 10
    says = {"x": "x0|psi", "structure": "eccentricity|psi", "ready": "feature ", "given": "degree|x|"}[kind]
    assert any(name.startswith(says) for name in names)
    drawn = [path for path in explorer.figure_paths if "attribution" in path.name]
    assert len(drawn) == (kind != "ready")


def test_learned_scales_and_features_without_signals(tmp_path):
    explorer = ScatteringExplorer()
    explored(tmp_path / "legs", explorer, model(learnable="legs"))
    assert len(explorer.figure_paths) == 5
    ready = GeometricScattering(J=3, signals=("eccentricity", "clustering"))
    explored(tmp_path / "ready", explorer, source=data(transform=[ready]))
    assert len(explorer.figure_paths) == 4  # no signal, no attribution


def test_training_is_left_alone(tmp_path):
    _, plain = explored(tmp_path, None, model(dropout=0.3))
    state = torch.get_rng_state()
    _, watched = explored(tmp_path, ScatteringExplorer(every_n_epochs=1), model(dropout=0.3))
    assert_identical(watched, plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_of_one_graph_are_left_out_and_told(tmp_path):
    source = data()
    source.setup()
    graphs = [source.graphs[i] for i in range(20)]
    odd = graphs[0].clone()
    odd.y = torch.tensor([3])
    alone = [graph for graph in graphs if int(graph.y) != 3] + [odd]
    explorer = ScatteringExplorer(data=DataLoader(alone, 4))
    with pytest.warns(LightningMethodsWarning, match=r"classes \[3\]"):
        explored(tmp_path, explorer, source=source)
    assert explorer.subspaces.classes.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("graphs", "says"),
    [
        (lambda source: source.graphs[:1], "1 graphs"),
        (lambda source: [graph for graph in source.graphs if int(graph.y) == 0], "compares no classes"),
        (lambda source: [Data(edge_index=g.edge_index, x=0 * g.x, y=g.y) for g in source.graphs], "0 features"),
        (lambda source: [], "no batch"),
    ],
)
def test_nothing_to_explore_is_told(tmp_path, graphs, says):
    source = data()
    source.setup()
    chosen = graphs(source)
    loader = DataLoader(chosen, 8) if chosen else []
    explorer = ScatteringExplorer(GeometricScattering(J=2, normalized=False), data=loader, drawn=0)
    with pytest.warns(NoEffect, match=says):
        explored(tmp_path, explorer, Plain(), source)
    assert explorer.subspaces is None


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}])
def test_quiet_runs_explore_nothing(tmp_path, settings):
    explorer = ScatteringExplorer(every_n_epochs=1)
    explored(tmp_path, explorer, **settings)
    assert explorer.dimensions == {}
    assert explorer.figure_paths == []


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_neighbours_are_drawn_near_each_other():
    places = spring_layout(path_graph(8), 8)
    assert np.array_equal(places, spring_layout(path_graph(8), 8))
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert np.diag(apart, 1).max() < apart[0, 7] / 3
    assert np.isfinite(spring_layout(torch.zeros(2, 0, dtype=torch.int64), 3)).all()
    assert spring_layout(torch.zeros(2, 0, dtype=torch.int64), 1).shape == (1, 2)


def test_values_of_both_signs_have_a_scale_with_two_sides():
    figure = draw_graphs(
        [
            Panel(path_graph(3), torch.tensor([-1.0, 0, 3]), "skewness"),
            Panel(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2), "no edges"),
        ]
    )
    ((low, high), _) = [axes.collections[0].get_clim() for axes in figure.axes if axes.collections][:2]
    assert (low, high) == (-3, 3)
    with pytest.raises(InvalidArgument, match="without nodes"):
        draw_graphs([Panel(path_graph(3), torch.zeros(0), "nothing")])
    with pytest.raises(InvalidArgument, match="no graph"):
        draw_graphs([])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"share": 1.0}, "share"),
        ({"shares": ()}, "shares"),
        ({"data": "all"}, "'train', 'val', 'test'"),
        ({"drawn": -1}, "drawn=-1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ],
)
def test_settings_are_checked_at_once(settings, says):
    with pytest.raises(InvalidArgument, match=says):
        ScatteringExplorer(**settings)


def test_what_cannot_be_explored_is_told_before_the_training(tmp_path):
    graph = Data(edge_index=path_graph(3), x=torch.rand(3, 2))
    labelled = {"y": torch.tensor([1])}
    cases = [
        (TensorLoader(TensorDataset(torch.rand(8, 2), torch.arange(8) % 2), 4), BatchFormat, "a list of 2"),
        (DataLoader([graph], 1), BatchFormat, "class labels y"),
        (DataLoader([Data(**graph.to_dict(), y=torch.tensor([0.5]))], 1), BatchFormat, "whole numbers"),
        (DataLoader([Data(**graph.to_dict(), y=torch.tensor([[0, 1]]))], 1), BatchFormat, "class labels y"),
        (DataLoader([Data(**graph.to_dict(), y=torch.tensor([0, 1]))], 1), ShapeMismatch, "1 graphs and 2 labels"),
    ]
    for loader, error, says in cases:
        explorer = ScatteringExplorer(data=loader)
        with pytest.raises(error, match=says):
            explored(tmp_path, explorer, Plain(), RandomGraphsDataModule(graphs_per_class=5, transform=SIGNALS))
    explorer = ScatteringExplorer(data=DataLoader([Data(**graph.to_dict(), **labelled)], 1), moment="x0|psi9|mean")
    with pytest.raises(InvalidArgument, match=r"x0\|psi9\|mean.*Did you mean"):
        explored(tmp_path, explorer, Plain(), RandomGraphsDataModule(graphs_per_class=5, transform=SIGNALS))


def test_a_classifier_says_what_a_batch_of_tensors_lacks():
    module = ScatteringClassifier(2, 2, standardize="none")
    for batch in (torch.rand(3, 2), (torch.rand(3, 2), torch.zeros(3)), {"image": torch.rand(3, 2)}):
        with pytest.raises(BatchFormat, match="no node features x"):
            module(batch)
    with pytest.raises(BatchFormat, match="no edge_index"):
        GeometricScattering()(SimpleNamespace(x=torch.rand(3, 2)))
