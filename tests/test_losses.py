"""Losses over time against NumPy: scale, masks, targets, errors; what is refused; accuracy that hides nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

import gradlab as gl

T, B, N = 5, 3, 4
RANDOM = np.random.default_rng(0)
OUTPUTS = RANDOM.normal(size=(T, B, N))
LABELS = np.array([2, 0, 3])
ONE_HOT = np.eye(N)[LABELS]
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]], float)
MASKS = pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])


def batch(targets=ONE_HOT, mask=None, n_steps=T, size=B):
    mask = None if mask is None else jnp.asarray(mask)
    return gl.Batch(jnp.zeros((n_steps, size, 2)), jnp.asarray(targets), mask)


def cross_entropy(outputs, one_hot):
    """[time, batch]: the textbook formula."""
    return -(log_softmax(outputs, axis=-1) * one_hot).sum(-1)


def per_step(values, mask, time):
    """The mean over samples of each sample's masked sum, or mean, over steps; values and mask [time, batch]."""
    sums = (values * mask).sum(0)
    return np.mean(sums / np.maximum(mask.sum(0), 1) if time == "mean" else sums)


@MASKS
@pytest.mark.parametrize("time", ["mean", "sum"])
def test_a_per_step_loss_is_the_mean_over_samples_of_masked_sums(x64, mask, time):
    loss = gl.PerStep(optax.softmax_cross_entropy, time=time)
    full = np.ones((T, B)) if mask is None else mask
    expected = per_step(cross_entropy(OUTPUTS, ONE_HOT), full, time)
    assert float(loss(jnp.asarray(OUTPUTS), batch(mask=mask))) == pytest.approx(expected, rel=1e-14)


@MASKS
@pytest.mark.parametrize("time", ["mean", "sum"])
def test_an_accumulated_loss_sees_the_masked_sum_of_the_outputs(x64, mask, time):
    loss = gl.Accumulated(optax.softmax_cross_entropy, time=time)
    full = np.ones((T, B)) if mask is None else mask
    pooled = (OUTPUTS * full[..., None]).sum(0)
    pooled = pooled / np.maximum(full.sum(0), 1)[:, None] if time == "mean" else pooled
    expected = cross_entropy(pooled, ONE_HOT).mean()
    assert float(loss(jnp.asarray(OUTPUTS), batch(mask=mask))) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", [gl.PerStep, gl.Accumulated])
@pytest.mark.parametrize("time", ["mean", "sum"])
def test_a_batch_is_the_mean_of_its_samples(x64, kind, time):
    loss = kind(optax.softmax_cross_entropy, time=time)
    whole = float(loss(jnp.asarray(OUTPUTS), batch(mask=MASK)))
    samples = [
        float(loss(jnp.asarray(OUTPUTS[:, b : b + 1]), batch(ONE_HOT[b : b + 1], MASK[:, b : b + 1], size=1)))
        for b in range(B)
    ]
    assert whole == pytest.approx(np.mean(samples), rel=1e-14)
    # A mean pooled over the counted steps of all samples is another number: long samples would weigh more.
    values = cross_entropy(OUTPUTS, ONE_HOT)
    assert (values * MASK).sum() / MASK.sum() != pytest.approx(whole, rel=1e-2)


def test_mean_and_sum_differ_by_the_number_of_steps(x64):
    outputs = jnp.asarray(OUTPUTS)
    mean, total = (gl.PerStep(optax.softmax_cross_entropy, time=time)(outputs, batch()) for time in ("mean", "sum"))
    assert float(total) == pytest.approx(T * float(mean), rel=1e-14)


def test_weights_share_one_among_the_steps_of_a_sample(x64):
    weights = gl.PerStep(optax.l2_loss).weights(jnp.asarray(MASK), T, B, jnp.float64)
    np.testing.assert_allclose(weights.sum(0), [1 / 3, 1 / 3, 0.0], rtol=1e-14)
    np.testing.assert_allclose(gl.PerStep(optax.l2_loss, time="sum").weights(None, T, B, jnp.float64), 1 / 3)


def test_a_sample_without_any_counted_step_weighs_nothing_and_gives_no_nan():
    empty = gl.PerStep(optax.l2_loss)
    outputs, blank = jnp.asarray(OUTPUTS, jnp.float32), batch(mask=np.zeros((T, B)))
    assert float(empty(outputs, blank)) == 0.0
    assert not empty.errors(outputs, blank).any()


def test_integer_labels_are_the_same_as_one_hot_targets(x64):
    outputs = jnp.asarray(OUTPUTS)
    for kind in (gl.PerStep, gl.Accumulated):
        integer = kind(optax.softmax_cross_entropy_with_integer_labels)(outputs, batch(LABELS, MASK))
        assert float(integer) == pytest.approx(float(kind(optax.softmax_cross_entropy)(outputs, batch(mask=MASK))))


