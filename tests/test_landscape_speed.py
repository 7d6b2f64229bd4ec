"""Losses from currents that all points of a surface share: equal to the loss at each point, used where exact only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradlab as gl
from gradlab.analysis import linear_currents
from gradlab.analysis.landscape import loss_function, random_plane, surface
from gradlab.analysis.linear_currents import is_linear, losses_at
from gradlab.analysis.lines import line_between, line_profile
from gradlab.analysis.plane import moved

A, B = np.array([-0.7, -0.2, 0.3, 0.9, 1.1]), np.array([-0.5, 0.1, 0.8, 1.3])
NEURON = gl.LIF(beta=0.8, threshold=0.5)
MEAN = gl.PerStep(optax.softmax_cross_entropy)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def shared(monkeypatch):
    """How often losses came from shared currents."""
    calls = []
    run = linear_currents._from_currents
    monkeypatch.setattr(linear_currents, "_from_currents", lambda *given: calls.append(1) or run(*given))
    return calls


def flatten(x):
    return x.reshape(x.shape[0], -1)


class Doubled(nn.Dense):
    """A subclass may do anything; this one squares its output."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) ** 2


def setting(modules, features=(6,), loss=MEAN, mask=None, links=None, seed=0):
    """A network with weights large enough to spike, as a function of its parameters."""
    net = gl.connect([*modules, nn.Dense(3), NEURON], links=links)
    inputs = (jax.random.uniform(jax.random.key(seed), (7, 4, *features)) < 0.5).astype(jnp.float64)
    params = jax.tree.map(lambda leaf: 1.5 * leaf + 0.05, net.init(jax.random.key(1), inputs))
    batch = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(4) % 3, 3, dtype=jnp.float64), mask)
    return loss_function(net, batch, loss), params


def one_by_one(function, params, directions, points):
    """The loss at each point, by itself."""
    run = jax.jit(lambda p: function(p))
    return np.array([float(run(moved(params, directions, c))) for c in points])


def grid():
    b, a = np.meshgrid(B, A, indexing="ij")
    return np.stack([a.ravel(), b.ravel()], axis=1)


LINEAR_CASES = {
    "dense": lambda: setting([nn.Dense(8), NEURON]),
    "deep": lambda: setting([nn.Dense(8, use_bias=False), NEURON, nn.Dense(5), gl.ALIF()]),
    "cycle and skip": lambda: setting([nn.Dense(8), NEURON, nn.Dense(5), NEURON], links={0: [0, 1], 2: [0]}),
    "convolution": lambda: setting([nn.Conv(4, (3,)), NEURON, flatten], features=(5, 2)),
    "flattened": lambda: setting([flatten, nn.Dense(8), NEURON], features=(3, 2)),
    "normalised without parameters": lambda: setting(
        [nn.LayerNorm(use_bias=False, use_scale=False), nn.Dense(8), NEURON]
    ),
    "trained neuron, sum over time, mask": lambda: setting(
        [nn.Dense(8), gl.LIF(beta=0.8, threshold=0.5, trainable=("beta",))],
        loss=gl.Accumulated(optax.softmax_cross_entropy),
        mask=jnp.asarray(np.random.default_rng(0).integers(0, 2, (7, 4)), jnp.float64),
    ),
}


