"""Geometric scattering of graph signals (Gao, Wolf and Hirn, ICML 2019): walk, wavelets, coefficients."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice

Normalization = Literal["column", "row", "symmetric"]
Isolated = Literal["leak", "stay"]
Path = tuple[int, ...]
Diffusion = Callable[[Tensor], Tensor]


def lazy_random_walk(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    num_nodes: int | None = None,
    *,
    normalization: Normalization = "column",
    isolated: Isolated = "leak",
    remove_self_loops: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Return the lazy random walk of a graph as a sparse matrix.

    .. math:: P = \tfrac{1}{2}\left(I + A D^{-1}\right) \qquad \text{(equation 1)}

    With `"column"`, the paper's form, columns sum to 1 and `P` moves mass along the edges; `"row"` averages over the
    neighbours, `(I + D^{-1} A) / 2`; `"symmetric"` is `(I + D^{-1/2} A D^{-1/2}) / 2`.

    Shapes:
        `edge_index` `(2, E)`, source above target; `edge_weight` `(E,)`; returns `(num_nodes, num_nodes)`, CSR.

    Args:
        edge_index: the edges, an undirected one in both directions.
        edge_weight: their weights, at least 0; edges of weight 0 are none. Without weights, edges listed several times
            are one; with weights theirs are added.
        num_nodes: number of nodes; by default one more than the largest index.
        normalization: which walk.
        isolated: what a node without edges does: `"leak"` half of its mass in a step as in the paper's code, or
            `"stay"`, which keeps the walk a walk.
        remove_self_loops: whether edges from a node to itself are left out.
        dtype: of the matrix.

    Raises:
        InvalidArgument: for a negative or not finite weight, or an index outside the nodes.
        ShapeMismatch: if edges and weights do not fit together.

    Example:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> lazy_random_walk(path).to_dense()
        tensor([[0.5000, 0.2500, 0.0000],
                [0.5000, 0.5000, 0.5000],
                [0.0000, 0.2500, 0.5000]], dtype=torch.float64)
    """
    check_choice("isolated", isolated, ("leak", "stay"))
    edge_index, weight, size = transition(
        edge_index,
        edge_weight,
        num_nodes,
        normalization=normalization,
        remove_self_loops=remove_self_loops,
        dtype=dtype,
    )
    return lazy_matrix(edge_index, weight, size, normalization=normalization, isolated=isolated)


def lazy_matrix(edge_index: Tensor, weight: Tensor, size: int, *, normalization: str, isolated: str) -> Tensor:
    """Return the lazy walk as a sparse matrix from what `transition` returned."""
    nodes = torch.arange(size, device=edge_index.device)
    own = torch.full((size,), 0.5, dtype=weight.dtype, device=edge_index.device)
    if isolated == "stay":
        own[stranded(edge_index, size, normalization)] = 1.0
    rows, columns = torch.cat([edge_index[1], nodes]), torch.cat([edge_index[0], nodes])
    return sparse_matrix(rows, columns, torch.cat([weight / 2, own]), size)


