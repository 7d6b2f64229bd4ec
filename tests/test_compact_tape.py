"""A tape keeps one number per neuron and step: what a step depends on, from which everything else is taken again."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import close, differ, living, trains

import gradlab as gl
from gradlab.plan import LayerRecord
from gradlab.tape import jacobians, record, replayed

NEURONS = [
    gl.LIF(beta=0.8),
    gl.LIF(beta=(0.7, 0.8, 0.9, 0.6), threshold=(0.8, 1.0, 0.9, 1.1), reset="zero"),
    gl.LIF(beta=0.8, reset="none", detach_reset=True),
    gl.IF(reset="subtract"),
    gl.CurrentLIF(beta=0.8, alpha=0.6),
    gl.CurrentLIF(beta=0.8, alpha=(0.6, 0.5, 0.7, 0.4), reset="zero"),
    gl.ALIF(beta=0.8, adaptation_decay=0.9, adaptation_strength=0.3),
    gl.ALIF(beta=0.7, reset="zero", detach_adaptation=True),
    gl.LI(beta=0.8),
]


def operated(neuron, at=None):
    """A layer's record of 40 random states and currents, whose point is that of the neuron `at`."""
    keys = jax.random.split(jax.random.key(0), 3)
    carry = tuple(jax.random.uniform(k, (40, 4), jnp.float64, -0.9, 1.3) for k in keys[: len(neuron.states)])
    current = jax.random.uniform(keys[2], (40, 4), jnp.float64, -0.9, 1.3)
    return LayerRecord(carry, current, neuron.apply({}, carry, current)[1], (at or neuron).point(carry, current))


@pytest.mark.parametrize("neuron", NEURONS, ids=str)
@pytest.mark.parametrize("cut", ["nothing", "spike"])
def test_a_point_is_as_good_as_the_state_and_the_current(x64, neuron, cut):
    net = gl.connect([nn.Dense(4), neuron])
    params = {"layer_0": {}}
    found = operated(neuron)
    assert 0.05 <= found.output.mean() <= 0.6
    assert len(found.point) == len(neuron.states)  # one array less than state and current
    stepped = neuron.apply({}, found.state, found.current)
    close(neuron.apply({}, *neuron.at_point(found.point)), stepped, 0.0)
    close(jacobians(net, params, 0, found, cut), jacobians(net, params, 0, found._replace(point=()), cut), 1e-15)
    # The point of a neuron with other constants is another point.
    name = next(n for n in ("alpha", "beta", "threshold") if hasattr(neuron, n))
    if name != "threshold":
        other = operated(neuron, neuron.clone(**{name: 0.3}))
        assert differ(neuron.apply({}, *neuron.at_point(other.point)), stepped)
        if neuron.spiking:
            assert differ(jacobians(net, params, 0, other, cut), jacobians(net, params, 0, found, cut))


def test_outputs_are_replayed_exactly_and_nothing_is_replayed_where_constants_train(x64):
    x = trains((30, 3, 5), dtype=jnp.float64)
    layers = [nn.Dense(6), gl.LIF(beta=0.8), nn.Dense(4), gl.ALIF(trainable=("beta",)), nn.Dense(3), gl.LI()]
    net = gl.connect(layers, links={0: [0]})
    params = living(net, x)
    batch = gl.Batch(x, jax.nn.one_hot(jnp.arange(3), 3, dtype=x.dtype))
    tape = record(net, params, batch, gl.PerStep(optax.softmax_cross_entropy))
    assert [len(layer.point) for layer in tape.slices.layers] == [1, 0, 1]
    blank = [layer._replace(output=jnp.zeros_like(layer.output)) for layer in tape.slices.layers]
    again = replayed(net, params, tape.slices._replace(layers=tuple(blank)))
    close(again.layers[0].output, tape.slices.layers[0].output, 0.0)
    assert not again.layers[1].output.any()


class Doubled(gl.LIF):
    """A neuron of one's own that inherits LIF's operating point, which is not its own."""

    @nn.compact
    def __call__(self, carry, inputs):
        return super().__call__(carry, 2.0 * inputs)


def test_a_neuron_that_changes_the_step_does_not_inherit_the_point(x64):
    found = [
        gl.connect([nn.Dense(4), neuron]).point({"layer_0": {}}, 0, (jnp.ones((2, 4)),), jnp.ones((2, 4)))
        for neuron in (Doubled(), gl.LIF())
    ]
    assert [len(point) for point in found] == [0, 1]


class Halved(gl.LIF):
    """Step and point of one's own, at_point inherited."""

    @nn.compact
    def __call__(self, carry, inputs):
        return super().__call__(carry, 0.5 * inputs)

    def point(self, carry, inputs):
        return super().point(carry, 0.5 * inputs)


class Minded(gl.LIF):
    """All three of one's own."""

    @nn.compact
    def __call__(self, carry, inputs):
        return super().__call__(carry, 0.5 * inputs)

    def point(self, carry, inputs):
        return super().point(carry, 0.5 * inputs)

    def at_point(self, point):
        carry, v = super().at_point(point)
        return carry, 2.0 * v


class Forgetful(Minded):
    """The same, but the way back forgets that inputs are halved."""

    @nn.compact
    def __call__(self, carry, inputs):
        return gl.LIF.__call__(self, carry, 0.5 * inputs)

    def point(self, carry, inputs):
        return gl.LIF.point(self, carry, 0.5 * inputs)

    def at_point(self, point):
        return gl.LIF.at_point(self, point)


def test_a_point_without_its_own_way_back_is_not_used():
    neurons = (gl.LIF(), Doubled(), Halved(), Minded(), gl.LeakyRate())
    assert [neuron.has_point for neuron in neurons] == [True, False, False, True, False]


def test_a_wrong_point_is_refused_when_the_network_begins():
    x = jnp.zeros((3, 2, 5))
    gl.connect([nn.Dense(4), Minded()]).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="steps otherwise at its operating point"):
        gl.connect([nn.Dense(4), Forgetful()]).init(jax.random.key(0), x)


_MEMORY = """
import jax, jax.numpy as jnp, flax.linen as nn, optax
import gradlab as gl
class Plain(gl.LIF):
    def point(self, carry, inputs):
        return ()
steps, batch, width = 200, 8, 64
loss = gl.PerStep(optax.softmax_cross_entropy)
x = jnp.zeros((steps, batch, width))
data = gl.Batch(x, jax.nn.one_hot(jnp.arange(batch) % 10, 10))
for neuron in (gl.LIF(), Plain()):
    net = gl.connect([nn.Dense(width), neuron, nn.Dense(width), neuron, nn.Dense(10), gl.LI()])
    params = net.init(jax.random.key(0), x)
    for rule in (gl.rules.BPTT(), gl.rules.OSTL())[: 2 if neuron == gl.LIF() else 1]:
        run = jax.jit(lambda p, b: gl.gradients(net, p, b, loss, [rule], jax.random.key(0)))
        print(run.lower(params, data).compile().memory_analysis().temp_size_in_bytes / x.nbytes)
"""


def test_a_gradient_keeps_one_array_per_layer():
    """Measured by the compiler, at its usual level of optimisation: two hidden layers as wide as the input."""
    found = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, env={"JAX_PLATFORMS": "cpu"}
    )
    bptt, ostl, plain = map(float, found.stdout.split())
    assert 2.0 <= bptt <= 3.2 and 2.0 <= ostl <= 3.4
    # Without points state, current and output are kept.
    assert plain > 5
