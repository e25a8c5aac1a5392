"""Similarity of representations: compare layers, networks and moments of training by CKA and its relatives."""

from lightning_methods.cka.callback import RepresentationSimilarity
from lightning_methods.cka.functional import cka, hsic, kernel_target_alignment
from lightning_methods.cka.identification import layer_identification
from lightning_methods.cka.influence import bootstrap_cka, leave_one_out_cka
from lightning_methods.cka.matrix import similarity_matrix
from lightning_methods.cka.metric import MinibatchCKA, StreamingCKA
from lightning_methods.cka.subspaces import cca, linear_regression_r2, procrustes, pwcca, svcca

__all__ = [
    "MinibatchCKA",
    "RepresentationSimilarity",
    "StreamingCKA",
    "bootstrap_cka",
    "cca",
    "cka",
    "hsic",
    "kernel_target_alignment",
    "layer_identification",
    "leave_one_out_cka",
    "linear_regression_r2",
    "procrustes",
    "pwcca",
    "similarity_matrix",
    "svcca",
]
