"""Graph data modules: folds, protocols, transforms applied once, raw files without a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_methods import Eccentricity, GeometricScattering, RandomGraphsDataModule, TUGraphDataModule
from lightning_methods.errors import InvalidArgument


def small(**settings: object) -> RandomGraphsDataModule:
    return RandomGraphsDataModule(**{"graphs_per_class": 10, "nodes": (10, 14), **settings})


@pytest.mark.parametrize("protocol", ["stratified", "gao2019"])
def test_every_graph_is_tested_once_and_no_part_overlaps(protocol):
    tested = []
    for fold in range(5):
        data = small(fold=fold, protocol=protocol)
        data.setup()
        parts = [set(part.tolist()) for part in data.splits.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        tested += data.splits["test"].tolist()
        if protocol == "stratified":
            assert np.bincount(data.labels[data.splits["test"]]).tolist() == [2, 2, 2, 2]
    assert sorted(tested) == list(range(40))


def test_protocol_of_gin_validates_on_the_test_fold():
    data = small(protocol="gin")
    data.setup()
    assert np.array_equal(data.splits["val"], data.splits["test"])


def test_the_seed_decides_graphs_and_folds():
    a, b, c = small(), small(), small(seed=1)
    for data in (a, b, c):
        data.setup()
    assert all(torch.equal(g.edge_index, h.edge_index) for g, h in zip(a.graphs, b.graphs, strict=True))
    assert np.array_equal(a.splits["test"], b.splits["test"])
    assert not all(torch.equal(g.edge_index, h.edge_index) for g, h in zip(a.graphs, c.graphs, strict=True))


def test_classes_have_about_the_same_size_and_number_of_edges():
    data = RandomGraphsDataModule(graphs_per_class=60)
    degrees = torch.tensor([g.num_edges / g.num_nodes for g in data.graphs])
    means = torch.stack([degrees[data.labels == c].mean() for c in range(4)])
    assert means.min() > 3.2
    assert means.max() < 4.2
    for graph in data.graphs:
        assert graph.is_undirected()
        assert not graph.has_self_loops()


def test_transforms_are_applied_once():
    calls = []

    def counted(graph):
        calls.append(graph)
        return graph

    data = small(transform=[Eccentricity(), counted, GeometricScattering()])
    for stage in ("fit", "test"):
        data.setup(stage)
    batch = next(iter(data.train_dataloader()))
    assert len(calls) == 40
    assert (data.num_features, data.num_classes) == (1, 4)
    assert batch.scattering.shape == (batch.num_graphs, 64)


def write_tu(folder, name="TINY"):
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    files = {"A": "1, 2\n2, 1\n3, 4\n4, 3\n5, 6\n6, 5\n", "graph_indicator": "1\n1\n2\n2\n3\n3\n"}
    files |= {"graph_labels": "1\n2\n1\n", "node_labels": "0\n1\n0\n0\n1\n1\n"}
    for part, text in files.items():
        (raw / f"{name}_{part}.txt").write_text(text)


def test_raw_files_are_enough(tmp_path):
    write_tu(tmp_path)
    data = TUGraphDataModule("TINY", str(tmp_path), num_folds=3, protocol="gao2019")
    data.prepare_data()
    data.setup()
    assert (len(data.graphs), data.num_features, data.num_classes) == (3, 2, 2)
    assert len(next(iter(data.test_dataloader()))) == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TUGraphDataModule("MUTAG", "nowhere").setup(), "MUTAG_A.txt is missing"),
        (lambda: small(protocol="random"), "stratified"),
        (lambda: small(fold=5), "fold=5"),
        (lambda: small(val_fold=4), "val_fold=4"),
        (lambda: small(num_folds=2), "num_folds"),
        (lambda: small(graphs_per_class=2), "graphs_per_class"),
        (lambda: small(nodes=(3, 9)), "at least 8"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InvalidArgument, match=says):
        call()
