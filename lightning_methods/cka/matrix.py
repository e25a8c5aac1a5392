"""Similarity of all pairs of layers at once: few matrix products, in bounded memory."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_methods.cka.functional import (
    FEW_SAMPLES,
    centred,
    check_kernel,
    check_samples,
    debiased_products,
    feature_rows,
    gram_means,
    hsic_divisor,
    normalised,
    rbf_scale,
    significant,
)
from lightning_methods.cka.subspaces import (
    basis,
    check_share,
    correlation,
    explained,
    procrustes_of,
    unit_shape,
    warn_if_trivial,
    weighted_correlation,
)
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, check_choice

Features = Sequence[Tensor] | Mapping[str, Tensor]

# entries of the Gram matrices of all layers, or of products of features, that are held at a time: on a CPU few enough
# to stay near its cache, on an accelerator many enough to keep it busy
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 2**22, 2**27
# what the passes over an entry of a Gram matrix cost, in multiplications
_ENTRY_COST = 32


def similarity_matrix(
    features_a: Features, features_b: Features | None = None, *, index: str = "cka", **kwargs: Any
) -> Tensor:
    """Return the similarity of every layer of one network with every layer of another, or of itself.

    CKA and HSIC of all pairs come from a few matrix products, in feature or in sample space, whichever is less work, in
    blocks that bound the memory; comparing a network with itself uses the symmetry. Bases of the other indices are
    computed once per layer.

    Shapes:
        features of `A` and `B` layers, `(n, ...)` each; returns `(A, B)` in float64 without gradient.

    Args:
        features_a: the layers of one network, as a list or by name.
        features_b: those of another on the same samples; those of the same network if not given.
        index: `"cka"`, `"hsic"`, `"cca"`, `"svcca"`, `"pwcca"`, `"linear_regression"` (row from column) or
            `"procrustes"`.
        kwargs: arguments of the index.

    Raises:
        InvalidArgument: for an unknown index or argument, or no layer.
        ShapeMismatch: if the numbers of samples differ, or there are too few.

    Example:
        >>> import torch
        >>> layers = {"first": torch.randn(50, 3), "second": torch.randn(50, 7)}
        >>> similarity_matrix(layers).shape
        torch.Size([2, 2])
    """
    check_choice("index", index, (*_KERNEL_SETTINGS, *_INDICES))
    settings = _settings(index, kwargs)
    a, b = read_pair(features_a, features_b, smallest=4 if settings.get("debiased") else 2)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        if index in _INDICES:
            return _pairwise_matrix(a, b, index, settings)
        zero_division = settings.pop("zero_division", math.nan)
        products = hsic_products(a, b, **settings)
        if index == "hsic":
            return products.cross / hsic_divisor(a.samples, debiased=settings["debiased"])
        warn_if_dead(a.labels + (b.labels if b else []), products.alive(b is None), stacklevel=3)
        return products.normalised(zero_division)


# -- layers ------------------------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """The layers of one network as rows of features, and what to call them in a message."""

    rows: list[Tensor]
    labels: list[str]
    names: list[str] | None

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.rows[0])

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.rows[0].device

    @property
    def widths(self) -> list[int]:
        """How many features each layer has."""
        return [x.shape[1] for x in self.rows]


def read_pair(features_a: Features, features_b: Features | None, *, smallest: int) -> tuple[Layers, Layers | None]:
    """Return the layers of one network or two in one precision, checked to be comparable."""
    a = _read(features_a, "features_a")
    b = None if features_b is None else _read(features_b, "features_b")
    rows = a.rows + (b.rows if b else [])
    labels = a.labels + (b.labels if b else [])
    check_samples(dict(zip(labels, map(len, rows), strict=True)), smallest)
    if len({x.device for x in rows}) > 1:
        places = " and ".join(sorted({str(x.device) for x in rows}))
        raise InvalidArgument(f"The features are on {places}; move them to one device.")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32
    a = a._replace(rows=[x.detach().to(dtype) for x in a.rows])
    return a, b and b._replace(rows=[x.detach().to(dtype) for x in b.rows])


def _read(features: Features, argument: str) -> Layers:
    names = None
    if isinstance(features, Mapping):
        names, features = list(features), list(features.values())
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise InvalidArgument(f"{argument} is a {type(features).__name__}; a list or dict of layers is needed.")
    if not features:
        raise InvalidArgument(f"{argument} is empty; the features of at least one layer are needed.")
    labels = [f"{argument}[{name!r}]" for name in (names or range(len(features)))]
    return Layers([feature_rows(x, label) for x, label in zip(features, labels, strict=True)], labels, names)


# -- CKA and HSIC ------------------------------------------------------------------------------------------------------


class HSICProducts(NamedTuple):
    """Inner products of centred Gram matrices, `(A, B)`, and their squared norms, `(A,)` and `(B,)`, in float64."""

    cross: Tensor
    squares_a: Tensor
    squares_b: Tensor

    def normalised(self, zero_division: float) -> Tensor:
        """Return the CKA."""
        return normalised(self.cross, self.squares_a[:, None], self.squares_b, zero_division)

    def alive(self, same: bool) -> list[bool]:
        """Return which layers vary, those of both networks unless they are the same."""
        return [s != 0 for s in self.squares_a.tolist() + ([] if same else self.squares_b.tolist())]


def warn_if_dead(labels: Sequence[str], alive: Sequence[bool], stacklevel: int) -> None:
    """Warn once for all layers that do not vary."""
    dead = [label for label, varies in zip(labels, alive, strict=True) if not varies]
    if dead:
        warnings.warn(
            f"No similarity is defined with {', '.join(dead)}: the same for all samples (a dead layer?), or different "
            f"for one only. The other layers are not affected.",
            LightningMethodsWarning,
            stacklevel=stacklevel,
        )


def hsic_products(
    a: Layers, b: Layers | None, *, kernel: str = "linear", debiased: bool = False, bandwidth: float = 0.5
) -> HSICProducts:
    """Return the products of all pairs of layers, from features or Gram matrices, whichever is less work."""
    check_kernel(kernel, bandwidth)
    sides = [_Side(side, kernel, debiased, bandwidth) for side in (a, b) if side is not None]
    in_features = kernel == "linear" and not (debiased and a.samples < FEW_SAMPLES) and _features_are_less_work(a, b)
    products = (_feature_products if in_features else _gram_products)(sides[0], sides[-1])
    eps = torch.finfo(a.rows[0].dtype).eps
    squares = [
        significant(square, side.traces, eps, cancels=in_features and debiased) * side.units.square()
        for side, square in zip((sides[0], sides[-1]), products[1:], strict=True)
    ]
    return HSICProducts(products.cross * sides[0].units[:, None] * sides[-1].units, squares[0], squares[1])


def _features_are_less_work(a: Layers, b: Layers | None) -> bool:
    n, wide_a, wide_b = a.samples, sum(a.widths), sum((b or a).widths)
    alone = sum(p * p for p in a.widths + (b.widths if b else []))
    in_features = n * (wide_a * wide_b + alone) if b else n * (wide_a * wide_b + alone) / 2
    layers = len(a.rows) + (len(b.rows) if b else 0)
    in_samples = n * n / 2 * (wide_a + (wide_b if b else 0) + layers * _ENTRY_COST + len(a.rows) * len((b or a).rows))
    return in_features < in_samples


class _Side:
    """The layers of one network, centred and scaled, and what makes centred Gram matrices of them."""

    def __init__(self, layers: Layers, kernel: str, debiased: bool, bandwidth: float) -> None:
        self.kernel, self.debiased, self.n = kernel, debiased, layers.samples
        pairs = [centred(x) for x in layers.rows]
        self.rows = [x for x, _ in pairs]
        self.widths = layers.widths
        scales = torch.stack([scale for _, scale in pairs]).double()
        self.lengths = torch.stack([x.square().sum(1) for x in self.rows])
        if kernel == "linear":
            self.units = scales.square()
            self.traces = self.lengths.double().sum(1)
            # rows of the Gram matrix of centred features sum to 0, without its diagonal to minus that
            sums = -self.lengths.double() if debiased else None
        else:
            self.units = torch.ones_like(scales)
            self.traces = torch.full_like(scales, self.n)
            self.factors = [-1 / rbf_scale(x, bandwidth) for x in self.rows]
            sums = torch.stack([self._row_sums(i) for i in range(len(self.rows))]) - float(debiased)
        means = None if sums is None else gram_means(sums, debiased=debiased)
        self.means = None if means is None else means.to(self.lengths.dtype)

    def fill(self, i: int, rows: slice, columns: slice, out: Tensor) -> None:
        """Write a part of the centred Gram matrix of a layer; only the diagonal is left to be done."""
        if self.kernel == "rbf":
            self._kernel(i, rows, columns, out)
            if self.means is not None:
                out.sub_(self.means[i, rows, None]).sub_(self.means[i, columns])
            return
        x = self.rows[i]
        if self.means is None:
            torch.mm(x[rows], x[columns].T, out=out)
            return
        torch.add(self.means[i, rows, None], self.means[i, columns], out=out)
        out.addmm_(x[rows], x[columns].T, beta=-1)

    def _kernel(self, i: int, rows: slice, columns: slice, out: Tensor) -> None:
        x, lengths = self.rows[i], self.lengths[i]
        torch.add(lengths[rows, None], lengths[columns], out=out)
        out.addmm_(x[rows], x[columns].T, alpha=-2).clamp_(min=0)
        if rows == columns:
            out.diagonal().zero_()
        out.mul_(self.factors[i]).exp_()

    def _row_sums(self, i: int) -> Tensor:
        size = _tile_size(self.n, len(self.rows), self.rows[i].device)
        sums = self.rows[i].new_zeros(self.n, dtype=torch.float64)
        for rows, columns in _tiles(self.n, size):
            tile = self.rows[i].new_empty(rows.stop - rows.start, columns.stop - columns.start)
            self._kernel(i, rows, columns, tile)
            sums[rows] += tile.sum(1)
            if rows != columns:
                sums[columns] += tile.sum(0)
        return sums


def _tile_size(n: int, layers: int, device: torch.device) -> int:
    budget = _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    return min(n, max(32, math.isqrt(budget // layers) // 32 * 32))


def _tiles(n: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of a symmetric matrix on and right of its diagonal."""
    bounds = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    for i, rows in enumerate(bounds):
        for columns in bounds[i:]:
            yield rows, columns


