"""The decision procedure: values computed independently in float64, invariants, edges, bad input."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.reproducibility import (
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
from lightning_methods.reproducibility.functional import bootstrap_counts, critical_wins, power_of_unpaired

A = [0.91, 0.93, 0.92, 0.95, 0.90, 0.94, 0.93, 0.92]
B = [0.90, 0.92, 0.93, 0.91, 0.89, 0.92, 0.93, 0.90]


def pairs(wins: int, total: int, ties: int = 0) -> tuple[list[float], list[float]]:
    return [1.0] * wins + [0.5] * ties + [0.0] * (total - wins - ties), [0.5] * total


# -- oracles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "beta", "runs"),
    [
        (0.6, 0.05, 181),
        (0.7, 0.05, 46),
        (0.75, 0.05, 29),
        (0.8, 0.05, 21),
        (0.9, 0.05, 12),
        (0.6, 0.2, 104),
        (0.7, 0.2, 26),
        (0.75, 0.2, 17),
        (0.8, 0.2, 12),
        (0.9, 0.2, 7),
    ],
)
def test_noether(gamma, beta, runs):
    assert required_runs(gamma, 0.05, beta) == runs


def test_probability_paired_and_unpaired():
    assert probability_of_outperforming(A, B) == 0.8125
    assert probability_of_outperforming(A, B, paired=False) == 0.7109375
    assert paired_outcomes(A, B) == (6, 1, 1)
    assert probability_of_outperforming(A, B, mode="min") == 1 - 0.8125


def test_bootstrap_intervals_of_the_example():
    assert bootstrap_interval(A, B)[1:] == (0.5625, 1.0)
    _, low, high = bootstrap_interval(A, B, paired=False)
    assert low == pytest.approx(0.430, abs=0.02)
    assert high == pytest.approx(0.930, abs=0.02)


@pytest.mark.parametrize(
    ("wins", "total", "low", "high"),
    [
        (23, 29, 0.62069, 0.93103),
        (20, 29, 0.51724, 0.86207),
        (21, 29, 0.55172, 0.86207),
        (22, 29, 0.58621, 0.89655),
        (8, 10, 0.5, 1.0),
        (29, 29, 1.0, 1.0),
    ],
)
def test_the_percentile_bootstrap_of_wins_is_binomial(wins, total, low, high):
    found = bootstrap_interval(*pairs(wins, total))
    assert found[1:] == pytest.approx((low, high), abs=1e-5)


def test_the_exact_interval_is_the_limit_of_resampling_with_ties():
    a, b = map(np.array, pairs(11, 20, ties=4))
    rng = np.random.default_rng(0)
    index = rng.integers(20, size=(200_000, 20))
    sampled = ((a > b) + 0.5 * (a == b))[index].mean(1)
    expected = np.quantile(sampled, [0.025, 0.975], method="inverted_cdf")
    assert bootstrap_interval(a, b)[1:] == pytest.approx(expected, abs=1e-12)


def test_wilson():
    assert wilson_interval(23, 29) == pytest.approx((0.6161, 0.9015), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.883, 1.0), abs=5e-4)
    assert wilson_interval(0, 5)[0] == 0.0


@pytest.mark.parametrize(
    ("wins", "total", "decision"),
    [
        (23, 29, "significant and meaningful"),
        (8, 10, "not significant"),
        (29, 29, "significant and meaningful"),
        (14, 29, "not significant"),
        (120, 200, "significant, not meaningful"),
        (5, 5, "not enough runs"),
        (1, 1, "not enough runs"),
    ],
)
def test_the_three_verdicts(wins, total, decision):
    assert verdict(*pairs(wins, total)).decision == decision


def test_one_pair_says_how_many_are_needed():
    assert str(verdict([1.0], [0.0])) == "not enough runs (1; need 29 for gamma=0.75)"


def test_all_ties():
    found = verdict([1.0] * 12, [1.0] * 12)
    assert (found.probability, found.low, found.high) == (0.5, 0.5, 0.5)
    assert "no difference measured" in str(found)
    assert found.decision == "not significant"


@pytest.mark.parametrize(
    ("runs", "true", "power"),
    [(29, 0.5, 0.027), (29, 0.6, 0.21), (29, 0.7, 0.63), (29, 0.75, 0.83), (29, 0.8, 0.95), (50, 0.7, 0.80)],
)
def test_the_power_of_the_paired_rule(runs, true, power):
    assert power_of_pairs(true, runs) == pytest.approx(power, abs=0.03)


def test_no_number_of_pairs_claims_too_often():
    chances = {n: power_of_pairs(0.5, n) for n in range(2, 301)}
    assert chances[29] <= 0.035
    assert max(chances.values()) <= 0.04  # at 21 pairs, where counts are coarse
    assert chances[5] == 0.0


def test_the_rule_of_the_verdict_is_the_one_whose_power_is_computed():
    for total in (6, 7, 9, 15, 29):
        first = critical_wins(total)
        for wins in range(total + 1):
            assert verdict(*pairs(wins, total)).decision.startswith("significant") == (wins >= first)


def test_required_runs_by_the_rule_really_used():
    n = required_runs(0.75, rule="paired")
    assert power_of_pairs(0.75, n) >= 0.95
    assert power_of_pairs(0.75, n - 1) < 0.95
    unpaired = required_runs(0.75, rule="unpaired", repetitions=400)
    assert 20 <= unpaired <= 36  # Noether's own number is near it: that is the statistic it is derived for
    assert power_of_unpaired(np.sqrt(2) * 0.6745, 29, repetitions=400) > 0.85


# -- invariants --------------------------------------------------------------------------------------------------------

scores = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9, 1.5]), min_size=6, max_size=24)


@settings(max_examples=40, deadline=None)
@given(scores, scores, st.booleans())
def test_a_over_b_and_b_over_a_sum_to_one_and_never_both_win(x, y, paired):
    n = min(len(x), len(y))
    x, y = (x[:n], y[:n]) if paired else (x, y)
    p, q = probability_of_outperforming(x, y, paired=paired), probability_of_outperforming(y, x, paired=paired)
    assert p + q == pytest.approx(1.0, abs=1e-12)
    one, other = (verdict(*sides, paired=paired, resamples=200) for sides in ((x, y), (y, x)))
    assert not (one.decision.startswith("significant") and other.decision.startswith("significant"))
    # increasing transforms and a shift of both change nothing
    again = verdict(np.exp(x) + 3, np.exp(y) + 3, paired=paired, resamples=200)
    assert (again.decision, again.probability, again.low) == (one.decision, one.probability, one.low)


@settings(max_examples=25, deadline=None)
@given(scores, st.integers(0, 100))
def test_intervals_are_nested_in_the_level(x, seed):
    y = np.random.default_rng(seed).permutation(x)
    for paired in (True, False):
        _, low, high = bootstrap_interval(x, y, paired=paired, alpha=0.05, resamples=300)
        _, wide_low, wide_high = bootstrap_interval(x, y, paired=paired, alpha=0.01, resamples=300)
        assert wide_low <= low <= high <= wide_high


def test_generators_and_the_global_state():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_interval(A, B, paired=False, rng=np.random.default_rng(5))
    assert bootstrap_interval(A, B, paired=False, rng=5) == first
    assert bootstrap_interval(A, B, paired=False, rng=6) != first
    verdict(A, B, paired=False)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_constants_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for paired in (True, False):
            found = verdict([1.0] * 8, [1.0] * 8, paired=paired)
            assert found.probability == 0.5
            assert found.correlation is None
            assert verdict([1.0] * 8, [0.0] * 8, paired=paired).decision == "significant and meaningful"


def test_correlation_is_reported_and_both_parameters_named():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=4000)
    a, b = shared + 0.3 + 0.5 * rng.normal(size=4000), shared + 0.5 * rng.normal(size=4000)
    found = verdict(a, b)
    assert found.correlation == pytest.approx(0.8, abs=0.03)
    assert found.probability == pytest.approx(0.664, abs=0.03)
    assert found.unpaired_probability == pytest.approx(0.575, abs=0.03)
    assert "paired P(A>B)" in str(found)
    assert "unpaired P(A>B)" in str(verdict(a[:30], b[:30], paired=False))


def test_bootstrap_over_tasks_is_fast():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        bootstrap_unpaired(a, b, resamples=2000)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.1


def test_vectorised_repetitions_equal_the_definition():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (5, 2)).astype(float), rng.integers(0, 4, (7, 2)).astype(float)
    fast = bootstrap_unpaired(a, b, resamples=40, rng=3)
    generator = np.random.default_rng(3)
    slow = np.zeros(40)
    for task in range(2):
        left, right = (bootstrap_counts(n, 40, generator).astype(int) for n in (5, 7))
        for i in range(40):
            x, y = np.repeat(a[:, task], left[i]), np.repeat(b[:, task], right[i])
            slow[i] += probability_of_outperforming(x, y, paired=False) / 2
    assert fast == pytest.approx(slow, abs=1e-12)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 1.0, 0.2, 1.3])
def test_gamma_out_of_range(gamma):
    with pytest.raises(InvalidArgument, match=r"gamma=.*\(0.5, 1\)"):
        required_runs(gamma)
    with pytest.raises(InvalidArgument, match="gamma"):
        verdict(A, B, gamma=gamma)


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.0), ("alpha", 0.5), ("beta", 0.7), ("beta", -0.1)])
def test_levels_out_of_range(name, value):
    with pytest.raises(InvalidArgument, match=name):
        required_runs(0.75, **{name: value})


def test_scores_that_cannot_be_compared():
    with pytest.raises(InvalidArgument, match="1 scores that are NaN"):
        probability_of_outperforming([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ShapeMismatch, match="3 runs and b has 2"):
        probability_of_outperforming([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ShapeMismatch, match="vector of at least 1"):
        verdict([], [])
    with pytest.raises(InvalidArgument, match="Did you mean"):
        verdict(A, B, mode="maxx")
    with pytest.raises(InvalidArgument, match="no number"):
        verdict(["x"], [1.0])
    with pytest.raises(ShapeMismatch, match="tasks"):
        bootstrap_unpaired(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(InvalidArgument, match="wins=6 of total=5"):
        wilson_interval(6, 5)
    with pytest.raises(InvalidArgument, match="More than 100 runs"):
        required_runs(0.51, rule="paired", largest=100)
