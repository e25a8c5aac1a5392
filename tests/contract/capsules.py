"""Capsule networks on small images: what `tests.support.training` has for rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset, default_collate

from lightning_methods.ladder_capsule import CapsuleNetwork, LadderCapsuleNetwork
from tests.support.training import CLASSES, SAMPLES, Samples, Settings

SIDE = 6
SIZES: dict[str, Any] = {"image_size": SIDE, "num_classes": CLASSES, "types": 3, "capsule_dim": 4, "pose_dim": 5}
SIZES |= {"kernel_size": 3, "stride": 1, "decoder_hidden": (8,), "decoder_weight": 0.01}


def made_images(samples: int = SAMPLES) -> TensorDataset:
    """Return noisy bars of three directions, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    bars = torch.zeros(CLASSES, SIDE, SIDE)
    bars[0, 2:4], bars[1, :, 2:4] = 1, 1
    bars[2] = torch.eye(SIDE)
    x = bars[y] + 0.3 * torch.randn(samples, SIDE, SIDE, generator=generator)
    return TensorDataset(x[:, None], y)


IMAGES = Samples(made_images, default_collate, lambda: torch.zeros(2, 1, SIDE, SIDE))


def sgd(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.2, momentum=0.9)


def level(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def backbone(settings: Settings) -> nn.Sequential:
    noise = [nn.BatchNorm2d(4)] if settings.stochastic else []
    # the dropout is always there, for neighbours that look for one
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *noise, nn.Dropout2d(0.2 if settings.stochastic else 0.0))


class _Case:
    """What a case asks of a module around it."""

    settings: Settings

    def forward(self, x: Tensor) -> Any:
        if self.settings.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(batch, batch_idx)
        if self.settings.divisor is not None:  # all of its losses are means over the batch
            loss = loss * len(batch[1]) / self.settings.divisor
        if self.settings.during_step is not None:
            self.settings.during_step(self)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.settings.during_validation is not None:
            self.settings.during_validation(self)
        super().validation_step(batch, batch_idx)


class LadderModule(_Case, LadderCapsuleNetwork):
    """The ladder network with a decoder."""

    def __init__(self, settings: Settings | None = None) -> None:
        chosen = settings or Settings()
        more: dict[str, Any] = {"k": 5, "hidden": (6,), "decoder": True, "reg_weight": 0.01, "map_init": "unit"}
        super().__init__(backbone(chosen), optimizer=sgd, scheduler=level, **SIZES, **more)
        self.settings = chosen
        self.automatic_optimization = not chosen.manual


class LadderByHand(LadderModule):
    """The paper's loss written down."""

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        with torch.autocast("cpu", enabled=False):
            a = 1 - out.errors
            true = F.one_hot(y, CLASSES).to(a.dtype)
            margin = (true * F.relu(0.9 - a).square() + 0.5 * (1 - true) * F.relu(a - 0.1).square()).sum(1).mean()
            regulariser = 0.01 * (out.code - out.activity).square().sum(1).mean()
        image = self.decoder(out.poses, true)
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(image.dtype, torch.float32)
            error = 0.01 * (image.to(wide).flatten(1) - x.to(wide).flatten(1)).square().sum(1).mean()
            return torch.stack([margin, regulariser, error]).sum()


class LikelihoodLadder(LadderModule):
    """The same network trained by cross-entropy on its errors, without the method's loss."""

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(-self(batch[0]).errors, batch[1])


class CapsNetModule(_Case, CapsuleNetwork):
    """CapsNet with its decoder."""

    def __init__(self, settings: Settings | None = None) -> None:
        chosen = settings or Settings()
        super().__init__(backbone(chosen), optimizer=sgd, scheduler=level, **SIZES)
        self.settings = chosen
        self.automatic_optimization = not chosen.manual


class CapsNetByHand(CapsNetModule):
    """The margin loss and the squared error written down."""

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        with torch.autocast("cpu", enabled=False):
            a = out.scores
            true = F.one_hot(y, CLASSES).to(a.dtype)
            margin = (true * F.relu(0.9 - a).square() + 0.5 * (1 - true) * F.relu(a - 0.1).square()).sum(1).mean()
        image = self.decoder(out.poses, true)
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(image.dtype, torch.float32)
            error = 0.01 * (image.to(wide).flatten(1) - x.to(wide).flatten(1)).square().sum(1).mean()
            return torch.stack([margin, error]).sum()


class LikelihoodCapsNet(CapsNetModule):
    """The same network trained by cross-entropy on its lengths."""

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).scores, batch[1])
