"""Soft nearest neighbour loss: measure, maximise or minimise how entangled the classes are in any layer."""

from lightning_methods.snnl.callback import SoftNearestNeighborLoss
from lightning_methods.snnl.deep_knn import DeepKNN, NeighborScores
from lightning_methods.snnl.functional import chance_level, class_entanglement, soft_nearest_neighbor_loss
from lightning_methods.snnl.metric import Entanglement
from lightning_methods.snnl.temperature import median_temperature, optimal_temperature, paper_temperature_step

__all__ = [
    "DeepKNN",
    "Entanglement",
    "NeighborScores",
    "SoftNearestNeighborLoss",
    "chance_level",
    "class_entanglement",
    "median_temperature",
    "optimal_temperature",
    "paper_temperature_step",
    "soft_nearest_neighbor_loss",
]
