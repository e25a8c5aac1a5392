"""Geometric scattering: features of whole graphs from random walks at many scales."""

from lightning_methods.geometric_scattering.callback import ScatteringExplorer
from lightning_methods.geometric_scattering.encoder import ScatteringEncoder
from lightning_methods.geometric_scattering.functional import (
    lazy_random_walk,
    scattering_coefficients,
    scattering_paths,
    wavelets,
)
from lightning_methods.geometric_scattering.module import ScatteringClassifier
from lightning_methods.geometric_scattering.moments import feature_names, moment_contributions, scattering_moments
from lightning_methods.geometric_scattering.structure import clustering_coefficient, degree, eccentricity
from lightning_methods.geometric_scattering.subspaces import (
    ClassSubspaces,
    class_subspaces,
    filter_responses,
    pca_dimensions,
    z_scores,
)
from lightning_methods.geometric_scattering.svm import CrossValidation, ScatteringSVM
from lightning_methods.geometric_scattering.transform import ClusteringCoefficient, Eccentricity, GeometricScattering

__all__ = [
    "ClassSubspaces",
    "ClusteringCoefficient",
    "CrossValidation",
    "Eccentricity",
    "GeometricScattering",
    "ScatteringClassifier",
    "ScatteringEncoder",
    "ScatteringExplorer",
    "ScatteringSVM",
    "class_subspaces",
    "clustering_coefficient",
    "degree",
    "eccentricity",
    "feature_names",
    "filter_responses",
    "lazy_random_walk",
    "moment_contributions",
    "pca_dimensions",
    "scattering_coefficients",
    "scattering_moments",
    "scattering_paths",
    "wavelets",
    "z_scores",
]
