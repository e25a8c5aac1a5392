"""Augmented dropout: different noise in the forward and the backward pass, for any module."""

from lightning_methods.augmented_dropout.callback import AugmentedDropout
from lightning_methods.augmented_dropout.consumers import dual_conv, dual_linear
from lightning_methods.augmented_dropout.functional import dual_alpha_dropout, dual_dropout
from lightning_methods.augmented_dropout.layers import (
    DualAlphaDropout,
    DualDropout,
    DualDropout1d,
    DualDropout2d,
    DualDropout3d,
)
from lightning_methods.augmented_dropout.schedules import (
    ConstantRate,
    CosineRate,
    CurriculumRate,
    EarlyRate,
    LateRate,
    LinearRate,
    RateSchedule,
)
from lightning_methods.augmented_dropout.scheduling import DropoutSchedule

__all__ = [
    "AugmentedDropout",
    "ConstantRate",
    "CosineRate",
    "CurriculumRate",
    "DropoutSchedule",
    "DualAlphaDropout",
    "DualDropout",
    "DualDropout1d",
    "DualDropout2d",
    "DualDropout3d",
    "EarlyRate",
    "LateRate",
    "LinearRate",
    "RateSchedule",
    "dual_alpha_dropout",
    "dual_conv",
    "dual_dropout",
    "dual_linear",
]