def sparse_matrix(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return a square matrix in CSR form from its entries in any order, each given once."""
    order = torch.argsort(rows * size + columns)
    starts = torch.zeros(size + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=size).cumsum(0)
    columns = columns[order]
    if max(len(columns), size) < 2**31:  # a fifth faster
        starts, columns = starts.int(), columns.int()
    with warnings.catch_warnings():  # that CSR tensors are in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values[order], (size, size), check_invariants=False)


def transition(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    num_nodes: int | None = None,
    *,
    normalization: Normalization = "column",
    remove_self_loops: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, int]:
    r"""Return the edges of a simple graph with their weights in the walk that is not lazy, :math:`A D^{-1}`.

    Shapes:
        as `lazy_random_walk`; returns `edge_index` `(2, E')`, weights `(E',)` and the number of nodes.

    Args:
        edge_index: the edges.
        edge_weight: their weights.
        num_nodes: number of nodes.
        normalization: which walk.
        remove_self_loops: whether edges from a node to itself are left out.
        dtype: of the weights.

    Raises:
        InvalidArgument: as `lazy_random_walk`.
        ShapeMismatch: as `lazy_random_walk`.
    """
    check_choice("normalization", normalization, ("column", "row", "symmetric"))
    edge_index, size = checked_edges(edge_index, num_nodes)
    weight = _checked_weights(edge_weight, edge_index, dtype)
    kept = weight != 0
    if remove_self_loops:
        kept &= edge_index[0] != edge_index[1]
    if not bool(kept.all()):
        edge_index, weight = edge_index[:, kept], weight[kept]
    keys = edge_index[0] * size + edge_index[1]
    if not bool((keys[1:] > keys[:-1]).all()):  # in order and each once, as PyG keeps them, there is nothing to do
        keys, place = torch.unique(keys, return_inverse=True)
        summed = weight.new_zeros(len(keys)).index_add_(0, place, weight)
        weight = torch.ones_like(summed) if edge_weight is None else summed
        edge_index = torch.stack([keys // max(size, 1), keys % max(size, 1)])

    def total(of: Tensor) -> Tensor:
        return weight.new_zeros(size).index_add_(0, of, weight)[of]

    source, target = edge_index
    if normalization == "column":
        return edge_index, weight / total(source), size
    if normalization == "row":
        return edge_index, weight / total(target), size
    return edge_index, weight / (total(source).sqrt() * total(target).sqrt()), size


def stranded(edge_index: Tensor, num_nodes: int, normalization: str) -> Tensor:
    """Return which nodes the walk has no edge for, `(num_nodes,)`: half of what they hold is lost in a step."""
    used = {"column": edge_index[0], "row": edge_index[1], "symmetric": edge_index.flatten()}[normalization]
    found = torch.ones(num_nodes, dtype=torch.bool, device=edge_index.device)
    found[used] = False
    return found


def scattering_paths(
    J: int = 5, order: int = 2, *, include_finest: bool = False, include_lowpass: bool = False
) -> list[Path]:
    """Return the paths of scales in the order of the coefficients: `()`, `(1,)`, ..., `(J,)`, `(1, 2)`, `(1, 3)`, ...

    Scale 0 is the finest filter :math:`I - P` and scale `J + 1` the low-pass :math:`P^{2^J}`, where they are included.

    Args:
        J: number of dyadic scales.
        order: longest path, 0 to 3.
        include_finest: whether there is a scale 0.
        include_lowpass: whether there is a scale `J + 1`.

    Raises:
        InvalidArgument: for J below 1 or an order outside 0 to 3.

    Example:
        >>> scattering_paths(J=3)
        [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3)]
    """
    if isinstance(J, bool) or not isinstance(J, int) or J < 1:
        raise InvalidArgument(f"J={J!r}: at least one scale is needed, the paper has 5.")
    if order not in (0, 1, 2, 3):
        raise InvalidArgument(f"order={order!r}: 0, 1, 2 (as in the paper) or 3 is needed.")
    scales = range(0 if include_finest else 1, J + 1 + include_lowpass)
    # the longest scale of a path changes slowest, as in the paper's code
    return [
        path
        for length in range(order + 1)
        for path in sorted(itertools.combinations(scales, length), key=lambda path: path[::-1])
    ]


def wavelets(
    P: Tensor | Diffusion, x: Tensor, J: int = 5, *, include_finest: bool = False, include_lowpass: bool = False
) -> Tensor:
    r"""Return the wavelet transform of signals on a graph.

    .. math:: \Psi_j x = P^{2^{j-1}} x - P^{2^j} x, \quad 1 \le j \le J \qquad \text{(equation 2)}

    Shapes:
        `x` `(n, F)`; returns `(n, scales, F)`.

    Args:
        P: the walk, or a function that takes a step of it.
        x: the signals.
        J: number of scales.
        include_finest: whether :math:`I - P` comes first.
        include_lowpass: whether :math:`P^{2^J} x` comes last.

    Raises:
        InvalidArgument: for J below 1.
        ShapeMismatch: if walk and signals do not fit together.

    Example:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> wavelets(lazy_random_walk(path), torch.eye(4)[:, :1].double(), J=1).flatten()
        tensor([ 0.1250,  0.0000, -0.1250,  0.0000], dtype=torch.float64)
    """
    scattering_paths(J, 0)  # checks J
    step, x = _diffusion(P, x)
    return torch.stack([w for _, w in _bank(step, x, J, include_finest, include_lowpass)], 1)


def scattering_coefficients(
    P: Tensor | Diffusion,
    x: Tensor,
    *,
    J: int = 5,
    order: int = 2,
    include_finest: bool = False,
    include_lowpass: bool = False,
) -> Tensor:
    r"""Return the scattering coefficients of signals on a graph, by chained products with the walk.

    .. math:: U[\,]x = x, \quad U[j]x = |\Psi_j x|, \quad U[j, j']x = |\Psi_{j'} |\Psi_j x||, \quad j < j'

    No power of the walk is formed: two running tensors hold what was diffused so far.

    Shapes:
        `x` `(n, F)` or `(n,)`; returns `(n, paths, F)` in the order of `scattering_paths`.

    Args:
        P: what `lazy_random_walk` returned, or a function that takes a step of a walk.
        x: the signals, one column each.
        J: number of scales, 5 in the paper.
        order: longest path, 2 in the paper.
        include_finest: whether there is the filter :math:`I - P`, which the paper does not have.
        include_lowpass: whether there is the filter :math:`P^{2^J}`, which the paper does not have.

    Raises:
        InvalidArgument: for J below 1 or an order outside 0 to 3.
        ShapeMismatch: if walk and signals do not fit together.

    Example:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> scattering_coefficients(lazy_random_walk(path), torch.eye(4)[:, :1], J=3).shape
        torch.Size([4, 7, 1])
    """
    paths = scattering_paths(J, order, include_finest=include_finest, include_lowpass=include_lowpass)
    step, x = _diffusion(P, x)
    return scatter(x, paths, lambda u: _bank(step, u, J, include_finest, include_lowpass))


def fixed_signals(P: Tensor, x: Tensor) -> Tensor:
    """Return which signals a step of the walk leaves as they are but for rounding, `(n, F)` to `(F,)`."""
    change = (P @ x - x).abs()
    return (change <= 16 * torch.finfo(x.dtype).eps * x.abs()).all(0)


def scatter(x: Tensor, paths: list[Path], bank: Callable[[Tensor], Iterator[tuple[int, Tensor]]]) -> Tensor:
    """Return the coefficients of all paths, from a function that yields the scales of a filter bank one by one.

    Shapes:
        `x` `(n, F)`; returns `(n, paths, F)`.
    """
    n, width = x.shape
    found: dict[Path, Tensor] = {(): x}
    for length in range(1, max(map(len, paths)) + 1):
        # all paths that still grow are filtered at once
        last = max(path[-1] for path in paths if path)
        grown = [path for path in found if len(path) == length - 1 and (not path or path[-1] < last)]
        if not grown:
            break
        together = torch.stack([found[path] for path in grown], 1).reshape(n, len(grown) * width)
        for scale, filtered in bank(together):
            parts = filtered.reshape(n, len(grown), width).abs()
            found.update({(*path, scale): parts[:, i] for i, path in enumerate(grown) if not path or path[-1] < scale})
    return torch.stack([found[path] for path in paths], 1)


# -- edges -------------------------------------------------------------------------------------------------------------


def checked_edges(edge_index: Tensor, num_nodes: int | None) -> tuple[Tensor, int]:
    """Return the edges as int64, and the number of nodes.

    Raises:
        InvalidArgument: if they are no indices, or leave the nodes.
        ShapeMismatch: if the shape is not `(2, E)`.
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ShapeMismatch(f"edge_index has the shape {tuple(edge_index.shape)}; (2, E) is needed.")
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        raise InvalidArgument(f"edge_index holds {edge_index.dtype}; indices of nodes are needed, int64.")
    edge_index = edge_index.long()
    largest = int(edge_index.max()) if edge_index.numel() else -1
    size = largest + 1 if num_nodes is None else num_nodes
    if edge_index.numel() and (largest >= size or int(edge_index.min()) < 0):
        raise InvalidArgument(
            f"edge_index holds {int(edge_index.min())} to {largest}, and there are {size} nodes. Indices from 0 to "
            f"{size - 1} are needed."
        )
    return edge_index, size


