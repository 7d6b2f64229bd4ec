"""What looks right and is not: masked steps, regression targets, neurons whose units see each other, keys and rules."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import gradlab as gl
from gradlab.rules import BPTT, OSTL

KEY = jax.random.key(0)
LOSS = gl.PerStep(optax.softmax_cross_entropy)
NET = gl.connect([nn.Dense(6), gl.LIF(beta=0.8), nn.Dense(3), gl.LI(0.9)])
INPUTS = (jax.random.uniform(KEY, (8, 4, 5)) < 0.5).astype(jnp.float32)
TARGETS = jax.nn.one_hot(jnp.array([0, 2, 1, 2]), 3)
PARAMS = NET.init(KEY, INPUTS)


def test_health_counts_the_steps_that_the_mask_counts():
    silent_first = INPUTS.at[:4].set(0.0)
    mask = jnp.zeros((8, 4)).at[:4].set(1.0)
    params = jax.tree.map(lambda leaf: 4.0 * leaf, PARAMS)
    whole = gl.compare(NET, params, gl.Batch(silent_first, TARGETS), LOSS, [OSTL()], KEY)
    masked = gl.compare(NET, params, gl.Batch(silent_first, TARGETS, mask), LOSS, [OSTL()], KEY)
    cut = gl.compare(NET, params, gl.Batch(silent_first[:4], TARGETS), LOSS, [OSTL()], KEY)
    assert whole.dead_layers() == {}
    assert masked.dead_layers() == cut.dead_layers()
    assert "silent" in masked.dead_layers()["layer_0"]
    rates = [gl.evaluate(NET, params, b, LOSS)["firing_rate"]["layer_0"] for b in (gl.Batch(INPUTS[:4], TARGETS),)]
    rates.append(gl.evaluate(NET, params, gl.Batch(INPUTS, TARGETS, mask), LOSS)["firing_rate"]["layer_0"])
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] > 0


@pytest.mark.parametrize("width", [1, 3])
def test_regression_has_no_accuracy(width: int):
    net = gl.connect([nn.Dense(6), gl.LIF(beta=0.8), nn.Dense(width), gl.LI(0.9)])
    params = net.init(KEY, INPUTS)
    real = gl.Batch(INPUTS, jax.random.normal(KEY, (4, width)))
    assert "accuracy" not in gl.evaluate(net, params, real, gl.PerStep(optax.l2_loss))
    assert "accuracy" in gl.evaluate(NET, PARAMS, gl.Batch(INPUTS, TARGETS), LOSS)
    labels = gl.PerStep(optax.softmax_cross_entropy_with_integer_labels)
    assert "accuracy" in gl.evaluate(NET, PARAMS, gl.Batch(INPUTS, jnp.array([0, 2, 1, 2])), labels)


class Competing(gl.LIF):
    """A neuron that is inhibited by its layer's mean: not elementwise."""

    @nn.compact
    def __call__(self, carry, inputs):
        return super().__call__(carry, inputs - 0.5 * inputs.mean(-1, keepdims=True))


def test_a_neuron_whose_units_see_each_other_is_refused():
    net = gl.connect([nn.Dense(6), Competing(), nn.Dense(3), gl.LI(0.9)])
    with pytest.raises(ValueError, match="see each other"):
        net.init(KEY, INPUTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rules": OSTL()}, "give a list"),
        ({"key": 0}, r"jax\.random\.key"),
        ({"rules": [BPTT]}, "give instances"),
    ],
)
def test_likely_slips_are_told_in_words(arguments: dict, words: str):
    given = {"rules": [BPTT()], "key": KEY, **arguments}
    with pytest.raises(TypeError, match=words):
        gl.gradients(NET, PARAMS, gl.Batch(INPUTS, TARGETS), LOSS, **given)


def test_known_labels_are_checked_inside_jit():
    loss = gl.PerStep(optax.softmax_cross_entropy_with_integer_labels)

    def norm(labels):
        batch = gl.Batch(INPUTS, labels)
        return jax.jit(lambda p: gl.gradients(NET, p, batch, loss, [BPTT()], KEY)["BPTT"])(PARAMS)

    assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.isfinite(g).all()), norm(jnp.array([0, 2, 1, 2]))))
    with pytest.raises(ValueError, match="integer targets"):
        norm(jnp.array([0, 3, 1, 2]))
