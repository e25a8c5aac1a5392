"""The ladder capsule network as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_methods.core.batches import inputs_of
from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.ladder_capsule.base import CapsuleModule, check_not_negative, plain
from lightning_methods.ladder_capsule.functional import (
    PRESETS,
    LossName,
    Regulariser,
    code_regulariser,
    margin_loss,
)
from lightning_methods.ladder_capsule.hyper import MapInit
from lightning_methods.ladder_capsule.layers import (
    Activation,
    HyperNetworks,
    LadderHead,
    LadderOutput,
    PruningLayer,
    is_count,
)


class LadderCapsuleNetwork(CapsuleModule):
    r"""Classify images by how well each class explains the capsules that are present (Jeong, Lee and Kim 2019).

    The k most active primary capsules are kept. Which they are, the code vector, makes the maps :math:`W_j` of each
    class; these turn the capsules into a pose :math:`d_j` of length 1, and other maps turn the pose back into the
    capsules. The class with the smallest mean error :math:`e_j` is predicted. Trained by `ladder_loss`.

    Logs once an epoch `train/loss`, `train/accuracy`, `train/margin` and `train/code_reg` (terms of the loss), and for
    `val/` and `test/` also `err_true`, `err_other_min` and `margin_gap`, their difference. With several test loaders,
    one a pose, all of these by pose, a figure `ladder_capsule/accuracy_<pose>` and a table `ladder_capsule/poses`.

    Shapes:
        images `(B, in_channels, H, W)`; targets `(B,)` classes, or `(B, C)` shares where images show several.

    Args:
        backbone: from images to feature maps `(B, channels, H, W)`; by default the paper's convolution and a ReLU.
        in_channels: channels of the images.
        image_size: side of the images, or (height, width).
        num_classes: number of classes.
        k: number of capsules that are kept, 70 in the official code.
        types: primary capsules a position, 32 in the paper.
        capsule_dim: dimension of these, 8 in the paper.
        pose_dim: dimension of a pose, 16 in the paper.
        width: channels of the default backbone, 256 in the paper.
        kernel_size: of the default backbone and of the primary capsules, 9 in the paper.
        stride: of the primary capsules, 2 in the paper.
        activation: of the primary capsules, `"relu"` as in the official code, or `"none"`.
        hidden: hidden widths of the hyper-networks, (128, 256, 384) in the official code.
        coupling_hidden: hidden widths of those of the coupling; by default k three times, as there.
        hyper: `"per_class"` as in the paper, 80.9 million parameters at its size, or `"shared"`: 7.5 million.
        rank: of the maps of `"shared"`.
        map_init: first maps, `"xavier"` as in the official code or `"unit"`, see `LadderHead`.
        loss: constants of the paper's text, or of the official `"code"`.
        m_plus, m_minus, lam: constants of the margin loss in place of these.
        reg_weight: weight of the loss of the code vector, 1e-4 in the official code; 0 for none.
        reg: `"l2"` or `"l1_mean"` in place of the one of `loss`.
        decoder: whether to reconstruct the image from the pose of its class, for pictures (an extension).
        decoder_weight: of the squared error of an image, 0.0005 in CapsNet.
        decoder_hidden: widths of the decoder.
        decoder_activation: `"sigmoid"` for images from 0 to 1, `"none"` for standardised ones.
        optimizer: from parameters to an optimizer. By default Adam.
        scheduler: from the optimizer, stepped once an epoch, in place of the paper's.
        lr: learning rate of Adam, 1e-3 in the paper.
        lr_gamma: factor of the learning rate every `lr_step` batches, 0.9 in the official code.
        lr_step: 1000 in the official code.
        inputs, targets: where they are in a batch: index, key or function.

    Raises:
        InvalidArgument: if a setting is out of range, or a class is.
        ShapeMismatch: if images are too small for the kernels, or of another shape.
        UnsupportedTraining: if the Trainer is of the other Lightning family.

    Example:
        >>> model = LadderCapsuleNetwork(image_size=8, k=8, types=4, width=16, kernel_size=3, hidden=(16,))
        >>> model.num_caps, model(torch.zeros(2, 1, 8, 8)).errors.shape
        (16, torch.Size([2, 10]))

    Deviations from the paper: norms are differentiable at 0; of equally active capsules the first are kept, on every
    device; images are shuffled by the dataloader. Both constants of the loss are offered, since text and code disagree.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        k: int = 70,
        types: int = 32,
        capsule_dim: int = 8,
        pose_dim: int = 16,
        width: int = 256,
        kernel_size: int = 9,
        stride: int = 2,
        activation: Activation = "relu",
        hidden: Sequence[int] = (128, 256, 384),
        coupling_hidden: Sequence[int] | None = None,
        hyper: HyperNetworks = "per_class",
        rank: int = 64,
        map_init: MapInit | None = None,
        loss: LossName = "paper",
        m_plus: float | None = None,
        m_minus: float | None = None,
        lam: float | None = None,
        reg_weight: float = 1e-4,
        reg: Regulariser | None = None,
        decoder: bool = False,
        decoder_weight: float = 5e-4,
        decoder_hidden: Sequence[int] = (512, 1024),
        decoder_activation: Literal["sigmoid", "none"] = "sigmoid",
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr: float = 1e-3,
        lr_gamma: float = 0.9,
        lr_step: int = 1000,
        inputs: int | str | Callable[[Any], Any] | None = None,
        targets: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        settings = plain(locals())
        check_choice("loss", loss, PRESETS)
        if reg is not None:
            check_choice("reg", reg, ("l2", "l1_mean"))
        check_not_negative(reg_weight=reg_weight, lam=lam, m_plus=m_plus, m_minus=m_minus)
        if not lr_gamma > 0 or not is_count(lr_step):
            raise InvalidArgument(
                f"lr_gamma={lr_gamma}, lr_step={lr_step}: a positive factor and a whole number of steps are needed."
            )
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
            decoder=decoder,
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
        given: dict[str, Any] = {"m_plus": m_plus, "m_minus": m_minus, "lam": lam, "reg": reg}
        self.constants = PRESETS[loss]._replace(**{name: x for name, x in given.items() if x is not None})
        self.reg_weight, self.lr_gamma, self.lr_step = reg_weight, lr_gamma, lr_step
        self.pruning = PruningLayer(k)
        self.head = LadderHead(
            self.num_caps,
            num_classes,
            k,
            capsule_dim,
            pose_dim,
            hidden=hidden,
            coupling_hidden=coupling_hidden,
            hyper=hyper,
            rank=rank,
            map_init=map_init,
        )

    def forward(self, x: Tensor) -> LadderOutput:
        """Return errors, poses and kept capsules of images."""
        return self.head(self.pruning(self.capsules(x)))

    def losses(self, out: LadderOutput, target: Tensor) -> dict[str, Tensor]:
        """Return the margin loss, and that of the code vector with its weight."""
        m_plus, m_minus, lam, reg = self.constants
        return {
            "margin": margin_loss(out.scores, target, m_plus=m_plus, m_minus=m_minus, lam=lam),
            "code_reg": self.reg_weight * code_regulariser(out.code, out.activity, reg),
        }

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return for each image what was found.

        Returns:
            `class` `(B,)`; `errors` `(B, C)`; `pose` `(B, D)` of that class; `capsules` `(B, k)`, the positions of the
            kept capsules; `outlier_score` `(B,)`, the smallest error: large where no class explains the image (and 0
            where there is nothing to explain, every kept capsule being 0).
        """
        out = self(inputs_of(batch, self.inputs))
        smallest, found = out.errors.min(1)
        pose = out.poses[torch.arange(len(found), device=found.device), found]
        return {
            "class": found,
            "errors": out.errors,
            "pose": pose,
            "capsules": out.indices,
            "outlier_score": smallest,
        }

    def summary(self, scores: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Return the error of the true class, the smallest of the others, and what is between them."""
        errors = 1 - scores
        present = true == true.amax(1, keepdim=True)
        own = errors.masked_fill(~present, -torch.inf).amax(1)
        # with several true classes the worst of them counts; with no other class there is no gap
        other = errors.masked_fill(present, torch.inf).amin(1).clamp(max=2)
        return {"err_true": own.mean(), "err_other_min": other.mean(), "margin_gap": (other - own).mean()}

    def usual_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Return the staircase of the official code."""
        return StepLR(optimizer, self.lr_step, self.lr_gamma)
