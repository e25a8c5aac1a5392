"""What makes meta-training hard: both estimators over the unroll length, and slices of the outer loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.estimators import Episode, draw_noise, estimate
from lightning_methods.learned_optimizer.functional import combine_estimators
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.tasks import ModuleTask
from lightning_methods.learned_optimizer.weights import load_weights
from lightning_methods.report import curves

_SIGMA = 0.01


class UnrollVariance(NamedTuple):
    """Of one unroll length: the sum over the weights of the variances of both estimators, and the mean weight."""

    steps: int
    reparam: float
    es: float
    weight: float


def chaotic(weights: str = "metz19", factor: float = 1.0) -> tuple[Architecture, Tensor]:
    """Return a learned optimizer whose steps are `factor` times as large: near the edge of stability, and beyond it.

    Args:
        weights: by name or file.
        factor: of the step.

    Example:
        >>> chaotic(factor=4.0)[0].step_mult
        0.04
    """
    own = load_weights(weights)
    settings = own.architecture.to_dict()
    settings["step_mult"] *= factor
    return Architecture(**settings), own.theta


def estimator_variances(
    task: ModuleTask, architecture: Architecture, theta: Tensor, lengths: Sequence[int], *, pairs: int = 6
) -> list[UnrollVariance]:
    """Return the variances of both estimators for unrolls of several lengths from the start of an inner training.

    Args:
        task: with data.
        architecture: of the optimizer.
        theta: its weights.
        lengths: inner steps.
        pairs: that the variances are taken over.
    """
    problem, seeds = InnerTraining(architecture, task, outer_loss="train"), list(range(pairs))
    rows = []
    for steps in lengths:
        found = estimate(problem, theta, Episode(0, steps, problem.begin(theta, seeds)), steps, seeds, loss_clip=1e3)
        assert found.reparam is not None
        assert found.es is not None
        _, weight = combine_estimators(found.reparam, found.es)
        spread = [float(x.double().var(0).sum().nan_to_num(torch.inf)) for x in (found.reparam, found.es)]
        rows.append(UnrollVariance(steps, spread[0], spread[1], float(weight.mean())))
    return rows


def loss_slice(
    task: ModuleTask, architecture: Architecture, theta: Tensor, steps: int, offsets: Tensor, *, samples: int = 16
) -> tuple[Tensor, Tensor]:
    """Return the outer loss of one inner training along a random direction of the weights, raw and smoothed by noise.

    Shapes:
        offsets `(K,)` -> `(K,)`, `(K,)`.

    Args:
        task: with data.
        architecture: of the optimizer.
        theta: its weights.
        steps: inner steps.
        offsets: distances from the weights.
        samples: of the noise (deviation 0.01) that the smoothed loss is the mean over.
    """
    problem = InnerTraining(architecture, task, outer_loss="train")
    direction = draw_noise([10**6], theta, 1.0)[0]
    direction = direction / direction.norm()
    points = theta + offsets.to(theta).unsqueeze(1) * direction
    noise = torch.cat([torch.zeros_like(theta).unsqueeze(0), draw_noise(range(samples), theta, _SIGMA)])
    losses = []
    for shift in noise:
        both = torch.cat([points + shift] * 2)
        # the same start and the same batches at every point
        state = {k: v[:1].expand(len(both), *v.shape[1:]).clone() for k, v in problem.begin(both[:2], [0]).items()}
        state["order"] = state["order"][: len(points)]
        found, _ = problem.unroll(both, state, 0, steps, [0] * len(points), differentiable=False)
        losses.append(found[: len(points)].mean(1).nan_to_num(10.0).clamp(max=10.0))
    return losses[0], torch.stack(losses[1:]).mean(0)


def variance_figure(rows: Sequence[UnrollVariance]) -> Any:
    """Return the picture of `estimator_variances`."""
    steps = [row.steps for row in rows]
    lines = {
        "reparameterisation": (steps, [_log(row.reparam) for row in rows]),
        "evolution strategies": (steps, [_log(row.es) for row in rows]),
    }
    return curves(lines, title="Variance of the two estimators", x_label="inner steps", y_label="log10 of the variance")


def slice_figure(offsets: Tensor, raw: Tensor, smoothed: Tensor) -> Any:
    """Return the picture of `loss_slice`."""
    x = offsets.tolist()
    lines = {"raw": (x, raw.tolist()), "smoothed": (x, smoothed.tolist())}
    return curves(lines, title="A slice of the outer loss", x_label="distance from the weights", y_label="outer loss")


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).clamp(min=1e-30).log10())
