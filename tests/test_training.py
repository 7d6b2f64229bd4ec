"""Training against loops written by hand: updates per batch and per time step, seeds, resuming, stopping."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_alive, close, differ
from training_parts import CLASSES, INPUTS, LOSS, MASKED, NET, ONE_LAYER, SQUARE, TASK, T, begun, fit

import gradlab as gl
from gradlab.rules import BPTT, OSTL, SLTT, EProp


def naive_loss(net, params, batch):
    """The loss of a plain scan over the network's own step."""
    _, outputs = jax.lax.scan(
        lambda h, x: (lambda after, _, s: (after, s[-1]))(*net.step(params, h, x)),
        net.initial_state(params, batch.inputs),
        batch.inputs,
    )
    return LOSS(outputs, batch)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_sequence_updates_are_a_plain_optax_loop(x64, name):
    optimizer = gl.Optimizer(name, learning_rate=0.05)
    run = fit(BPTT(), task=MASKED, optimizer=optimizer, seeds=(3,), probe_every=1)
    params, batches = begun(NET, MASKED, 3, 4)
    assert_alive(NET, params, batches[0].inputs)
    transformation, losses = optimizer.build(), []
    state = transformation.init(params)
    step = jax.jit(jax.value_and_grad(partial(naive_loss, NET)))
    for index in range(3):
        close(jax.tree.map(lambda leaf, i=index: leaf[i, 0], run.trajectory), params)
        value, gradient = step(params, batches[index])
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    close(run.params_of(0), params)
    np.testing.assert_allclose(run.history["loss"], [losses], rtol=1e-12)
    assert run.stopped is None and run.probe_steps.tolist() == [0, 1, 2, 3]
    if name == "adamw":  # weight decay reads the parameters: without it the result is another one
        assert differ(
            fit(BPTT(), task=MASKED, optimizer=gl.Optimizer("adam", learning_rate=0.05), seeds=(3,)).params_of(0),
            params,
            1e-6,
        )


def test_the_streaming_form_trains_as_the_adjoint_form(x64):
    for rule in (OSTL(), EProp(feedback="random")):
        adjoint, streaming = (fit(rule, form=form) for form in ("adjoint", "streaming"))
        close(streaming.params, adjoint.params)
        close(streaming.history["loss"], adjoint.history["loss"])
    assert differ(adjoint.params, fit(OSTL()).params, 1e-6)


def test_the_state_of_a_rule_is_kept_over_the_run(x64):
    """Random feedback is drawn once from the rule's own seed: the run is a loop over `estimates` with its state."""
    rule = EProp(feedback="random", seed=4)
    run = fit(rule, seeds=(2,))
    params, batches = begun(NET, TASK, 2, 4)
    states = None
    for index in range(3):
        found = gl.estimates(NET, params, batches[index], LOSS, [rule], jax.random.key(index), states)[rule.name]
        states = {rule.name: found.state}
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, found.grad)
    close(run.params_of(0), params)
    assert differ(fit(EProp(feedback="random", seed=5), seeds=(2,)).params_of(0), params, 1e-6)


def test_seeds_are_runs_of_their_own(x64):
    both = fit(OSTL(), seeds=(0, 7))
    for position, seed in enumerate((0, 7)):
        alone = fit(OSTL(), seeds=(seed,))
        close(alone.params_of(0), both.params_of(position))
        np.testing.assert_allclose(alone.history["loss"][0], both.history["loss"][position], rtol=1e-12)
    assert differ(both.params_of(0), both.params_of(1))
    assert both.history["loss"].shape == (2, 3)
    # Two rules see the same data and the same start.
    paired = fit(SLTT(), seeds=(0, 7))
    np.testing.assert_allclose(paired.history["loss"][:, 0], both.history["loss"][:, 0], rtol=1e-12)


def test_given_parameters_are_the_start_of_every_seed(x64):
    params, _batches = begun(NET, TASK, 5, 4)
    run = fit(BPTT(), params=params, seeds=(0, 1), steps=1, probe_every=1)
    for position in range(2):
        close(jax.tree.map(lambda leaf, i=position: leaf[0, i], run.trajectory), params)
    assert differ(run.params_of(0), run.params_of(1), 1e-6)


