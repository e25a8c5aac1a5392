"""Reproducible studies: every source of variation on a seed of its own, and what its runs allow to conclude."""

from lightning_methods.reproducibility.fingerprints import differences
from lightning_methods.reproducibility.lints import (
    lint_config,
    lint_datamodule,
    lint_determinism,
    lint_effects,
    lint_environment,
)
from lightning_methods.reproducibility.seeding import SOURCES
from lightning_methods.reproducibility.streams import SeedStreams

__all__ = [
    "SOURCES",
    "SeedStreams",
    "differences",
    "lint_config",
    "lint_datamodule",
    "lint_determinism",
    "lint_effects",
    "lint_environment",
]
