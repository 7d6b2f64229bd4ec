"""The engine: order, names, compilation, the checks at the door, health."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, differ, living, trains

import gradlab as gl
from gradlab.rules import BPTT, OSTL, OTTT, SLTT, TBPTT, Estimate, Rule

KEY = jax.random.key(0)
LOSS = gl.PerStep(optax.softmax_cross_entropy)
NET = gl.connect([nn.Dense(6), gl.LIF(beta=0.8, threshold=0.8), nn.Dense(3), gl.LI(0.9)])
RECURRENT = gl.connect([nn.Dense(6), gl.LIF(beta=0.8, threshold=0.8), nn.Dense(3), gl.LI(0.9)], links={0: [0]})
INPUTS = trains((7, 4, 5))
TARGETS = jax.nn.one_hot(jnp.array([0, 2, 1, 2]), 3)
BATCH = gl.Batch(INPUTS, TARGETS)


@pytest.fixture(scope="module")
def params():
    return living(NET, INPUTS)


@dataclasses.dataclass(frozen=True)
class Scaled(Rule):
    """BPTT times a factor: the bug that a cosine cannot see."""

    reference: ClassVar[str] = "none"
    factor: float = 2.0

    def gradient(self, net, params, tape, state, key):
        return Estimate(jax.tree.map(lambda g: self.factor * g, BPTT().gradient(net, params, tape, state, key).grad))


@dataclasses.dataclass(frozen=True)
class Counting(Rule):
    """Counts how often it is traced; its gradient is noise from the key."""

    traces: ClassVar[list[Any]] = []
    seed: int = 0

    def gradient(self, net, params, tape, state, key):
        self.traces.append(self.name)
        return Estimate(jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params), state, {"seen": 1})


@dataclasses.dataclass(frozen=True)
class Stateful(Rule):
    """Gives its state back as the gradient, one more each time."""

    def init(self, net, params, shapes):
        return jax.tree.map(jnp.ones_like, params)

    def gradient(self, net, params, tape, state, key):
        return Estimate(state, jax.tree.map(lambda s: s + 1, state))


@dataclasses.dataclass(frozen=True)
class Picky(Rule):
    """Supports nothing."""

    def supports(self, net, shapes, loss, online=False):
        return self.refuse(f"it saw {shapes.n_steps} steps of {shapes.batch_size} samples and units {shapes.units}")

    def gradient(self, net, params, tape, state, key):
        raise AssertionError("never asked")


def test_answers_come_in_the_order_asked_under_their_names(params):
    rules = [SLTT(), TBPTT(k=2), BPTT(), OSTL()]
    found = gl.gradients(NET, params, BATCH, LOSS, rules, KEY)
    assert list(found) == ["SLTT", "TBPTT(k=2)", "BPTT", "OSTL"]
    for gradient in found.values():
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    again = gl.gradients(NET, params, BATCH, LOSS, rules[::-1], KEY)
    for name in found:
        close(again[name], found[name], 1e-6)
    assert differ(found["SLTT"], found["BPTT"], 0.01)


def test_compare_keeps_the_order_and_puts_the_reference_first(params):
    """Names sorted by a pytree map would make OSTL the reference here."""
    found = gl.compare(NET, params, BATCH, LOSS, [TBPTT(k=1), OSTL()], KEY, reference=SLTT())
    assert found.rules == ("SLTT", "TBPTT(k=1)", "OSTL") and found.reference == "SLTT"
    assert found.metrics("TBPTT(k=1)")["relative_error"] < 1e-6
    plain = gl.compare(NET, params, BATCH, LOSS, [OTTT(), BPTT(), Scaled()], KEY)
    assert plain.rules == ("BPTT", "OTTT", "Scaled")


def test_two_rules_of_one_name_are_refused(params):
    for ask in (gl.gradients, gl.compare):
        with pytest.raises(ValueError, match="two rules are named 'OSTL'"):
            ask(NET, params, BATCH, LOSS, [OSTL(), SLTT(), OSTL()], KEY)
        with pytest.raises(TypeError, match=r"OSTL'> is not a rule: give instances, gl.rules.OSTL\(\)"):
            ask(NET, params, BATCH, LOSS, [OSTL], KEY)


def test_one_compilation_serves_later_calls(params):
    Counting.traces.clear()
    for seed in range(3):
        other = gl.Batch(trains((7, 4, 5), seed=seed), TARGETS)
        gl.gradients(NET, jax.tree.map(lambda p: p * 1.1, params), other, LOSS, [Counting()], jax.random.key(seed))
    assert len(Counting.traces) == 1
    gl.gradients(
        NET, params, gl.Batch(INPUTS[:5], TARGETS), LOSS, [Counting()], KEY
    )  # another length is another program
    assert len(Counting.traces) == 2
    same = gl.connect([nn.Dense(6), gl.LIF(beta=0.8, threshold=0.8), nn.Dense(3), gl.LI(0.9)])
    gl.gradients(same, params, BATCH, gl.PerStep(optax.softmax_cross_entropy), [Counting()], KEY)
    assert len(Counting.traces) == 2


def test_rules_draw_from_the_key_and_their_position(params):
    rules = [Counting(), Counting(seed=1)]
    first = gl.gradients(NET, params, BATCH, LOSS, rules, KEY)
    close(gl.gradients(NET, params, BATCH, LOSS, rules, KEY), first, 0.0)
    assert differ(first["Counting"], first["Counting(seed=1)"])
    assert differ(gl.gradients(NET, params, BATCH, LOSS, rules, jax.random.key(1)), first)


def test_the_engine_works_inside_jit_and_vmap(params):
    rules = [BPTT(), OSTL()]
    plain = gl.gradients(NET, params, BATCH, LOSS, rules, KEY)

    def ask(p, batch):
        return gl.gradients(NET, p, batch, LOSS, rules, KEY)

    close(jax.jit(ask)(params, BATCH), plain, 1e-6)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.2 * leaf]), params)
    mapped = jax.jit(jax.vmap(ask, in_axes=(0, None)))(two, BATCH)
    close(jax.tree.map(lambda leaf: leaf[0], mapped), plain, 1e-5)
    assert differ(jax.tree.map(lambda leaf: leaf[1], mapped), plain)


def test_states_are_kept_by_name(params):
    first = gl.estimates(NET, params, BATCH, LOSS, [Stateful(), Counting()], KEY)
    close(first["Stateful"].grad, jax.tree.map(jnp.ones_like, params))
    assert first["Counting"].info == {"seen": 1}
    second = gl.estimates(NET, params, BATCH, LOSS, [Stateful()], KEY, states={"Stateful": first["Stateful"].state})
    close(second["Stateful"].grad, jax.tree.map(lambda p: 2 * jnp.ones_like(p), params))
    with pytest.raises(ValueError, match=r"states are given for \['Stateful '\], but the rules are \['Stateful'\]"):
        gl.estimates(NET, params, BATCH, LOSS, [Stateful()], KEY, states={"Stateful ": ()})


def test_numpy_data_are_taken_as_they_are(params):
    host = jax.tree.map(np.asarray, params)
    batch = gl.Batch(np.asarray(INPUTS, np.float64), np.asarray(TARGETS), np.ones((7, 4), bool))
    close(
        gl.gradients(NET, host, batch, LOSS, [BPTT()], KEY), gl.gradients(NET, params, BATCH, LOSS, [BPTT()], KEY), 1e-6
    )


def _nan_params(params):
    return {
        **params,
        "layer_1": {"connection": {**params["layer_1"]["connection"], "bias": jnp.array([0, jnp.nan, 0])}},
    }


def _without(params):
    return {**params, "layer_0": {}}


REFUSED = {
    "a tuple": (lambda p: (p, (INPUTS, TARGETS), LOSS), TypeError, r"give gl.Batch\(inputs, targets, mask=None\)"),
    "a bare loss": (lambda p: (p, BATCH, optax.l2_loss), TypeError, r"wrap it, gl.PerStep"),
    "two axes": (lambda p: (p, gl.Batch(INPUTS[:, 0], TARGETS), LOSS), ValueError, r"time-major.*\(a single sequence"),
    "integers": (lambda p: (p, gl.Batch(INPUTS.astype(int), TARGETS), LOSS), ValueError, "inputs are int"),
    "no steps": (lambda p: (p, gl.Batch(INPUTS[:0], TARGETS), LOSS), ValueError, "an axis is empty"),
    "batch first": (
        lambda p: (p, gl.Batch(INPUTS.swapaxes(0, 1), TARGETS), LOSS),
        ValueError,
        r"targets have shape \(4, 3\), but \[batch, ...\] must begin with \(7,\); inputs are \[time.*swapaxes\(0, 1\)",
    ),
    "features in the middle": (
        lambda p: (p, gl.Batch(INPUTS.swapaxes(1, 2), TARGETS), LOSS),
        ValueError,
        r"parameter layer_0/connection/kernel has shape \(5, 6\).*need \(4, 6\): are the axes in that order",
    ),
    "narrow targets": (lambda p: (p, gl.Batch(INPUTS, TARGETS[:, :2]), LOSS), ValueError, r"width \(2,\).*\(3,\)"),
    "nan inputs": (
        lambda p: (p, gl.Batch(INPUTS.at[3, 1, 2].set(jnp.nan), TARGETS), LOSS),
        ValueError,
        "inputs: NaN or infinite",
    ),
    "infinite targets": (
        lambda p: (p, gl.Batch(INPUTS, TARGETS.at[0, 0].set(jnp.inf)), LOSS),
        ValueError,
        "targets: NaN or infinite",
    ),
    "nan parameters": (lambda p: (_nan_params(p), BATCH, LOSS), ValueError, "parameters layer_1/connection/bias: NaN"),
    "a weighting mask": (
        lambda p: (p, gl.Batch(INPUTS, TARGETS, jnp.full((7, 4), 0.5)), LOSS),
        ValueError,
        "mask holds",
    ),
    "no dict": (lambda p: ([1.0], BATCH, LOSS), ValueError, "params are a list, not a dict: use net.init"),
    "a layer missing": (lambda p: (_without(p), BATCH, LOSS), ValueError, "params lack layer_0/connection/bias"),
    "another network": (
        lambda p: (RECURRENT.init(KEY, INPUTS), BATCH, LOSS),
        ValueError,
        "params hold layer_0/from_layer_0/kernel, which the network does not have",
    ),
    "another width": (
        lambda p: (NET.init(KEY, INPUTS[..., :4]), BATCH, LOSS),
        ValueError,
        r"kernel has shape \(4, 6\), but inputs of shape \(7, 4, 5\).*need \(5, 6\)",
    ),
    "another dtype": (
        lambda p: (jax.tree.map(lambda leaf: leaf.astype(jnp.float16), p), BATCH, LOSS),
        ValueError,
        "is float16, but the inputs are float32: cast one of them",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_at_every_door(params, name):
    build, error, words = REFUSED[name]
    given, batch, loss = build(params)
    with pytest.raises(error, match=words):
        gl.gradients(NET, given, batch, loss, [BPTT()], KEY)
    with pytest.raises(error, match=words):
        gl.compare(NET, given, batch, loss, [OSTL()], KEY)
    with pytest.raises(error, match=words):
        gl.evaluate(NET, given, batch, loss)


def test_parameters_without_the_extra_link_are_refused(params):
    with pytest.raises(ValueError, match="params lack layer_0/from_layer_0/kernel"):
        gl.gradients(RECURRENT, params, BATCH, LOSS, [BPTT()], KEY)


def test_an_unsupported_rule_speaks_for_itself_or_is_set_aside(params):
    words = r"Picky.*it saw 7 steps of 4 samples and units \(\(6,\), \(3,\)\)"
    with pytest.raises(ValueError, match=words):
        gl.gradients(NET, params, BATCH, LOSS, [OSTL(), Picky()], KEY)
    with pytest.raises(ValueError, match=words):
        gl.compare(NET, params, BATCH, LOSS, [OSTL(), Picky()], KEY)
    with pytest.raises(ValueError, match=words):
        gl.compare(NET, params, BATCH, LOSS, [OSTL()], KEY, reference=Picky(), skip_unsupported=True)
    found = gl.compare(NET, params, BATCH, LOSS, [Picky(), OSTL()], KEY, skip_unsupported=True)
    assert found.rules == ("BPTT", "OSTL") and list(found.refusals) == ["Picky"]
    assert "it saw 7 steps" in found.refusals["Picky"] and "Picky" in found._repr_html_()


def test_evaluate_tells_loss_accuracy_and_health(params):
    found = gl.evaluate(NET, params, BATCH, LOSS)
    outputs = gl.tape.record(NET, params, BATCH, LOSS).slices.layers
    assert found["loss"] == pytest.approx(float(LOSS(outputs[-1].output, BATCH)), rel=1e-6)
    assert found["accuracy"] == float(gl.spike_count_accuracy(outputs[-1].output, TARGETS).accuracy)
    assert found["firing_rate"] == pytest.approx({"layer_0": float(outputs[0].output.mean())})
    fired = np.asarray(outputs[0].output).any((0, 1))
    assert found["silent_units"]["layer_0"] == pytest.approx(1 - fired.mean())
    assert 0 < found["slope"]["layer_0"] < 1
    per_step = gl.PerStep(optax.l2_loss, targets_per_step=True)
    regression = gl.evaluate(NET, params, gl.Batch(INPUTS, jnp.zeros((7, 4, 3))), per_step)
    assert "accuracy" not in regression and regression["loss"] > 0
    assert all(isinstance(v, float | int) for v in jax.tree.leaves(found))