def _gram_products(a: _Side, b: _Side) -> HSICProducts:
    """Sum products of Gram matrices tile by tile, each right of the diagonal for itself and its mirror image."""
    sides = [a] if b is a else [a, b]
    each = [(side, i) for side in sides for i in range(len(side.rows))]
    size, first = _tile_size(a.n, len(each), a.rows[0].device), len(a.rows)
    buffer = a.rows[0].new_empty(len(each) * size * size)
    cross, squares = a.units.new_zeros(first, len(b.rows)), a.units.new_zeros(len(each))
    for rows, columns in _tiles(a.n, size):
        shape = len(each), rows.stop - rows.start, columns.stop - columns.start
        tile = buffer[: math.prod(shape)].view(shape)
        for (side, i), out in zip(each, tile, strict=True):
            side.fill(i, rows, columns, out)
        if rows == columns and a.debiased:
            tile.diagonal(dim1=1, dim2=2).zero_()
        times = 1 if rows == columns else 2
        flat = tile.flatten(1)
        cross += times * (flat[:first] @ flat[-len(b.rows) :].T)
        if b is not a:
            squares += times * torch.linalg.vector_norm(tile, dim=2).double().square().sum(1)
    if b is a:
        return HSICProducts(cross, cross.diagonal(), cross.diagonal())
    return HSICProducts(cross, squares[:first], squares[first:])


