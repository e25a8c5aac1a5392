"""Moments of scattering coefficients over the nodes of each graph, and the names of the features that they are."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from lightning_methods.geometric_scattering.functional import Path, scattering_paths

# coefficients up to so many rounding errors of their signal are 0: measured on complete graphs there are 18 at most
_NOISE = 128


def scattering_moments(
    coefficients: Tensor,
    batch: Tensor | None = None,
    batch_size: int | None = None,
    *,
    Q: int = 4,
    normalized: bool = True,
    noise_floor: bool = True,
) -> Tensor:
    r"""Return the moments of scattering coefficients over the nodes of each graph.

    .. math:: S x(p, q) = \sum_{l} |U[p]x(v_l)|^q, \quad 1 \le q \le Q \qquad \text{(equations 4 to 6)}

    Normalised, these are mean, variance, skewness (with the correction for small samples) and excess kurtosis, of the
    signal itself for the empty path.

    Shapes:
        `coefficients` `(n, paths, F)`, the signal itself first; `batch` `(n,)`; returns `(batch_size, F * paths * Q)`,
        for every signal all paths, for every path all moments.

    Args:
        coefficients: what `scattering_coefficients` returned.
        batch: to which graph each node belongs, in any order; by default all to one.
        batch_size: number of graphs; by default one more than the largest in `batch`.
        Q: number of moments, 4 in the paper; normalised ones above the fourth are standardised central moments.
        normalized: whether they are normalised, as in the paper's classification, or sums, as in its exploration.
        noise_floor: whether coefficients of a graph that are but rounding of its signal count as 0. Without it their
            skewness and kurtosis are those of rounding errors.

    Raises:
        InvalidArgument: for Q below 1 or graphs outside `batch_size`.
        ShapeMismatch: if coefficients and batch do not fit together.

    Example:
        >>> import torch
        >>> from lightning_methods.geometric_scattering import lazy_random_walk, scattering_coefficients
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> delta = torch.eye(4)[:, :1].double()
        >>> coefficients = scattering_coefficients(lazy_random_walk(path), delta, J=1)
        >>> scattering_moments(coefficients, Q=2, normalized=False)
        tensor([[1.0000, 1.0000, 0.2500, 0.0312]], dtype=torch.float64)

    Deviations from the paper: undefined skewness is 0 and undefined excess kurtosis -3, of graphs without nodes and of
    coefficients that are the same everywhere; and the noise floor.
    """
    if isinstance(Q, bool) or not isinstance(Q, int) or Q < 1:
        raise InvalidArgument(f"Q={Q!r}: at least one moment is needed, the paper has 4.")
    if coefficients.ndim != 3:
        raise ShapeMismatch(
            f"The coefficients have the shape {tuple(coefficients.shape)}; (n, paths, F) is needed, as "
            f"scattering_coefficients returns them."
        )
    batch, size = checked_batch(batch, batch_size, len(coefficients), coefficients.device)
    u = coefficients if coefficients.dtype == torch.float64 else coefficients.float()
    with torch.autocast(u.device.type, enabled=False):
        if noise_floor:
            u = _without_noise(u, batch, size, torch.finfo(coefficients.dtype).eps)
        moments = _normalized_moments(u, batch, size, Q) if normalized else _sums_of_powers(u, batch, size, Q)
    return moments.permute(0, 2, 1, 3).flatten(1)


def moment_contributions(
    coefficients: Tensor, *, Q: int = 4, normalized: bool = True, noise_floor: bool = True
) -> Tensor:
    r"""Return what each node of one graph adds to each of its moments.

    .. math:: S x(p, q) = \sum_l |U[p]x(v_l)|^q

    is the sum of the terms that are returned; normalised moments likewise, but that those of the kurtosis, which is in
    excess of 3, add up to 3 more.

    Shapes:
        `coefficients` `(n, paths, F)`; returns `(n, F * paths * Q)`, columns as of `scattering_moments`.

    Args:
        coefficients: what `scattering_coefficients` returned for one graph.
        Q: number of moments.
        normalized: whether they are normalised.
        noise_floor: whether coefficients that are but rounding of their signal count as 0.

    Raises:
        InvalidArgument: for Q below 1.
        ShapeMismatch: for coefficients of another form.

    Example:
        >>> import torch
        >>> moment_contributions(torch.tensor([[[1.0]], [[-2.0]]]), Q=2, normalized=False)
        tensor([[1., 1.],
                [2., 4.]])
    """
    moments = scattering_moments(coefficients, Q=Q, normalized=normalized, noise_floor=noise_floor)
    u = coefficients if coefficients.dtype == torch.float64 else coefficients.float()
    n, paths, width = u.shape
    if noise_floor and n:
        batch = torch.zeros(n, dtype=torch.int64, device=u.device)
        u = _without_noise(u, batch, 1, torch.finfo(coefficients.dtype).eps)
    if not normalized:
        terms = torch.stack([u.abs() ** q for q in range(1, Q + 1)], -1)
    else:
        centred = u - u.mean(0)
        parts = [u / max(n, 1)]
        variance = moments.reshape(width, paths, Q)[..., 1:2].sum(-1).T  # 0 of what varies by rounding only
        for q in range(2, Q + 1):
            scale = variance.where(variance > 0, 1.0) ** (q / 2) if q > 2 else 1.0
            bias = (n * (n - 1)) ** 0.5 / (n - 2) if q == 3 and n > 2 else 1.0
            parts.append((centred**q * bias / (max(n, 1) * scale)).where(variance > 0, 0.0))
        terms = torch.stack(parts, -1)
    return terms.transpose(1, 2).flatten(1)


def checked_batch(batch: Tensor | None, batch_size: int | None, nodes: int, device: torch.device) -> tuple[Tensor, int]:
    """Return to which graph each node belongs and how many graphs there are."""
    if batch is None:
        batch = torch.zeros(nodes, dtype=torch.int64, device=device)
        batch_size = 1 if batch_size is None else batch_size
    if batch.shape != (nodes,):
        raise ShapeMismatch(f"batch has the shape {tuple(batch.shape)} for {nodes} nodes; ({nodes},) is needed.")
    if batch_size is None:
        batch_size = int(batch.max()) + 1 if nodes else 0
    if nodes and not torch.compiler.is_compiling() and not 0 <= int(batch.min()) <= int(batch.max()) < batch_size:
        raise InvalidArgument(
            f"batch holds {int(batch.min())} to {int(batch.max())}; from 0 to {batch_size - 1} is needed with "
            f"batch_size={batch_size}."
        )
    return batch, batch_size


def segment_sums(values: Tensor, batch: Tensor, size: int) -> Tensor:
    """Return the sum over the nodes of each graph, `(n, ...)` to `(size, ...)`."""
    return values.new_zeros(size, *values.shape[1:]).index_add_(0, batch, values)


def _largest_of_graph(values: Tensor, batch: Tensor, size: int) -> Tensor:
    index = batch.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
    return values.new_zeros(size, *values.shape[1:]).scatter_reduce(0, index, values, "amax")


def _without_noise(u: Tensor, batch: Tensor, size: int, eps: float) -> Tensor:
    """Return the coefficients with those of a path that are only rounding of the signal set to 0, graph by graph."""
    largest = _largest_of_graph(u.detach().abs(), batch, size)
    noise = largest <= _NOISE * eps * largest[:, :1]
    noise[:, 0] = False  # the signal itself
    return u.masked_fill(noise[batch], 0)


def _sums_of_powers(u: Tensor, batch: Tensor, size: int, Q: int) -> Tensor:
    """Return `(size, paths, F, Q)`."""
    u = u.abs()
    power, sums = u, [segment_sums(u, batch, size)]
    for _ in range(1, Q):
        power = power * u
        sums.append(segment_sums(power, batch, size))
    return torch.stack(sums, -1)


def _normalized_moments(u: Tensor, batch: Tensor, size: int, Q: int) -> Tensor:
    """Return `(size, paths, F, Q)`."""
    counts = segment_sums(u.new_ones(len(u)), batch, size)[:, None, None]
    some = counts.clamp(min=1)
    mean = segment_sums(u, batch, size) / some
    moments = [mean]
    if Q > 1:
        deviation = u - mean[batch]
        power = deviation * deviation
        variance = segment_sums(power, batch, size) / some
        # what varies by rounding only does not vary; eps of the working precision
        scale = torch.finfo(u.dtype).eps * (segment_sums(u.detach().abs(), batch, size) / some)
        constant = variance.detach() <= (_NOISE * scale).square()
        variance = variance.masked_fill(constant, 0)
        moments.append(variance)
        # two masks: a division by the variance of a constant would give a gradient that is not a number
        safe = variance.masked_fill(constant, 1)
        for q in range(3, Q + 1):
            power = power * deviation
            standardised = segment_sums(power, batch, size) / some / safe ** (q / 2)
            moments.append(_corrected(standardised.masked_fill(constant, 0), counts, q))
    return torch.stack(moments, -1)


def _corrected(standardised: Tensor, counts: Tensor, q: int) -> Tensor:
    """Return skewness for small samples, excess kurtosis, or a higher standardised moment as it is."""
    if q == 3:
        n = counts.clamp(min=3)
        return standardised * torch.where(counts > 2, (n * (n - 1)).sqrt() / (n - 2), 1.0)
    return standardised - 3 if q == 4 else standardised


def warn_of_moments(Q: int, *, normalized: bool, owner: str) -> None:
    """Tell that normalised moments above the fourth are not those of the paper."""
    if normalized and Q > 4:
        warnings.warn(
            f"{owner}: Q={Q} normalised moments; those above the fourth are standardised central moments, which the "
            f"paper does not have and few nodes determine. It has Q=4; sums of powers (normalized=False) go further.",
            LightningMethodsWarning,
            stacklevel=3,
        )


def moment_names(Q: int, *, normalized: bool) -> list[str]:
    """Return the names of the moments.

    Example:
        >>> moment_names(2, normalized=True), moment_names(2, normalized=False)
        (['mean', 'variance'], ['q1', 'q2'])
    """
    known = ["mean", "variance", "skewness", "kurtosis"]
    return [known[q] if normalized and q < len(known) else f"q{q + 1}" for q in range(Q)]


def path_name(path: Path, J: int) -> str:
    """Return the name of a path of scales.

    Example:
        >>> path_name((), 5), path_name((1, 3), 5), path_name((6,), 5)
        ('x', 'psi1>psi3', 'low')
    """
    return ">".join("low" if j > J else f"psi{j}" for j in path) or "x"


def feature_names(
    signals: list[str],
    *,
    J: int = 5,
    order: int = 2,
    Q: int = 4,
    normalized: bool = True,
    include_finest: bool = False,
    include_lowpass: bool = False,
) -> list[str]:
    """Return the names of the columns of `scattering_moments`.

    Args:
        signals: names of the signals.
        J: number of scales.
        order: longest path.
        Q: number of moments.
        normalized: whether they are normalised.
        include_finest: whether there is a scale 0.
        include_lowpass: whether there is a low-pass.

    Raises:
        InvalidArgument: as `scattering_paths`.

    Example:
        >>> feature_names(["degree"], J=1, Q=1)
        ['degree|x|mean', 'degree|psi1|mean']
    """
    paths = scattering_paths(J, order, include_finest=include_finest, include_lowpass=include_lowpass)
    moments = moment_names(Q, normalized=normalized)
    return [f"{s}|{path_name(p, J)}|{m}" for s in signals for p in paths for m in moments]
