"""What scattering features say of the classes of graphs: dimensions, subspaces, and which classes are near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch


class ClassSubspaces(NamedTuple):
    """How far the graphs of each class are from the principal subspace of each class.

    Attributes:
        classes: the labels, `(C,)`.
        dimensions: of the subspace of each class, `(C,)`.
        distances: mean squared distance of the graphs of class i to the subspace of class j, `(C, C)`.
        nearest: share of the graphs of class i whose nearest subspace is that of class j, `(C, C)`.
        second: share of the graphs of each class whose own subspace is the second nearest, `(C,)`.
        preference: how near class j is to class i, `(C, C)`, 0 on the diagonal.
    """

    classes: Tensor
    dimensions: Tensor
    distances: Tensor
    nearest: Tensor
    second: Tensor
    preference: Tensor


def z_scores(features: Tensor) -> Tensor:
    """Return features divided by their standard deviation about their mean, those that are always 0 left out.

    Shapes:
        `(n, F)`; returns `(n, F')` in float64.

    Args:
        features: one row a graph.

    Raises:
        ShapeMismatch: for less than two rows.
        InvalidArgument: for features that are not finite.

    Example:
        >>> import torch
        >>> z_scores(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([[-1.],
                [ 1.]], dtype=torch.float64)
    """
    if features.ndim != 2 or len(features) < 2:
        raise ShapeMismatch(f"The features have the shape {tuple(features.shape)}; (n, F) with n > 1 is needed.")
    x = features.double()
    if not bool(x.isfinite().all()):
        raise InvalidArgument(f"Feature {int((~x.isfinite()).any(0).nonzero()[0])} is not finite in every graph.")
    x = x[:, x.square().sum(0) > 0]
    deviation = x.std(0, correction=0)
    varies = deviation > 1e-12 * x.abs().amax(0)
    return torch.where(varies, (x - x.mean(0)) / deviation.where(varies, 1.0), 0.0)


def pca_dimensions(features: Tensor, shares: Sequence[float] = (0.5, 0.8, 0.9, 0.99)) -> list[int]:
    """Return how many principal components hold each share of the variance.

    Shapes:
        `(n, F)`.

    Args:
        features: one row a graph, standardised or not.
        shares: of the variance, from 0 to below 1.

    Raises:
        InvalidArgument: for a share outside 0 to 1.

    Example:
        >>> import torch
        >>> pca_dimensions(torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0])))
        [1, 2, 2, 3]
    """
    _, held = _spectrum(features)
    return [_count(held, share) for share in shares]


def class_subspaces(features: Tensor, labels: Tensor, share: float = 0.9) -> ClassSubspaces:
    r"""Return the distances of all graphs to the principal subspaces of all classes.

    .. math:: D(i, j) = \frac{1}{|i|} \sum_{x \in i} \| x - C_j^T C_j x \|^2, \quad
        \mathrm{pref}(i, j) = w_j \Big/ \min\!\Big(\frac{D(i, j)}{D(i, i)}, \frac{D(j, i)}{D(j, j)}\Big)

    with the principal components :math:`C_j` of class j that hold a share of its variance, and the share :math:`w_j` of
    the graphs of class j whose nearest subspace is that of another class.

    Shapes:
        features `(n, F)`, labels `(n,)`.

    Args:
        features: one row a graph, standardised as by `z_scores`.
        labels: class of each graph.
        share: of the variance of a class that its subspace holds, 0.9 in the paper.

    Raises:
        InvalidArgument: for less than two classes or a class of one graph.
        ShapeMismatch: if features and labels do not fit together.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> class_subspaces(x, torch.tensor([0, 0, 1, 1])).distances.round(decimals=6)
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    if labels.shape != (len(features),):
        raise ShapeMismatch(f"{len(features)} graphs and labels of shape {tuple(labels.shape)}; one a graph is needed.")
    classes, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2 or int(counts.min()) < 2:
        raise InvalidArgument(
            f"There are {len(classes)} classes of {counts.tolist()} graphs; at least two classes of two are needed."
        )
    x = features.double()
    subspaces = [_components(x[place == c], share) for c in range(len(classes))]
    # the graphs as they are, not about the mean of the class: as in the paper's tables
    residuals = torch.stack([(x - x @ basis.T @ basis).square().sum(1) for basis in subspaces], 1)
    of_class = torch.nn.functional.one_hot(place).double() / counts
    distances = of_class.T @ residuals
    order = residuals.argsort(dim=1, stable=True)
    nearest = of_class.T @ torch.nn.functional.one_hot(order[:, 0], len(classes)).double()
    second = of_class.T @ (order[:, 1] == place).double()
    relative = distances / distances.diagonal()[:, None].clamp(min=torch.finfo(torch.float64).tiny)
    preference = (1 - nearest.diagonal()) / torch.minimum(relative, relative.T).clamp(min=1e-300)
    return ClassSubspaces(
        classes,
        torch.tensor([len(basis) for basis in subspaces]),
        distances,
        nearest,
        second,
        preference.fill_diagonal_(0),
    )


def filter_responses(
    J: int = 5, points: int = 200, *, scales: Tensor | None = None, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    r"""Return eigenvalues of the walk from 0 to 1 and what each wavelet makes of them.

    .. math:: \psi_j(\omega) = \omega^{2^{j-1}} - \omega^{2^j}

    Shapes:
        `scales` `(J + 1, T)`; returns `(points,)` and `(J, points)`.

    Args:
        J: number of scales, unless some are given.
        points: how many eigenvalues.
        scales: how much of each diffusion time 1, 2, ... is in each low-pass filter (`ScatteringEncoder.scales`).
        alpha: laziness of the walk of these scales; the eigenvalues are still those of the walk that is half lazy.

    Example:
        >>> omega, response = filter_responses(J=2, points=3)
        >>> response
        tensor([[0.0000, 0.2500, 0.0000],
                [0.0000, 0.1875, 0.0000]], dtype=torch.float64)
    """
    omega = torch.linspace(0, 1, points, dtype=torch.float64)
    if scales is None:
        lowpass = torch.stack([omega**2**j for j in range(J + 1)])
    else:
        lazy = alpha + (1 - alpha) * (2 * omega - 1)
        times = torch.arange(1, scales.shape[1] + 1, dtype=torch.float64)
        lowpass = scales.detach().cpu().double() @ lazy ** times[:, None]
    return omega, lowpass[:-1] - lowpass[1:]


def _components(features: Tensor, share: float) -> Tensor:
    """Return the fewest principal components that hold more than a share of the variance, as rows."""
    vh, held = _spectrum(features)
    return vh[: _count(held, share)]


def _spectrum(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal components as rows, and which share of the variance the first ones hold together."""
    x = features.double()
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    total = s.square().sum()
    return vh, (s.square() / total).cumsum(0) if total else s[:0]


def _count(held: Tensor, share: float) -> int:
    if not 0 <= share < 1:
        raise InvalidArgument(f"share={share}: a share of the variance from 0 to below 1 is needed.")
    return int((held <= share).sum()) + 1 if len(held) else 0
