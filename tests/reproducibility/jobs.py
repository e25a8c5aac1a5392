"""What the tests of the streams run in two processes."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_methods.reproducibility import SOURCES
from tests.reproducibility.training import BATCH, SIZE, Noisy, Run, Split

SETTINGS = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
VARIED = [s for s in SOURCES if s != "numerical"]


def distributed() -> dict[str, Any]:
    """Vary every source, and train with other loaders, on this rank."""
    found: dict[str, Any] = {"base": _run(), "again": _run(before=1), "workers": _run(data=Split(2))}
    found |= {source: _run({source: 1}) for source in VARIED}
    data = Noisy(quiet=True)
    for order in (0, 1):
        loader = DataLoader(data, BATCH, sampler=WeightedRandomSampler(torch.ones(SIZE), SIZE))
        found[f"weighted {order}"] = _run({"order": order}, loaders=loader)
    found["rows"] = _rows(_train(loaders=DataLoader(data, BATCH, shuffle=True)), data.x)
    return found


def _train(seeds: Any = None, **kwargs: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return Run(folder, seeds, **SETTINGS, **kwargs)


def _run(seeds: Any = None, **kwargs: Any) -> dict[str, str]:
    return _train(seeds, **kwargs).found


def _rows(run: Run, rows: torch.Tensor) -> list[list[int]]:
    """The rows that this rank saw in each epoch."""
    epochs = [torch.cat([x for e, x in run.module.batches if e == epoch]) for epoch in range(2)]
    return [(rows[None] == x[:, None]).all(-1).nonzero()[:, 1].tolist() for x in epochs]
