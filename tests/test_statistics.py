"""Aggregates over seeds and tasks, and bootstrap intervals."""

from functools import partial
from itertools import product

import numpy as np
import pytest

from gradlab.analysis.statistics import (
    bootstrap_difference,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)

# Aggregates, by hand.


def test_interquartile_mean_by_hand():
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 8]) == 4.5
    assert interquartile_mean([8, 1, 7, 2, -100, 3, 6, 1000]) == (2 + 3 + 6 + 7) / 4
    assert interquartile_mean([[1, 100], [2, 200]]) == (2 + 100) / 2, "one run of four is cut at each end"
    assert interquartile_mean([0, 0, 9]) == 3, "three runs: nothing to cut"
    assert interquartile_mean([1, 2, 3, 4, 5]) == 3, "five runs: one at each end"


def test_tasks_are_pooled_and_not_averaged_first():
    scores = np.array([[0.0, 10.0], [0.0, 20.0], [0.0, 30.0], [0.0, 40.0]])
    assert interquartile_mean(scores) == (0 + 0 + 10 + 20) / 4
    per_task = [interquartile_mean(column) for column in scores.T]
    assert np.mean(per_task) != interquartile_mean(scores)  # negative control


def test_mean_median_and_optimality_gap_by_hand():
    scores = [[1.0, 2.0, 30.0], [3.0, 4.0, 50.0]]
    assert mean(scores) == (2 + 3 + 40) / 3 and median(scores) == 3
    assert np.median(scores) != median(scores)  # negative control: the median of all runs is something else
    assert optimality_gap([[0.5, 2.0], [0.75, 1.0]]) == 1 - (0.5 + 1 + 0.75 + 1) / 4
    assert optimality_gap([[0.5, 2.0], [0.75, 1.0]], gamma=2.0) == 2 - (0.5 + 2 + 0.75 + 1) / 4
    with pytest.raises(ValueError, match=r"np\.median"):
        median([1.0, 2.0, 3.0])


@pytest.mark.parametrize("statistic", [interquartile_mean, mean, median, optimality_gap])
def test_aggregates_of_many_resamples_are_those_of_each(statistic):
    stack = np.random.default_rng(0).normal(size=(7, 5, 3))
    np.testing.assert_array_equal(statistic(stack), [statistic(one) for one in stack])


@pytest.mark.parametrize(
    ("scores", "words"),
    [([0.5, np.nan], "1 values that are not finite"), ([[np.inf, 1.0]], "not finite"), ([], "at least one of each")],
)
def test_undefined_scores_are_refused(scores, words):
    for function in (interquartile_mean, mean, stratified_bootstrap, partial(bootstrap_difference, [0.5, 1.0])):
        with pytest.raises(ValueError, match=words):
            function(scores)
    with pytest.raises(ValueError, match="scores of OTTT hold"):
        performance_profile({"BPTT": [1.0], "OTTT": [0.5, np.nan]}, [0.5])


# Intervals.


def test_every_resample_of_three_seeds_by_enumeration():
    """27 equally likely resamples: the interval's ends must be the quantiles of their means."""
    scores = [0.0, 1.0, 5.0]
    every = [np.mean(chosen) for chosen in product(scores, repeat=3)]
    got = stratified_bootstrap(scores, mean, level=0.6, n_boot=20_000)
    expected = np.quantile(every, [0.2, 0.8], method="inverted_cdf")
    np.testing.assert_allclose(expected, [2 / 3, 10 / 3])
    np.testing.assert_allclose([got.low, got.high], expected)
    assert got.value == 2.0


def coverage(scale=1.0, seed_effect=0.0, together=False, repetitions=400):
    """The share of intervals that hold 0, the truth; `scale` shrinks them; `seed_effect` is common to all tasks."""
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(repetitions):
        scores = rng.normal(size=(20, 3)) + [-1.0, 0.0, 1.0] + seed_effect * rng.normal(size=(20, 1))
        for statistic in (interquartile_mean, mean):
            got = stratified_bootstrap(scores, statistic, n_boot=400, seed=i, together=together)
            middle, half = (got.low + got.high) / 2, scale * (got.high - got.low) / 2
            hits += abs(middle) <= half
    return hits / (2 * repetitions)


def test_intervals_cover_as_often_as_they_say():
    assert 0.90 <= coverage() <= 0.98
    assert coverage(scale=0.5, repetitions=100) < 0.85  # negative control


def test_seeds_that_move_all_tasks_must_be_drawn_together():
    assert 0.90 <= coverage(seed_effect=2.0, together=True, repetitions=200) <= 0.98
    assert coverage(seed_effect=2.0, repetitions=100) < 0.85  # negative control: tasks drawn independently


