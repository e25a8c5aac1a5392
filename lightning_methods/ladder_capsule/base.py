"""What both capsule networks do the same way: from images to capsules, steps, measuring, optimisation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_methods.core._lightning import LightningModule, OneFamily, rank_zero_warn
from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.passes import preserved
from lightning_methods.errors import BatchFormat, InvalidArgument, NotFinite, ShapeMismatch
from lightning_methods.ladder_capsule.functional import class_targets, reconstruction_loss, wide
from lightning_methods.ladder_capsule.layers import Activation, Decoder, PrimaryCapsules, check_positive, is_count
from lightning_methods.ladder_capsule.metrics import PoseGeneralizationCurve
from lightning_methods.report import curves, log_figure, log_table

Stage = Literal["train", "val", "test"]


class Output(Protocol):
    """What a network says of a batch: activities of the classes `(B, C)`, poses `(B, C, D)`."""

    @property
    def scores(self) -> Tensor:
        """Activities."""

    @property
    def poses(self) -> Tensor:
        """Poses."""


class CapsuleModule(OneFamily, LightningModule):
    """Base of the capsule networks; a subclass says what its head makes of the capsules, and its loss.

    Args:
        backbone: from images to feature maps; `None` for the paper's convolution.
        in_channels, image_size: of the images.
        num_classes, types, capsule_dim, pose_dim, width, kernel_size, stride: sizes.
        activation: of the primary capsules.
        decoder: whether the image is reconstructed from the pose of its class.
        decoder_weight, decoder_hidden, decoder_activation: how.
        optimizer, scheduler, lr: how it is optimised.
        inputs, targets: where they are in a batch.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        *,
        in_channels: int,
        image_size: int | Sequence[int],
        num_classes: int,
        types: int,
        capsule_dim: int,
        pose_dim: int,
        width: int,
        kernel_size: int,
        stride: int,
        activation: Activation,
        decoder: bool,
        decoder_weight: float,
        decoder_hidden: Sequence[int],
        decoder_activation: Literal["sigmoid", "none"],
        optimizer: Callable[[Iterable], Optimizer] | None,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        lr: float,
        inputs: Selector,
        targets: Selector,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InvalidArgument(f"num_classes={num_classes}: at least two classes are needed.")
        check_positive(in_channels=in_channels, width=width, kernel_size=kernel_size, pose_dim=pose_dim)
        for name, number in (("lr", lr), ("decoder_weight", decoder_weight)):
            if not number > 0:
                raise InvalidArgument(f"{name}={number}: a positive number is needed.")
        self.image_shape = (in_channels, *_sides(image_size))
        self.num_classes = num_classes
        self.optimizer, self.scheduler, self.lr = optimizer, scheduler, lr
        self.inputs, self.targets = inputs, targets
        self.decoder_weight = decoder_weight
        self.backbone = _convolution(self.image_shape, width, kernel_size) if backbone is None else backbone
        features = _dry_run(self.backbone, self.image_shape)
        self.primary = PrimaryCapsules(
            features.shape[1], types, capsule_dim, kernel_size=kernel_size, stride=stride, activation=activation
        )
        rows, columns = self.primary.grid(features)
        self.grid = (rows, columns, types)
        self.extent = _extent(self.image_shape, rows, columns, kernel_size, stride, known=backbone is None)
        self.decoder: Decoder | None = (
            Decoder(num_classes, pose_dim, self.image_shape, hidden=decoder_hidden, activation=decoder_activation)
            if decoder
            else None
        )
        self.pose_curve = PoseGeneralizationCurve()
        self._warned = False

    @property
    def num_caps(self) -> int:
        """Return the number of primary capsules."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def capsules(self, x: Tensor) -> Tensor:
        """Return the primary capsules `(B, N, d)` of images, before squashing."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ShapeMismatch(
                f"The images have the shape {tuple(x.shape)}; (B, {', '.join(map(str, self.image_shape))}) is needed. "
                "Change in_channels and image_size, or the images."
            )
        if not x.is_floating_point():
            raise BatchFormat(f"The images are {x.dtype}. Floating-point values are needed: images.float() / 255.")
        if not torch.compiler.is_compiling() and not self._warned and not bool(torch.isfinite(x).all()):
            self._warned = True
            rank_zero_warn("The images hold NaN or infinite values, and so will the loss.", category=NotFinite)
        return self.primary(self.backbone(x))

    def reconstruct(self, poses: Tensor, shares: Tensor) -> Tensor:
        """Return the images `(B, channels, H, W)` of poses `(B, C, D)` of the classes in `shares` `(B, C)`.

        Raises:
            InvalidArgument: if the network has no decoder.
        """
        if self.decoder is None:
            raise InvalidArgument(f"{type(self).__name__} has no decoder. Make it with one: decoder=True.")
        return self.decoder(poses, shares)

    @abstractmethod
    def losses(self, out: Any, target: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss with their factors, the first the margin loss."""

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._measured("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch."""
        self._measured("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch."""
        self._measured("test", batch, dataloader_idx)

    def _measured(self, stage: Stage, batch: Any, loader: int = 0) -> Tensor:
        x, target = inputs_of(batch, self.inputs), targets_of(batch, self.targets)
        out = self(x)
        terms = self.losses(out, target)
        if self.decoder is not None:
            # the true capsules are shown in training, those that are found afterwards
            shares = class_targets(target, self.num_classes) if stage == "train" else best(out.scores, 1)
            image = self.reconstruct(out.poses, shares.to(out.poses.dtype))
            terms["reconstruction"] = self.decoder_weight * reconstruction_loss(image, x)
        loss = torch.stack(list(terms.values())).sum()
        if self._trainer is not None and not self._trainer.barebones:
            self._log_batch(stage, loader, out, target, loss, terms)
        return loss

    def _log_batch(
        self, stage: Stage, loader: int, out: Output, target: Tensor, loss: Tensor, terms: dict[str, Tensor]
    ) -> None:
        scores = wide(out.scores.detach())
        true = class_targets(target, self.num_classes, scores.dtype)
        correct = is_correct(scores, true)
        values = {"loss": loss, "accuracy": correct.to(scores.dtype).mean(), **terms}
        if stage != "train":
            values |= self.summary(scores, true)
        names = self._loader_names(stage)
        suffix = f"/{names[loader]}" if names else ""
        if names and stage == "test":
            self.pose_curve.update(correct, torch.full_like(correct, loader, dtype=torch.long))
        for name, value in values.items():
            self.log(
                f"{stage}/{name}{suffix}",
                value.detach().float(),
                on_step=False,
                on_epoch=True,
                batch_size=len(scores),
                prog_bar=name in ("loss", "accuracy") and not names,
                sync_dist=True,
                add_dataloader_idx=False,
            )

    @abstractmethod
    def summary(self, scores: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Return what else to log of the activities of the classes, beside loss and accuracy."""

    # -- several loaders, one a pose -----------------------------------------------------------------------------------

    def _loader_names(self, stage: Stage) -> list[str]:
        """Return a name a loader, none where there is one loader."""
        loaders = None if stage == "train" else getattr(self.trainer, f"{stage}_dataloaders", None)
        if not isinstance(loaders, (list, tuple)) or len(loaders) < 2:
            return []
        levels = [level.name for level in self._levels()] if stage == "test" else []
        return levels if len(levels) == len(loaders) else [str(i) for i in range(len(loaders))]

    def _levels(self) -> Sequence[Any]:
        return getattr(getattr(self.trainer, "datamodule", None), "levels", ())

    def on_test_epoch_start(self) -> None:
        """Begin the curve of accuracy over poses."""
        self.pose_curve.reset()

    def on_test_epoch_end(self) -> None:
        """Draw the accuracy over the levels of each pose, where there is one loader a level."""
        levels, names = self._levels(), self._loader_names("test")
        if not names or [level.name for level in levels] != names or self.trainer.barebones:
            return
        found = self.pose_curve.compute()
        by_loader = dict(zip(found["levels"].tolist(), found["accuracy"].tolist(), strict=True))
        # a loader that limit_test_batches emptied has no accuracy
        accuracy = [by_loader.get(float(i), math.nan) for i in range(len(levels))]
        axes = dict.fromkeys(level.axis for level in levels)
        for axis in axes:
            points = sorted((level.value, accuracy[i]) for i, level in enumerate(levels) if level.axis == axis)
            if len(points) > 1:
                values, heights = zip(*points, strict=True)
                line = {type(self).__name__: (list(values), list(heights))}
                figure = curves(line, title=f"Accuracy over {axis}", x_label=axis, y_label="test accuracy")
                log_figure(self.trainer, f"ladder_capsule/accuracy_{axis}", figure)
        rows = [[level.axis, level.value, accuracy[i]] for i, level in enumerate(levels)]
        log_table(self.trainer, "ladder_capsule/poses", ["pose", "level", "accuracy"], rows)

    # -- optimisation --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return the optimizer, Adam unless another was given, and the scheduler."""
        made = (
            torch.optim.Adam(self.parameters(), lr=self.lr)
            if self.optimizer is None
            else self.optimizer(self.parameters())
        )
        if self.scheduler is not None:
            return [made], [self.scheduler(made)]
        usual = self.usual_scheduler(made)
        return made if usual is None else {"optimizer": made, "lr_scheduler": {"scheduler": usual, "interval": "step"}}

    def usual_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return the scheduler of the paper, stepped once a batch."""
        return None


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are plain values, so that checkpoints load with `weights_only=True`.

    Example:
        >>> plain({"k": 70, "hidden": (128, 256), "backbone": nn.ReLU(), "reg": None})
        {'k': 70, 'hidden': [128, 256]}
    """
    whole = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in given.items() if not k.startswith("_")}
    return {k: v for k, v in whole.items() if isinstance(v, (int, float, str, list))}


def check_not_negative(**numbers: float | None) -> None:
    """Raise `InvalidArgument` unless all numbers that are given are at least 0."""
    for name, number in numbers.items():
        if number is not None and not number >= 0:
            raise InvalidArgument(f"{name}={number}: at least 0 is needed.")


def best(scores: Tensor, count: int | Tensor) -> Tensor:
    """Return ones for the `count` highest activities of each row, the first of equal ones.

    Shapes:
        scores `(B, C)`, count a number or `(B, 1)` -> `(B, C)`.

    Example:
        >>> best(torch.tensor([[0.1, 0.7, 0.2]]), 2)
        tensor([[0., 1., 1.]])
    """
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count).to(scores.dtype)


def is_correct(scores: Tensor, true: Tensor) -> Tensor:
    """Return whether the most active classes are those with the largest share in the targets, `(B,)`.

    Example:
        >>> is_correct(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([True])
    """
    present = ((true == true.amax(1, keepdim=True)) & (true > 0)).to(scores.dtype)
    return (best(scores, present.sum(1, keepdim=True)) == present).all(1)


def _sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        raise InvalidArgument(f"image_size={image_size!r}: the side of the images is needed, or (height, width).")
    return sides[0], sides[1]


def _convolution(image_shape: tuple[int, int, int], width: int, kernel_size: int) -> nn.Module:
    """Return the paper's first layer."""
    smallest = 2 * kernel_size - 1  # this layer, and that of the primary capsules
    if min(image_shape[1:]) < smallest:
        raise ShapeMismatch(
            f"image_size={image_shape[1:]} is smaller than two kernels of {kernel_size} x {kernel_size}, which need "
            f"{smallest} x {smallest} pixels. Lower kernel_size, or give a backbone of your own."
        )
    conv = nn.Conv2d(image_shape[0], width, kernel_size)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.ReLU())


def _extent(
    image_shape: tuple[int, int, int], rows: int, columns: int, kernel_size: int, stride: int, *, known: bool
) -> tuple[float, float, float, float]:
    """Return (left, right, bottom, top) of the grid of capsules in pixels: where the centres of their fields lie.

    Of a backbone that is not `known` nothing is known of these, and the grid is laid over the whole image.
    """
    if not known:
        return -0.5, image_shape[2] - 0.5, image_shape[1] - 0.5, -0.5
    first, half = kernel_size - 1, stride / 2
    right, bottom = (first + stride * (count - 1) + half for count in (columns, rows))
    return first - half, right, bottom, first - half


def _dry_run(backbone: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """Return the feature maps of a black image, and leave the backbone as it was."""
    first = next(backbone.parameters(), torch.zeros(()))
    image = torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype)
    try:
        with preserved(backbone), torch.no_grad():
            features = backbone.eval()(image)
    except RuntimeError as error:
        raise ShapeMismatch(
            f"The backbone cannot take images {image_shape} (in_channels, image_size): {error}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 4:
        what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ShapeMismatch(f"The backbone gives {what}. Feature maps (B, channels, H, W) are needed.")
    return features
