"""Weights estimated from data: label shift (BBSE, RLLS, EM) and covariate shift (density ratio)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from torch import Tensor

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.importance_weighting.functional import check_number, check_pair, check_weights, check_whole

#: above this condition number of the confusion matrix BBSE multiplies noise by hundreds
WORRYING_CONDITION = 1e3
#: above this one it has no digit left
HOPELESS_CONDITION = 1e10


def condition_number(confusion: Tensor) -> float:
    """Return by how much solving with a confusion matrix can multiply errors; infinite if it is singular.

    Raises:
        ShapeMismatch: if it is not square.
        InvalidArgument: if an entry is not finite.

    Example:
        >>> condition_number(torch.eye(3))
        1.0
    """
    c = torch.as_tensor(confusion).double()
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not len(c):
        raise ShapeMismatch(f"The confusion matrix has the shape {tuple(c.shape)}; (C, C) is needed.")
    if not torch.isfinite(c).all():
        raise InvalidArgument("The entries of the confusion matrix are not all finite.")
    s = torch.linalg.svdvals(c)
    return float(s[0] / s[-1]) if s[-1] > 0 else math.inf


def bbse(confusion: Tensor, target_prediction: Tensor) -> Tensor:
    r"""Return class weights for label shift by black box shift estimation (Lipton, Wang and Smola 2018).

    .. math:: \hat w = C^{-1} \hat q, \qquad C_{ij} = \hat P_s(\hat y = i, y = j), \quad \hat q_i = \hat P_t(\hat y = i)

    where the source is labelled data that the classifier was not trained on, and the target unlabelled. Negative
    weights are set to 0.

    Shapes:
        confusion `(C, C)` (rows are predictions), target_prediction `(C,)` -> `(C,)` float64. Counts are divided by
        their sum. Probabilities summed over samples give the soft version.

    Raises:
        ShapeMismatch: if the two do not fit together.
        InvalidArgument: for a matrix of conditional probabilities, entries that are no probabilities, or a singular
            matrix (with its condition number).

    Example:
        >>> bbse(torch.tensor([[40.0, 10.0], [10.0, 40.0]]), torch.tensor([30.0, 70.0]))
        tensor([0.3333, 1.6667], dtype=torch.float64)
    """
    c, q = _joint(confusion, target_prediction)
    condition = condition_number(c)
    if condition > HOPELESS_CONDITION:
        raise InvalidArgument(
            f"The confusion matrix has the condition number {condition:.2g}: some classes are never predicted, or "
            f"cannot be told apart. Use rlls or em_prior_shift, or more labelled data."
        )
    if condition > WORRYING_CONDITION:
        warnings.warn(
            f"The confusion matrix has the condition number {condition:.2g}: BBSE multiplies the noise in it. "
            f"rlls or em_prior_shift is safer.",
            LightningMethodsWarning,
        )
    return torch.linalg.solve(c, q).clamp(min=0)


def rlls(confusion: Tensor, target_prediction: Tensor, delta: float = 0.01, *, gamma: float = 1.0) -> Tensor:
    r"""Return class weights for label shift by regularised learning (Azizzadenesheli et al. 2019).

    .. math:: \hat\theta = \arg\min_\theta \lVert C\theta - (\hat q - C \mathbf 1) \rVert_2 + \Delta
        \lVert\theta\rVert_2, \qquad \hat w = 1 + \gamma\hat\theta

    Defined for singular matrices too. Norms are not squared: with a well-conditioned matrix and small `delta` the
    result is exactly that of `bbse`, and with a large one no shift at all. Negative weights are set to 0.

    Shapes:
        as `bbse`.

    Args:
        confusion: joint, rows are predictions.
        target_prediction: shares of the predictions on the target.
        delta: bound on the error of the confusion matrix, of order `1 / sqrt(n)`.
        gamma: how far to go from no shift, from 0 to 1.

    Raises:
        ShapeMismatch: if the two do not fit together.
        InvalidArgument: for settings or entries outside of their range.

    Example:
        >>> rlls(torch.tensor([[40.0, 10.0], [10.0, 40.0]]), torch.tensor([30.0, 70.0]), delta=10.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    check_number("delta", delta, 0)
    check_number("gamma", gamma, 0, 1)
    c, q = _joint(confusion, target_prediction)
    left, s, right = torch.linalg.svd(c)
    b = left.T @ (q - c.sum(1))
    theta = right.T @ _penalized(s, b, float(delta))
    return (1 + gamma * theta).clamp(min=0)


def _penalized(s: Tensor, b: Tensor, delta: float) -> Tensor:
    """Minimise `|s * x - b| + delta * |x|` with un-squared norms; `x = s b / (s^2 + ridge)` for some ridge.

    Where the gradient is 0 the ridge is `delta |s x - b| / |x|`, that is `sum (s^2 - delta^2) b^2 / (s^2 + ridge)^2 =
    0`.
    """
    reachable = s > s.max() * 1e-12

    def slope(log_ridge: float) -> float:
        return float((((s / delta) ** 2 - 1) * (b / (s**2 + math.exp(log_ridge))) ** 2).sum())

    if delta == 0 or float((s * b).norm()) == 0:
        return torch.where(reachable, b / s.where(reachable, torch.ones_like(s)), 0.0)
    if float((s * b).norm()) <= delta * float(b.norm()):
        return torch.zeros_like(b)
    scale = math.log(float(s.max()) ** 2)
    low, high = scale - 60.0, scale + 60.0
    if slope(low) >= 0:  # the residual vanishes: the penalty is too small to matter
        return torch.where(reachable, b / s.where(reachable, torch.ones_like(s)), 0.0)
    ridge = math.exp(brentq(slope, low, high, xtol=1e-13, rtol=1e-13)) if slope(high) > 0 else math.inf
    return s * b / (s**2 + ridge)


def em_prior_shift(
    probabilities: Tensor,
    source_prior: Tensor,
    *,
    counts: Tensor | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 10_000,
) -> Tensor:
    r"""Return the class shares of an unlabelled target by expectation maximisation (Saerens et al. 2002).

    .. math:: q_c \leftarrow \frac1n \sum_i \frac{p_i(c)\, q_c / \pi_c}{\sum_{c'} p_i(c')\, q_{c'} / \pi_{c'}}

    The maximum of a concave likelihood. The class weights are `q / source_prior`. Hard to beat where the probabilities
    are calibrated on the source (Alexandari et al. 2020), see `calibrate`, and wrong where they are not.

    Shapes:
        probabilities `(N, C)`, source_prior `(C,)` -> `(C,)` float64; with counts `(R, N)` -> `(R, C)`.

    Args:
        probabilities: of each class, for the samples of the target.
        source_prior: class shares of the data on which the probabilities are calibrated.
        counts: how often each sample counts, for bootstrap replicates all at once.
        tolerance: largest change of a share at which to stop.
        max_iterations: stop after so many with a warning.

    Raises:
        ShapeMismatch: if the arguments do not fit together.
        InvalidArgument: for rows that are no probabilities, a class of prior 0 that has probability, counts that are
            negative or none, and settings outside of their range.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
        >>> em_prior_shift(p, torch.tensor([0.5, 0.5]))
        tensor([0.7009, 0.2991], dtype=torch.float64)
    """
    check_number("tolerance", tolerance, 0)
    check_whole("max_iterations", max_iterations, 1)
    p, prior = torch.as_tensor(probabilities).detach().double().cpu(), check_weights(source_prior, "The source prior")
    if p.ndim != 2 or prior.shape != p.shape[1:]:
        raise ShapeMismatch(f"probabilities {tuple(p.shape)} and source_prior {tuple(prior.shape)}: (N, C) and (C,).")
    if not len(p) or not torch.isfinite(p).all() or (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
        raise InvalidArgument("Every row of probabilities must be numbers of at least 0 that sum to 1; softmax first.")
    prior = prior / prior.sum()
    if (p[:, prior == 0] > 0).any():
        raise InvalidArgument("A class has prior 0 in the source and probability in the target; leave the class out.")
    ratio = torch.where(prior > 0, p / prior.clamp(min=1e-300), 0.0)
    n = torch.ones(1, len(p), dtype=torch.float64) if counts is None else check_weights(counts, "The counts")
    if n.ndim != 2 or n.shape[1] != len(p) or not bool((n.sum(1) > 0).all()):
        raise ShapeMismatch(
            f"The counts have the shape {tuple(n.shape)}; (R, {len(p)}) is needed, with a sample in each row."
        )
    n = n / n.sum(1, keepdim=True)
    q = prior.expand(len(n), -1)
    for _ in range(max_iterations):
        evidence = (q @ ratio.T).clamp(min=1e-300)
        new = q * ((n / evidence) @ ratio)
        new = new / new.sum(1, keepdim=True)
        change, q = float((new - q).abs().max()), new
        if change <= tolerance:
            break
    else:
        warnings.warn(
            f"EM of the class shares still changed by {change:.1g} after {max_iterations} iterations.",
            LightningMethodsWarning,
        )
    return q[0] if counts is None else q


def calibrate(logits: Tensor, labels: Tensor, *, bias: bool = True) -> tuple[float, Tensor]:
    r"""Return temperature and biases under which softmax probabilities are calibrated on labelled data.

    .. math:: p = \mathrm{softmax}(z / T + b)

    by maximum likelihood: bias-corrected temperature scaling (Alexandari et al. 2020), or with `bias=False`
    temperature scaling (Guo et al. 2017).

    Shapes:
        logits `(N, C)`, labels `(N,)` -> the temperature, and `(C,)` float64 of mean 0.

    Raises:
        ShapeMismatch: if there is not one label for each row.
        InvalidArgument: if there is no sample, a logit is not finite, or a label is no class.

    Example:
        >>> z = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]]).repeat(5, 1)
        >>> y = torch.tensor([0, 1, 0, 1]).repeat(5)
        >>> y[0] = 1
        >>> calibrate(z, y, bias=False)[0] > 1
        True
    """
    z, given = torch.as_tensor(logits).detach().double().cpu(), torch.as_tensor(labels).detach().cpu()
    y = given.long()
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1]:
        raise ShapeMismatch(f"logits {tuple(z.shape)} and labels {tuple(y.shape)}: (N, C) and (N,) are needed.")
    if not len(z) or not torch.isfinite(z).all():
        raise InvalidArgument("Calibration needs at least one sample, and finite logits.")
    if given.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
        raise InvalidArgument(
            f"The labels are {given.dtype}, from {int(y.min())} to {int(y.max())}; whole numbers from 0 to "
            f"{z.shape[1] - 1} are needed."
        )
    z = z - z.max(1, keepdim=True).values
    classes = z.shape[1]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        # a faint pull to T=1, b=0: with separable data or absent classes the likelihood has no maximum
        loss = torch.nn.functional.cross_entropy(z * t[0].exp() + t[1:], y) + 1e-4 * t.square().sum()
        loss.backward()
        assert t.grad is not None
        if not bias:
            t.grad[1:] = 0
        return float(loss.detach()), t.grad.numpy()

    found = minimize(objective, np.zeros(classes + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    b = torch.from_numpy(found.x[1:].copy())
    return float(np.exp(-found.x[0])), b - b.mean()


def density_ratio_weights(
    source: Tensor,
    target: Tensor,
    *,
    folds: int = 5,
    regularization: float = 1.0,
    clip: tuple[float, float] = (1 / 20, 20.0),
    discriminator: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Return weights for covariate shift: how much more often each source sample occurs in the target.

    .. math:: w(x) = \frac{n_s}{n_t} \cdot \frac{g(x)}{1 - g(x)}, \qquad g(x) = \hat P(\text{target} \mid x)

    Cross-fitted: the weight of a sample comes from a discriminator that was trained on the other folds, since one that
    saw the sample tells its domain too well. Look at `effective_sample_size` of the result.

    Shapes:
        source `(N, ...)`, target `(M, ...)`, flattened -> `(N,)` float64.

    Args:
        source: features of the training samples.
        target: features of where the model is used.
        folds: at least 2.
        regularization: of the logistic regression, in units of one sample's loss on standardised features.
        clip: smallest and largest weight.
        discriminator: instead of logistic regression, a function of training features, domains (0 source, 1 target) and
            test features that returns the probability of the target.
        seed: draws the folds.

    Raises:
        ShapeMismatch: if the features are of different widths, or the discriminator returns another shape.
        InvalidArgument: for too few samples, features that are not finite, settings outside of their range, or a
            discriminator whose numbers are no probabilities.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> source, target = torch.randn(400, 1, generator=generator), 1 + torch.randn(400, 1, generator=generator)
        >>> w = density_ratio_weights(source, target)
        >>> bool(w[source[:, 0] > 1].mean() > 2 * w[source[:, 0] < 0].mean())
        True
    """
    xs, xt = (_rows(name, x) for name, x in (("source", source), ("target", target)))
    if xs.shape[1] != xt.shape[1]:
        raise ShapeMismatch(f"The source has {xs.shape[1]} features and the target {xt.shape[1]}.")
    check_whole("folds", folds, 2)
    check_whole("seed", seed, 0)
    check_pair("clip", clip)
    check_number("regularization", regularization, 0, open_="low")
    if min(len(xs), len(xt)) < folds:
        raise InvalidArgument(
            f"folds={folds} with {len(xs)} source and {len(xt)} target samples: 2 folds at least, and a sample of "
            f"both in each."
        )
    if not (torch.isfinite(xs).all() and torch.isfinite(xt).all()):
        raise InvalidArgument("The features are not all finite.")
    x, domain = torch.cat([xs, xt]), torch.cat([torch.zeros(len(xs)), torch.ones(len(xt))]).double()
    generator = torch.Generator().manual_seed(seed)
    fold = torch.cat([torch.randperm(len(part), generator=generator) % folds for part in (xs, xt)])
    predict = discriminator or (lambda a, d, b: _logistic(a, d, b, regularization))
    weights = torch.empty(len(xs), dtype=torch.float64)
    for k in range(folds):
        train, test = fold != k, (fold == k) & (domain == 0)
        g = torch.as_tensor(predict(x[train], domain[train], x[test])).detach().double().cpu().reshape(-1)
        if g.shape != (int(test.sum()),):
            raise ShapeMismatch(f"The discriminator returned {tuple(g.shape)} for {int(test.sum())} samples.")
        if not bool(((g >= 0) & (g <= 1)).all()):  # also false for NaN
            raise InvalidArgument(
                f"The discriminator returned numbers from {float(g.min())} to {float(g.max())}; probabilities of the "
                f"target are needed."
            )
        odds = g / (1 - g).clamp(min=1e-12)
        shares = (domain[train] == 0).sum() / (domain[train] == 1).sum()
        weights[test[: len(xs)]] = (shares * odds).clamp(*clip)
    return check_weights(weights, "The discriminator's weights")


def _rows(name: str, x: Tensor) -> Tensor:
    if x.ndim < 1:
        raise ShapeMismatch(f"The {name} is a single number; (N, ...) features are needed.")
    return (x if x.ndim > 1 else x[:, None]).detach().flatten(1).double().cpu()


def _logistic(x: Tensor, domain: Tensor, other: Tensor, regularization: float) -> Tensor:
    """Fit an L2-regularised logistic regression on standardised features, and return probabilities for others."""
    mean, scale = x.mean(0), x.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    a, d = ((x - mean) / scale).numpy(), domain.numpy()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = a @ theta[1:] + theta[0]
        wrong = 1 / (1 + np.exp(-np.clip(z, -500, 500))) - d
        value = float(np.logaddexp(0, z).sum() - d @ z + 0.5 * regularization * theta[1:] @ theta[1:])
        gradient = np.concatenate([[wrong.sum()], a.T @ wrong + regularization * theta[1:]])
        return value / len(d), gradient / len(d)

    theta = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    z = ((other - mean) / scale) @ torch.from_numpy(theta[1:]) + theta[0]
    return torch.sigmoid(z)


def _joint(confusion: Tensor, target_prediction: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return both as checked float64 shares that sum to 1."""
    c = check_weights(confusion, "The entries of the confusion matrix")
    q = check_weights(target_prediction, "The shares of the target's predictions")
    if c.ndim != 2 or c.shape[0] != c.shape[1] or q.shape != c.shape[:1]:
        raise ShapeMismatch(f"confusion {tuple(c.shape)} and target_prediction {tuple(q.shape)}: (C, C) and (C,).")
    ones = torch.ones(len(c), dtype=torch.float64)
    if len(c) > 1 and (torch.allclose(c.sum(0), ones) or torch.allclose(c.sum(1), ones)):
        raise InvalidArgument(
            "The confusion matrix holds conditional probabilities (its columns or rows sum to 1). The joint one is "
            "needed, P(predicted i and true j), or counts."
        )
    return c / c.sum(), q / q.sum()
