"""Poses of images: drawn for each sample by its number alone, and applied to a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]
_STREAMS = 8  # numbers drawn a sample


@dataclass(frozen=True)
class PoseRange:
    """What poses are drawn from, each sample its own.

    Attributes:
        rotation: degrees, counter-clockwise, uniform.
        shift: largest shift along each axis, in whole pixels, uniform.
        distance: length of a shift in a direction drawn uniformly, rounded to whole pixels; in place of `shift`.
        scale: size, uniform.
        shear: slope of vertical lines, uniform.
        independent: whether the two axes are scaled by numbers of their own.
        inside: whether a shift is uniform over all that leave the whole figure in the image; in place of `shift`.
    """

    rotation: Range = (0.0, 0.0)
    shift: int = 0
    distance: float = 0.0
    scale: Range = (1.0, 1.0)
    shear: Range = (0.0, 0.0)
    independent: bool = False
    inside: bool = False


AFFNIST = PoseRange(rotation=(-20, 20), scale=(0.8, 1.2), shear=(-0.2, 0.2), independent=True, inside=True)


class Level(NamedTuple):
    """One test set: what it is called, which pose it changes, by how much, and what poses are drawn from."""

    name: str
    axis: Literal["rotation", "translation", "scale", "shear", "affnist", "trained"]
    value: float
    poses: PoseRange


def level(axis: Literal["rotation", "translation", "scale", "shear"], value: float) -> Level:
    """Return the test set in which every image has this pose.

    Example:
        >>> level("rotation", 45).name
        'rotation_45'
    """
    fixed = (float(value), float(value))
    poses = {
        "rotation": PoseRange(rotation=fixed),
        "translation": PoseRange(distance=float(value)),
        "scale": PoseRange(scale=fixed),
        "shear": PoseRange(shear=fixed),
    }[axis]
    return Level(f"{axis}_{value:g}", axis, float(value), poses)


def uniform(seed: int, numbers: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    """Return a number from 0 to below 1 for each of `numbers`: of its value alone, whoever asks, in whatever order.

    Example:
        >>> uniform(0, np.array([5, 7]), 1)[1] == uniform(0, np.array([7]), 1)[0]
        np.True_
    """
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) * np.uint64(_STREAMS) + np.uint64(stream)
        x = _mixed(x + np.uint64(0x9E3779B97F4A7C15) * _mixed(np.array([seed + 1], dtype=np.uint64)))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # the finaliser of splitmix64 (Steele, Lea and Flood 2014)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Affine(NamedTuple):
    """For each sample the matrix `(B, 2, 2)` and shift `(B, 2)` that move its points (x, y), y downwards."""

    matrix: NDArray[np.float64]
    shift: NDArray[np.float64]


def draw(poses: PoseRange, seed: int, numbers: NDArray[np.int64], images: Tensor) -> Affine:
    """Return the pose of each sample, by its number.

    Args:
        poses: what to draw from.
        seed: of all draws.
        numbers: (B,) one a sample.
        images: (B, C, H, W) on their canvas, which `inside` looks at.
    """

    def drawn(stream: int, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(seed, numbers, stream)

    angle = np.deg2rad(drawn(0, *poses.rotation))
    across = drawn(1, *poses.scale)
    along = drawn(2, *poses.scale) if poses.independent else across
    slope = drawn(3, *poses.shear)
    cos, sin = np.cos(angle), np.sin(angle)
    # counter-clockwise on the screen, where y points down
    turned = np.stack([cos, sin, -sin, cos], -1).reshape(-1, 2, 2)
    sheared = np.stack([across, slope * along, 0 * along, along], -1).reshape(-1, 2, 2)
    matrix = turned @ sheared
    if poses.inside:
        low, high = _room(matrix, images)
        shares = np.stack([uniform(seed, numbers, 4), uniform(seed, numbers, 5)], -1)
        shift = low + (high - low) * shares
    elif poses.distance:
        direction = drawn(4, 0.0, 2 * np.pi)
        shift = np.round(poses.distance * np.stack([np.cos(direction), np.sin(direction)], -1))
    else:
        shift = np.stack([np.floor(drawn(stream, -poses.shift, poses.shift + 1)) for stream in (4, 5)], -1)
    return Affine(matrix, shift)


def _room(matrix: NDArray[np.float64], images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest and largest shifts that leave every pixel that is not black in the image."""
    height, width = images.shape[2:]
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    points = np.stack(np.meshgrid(x, y), 0).reshape(2, -1)
    moved = matrix @ points
    drawn = (images > 0).any(1).flatten(1).numpy()[:, None]
    least = np.where(drawn, moved, np.inf).min(2)
    most = np.where(drawn, moved, -np.inf).max(2)
    half = np.array([(width - 1) / 2, (height - 1) / 2])
    empty = ~drawn.any(2)
    low, high = np.where(empty, 0.0, -half - least), np.where(empty, 0.0, half - most)
    # larger than the canvas: in its middle
    middle = (low + high) / 2
    return np.where(low > high, middle, low), np.where(low > high, middle, high)


def warp(images: Tensor, affine: Affine) -> Tensor:
    """Return the images moved about their centre, bilinear, black where nothing was.

    Shapes:
        (B, C, H, W) float32 -> the same.

    Example:
        >>> image = torch.zeros(1, 1, 3, 3)
        >>> image[0, 0, 1, 2] = 1.0
        >>> quarter = Affine(np.array([[[0.0, 1.0], [-1.0, 0.0]]]), np.zeros((1, 2)))
        >>> (warp(image, quarter)[0, 0] > 0.5).nonzero().tolist()
        [[0, 1]]
    """
    height, width = images.shape[2:]
    x = np.arange(width) - (width - 1) / 2
    y = np.arange(height)[:, None] - (height - 1) / 2
    inverse = np.linalg.inv(affine.matrix)[:, :, :, None, None]
    # where each pixel comes from; element by element, so that an image is the same in whatever batch it is
    u, v = x - affine.shift[:, 0, None, None], y - affine.shift[:, 1, None, None]
    from_x = inverse[:, 0, 0] * u + inverse[:, 0, 1] * v
    from_y = inverse[:, 1, 0] * u + inverse[:, 1, 1] * v
    grid = np.stack([from_x * 2 / width, from_y * 2 / height], -1)
    # in float64, where whole pixels come out exact
    moved = F.grid_sample(images.double(), torch.from_numpy(grid), padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)


def on_canvas(images: Tensor, side: int | None) -> Tensor:
    """Return the images in the middle of a black square of this side.

    Example:
        >>> on_canvas(torch.ones(1, 1, 2, 2), 4).sum().item()
        4.0
    """
    if side is None:
        return images
    spare = [side - size for size in (images.shape[3], images.shape[2])]
    return F.pad(images, (spare[0] // 2, spare[0] - spare[0] // 2, spare[1] // 2, spare[1] - spare[1] // 2))
