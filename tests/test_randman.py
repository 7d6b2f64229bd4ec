"""The Randman task: its definition, its batches, where it can run, and errors at the door."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from randman_parts import KEY, SMALL, points

from gradlab.tasks import Randman, Task
from gradlab.tasks.randman import sine_of_turns


def slow_values(task: Randman, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """f of the docstring's equation (1), in float64 loops over samples, units, dimensions and harmonics."""
    a, b, c = task.draws()
    f = np.ones((len(x), task.spikes, task.units))
    for n, j, i in np.ndindex(f.shape):
        for d in range(task.manifold_dim):
            total = 0.0
            for k in range(1, task.harmonics):
                s = 1 / ((k + 1) ** task.alpha + (1 if task.spectrum == "reference" else 0))
                at = (labels[n], j, i, d, k)
                total += a[at] * s * np.sin(2 * np.pi * (k * x[n, d] * b[at] + c[at]))
            f[n, j, i] *= total
    return f


# --- the manifolds ------------------------------------------------------------------------------------------


def test_sine_is_right_over_all_turns_that_occur():
    turns = np.linspace(-2, 1001, 3_000_001).astype(np.float32)
    exact = np.sin(2 * np.pi * turns.astype(np.float64))
    assert np.abs(np.asarray(jax.jit(sine_of_turns)(turns)) - exact).max() < 4e-7
    # Negative control: the plain float32 formula multiplies by a rounded 2 pi first and misses it.
    plain = np.sin(np.float32(2 * np.pi) * turns)
    assert np.abs(plain - exact).max() > 1e-5


@pytest.mark.parametrize(
    "changes",
    [{}, {"spectrum": "power"}, {"alpha": 3.0, "manifold_dim": 1}, {"code": "time", "spikes": 2}],
    ids=str,
)
def test_values_equal_a_slow_evaluation_of_the_definition(changes):
    task = Randman(**{**SMALL, "alpha": 2.5, **changes})
    x, labels = points(task, 24)
    got = np.asarray(task.values(x, labels), np.float64)
    f = slow_values(task, x.astype(np.float64), labels)
    assert got.shape == (24, task.spikes, task.units)
    # Equation (4) is affine with one low and high per class, spike and unit, wherever it does not clip.
    for c, j, i in np.ndindex(task.classes, task.spikes, task.units):
        y, g = got[labels == c, j, i], f[labels == c, j, i]
        inside = (y > 0) & (y < 1)
        slope, offset = np.polyfit(g[inside], y[inside], 1)
        assert slope > 0
        assert np.abs(slope * g[inside] + offset - y[inside]).max() < 3e-6
    other = dataclasses.replace(task, spectrum="power" if task.spectrum == "reference" else "reference")
    assert np.abs(np.asarray(other.values(x, labels)) - got).max() > 1e-2


def test_default_manifolds_are_accurate_with_a_thousand_harmonics():
    task = Randman(classes=1, units=2)
    x, labels = points(task, 8)
    got = np.asarray(task.values(x, labels), np.float64)
    f = slow_values(task, x.astype(np.float64), labels)
    for i in range(task.units):
        slope, offset = np.polyfit(f[:, 0, i], got[:, 0, i], 1)
        assert np.abs(slope * f[:, 0, i] + offset - got[:, 0, i]).max() < 1e-5


def test_standardisation_is_the_range_of_the_fixed_points_and_covers_zero_to_one():
    task = Randman(**SMALL)
    rng = np.random.default_rng(0)
    for c in range(task.classes):
        y = np.asarray(task.values(rng.random((4000, 2)), np.full(4000, c)))[:, 0]
        assert (y.min(0) < 0.05).all() and (y.max(0) > 0.95).all()
        assert ((y == 0) | (y == 1)).mean() < 0.01  # hardly anything lies outside the fixed range


def test_map_depends_on_neither_batch_nor_key():
    task = Randman(**SMALL)
    x, labels = points(task, 64)
    together = np.asarray(task.values(x, labels))
    alone = np.concatenate([task.values(x[n : n + 1], labels[n : n + 1]) for n in range(64)])
    np.testing.assert_allclose(alone, together, atol=2e-6)

    # Negative control: standardising over the batch, as other versions do, moves the same points.
    def over_batch(y: np.ndarray) -> np.ndarray:
        return (y - y.min(0)) / (y.max(0) - y.min(0))

    same = labels == 0
    assert np.abs(over_batch(together[same])[:4] - over_batch(together[same][:4])).max() > 0.05


