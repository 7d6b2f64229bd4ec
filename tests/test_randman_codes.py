"""The Randman task's two codes: exact counts and times, and which of them carries the class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from randman_parts import KEY, SMALL, points

from gradlab.tasks import Randman
from gradlab.tasks.base import random_times

# --- the rate code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "most"), [(1, None), (0, 8), (5, 5)])
def test_rate_counts_are_exactly_the_definition(least, most):
    task = Randman(**SMALL, min_spikes=least, max_spikes=most)
    top = 20 if most is None else most
    x, labels = points(task, 300)
    values = task.values(x, labels)
    counts = np.asarray(task.encode(KEY, values).sum(0))
    y = np.asarray(values)[:, 0]
    expected = np.minimum(least + np.floor(y * np.float32(top - least + 1)), top)
    np.testing.assert_array_equal(counts, expected)
    assert counts.min() == least and counts.max() == top  # yhat = 1 gives `most`, not one more
    edges = jnp.array([[[0.0, 1.0]]])
    np.testing.assert_array_equal(task.encode(KEY, edges).sum(0), [[least, top]])


def chi_square_over_time(spikes: np.ndarray, count: int) -> float:
    """p-value (two-sided, n large) that the steps of trains [steps, n] of `count` spikes are uniform."""
    steps, n = spikes.shape
    p = count / steps
    statistic = ((spikes.sum(1) - n * p) ** 2).sum() / (n * p * (1 - p)) * (steps - 1) / steps
    lower = scipy.stats.chi2.cdf(statistic, steps - 1)
    return 2 * min(lower, 1 - lower)


@pytest.mark.parametrize("count", [1, 7, 19])
def test_random_times_are_uniform_over_time(count):
    steps = 20
    spikes = np.asarray(random_times(KEY, jnp.full((200, 50), count), steps)).reshape(steps, -1)
    np.testing.assert_array_equal(spikes.sum(0), count)
    assert chi_square_over_time(spikes, count) > 1e-3
    # Negative control: a sampler whose probability is off by one step (it crowds the spikes to the end).
    left, biased = np.full(10_000, count), []
    rng = np.random.default_rng(0)
    for t in range(steps):
        chosen = (rng.random(10_000) * (steps - t + 1) < left) | (left == steps - t)
        left = left - chosen
        biased.append(chosen)
    assert chi_square_over_time(np.array(biased), count) < 1e-6


def test_every_subset_of_steps_is_equally_likely():
    spikes = np.asarray(random_times(KEY, jnp.full(60_000, 2), 5))
    _, seen = np.unique(spikes.T, axis=0, return_counts=True)
    assert len(seen) == 10
    assert scipy.stats.chisquare(seen).pvalue > 1e-3


def test_random_times_reach_all_counts_and_steps():
    counts = jnp.tile(jnp.arange(51), (200, 1))
    spikes = np.asarray(random_times(KEY, counts, 50))
    np.testing.assert_array_equal(spikes.sum(0), counts)
    assert spikes[-1].sum() > 0 and spikes[0].sum() > 0


def overlaps_are_independent(spikes: np.ndarray, count: int) -> bool:
    """Whether neighbouring trains [steps, n] share as many steps as independent ones (5 standard errors)."""
    steps, n = spikes.shape
    shared = (spikes[:, 0::2] * spikes[:, 1::2]).sum(0)
    law = scipy.stats.hypergeom(steps, count, count)
    return bool(abs(shared.mean() - law.mean()) < 5 * law.std() / np.sqrt(n // 2))


def test_times_are_independent_between_units_samples_and_batches():
    task, count = Randman(**SMALL, min_spikes=6, max_spikes=6), 6
    first, second = (np.asarray(task.batch(jax.random.key(k), 500).inputs) for k in (0, 1))
    between_units = first.reshape(20, -1)
    between_samples = first.transpose(0, 2, 1).reshape(20, -1)
    between_batches = np.stack([first, second], -1).reshape(20, -1)
    for trains in (between_units, between_samples, between_batches):
        assert overlaps_are_independent(trains, count)
    # Negative control: one permutation of time shared by all trains, as one public version has it.
    shuffled = np.random.default_rng(0).permutation(20) < count
    shared = np.broadcast_to(shuffled[:, None], between_units.shape).astype(float)
    assert not overlaps_are_independent(shared, count)
    assert chi_square_over_time(shared, count) < 1e-6


# --- the time code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spikes", "step_frac"), [(1, 1.0), (1, 0.33), (4, 0.5), (20, 1.0)])
def test_time_code_has_constant_counts_in_its_window(spikes, step_frac):
    task = Randman(**SMALL, code="time", spikes=spikes, step_frac=step_frac)
    inputs = np.asarray(task.batch(KEY, 400).inputs)
    np.testing.assert_array_equal(inputs.sum(0), spikes)
    window = int(np.ceil(20 * step_frac))
    assert inputs[window:].sum() == 0
    assert inputs[:window].sum(axis=(1, 2)).min() > 0  # every step of the window is used


@pytest.mark.parametrize("step_frac", [1.0, 0.33])
def test_spike_times_are_exactly_the_definition(step_frac):
    task = Randman(**SMALL, code="time", step_frac=step_frac)
    x, labels = points(task, 300)
    y = np.asarray(task.values(x, labels))
    times = np.asarray(task.encode(KEY, y)).argmax(0)
    span = 20 * step_frac
    expected = np.minimum(np.floor(y[:, 0] * np.float32(span)), np.ceil(span) - 1)
    np.testing.assert_array_equal(times, expected)
    ends = task.encode(KEY, jnp.array([[[0.0, 1.0]]]))
    np.testing.assert_array_equal(ends.argmax(0), [[0, np.ceil(span) - 1]])  # the last spike is not lost
    np.testing.assert_array_equal(ends.sum(0), 1)


def test_several_spikes_keep_their_order_and_never_meet():
    task = Randman(**SMALL, code="time", spikes=3)
    values = jnp.array([[[0.0, 0.5, 1.0], [0.0, 0.0, 1.0], [0.0, 0.99, 1.0]]])
    spikes = np.asarray(task.encode(KEY, values))[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(spikes[:, 0]), [0, 1, 2])
    np.testing.assert_array_equal(np.flatnonzero(spikes[:, 1]), [0, 10, 19])
    np.testing.assert_array_equal(np.flatnonzero(spikes[:, 2]), [17, 18, 19])


# --- what carries information -------------------------------------------------------------------------------


def decoding_accuracy(task: Randman, feature, size: int = 2000) -> float:
    """Accuracy on new samples of a least-squares read-out of feature(inputs), trained on as many."""
    train, test = (task.batch(jax.random.key(k), size) for k in (5, 6))
    design = [np.hstack([feature(np.asarray(b.inputs)), np.ones((size, 1))]) for b in (train, test)]
    weights = np.linalg.lstsq(design[0], np.asarray(train.targets), rcond=None)[0]
    return float(((design[1] @ weights).argmax(1) == np.asarray(test.targets).argmax(1)).mean())


def count_feature(inputs: np.ndarray) -> np.ndarray:
    return inputs.sum(0)


def time_feature(inputs: np.ndarray) -> np.ndarray:
    """Mean spike time of every unit."""
    steps = np.arange(len(inputs))[:, None, None]
    return (inputs * steps).sum(0) / np.maximum(inputs.sum(0), 1)


def test_each_code_is_read_from_its_own_feature_only():
    sizes = {"classes": 4, "units": 16, "steps": 30, "manifold_dim": 1, "alpha": 2.0}
    rate, time = Randman(**sizes), Randman(**sizes, code="time")
    chance, noise = 1 / 4, 5 * np.sqrt(1 / 4 * 3 / 4 / 2000)
    assert decoding_accuracy(rate, count_feature) > chance + 3 * noise
    assert decoding_accuracy(time, time_feature) > chance + 3 * noise
    assert abs(decoding_accuracy(rate, time_feature) - chance) < noise
    assert abs(decoding_accuracy(time, count_feature) - chance) < noise
