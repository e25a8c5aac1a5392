"""Tiny files in the formats of MNIST and CIFAR-10, so that tests need no download."""

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