def test_classes_spikes_and_seeds_have_manifolds_of_their_own():
    task = Randman(**SMALL, code="time", spikes=2)
    x = np.random.default_rng(2).random((500, 2))
    other = dataclasses.replace(task, manifold_seed=1)
    curves = [np.asarray(t.values(x, np.full(500, c))) for t in (task, other) for c in range(3)]
    flat = np.concatenate([c.reshape(500, -1) for c in curves], 1)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 0.999 and np.abs(correlation).mean() < 0.5
    again = np.asarray(Randman(**SMALL, code="time", spikes=2).values(x, np.full(500, 0)))
    np.testing.assert_array_equal(again, curves[0])  # control: the same manifold is found to be the same


def test_draws_are_uniform_and_the_first_classes_and_units_stay_when_there_are_more():
    task = Randman(**{**SMALL, "alpha": 1.0})
    for part in task.draws():
        assert scipy.stats.kstest(part.ravel()[:20_000], "uniform").pvalue > 1e-3
        assert np.unique(part).size == part.size
    more = dataclasses.replace(task, classes=4, units=9)
    x, labels = points(task, 50)
    np.testing.assert_allclose(more.values(x, labels)[..., :6], task.values(x, labels), atol=2e-6)
    assert np.abs(more.values(x, labels)[..., 3:] - task.values(x, labels)).max() > 0.1


@pytest.mark.parametrize(("alpha", "harmonics"), [(0.5, 1000), (1, 1000), (2, 32), (3, 10), (10, 2)])
def test_harmonics(alpha, harmonics):
    assert Randman(alpha=alpha).harmonics == harmonics


# --- a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["rate", "time"])
def test_batch_is_pure_in_its_key_and_shaped_as_promised(code):
    task = Randman(**SMALL, code=code)
    batch, again, other = task.batch(KEY, 16), task.batch(KEY, 16), task.batch(jax.random.key(1), 16)
    assert batch.inputs.shape == (20, 16, 6) and batch.targets.shape == (16, 3) and batch.mask is None
    assert batch.inputs.dtype == batch.targets.dtype == jnp.float32
    assert set(np.unique(batch.inputs)) == {0, 1}
    np.testing.assert_array_equal(batch.targets.sum(1), 1)
    np.testing.assert_array_equal(batch.inputs, again.inputs)
    np.testing.assert_array_equal(batch.targets, again.targets)
    assert (batch.inputs != other.inputs).mean() > 0.05
    assert isinstance(task, Task)


def test_labels_are_uniform_and_every_sample_has_its_own_coordinates():
    task = Randman(**SMALL, max_spikes=20)
    batch = task.batch(KEY, 3000)
    assert scipy.stats.chisquare(batch.targets.sum(0)).pvalue > 1e-3
    counts = np.asarray(batch.inputs.sum(0))
    labels = np.asarray(batch.targets.argmax(1))
    assert len(np.unique(counts, axis=0)) > 2000
    # Shared coordinates would make the counts of two classes functions of the same x: sample n of one class
    # would predict sample n of the other. The control with shared x shows that this would be seen.
    size = min((labels == 0).sum(), (labels == 1).sum())
    pair = np.corrcoef(np.hstack([counts[labels == 0][:size], counts[labels == 1][:size]]).T)[:6, 6:]
    assert np.abs(pair).max() < 4.5 / np.sqrt(size)
    x = np.random.default_rng(3).random((size, 2))
    shared = [np.asarray(task.values(x, np.full(size, c)))[:, 0] for c in (0, 1)]
    assert np.abs(np.corrcoef(np.hstack(shared).T)[:6, 6:]).max() > 4.5 / np.sqrt(size)


