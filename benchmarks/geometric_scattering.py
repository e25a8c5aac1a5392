"""Speed and memory of geometric scattering, beside karateclub, the dense way of the authors' code, and PyG's GIN.

    python benchmarks/geometric_scattering.py --root data/TU --karateclub peers/bin/python \\
        --markdown benchmarks/results/geometric_scattering_cpu.md
    python benchmarks/geometric_scattering.py --root data/TU --device cuda \\
        --markdown benchmarks/results/geometric_scattering_cuda.md

Sections whose data set is not in `--root`, and rows of karateclub where no interpreter that has it is named, are left
out and said so. Limits are reported as ok or missed; nothing fails. On a CPU the numbers are seconds of processor time
of one thread: unlike those of a clock, they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from timing import MEGABYTE, Table, environment, extra_memory, gate, in_fresh_process, synchronize, write_markdown
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_add_pool

from lightning_methods import GeometricScattering, RandomGraphsDataModule, ScatteringClassifier, TUGraphDataModule
from lightning_methods.errors import InvalidArgument

STRUCTURE = ("eccentricity", "degree", "clustering")
ROUNDS = 5

# what the other interpreter runs: the class alone, since the package imports much else that it needs
KARATECLUB = """
import importlib.util, json, sys, time, types
import networkx as nx
import numpy as np

root = list(importlib.util.find_spec("karateclub").submodule_search_locations)
for name, path in (("karateclub", root), ("karateclub.graph_embedding", [root[0] + "/graph_embedding"])):
    package = types.ModuleType(name)
    package.__path__ = path
    sys.modules[name] = package
from karateclub.graph_embedding.geoscattering import GeoScattering
from importlib.metadata import version

data, graphs, edge = np.load(sys.argv[1]), [], 0
for nodes, edges in zip(data["nodes"], data["edges"]):
    graph = nx.Graph()
    graph.add_nodes_from(range(nodes))
    graph.add_edges_from(data["pairs"][:, edge : edge + edges].T.tolist())
    graphs.append(graph)
    edge += edges
start = time.process_time()
model = GeoScattering()
model.fit(graphs)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "width": model.get_embedding().shape[1], "version": version("karateclub")}))
"""


def seconds(work: Callable[[], Any], device: str) -> float:
    """Return the median time of several calls after one to warm up: of the processor, or by the clock on CUDA."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    work()
    found = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        found.append(clock() - start)
    return float(np.median(found))


def graphs_of(name: str, root: str) -> list[Data] | None:
    """Return the graphs of a data set, or nothing where its files are missing."""
    try:
        return TUGraphDataModule(name, root).graphs
    except InvalidArgument:
        return None


def in_batches(graphs: list[Data], scattering: GeometricScattering, device: str) -> Tensor:
    """Return the features of all graphs: those of one call on a CPU, of large batches on a GPU."""
    if device == "cpu":
        return scattering.dataset_features(graphs)
    parts = DataLoader(graphs, batch_size=512)
    return torch.cat([scattering.features(batch.to(device)) for batch in parts])


# -- the authors' way --------------------------------------------------------------------------------------------------


def dense_features(graph: Data, *, normalized: bool) -> NDArray[np.float64]:
    """Return the features `(signals, paths, 4)` of one graph in the way of the released scripts: all powers dense."""
    n = int(graph.num_nodes or 0)
    adjacency = np.zeros((n, n))
    adjacency[graph.edge_index[1], graph.edge_index[0]] = 1
    degree = adjacency.sum(0)
    walk = (np.eye(n) + np.divide(adjacency, degree, out=np.zeros_like(adjacency), where=degree > 0)) / 2
    power = np.linalg.matrix_power
    psi = [power(walk, t) - power(walk, 2 * t) for t in (1, 2, 4, 8, 16)]
    x = graph.x.double().numpy()
    first = np.abs(np.matmul(psi, x))
    second = [np.abs(np.einsum("ij,ajt->ait", psi[k], first[:k])) for k in range(1, 5)]
    parts = [x[None], first, *second]
    return np.concatenate([(standardised if normalized else sums)(part) for part in parts]).transpose(1, 0, 2)


