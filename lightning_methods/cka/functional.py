"""Similarity of representations: CKA and its relatives (Kornblith, Norouzi, Lee and Hinton, ICML 2019).

All indices compare `n` samples as seen by two layers, centre the features first, and treat wider tensors as flattened.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

Kernel = Literal["linear", "rbf"]
P = ParamSpec("P")

# below so many samples a Gram matrix costs nothing, and its products are exact where those of features cancel
FEW_SAMPLES = 128
# up to so many samples all distances are ordered to find their median
_ORDERED_SAMPLES = 512
# entries of a matrix of distances that are held at a time: on a CPU what stays in its cache
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 2**18, 2**25


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Switch autocast off: products of features in half precision lose what distinguishes layers."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        with torch.autocast(given[0].device.type if given else "cpu", enabled=False):
            return function(*args, **kwargs)

    return computed


@full_precision
def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "linear",
    debiased: bool = False,
    bandwidth: float = 0.5,
    zero_division: float = math.nan,
) -> Tensor:
    r"""Return the centered kernel alignment of two representations, 1 for the same up to rotation and scale.

    .. math:: \mathrm{CKA}(K, L) = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}
        \qquad \text{linear, biased:}\quad \frac{\|Y^T X\|_F^2}{\|X^T X\|_F\,\|Y^T Y\|_F}

    Shapes:
        x `(n, ...)`, y `(n, ...)`, flattened to rows; returns a scalar.

    Args:
        x: features of `n` samples, n at least 2 (4 if debiased); half precisions are computed in float32.
        y: features of the same samples, of any width.
        kernel: `"linear"` or `"rbf"`.
        debiased: use the unbiased estimator of HSIC, which does not grow with the width; it can be negative.
        bandwidth: of the RBF kernel, as a fraction of the median distance (0.2, 0.4 and 0.8 are usual). The median is
            over all `n * n` pairs, those of a sample with itself included, and has a gradient.
        zero_division: what to return where a representation does not vary at all.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are too few.
        InvalidArgument: for an unknown kernel or a bandwidth that is not positive.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(6, 2) ** 2
        >>> print(f"{cka(x, 3 * x.flip(1) + 1):.4f}")
        1.0000
    """
    a, b = comparable(x, y, smallest=4 if debiased else 2)
    return _alignment(a, b, (kernel, kernel), debiased, bandwidth, zero_division)


@full_precision
def hsic(x: Tensor, y: Tensor, *, kernel: Kernel = "linear", debiased: bool = False, bandwidth: float = 0.5) -> Tensor:
    r"""Return the Hilbert-Schmidt independence criterion of two representations, the unnormalised CKA.

    .. math:: \mathrm{HSIC}_0 = \frac{\mathrm{tr}(KHLH)}{(n-1)^2}, \qquad
        \mathrm{HSIC}_1 = \frac{\langle \tilde K, \tilde L \rangle}{n (n - 3)} \text{, U-centred } \tilde K, \tilde L

    Shapes:
        x `(n, ...)`, y `(n, ...)`; returns a scalar.

    Args:
        x: features of `n` samples.
        y: features of the same samples.
        kernel: `"linear"` or `"rbf"`.
        debiased: the unbiased estimator of Song et al. 2012, with `n` at least 4.
        bandwidth: of the RBF kernel, as a fraction of the median distance.

    Raises:
        ShapeMismatch: if the numbers of samples differ, or there are too few.
        InvalidArgument: for an unknown kernel or a bandwidth that is not positive.

    Example:
        >>> import torch
        >>> print(f"{hsic(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])):.1f}")
        4.0
    """
    a, b = comparable(x, y, smallest=4 if debiased else 2)
    (p, scale_p), (q, scale_q) = centred(a), centred(b)
    gram_x, gram_y, inner = _operands(p, q, (kernel, kernel), debiased, bandwidth)
    value = inner(gram_x, gram_y) / hsic_divisor(len(a), debiased=debiased)
    return (value * (scale_p.double() * scale_q).square() if kernel == "linear" else value).to(a.dtype)


@full_precision
def kernel_target_alignment(
    x: Tensor, labels: Tensor, *, kernel: Kernel = "linear", debiased: bool = False, bandwidth: float = 0.5
) -> Tensor:
    """Return how well a representation is aligned with the labels: CKA with the kernel that is 1 within a class.

    Shapes:
        x `(n, ...)`, labels `(n,)`; returns a scalar.

    Args:
        x: features of `n` samples.
        labels: integer class of each sample.
        kernel: of the features.
        debiased: use the unbiased estimator of HSIC.
        bandwidth: of the RBF kernel, as a fraction of the median distance.

    Raises:
        ShapeMismatch: if there is not one label per sample.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> print(f"{kernel_target_alignment(x, torch.tensor([0, 0, 1, 1])):.2f}")
        1.00
    """
    if not isinstance(labels, Tensor):
        raise InvalidArgument(
            f"labels is a {type(labels).__name__}; a tensor of one integer class per sample is needed."
        )
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ShapeMismatch(
            f"The labels are {tuple(labels.shape)} of {labels.dtype}; one integer class per sample, (n,), is needed."
        )
    onehot = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1])
    a, b = comparable(x, onehot.to(x.device), smallest=4 if debiased else 2)
    return _alignment(a, b, (kernel, "linear"), debiased, bandwidth, math.nan)


# -- features ----------------------------------------------------------------------------------------------------------


def feature_rows(x: Tensor, name: str) -> Tensor:
    """Return features as rows `(n, p)` in float32 or float64."""
    if not isinstance(x, Tensor):
        raise InvalidArgument(f"{name} is a {type(x).__name__}; a tensor of features is needed.")
    if x.is_complex():
        raise InvalidArgument(f"{name} holds complex numbers; compare torch.view_as_real of it instead.")
    if x.ndim < 2:
        raise ShapeMismatch(
            f"{name} has the shape {tuple(x.shape)}; (n, p) with one row per sample is needed, or (n, ...) to be "
            f"flattened. A single feature is x[:, None]."
        )
    return x.flatten(1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def check_samples(counts: dict[str, int], smallest: int) -> None:
    """Raise `ShapeMismatch` unless all have the same number of samples, and that is enough."""
    if len(set(counts.values())) > 1:
        first, *rest = counts.items()
        other = next(c for c in rest if c[1] != first[1])
        raise ShapeMismatch(
            f"{first[0]} has {first[1]} samples and {other[0]} {other[1]}; features of the same samples in the same "
            f"order are needed."
        )
    if (n := next(iter(counts.values()))) < smallest:
        why = "the debiased estimator" if smallest == 4 else "any comparison"
        raise ShapeMismatch(f"There are {n} samples; {why} needs at least {smallest}.")


def comparable(x: Tensor, y: Tensor, *, smallest: int = 2) -> tuple[Tensor, Tensor]:
    """Return the features of two layers as rows in one precision, checked to be of the same samples."""
    a, b = feature_rows(x, "x"), feature_rows(y, "y")
    check_samples({"x": len(a), "y": len(b)}, smallest)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return centred features, divided by a power of 2 near their largest, and that power.

    In float32 this keeps two to three digits more than centring the Gram matrix; the mean of large numbers is itself
    rounded, hence the second one. What varies by no more than rounding is made 0, and no sum of squares overflows.
    """
    offset = _largest(x[:1])
    x = x - x.mean(0)
    x -= x.mean(0)
    factor, scale = power_of_two(_largest(x), offset)
    x *= factor
    return x, scale


