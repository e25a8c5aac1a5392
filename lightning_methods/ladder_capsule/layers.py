"""Layers: primary capsules, pruning by activity, the ladder head, dynamic routing, a decoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_methods.core._lightning import rank_zero_warn
from lightning_methods.errors import InvalidArgument, NoEffect, ShapeMismatch, check_choice
from lightning_methods.ladder_capsule.functional import (
    activities,
    capsules_of,
    code_vector,
    ladder_inference,
    route,
    squash,
    top_capsules,
    wide,
)
from lightning_methods.ladder_capsule.hyper import MapInit, PerClassHyperNetworks, SharedHyperNetworks

Activation = Literal["relu", "none"]
HyperNetworks = Literal["per_class", "shared"]
_PIECE = 2**22  # bytes


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are read as capsules, `dim` channels of one position each.

    Shapes:
        `(B, in_channels, H, W)` -> `(B, H' * W' * types, dim)`, before squashing, in the order (y, x, type).

    Args:
        in_channels: channels of the feature maps.
        types: capsules a position, 32 in the paper.
        dim: dimension of a capsule, 8 in the paper.
        kernel_size: side of the kernel, 9 in the paper.
        stride: 2 in the paper.
        activation: `"relu"` as in the official code of the ladder network, or `"none"` as in CapsNet.

    Raises:
        InvalidArgument: if a number is not positive or the activation unknown.
        ShapeMismatch: if the maps are smaller than the kernel.

    Example:
        >>> PrimaryCapsules(256)(torch.zeros(1, 256, 20, 20)).shape
        torch.Size([1, 1152, 8])
    """

    def __init__(
        self,
        in_channels: int,
        types: int = 32,
        dim: int = 8,
        *,
        kernel_size: int = 9,
        stride: int = 2,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, types=types, dim=dim, kernel_size=kernel_size, stride=stride)
        check_choice("activation", activation, ("relu", "none"))
        self.types, self.dim = types, dim
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return the capsules of feature maps."""
        self.grid(features)
        return capsules_of(self.activation(self.conv(features)), self.dim)

    def grid(self, features: Tensor) -> tuple[int, int]:
        """Return how many rows and columns of positions these feature maps give."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if features.ndim != 4 or min(features.shape[2:]) < kernel:
            raise ShapeMismatch(
                f"Feature maps {tuple(features.shape)} are smaller than the kernel of {kernel} x {kernel} of the "
                f"primary capsules. (B, C, H, W) with H and W of at least {kernel} is needed: enlarge the images or "
                "lower kernel_size."
            )
        rows, columns = ((side - kernel) // stride + 1 for side in features.shape[2:])
        return rows, columns


class Pruned(NamedTuple):
    """The capsules that are kept.

    Attributes:
        indices: `(B, k)` their positions, ascending.
        active: `(B, k, d)` the squashed capsules at these positions.
        code: `(B, N)` ones where a capsule is kept; no gradient flows through it.
        activity: `(B, N)` of all capsules.
    """

    indices: Tensor
    active: Tensor
    code: Tensor
    activity: Tensor


class PruningLayer(nn.Module):
    """Keep the k most active capsules, in the order of their positions.

    Of equally active capsules those at the lowest positions are kept, on every device. Gradients flow into the kept
    capsules, and into the activities of all.

    Shapes:
        capsules `(B, N, d)` before squashing -> `Pruned`.

    Args:
        k: how many capsules are kept, 70 in the official code.

    Raises:
        InvalidArgument: if k is below 1 or above the number of capsules.

    Example:
        >>> capsules = torch.tensor([[[0.0, 1.0], [3.0, 0.0], [0.0, 2.0]]])
        >>> PruningLayer(2)(capsules).indices
        tensor([[1, 2]])
    """

    def __init__(self, k: int = 70) -> None:
        super().__init__()
        check_positive(k=k)
        self.k = k

    def forward(self, capsules: Tensor) -> Pruned:
        """Return the capsules that are kept."""
        if capsules.ndim != 3:
            raise ShapeMismatch(f"capsules have the shape {tuple(capsules.shape)}; (B, N, d) is needed.")
        activity = activities(capsules)
        indices = top_capsules(activity, self.k)
        kept = capsules.gather(1, indices[..., None].expand(-1, -1, capsules.shape[2]))
        return Pruned(indices, squash(kept), code_vector(indices, capsules.shape[1], activity.dtype), activity)


class LadderOutput(NamedTuple):
    """What the ladder network finds in a batch.

    Attributes:
        errors: `(B, C)` mean reconstruction error of each class, from 0 to 2; the class is the smallest.
        poses: `(B, C, D)` of length 1.
        reconstruction: `(B, C, k, d)` of the kept capsules from each class.
        indices, active, code, activity: as in `Pruned`.
    """

    errors: Tensor
    poses: Tensor
    reconstruction: Tensor
    indices: Tensor
    active: Tensor
    code: Tensor
    activity: Tensor

    @property
    def scores(self) -> Tensor:
        """Return the activity of each class, `(B, C)`: 1 minus its error."""
        return 1 - self.errors


class LadderHead(nn.Module):
    """Higher-level capsules whose maps are made from the code vector, and the reverse inference that rates them.

    All classes are computed in batched products that never lay the maps out, and the product with the code vector is a
    sum of k rows: the same numbers as a loop over classes with dense products.

    Shapes:
        `Pruned` with `k` capsules of `in_dim` -> `LadderOutput`.

    Args:
        num_caps: number of capsules N before pruning.
        num_classes: number of classes.
        k: number of capsules that are kept.
        in_dim: dimension of these, 8 in the paper.
        out_dim: dimension of a pose, 16 in the paper.
        hidden: hidden widths of the hyper-networks of the maps, (128, 256, 384) in the official code.
        coupling_hidden: hidden widths of those of the coupling; k three times in the official code.
        hyper: `"per_class"` as in the paper, or `"shared"`: one trunk and maps of low rank (ours).
        rank: of the maps of `"shared"`, 64.
        map_init: first maps. `"xavier"`, the usual one of `"per_class"` and that of the official code, makes them so
            small that every capsule is reconstructed as almost nothing, and gradients vanish in the squashing;
            `"unit"`, the usual one of `"shared"`, begins at reconstructions of about length 1 and learns faster (ours).

    Raises:
        InvalidArgument: if a number is not positive, k is larger than `num_caps`, or a name is unknown.
        ShapeMismatch: if the capsules have other sizes.

    Example:
        >>> head = LadderHead(32, 10, 8, 4, 6, hidden=(16,))
        >>> out = head(PruningLayer(8)(torch.randn(2, 32, 4)))
        >>> out.errors.shape, out.poses.shape
        (torch.Size([2, 10]), torch.Size([2, 10, 6]))
    """

    def __init__(
        self,
        num_caps: int,
        num_classes: int = 10,
        k: int = 70,
        in_dim: int = 8,
        out_dim: int = 16,
        *,
        hidden: Sequence[int] = (128, 256, 384),
        coupling_hidden: Sequence[int] | None = None,
        hyper: HyperNetworks = "per_class",
        rank: int = 64,
        map_init: MapInit | None = None,
    ) -> None:
        super().__init__()
        if map_init is not None:
            check_choice("map_init", map_init, ("xavier", "unit"))
        check_positive(num_caps=num_caps, num_classes=num_classes, k=k, in_dim=in_dim, out_dim=out_dim, rank=rank)
        check_choice("hyper", hyper, ("per_class", "shared"))
        if k > num_caps:
            raise InvalidArgument(f"k={k} capsules cannot be kept of {num_caps}. Lower k, or make more capsules.")
        if k == num_caps:
            rank_zero_warn(
                f"k={k} keeps every capsule: the code vector is always the same, and so are the maps. Lower k.",
                category=NoEffect,
            )
        coupling = [k] * 3 if coupling_hidden is None else coupling_hidden
        check_widths(hidden=hidden, coupling_hidden=coupling)
        self.num_caps, self.k, self.in_dim = num_caps, k, in_dim
        sizes = (num_caps, num_classes, k, in_dim, out_dim, list(hidden))
        self.hyper: nn.Module = (
            PerClassHyperNetworks(*sizes, coupling, map_init or "xavier")
            if hyper == "per_class"
            else SharedHyperNetworks(*sizes, rank, map_init or "unit")
        )

    def forward(self, pruned: Pruned) -> LadderOutput:
        """Return errors and poses of all classes."""
        if pruned.active.shape[1:] != (self.k, self.in_dim) or pruned.code.shape[-1] != self.num_caps:
            raise ShapeMismatch(
                f"{tuple(pruned.active.shape)} capsules of {pruned.code.shape[-1]} do not fit a head for "
                f"(B, {self.k}, {self.in_dim}) of {self.num_caps}. Was the head made for images of another size?"
            )
        found = ladder_inference(pruned.active, *self.hyper(pruned.indices))
        return LadderOutput(*found, *pruned)


class CapsuleOutput(NamedTuple):
    """What a capsule network finds in a batch: activities of the classes `(B, C)`, poses `(B, C, D)`."""

    scores: Tensor
    poses: Tensor
    activity: Tensor


class DynamicRouting(nn.Module):
    """Class capsules by routing-by-agreement, whose votes are never laid out.

    Shapes:
        squashed capsules `(B, N, d)` -> poses `(B, C, D)`, whose length is the activity of the class.

    Args:
        num_caps: number of capsules N.
        num_classes: number of classes.
        in_dim: dimension of a capsule.
        out_dim: dimension of a pose.
        iters: iterations, 3 in the paper.
        detach: see `dynamic_routing`.
        init_std: standard deviation of the first weights.

    Raises:
        InvalidArgument: if a number is not positive.
        ShapeMismatch: if the capsules have other sizes.

    Example:
        >>> DynamicRouting(12, 10, 4, 6)(torch.randn(2, 12, 4)).shape
        torch.Size([2, 10, 6])
    """

    def __init__(
        self,
        num_caps: int,
        num_classes: int = 10,
        in_dim: int = 8,
        out_dim: int = 16,
        *,
        iters: int = 3,
        detach: bool = True,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(num_caps=num_caps, num_classes=num_classes, in_dim=in_dim, out_dim=out_dim, iters=iters)
        if not init_std > 0:
            raise InvalidArgument(f"init_std={init_std}: a positive standard deviation is needed.")
        self.iters, self.detach = iters, detach
        # a class after the other, and capsules beside each other in every dimension: what the products read in order
        self.weight = nn.Parameter(init_std * torch.randn(num_classes, in_dim, num_caps, out_dim))

    def forward(self, capsules: Tensor) -> Tensor:
        """Return the poses of all classes."""
        classes, in_dim, num_caps, _ = self.weight.shape
        if capsules.ndim != 3 or capsules.shape[1:] != (num_caps, in_dim):
            raise ShapeMismatch(
                f"capsules have the shape {tuple(capsules.shape)}; (B, {num_caps}, {in_dim}) is needed. Was the "
                "network made for images of another size?"
            )
        with torch.autocast(capsules.device.type, enabled=False):
            parts = wide(capsules).transpose(1, 2).contiguous()  # (B, d, N)
            maps = wide(self.weight).flatten(1, 2)  # (C, d * N, D)
            logits = torch.zeros(classes, len(parts), num_caps, dtype=parts.dtype, device=parts.device)
            poses = self._routed(logits, parts.to(maps.dtype), maps)
        return poses.transpose(0, 1)

    def _routed(self, logits: Tensor, parts: Tensor, maps: Tensor) -> Tensor:
        """Route votes that are never laid out: shares scale the capsules, and poses are mapped back to these."""
        held = (parts.detach(), maps.detach()) if self.detach else (parts, maps)
        # on a CPU a few classes at a time: what lies between two products stays in the cache and needs no fresh memory
        whole = parts.device.type != "cpu" or torch.compiler.is_compiling()
        some = len(maps) if whole else max(1, _PIECE // max(1, parts.nbytes))

        def summed(shares: Tensor, *, last: bool) -> Tensor:
            given, used = (parts, maps) if last else held
            pairs = zip(shares.split(some), used.split(some), strict=True)
            return torch.cat([(c[:, :, None] * given).flatten(2) @ w for c, w in pairs])

        def agreement(poses: Tensor) -> Tensor:
            given, used = held
            pairs = zip(poses.split(some), used.split(some), strict=True)
            return torch.cat([((v @ w.mT).unflatten(2, given.shape[1:]) * given).sum(2) for v, w in pairs])

        return route(logits, summed, agreement, self.iters, dim=0)


class Decoder(nn.Module):
    """From the poses of all classes but the shown ones masked, to an image (Sabour et al. 2017, section 4.1).

    Shapes:
        poses `(B, C, D)` and shares `(B, C)` -> `(B, *image_shape)`.

    Args:
        num_classes: number of classes.
        pose_dim: dimension of a pose.
        image_shape: (channels, height, width).
        hidden: widths of the hidden layers, (512, 1024) in the paper.
        activation: `"sigmoid"` for images from 0 to 1, `"none"` for standardised ones.

    Example:
        >>> Decoder(10, 16, (1, 28, 28))(torch.randn(2, 10, 16), torch.eye(10)[:2]).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        num_classes: int,
        pose_dim: int,
        image_shape: tuple[int, int, int],
        *,
        hidden: Sequence[int] = (512, 1024),
        activation: Literal["sigmoid", "none"] = "sigmoid",
    ) -> None:
        super().__init__()
        check_widths(decoder_hidden=hidden)
        check_choice("decoder_activation", activation, ("sigmoid", "none"))
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([num_classes * pose_dim, *hidden]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        last = nn.Linear(hidden[-1], image_shape[0] * image_shape[1] * image_shape[2])
        squeezed = nn.Sigmoid() if activation == "sigmoid" else nn.Identity()
        self.layers = nn.Sequential(*layers, last, squeezed, nn.Unflatten(1, image_shape))

    def forward(self, poses: Tensor, shares: Tensor) -> Tensor:
        """Return the images of the poses of the classes in `shares`."""
        # poses are float32 at least, also in a network of half precision
        return self.layers((poses * shares[..., None]).flatten(1).to(next(self.parameters()).dtype))


def check_positive(**numbers: int) -> None:
    """Raise `InvalidArgument` unless all numbers are whole and at least 1."""
    for name, number in numbers.items():
        if not is_count(number):
            raise InvalidArgument(f"{name}={number!r}: a whole number of at least 1 is needed.")


def is_count(number: object) -> bool:
    """Tell whether this is a whole number of at least 1.

    Example:
        >>> is_count(3), is_count(3.0), is_count(True), is_count(0)
        (True, False, False, False)
    """
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def check_widths(**layers: Sequence[int]) -> None:
    """Raise `InvalidArgument` unless there is a width and all are positive."""
    for name, widths in layers.items():
        shown = list(widths) if isinstance(widths, (list, tuple)) else widths
        if not isinstance(shown, list) or not shown or not all(is_count(width) for width in shown):
            raise InvalidArgument(f"{name}={shown!r}: one or more whole widths of at least 1 are needed.")
