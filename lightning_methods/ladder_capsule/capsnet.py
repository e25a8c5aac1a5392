"""The capsule network with dynamic routing, as a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_methods.core.batches import inputs_of
from lightning_methods.ladder_capsule.base import CapsuleModule, check_not_negative, plain
from lightning_methods.ladder_capsule.functional import activities, margin_loss, safe_norm, squash
from lightning_methods.ladder_capsule.layers import Activation, CapsuleOutput, DynamicRouting


class CapsuleNetwork(CapsuleModule):
    """CapsNet with dynamic routing (Sabour, Frosst and Hinton 2017), the baseline of the ladder network.

    The length of a class capsule is the activity of its class. Logs once an epoch `train/loss`, `train/accuracy`,
    `train/margin` and `train/reconstruction` (terms of the loss), and for `val/` and `test/` also `margin_gap`, the
    activity of the true class less the largest of the others; several test loaders as in `LadderCapsuleNetwork`.

    Shapes:
        images `(B, in_channels, H, W)`; targets `(B,)` classes, or `(B, C)` shares where images show several.

    Args:
        backbone: from images to feature maps `(B, channels, H, W)`; by default the paper's convolution and a ReLU.
        in_channels: channels of the images.
        image_size: side of the images, or (height, width).
        num_classes: number of classes.
        types: primary capsules a position, 32 in the paper.
        capsule_dim: dimension of these, 8 in the paper.
        pose_dim: dimension of a class capsule, 16 in the paper.
        width: channels of the default backbone, 256 in the paper.
        kernel_size: of the default backbone and of the primary capsules, 9 in the paper.
        stride: of the primary capsules, 2 in the paper.
        activation: of the primary capsules, `"none"` in the paper.
        routing_iters: iterations of the routing, 3 in the paper.
        detach_routing: whether gradients flow through the last iteration alone; `False` for all, as the authors' code.
        m_plus, m_minus, lam: constants of `margin_loss`.
        reconstruction: whether to reconstruct the image from the capsule of its class.
        decoder_weight: of the squared error of an image, 0.0005 in the paper.
        decoder_hidden: widths of the decoder, (512, 1024) in the paper.
        decoder_activation: `"sigmoid"` for images from 0 to 1, `"none"` for standardised ones.
        optimizer: from parameters to an optimizer. By default Adam.
        scheduler: from the optimizer, stepped once an epoch. By default none.
        lr: learning rate of Adam.
        inputs, targets: where they are in a batch: index, key or function.

    Raises:
        InvalidArgument: if a setting is out of range, or a class is.
        ShapeMismatch: if images are too small for the kernels, or of another shape.
        UnsupportedTraining: if the Trainer is of the other Lightning family.

    Example:
        >>> model = CapsuleNetwork(image_size=8, types=4, width=16, kernel_size=3)
        >>> model(torch.zeros(2, 1, 8, 8)).poses.shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        types: int = 32,
        capsule_dim: int = 8,
        pose_dim: int = 16,
        width: int = 256,
        kernel_size: int = 9,
        stride: int = 2,
        activation: Activation = "none",
        routing_iters: int = 3,
        detach_routing: bool = True,
        m_plus: float = 0.9,
        m_minus: float = 0.1,
        lam: float = 0.5,
        reconstruction: bool = True,
        decoder_weight: float = 5e-4,
        decoder_hidden: Sequence[int] = (512, 1024),
        decoder_activation: Literal["sigmoid", "none"] = "sigmoid",
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr: float = 1e-3,
        inputs: int | str | Callable[[Any], Any] | None = None,
        targets: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        settings = plain(locals())
        check_not_negative(m_plus=m_plus, m_minus=m_minus, lam=lam)
        super().__init__(
            backbone,
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            types=types,
            capsule_dim=capsule_dim,
            pose_dim=pose_dim,
            width=width,
            kernel_size=kernel_size,
            stride=stride,
            activation=activation,
            decoder=reconstruction,
            decoder_weight=decoder_weight,
            decoder_hidden=decoder_hidden,
            decoder_activation=decoder_activation,
            optimizer=optimizer,
            scheduler=scheduler,
            lr=lr,
            inputs=inputs,
            targets=targets,
        )
        self.save_hyperparameters(settings)
        self.constants = {"m_plus": m_plus, "m_minus": m_minus, "lam": lam}
        self.head = DynamicRouting(
            self.num_caps, num_classes, capsule_dim, pose_dim, iters=routing_iters, detach=detach_routing
        )

    def forward(self, x: Tensor) -> CapsuleOutput:
        """Return activities and poses of the classes."""
        capsules = self.capsules(x)
        poses = self.head(squash(capsules))
        return CapsuleOutput(safe_norm(poses), poses, activities(capsules))

    def losses(self, out: CapsuleOutput, target: Tensor) -> dict[str, Tensor]:
        """Return the margin loss."""
        return {"margin": margin_loss(out.scores, target, **self.constants)}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return for each image what was found.

        Returns:
            `class` `(B,)`; `activities` `(B, C)`; `pose` `(B, D)` of that class; `outlier_score` `(B,)`, 1 minus the
            largest activity.
        """
        out = self(inputs_of(batch, self.inputs))
        largest, found = out.scores.max(1)
        pose = out.poses[torch.arange(len(found), device=found.device), found]
        return {"class": found, "activities": out.scores, "pose": pose, "outlier_score": 1 - largest}

    def summary(self, scores: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Return the activity of the true class less the largest of the others."""
        present = true == true.amax(1, keepdim=True)
        own = scores.masked_fill(~present, torch.inf).amin(1)
        other = scores.masked_fill(present, -torch.inf).amax(1).clamp(min=0)
        return {"margin_gap": (own - other).mean()}