def _feature_products(a: _Side, b: _Side) -> HSICProducts:
    """The same from products of features, `||X^T Y||^2`, with what debiasing changes in closed form."""
    columns = torch.cat(b.rows, 1)
    rows = columns if a is b else torch.cat(a.rows, 1)
    cross = block_squares(rows, columns, a.widths, b.widths, upper=a is b)
    if a is b:
        cross = cross.triu() + cross.triu(1).T
        selves = [cross.diagonal()] * 2
    else:
        selves = [
            torch.cat([block_squares(x, x, [w], [w])[0] for x, w in zip(s.rows, s.widths, strict=True)]) for s in (a, b)
        ]
    if not a.debiased:
        return HSICProducts(cross, *selves)
    lengths = [side.lengths.double() for side in (a, b)]
    selves = [
        torch.stack([debiased_products(s, q[None], q[None])[0, 0] for s, q in zip(squares, own, strict=True)])
        for squares, own in zip(selves, lengths, strict=True)
    ]
    return HSICProducts(debiased_products(cross, *lengths), *selves)


def block_squares(x: Tensor, y: Tensor, widths_x: list[int], widths_y: list[int], upper: bool = False) -> Tensor:
    """Return `||X_i^T Y_j||^2` of all pairs of layers that stand side by side, if `upper` for `j >= i` only."""
    starts_x, starts_y = ([0, *itertools.accumulate(widths)] for widths in (widths_x, widths_y))
    layers = torch.arange(len(widths_y)).repeat_interleave(torch.tensor(widths_y)).to(y.device)
    total = y.new_zeros(len(widths_x), len(widths_y), dtype=torch.float64)
    step = _chunk(y.shape[1], y.device)
    for low in range(0, x.shape[1], step):
        high = min(low + step, x.shape[1])
        owners = [i for i in range(len(widths_x)) if starts_x[i] < high and starts_x[i + 1] > low]
        start = starts_y[owners[0]] if upper else 0
        products = x[:, low:high].T @ y[:, start:]
        for i in owners:
            part = products[max(starts_x[i] - low, 0) : starts_x[i + 1] - low]
            # each column goes to its own layer only, as do values that are not finite
            total[i].index_add_(0, layers[start:], part.square_().sum(0).double())
    return total