@pytest.mark.parametrize("code", ["rate", "time"])
def test_runs_under_jit_vmap_and_scan(code):
    # A seed that no other test uses: the first evaluation, bounds and all, happens inside the trace.
    task = Randman(**SMALL, code=code, manifold_seed=77 + len(code) + (code == "time"))
    keys = jax.random.split(KEY, 3)
    _, scanned = jax.jit(lambda ks: jax.lax.scan(lambda c, k: (c, task.batch(k, 16)), 0, ks))(keys)
    mapped = jax.vmap(lambda k: task.batch(k, 16))(keys)
    for n, key in enumerate(keys):
        for got in (scanned, mapped):
            # Another compilation may round a value near a step to the other side, once in very many.
            assert (got.inputs[n] != task.batch(key, 16).inputs).mean() < 2e-3
            np.testing.assert_array_equal(got.targets[n], task.batch(key, 16).targets)
    assert (scanned.inputs[0] != scanned.inputs[1]).mean() > 0.05  # control: other keys do differ


def test_batch_compiles_once_per_task_and_size():
    task, traces = Randman(**SMALL), []

    @jax.jit
    def draw(key):
        traces.append(1)
        return task.batch(key, 16).inputs

    for n in range(3):
        draw(jax.random.key(n))
    assert len(traces) == 1


def test_float64_sees_the_same_spikes():
    task = Randman(**SMALL)
    single = task.batch(KEY, 16)
    with pytest.raises(ValueError, match="enable_x64"):
        dataclasses.replace(task, dtype="float64").batch(KEY, 16)
    with jax.enable_x64(True):
        double = dataclasses.replace(task, dtype="float64").batch(KEY, 16)
        still_single = task.batch(KEY, 16)
    assert double.inputs.dtype == double.targets.dtype == np.float64
    assert still_single.inputs.dtype == np.float32
    np.testing.assert_array_equal(double.inputs, single.inputs)
    np.testing.assert_array_equal(double.targets, single.targets)


# --- a value object, and errors at the door -----------------------------------------------------------------


def test_hashable_and_plain():
    task = Randman(alpha=1, code="time", spikes=2)
    fields = dataclasses.asdict(task)
    assert Randman(**json.loads(json.dumps(fields))) == task
    assert hash(Randman(alpha=1)) == hash(Randman(alpha=1.0)) and repr(Randman(alpha=1)) == repr(Randman())
    assert Randman() != Randman(manifold_seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.units = 3


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"code": "phase"}, ValueError, "rate, time"),
        ({"spectrum": "numpy"}, ValueError, "reference, power"),
        ({"dtype": "bfloat16"}, ValueError, "float32, float64"),
        ({"units": 0}, ValueError, "units=0.*at least 1"),
        ({"steps": 50.0}, TypeError, "whole number"),
        ({"classes": True}, TypeError, "whole number"),
        ({"manifold_seed": -1}, ValueError, "at least 0"),
        ({"alpha": 0.0}, ValueError, r"alpha=0.0.*\(0, 10\]"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan"),
        ({"alpha": "1"}, TypeError, "give a number"),
        ({"min_spikes": 9, "max_spikes": 8}, ValueError, "min_spikes <= max_spikes <= steps"),
        ({"max_spikes": 51}, ValueError, "at most once a step"),
        ({"max_spikes": 3.0}, TypeError, "whole number"),
        ({"spikes": 2}, ValueError, "does not use spikes"),
        ({"step_frac": 0.5}, ValueError, "does not use step_frac"),
        ({"code": "time", "max_spikes": 9}, ValueError, "does not use max_spikes"),
        ({"code": "time", "step_frac": 1.5}, ValueError, r"\(0, 1\]"),
        ({"code": "time", "spikes": 26, "step_frac": 0.5}, ValueError, "only 25 of 50 steps"),
    ],
    ids=str,
)
def test_errors_say_what_to_do(fields, error, words):
    with pytest.raises(error, match=words):
        Randman(**fields)


def test_errors_of_calls_say_what_to_do():
    task = Randman(**SMALL)
    with pytest.raises(ValueError, match="size=0"):
        task.batch(KEY, 0)
    with pytest.raises(TypeError, match="whole number"):
        task.batch(KEY, 4.0)
    with pytest.raises(ValueError, match=r"give x \[size, 2\]"):
        task.values(np.zeros((4, 3)), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
        task.values(np.zeros((4, 2)), np.full(4, 3))
    with pytest.raises(TypeError, match="whole numbers"):
        task.values(np.zeros((4, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="choose less"):
        Randman(classes=1, units=1, manifold_dim=20, alpha=10).batch(KEY, 1)
    just_fits = Randman(**SMALL, code="time", spikes=10, step_frac=0.5)
    assert just_fits.batch(KEY, 1).inputs.sum() == 10 * 6