def test_probes_and_progress_are_told_in_order():
    calls, kept = [], []
    run = fit(
        OSTL(),
        steps=5,
        probe_every=2,
        seeds=(0, 1),
        on_progress=lambda done, total: calls.append(("progress", done, total)),
        on_probe=lambda step, params: (calls.append(("probe", step)), kept.append(params)),
    )
    assert calls == [
        ("probe", 0),
        ("progress", 2, 5),
        ("probe", 2),
        ("progress", 4, 5),
        ("probe", 4),
        ("progress", 5, 5),
        ("probe", 5),
    ]
    for index, params in enumerate(kept):
        assert len(params) == 2
        for seed in range(2):
            close(params[seed], jax.tree.map(lambda leaf, i=index, s=seed: leaf[i, s], run.trajectory), 0.0)
    close(run.params, jax.tree.map(lambda leaf: leaf[-1], run.trajectory), 0.0)
    assert run.history["loss"].shape == (2, 5) and np.isfinite(run.history["loss"]).all()
    assert "last loss of 5" in run._repr_html_() and f"{run.history['loss'][1, -1]:.4g}" in run._repr_html_()


def test_about_twenty_probes_by_default():
    assert fit(SLTT(), steps=3).probe_steps.tolist() == [0, 1, 2, 3]
    run = fit(SLTT(), steps=50, batch_size=2)
    assert run.probe_steps.tolist() == [*range(0, 50, 3), 50]


def test_a_loss_that_is_no_longer_finite_stops_the_run(caplog):
    wild = gl.Optimizer("sgd", learning_rate=1e38)
    with caplog.at_level(logging.WARNING):
        run = fit(BPTT(), optimizer=wild, steps=40, probe_every=4, seeds=(0, 5))
    assert run.stopped is not None and run.stopped.startswith("no longer finite: the loss of seed 0 from iteration ")
    assert "seed 5" in run.stopped and run.stopped in caplog.text and run.stopped in run._repr_html_()
    assert run.history["loss"].shape[1] < 40
    first = int(run.stopped.split("seed 0 from iteration ")[1].split(",")[0])
    assert np.isfinite(run.history["loss"][0, :first]).all() and not np.isfinite(run.history["loss"][0, first])


def test_a_spiking_output_hides_nan_weights_in_a_finite_loss_and_is_stopped_all_the_same():
    run = fit(
        OSTL(),
        net=ONE_LAYER,
        loss=SQUARE,
        optimizer=gl.Optimizer("sgd", learning_rate=float("inf")),
        steps=40,
        probe_every=4,
    )
    assert np.isfinite(run.history["loss"]).all()
    assert run.stopped == "no longer finite: the parameters of seed 0, found after iteration 4"
    assert run.history["loss"].shape == (1, 4)


def test_one_lost_seed_does_not_stop_the_others():
    def task(key, size):
        batch = TASK.batch(key, size)
        return batch._replace(inputs=batch.inputs * jnp.where(jax.random.uniform(key) < 0.5, 1e38, 1.0))

    found = [
        fit(BPTT(), task=task, steps=2, seeds=(seed,), optimizer=gl.Optimizer("sgd", learning_rate=1e5))
        for seed in range(4)
    ]
    lost = [seed for seed, run in enumerate(found) if run.stopped]
    if not 0 < len(lost) < 4:
        pytest.fail(f"the case does not separate the seeds: {lost}")
    both = fit(BPTT(), task=task, steps=2, seeds=tuple(range(4)), optimizer=gl.Optimizer("sgd", learning_rate=1e5))
    assert both.history["loss"].shape == (4, 2)
    assert both.stopped is not None and [s for s in range(4) if f"seed {s}" in both.stopped] == lost


def test_a_plain_function_is_a_task_and_an_optax_transformation_an_optimizer(x64):
    plain = fit(OSTL(), task=TASK.batch, optimizer=optax.sgd(0.1))
    close(plain.params, fit(OSTL()).params)


def test_whole_numbers_of_numpy_are_whole_numbers():
    counts = {"steps": np.int64(2), "batch_size": np.int32(4), "probe_every": np.uint8(1), "seeds": np.arange(2)}
    task = gl.tasks.Randman(classes=CLASSES, units=INPUTS, steps=T, manifold_dim=1, alpha=2.0)  # wants an int as size
    run = fit(SLTT(), net=ONE_LAYER, task=task, loss=SQUARE, **counts)
    assert run.history["loss"].shape == (2, 2) and run.probe_steps.tolist() == [0, 1, 2]
    # A seed needs no room in 32 bits.
    assert np.isfinite(fit(SLTT(), net=ONE_LAYER, loss=SQUARE, seeds=(2**31 + 5,)).history["loss"]).all()


@dataclasses.dataclass(frozen=True)
class FixedRate:
    rate: float

    def batch(self, key, size):
        TRACED.append(isinstance(key, jax.core.Tracer))
        inputs = jax.random.bernoulli(key, self.rate, (T, size, INPUTS)).astype(float)
        return gl.Batch(inputs, jnp.zeros((size, CLASSES)))


class ChangingRate(FixedRate):
    """It inherits from a frozen dataclass, but `scale` may change."""

    scale = 1.0

    def batch(self, key, size):
        return FixedRate(self.rate * self.scale).batch(key, size)


