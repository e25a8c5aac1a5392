"""Images that the classifiers were not trained for, made from test images or read from another data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CIFAR = Path("data/cifar10/test")


def digit_outliers(test: Any, count: int) -> dict[str, Tensor]:
    """Return test images turned by 90 degrees, with their pixels in one fixed random order, and uniform noise."""
    pixels = test.pixels(range(count))
    order = torch.from_numpy(np.random.default_rng(0).permutation(pixels[0].numel()))
    white = 16 if pixels.shape[-1] == 8 else 255
    noise = np.random.default_rng(1).integers(0, white + 1, pixels.shape, dtype=np.uint8)
    made = {
        "turned by 90°": pixels.rot90(1, (2, 3)),
        "shuffled pixels": pixels.flatten(1)[:, order.to(pixels.device)].view_as(pixels),
        "uniform noise": torch.from_numpy(noise).to(pixels.device),
    }
    return {kind: test.preprocess(images) for kind, images in made.items()}


def mnist_outliers(test: Any, count: int) -> dict[str, Tensor]:
    """Return the same and, where it lies in data/cifar10, the grey centre of CIFAR-10 (JPEG copy) test images."""
    made = digit_outliers(test, count)
    if not CIFAR.is_dir():
        return made
    from PIL import Image

    classes = sorted(folder for folder in CIFAR.iterdir() if folder.is_dir())
    files = [file for folder in classes for file in sorted(folder.iterdir())[: count // len(classes)]]
    grey = np.stack([np.asarray(Image.open(file).convert("L"))[2:30, 2:30] for file in files])
    pixels = torch.from_numpy(grey)[:, None].to(test.pixels([0]).device)
    return {**made, "CIFAR-10, grey": test.preprocess(pixels)}
