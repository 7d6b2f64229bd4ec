"""Neurons: values against NumPy loops, local derivatives against hand-written ones, Flax's RNN, bad constants."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, neuron_loop, reset

import gradlab as gl
from gradlab import neurons, tape
from gradlab.testing import SmoothSpike

UNITS = 4
SMOOTH = SmoothSpike(3.0)
PER_UNIT = (0.3, 0.6, 0.9, 0.99)

LOOPED = [
    *(gl.LIF(beta=0.7, reset=kind, detach_reset=cut) for kind in ("subtract", "zero") for cut in (False, True)),
    gl.LIF(beta=0.5, reset="none"),
    gl.LIF(beta=PER_UNIT, threshold=(0.5, 0.7, 0.9, 1.1)),
    gl.IF(threshold=1.7),
    gl.IF(reset="zero", threshold=1.7),
    gl.LI(beta=0.7),
    gl.LI(beta=PER_UNIT),
    gl.LeakyRate(rate=0.3),
    gl.LeakyRate(rate=PER_UNIT),
    gl.CurrentLIF(beta=0.6, alpha=0.5),
    gl.CurrentLIF(beta=PER_UNIT, alpha=(0.1, 0.2, 0.3, 0.4), reset="zero", threshold=1.2),
    gl.ALIF(beta=0.8, adaptation_decay=0.9, adaptation_strength=0.4),
    gl.ALIF(beta=0.8, reset="zero", detach_reset=True, detach_adaptation=True),
    gl.ALIF(beta=PER_UNIT, adaptation_decay=PER_UNIT[::-1], adaptation_strength=-0.1, reset="none", threshold=2.0),
]
GRADED = (gl.LI, gl.LeakyRate)
WITH_CONSTANTS = [kind for kind in neurons.ALL if kind is not gl.LeakyRate]
SPIKING = [gl.LIF, gl.IF, gl.CurrentLIF, gl.ALIF]


def drawn(n_steps, seed=0):
    """Currents [time, batch, units] that make every neuron fire now and then."""
    return 0.35 + 0.5 * jax.random.normal(jax.random.key(seed), (n_steps, 3, UNITS), jnp.float64)


def scanned(neuron, current, params=None):
    """([time] states, outputs) of the neuron's own step."""
    variables = {"params": params or {}}
    start = neuron.initialize_carry(None, current.shape[1:], current.dtype)

    def step(h, i):
        h, s = neuron.apply(variables, h, i)
        return h, (h, s)

    return jax.jit(lambda i: jax.lax.scan(step, start, i)[1])(current)


@pytest.mark.parametrize("neuron", LOOPED, ids=lambda n: type(n).__name__)
def test_every_neuron_follows_its_docstring(x64, neuron):
    current = drawn(30)
    states, outputs = scanned(neuron, current)
    expected_states, expected = neuron_loop(neuron, current)
    if neuron.spiking:
        assert 0.05 < expected.mean() < 0.6, expected.mean()
    np.testing.assert_allclose(outputs, expected, atol=1e-12)
    for k in range(len(neuron.states)):
        np.testing.assert_allclose(states[k], [h[k] for h in expected_states], atol=1e-12)


def test_the_loop_tells_resets_and_leaks_apart(x64):
    current = drawn(30)
    outputs = scanned(gl.LIF(beta=0.8), current)[1]
    for other in (gl.LIF(beta=0.8, reset="zero"), gl.LIF(beta=0.8, reset="none"), gl.LIF(beta=0.81), gl.IF()):
        assert not np.allclose(outputs, neuron_loop(other, current)[1])


@pytest.mark.parametrize("kind", neurons.ALL, ids=lambda n: n.__name__)
def test_units_do_not_see_each_other(x64, kind):
    neuron = kind() if kind in GRADED else kind(surrogate=SMOOTH)
    states = tuple(jnp.linspace(0.1, 0.9, UNITS) * (k + 1) for k in range(len(neuron.states)))
    jacobian = jax.jacobian(lambda h, i: neuron.apply({}, h, i), argnums=(0, 1))(states, jnp.linspace(0.2, 1.0, UNITS))
    for matrix in jax.tree.leaves(jacobian):
        np.testing.assert_array_equal(matrix, np.diag(np.diag(matrix)))
    assert any(np.abs(np.diag(m)).min() > 0 for m in jax.tree.leaves(jacobian))