def some_slow(cases, quick):
    """The names of all cases; those that are not quick run with the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in cases]


@pytest.mark.parametrize("name", some_slow(LINEAR_CASES, ("cycle and skip", "flattened")))
def test_shared_currents_give_the_loss_of_each_point(name, shared, monkeypatch):
    function, params = LINEAR_CASES[name]()
    plane = random_plane(params, jax.random.key(3), "none", ignore=())  # biases and neurons move as well
    expected = one_by_one(function, params, (plane.x, plane.y), grid()).reshape(len(B), len(A))
    assert len(np.unique(expected)) > 10  # the surface is not flat
    for small in (0, 2**30):  # step by step, and all steps at once
        monkeypatch.setattr(linear_currents, "SMALL", small)
        found = surface(function, plane, A, B).loss
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(shared) == 2
    assert not np.allclose(surface(function, plane, A, -B).loss, expected, rtol=1e-6)  # negative control


NON_LINEAR_CASES = {
    "rectified": lambda: setting([nn.Dense(8), nn.relu, NEURON]),
    "normalised with a trained scale": lambda: setting([nn.LayerNorm(), nn.Dense(8), NEURON]),
    "two products": lambda: setting([nn.Dense(7), nn.Dense(8), NEURON]),
    "a subclass": lambda: setting([Doubled(8), NEURON]),
}


@pytest.mark.parametrize("name", some_slow(NON_LINEAR_CASES, ("rectified",)))
def test_a_connection_that_is_not_linear_is_evaluated_as_it_is(name, shared, monkeypatch):
    function, params = NON_LINEAR_CASES[name]()
    plane = random_plane(params, jax.random.key(3), "none", ignore=())
    expected = one_by_one(function, params, (plane.x, plane.y), grid()).reshape(len(B), len(A))
    np.testing.assert_allclose(surface(function, plane, A, B).loss, expected, rtol=1e-12)
    assert not shared
    # Negative control: treated as linear, it would be another surface.
    monkeypatch.setattr(linear_currents, "is_linear", lambda *_: True)
    assert np.abs(surface(function, plane, A, B).loss - expected).max() > 1e-3 and shared


def test_what_is_linear():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    known = [nn.Dense(3), nn.Conv(3, (2, 2)), nn.ConvTranspose(3, (2, 2)), nn.ConvLocal(3, (2, 2))]
    known += [
        nn.DenseGeneral(5),
        nn.Sequential((nn.relu, nn.Dense(3))),
        nn.Sequential((nn.Sequential((nn.Dense(3),)),)),
    ]
    unknown = [nn.Sequential((nn.Dense(3), nn.relu)), nn.Sequential((nn.Dense(3), nn.Dense(3))), nn.LayerNorm()]
    unknown += [Doubled(3), nn.Dense(3, dtype=jnp.bfloat16), nn.Dense(3, dot_general=jax.lax.dot_general)]
    for module in (*known, *unknown):
        own = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), module.init(jax.random.key(0), x)["params"])
        assert is_linear(module, own) == (module in known), module
        other = jax.tree.map(lambda leaf: 2.0 * leaf + 0.3, own)
        apply = lambda p, m=module: m.apply({"params": p}, x)  # noqa: E731
        gap = apply(jax.tree.map(jnp.add, own, other)) - apply(own) - apply(other)
        if module in known:
            assert jnp.abs(gap).max() < 1e-12 * jnp.abs(apply(own)).max() + 1e-12
    assert is_linear(None, {"kernel": jnp.ones((2, 2))})


def test_lines_and_volumes_share_currents_too(shared):
    function, params = LINEAR_CASES["deep"]()
    other = jax.tree.map(lambda leaf: leaf[::-1], params)
    line = line_between(params, other)
    a = np.linspace(-0.5, 1.5, 9)
    expected = one_by_one(function, params, (line.direction,), a[:, None])
    np.testing.assert_allclose(line_profile(function, line, a).loss["loss"], expected, rtol=1e-12)
    ways = tuple(random_plane(params, jax.random.key(k)).x for k in range(3))
    points = np.random.default_rng(0).normal(size=(10, 3))
    expected = one_by_one(function, params, ways, points)
    np.testing.assert_allclose(losses_at(function, params, ways, points), expected, rtol=1e-12)
    assert len(shared) == 2
    assert not np.allclose(losses_at(function, params, ways[::-1], points), expected, rtol=1e-6)


def test_threads_and_batch_sizes_change_nothing(monkeypatch):
    function, params = LINEAR_CASES["dense"]()
    plane = random_plane(params, jax.random.key(3))
    monkeypatch.setattr(linear_currents, "SMALL", 0)
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(linear_currents, "_threads", lambda n=threads: n)
        found[threads] = surface(function, plane, np.linspace(-1, 1, 9), np.linspace(-1, 1, 8)).loss
    np.testing.assert_array_equal(found[1], found[3])
    for size in (1, 5, 100):
        again = surface(function, plane, np.linspace(-1, 1, 9), np.linspace(-1, 1, 8), size).loss
        np.testing.assert_allclose(again, found[1], rtol=1e-12)
    with pytest.raises(ValueError, match="whole number above 0"):
        surface(function, plane, A, B, batch_size=0)


def test_memory_does_not_grow_with_the_number_of_points():
    function, params = LINEAR_CASES["dense"]()
    sizes = {points: linear_currents._sizes(function, params, points, None)[1] for points in (3, 121, 2601, 10**6)}
    assert sizes[3] < sizes[121] < sizes[2601] == sizes[10**6] == linear_currents.BLOCK_POINTS


def test_one_thread_where_the_compiler_was_told_so(monkeypatch):
    monkeypatch.setattr(linear_currents.os, "cpu_count", lambda: 5)
    monkeypatch.delattr(linear_currents.os, "sched_getaffinity", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert linear_currents._threads() == 5
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    assert linear_currents._threads() == 1


def test_currents_that_do_not_fit_the_memory_are_not_shared(shared, monkeypatch):
    function, params = LINEAR_CASES["dense"]()
    plane = random_plane(params, jax.random.key(3))
    expected = surface(function, plane, A, B).loss
    monkeypatch.setattr(linear_currents, "memory_to_use", lambda: 3 * 7 * 4 * 8 * 8 - 1)  # three currents of 7 x 4 x 8
    np.testing.assert_allclose(surface(function, plane, A, B).loss, expected, rtol=1e-12)
    assert len(shared) == 1
    monkeypatch.setattr(linear_currents, "memory_to_use", lambda: 3 * 7 * 4 * 8 * 8)
    surface(function, plane, A, B)
    assert len(shared) == 2


def test_parameters_of_another_network_are_refused_in_words():
    function, params = LINEAR_CASES["dense"]()
    wrong = {**params, "layer_0": {"connection": {"kernel": jnp.ones((5, 8)), "bias": jnp.ones(8)}}}
    with pytest.raises(ValueError, match="parameter layer_0/connection/kernel has shape"):
        surface(function, random_plane(wrong, jax.random.key(0)), A, B)
    with pytest.raises(ValueError, match="params lack"):
        losses_at(function, {"layer_1": params["layer_1"]}, ({"layer_1": params["layer_1"]},), np.ones((2, 1)))


def test_single_precision_agrees_to_rounding():
    with jax.enable_x64(False):
        net = gl.connect([nn.Dense(8), gl.LI(beta=0.8)])  # no spike that rounding could flip
        inputs = jax.random.normal(jax.random.key(0), (7, 4, 6))
        function = loss_function(net, gl.Batch(inputs, jnp.full((4, 8), 0.125)), MEAN)
        params = net.init(jax.random.key(0), inputs)
        plane = random_plane(params, jax.random.key(3))
        expected = one_by_one(function, params, (plane.x, plane.y), grid()).reshape(len(B), len(A))
        np.testing.assert_allclose(surface(function, plane, A, B).loss, expected, rtol=2e-6)
