"""The rules in float64 NumPy, written without the package's code."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.weights import Weights

DECAYS = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
TIMES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])

START = [[math.cos(k) for k in range(6)], [-1.0, 0.0, 1.0], [0.5]]
SHAPES = [(2, 3), (3,), (1,)]

AFTER_3 = [
    [0.999580768278, 0.54019219842, -0.4165102095, -0.990599799246, -0.654098046545, 0.283215246708],
    [-1.000390793452, -5.771530390035e-4, 0.9989499091626],
    [0.498816764433],
]
AFTER_2_ZEROS = [
    [0.999426567721, 0.539921458375, -0.416230753212, -0.990195163654, -0.653758797095, 0.283402823269],
    [-1.000164643431, -1.484638100211e-4, 0.9994813087138],
    [0.499546584672],
]


def parts() -> dict[str, np.ndarray]:
    """Return the weights of the public oracle."""
    i, j = np.arange(19)[:, None], np.arange(32)[None]
    w0 = np.sin(1 + 0.7 * (32 * i + j)) / math.sqrt(19)
    i, k = np.arange(32)[:, None], np.arange(2)[None]
    w1 = np.sin(2 + 0.7 * (2 * i + k)) / math.sqrt(32)
    return {"w0": w0, "b0": 0.1 * np.cos(np.arange(32)), "w1": w1, "b1": np.array([0.05, -0.02])}


def weights() -> Weights:
    """Return the same as a file would give them."""
    flat = np.concatenate([x.ravel() for x in parts().values()])
    return Weights("oracle", Architecture(), torch.from_numpy(flat).float())


def gradient(tensor: int, t: int) -> np.ndarray:
    """Return the gradient of a tensor at a step."""
    k = np.arange(len(START[tensor]))
    return np.sin(0.3 * k + t + 2 * tensor) * (0.1 if tensor == 0 else 10)


def paper_step(p: np.ndarray, g: np.ndarray, m: np.ndarray, t: int, w: dict[str, np.ndarray]) -> tuple:
    """Return one tensor `(n,)` and its momenta `(n, 6)` after a step of the paper's rule."""
    m = DECAYS * m + (1 - DECAYS) * g[:, None]
    x = np.concatenate([g[:, None], p[:, None], m], 1)
    x = x / np.sqrt(1e-5 + (x**2).mean(0, keepdims=True))
    x = np.concatenate([x, np.tile(np.tanh(t / TIMES - 1), (len(p), 1))], 1)
    d, mag = (np.maximum(x @ w["w0"] + w["b0"], 0) @ w["w1"] + w["b1"]).T
    return p - d * np.exp(1e-3 * mag) * 1e-3, m


def small_fc(p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the 28 inputs `(28, r, c)` of a matrix with more rows than columns, and its accumulators after a step."""
    d3 = np.array([0.9, 0.99, 0.999])[:, None, None]
    m = d3 * s["momentum"] + (1 - d3) * g
    v = 0.999 * s["rms"] + 0.001 * g**2
    row = d3 * s["row"] + (1 - d3) * (g**2 + 1e-30).mean(0, keepdims=True)
    column = d3 * s["column"] + (1 - d3) * (g**2 + 1e-30).mean(1, keepdims=True)

    def safe(x: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(np.maximum(x, 1e-9))

    by = safe(row / (row.mean(2, keepdims=True) + 1e-9)) * safe(column)
    full = np.ones_like(m)
    inverse = 1 / np.sqrt(v + 1e-6)
    rows = [g[None], p[None], m, v, m * inverse, inverse, g * by, row * full, column * full]
    rows += [full / np.sqrt(row + 1e-8), full / np.sqrt(column + 1e-8), m * by]
    return np.concatenate(rows), {"momentum": m, "rms": v, "row": row, "column": column}


def naive_step(p: Tensor, g: Tensor, m: Tensor, t: int, w: dict[str, Tensor]) -> None:
    """Update a tensor and its momenta `(n, 6)` in place as other libraries do: features beside features, `(n, 19)`."""
    decays = torch.tensor(DECAYS, dtype=p.dtype)
    m.mul_(decays).add_(g.reshape(-1, 1) * (1 - decays))
    x = torch.cat([g.reshape(-1, 1), p.detach().reshape(-1, 1), m], 1)
    x = x * torch.rsqrt(1e-5 + x.square().mean(0, keepdim=True))
    time = torch.tanh(t / torch.tensor(TIMES, dtype=p.dtype) - 1)
    x = torch.cat([x, time.expand(len(x), -1)], 1)
    out = (x @ w["w0"] + w["b0"]).relu() @ w["w_out"] + w["b_out"]
    p.sub_((out[:, 0] * torch.exp(out[:, 1] * 1e-3) * 1e-3).view_as(p))