@pytest.mark.parametrize("neuron", [gl.LIF(beta=0.8), gl.ALIF(), gl.LI(beta=PER_UNIT)], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("time_major", [True, False])
def test_flax_rnn_runs_a_neuron_as_it_is(x64, neuron, time_major):
    current = drawn(12)
    given = current if time_major else current.swapaxes(0, 1)
    found = nn.RNN(neuron, time_major=time_major).apply({}, given)
    found = found if time_major else found.swapaxes(0, 1)
    np.testing.assert_allclose(found, neuron_loop(neuron, current)[1], atol=1e-12)
    # The wrong axis order runs too, and gives something else: gradlab is time-major, nn.RNN by default is not.
    other = nn.RNN(neuron, time_major=not time_major).apply({}, given)
    assert not np.allclose(other if time_major else other.swapaxes(0, 1), found)


def test_the_state_at_rest_is_zero_in_the_dtype_of_the_inputs():
    for kind in neurons.ALL:
        carry = kind().initialize_carry(None, (2, 3), jnp.float16)
        assert len(carry) == len(kind().states)
        for leaf in carry:
            assert leaf.shape == (2, 3) and leaf.dtype == jnp.float16 and not leaf.any()


TRAINED = [
    gl.LIF(beta=0.8, threshold=0.7, surrogate=SMOOTH, trainable=("beta", "threshold")),
    gl.LIF(beta=PER_UNIT, threshold=(0.5, 0.7, 0.9, 1.1), surrogate=SMOOTH, trainable=("beta", "threshold")),
    gl.IF(surrogate=SMOOTH, trainable=("threshold",)),
    gl.LI(beta=0.8, trainable=("beta",)),
    gl.LeakyRate(rate=0.3, trainable=("rate",)),
    gl.CurrentLIF(beta=0.8, alpha=0.5, surrogate=SMOOTH, trainable=("alpha", "beta", "threshold")),
    gl.ALIF(adaptation_decay=0.9, surrogate=SMOOTH, trainable=("adaptation_decay", "beta", "threshold")),
]


@pytest.mark.parametrize("neuron", TRAINED, ids=lambda n: type(n).__name__)
def test_trained_constants_start_at_their_values_and_have_the_right_gradient(x64, neuron):
    current = drawn(6)
    params = neuron.init(jax.random.key(0), tuple(current[0] for _ in neuron.states), current[0])["params"]
    fixed = neuron.clone(trainable=())
    np.testing.assert_allclose(scanned(neuron, current, params)[1], scanned(fixed, current)[1], rtol=1e-12)
    names = {f"{n}_log" if n == "threshold" else f"{n}_logit" for n in neuron.trainable}
    assert set(params) == names
    weights = jax.random.normal(jax.random.key(5), current.shape, jnp.float64)

    @jax.jit
    def value(p):
        return (scanned(neuron, current, p)[1] * weights).sum()

    gradient = jax.jit(jax.grad(value))(params)
    step = 1e-6
    for name, leaf in params.items():
        for index in list(np.ndindex(leaf.shape))[:2]:
            up, down = ({**params, name: leaf.at[index].add(sign * step)} for sign in (1, -1))
            expected = (value(up) - value(down)) / (2 * step)
            np.testing.assert_allclose(gradient[name][index], expected, rtol=1e-6, atol=1e-8)
            assert abs(expected) > 1e-6


def test_trained_constants_cannot_leave_their_range():
    neuron = gl.LIF(beta=0.9, threshold=2.0, trainable=("beta", "threshold"))
    for raw in (-60.0, -3.0, 0.0, 3.0, 60.0):
        params = {"beta_logit": jnp.float32(raw), "threshold_log": jnp.float32(raw)}
        assert 0.0 <= float(neuron.value("beta", jnp.float32, params)) <= 1.0
        assert float(neuron.value("threshold", jnp.float32, params)) > 0.0
    start = {"beta_logit": jnp.log(0.9 / 0.1), "threshold_log": jnp.log(2.0)}
    assert float(neuron.value("beta", jnp.float32, start)) == pytest.approx(0.9)
    assert float(neuron.value("threshold", jnp.float32, start)) == pytest.approx(2.0)


def test_time_constants():
    assert gl.LIF.from_time_constant(20.0, 2.0, reset="zero") == gl.LIF(beta=float(np.exp(-0.1)), reset="zero")
    assert gl.LI.from_time_constant((10.0, 20.0), 1.0).beta == pytest.approx((np.exp(-0.1), np.exp(-0.05)))
    assert gl.LIF.from_time_constant(20.0, 2.0) != gl.LIF.from_time_constant(2.0, 20.0)
    for tau, dt in ((0.0, 1.0), (10.0, 0.0), ((10.0, -1.0), 1.0)):
        with pytest.raises(ValueError, match="both must be positive"):
            gl.LIF.from_time_constant(tau, dt)


def matrices(neuron, state, current):
    """(A, B, C, D) of one unit at an operating point, by automatic differentiation."""

    def step(h, i):
        after, s = neuron.apply({}, (h[0],) if len(neuron.states) == 1 else (h[0], h[1]), i)
        return jnp.stack(after), s

    h = jnp.asarray(state, jnp.float64)
    (A, C), (B, D) = (jax.jit(jax.jacobian(step, argnums=k))(h, jnp.float64(current)) for k in (0, 1))
    return tuple(np.asarray(m) for m in (A, B, C, D))


def expected_lif(neuron, state, current, cut):
    """The derivatives of LIF (1) to (3), written by hand."""
    v = neuron.beta * state[0] + current
    s, psi = float(v >= neuron.threshold), float(neuron.surrogate.slope_at(jnp.float64(v - neuron.threshold)))
    through = 0.0 if cut else {"subtract": -neuron.threshold * psi, "zero": -v * psi, "none": 0.0}[neuron.reset]
    kept = reset(1.0, s, 0.0, neuron.reset)
    return [[neuron.beta * (kept + through)]], [kept + through], [neuron.beta * psi], psi


@pytest.mark.parametrize("kind", ["subtract", "zero", "none"])
@pytest.mark.parametrize("current", [0.3, 0.9], ids=["silent", "fires"])
@pytest.mark.parametrize("path", ["nothing", "reset", "spike"])
def test_cutting_the_reset_of_a_lif_changes_only_the_path_through_the_spike(x64, kind, current, path):
    neuron = gl.LIF(beta=0.8, threshold=1.1, reset=kind, surrogate=gl.Sigmoid(slope=3.0))
    cut = neuron.cut(path)
    found = matrices(cut, (0.5,), current)
    for a, b in zip(found, expected_lif(neuron, (0.5,), current, cut=path != "nothing"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    point = (jnp.float64(0.5),), jnp.float64(current)
    assert cut.apply({}, *point) == neuron.apply({}, *point)
    if kind != "none" and path != "nothing":
        assert abs(matrices(neuron, (0.5,), current)[0] - found[0]) > 0.1


@pytest.mark.parametrize("path", ["nothing", "reset", "spike"])
def test_cutting_an_adaptive_neuron_keeps_or_stops_its_adaptation(x64, path):
    neuron = gl.ALIF(beta=0.8, adaptation_decay=0.9, adaptation_strength=0.4, surrogate=gl.Sigmoid(slope=3.0))
    u, a, current = 0.5, 0.3, 0.6
    x = 0.8 * u + current - 1.0 - 0.4 * a
    psi = float(neuron.surrogate.slope_at(jnp.float64(x)))
    by_reset = 0.0 if path in ("reset", "spike") else 1.0
    by_adaptation = 0.0 if path == "spike" else 1.0
    A, B, C, D = matrices(neuron.cut(path), (u, a), current)
    expected = [
        [0.8 * (1 - by_reset * psi), by_reset * 0.4 * psi],
        [by_adaptation * 0.8 * psi, 0.9 - by_adaptation * 0.4 * psi],
    ]
    np.testing.assert_allclose(A, expected, rtol=1e-12)
    np.testing.assert_allclose(B, [1 - by_reset * psi, by_adaptation * psi], rtol=1e-12)
    np.testing.assert_allclose(C, [0.8 * psi, -0.4 * psi], rtol=1e-12)
    np.testing.assert_allclose(D, psi, rtol=1e-12)


def test_cut_of_a_read_out_is_the_read_out_and_unknown_paths_are_refused():
    assert gl.LI().cut("spike") == gl.LI()
    with pytest.raises(ValueError, match='cut=\'membrane\': choose "nothing", "reset", "adaptation" or "spike"'):
        gl.LIF().cut("membrane")


class Bare(gl.Neuron):
    """A user's neuron without constants below threshold and without a cut."""

    @property
    def states(self):
        return ("membrane",)

    @nn.compact
    def __call__(self, carry, inputs):
        v = jnp.tanh(carry[0]) + inputs
        s = gl.FastSigmoid()(v - 1.0)
        return (v - s,), s


def test_a_neuron_that_does_not_say_how_to_cut_is_refused_in_words():
    assert Bare().cut("nothing") == Bare()
    assert Bare().subthreshold({}, jnp.float32) is None
    with pytest.raises(NotImplementedError, match="Bare does not say how to cut 'reset': give it a cut"):
        Bare().cut("reset")


@pytest.mark.parametrize("kind", WITH_CONSTANTS, ids=lambda n: n.__name__)
def test_subthreshold_constants_are_those_of_a_neuron_that_does_not_fire(x64, kind):
    settings = {} if kind is gl.LI else {"surrogate": gl.Triangular(width=0.5)}
    neuron = kind(**settings)
    own = neuron.subthreshold({}, jnp.float64)
    assert own.shared and float(own.gain) == 1.0
    # Far below threshold the triangle's slope is zero, so the whole linearisation is the sub-threshold one.
    A, B, _, _ = matrices(neuron, tuple(0.1 for _ in neuron.states), 0.05)
    np.testing.assert_allclose(A, own.A, rtol=1e-12)
    np.testing.assert_allclose(B, own.B, rtol=1e-12)
    # Near threshold it fires or nearly so, and the reset moves A and B away from the constants.
    if kind is not gl.LI:
        assert not np.allclose(matrices(neuron, tuple(0.1 for _ in neuron.states), 0.9)[1], own.B)


@pytest.mark.parametrize("kind", WITH_CONSTANTS, ids=lambda n: n.__name__)
def test_the_spike_variable_answers_a_current_with_c_times_powers_of_A_times_B(x64, kind):
    """c A^n B is what the output's derivative shows n steps after a current, up to the slope of that step."""
    neuron = kind() if kind is gl.LI else kind(surrogate=gl.FastSigmoid(slope=1.0), reset="none")
    neuron = neuron.cut("spike")
    own = jax.tree.map(np.asarray, neuron.subthreshold({}, jnp.float64))
    current = jnp.full((5, 1), 0.1)
    response = jax.jacobian(lambda i: scanned(neuron, i)[1][:, 0])(current)[:, 0, 0]
    slopes = np.diag(jax.jacobian(lambda i: scanned(neuron, i)[1][:, 0])(current)[:, :, 0])
    A, B, c = np.array(own.A), np.array(own.B), np.array(own.c)
    expected = [c @ np.linalg.matrix_power(A, n) @ B for n in range(5)]
    np.testing.assert_allclose(response / slopes, expected, rtol=1e-12)


def test_a_rate_unit_has_no_constants_below_threshold(x64):
    assert gl.LeakyRate().subthreshold({}, jnp.float64) is None
    A, B, C, D = matrices(gl.LeakyRate(rate=0.3), (0.2,), 0.5)
    slope = 0.3 * (1 - np.tanh(0.5) ** 2)
    np.testing.assert_allclose((*A.ravel(), *B, *C, D), (0.7, slope, 0.7, slope), rtol=1e-12)


def test_per_unit_constants_are_not_shared():
    own = gl.LIF(beta=PER_UNIT).subthreshold({}, jnp.float32)
    assert not own.shared and own.A[0][0].shape == (4,)
    trained = gl.LIF(beta=0.5, trainable=("beta",))
    held = trained.subthreshold({"beta_logit": jnp.float32(0.0)}, jnp.float32)
    assert float(held.A[0][0]) == pytest.approx(0.5)


def test_the_tape_gives_the_same_local_jacobians_for_a_whole_record(x64):
    neuron = gl.ALIF(beta=0.8, surrogate=gl.Sigmoid(slope=3.0))
    net = gl.connect([nn.Dense(2), neuron])
    x = jnp.asarray(np.random.default_rng(0).random((3, 2, 3)))
    params = net.init(jax.random.key(0), x)
    record = gl.tape.record(net, params, gl.Batch(x, jnp.zeros((2, 2))), gl.PerStep(_square)).slices.layers[0]
    found = tape.jacobians(net, params, 0, record)
    for index in ((0, 0, 0), (1, 1, 0), (2, 0, 1)):
        state = tuple(h[index] for h in record.state)
        A, B, C, D = matrices(neuron, state, record.current[index])
        at = jax.tree.map(lambda leaf, i=index: np.asarray(leaf[i]), found)
        close((np.array(at.A), np.array(at.B), np.array(at.C), at.D), (A, B, C, D), 1e-12)


def _square(output, target):
    return (output - target) ** 2


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: gl.LIF(beta=1.2), ValueError, r"LIF\(beta=1.2\).*between 0 and 1"),
        (lambda: gl.LIF(beta=float("nan")), ValueError, r"LIF\(beta=nan\).*between 0 and 1"),
        (lambda: gl.LIF(beta=(0.5, -0.1)), ValueError, r"LIF\(beta=-0.1\)"),
        (lambda: gl.LIF(beta=1.0, trainable=("beta",)), ValueError, "strictly between 0 and 1 to be trained"),
        (lambda: gl.LIF(beta=np.ones(3) / 2), TypeError, r"tuple\(array.tolist\(\)\)"),
        (lambda: gl.LIF(beta="0.9"), TypeError, "give a number"),
        (lambda: gl.LIF(threshold=0.0), ValueError, r"LIF\(threshold=0.0\): the threshold must be positive"),
        (lambda: gl.IF(threshold=np.ones(3)), TypeError, r"IF\(threshold=.*tuple"),
        (lambda: gl.LIF(reset="hard"), ValueError, r'reset=\'hard\'\): choose "subtract", "zero" or "none"'),
        (lambda: gl.LIF(surrogate=gl.FastSigmoid), TypeError, r"give an instance such as gl.FastSigmoid"),
        (lambda: gl.LIF(surrogate=25.0), TypeError, r"give an instance such as gl.FastSigmoid"),
        (lambda: gl.LIF(trainable="beta"), TypeError, r"give a tuple of names, \('beta',\)"),
        (lambda: gl.LIF(trainable=("alpha",)), ValueError, "'alpha' cannot be trained; choose from .*beta.*threshold"),
        (lambda: gl.LI(trainable=("threshold",)), ValueError, "'threshold' cannot be trained"),
        (lambda: gl.CurrentLIF(alpha=-0.1), ValueError, r"CurrentLIF\(alpha=-0.1\)"),
        (lambda: gl.ALIF(adaptation_decay=2.0), ValueError, r"ALIF\(adaptation_decay=2.0\)"),
    ],
)
def test_bad_constants_are_refused_when_the_neuron_is_built(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_neurons_are_values():
    for kind in neurons.ALL:
        assert kind() == kind() and hash(kind()) == hash(kind())
    assert gl.LIF(beta=0.9) != gl.LIF(beta=0.8)
    assert gl.LIF() != gl.IF()


@pytest.mark.parametrize("kind", SPIKING, ids=lambda n: n.__name__)
def test_a_neuron_keeps_the_dtype_of_its_current(kind):
    neuron = kind(trainable=("threshold",))
    for dtype in (jnp.float16, jnp.float32):
        current = jnp.ones((2, 3), dtype)
        carry = neuron.initialize_carry(None, (2, 3), dtype)
        variables = neuron.init(jax.random.key(0), carry, current)
        after, s = neuron.apply(variables, carry, current)
        assert s.dtype == dtype and all(leaf.dtype == dtype for leaf in after)