def _checked_weights(edge_weight: Tensor | None, edge_index: Tensor, dtype: torch.dtype) -> Tensor:
    edges = edge_index.shape[1]
    if edge_weight is None:
        return torch.ones(edges, dtype=dtype, device=edge_index.device)
    if edge_weight.shape == (edges, 1):
        edge_weight = edge_weight[:, 0]
    if edge_weight.shape != (edges,):
        raise ShapeMismatch(f"edge_weight has the shape {tuple(edge_weight.shape)}; ({edges},) is needed.")
    weight = edge_weight.to(dtype)
    if edges and not bool((weight.isfinite() & (weight >= 0)).all()):
        bad = weight[~(weight.isfinite() & (weight >= 0))][0].item()
        raise InvalidArgument(f"edge_weight holds {bad:g}; finite weights of at least 0 are needed for a random walk.")
    return weight


# -- filters -----------------------------------------------------------------------------------------------------------


def _diffusion(P: Tensor | Diffusion, x: Tensor) -> tuple[Diffusion, Tensor]:
    """Return a step of the walk, and the signals as columns in its precision."""
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2:
        raise ShapeMismatch(f"The signals have the shape {tuple(x.shape)}; (n, F) is needed, one column a signal.")
    if not isinstance(P, Tensor):
        return P, x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if tuple(P.shape) != (len(x), len(x)):
        raise ShapeMismatch(f"The walk has the shape {tuple(P.shape)} and the signals have {len(x)} rows.")
    return lambda u: P @ u, x.to(P.dtype)


def _bank(
    step: Diffusion, u: Tensor, J: int, include_finest: bool, include_lowpass: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each scale and what its filter makes of the columns of `u`."""
    current = step(u)
    if include_finest:
        yield 0, u - current
    for j in range(1, J + 1):
        before = current
        for _ in range(2 ** (j - 1)):
            current = step(current)
        yield j, before - current
    if include_lowpass:
        yield J + 1, current
