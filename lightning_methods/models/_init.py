"""How the reference networks are initialised."""

from __future__ import annotations

from torch import nn


def he_init(net: nn.Module) -> None:
    """Draw convolutions for ReLU as He et al. (2015), and the linear layers for a linear output; biases are zero."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