def test_strata_keep_the_difference_of_tasks_out_of_the_interval():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 3)) * 0.01 + [0.0, 1.0, 2.0]
    got = stratified_bootstrap(scores, mean)
    pooled = scores.ravel()
    means = pooled[rng.integers(60, size=(2000, 60))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert 0 < got.high - got.low < 0.05 * (high - low)


def test_the_seed_is_the_only_source_of_randomness():
    scores = np.random.default_rng(0).normal(size=(9, 2))
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    one = stratified_bootstrap(scores, seed=4)
    np.random.seed(2)  # noqa: NPY002
    assert stratified_bootstrap(scores, seed=4) == one
    assert stratified_bootstrap(scores, seed=np.random.default_rng(4)) == one
    assert stratified_bootstrap(scores, seed=5) != one  # negative control


def test_a_function_of_somebody_else():
    scores = np.random.default_rng(0).normal(size=(9, 2))
    assert stratified_bootstrap(scores, lambda s: s.mean()) == stratified_bootstrap(scores, mean)
    assert stratified_bootstrap(scores, np.median).value == np.median(scores)
    with pytest.raises(ValueError, match="one number"):
        stratified_bootstrap(scores, lambda s: s.mean(axis=0))


def test_what_few_seeds_cannot_say():
    assert "10 different" in stratified_bootstrap([1.0, 2.0, 4.0]).warning
    assert "1716 different" in stratified_bootstrap(np.arange(7.0)).warning
    assert stratified_bootstrap(np.arange(8.0)).warning == ""  # negative control
    one = stratified_bootstrap([[1.0, 2.0]])
    assert one.value == 1.5 and np.isnan([one.low, one.high]).all() and one.warning == "one seed: no interval"
    assert "no width" in stratified_bootstrap(np.full(10, 0.9)).warning
    with pytest.raises(ValueError, match="take 200 or more"):
        stratified_bootstrap([1.0, 2.0], n_boot=100)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_bootstrap([1.0, 2.0], level=95)


def test_pairs_cancel_what_seeds_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(12, 2))
    x, y = shared + 0.1 + 1e-3 * rng.normal(size=shared.shape), shared
    got = bootstrap_difference(x, y)
    assert got.low < 0.1 < got.high and got.high - got.low < 0.01
    shuffled = bootstrap_difference(x, y[::-1])  # negative control: pairs of other seeds
    assert shuffled.high - shuffled.low > 50 * (got.high - got.low)
    assert bootstrap_difference(x, x).value == 0 and "no width" in bootstrap_difference(x, x).warning
    with pytest.raises(ValueError, match="same seeds"):
        bootstrap_difference(x, y[:5])


def test_probability_of_improvement_by_hand():
    assert probability_of_improvement([2, 4], [1, 3]).value == 3 / 4
    assert probability_of_improvement([1, 2, 2], [2, 2, 0]).value == (1 + (0.5 + 0.5 + 1) * 2) / 9, (
        "ties count one half"
    )
    assert probability_of_improvement([1, 1], [1, 1]).value == 0.5
    two_tasks = probability_of_improvement([[2, 0], [4, 0]], [[1, 9], [3, 9]])
    assert two_tasks.value == (3 / 4 + 0) / 2
    x, y = np.random.default_rng(0).integers(0, 5, (2, 30, 1)).astype(float)
    by_loops = np.mean([[float(a > b) + 0.5 * (a == b) for b in y[:, 0]] for a in x[:, 0]])
    assert probability_of_improvement(x, y).value == pytest.approx(by_loops, rel=1e-14)
    assert probability_of_improvement(y, x).value == pytest.approx(1 - by_loops, rel=1e-14)


def test_probability_of_improvement_has_an_interval():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(15, 2))
    x, y = common + 0.3 + 0.1 * rng.normal(size=common.shape), common
    apart, paired = probability_of_improvement(x, y), probability_of_improvement(x, y, paired=True)
    assert apart.value == paired.value and apart.low < apart.value < apart.high
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    by_hand = []
    for _ in range(1000):
        rows = rng.integers(15, size=(15, 2))
        by_hand.append(np.mean([np.mean(x[rows[:, m], m][:, None] > y[rows[:, m], m]) for m in (0, 1)]))
    np.testing.assert_allclose(np.quantile(by_hand, [0.025, 0.975]), [paired.low, paired.high], atol=0.02)
    double = [np.repeat(scores[:, :1], 4, axis=1) for scores in (x, y)]  # four tasks that tell the same
    apart, together = (probability_of_improvement(*double, paired=True, together=t) for t in (False, True))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert "no width" in probability_of_improvement(x + 10, y).warning
    with pytest.raises(ValueError, match="belong together"):
        probability_of_improvement(x, y[:4], paired=True)
    assert probability_of_improvement(x, y[:4]).n == 4


def test_performance_profile_by_hand():
    profile = performance_profile({"A": [[0.1, 0.5], [0.5, 0.9]], "B": [0.2]}, [0.0, 0.1, 0.5, 1.0])
    np.testing.assert_array_equal(profile.share, [[1.0, 0.75, 0.25, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert np.isnan(profile.low[1]).all() and profile.warnings[1] == "one seed: no interval"
    assert (profile.low[0] <= profile.share[0]).all() and (profile.share[0] <= profile.high[0]).all()
    frame = profile.to_frame()
    assert list(frame.columns[:6]) == ["rule", "layer", "metric", "threshold", "value", "low"] and len(frame) == 8
    for wrong in ([0.5, 0.5], [], [[0.1]], [np.nan]):
        with pytest.raises(ValueError, match="increasing"):
            performance_profile({"A": [0.1]}, wrong)