def _chunk(width: int, device: torch.device) -> int:
    """Return how many columns to multiply with so many others at a time."""
    most, budget = (256, _CPU_ELEMENTS) if device.type == "cpu" else (2048, _DEVICE_ELEMENTS)
    return max(1, min(most, budget // max(1, width)))


# -- the other indices -------------------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """What an index needs of a layer."""

    rows: Tensor
    basis: Tensor
    varies: bool


class _Index(NamedTuple):
    settings: dict[str, Any]
    prepare: Callable[[Tensor, dict[str, Any]], _Prepared]
    compare: Callable[[_Prepared, _Prepared, dict[str, Any]], Tensor]
    symmetric: bool = True
    # whose bases say nothing if they span all samples
    trivial: str = "both"


def _with_basis(x: Tensor, settings: dict[str, Any]) -> _Prepared:
    rows = centred(x)[0] if settings.get("center", True) else x
    return _Prepared(rows, basis(rows, settings.get("threshold")), bool(rows.any()))


def _as_shape(x: Tensor, settings: dict[str, Any]) -> _Prepared:
    rows = centred(x)[0]
    shape = unit_shape(rows)
    return _Prepared(shape, shape, bool(rows.any()))


def _correlation(p: _Prepared, q: _Prepared, settings: dict[str, Any]) -> Tensor:
    return correlation(p.basis, q.basis, settings["statistic"])


_KERNEL_SETTINGS: dict[str, dict[str, Any]] = {
    "cka": {"kernel": "linear", "debiased": False, "bandwidth": 0.5, "zero_division": math.nan},
    "hsic": {"kernel": "linear", "debiased": False, "bandwidth": 0.5},
}
_INDICES = {
    "cca": _Index({"statistic": "rho", "center": True}, _with_basis, _correlation),
    "svcca": _Index({"statistic": "rho", "threshold": 0.99}, _with_basis, _correlation),
    "pwcca": _Index({}, _with_basis, lambda p, q, _: weighted_correlation(p.rows, p.basis, q.basis), symmetric=False),
    "linear_regression": _Index(
        {}, _with_basis, lambda p, q, _: explained(p.rows, q.basis), symmetric=False, trivial="columns"
    ),
    "procrustes": _Index(
        {"kind": "similarity"}, _as_shape, lambda p, q, s: procrustes_of(p.rows, q.rows, s["kind"]), trivial="none"
    ),
}


def _settings(index: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an index with their defaults."""
    known = _KERNEL_SETTINGS[index] if index in _KERNEL_SETTINGS else _INDICES[index].settings
    for name in given:
        check_choice(f"argument of index {index!r}", name, known)
    settings = {**known, **given}
    for name, choices in (("statistic", ("rho", "r2")), ("kind", ("similarity", "distance", "angular"))):
        if name in settings:
            check_choice(name, settings[name], choices)
    if "threshold" in settings:
        check_share("threshold", settings["threshold"])
    if "kernel" in settings:
        check_kernel(settings["kernel"], settings["bandwidth"])
    return settings


def _pairwise_matrix(a: Layers, b: Layers | None, index: str, settings: dict[str, Any]) -> Tensor:
    chosen = _INDICES[index]
    rows = [chosen.prepare(x, settings) for x in a.rows]
    columns = [chosen.prepare(x, settings) for x in b.rows] if b else rows
    bases = {} if chosen.trivial != "both" else {k: p.basis for k, p in zip(a.labels, rows, strict=True)}
    if chosen.trivial != "none":
        bases |= {k: q.basis for k, q in zip((b or a).labels, columns, strict=True)}
    warn_if_trivial(index, bases, center=settings.get("center", True), stacklevel=4)
    values = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=a.device)
    for i, p in enumerate(rows):
        for j, q in enumerate(columns):
            known = b is None and chosen.symmetric and j < i
            values[i, j] = values[j, i] if known else chosen.compare(p, q, settings)
    warn_if_dead(a.labels + (b.labels if b else []), [p.varies for p in (rows + columns if b else rows)], stacklevel=4)
    return values
