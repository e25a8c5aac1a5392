"""The residual networks of He et al. for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument
from lightning_methods.models._chain import Chain
from lightning_methods.models._init import he_init


class CIFARResNet(Chain):
    """The residual network for CIFAR (He et al. 2016, section 4.2): `stem`, `layer1`, `layer2`, `layer3`, `head`.

    A 3x3 convolution, three stages of n basic blocks with width, 2 width and 4 width channels, global average pooling
    and a linear layer: 6n + 2 layers with weights. Shortcuts are the paper's option A, without parameters: every
    second pixel, the new channels zero. No ReLU works in place, so every layer's output can be tapped.

    Shapes: (B, in_channels, H, W) -> (B, num_classes) logits.

    Args:
        depth: 6n + 2: 20 (default), 32, 44, 56, 110.
        width: channels of the first stage. Default 16.
        num_classes: number of logits. Default 10.
        in_channels: channels of the images. Default 3.

    Raises:
        InvalidArgument: if `depth` is not 6n + 2, or a number is not positive.

    Example:
        >>> import torch
        >>> CIFARResNet(depth=8, width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, *, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        if depth < 8 or (depth - 2) % 6:
            below = max(8, (depth - 2) // 6 * 6 + 2)
            raise InvalidArgument(f"depth={depth} is not 6n + 2. The nearest are {below} and {below + 6}.")
        if min(width, num_classes, in_channels) < 1:
            raise InvalidArgument(
                f"width={width}, num_classes={num_classes}, in_channels={in_channels}: positive numbers are needed."
            )
        n = (depth - 2) // 6
        stem = OrderedDict(conv=_conv3x3(in_channels, width), norm=nn.BatchNorm2d(width), act=nn.ReLU())
        super().__init__(
            OrderedDict(
                stem=nn.Sequential(stem),
                layer1=_stage(n, width, width),
                layer2=_stage(n, width, 2 * width),
                layer3=_stage(n, 2 * width, 4 * width),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(4 * width, num_classes),
            )
        )
        he_init(self)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Shapes: (B, before, H, W) -> (B, after, H, W), or half of H and W when the channels grow.

    Args:
        before: channels of the input.
        after: channels of the output.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.new_channels = after - before
        self.conv1 = _conv3x3(before, after, self.stride)
        self.norm1 = nn.BatchNorm2d(after)
        self.act1 = nn.ReLU()
        self.conv2 = _conv3x3(after, after)
        self.norm2 = nn.BatchNorm2d(after)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.act2(h + x)


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _stage(n: int, before: int, after: int) -> nn.Sequential:
    blocks = [BasicBlock(before, after), *(BasicBlock(after, after) for _ in range(n - 1))]
    return nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks, start=1)))