def test_targets_that_vary_in_time_are_declared(x64):
    targets = RANDOM.normal(size=(T, B, N))
    loss = gl.PerStep(optax.l2_loss, targets_per_step=True)
    expected = per_step((0.5 * (OUTPUTS - targets) ** 2).mean(-1), MASK, "mean")
    found = float(loss(jnp.asarray(OUTPUTS), batch(targets, MASK)))
    assert found == pytest.approx(expected, rel=1e-14)
    moved = float(loss(jnp.asarray(OUTPUTS), batch(targets[::-1].copy(), MASK)))
    assert moved != pytest.approx(found, rel=1e-3)


def test_feature_axes_left_behind_are_averaged(x64):
    """l2_loss keeps the units: their mean, not their sum, enters."""
    loss = gl.PerStep(optax.l2_loss)
    values = 0.5 * (OUTPUTS - ONE_HOT) ** 2
    found = float(loss(jnp.asarray(OUTPUTS), batch()))
    assert found == pytest.approx(values.mean(), rel=1e-14) and found != pytest.approx(values.sum(-1).mean())
    maps = RANDOM.normal(size=(T, B, 2, 3))
    square = gl.PerStep(optax.l2_loss, targets_per_step=True)
    assert float(square(jnp.asarray(maps), batch(0 * maps))) == pytest.approx(0.5 * (maps**2).mean(), rel=1e-14)


@pytest.mark.parametrize("time", ["mean", "sum"])
@pytest.mark.parametrize("kind", [gl.PerStep, gl.Accumulated])
def test_errors_are_the_finite_differences_of_the_loss(x64, kind, time):
    loss, data = kind(optax.softmax_cross_entropy, time=time), batch(mask=MASK)
    errors = loss.errors(jnp.asarray(OUTPUTS), data)
    value = jax.jit(lambda o: loss(o, data))
    step = 1e-6
    for index in ((0, 0, 2), (2, 1, 0), (4, 0, 1), (3, 1, 1), (1, 2, 2)):
        up, down = (value(jnp.asarray(OUTPUTS).at[index].add(sign * step)) for sign in (1, -1))
        np.testing.assert_allclose(errors[index], (up - down) / (2 * step), atol=1e-9)
    assert float(jnp.abs(errors[0, 0, 2])) > 1e-3 and not errors[3].any() and not errors[:, 2].any()


def test_error_at_puts_the_loss_elsewhere_one_step_at_a_time(x64):
    loss, data = gl.PerStep(optax.softmax_cross_entropy), batch(mask=MASK)
    outputs = jnp.asarray(OUTPUTS)
    target, weight = loss.step_targets(data.targets, T), loss.weights(data.mask, T, B, outputs.dtype)
    whole = loss.error_at(outputs, target, weight)
    np.testing.assert_allclose(whole, loss.errors(outputs, data), atol=1e-15)
    single = [loss.error_at(outputs[t], target[t], weight[t]) for t in range(T)]
    np.testing.assert_allclose(jnp.stack(single), whole, atol=1e-15)
    assert not np.allclose(loss.error_at(2 * outputs, target, weight), whole)


REFUSED = [
    (
        "one sample too few",
        ONE_HOT[:2],
        None,
        {},
        r"targets have shape \(2, 4\), but \[batch, ...\] must begin with \(3,\)",
    ),
    ("time undeclared", np.zeros((T, B, N)), None, {}, r"inputs.swapaxes\(0, 1\).*targets_per_step=True"),
    ("time missing", ONE_HOT, None, {"targets_per_step": True}, r"\[time, batch, ...\] must begin with \(5, 3\)"),
    ("width", np.zeros((B, 2)), None, {}, r"targets have width \(2,\), but the network's output has \(4,\)"),
    ("float labels", LABELS.astype(float), None, {}, r"targets have width \(\).*integer labels"),
    ("mask of a sample", ONE_HOT, np.ones(T), {}, r"mask has shape \(5,\), but \[time, batch\] is \(5, 3\)"),
    ("mask batch first", ONE_HOT, np.ones((B, T)), {}, r"mask has shape \(3, 5\)"),
]


