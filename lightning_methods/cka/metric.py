"""CKA of layers over batches as torchmetrics metrics: averaged over batches, or exact in one pass."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_methods.cka.functional import Kernel, check_kernel, hsic_divisor, significant
from lightning_methods.cka.matrix import Features, HSICProducts, Layers, hsic_products, read_pair, warn_if_dead
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch, check_choice

_EPS = torch.finfo(torch.float64).eps


def _first(stacked: Tensor) -> Tensor:
    return stacked[0]


class _LayerPairs(Metric):
    """What both metrics share: layers that are recognised, sums in float64, and how ranks come together.

    Sums have a shape once there was a batch; before, and on a rank without one, they are single zeros.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    # numbers of layers of both networks (-1: the same network), and widths where they matter
    layers: Tensor

    def __init__(self, zero_division: float, sums: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.zero_division = zero_division
        self.add_state("layers", torch.zeros((), dtype=torch.int64), dist_reduce_fx=_first)
        for name in sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._names: tuple[list[str] | None, list[str] | None] | None = None
        self._shape: list[int] | None = None
        self._in_forward = False

    def reset(self) -> None:
        """Forget all batches; the next ones may be of other layers."""
        super().reset()
        if not self._in_forward:
            self._names = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value."""
        self._in_forward = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._in_forward = False

    def set_dtype(self, dst_type: str | torch.dtype) -> _LayerPairs:
        """Keep the sums in float64: in half precision they would stop growing."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # .to(torch.bfloat16), as Lightning's true half precision does, casts states past set_dtype: only move them
        this = super()._apply(fn, exclude_state=(*exclude_state, *self._defaults))
        defaults: dict[str, Any] = self._defaults
        for name, default in defaults.items():
            setattr(self, name, getattr(self, name).to(self.device))
            defaults[name] = default.to(self.device)
        return this

    def _read(
        self, features_a: Features, features_b: Features | None, *, with_widths: bool
    ) -> tuple[Layers, Layers | None]:
        """Return the layers of a batch in the order of the first one, checked to be the same."""
        a, b = read_pair(features_a, features_b, smallest=0)
        if self._names is None:
            self._names = a.names, b and b.names
        a, b = self._in_order(a, self._names[0]), b and self._in_order(b, self._names[1])
        shape = [len(a.rows), len(b.rows) if b else -1]
        shape += a.widths + (b.widths if b else []) if with_widths else []
        if self.layers.ndim == 0 or shape != self._shape:  # else there is nothing to wait for on a device
            self._check(shape)
            self.layers = torch.tensor(shape, device=self.device)
            self._shape = shape
        return a, b

    def _in_order(self, side: Layers, names: list[str] | None) -> Layers:
        if side.names == names:
            return side
        if side.names is None or names is None or set(side.names) != set(names):
            raise InvalidArgument(
                f"The layers are {side.names or 'without names'}, and were {names or 'without names'} before. Give the "
                f"same layers in every batch, or reset() first."
            )
        order = [side.names.index(name) for name in names]
        return Layers([side.rows[i] for i in order], [side.labels[i] for i in order], names)

    def _check(self, shape: list[int]) -> None:
        known = self.layers.tolist()
        if known not in (0, shape):
            raise ShapeMismatch(
                f"The layers of the two networks are {_described(shape)}, and were {_described(known)} before (or in "
                f"another process). The same layers are needed in every batch."
            )

    def _labels(self) -> list[str]:
        """Return what to call the layers in a message."""
        counts = self.layers.tolist()[:2]
        labels = []
        for argument, count, names in zip(
            ("features_a", "features_b"), counts, self._names or (None, None), strict=True
        ):
            labels += [f"{argument}[{name!r}]" for name in (names or range(max(count, 0)))]
        return labels

    def _finished(self, products: HSICProducts) -> Tensor:
        warn_if_dead(self._labels(), products.alive(int(self.layers[1]) < 0), stacklevel=5)
        return products.normalised(self.zero_division)

    def _undefined(self) -> Tensor:
        count_a, count_b = self.layers.tolist()[:2]
        size = (count_a, count_b if count_b >= 0 else count_a)
        return torch.full(size, math.nan, dtype=torch.float64, device=self.device)

    @abstractmethod
    def _shapes(self, shape: list[int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each sum."""

    def _approach(self, incoming: dict[str, Any]) -> None:
        """Make own sums such that they can be added to others."""

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        if incoming_state["layers"].ndim == 0:
            return
        if self.layers.ndim == 0:
            for name in self._defaults:
                setattr(self, name, incoming_state[name].clone())
            return
        self._check(incoming_state["layers"].tolist())
        self._approach(incoming_state)
        super()._reduce_states(incoming_state)

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        group = process_group or self.process_group
        seen = [t.tolist() for t in dist_sync_fn(self.layers.reshape(-1), group=group)]
        shapes = [shape for shape in seen if shape != [0]]
        if shapes:
            if self.layers.ndim == 0:
                self.layers = torch.tensor(shapes[0], device=self.device)
            for shape in shapes:
                self._check(shape)
            for name, size in self._shapes(shapes[0]).items():
                if getattr(self, name).ndim == 0:
                    setattr(self, name, getattr(self, name).new_zeros(size))
            self._meet(seen, dist_sync_fn, group)
        super()._sync_dist(dist_sync_fn, process_group)

    def _meet(self, seen: list[list[int]], dist_sync_fn: Callable, group: Any) -> None:
        """Make the sums of all processes such that they can be added."""


def _described(shape: list[int]) -> str:
    widths = f" of widths {shape[2:]}" if len(shape) > 2 else ""
    return f"{shape[0]} and {'none' if shape[1] < 0 else shape[1]}{widths}"


class MinibatchCKA(_LayerPairs):
    r"""CKA of all pairs of layers from averages of the unbiased HSIC of batches (Nguyen, Raghu and Kornblith 2021).

    .. math:: \frac{\sum_b w_b \mathrm{HSIC}_1(X_b, Y_b)}
        {\sqrt{\sum_b w_b \mathrm{HSIC}_1(X_b, X_b)} \sqrt{\sum_b w_b \mathrm{HSIC}_1(Y_b, Y_b)}}

    Close to the debiased CKA of all samples for any batch size of some dozens. The batches of other processes are
    simply more batches. Layers of one network may change their widths between batches.

    Shapes:
        `update` takes the features of `A` and `B` layers, `(n, ...)` each; `compute` returns `(A, B)` in float64
        (torchmetrics makes a scalar of a single pair). As the value of one batch, `forward` returns the same, NaN for
        a batch of less than 4.

    Args:
        kernel: `"linear"` or `"rbf"`.
        bandwidth: of the RBF kernel, as a fraction of the median distance within each batch.
        batch_weight: `"n"` weights batches by their size, `"uniform"` weights them alike.
        zero_division: the value for a layer that does not vary.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: for settings that cannot be read, other layers than before, or `compute` before a batch of at
            least 4 samples.
        ShapeMismatch: if the numbers of samples differ.

    Example:
        >>> import torch
        >>> metric = MinibatchCKA()
        >>> for batch in torch.randn(40, 3, generator=torch.manual_seed(0)).split(10):
        ...     metric.update({"input": batch, "scaled": 2 * batch})
        >>> metric.compute().round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)

    Deviations from the paper: HSIC is divided by `n (n - 3)` before it is averaged, so that a short last batch counts
    by its size and not by its square; features are centred before their products, for precision.
    """

    cross: Tensor
    squares_a: Tensor
    squares_b: Tensor
    batches: Tensor
    skipped: Tensor

    def __init__(
        self,
        *,
        kernel: Kernel = "linear",
        bandwidth: float = 0.5,
        batch_weight: Literal["n", "uniform"] = "n",
        zero_division: float = math.nan,
        **kwargs: Any,
    ) -> None:
        super().__init__(zero_division, ("cross", "squares_a", "squares_b", "batches", "skipped"), **kwargs)
        check_kernel(kernel, bandwidth)
        check_choice("batch_weight", batch_weight, ("n", "uniform"))
        self.kernel: Kernel = kernel
        self.bandwidth = bandwidth
        self.batch_weight = batch_weight

    def update(self, features_a: Features, features_b: Features | None = None) -> None:
        """Add a batch; one of less than 4 samples is counted in `skipped` and adds nothing."""
        a, b = self._read(features_a, features_b, with_widths=False)
        if a.samples < 4:
            if self.skipped == 0:
                warnings.warn(
                    f"MinibatchCKA skips a batch of {a.samples} samples, and any other of less than 4. Use "
                    f"drop_last or larger batches.",
                    LightningMethodsWarning,
                    stacklevel=3,
                )
            self.skipped = self.skipped + 1
            return
        with torch.autocast(a.device.type, enabled=False):
            products = hsic_products(a, b, kernel=self.kernel, debiased=True, bandwidth=self.bandwidth)
        weight = (a.samples if self.batch_weight == "n" else 1) / hsic_divisor(a.samples, debiased=True)
        self.cross = self.cross + weight * products.cross.to(self.device)
        self.squares_a = self.squares_a + weight * products.squares_a.to(self.device)
        self.squares_b = self.squares_b + weight * products.squares_b.to(self.device)
        self.batches = self.batches + 1

    def compute(self) -> Tensor:
        """Return the CKA of all pairs."""
        if self.batches == 0:
            if self._in_forward:  # the value of one batch; the sums of all must survive it
                return self._undefined()
            raise InvalidArgument("MinibatchCKA saw no batch of at least 4 samples. Use larger batches.")
        return self._finished(HSICProducts(self.cross, self.squares_a, self.squares_b))

    def _shapes(self, shape: list[int]) -> dict[str, tuple[int, ...]]:
        count_a, count_b = shape[0], shape[1] if shape[1] >= 0 else shape[0]
        return {"cross": (count_a, count_b), "squares_a": (count_a,), "squares_b": (count_b,)}


class StreamingCKA(_LayerPairs):
    r"""Exact linear CKA of all pairs of layers in one pass: the same for any batch size and any number of processes.

    Debiased CKA of all samples at once needs, besides the products of centred features, only the sum of products of
    squared lengths,

    .. math:: \langle \tilde K, \tilde L \rangle = \|X^T Y\|_F^2
        - \frac{n}{n-2} \sum_i \|x_i\|^2 \|y_i\|^2 + \frac{\|X\|_F^2 \|Y\|_F^2}{(n-1)(n-2)},

    and all three follow from sums over samples of products of `(x, |x|^2, 1)` with `(y, |y|^2, 1)`, whatever is
    subtracted from the features: here the median of the first batch, in float64.

    Shapes:
        `update` takes the features of `A` and `B` layers, `(n, ...)` each; `compute` returns `(A, B)` in float64
        (torchmetrics makes a scalar of a single pair). As the value of one batch, `forward` returns the same, NaN for
        too small a batch.

    Args:
        debiased: use the unbiased estimator of HSIC, for at least 4 samples in all.
        max_width: how many features the layers of a network may have in all. The sums take the product of both
            networks' numbers times 8 bytes: 2 GB for 16,384.
        zero_division: the value for a layer that does not vary.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: for settings that cannot be read or other layers than before.
        ShapeMismatch: if the numbers of samples differ, there are too few, or the layers are too wide.

    Example:
        >>> import torch
        >>> from lightning_methods.cka import cka
        >>> x = torch.randn(40, 3, generator=torch.manual_seed(0))
        >>> metric = StreamingCKA()
        >>> for batch in x.split(7):
        ...     metric.update([batch], [batch[:, :2]])
        >>> bool((metric.compute() - cka(x, x[:, :2], debiased=True)).abs() < 1e-6)
        True
    """

    moments: Tensor
    selves: Tensor
    origin: Tensor

    def __init__(
        self, *, debiased: bool = True, max_width: int = 16_384, zero_division: float = math.nan, **kwargs: Any
    ) -> None:
        super().__init__(zero_division, ("moments", "selves"), **kwargs)
        self.add_state("origin", torch.zeros((), dtype=torch.float64), dist_reduce_fx=_first)
        if not (isinstance(max_width, int) and max_width > 0):
            raise InvalidArgument(f"max_width={max_width!r}: a positive number of features is needed.")
        self.debiased = debiased
        self.max_width = max_width

    def update(self, features_a: Features, features_b: Features | None = None) -> None:
        """Add a batch of any size."""
        a, b = self._read(features_a, features_b, with_widths=True)
        for side in (a, b) if b else (a,):
            self._check_width(sum(side.widths))
        if not a.samples:
            return
        rows = [x.to(self.device, torch.float64) for x in (*a.rows, *(b.rows if b else []))]
        if self.origin.ndim == 0:
            # near most samples whatever the first ones are, and exactly the value of a feature that does not vary
            self.origin = torch.nan_to_num(torch.cat([x.median(0).values for x in rows]), posinf=0.0, neginf=0.0)
        rows = [x - o for x, o in zip(rows, self.origin.split([x.shape[1] for x in rows]), strict=True)]
        extended_a = _extended(rows[: len(a.rows)])
        extended_b = extended_a if b is None else _extended(rows[len(a.rows) :])
        self.moments = _plus_product(self.moments, extended_a, extended_b)
        if b is None:
            return
        self.selves = self.selves + torch.cat([(z.T @ z).flatten() for z in (_extended([x]) for x in rows)])

    def compute(self) -> Tensor:
        """Return the CKA of all pairs."""
        n = int(self.moments[-1, -1]) if self.moments.ndim else 0
        if n < (smallest := 4 if self.debiased else 2):
            if self._in_forward:  # the value of one batch; the sums of all must survive it
                return self._undefined()
            raise ShapeMismatch(f"StreamingCKA saw {n} samples in all; at least {smallest} are needed.")
        widths_a, widths_b = self._widths()
        cross, traces_a, traces_b = _products(self.moments, widths_a, widths_b or widths_a, self.debiased)
        if widths_b is None:
            squares_a = squares_b = cross.diagonal()
        else:
            own = [_products(m, [w], [w], self.debiased)[0][0] for m, w in self._own(self.selves)]
            squares_a, squares_b = torch.cat(own).split([len(widths_a), len(widths_b)])
        squares_a = significant(squares_a, traces_a, _EPS, cancels=self.debiased)
        squares_b = significant(squares_b, traces_b, _EPS, cancels=self.debiased)
        return self._finished(HSICProducts(cross, squares_a, squares_b))

    def _check_width(self, width: int) -> None:
        if width > self.max_width:
            raise ShapeMismatch(
                f"The layers have {width:,} features in all, more than max_width={self.max_width:,}: the sums would "
                f"take up to {8e-9 * width**2:,.1f} GB. Average over positions first, use MinibatchCKA, or raise "
                f"max_width."
            )

    def _widths(self) -> tuple[list[int], list[int] | None]:
        count_a, count_b, *widths = self.layers.tolist()
        return widths[:count_a], widths[count_a:] if count_b >= 0 else None

    def _own(self, selves: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield the moments of each layer with itself and its width, those of the second network after the first."""
        widths_a, widths_b = self._widths()
        widths = widths_a + (widths_b or [])
        for part, w in zip(selves.split([(w + 2) ** 2 for w in widths]), widths, strict=True):
            yield part.view(w + 2, w + 2), w

    def _shapes(self, shape: list[int]) -> dict[str, tuple[int, ...]]:
        widths_a, widths_b = self._widths()
        sizes = [sum(w) + len(w) + 1 for w in (widths_a, widths_b or widths_a)]
        shapes: dict[str, tuple[int, ...]] = {"moments": (sizes[0], sizes[1])}
        shapes["origin"] = (sum(widths_a) + sum(widths_b or []),)
        return shapes if widths_b is None else {**shapes, "selves": (sum((w + 2) ** 2 for w in widths_a + widths_b),)}

    def _approach(self, incoming: dict[str, Any]) -> None:
        self._move_to(incoming["origin"])

    def _meet(self, seen: list[list[int]], dist_sync_fn: Callable, group: Any) -> None:
        filled = dist_sync_fn(self.moments[-1, -1].reshape(1), group=group)
        origins = dist_sync_fn(self.origin, group=group)
        self._move_to(next((o for o, n in zip(origins, filled, strict=True) if n > 0), self.origin))

    def _move_to(self, origin: Tensor) -> None:
        """Make the sums those of features from which something else was subtracted."""
        if torch.equal(self.origin, origin):
            return
        widths_a, widths_b = self._widths()
        step = self.origin - origin.to(self.origin)
        steps = [*step.split(widths_a + (widths_b or []))]
        step_a, step_b = (step, step) if widths_b is None else step.split([sum(widths_a), sum(widths_b)])
        self.moments = _moved(_moved(self.moments, step_a, widths_a).T, step_b, widths_b or widths_a).T.contiguous()
        if widths_b is not None:
            own = [
                _moved(_moved(m, s, [w]).T, s, [w]).T for (m, w), s in zip(self._own(self.selves), steps, strict=True)
            ]
            self.selves = torch.cat([m.flatten() for m in own])
        self.origin = origin.clone()


def _extended(rows: list[Tensor]) -> Tensor:
    """Return for each sample all features, the squared lengths of all layers, and 1: `(n, P + L + 1)`."""
    lengths = [x.square().sum(1, keepdim=True) for x in rows]
    return torch.cat([*rows, *lengths, rows[0].new_ones(len(rows[0]), 1)], 1)


def _plus_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return `total + x^T y`, in place where that may be done."""
    if total.ndim == 0 or (total.is_inference() and not torch.is_inference_mode_enabled()):
        return total + x.T @ y
    return total.addmm_(x.T, y)


def _layer_sums(values: Tensor, widths: list[int], dim: int) -> Tensor:
    """Sum over the features of each layer; a value that is not finite stays in its own."""
    return torch.stack([part.sum(dim) for part in values.split(widths, dim)], dim)


def _moved(moments: Tensor, step: Tensor, widths: list[int]) -> Tensor:
    """Return the moments as if `step` had been added to the features of the rows."""
    features, lengths, last = moments.split([len(step), len(widths), 1])
    shifted = features + step[:, None] * last
    lengths = lengths + _layer_sums(2 * step[:, None] * features, widths, 0)
    lengths = lengths + _layer_sums(step.square(), widths, 0)[:, None] * last
    return torch.cat([shifted, lengths, last])


def _products(
    moments: Tensor, widths_a: list[int], widths_b: list[int], debiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inner products of centred linear Gram matrices, and the traces of these, from the moments."""
    parts = [
        row.split([sum(widths_b), len(widths_b), 1], 1) for row in moments.split([sum(widths_a), len(widths_a), 1])
    ]
    (xy, x_r, x_1), (q_y, q_r, q_1), (_, _, n) = parts
    sum_y, sum_r = parts[2][0][0], parts[2][1][0]
    mean_x, mean_y = x_1[:, 0] / n[0, 0], sum_y / n[0, 0]
    length_x, length_y = _layer_sums(mean_x.square(), widths_a, 0), _layer_sums(mean_y.square(), widths_b, 0)
    squares, between = [], []
    for product, m in zip(xy.split(widths_a), mean_x.split(widths_a), strict=True):
        centred = product - n * m[:, None] * mean_y
        squares.append(_layer_sums(centred.square_().sum(0), widths_b, 0))
        between.append(_layer_sums((m @ product) * mean_y, widths_b, 0))
    total = torch.stack(squares)
    traces_a, traces_b = q_1[:, 0] - n[0, 0] * length_x, sum_r - n[0, 0] * length_y
    if not debiased:
        return total, traces_a, traces_b
    # the sum over samples of |x - mean|^2 |y - mean|^2, multiplied out
    quartic = q_r - 2 * _layer_sums(q_y * mean_y, widths_b, 1) - 2 * _layer_sums(x_r * mean_x[:, None], widths_a, 0)
    quartic = quartic + q_1 * length_y + length_x[:, None] * sum_r + 4 * torch.stack(between)
    quartic = quartic - 3 * n * length_x[:, None] * length_y
    size = n[0, 0]
    debiasing = traces_a[:, None] * traces_b / ((size - 1) * (size - 2)) - size / (size - 2) * quartic
    return total + debiasing, traces_a, traces_b
