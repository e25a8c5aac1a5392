"""Small networks and images for the tests of capsules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_methods import CapsuleNetwork, LadderCapsuleNetwork

SMALL: dict[str, Any] = {"image_size": 8, "num_classes": 3, "width": 8, "types": 4, "capsule_dim": 4, "pose_dim": 5}
SMALL |= {"kernel_size": 3}


def ladder(**settings: Any) -> LadderCapsuleNetwork:
    """Return a network of 16 capsules of which 6 are kept."""
    torch.manual_seed(0)
    return LadderCapsuleNetwork(**{**SMALL, "k": 6, "hidden": (8, 12), "decoder_hidden": (16,), **settings})


def capsnet(**settings: Any) -> CapsuleNetwork:
    torch.manual_seed(0)
    return CapsuleNetwork(**{**SMALL, "decoder_hidden": (16,), **settings})


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return bars of three directions with noise, and their directions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (24,), generator=generator)
    bars = torch.stack([torch.zeros(8, 8) for _ in range(3)])
    bars[0, 3:5], bars[1, :, 3:5] = 1, 1
    bars[2] = torch.eye(8) + torch.eye(8).roll(1, 0).tril()
    x = bars[y][:, None] * (0.5 + 0.5 * torch.rand(24, 1, 1, 1, generator=generator))
    return (x + 0.1 * torch.rand(24, 1, 8, 8, generator=generator)).clamp(0, 1), y