def power_of_two(size: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return a factor that brings `size` near 1, 0 if it is but rounding of `offset`, and what undoes it."""
    rounding = size <= 8 * torch.finfo(size.dtype).eps * offset
    scale = torch.where(rounding, 1.0, torch.exp2(torch.log2(size).floor().clamp(min=-126)))
    return torch.where(rounding, 0.0, 1 / scale), scale


def _largest(x: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros(())
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high)


# -- HSIC --------------------------------------------------------------------------------------------------------------

Inner = Callable[[Tensor, Tensor], Tensor]


def _operands(
    x: Tensor, y: Tensor, kernels: tuple[str, str], debiased: bool, bandwidth: float
) -> tuple[Tensor, Tensor, Inner]:
    """Return two representations and their inner product, in feature or in sample space, whichever is less work."""
    check_kernel(kernels[0], bandwidth)
    n, p, q = len(x), x.shape[1], y.shape[1]
    if "rbf" not in kernels and n >= FEW_SAMPLES and p * p + q * q + p * q < n * (p + q):
        return x, y, _debiased_features if debiased else _features
    grams = [_centred_gram(z, kernel, debiased, bandwidth) for z, kernel in zip((x, y), kernels, strict=True)]
    return grams[0], grams[1], _entries


def _entries(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    return (gram_x * gram_y).sum().double()


def _features(x: Tensor, y: Tensor) -> Tensor:
    """Return `<K, L>` of linear Gram matrices from their features."""
    return (x.T @ y).square().sum().double()


def _debiased_features(x: Tensor, y: Tensor) -> Tensor:
    lengths = [z.square().sum(1).double()[None] for z in (x, y)]
    return debiased_products(_features(x, y), lengths[0], lengths[1])[0, 0]


def debiased_products(products: Tensor, lengths_a: Tensor, lengths_b: Tensor) -> Tensor:
    """Turn `||X^T Y||^2` of centred features into the product of U-centred Grams: `(A, B)`, `(A, n)`, `(B, n)`."""
    n = lengths_a.shape[1]
    totals = lengths_a.sum(1)[:, None] * lengths_b.sum(1)
    return products - n / (n - 2) * (lengths_a @ lengths_b.T) + totals / ((n - 1) * (n - 2))


def _centred_gram(x: Tensor, kernel: str, debiased: bool, bandwidth: float) -> Tensor:
    """Return the Gram matrix of centred features, centred (`HKH`) or U-centred (Szekely and Rizzo 2014)."""
    gram = x @ x.T
    if kernel == "rbf":
        lengths = gram.diagonal()
        gram = torch.exp(-(lengths[:, None] + lengths - 2 * gram).clamp(min=0) / rbf_scale(x, bandwidth))
    if not debiased:
        return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    gram = gram.masked_fill(itself, 0.0)
    means = gram_means(gram.sum(0), debiased=True)
    return (gram - means - means[:, None]).masked_fill(itself, 0.0)


def gram_means(sums: Tensor, *, debiased: bool) -> Tensor:
    """Return what centring subtracts from row i and from column i, given row sums `(..., n)`, without the diagonal if
    debiased.
    """
    n = sums.shape[-1]
    total = sums.sum(-1, keepdim=True)
    return sums / (n - 2) - total / (2 * (n - 1) * (n - 2)) if debiased else sums / n - total / (2 * n * n)


def hsic_divisor(n: int, *, debiased: bool) -> int:
    """Return what an inner product of centred Gram matrices is divided by to be HSIC."""
    return n * (n - 3) if debiased else (n - 1) ** 2


def significant(squares: Tensor, traces: Tensor, eps: float, *, cancels: bool) -> Tensor:
    """Return squared norms of centred Grams, 0 where they are but rounding of a Gram matrix of that trace.

    A layer in which a single sample is active has the debiased norm 0. Where it is the difference of larger numbers
    (`cancels`), rounding leaves more.
    """
    return torch.where(squares <= traces.square() * (8 * eps if cancels else (16 * eps) ** 2), 0.0, squares)


def normalised(cross: Tensor, squares_a: Tensor, squares_b: Tensor, zero_division: float) -> Tensor:
    """Return the cosine from inner products and squared norms, of a shape that fits; NaN stays NaN."""
    # the root of what is replaced has a finite gradient
    root_a, root_b = (torch.where(s == 0, 1.0, s).sqrt() for s in (squares_a, squares_b))
    return torch.where((squares_a == 0) | (squares_b == 0), zero_division, cross / (root_a * root_b))


def _alignment(
    x: Tensor, y: Tensor, kernels: tuple[str, str], debiased: bool, bandwidth: float, zero_division: float
) -> Tensor:
    a, b = centred(x)[0], centred(y)[0]
    gram_x, gram_y, inner = _operands(a, b, kernels, debiased, bandwidth)
    squares = []
    for features, gram, kernel in ((a, gram_x, kernels[0]), (b, gram_y, kernels[1])):
        square = inner(gram, gram)
        trace = features.detach().square().sum() if kernel == "linear" else torch.ones_like(square) * len(features)
        eps = torch.finfo(x.dtype).eps
        squares.append(significant(square, trace.double(), eps, cancels=inner is _debiased_features))
    return normalised(inner(gram_x, gram_y), squares[0], squares[1], zero_division).to(x.dtype)


def check_kernel(kernel: str, bandwidth: float) -> None:
    """Raise `InvalidArgument` for an unknown kernel or a bandwidth that is not positive."""
    check_choice("kernel", kernel, ("linear", "rbf"))
    if isinstance(bandwidth, str) or not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise InvalidArgument(f"bandwidth={bandwidth!r}: a positive fraction of the median distance is needed.")


# -- the median distance -----------------------------------------------------------------------------------------------


def rbf_scale(x: Tensor, bandwidth: float) -> Tensor:
    """Return `2 sigma^2` with sigma a fraction of the median distance, infinite where that is 0."""
    median = median_distance(x)
    return torch.where(median == 0, math.inf, 2 * bandwidth**2 * median)


def median_distance(x: Tensor) -> Tensor:
    """Return the median of all `n^2` squared distances, the zeros of the diagonal included and the middle two averaged.

    Exact, differentiable, and without holding the distances: a sample of pairs tells between which two values the
    median is, and only the few per cent of distances between them are kept and ordered.
    """
    n = len(x)
    if not x.isfinite().all():
        return x.new_full((), math.nan)
    # in order there are n zeros, then each distance of two samples twice; of those, counted once, these are the middle
    half = n // 2
    last = half * half - 1 if n % 2 else half * (half - 1)
    first = last if n % 2 else last - 1
    with torch.no_grad():
        pairs = _ranked_pairs(x.detach(), max(first, 0), last)
    ends = [(x[i] - x[j]).square().sum() for i, j in pairs]
    return ends[1] / 2 if first < 0 else (ends[0] + ends[1]) / 2


def _ranked_pairs(x: Tensor, first: int, last: int) -> list[Tensor]:
    """Return the pairs of samples whose distances have these ranks among those of all pairs."""
    low, high = _bracket(x, first / math.comb(len(x), 2))
    while True:
        below, values, pairs = 0, [], []
        for start, distances in _distance_blocks(x):
            below += int((distances < low).sum())
            found = ((distances >= low) & (distances <= high)).nonzero()
            values.append(distances[found[:, 0], found[:, 1]])
            pairs.append(found + start)
        inside, where = torch.cat(values), torch.cat(pairs)
        if below <= first and last < below + len(inside):
            order = inside.argsort()
            return [where[order[rank - below]] for rank in (first, last)]
        low, high = -1.0, torch.finfo(x.dtype).max  # the sample misled: order all of them


def _distance_blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield squared distances of some rows and all from the first of them on; those of no interest are infinite."""
    lengths = x.square().sum(1)
    rows = max(1, (_CPU_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS) // len(x))
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        others = lengths[start:]
        distances = torch.addmm(others[: stop - start, None] + others, x[start:stop], x[start:].T, alpha=-2)
        distances = distances.clamp_(min=0)
        square = distances[:, : stop - start]
        square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril(), math.inf)
        yield start, distances


def _bracket(x: Tensor, share: float) -> tuple[float, float]:
    """Return two distances between which the one at this share of all pairs is, five standard errors wide each way."""
    n = len(x)
    if n <= _ORDERED_SAMPLES:
        return -1.0, torch.finfo(x.dtype).max
    generator = torch.Generator().manual_seed(0)  # leaves the user's random numbers alone
    x = x[torch.randperm(n, generator=generator).to(x.device)]
    turns = range(1, n // _ORDERED_SAMPLES + 1)
    sample = torch.cat([(x - x.roll(turn, 0)).square().sum(1) for turn in turns]).sort().values
    margin = 2.5 / math.sqrt(len(sample))
    low, high = (int((share + m) * len(sample)) for m in (-margin, margin))
    return float(sample[max(low, 0)]), float(sample[min(high, len(sample) - 1)])