@dataclasses.dataclass
class FreeRate:
    rate: float
    batch = FixedRate.batch
    __hash__ = object.__hash__


TRACED: list[bool] = []


def free(task):
    task.rate = 0.9


def scaled(task):
    task.scale = 3.0


@pytest.mark.parametrize(("task", "change"), [(FreeRate(0.3), free), (ChangingRate(0.3), scaled)])
@pytest.mark.parametrize("bound", [False, True], ids=["object", "method"])
def test_a_task_that_changed_between_two_calls_is_seen(task, change, bound):
    def losses():
        run = fit(SLTT(), net=ONE_LAYER, loss=SQUARE, task=task.batch if bound else task, steps=4)
        return run.history["loss"]

    task.__dict__.update(rate=0.3, scale=1.0)
    before = losses()
    np.testing.assert_array_equal(before, losses())
    change(task)
    expected = fit(SLTT(), net=ONE_LAYER, loss=SQUARE, task=FixedRate(0.9), steps=4).history["loss"]
    np.testing.assert_allclose(losses(), expected, rtol=1e-6)
    assert differ(before, expected)


def test_what_was_compiled_is_kept_for_tasks_that_cannot_change():
    def function(key, size):
        return FixedRate(0.4).batch(key, size)

    for task, again in ((FixedRate(0.4), FixedRate(0.4)), (function, function)):
        TRACED.clear()
        fit(SLTT(), net=ONE_LAYER, loss=SQUARE, task=task)
        first = sum(TRACED)
        fit(SLTT(), net=ONE_LAYER, loss=SQUARE, task=again)
        assert sum(TRACED) == first > 0


class TwoThings:
    def batch(self, key, size):
        return jnp.zeros((T, size, INPUTS)), jnp.zeros((size, CLASSES))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rule": BPTT(), "update": "step"}, ValueError, "BPTT has no streaming form.*OSTL, OTPE or OTTT"),
        ({"rule": BPTT(), "form": "streaming"}, ValueError, 'BPTT has no streaming form.*form="adjoint"'),
        (
            {"loss": gl.Accumulated(optax.softmax_cross_entropy), "update": "step"},
            ValueError,
            "Accumulated is known only at",
        ),
        ({"update": "epoch"}, ValueError, "update='epoch': choose \"sequence\""),
        ({"form": "forward"}, ValueError, "form='forward': choose \"adjoint\""),
        ({"steps": 1e2}, TypeError, r"steps=100.0: give a whole number \(int\)"),
        ({"steps": True}, TypeError, "steps=True: give a whole number"),
        ({"batch_size": 4.0}, TypeError, "batch_size=4.0: give a whole number"),
        ({"probe_every": "2"}, TypeError, "probe_every='2': give a whole number"),
        ({"seeds": (0, 1.5)}, ValueError, r"seeds=\(0, 1.5\): give a list of different whole numbers"),
        ({"seeds": np.arange(2.0)}, ValueError, r"seeds=array\(.*: give a list of different whole numbers"),
        ({"steps": np.int64(0)}, ValueError, "steps=0.*at least 1"),
        ({"steps": 0}, ValueError, "steps=0.*at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size=0.*at least 1"),
        ({"probe_every": 0}, ValueError, "probe_every=0.*at least 1"),
        ({"seeds": ()}, ValueError, r"seeds=\(\): give a list of different whole numbers"),
        ({"seeds": 3}, ValueError, "seeds=3"),
        ({"seeds": (1, 1)}, ValueError, r"seeds=\(1, 1\)"),
        ({"rule": OSTL}, TypeError, "is not a rule: give instances"),
        ({"optimizer": "adam"}, TypeError, "optimizer is 'adam': give gl.Optimizer"),
        ({"optimizer": optax.adam}, TypeError, "optimizer is <function adam"),
        ({"task": 5}, TypeError, r"task is 5: give an object with batch\(key, size\)"),
        ({"task": TwoThings()}, TypeError, "the task's batch is a tuple: return gl.Batch"),
        ({"params": {"layer_0": {}}}, ValueError, "params lack layer_0/connection/bias"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        fit(**({"rule": OSTL()} | settings))


def test_accumulated_losses_train_deferred(x64):
    loss = gl.Accumulated(optax.softmax_cross_entropy)
    run = fit(BPTT(), loss=loss, steps=1)
    params, batches = begun(NET, TASK, 0, 4)
    gradient = gl.gradients(NET, params, batches[0], loss, [BPTT(form="autodiff")], jax.random.key(0))
    close(run.params_of(0), jax.tree.map(lambda p, g: p - 0.1 * g, params, next(iter(gradient.values()))))
