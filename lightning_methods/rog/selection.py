"""Which of several classifiers is best, by a validation split whose labels may be wrong too."""

from __future__ import annotations

import torch
from torch import Tensor

_TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # Gaussians of many features are too sure
_STEPS = 40  # of expectation and maximisation
_FIRST = 0.5  # share of right labels at the start
_PRIOR = 1.0  # labels that each class is thought to have beside those seen, spread over all


@torch.no_grad()
def noisy_log_likelihood(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""Return the log-likelihood `(n,)` of labels that may be wrong, for the noise that explains them best.

    .. math:: \log \sum_k T_{k, y} P(k \mid x)^{1/\tau} / Z

    The transition `T` from the true class to the label and the temperature are those of the highest total: by
    expectation and maximisation, and from a short list. Plain agreement with the labels hardly tells a classifier
    that follows a frequent confusion from one that does not; this does.

    Args:
        log_probabilities: `(n, C)`.
        labels: `(n,)` from 0 to C - 1.

    Example:
        >>> right = torch.arange(300) % 3
        >>> labels = torch.where(torch.arange(300) % 5 < 2, (right + 1) % 3, right)  # two in five are of the next class
        >>> poor = torch.where(torch.arange(300) % 7 < 2, (right + 1) % 3, right)  # goes wrong as the labels do
        >>> said = [torch.nn.functional.one_hot(c, 3).add(0.02).log() for c in (right, poor)]
        >>> good, bad = (float(noisy_log_likelihood(x, labels).mean()) for x in said)
        >>> good > bad
        True
    """
    y, x = labels.to(log_probabilities.device), log_probabilities.double()
    best = torch.full((len(y),), -torch.inf, dtype=torch.float64, device=x.device)
    for temperature in _TEMPERATURES:
        found = _best_transition((x / temperature).softmax(1), y)
        best = found if found.sum() > best.sum() else best
    return best


def clearly_better(new: Tensor, old: Tensor) -> bool:
    """Tell whether paired scores `(n,)` are higher by over one standard error of their mean difference."""
    difference = new - old
    if len(difference) < 2:
        return False
    return bool(difference.mean() > difference.std() / len(difference) ** 0.5)


def _best_transition(probability: Tensor, y: Tensor) -> Tensor:
    c = probability.shape[1]
    transition = torch.full((c, c), (1 - _FIRST) / max(c - 1, 1), dtype=torch.float64, device=y.device)
    transition.fill_diagonal_(_FIRST)
    for _ in range(_STEPS):
        joint = probability * transition[:, y].T
        transition = torch.full_like(transition, _PRIOR / c)
        transition.index_add_(1, y, (joint / joint.sum(1, keepdim=True)).T)
        transition /= transition.sum(1, keepdim=True)
    return (probability * transition[:, y].T).sum(1).log()
