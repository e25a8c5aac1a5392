"""Tiny files in the formats of MNIST, CIFAR-10 and the TU collection, so that tests need no download."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np


def write_mnist(root: Path) -> Path:
    """Write 200 training and 30 test images of noise as torchvision's MNIST expects them, and return `root`."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", 200), ("t10k", 30)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
        for kind in ("images-idx3", "labels-idx1"):
            # torchvision asks for the archives only when it downloads
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(b""))
    return root


def write_cifar10(root: Path) -> Path:
    """Write 100 training and 20 test images of noise as torchvision's CIFAR10 expects them, and return `root`.

    torchvision compares checksums, so that a test also has to switch off `CIFAR10._check_integrity` and
    `torchvision.datasets.cifar.check_integrity`.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        entry = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return root


def write_tu(root: Path, name: str, *, classes: int, labels: int = 3, graphs: int = 4) -> Path:
    """Write random rings with chords as a data set of the TU collection, `graphs` of each class, and return `root`."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    edges, owners, of_nodes, of_graphs = [], [], [], []
    for graph in range(classes * graphs):
        n, first = int(rng.integers(6, 12)), len(owners) + 1
        pairs = [(i, (i + 1) % n) for i in range(n)] + [(0, int(rng.integers(2, n - 1)))]
        edges += [f"{first + i}, {first + j}" for a, b in pairs for i, j in ((a, b), (b, a))]
        owners += [str(graph + 1)] * n
        of_nodes += map(str, rng.permutation(np.arange(n) % labels))
        of_graphs.append(str(graph % classes + 1))
    files = {"A": edges, "graph_indicator": owners, "node_labels": of_nodes, "graph_labels": of_graphs}
    for part, lines in files.items():
        (raw / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
    return root