@pytest.mark.parametrize(
    ("targets", "mask", "settings", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_data_that_do_not_fit_are_refused(targets, mask, settings, words):
    with pytest.raises(ValueError, match=words):
        gl.PerStep(optax.softmax_cross_entropy, **settings).check((T, B, N), batch(targets, mask))


@pytest.mark.parametrize("labels", [[0, 1, 4], [0, -1, 2]])
def test_labels_that_name_no_output_are_refused(labels):
    loss = gl.PerStep(optax.softmax_cross_entropy_with_integer_labels)
    loss.check((T, B, N), batch([0, 1, 3]))
    with pytest.raises(ValueError, match=r"but the network has 4 outputs: labels are 0 to 3"):
        loss.check((T, B, N), batch(labels))


def test_a_loss_function_that_would_broadcast_or_pool_is_refused():
    """With as many samples as outputs, optax broadcasts labels over logits and gives a number that means nothing."""
    square = jnp.zeros((N, N)), jnp.arange(N)
    assert optax.softmax_cross_entropy(*square).shape == (N,)
    for kind in (gl.PerStep, gl.Accumulated):
        with pytest.raises(
            ValueError, match=r"integer labels belong to optax.softmax_cross_entropy_with_integer_labels"
        ):
            kind(optax.softmax_cross_entropy).check((N, N, N), batch(np.arange(N), n_steps=N, size=N))
        with pytest.raises(ValueError, match=r"keeps the leading axes.*no mean over them"):
            kind(lambda o, t: optax.l2_loss(o, t).mean()).check((T, B, N), batch())
        with pytest.raises(ValueError, match="one_hot_only refuses outputs"):
            kind(one_hot_only).check((T, B, N), batch(LABELS))
        kind(one_hot_only).check((T, B, N), batch())


def one_hot_only(outputs, targets):
    if outputs.shape != targets.shape:
        raise ValueError("one-hot only")
    return optax.l2_loss(outputs, targets)


def test_losses_are_built_from_functions_and_known_scales():
    # Under these tests the annotation is checked first; without them the loss's own words come.
    with pytest.raises(TypeError, match=r"give a loss function such as optax|parameter 'function'"):
        gl.PerStep("cross entropy")
    with pytest.raises(ValueError, match=r"PerStep|Accumulated\(time='last'\): choose"):
        gl.Accumulated(optax.l2_loss, time="last")
    assert gl.PerStep(optax.l2_loss) == gl.PerStep(optax.l2_loss) and hash(gl.PerStep(optax.l2_loss))
    assert gl.PerStep(optax.l2_loss) != gl.PerStep(optax.l2_loss, time="sum")
    assert gl.PerStep.streams and not gl.Accumulated.streams


def accuracy(counts, labels, mask=None):
    """Spike-count accuracy of outputs [1, batch, units]."""
    outputs = jnp.asarray(counts, jnp.float32)[None]
    found = gl.spike_count_accuracy(outputs, jnp.asarray(labels), mask)
    return tuple(float(value) for value in found)


def test_accuracy_of_plain_counts():
    counts = [[3, 1, 0], [0, 2, 1], [1, 0, 4], [5, 0, 1]]
    assert accuracy(counts, [0, 1, 2, 2]) == (0.75, 0, 0, 0)
    assert accuracy(counts, np.eye(3)[[0, 1, 2, 2]]) == (0.75, 0, 0, 0)


def test_a_silent_sample_is_wrong_even_if_its_class_is_the_first():
    assert accuracy([[0, 0, 0], [2, 0, 1]], [0, 0]) == (0.5, 1, 2, 0.5)


def test_silent_outputs_and_classes_never_predicted_are_told():
    # Unit 2 never fires; unit 1 fires and never wins.
    assert accuracy([[3, 1, 0], [2, 1, 0]], [0, 0]) == (1.0, 1, 2, 0)
    assert accuracy([[0, 0, 0], [0, 0, 0]], [0, 0]) == (0.0, 3, 3, 1.0)


def test_ties_go_to_the_first_and_are_counted():
    assert accuracy([[2, 2, 0], [0, 1, 0]], [0, 1]) == (1.0, 1, 1, 0.5)
    assert accuracy([[2, 2, 0], [0, 1, 0]], [1, 1])[0] == 0.5


def test_the_mask_hides_steps_from_the_counts():
    outputs = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    labels = jnp.array([0, 1])
    assert float(gl.spike_count_accuracy(outputs, labels).accuracy) == 0.5
    mask = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    masked = gl.spike_count_accuracy(outputs, labels, mask)
    assert float(masked.accuracy) == 1.0 and int(masked.silent_outputs) == 0
    nothing = gl.spike_count_accuracy(outputs, labels, jnp.zeros((3, 2)))
    assert float(nothing.accuracy) == 0.0 and int(nothing.silent_outputs) == 2


def test_negative_graded_outputs_are_not_silent():
    outputs = -jnp.asarray([[[1.0, 2.0], [3.0, 1.0]]])
    assert tuple(map(float, gl.spike_count_accuracy(outputs, jnp.array([0, 1])))) == (1.0, 0, 0, 0)
