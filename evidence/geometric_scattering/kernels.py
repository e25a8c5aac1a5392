"""Weisfeiler-Lehman subtree kernels by grakel, in an environment of its own, and their cross-validation here."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.svm import SVC

from lightning_methods.geometric_scattering import CrossValidation
from lightning_methods.geometric_scattering.svm import COSTS

DEPTHS = (1, 2, 3, 4, 5)

# run by the other interpreter, which needs grakel alone
PROGRAM = """
import sys
import numpy as np
from grakel import Graph, WeisfeilerLehman, VertexHistogram

file, out, depths = np.load(sys.argv[1]), sys.argv[2], [int(h) for h in sys.argv[3:]]
data = {name: file[name] for name in file.files}  # the file is read anew at every access
graphs, node, edge = [], 0, 0
for nodes, edges in zip(data["nodes"], data["edges"]):
    pairs = data["pairs"][:, edge : edge + edges].T.tolist()
    names = dict(enumerate(data["names"][node : node + nodes].tolist()))
    graphs.append(Graph({tuple(p): 1 for p in pairs} or {i: {} for i in names}, node_labels=names))
    node, edge = node + nodes, edge + edges
kernel = lambda h: WeisfeilerLehman(n_iter=h, base_graph_kernel=VertexHistogram, normalize=True)
np.savez(out, **{str(h): kernel(h).fit_transform(graphs) for h in depths})
"""


def weisfeiler_lehman(name: str, graphs: list[Any], python: str, folder: Path) -> dict[int, Any]:
    """Return the normalised kernel matrix of each depth; nodes without labels are told apart by their degree."""
    done = folder / f"{name}_wl.npz"
    if not done.is_file():
        given = folder / f"{name}_graphs.npz"
        names = [
            g.x.argmax(1) if g.x is not None else np.bincount(g.edge_index[0], minlength=g.num_nodes) for g in graphs
        ]
        np.savez(
            given,
            nodes=[g.num_nodes for g in graphs],
            edges=[g.num_edges for g in graphs],
            pairs=np.concatenate([g.edge_index.numpy() for g in graphs], 1),
            names=np.concatenate(names),
        )
        subprocess.run([python, "-c", PROGRAM, str(given), str(done), *map(str, DEPTHS)], check=True)
    with np.load(done) as file:
        return {h: file[str(h)] for h in DEPTHS}


def cross_validate(matrices: dict[int, Any], labels: Any, seed: int) -> CrossValidation:
    """Tune depth and cost, and vote, on the folds of `ScatteringSVM` with this seed."""
    parts = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 10)
    votes: list[list[Any]] = [[None] * 10 for _ in parts]
    chosen = np.zeros((10, 9, 2))
    for a, b in itertools.combinations(range(10), 2):
        train = np.concatenate([part for k, part in enumerate(parts) if k not in (a, b)])
        found = {}
        for h, kernel in matrices.items():
            own, onto = kernel[np.ix_(train, train)], [kernel[np.ix_(parts[k], train)] for k in (a, b)]
            for cost in COSTS:
                machine = SVC(C=cost, kernel="precomputed", cache_size=1000).fit(own, labels[train])
                found[cost, h] = [machine.predict(part) for part in onto]
        for val, test, on_val, on_test in ((a, b, 0, 1), (b, a, 1, 0)):
            right = {key: (found[key][on_val] == labels[parts[val]]).sum() for key in sorted(found)}
            best = max(right, key=right.__getitem__)  # of equals the least cost, then depth
            votes[test][val] = found[best][on_test]
            chosen[test, val - (val > test)] = best
    tested = [[vote for vote in row if vote is not None] for row in votes]
    voted = [np.array([max(v := list(column), key=v.count) for column in zip(*row, strict=True)]) for row in tested]
    accuracies = [(vote == labels[part]).mean() for vote, part in zip(voted, parts, strict=True)]
    single = [(np.stack(row) == labels[part]).mean() for row, part in zip(tested, parts, strict=True)]
    return CrossValidation(np.array(accuracies), np.array(single), chosen)
