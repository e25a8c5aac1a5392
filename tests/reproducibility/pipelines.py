"""Pipelines as functions, for the tests of the engine; other processes import them from here."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path


def score(seeds: dict[str, int], shift: float = 0.0, noise: float = 0.1) -> float:
    shared = random.Random(seeds["split"]).gauss(0, 1)
    return shift + shared + noise * random.Random(seeds["init"]).gauss(0, 1)


def better(seeds: dict[str, int]) -> float:
    return score(seeds, 0.3)


def plain(seeds: dict[str, int]) -> float:
    return score(seeds)


def slow(seeds: dict[str, int]) -> float:
    time.sleep(0.15)
    return score(seeds)


def counted(seeds: dict[str, int]) -> float:
    """Leave a line for every time that the run is carried to its end."""
    time.sleep(0.03)
    with open(Path(os.environ["STUDY_COUNTER"]), "a") as file:
        file.write(f"{seeds['init']}\n")
    return score(seeds)


def failing(seeds: dict[str, int]) -> float:
    if seeds["init"] % 3 == 0:
        raise RuntimeError("the loss is not finite")
    return score(seeds)


def dying(seeds: dict[str, int]) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def hanging(seeds: dict[str, int]) -> float:
    time.sleep(600)
    return 0.0


def torch_sum(seeds: dict[str, int]) -> dict[str, float]:
    import torch

    torch.manual_seed(seeds["init"])
    x = torch.randn(64, 64)
    return {"score": float((x @ x.T).exp().clamp(max=10).sum()), "other": 1.0}


def random_of_its_own(seeds: dict[str, int]) -> float:
    return int.from_bytes(os.urandom(4), "big") / 2**32


def examples_right(seeds: dict[str, int]) -> dict[str, object]:
    rng = random.Random(seeds["init"])
    right = [rng.random() < 0.8 for _ in range(40)]
    return {"score": sum(right) / 40, "per_example": [int(r) for r in right]}
