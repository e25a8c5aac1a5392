"""Independent forms in NumPy and in loops over classes, and the values of the card."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPS = 1e-8
B, N, DIM, K, POSE, CLASSES = 2, 6, 2, 3, 3, 2

# capsules and maps from formulas, so that they can be written down again
CAPSULES = np.maximum(2 * np.sin(np.arange(1, 25)), 0).reshape(B, N, DIM)
FORWARD = np.cos(0.7 * np.arange(72)).reshape(CLASSES, B, K, DIM, POSE)
INVERSE = np.sin(0.3 * np.arange(72) + 0.5).reshape(CLASSES, B, K, DIM, POSE)
COUPLING = (1 / (1 + np.exp(-np.cos(np.arange(12))))).reshape(CLASSES, B, K)

ACTIVITY = [
    [0.8599357565, 0.0737819953, 0.0, 0.8494394146, 0.4045373954, 0.0],
    [0.8224234153, 0.6284595663, 0.0, 0.7739463613, 0.7368400713, 0.0],
]
KEPT = [[0, 3, 4], [0, 3, 4]]
POSE_OF_CLASS_0 = [[0.8565983203, 0.2742687589, -0.4370536854], [-0.0191895635, -0.5558388905, -0.8310685020]]
ERRORS = [[0.6658704516, 0.6636691195], [1.1244844293, 1.0656948330]]
LABELS = [0, 1]
# (term of the data, regulariser, total)
LOSSES = {
    "code": (0.7988375222, 0.1879265956, 0.7988563149),
    "paper": (0.6403510105, 0.4745771220, 0.6403984682),
}

ROUTED_CAPSULES = np.sin(np.arange(1, 9)).reshape(4, 2)
ROUTED_MAPS = np.cos(0.37 * np.arange(48)).reshape(2, 4, 2, 3)
ROUTED_LENGTHS = {
    1: [0.3404202697, 0.6446422092],
    2: [0.2533518724, 0.7163889616],
    3: [0.1537827153, 0.7773905233],
}


def squash(s: np.ndarray) -> np.ndarray:
    """The formula as it stands."""
    square = (s**2).sum(-1, keepdims=True)
    return square / (1 + square) * s / (np.sqrt(square) + EPS)


def direct_head(head: torch.nn.Module, capsules: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Errors and poses by a loop over classes, with dense products of the code vector, from a head's own weights."""
    hyper = head.hyper
    batch, num_caps = capsules.shape[:2]
    code = torch.zeros(batch, num_caps, dtype=capsules.dtype).scatter(1, kept, 1.0)
    active = torch.stack([capsules[b, kept[b]] for b in range(batch)])
    norm = active.norm(dim=-1, keepdim=True)
    active = norm**2 / (1 + norm**2) * active / (norm + EPS)
    classes, (k, dim) = hyper.num_classes, hyper.forward_maps.capsule
    maps_weight, coupling_weight = hyper.code.weight.split([g * w for g, w in hyper.code.blocks], dim=1)
    maps_bias, coupling_bias = hyper.code.bias.split([g * w for g, w in hyper.code.blocks])
    first, last = hyper.code.blocks[0][1], hyper.code.blocks[1][1]

    def network(layers: torch.nn.Module, group: int, weight: Tensor, bias: Tensor, width: int) -> Tensor:
        columns = slice(group * width, (group + 1) * width)
        x = code @ weight[:, columns] + bias[columns]
        for layer in layers:
            x = x.clamp(min=0) if isinstance(layer, torch.nn.ReLU) else x @ layer.weight[group] + layer.bias[group]
        return x

    def maps(j: int, last: torch.nn.Module, group: int) -> Tensor:
        x = network(hyper.hidden, group, maps_weight, maps_bias, first)
        weight = last.weight[j].view(k, dim, x.shape[1], -1)
        return torch.einsum("br,kdre->bkde", x, weight) + last.bias[j].view(k, dim, -1)

    errors, poses = [], []
    for j in range(classes):
        forward, inverse = maps(j, hyper.forward_maps, j), maps(j, hyper.inverse_maps, classes + j)
        share = torch.sigmoid(network(hyper.coupling, j, coupling_weight, coupling_bias, last))
        summed = torch.einsum("bk,bkd,bkde->be", share, active, forward)
        pose = summed / (summed.norm(dim=-1, keepdim=True) + EPS)
        back = torch.einsum("bkde,be->bkd", inverse, pose)
        length = back.norm(dim=-1, keepdim=True)
        back = length**2 / (1 + length**2) * back / (length + EPS)
        errors.append((active - back).norm(dim=-1).mean(1))
        poses.append(pose)
    return torch.stack(errors, 1), torch.stack(poses, 1)


def direct_routing(votes: Tensor, iters: int) -> Tensor:
    """Routing by loops over images and classes."""
    poses = []
    for u in votes:
        logits = torch.zeros(u.shape[:2], dtype=u.dtype)
        for i in range(iters):
            share = logits.exp() / logits.exp().sum(0)
            lengths = []
            for j in range(len(u)):
                s = sum(share[j, n] * u[j, n] for n in range(u.shape[1]))
                square = s.square().sum()
                lengths.append(square / (1 + square) * s / (square.sqrt() + EPS))
            v = torch.stack(lengths)
            if i < iters - 1:
                logits = logits + torch.stack([u[j] @ v[j] for j in range(len(u))])
        poses.append(v)
    return torch.stack(poses)
