"""Geometric scattering: features of whole graphs from random walks at many scales."""

from lightning_methods.geometric_scattering.functional import (
    lazy_random_walk,
    scattering_coefficients,
    scattering_paths,
    wavelets,
)
from lightning_methods.geometric_scattering.moments import feature_names, scattering_moments

__all__ = [
    "feature_names",
    "lazy_random_walk",
    "scattering_coefficients",
    "scattering_moments",
    "scattering_paths",
    "wavelets",
]
