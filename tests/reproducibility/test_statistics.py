"""Aggregates, rankings, stochastic order, variance components, power: oracles, invariants, bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.reproducibility import (
    almost_stochastic_order,
    binomial_std,
    critical_difference,
    expected_validation_performance,
    interquartile_mean,
    nemenyi_critical_difference,
    optimality_gap,
    out_of_bootstrap,
    performance_profile,
    power_curve,
    probability_of_improvement,
    ranking_stability,
    sobol_components,
    stratified_bootstrap,
    two_way_bootstrap,
    variance_components,
    variance_of_mean,
    violation_ratio,
)

A = [0.91, 0.93, 0.92, 0.95, 0.90, 0.94, 0.93, 0.92]
B = [0.90, 0.92, 0.93, 0.91, 0.89, 0.92, 0.93, 0.90]
TABLE = [
    [0.9, 0.8, 0.7, 0.6],
    [0.85, 0.86, 0.7, 0.5],
    [0.9, 0.8, 0.75, 0.76],
    [0.6, 0.7, 0.5, 0.4],
    [0.9, 0.8, 0.7, 0.7],
]


# -- aggregates --------------------------------------------------------------------------------------------------------


def test_interquartile_mean():
    x = [[0.1, 0.5], [0.2, 0.6], [0.3, 0.7], [0.4, 0.8], [0.9, 0.0]]
    assert interquartile_mean(x) == pytest.approx(0.45, abs=1e-12)
    wide = np.random.default_rng(0).normal(size=(6, 7, 3))
    assert interquartile_mean(wide) == pytest.approx(stats.trim_mean(wide, 0.25, axis=None), abs=1e-12)
    by_axis = interquartile_mean(wide, axis=(1, 2))
    assert by_axis == pytest.approx([stats.trim_mean(one, 0.25, axis=None) for one in wide], abs=1e-12)
    with pytest.raises(InvalidArgument, match="no score"):
        interquartile_mean([])


def test_optimality_gap():
    assert optimality_gap([[0.5, 1.5]], gamma=1.0) == 0.25


def test_stratified_bootstrap_resamples_within_tasks():
    x = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    sums = stratified_bootstrap(x, lambda m: float(m[:, 1].mean() - m[:, 0].mean()), resamples=500)
    assert sums.estimate == 10.0
    assert 8.0 <= sums.low < 10.0 < sums.high <= 12.0
    fast = stratified_bootstrap(x, np.mean, resamples=300, rng=4)
    slow = stratified_bootstrap(x, lambda m: float(np.mean(m)), resamples=300, rng=4)
    assert fast == pytest.approx(slow)
    with_tasks = stratified_bootstrap(x, np.mean, resamples=300, rng=4, resample_tasks=True)
    assert with_tasks.high - with_tasks.low > fast.high - fast.low
    with pytest.raises(InvalidArgument, match="NaN"):
        stratified_bootstrap([[math.nan]])


def test_probability_of_improvement_averages_tasks():
    rng = np.random.default_rng(2)
    x, y = rng.normal(1, 1, (12, 4)), rng.normal(0, 1, (9, 4))
    expected = np.mean([stats.mannwhitneyu(x[:, t], y[:, t]).statistic / (12 * 9) for t in range(4)])
    found = probability_of_improvement(x, y)
    assert found.estimate == pytest.approx(expected, abs=1e-12)
    assert found.low < expected < found.high


def test_profile():
    found = performance_profile([[0.2, 0.4], [0.6, 0.8]], [0.1, 0.3, 0.7, 0.9], resamples=200)
    assert found.fraction.tolist() == [1.0, 0.75, 0.25, 0.0]
    assert (found.low <= found.fraction).all()
    assert (found.high >= found.fraction).all()
    assert len(performance_profile(TABLE).thresholds) == 101


def test_expected_validation_performance():
    values = [0.7, 0.8, 0.8, 0.9, 0.95]
    assert expected_validation_performance(values) == pytest.approx([0.83, 0.89, 0.92, 0.94, 0.95], abs=1e-12)
    biased = [expected_validation_performance(values, n, unbiased=False) for n in range(1, 6)]
    assert biased == pytest.approx([0.83, 0.878, 0.902, 0.9164, 0.925808], abs=1e-12)
    many = np.random.default_rng(0).normal(size=3000)
    assert expected_validation_performance(many, 3000) == pytest.approx(many.max())
    with pytest.raises(InvalidArgument, match="from 1 to 5"):
        expected_validation_performance(values, 6)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_and_tests_of_demsar():
    found = critical_difference(TABLE)
    assert found.ranks == pytest.approx([1.4, 1.6, 3.3, 3.7])
    assert found.chi_square == pytest.approx(12.5510204, abs=1e-7)
    assert found.chi_square == pytest.approx(stats.friedmanchisquare(*np.transpose(TABLE)).statistic)
    assert found.pvalue == pytest.approx(0.00571536, abs=1e-8)
    assert found.iman_davenport == pytest.approx(20.5, abs=1e-6)
    assert found.critical_difference == pytest.approx(2.09760566, abs=1e-6)
    assert nemenyi_critical_difference(4, 15) == pytest.approx(1.21105319, abs=1e-6)


def test_posthoc_tests():
    holm = critical_difference(TABLE).pvalues
    raw = stats.wilcoxon(np.subtract(*np.transpose(TABLE)[[0, 2]])).pvalue
    assert holm[0, 2] == holm[2, 0] >= raw
    nemenyi = critical_difference(TABLE, posthoc="nemenyi").pvalues
    gap = critical_difference(TABLE).critical_difference
    ranks = critical_difference(TABLE).ranks
    far = np.abs(ranks[:, None] - ranks) > gap
    assert ((nemenyi < 0.05) == far).all()
    # lower is better: the order turns round
    assert critical_difference(TABLE, mode="min").ranks == pytest.approx(5 - ranks)


def test_friedman_without_any_difference_or_with_the_same_order_everywhere():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = critical_difference(np.ones((4, 3)))
        assert (flat.chi_square, flat.pvalue) == (0.0, 1.0)
        assert (flat.pvalues == 1).all()
        assert critical_difference([[3, 2, 1]] * 5).iman_davenport is None
    with pytest.raises(ShapeMismatch, match="at least two data sets"):
        critical_difference([[1.0, 2.0]])


def test_ranking_stability():
    x = np.array([[0.9, 0.8, 0.1], [0.7, 0.8, 0.1], [0.9, 0.7, 0.1], [0.9, 0.8, 0.1]])
    found = ranking_stability(x, resamples=4000)
    assert found.single_run_agrees == 0.75
    assert found.single_run_winner == 0.75
    assert found.flip_rate[0, 1] == 0.25
    assert found.rank_probability.sum(0) == pytest.approx([1, 1, 1])
    assert found.rank_probability[2].tolist() == [0, 0, 1]
    taus = [stats.kendalltau(x[i], x[j]).statistic for i in range(4) for j in range(i)]
    assert found.kendall_tau == pytest.approx(np.mean(taus))
    turned = ranking_stability(-x, mode="min", resamples=4000)
    assert turned.rank_probability == pytest.approx(found.rank_probability)


def test_ranks_that_tie_are_shared():
    found = ranking_stability([[1.0, 1.0], [1.0, 1.0]], resamples=10)
    assert found.rank_probability.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found.kendall_tau is None
    assert found.flip_rate.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ShapeMismatch, match="two models"):
        ranking_stability([1.0, 2.0])


# -- stochastic order --------------------------------------------------------------------------------------------------


def test_violation_ratio_of_the_example():
    assert violation_ratio(A, B) == 0.0
    assert violation_ratio(B, A) == 1.0
    assert violation_ratio(A, A) == 0.5


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 9), (12, 7)])
def test_the_exact_integral_is_the_limit_of_a_fine_grid(n, m):
    rng = np.random.default_rng(n)
    a, b = np.sort(rng.normal(0.2, 1, n)), np.sort(rng.normal(0, 1, m))
    t = (np.arange(400_000) + 0.5) / 400_000
    difference = a[(t * n).astype(int)] - b[(t * m).astype(int)]
    expected = (difference[difference < 0] ** 2).sum() / (difference**2).sum()
    assert violation_ratio(a, b) == pytest.approx(expected, abs=1e-4)
    assert violation_ratio(a, b) + violation_ratio(b, a) == pytest.approx(1.0)


def test_almost_stochastic_order():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 1, 30), rng.normal(0, 1, 30)
    assert almost_stochastic_order(a, b).dominates
    assert not almost_stochastic_order(b, a).dominates
    # more comparisons ask for more
    bounds = [almost_stochastic_order(a - 1.6, b, comparisons=c).epsilon_min for c in (1, 5, 50)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]
    assert almost_stochastic_order([1.0] * 5, [1.0] * 5)[:2] == (0.5, 0.5)
    assert almost_stochastic_order(-a, -b, mode="min").dominates
    with pytest.raises(InvalidArgument, match="1 and 5 runs"):
        almost_stochastic_order([8], [5, 5, 8, 7, 8])


# -- variance ----------------------------------------------------------------------------------------------------------


def test_one_source_at_a_time():
    rng = np.random.default_rng(0)
    samples = {"split": rng.normal(0, 2, 400), "init": rng.normal(0, 1, 400), "dropout": np.ones(400)}
    found = variance_components(samples, reference="split")
    assert found["init"].share == pytest.approx(0.5, abs=0.06)
    assert found["init"].low < 1 < found["init"].high
    assert (found["dropout"].std, found["dropout"].effect) == (0.0, False)
    assert variance_components({"init": [1.0, 1.0]}, reference="init")["init"].share is None
    with pytest.raises(InvalidArgument, match=r"reference='splt'.*split"):
        variance_components(samples, reference="splt")
    with pytest.raises(ShapeMismatch, match="at least 2"):
        variance_components({"init": [1.0]})


def test_sobol_indices_with_an_interaction():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200_000, 3)), rng.normal(size=(200_000, 3))

    def f(x):
        return 2 * x[:, 0] + x[:, 1] + x[:, 0] * x[:, 2] + 100

    swapped = {}
    for s in range(3):
        mixed = a.copy()
        mixed[:, s] = b[:, s]
        swapped[f"x{s + 1}"] = f(mixed)
    found = sobol_components(f(a), f(b), swapped, resamples=20)
    assert [found[f"x{s}"].first for s in (1, 2, 3)] == pytest.approx([4 / 6, 1 / 6, 0], abs=0.02)
    assert [found[f"x{s}"].total for s in (1, 2, 3)] == pytest.approx([5 / 6, 1 / 6, 1 / 6], abs=0.02)
    assert found["x3"].interaction == pytest.approx(1 / 6, abs=0.03)
    assert found["x1"].total_interval[0] < 5 / 6 < found["x1"].total_interval[1] + 0.02


def test_sobol_without_variance_and_with_unequal_rows():
    assert sobol_components([1, 1], [1, 1], {"init": [1, 1]}) is None
    with pytest.raises(ShapeMismatch, match="init has 3 rows"):
        sobol_components([1, 2], [2, 1], {"init": [1, 2, 3]})


@pytest.mark.parametrize(
    ("rho", "expected"),
    [(0.1, (0.02, 0.0087178, 0.0066030)), (0.5, (0.02, 0.0148324, 0.0142127)), (0.0, (0.02, 0.0063246, 0.002))],
)
def test_variance_of_a_mean_that_shares_what_is_fixed(rho, expected):
    found = [math.sqrt(variance_of_mean(0.02, rho, k)) for k in (1, 10, 100)]
    assert found == pytest.approx(expected, abs=5e-8)


def test_binomial_noise():
    assert binomial_std(0.93, 10_000) == pytest.approx(0.00255147, abs=1e-8)
    assert binomial_std(0.663, 277) == pytest.approx(0.02840088, abs=1e-8)
    assert binomial_std(0.99, 10_000) == pytest.approx(0.00099499, abs=1e-8)
    with pytest.raises(InvalidArgument, match="accuracy"):
        binomial_std(93, 10)


def test_two_way_bootstrap_separates_runs_from_examples():
    rng = np.random.default_rng(0)
    ease = rng.random(500)  # examples differ, runs do not
    a = np.tile(ease > 0.2, (10, 1)).astype(float)
    b = np.tile(ease > 0.3, (10, 1)).astype(float)
    found = two_way_bootstrap(a, b, resamples=500)
    assert found["runs"].low == pytest.approx(found["runs"].high)
    assert found["examples"].low < found["examples"].estimate < found["examples"].high
    width = {name: x.high - x.low for name, x in found.items()}
    assert width["both"] == pytest.approx(width["examples"], rel=0.25)
    runs = np.repeat(rng.random((10, 1)) > 0.5, 500, axis=1).astype(float)
    found = two_way_bootstrap(runs, np.zeros_like(runs), resamples=500)
    assert found["examples"].low == pytest.approx(found["examples"].high)
    assert found["runs"].low < found["runs"].high
    with pytest.raises(ShapeMismatch, match="same"):
        two_way_bootstrap(a, b[:, :3])


def test_out_of_bootstrap():
    train, test = out_of_bootstrap(2000, rng=1)
    assert len(train) == 2000
    assert not set(train) & set(test)
    assert len(test) / 2000 == pytest.approx(math.exp(-1), abs=0.03)
    assert len(out_of_bootstrap(100, test_size=10, rng=0)[1]) == 10
    with pytest.raises(InvalidArgument, match="test_size=90"):
        out_of_bootstrap(100, test_size=90, rng=0)


# -- power -------------------------------------------------------------------------------------------------------------


def test_power_curve_of_pairs():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 29)
    a = noise + 0.9 + rng.normal(0, 1, 29)
    found = power_curve(a, noise, sizes=[5, 10, 29, 60])
    assert found.power[0] == 0.0
    assert (np.diff(found.power) >= 0).all()
    assert found.needed is not None
    assert found.more == max(found.needed - 29, 0)
    assert power_curve(a, noise, sizes=[found.needed]).power[0] >= 0.95
    worse = power_curve(noise, a)
    assert (worse.needed, worse.more, worse.noether) == (None, None, None)


def test_power_curve_unpaired_and_without_variance():
    rng = np.random.default_rng(0)
    found = power_curve(rng.normal(1, 1, 12), rng.normal(0, 1, 12), sizes=[5, 20], paired=False, repetitions=60)
    assert found.power[0] < found.power[1]
    sure = power_curve([1.0, 1.0], [0.0, 0.0], sizes=[5, 6])
    assert sure.power.tolist() == [0.0, 1.0]
    assert power_curve([1.0, 1.0], [1.0, 1.0]).probability == 0.5
    assert power_curve([1.0, 1.001, 0.999], [1.0, 1.0005, 0.9995], largest=50).needed is None