def sums(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([(np.abs(u) ** q).sum(1) for q in range(1, 5)], -1)


def standardised(u: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of coefficients that are the same everywhere
        moments = [u.mean(1), u.var(1), stats.skew(u, axis=1, bias=False), stats.kurtosis(u, axis=1)]
    return np.stack(moments, -1)


def beside_dense(args: argparse.Namespace) -> list[Table]:
    made = RandomGraphsDataModule(graphs_per_class=100).graphs
    for graph in made:
        graph.x = torch.rand(graph.num_nodes, 2, generator=torch.Generator().manual_seed(0))
    sets = {"ENZYMES, 3 signals": graphs_of("ENZYMES", args.root), "400 random graphs, 2 signals": made}
    rows = []
    for name, graphs in sets.items():
        for normalized in (True, False) if graphs is not None else ():
            scattering = GeometricScattering(normalized=normalized)
            ours = seconds(lambda g=graphs, s=scattering: in_batches(g, s, args.device), args.device)
            dense = seconds(lambda g=graphs, n=normalized: [dense_features(one, normalized=n) for one in g], "cpu")
            expected = np.stack([dense_features(graph, normalized=normalized) for graph in graphs])
            worst = difference(in_batches(graphs, scattering, args.device), expected, normalized=normalized)
            floor = gate(-dense / ours, -10) if normalized and name.startswith("ENZYMES") else ""
            title = f"{name}, {'normalised moments' if normalized else 'sums of powers'}"
            rows.append([title, f"{ours:.3f}", f"{dense:.2f}", f"{dense / ours:.1f}", floor, f"{worst:.0e}"])
    columns = ["", "ours, s", "dense powers, s", "times as fast", "at least 10", "largest relative difference"]
    note = (
        "The released scripts compute normalised moments; sums of powers in the same way are shown beside them. Of "
        "normalised moments, mean and variance are compared: skewness and kurtosis of constants are not defined. "
    )
    return [Table("Beside the authors' dense way", columns, rows, note + missing_of(args, "ENZYMES"))]


def difference(ours: Tensor, expected: NDArray[np.float64], *, normalized: bool) -> float:
    """Return the largest difference, over the largest value of each feature."""
    shown = 2 if normalized else 4
    found = ours.cpu().double().numpy().reshape(expected.shape)[..., :shown]
    scale = np.abs(expected[..., :shown]).max(0)
    return float((np.abs(found - expected[..., :shown]).max(0) / np.where(scale > 0, scale, 1)).max())


def beside_karateclub(args: argparse.Namespace) -> list[Table]:
    graphs = graphs_of("IMDB-BINARY", args.root)
    title = "Beside karateclub's GeoScattering: IMDB-BINARY, signals included"
    if graphs is None:
        return [Table(title, ["left out"], [], missing_of(args, "IMDB-BINARY"))]
    scattering = GeometricScattering(signals=STRUCTURE)
    ours = seconds(lambda: in_batches(graphs, scattering, args.device), args.device)
    rows = [["ours, 3 signals", in_batches(graphs[:2], scattering, args.device).shape[1], f"{ours:.3f}", "", ""]]
    note = "karateclub (GPL) is not installed where `--karateclub` says, or nothing was said: its row is left out."
    if args.karateclub:
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "graphs.npz")
            pairs = np.concatenate([g.edge_index.numpy() for g in graphs], 1)
            np.savez(given, nodes=[g.num_nodes for g in graphs], edges=[g.num_edges for g in graphs], pairs=pairs)
            command = [args.karateclub, "-c", KARATECLUB, str(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            peer = json.loads(done.stdout.splitlines()[-1])
            ratio = peer["seconds"] / ours
            row = [f"karateclub {peer['version']}", peer["width"], f"{peer['seconds']:.1f}", f"{ratio:.0f}"]
            rows.append([*row, gate(-ratio, -30)])
            note = (
                "From graphs in memory (of PyG, of NetworkX) to features; karateclub measured once. It computes "
                "something else: powers of single entries in place of powers of the walk."
            )
    return [Table(title, ["", "features", "s", "times as long", "at least 30"], rows, note)]


# -- size --------------------------------------------------------------------------------------------------------------


def large_graph(nodes: int = 3800) -> Data:
    """Return a graph that grows by preferential attachment, as large as the largest of REDDIT-BINARY."""
    rng = np.random.default_rng(0)
    ends, pairs = [0, 1], [(0, 1)]
    for node in range(2, nodes):
        for target in {ends[i] for i in rng.integers(len(ends), size=2)}:
            pairs.append((target, node))
            ends += [target, node]
    edges = torch.tensor(pairs).T
    return Data(edge_index=torch.cat([edges, edges.flip(0)], 1), num_nodes=nodes)


def memory_of_large_graph(device: str) -> float:
    graph = large_graph().to(device)
    return extra_memory(lambda: GeometricScattering(signals=STRUCTURE).features(graph), device)


def size(args: argparse.Namespace) -> list[Table]:
    if args.device == "cuda":
        extra = memory_of_large_graph("cuda")
    else:
        extra = in_fresh_process(__file__, "--memory")
    graph, scattering = large_graph().to(args.device), GeometricScattering(signals=STRUCTURE)
    taken = seconds(lambda: scattering.features(graph), args.device)
    megabytes = extra / MEGABYTE
    row = [f"{graph.num_nodes} nodes, {graph.num_edges // 2} edges", f"{taken:.2f}", f"{megabytes:.0f}"]
    columns = ["", "s", "extra memory, MB", "at most 200"]
    note = "Eccentricity, degree, clustering coefficient and their 192 features. One dense walk would be 110 MB."
    return [Table("A large graph", columns, [[*row, gate(megabytes, 200)]], note)]


def whole_sets(args: argparse.Namespace) -> list[Table]:
    rows = []
    limits = {"COLLAB": 180.0}
    for name in ("MUTAG", "ENZYMES", "PROTEINS", "IMDB-BINARY", "IMDB-MULTI", "NCI1", "DD", "COLLAB"):
        graphs = graphs_of(name, args.root)
        if graphs is None:
            continue
        signals = STRUCTURE if graphs[0].x is None else ("x",)
        scattering = GeometricScattering(signals=signals)  # type: ignore[arg-type]
        clock = time.perf_counter if args.device == "cuda" else time.process_time
        start = clock()
        features = in_batches(graphs, scattering, args.device)
        synchronize(args.device)
        taken = clock() - start
        limit = limits.get(name, math.inf)
        shown = [name, len(graphs), sum(int(g.num_nodes or 0) for g in graphs), features.shape[1], f"{taken:.1f}"]
        rows.append([*shown, gate(taken, limit) if name in limits else ""])
    columns = ["", "graphs", "nodes", "features", "s", "at most 180"]
    note = "One call each, structural signals included where nodes have no labels. " + missing_of(args, "COLLAB")
    return [Table("All features of whole data sets", columns, rows, note.strip())] if rows else []


# -- learned scales ----------------------------------------------------------------------------------------------------


class GINClassifier(nn.Module):
    """Three layers of PyG's GIN, summed over the nodes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.gin, self.head = GIN(channels, 64, 3), nn.Linear(64, classes)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        return self.head(global_add_pool(self.gin(batch.x, batch.edge_index), batch.batch))


def epochs(args: argparse.Namespace) -> list[Table]:
    rows = []
    for name in ("ENZYMES", "NCI1") if args.device == "cuda" else ("ENZYMES",):
        graphs = graphs_of(name, args.root)
        if graphs is None:
            continue
        channels, classes = graphs[0].x.shape[1], 1 + max(int(g.y) for g in graphs)
        given: dict[str, Any] = {"standardize": "none", "hidden": (64,)}
        models = {
            "PyG's GIN, 3 layers of 64": GINClassifier(channels, classes),
            "learned scales, J=4": ScatteringClassifier(classes, channels, J=4, learnable="legs", **given),
            "fixed scales in the network, J=4": ScatteringClassifier(classes, channels, J=4, **given),
        }
        first = None
        for title, model in models.items():
            taken = seconds(lambda model=model, graphs=graphs: epoch(model, graphs, args.device), args.device)
            first = first or taken
            rows.append([f"{name}: {title}", f"{taken:.2f}", f"{taken / first:.1f}"])
    note = "Forward, backward and step on batches of 64. " + missing_of(args, "ENZYMES")
    return [Table("An epoch of training", ["", "s", "ratio to GIN"], rows, note.strip())] if rows else []


def epoch(model: nn.Module, graphs: list[Data], device: str) -> None:
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in DataLoader(graphs, batch_size=64):
        moved = batch.to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(moved), moved.y).backward()
        optimizer.step()


def missing_of(args: argparse.Namespace, name: str) -> str:
    known = graphs_of(name, args.root) is not None
    return "" if known else f"{name} is not in `--root` and left out."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/TU", help="folder of the TU collection; default data/TU")
    parser.add_argument("--karateclub", help="interpreter of an environment with karateclub (GPL, never imported here)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--markdown", help="file to write")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(memory_of_large_graph("cpu")))
    else:
        tables = []
        for part in (beside_karateclub, beside_dense, size, whole_sets, epochs):
            found = part(arguments)
            tables += found
            for table in found:
                table.show()
        if arguments.markdown:
            about = environment(arguments.device, ["torch", "torch_geometric", "numpy"])
            about.append("- `python benchmarks/geometric_scattering.py --root data/TU --karateclub peers/bin/python`")
            about.append("- processor seconds of one thread; rows for `--device cuda` are not part of this run")
            write_markdown(arguments.markdown, "Geometric scattering: speed and memory", about, tables)
