"""Reproducible studies: every source of variation its own seed stream, and a verdict whether A beats B."""

from lightning_methods.reproducibility.aggregates import (
    expected_validation_performance,
    interquartile_mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    t_interval,
)
from lightning_methods.reproducibility.dominance import almost_stochastic_order, violation_ratio
from lightning_methods.reproducibility.fingerprints import differences
from lightning_methods.reproducibility.functional import (
    Interval,
    Verdict,
    bootstrap_interval,
    bootstrap_unpaired,
    holm,
    paired_outcomes,
    power_of_pairs,
    probability_of_outperforming,
    required_runs,
    verdict,
    wilson_interval,
)
from lightning_methods.reproducibility.lints import (
    lint_config,
    lint_datamodule,
    lint_determinism,
    lint_effects,
    lint_environment,
)
from lightning_methods.reproducibility.power import power_curve
from lightning_methods.reproducibility.ranking import (
    critical_difference,
    nemenyi_critical_difference,
    ranking_stability,
)
from lightning_methods.reproducibility.seeding import SOURCES
from lightning_methods.reproducibility.streams import SeedStreams
from lightning_methods.reproducibility.study import Study
from lightning_methods.reproducibility.variance import (
    binomial_std,
    out_of_bootstrap,
    sobol_components,
    two_way_bootstrap,
    variance_components,
    variance_of_mean,
)

__all__ = [
    "SOURCES",
    "Interval",
    "SeedStreams",
    "Study",
    "Verdict",
    "almost_stochastic_order",
    "binomial_std",
    "bootstrap_interval",
    "bootstrap_unpaired",
    "critical_difference",
    "differences",
    "expected_validation_performance",
    "holm",
    "interquartile_mean",
    "lint_config",
    "lint_datamodule",
    "lint_determinism",
    "lint_effects",
    "lint_environment",
    "nemenyi_critical_difference",
    "optimality_gap",
    "out_of_bootstrap",
    "paired_outcomes",
    "performance_profile",
    "power_curve",
    "power_of_pairs",
    "probability_of_improvement",
    "probability_of_outperforming",
    "ranking_stability",
    "required_runs",
    "sobol_components",
    "stratified_bootstrap",
    "t_interval",
    "two_way_bootstrap",
    "variance_components",
    "variance_of_mean",
    "verdict",
    "violation_ratio",
    "wilson_interval",
]
