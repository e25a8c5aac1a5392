"""Importance weighting: weights for any module, and a meter that says whether they still matter."""

from lightning_methods.importance_weighting.callback import ImportanceWeighting
from lightning_methods.importance_weighting.estimation import LabelShift, ShiftEstimate
from lightning_methods.importance_weighting.functional import (
    balanced_weights,
    boundary_shift,
    class_balanced_weights,
    effective_sample_size,
    gradient_share,
    margins,
    normalized_weights,
)
from lightning_methods.importance_weighting.losses import (
    LDAMLoss,
    LogitAdjustedLoss,
    PolyTailLoss,
    VSLoss,
    poly_tail_loss,
)
from lightning_methods.importance_weighting.monitor import WeightEffectMonitor
from lightning_methods.importance_weighting.sampler import DistributedWeightedSampler
from lightning_methods.importance_weighting.shift import (
    bbse,
    calibrate,
    condition_number,
    density_ratio_weights,
    em_prior_shift,
    rlls,
)
from lightning_methods.importance_weighting.sweep import (
    Fading,
    HeadSettings,
    fading_figure,
    ratio_weights,
    sweep_heads,
)

__all__ = [
    "DistributedWeightedSampler",
    "Fading",
    "HeadSettings",
    "ImportanceWeighting",
    "LDAMLoss",
    "LabelShift",
    "LogitAdjustedLoss",
    "PolyTailLoss",
    "ShiftEstimate",
    "VSLoss",
    "WeightEffectMonitor",
    "balanced_weights",
    "bbse",
    "boundary_shift",
    "calibrate",
    "class_balanced_weights",
    "condition_number",
    "density_ratio_weights",
    "effective_sample_size",
    "em_prior_shift",
    "fading_figure",
    "gradient_share",
    "margins",
    "normalized_weights",
    "poly_tail_loss",
    "ratio_weights",
    "rlls",
    "sweep_heads",
]
