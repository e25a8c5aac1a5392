"""Three convolutions and a linear layer, for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lightning_methods.errors import InvalidArgument
from lightning_methods.models._chain import Chain
from lightning_methods.models._init import he_init


class ConvNet(Chain):
    """The small network of the adversarial-examples literature: `layer1`, `layer2`, `layer3`, `head`.

    Convolutions of 8x8 stride 2 (same padding, 64 channels), 6x6 stride 2 (128) and 5x5 (128), each with a ReLU, then
    a linear layer; He initialisation. Used by Frosst, Papernot and Hinton (2019) among others.

    Shapes: (B, *in_shape) -> (B, num_classes) logits.

    Args:
        in_shape: (C, H, W) of the images, at least 28x28. Default (1, 28, 28).
        num_classes: number of logits. Default 10.
        width: factor on the channels 64, 128, 128. Default 1.

    Raises:
        InvalidArgument: if the images are too small, or a number is not positive.

    Example:
        >>> import torch
        >>> ConvNet((3, 32, 32), width=0.25)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    _kernels = (8, 6, 5)
    _strides = (2, 2, 1)
    _too_small = "Use SmallConvNet for images from 8x8."

    def __init__(self, in_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, *, width: float = 1.0) -> None:
        if len(in_shape) != 3 or min(*in_shape, num_classes) < 1 or width <= 0:
            raise InvalidArgument(
                f"in_shape={tuple(in_shape)}, num_classes={num_classes}, width={width}: a shape (C, H, W) and positive "
                "numbers are needed."
            )
        channels, h, w = in_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (out, kernel, stride) in enumerate(zip((64, 128, 128), self._kernels, self._strides, strict=True)):
            # "same" in the first layer only: half of what the kernel covers beyond its stride
            padding = (kernel - stride + 1) // 2 if i == 0 else 0
            h, w = ((side + 2 * padding - kernel) // stride + 1 for side in (h, w))
            if min(h, w) < 1:
                raise InvalidArgument(
                    f"in_shape={tuple(in_shape)} is too small for {type(self).__name__}: nothing is left after its "
                    f"layer {i + 1}. {self._too_small}"
                )
            out = max(1, round(out * width))
            conv = nn.Conv2d(channels, out, kernel, stride, padding)
            layers[f"layer{i + 1}"] = nn.Sequential(OrderedDict(conv=conv, act=nn.ReLU()))
            channels = out
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(channels * h * w, num_classes)
        super().__init__(layers)
        he_init(self)


class SmallConvNet(ConvNet):
    """`ConvNet` with 3x3 kernels and strides 1, 2, 1, for images from 8x8 such as the digits of scikit-learn.

    Shapes: (B, *in_shape) -> (B, num_classes) logits.

    Args:
        in_shape: (C, H, W) of the images, at least 7x7. Default (1, 8, 8).
        num_classes: number of logits. Default 10.
        width: factor on the channels 64, 128, 128. Default 1.

    Raises:
        InvalidArgument: if the images are too small, or a number is not positive.

    Example:
        >>> import torch
        >>> SmallConvNet(width=0.5)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    _kernels = (3, 3, 3)
    _strides = (1, 2, 1)
    _too_small = "Images of at least 7x7 are needed; an MLP takes smaller ones."

    def __init__(self, in_shape: Sequence[int] = (1, 8, 8), num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__(in_shape, num_classes, width=width)
