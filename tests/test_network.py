"""Networks: chunked runs against step-by-step ones and NumPy, the graph, initialisation, Flax's modules, bad input."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import SmoothSpike, assert_alive, close, differ, living, network_loop, trains
from scipy.sparse.csgraph import connected_components

import gradlab as gl
from gradlab import plan
from gradlab.network import INPUT, Link

KEY = jax.random.key(0)
CROSS_ENTROPY = gl.PerStep(optax.softmax_cross_entropy)


def stack(links=None):
    """Three layers, 5 - 6 - 4 - 3 units, with whatever links."""
    layers = [nn.Dense(6), gl.LIF(beta=0.8), nn.Dense(4), gl.ALIF(beta=0.7, threshold=0.8), nn.Dense(3), gl.LI(0.9)]
    return gl.connect(layers, links=links)


GRAPHS = {
    "chain": None,
    "recurrent": {0: [0], 1: [1]},
    "feedback": {0: [1]},
    "skip": {2: [0]},
    "all": {0: [0, 2], 1: [1], 2: [0, 2]},
}


@pytest.mark.parametrize(("name", "n_steps"), [*((n, 53) for n in GRAPHS), *(("all", t) for t in (7, 26, 29, 50, 75))])
def test_a_chunked_run_is_the_numpy_simulation(x64, name, n_steps):
    net = stack(GRAPHS[name])
    x = trains((n_steps, 2, 5), dtype=jnp.float64)
    params = living(net, x)
    _, records = jax.jit(lambda p: plan.run(net, p, x))(params)
    currents, outputs = network_loop(net, params, x)
    for layer, record in enumerate(records):
        np.testing.assert_allclose(record.current, currents[layer], atol=1e-12)
        np.testing.assert_allclose(record.output, outputs[layer], atol=1e-12)
    if name == "all":  # negative control: without its extra links the network does something else
        bare = jax.tree.map(jnp.asarray, params)
        for layer in bare.values():
            for link in [k for k in layer if k.startswith("from_")]:
                layer[link] = jax.tree.map(jnp.zeros_like, layer[link])
        assert not np.allclose(plan.outputs(net, bare, x), outputs[-1])


@pytest.mark.parametrize("name", ["chain", "all"])
def test_a_chunked_run_is_the_step_by_step_run_and_can_be_cut_anywhere(x64, name):
    net, n_steps = stack(GRAPHS[name]), 53
    x = trains((n_steps, 2, 5), dtype=jnp.float64)
    params = living(net, x)
    end, records = jax.jit(lambda p: plan.run(net, p, x))(params)

    def step(state, now):
        after, currents, outputs = net.step(params, state, now)
        return after, (state.states, currents, outputs)

    last, (before, currents, outputs) = jax.lax.scan(step, net.initial_state(params, x), x)
    close(last, end)
    close(
        (before, currents, outputs),
        tuple(tuple(getattr(r, f) for r in records) for f in ("state", "current", "output")),
    )
    middle, first = jax.jit(lambda p: plan.run(net, p, x[:30]))(params)
    finish, second = jax.jit(lambda p, s: plan.run(net, p, x[30:], s))(params, middle)
    close(finish, end)
    close(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), records)
    # Forgetting the state in the middle is seen.
    assert differ(plan.run(net, params, x[30:])[1][-1].output, second[-1].output)


def test_the_carry_holds_the_delayed_outputs_and_nothing_more():
    x = trains((4, 2, 5))
    net = stack({0: [0, 2]})
    state = net.initial_state(living(net, x), x)
    assert [len(s) for s in state.states] == [1, 2, 1]
    assert [None if s is None else s.shape for s in state.outputs] == [(2, 6), None, (2, 3)]
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))


def test_chunk_sizes():
    steps = (1, 7, 50, 51, 53, 60, 75, 100, 107, 130)
    assert [plan.chunk_size(n) for n in steps] == [1, 7, 50, 17, 17, 20, 25, 25, 20, 13]
    for n in range(1, 400):
        size = plan.chunk_size(n)
        assert size == n if n <= 50 else 10 <= size <= 25 and n // size >= 3
        assert size == n or n % size == 0 or not any(n % k == 0 and n // k >= 3 for k in range(10, 26))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [6, 8, 13])
def test_scan_chunks_is_a_scan_over_chunks_with_a_shorter_last_one(n, reverse):
    def chunk(carry, xs):
        order = xs[::-1] if reverse else xs
        carry, ys = jax.lax.scan(lambda c, x: (0.5 * c + x, c), carry, order)
        return carry, ys[::-1] if reverse else ys

    xs = jnp.arange(1.0, n + 1)
    found = plan.scan_chunks(chunk, jnp.float32(3.0), xs, 4, reverse=reverse)
    expected = jax.lax.scan(lambda c, x: (0.5 * c + x, c), jnp.float32(3.0), xs, reverse=reverse)
    close(found, expected, 1e-6)


def graph(n, links):
    """A network of n layers without weights worth looking at."""
    return gl.connect([part for _ in range(n) for part in (nn.Dense(2), gl.LIF())], links=links)


@pytest.mark.parametrize(
    ("n", "links", "expected"),
    [
        (3, {}, [[0], [1], [2]]),
        (3, {1: [1]}, [[0], [1], [2]]),
        (3, {2: [0]}, [[0], [1], [2]]),
        (3, {0: [1]}, [[0, 1], [2]]),
        (4, {0: [3]}, [[0, 1, 2, 3]]),
        (5, {0: [2], 2: [3]}, [[0, 1, 2, 3], [4]]),
        (5, {1: [2], 3: [4]}, [[0], [1, 2], [3, 4]]),
        (6, {0: [2], 1: [4]}, [[0, 1, 2, 3, 4], [5]]),
    ],
)
def test_blocks_of_known_graphs(n, links, expected):
    assert [list(block) for block in plan.blocks(graph(n, links))] == expected


def test_blocks_are_the_strongly_connected_components():
    random = np.random.default_rng(0)
    sizes = set()
    for _ in range(60):
        n = int(random.integers(1, 8))
        pairs = [(s, t) for s in range(n) for t in range(n) if s != t - 1 and random.random() < 0.12]
        net = graph(n, {t: [s for s, other in pairs if other == t] for t in range(n)})
        adjacency = np.zeros((n, n))
        for source, target in [*pairs, *((k, k + 1) for k in range(n - 1))]:
            adjacency[source, target] = 1
        labels = connected_components(adjacency, connection="strong")[1]
        found = plan.blocks(net)
        assert [layer for block in found for layer in block] == list(range(n))
        assert {frozenset(b) for b in found} == {frozenset(np.flatnonzero(labels == k)) for k in set(labels)}
        for block in found:
            cyclic = len(block) > 1 or (block[0], block[0]) in pairs
            assert plan.is_cyclic(net, block) == cyclic
            sizes.add(len(block))
    assert len(sizes) > 2


def test_parameters_have_names_shapes_and_the_dtype_of_the_inputs(x64):
    net = gl.connect(
        [nn.Dense(6), gl.LIF(trainable=("beta",)), nn.Dense(3, use_bias=False), gl.LI()], links={0: [0, 1]}
    )
    for dtype in (jnp.float32, jnp.float64):
        params = net.init(KEY, jnp.zeros((4, 2, 5), dtype))
        assert jax.tree.map(jnp.shape, params) == {
            "layer_0": {
                "connection": {"kernel": (5, 6), "bias": (6,)},
                "from_layer_0": {"kernel": (6, 6)},
                "from_layer_1": {"kernel": (3, 6)},
                "neuron": {"beta_logit": ()},
            },
            "layer_1": {"connection": {"kernel": (6, 3)}},
        }
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    kernels = [params["layer_0"][k]["kernel"] for k in ("connection", "from_layer_0")]
    assert not np.allclose(kernels[0], kernels[1][:5])  # each link draws from a key of its own
    other = net.init(jax.random.key(1), jnp.zeros((4, 2, 5)))
    assert differ(other, params)
    close(net.init(KEY, np.zeros((4, 2, 5))), params)  # NumPy inputs, and init reads shapes only


def test_numpy_inputs_of_64_bits_give_32_bit_parameters_where_jax_has_no_others(recwarn):
    params = stack().init(KEY, np.zeros((4, 2, 5)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert not [w for w in recwarn if "float64" in str(w.message)]


class MinusBatchMean(nn.Module):
    """Mixes samples: what normalisation over the batch does, without variables that would give it away."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x - x.mean(0, keepdims=True))


class OverBatchSize(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) / x.shape[0]


class Centred(nn.Module):
    """Takes its mean over features: no sample sees another."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x - x.mean(-1, keepdims=True))


class Dropped(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=self.deterministic)(nn.Dense(4)(x))


class Flattened(nn.Module):
    """Forgets the batch axis."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.reshape(1, -1))


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        (MinusBatchMean(), "MinusBatchMean.* into layer 0 mixes the samples of a batch"),
        (OverBatchSize(), "OverBatchSize.* mixes the samples of a batch"),
        (nn.BatchNorm(use_running_average=False), r"BatchNorm.*keeps variables in \['batch_stats'\].*use nn.LayerNorm"),
        (Dropped(), "Dropped.*randomness in each call.*deterministic=True"),
        (nn.Dropout(0.5, deterministic=False), "Dropout.*randomness in each call"),
        (Flattened(), r"Flattened.*does not keep the batch axis: it turns \(2, 5\) into \(1, 4\)"),
        (nn.Conv(4, (3,)), "Conv.* mixes the samples of a batch"),  # takes [batch, features] for one image
        (nn.Conv(4, (3, 3)), r"Conv.* into layer 0 does not fit its input of shape \(5,\) per sample"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_connection_that_would_make_runs_differ_is_refused(connection, words):
    with pytest.raises(ValueError, match=words):
        gl.connect([connection, gl.LIF()]).init(KEY, jnp.ones((4, 2, 5)))


@pytest.mark.parametrize(
    "connection", [Centred(), Dropped(deterministic=True), nn.Sequential([nn.Dense(4), nn.LayerNorm()])]
)
def test_a_connection_that_treats_each_sample_by_itself_is_accepted(connection):
    gl.connect([connection, gl.LIF()]).init(KEY, jnp.ones((4, 2, 5)))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (jnp.ones((4, 5)), r"shape \(4, 5\).*time-major.*\[time, batch, features...\].*inputs\[:, None\]"),
        (jnp.ones((4, 2, 5), int), "inputs are int.*astype"),
        (jnp.ones((0, 2, 5)), "an axis is empty"),
        ([[[1.0]]], "inputs are a list: give an array"),
    ],
)
def test_inputs_that_are_no_sequence_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        stack().init(KEY, inputs)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: gl.connect([]), TypeError, "needs a list"),
        (lambda: gl.connect(nn.Dense(3)), TypeError, "needs a list"),
        (lambda: gl.connect([gl.LIF()]), ValueError, r"item 0, LIF\(\), has no connection before it"),
        (lambda: gl.connect([nn.Dense(3)]), ValueError, r"ends with Dense\(features=3\): end it with a neuron"),
        (lambda: gl.connect([nn.Dense(3), 7, gl.LIF()]), TypeError, "item 1 of the network is 7"),
        (lambda: gl.connect([nn.Dense(3), gl.LIF]), TypeError, r"item 1.*the class LIF: give an instance, LIF\(...\)"),
        (lambda: gl.connect([nn.Dense, gl.LIF()]), TypeError, r"the class Dense: give an instance"),
        (
            lambda: gl.connect([nnx.Linear(5, 3, rngs=nnx.Rngs(0)), gl.LIF()]),
            TypeError,
            "an NNX module.*bridge.ToLinen",
        ),
        (lambda: stack({0: 0}), TypeError, r"links={0: 0}: give {target: \[sources\]}"),
        (lambda: stack([(0, 0)]), TypeError, r"give {target: \[sources\]}"),
        (lambda: stack({0: [3]}), ValueError, "link from layer 3 to layer 0: the network's layers are 0 to 2"),
        (lambda: stack({-1: [0]}), ValueError, "layers are 0 to 2"),
        (lambda: stack({1: [0]}), ValueError, "link from layer 0 to layer 1: the chain has it already"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_per_unit_constants_must_fit_the_layer():
    net = gl.connect([nn.Dense(3), gl.LIF(beta=(0.5, 0.6))])
    with pytest.raises(ValueError, match="beta has 2 values for 3 units"):
        net.init(KEY, jnp.ones((4, 2, 5)))


def image_net(links=None):
    return gl.connect(
        [nn.Conv(3, (3, 3)), gl.LIF(threshold=0.5), lambda x: x.reshape(x.shape[0], -1), nn.Dense(4), gl.LI()],
        links=links,
    )


def test_convolutional_networks_run_as_flax_does(x64):
    net = image_net({0: {0: nn.Conv(3, (1, 1), use_bias=False)}})
    x = trains((5, 2, 6, 6, 1), dtype=jnp.float64)
    params = living(net, x)
    _, records = plan.run(net, params, x)
    assert records[0].output.shape == (5, 2, 6, 6, 3) and records[1].output.shape == (5, 2, 4)
    own = params["layer_0"]
    u, s, y = jnp.zeros((2, 6, 6, 3)), jnp.zeros((2, 6, 6, 3)), 0.0
    for t in range(5):
        recurrent = nn.Conv(3, (1, 1), use_bias=False).apply({"params": own["from_layer_0"]}, s)
        v = 0.95 * u + nn.Conv(3, (3, 3)).apply({"params": own["connection"]}, x[t]) + recurrent
        s = (v >= 0.5).astype(v.dtype)
        u = v - 0.5 * s
        (dense,) = params["layer_1"]["connection"].values()
        y = 0.95 * y + s.reshape(2, -1) @ dense["kernel"] + dense["bias"]
        np.testing.assert_allclose(records[1].output[t], y, atol=1e-12)


def test_a_link_between_feature_maps_needs_a_connection_that_fits():
    x = trains((5, 2, 6, 6, 1))
    with pytest.raises(ValueError, match=r"joins layers of shape \(6, 6, 3\).*give its connection, links={0: {0:"):
        image_net({0: [0]}).init(KEY, x)
    with pytest.raises(ValueError, match=r"delivers \(6, 6, 2\) per sample, but the layer has \(6, 6, 3\) units"):
        image_net({0: {0: nn.Conv(2, (1, 1))}}).init(KEY, x)


def test_functions_and_modules_in_a_row_are_chained(x64):
    net = gl.connect([nn.Dense(6), jnp.tanh, nn.Dense(4), gl.LI(0.0)])
    x = trains((3, 2, 5), dtype=jnp.float64)
    params = net.init(KEY, x)
    first, second = (params["layer_0"]["connection"][name] for name in ("layers_0", "layers_2"))
    expected = np.tanh(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(plan.outputs(net, params, x), expected, atol=1e-12)


def bptt_both_ways(net, x, key=KEY):
    """BPTT through the tape and by automatic differentiation."""
    params = net.init(key, x)
    targets = jax.nn.one_hot(jnp.arange(x.shape[1]) % 3, 3, dtype=x.dtype)
    rules = [gl.rules.BPTT(), gl.rules.BPTT(form="autodiff")]
    return tuple(gl.gradients(net, params, gl.Batch(x, targets), CROSS_ENTROPY, rules, KEY).values())


@pytest.mark.parametrize(
    "cell", [nn.GRUCell(4), nn.OptimizedLSTMCell(4), nn.SimpleCell(4)], ids=lambda c: type(c).__name__
)
def test_flax_cells_stand_where_a_neuron_stands(x64, cell):
    x = trains((6, 2, 5), dtype=jnp.float64)
    layers = [
        nn.Dense(4),
        gl.LIF(threshold=0.4, surrogate=gl.FastSigmoid(2.0)),
        nn.Dense(4),
        cell,
        nn.Dense(3),
        gl.LI(),
    ]
    net = gl.connect(layers, links={0: [1]})
    tape, autodiff = bptt_both_ways(net, x)
    close(tape, autodiff)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(tape))
    # The cell alone, as Flax runs it.
    alone = gl.connect([nn.Dense(4), cell])
    params = alone.init(KEY, x)
    current = nn.Dense(4).apply({"params": params["layer_0"]["connection"]}, x)
    with jax.default_matmul_precision("highest"):
        state = jax.tree.map(lambda h: h.astype(x.dtype), cell.initialize_carry(KEY, current[0].shape))
        for t in range(6):
            state, expected = cell.apply({"params": params["layer_0"]["neuron"]}, state, current[t])
        np.testing.assert_allclose(plan.outputs(alone, params, x)[-1], expected, atol=1e-12)


def test_an_nnx_module_comes_in_through_flax_s_bridge(x64):
    net = gl.connect(
        [nnx.bridge.ToLinen(nnx.Linear, args=(5, 4)), gl.LIF(), nnx.bridge.ToLinen(nnx.Linear, args=(4, 3)), gl.LI()]
    )
    x = trains((6, 2, 5), dtype=jnp.float64)
    params = net.init(KEY, x)
    assert params["layer_0"]["connection"]["kernel"].dtype == jnp.float64
    same = gl.connect([nn.Dense(4), gl.LIF(), nn.Dense(3), gl.LI()])
    np.testing.assert_allclose(plan.outputs(net, params, x), plan.outputs(same, params, x), atol=1e-12)
    tape, autodiff = bptt_both_ways(net, x)
    close(tape, autodiff)


def test_a_neuron_goes_out_to_nnx_through_flax_s_bridge():
    neuron = gl.LIF(beta=0.8, trainable=("beta",))
    current, carry = jnp.full((2, 3), 0.7), (jnp.full((2, 3), 0.5),)
    outside = nnx.bridge.lazy_init(nnx.bridge.ToNNX(neuron, rngs=nnx.Rngs(0)), carry, current)
    variables = neuron.init(KEY, carry, current)
    close(outside(carry, current), neuron.apply(variables, carry, current), 1e-6)
    assert "beta_logit" in nnx.state(outside, nnx.Param)


def test_networks_are_values_with_lists_made_tuples():
    assert stack({0: [0]}) == stack({0: (0,)}) and hash(stack({0: [0]})) == hash(stack({0: [0]}))
    assert stack() != stack({0: [0]}) and stack() != gl.connect([nn.Dense(6), gl.LIF()])
    lists = gl.connect([nn.Conv(3, [3, 3]), nn.Sequential([nn.relu]), gl.LIF(beta=[0.1, 0.2, 0.3], trainable=["beta"])])
    assert hash(lists) == hash(lists)
    assert lists.neurons[0].beta == (0.1, 0.2, 0.3) and lists.neurons[0].trainable == ("beta",)


class Scaled(nn.Module):
    """A user's module that cannot be hashed: it holds an array."""

    factor: np.ndarray

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x * self.factor)


def test_a_network_that_cannot_be_hashed_still_works():
    net = gl.connect([Scaled(np.arange(5.0)), gl.LIF()])
    with pytest.raises(TypeError):
        hash(net)
    x = trains((6, 2, 5))
    params = net.init(KEY, x)
    batch = gl.Batch(x, jax.nn.one_hot(jnp.array([0, 2]), 3))
    found = gl.gradients(net, params, batch, CROSS_ENTROPY, [gl.rules.BPTT(), gl.rules.OSTL()], KEY)
    close(found["BPTT"], found["OSTL"], 1e-5)
    assert gl.evaluate(net, params, batch, CROSS_ENTROPY)["loss"] > 0


def test_the_links_of_a_network():
    net = stack({0: [0, 2], 2: [0]})
    assert net.links_into(0) == (
        Link(INPUT, 0, nn.Dense(6), 0, "connection"),
        Link(0, 0, None, 1, "from_layer_0"),
        Link(2, 0, None, 1, "from_layer_2"),
    )
    assert [(k.target, k.delay) for k in net.links_from(0)] == [(0, 1), (1, 0), (2, 0)]
    assert [net.delays(layer) for layer in range(3)] == [True, False, True]
    assert net.layer_names == ("layer_0", "layer_1", "layer_2") and net.last == 2


def test_a_notebook_shows_what_reads_what():
    shown = stack({0: [2]})._repr_html_()
    for words in (
        "layer_2 (step before)",
        "Dense(features=6)",
        "LIF(beta=0.8)",
        "ALIF(beta=0.7, threshold=0.8)",
        "input",
    ):
        assert words in shown
    assert "step before" not in stack()._repr_html_()


def test_smooth_network_gradients_are_finite_differences(x64):
    spike = SmoothSpike()
    layers = [
        nn.Dense(4),
        gl.LIF(0.8, surrogate=spike, trainable=("beta",)),
        nn.Dense(3),
        gl.CurrentLIF(surrogate=spike),
    ]
    net = gl.connect(layers, links={0: [0, 1]})
    x = trains((5, 2, 5), dtype=jnp.float64)
    params = net.init(KEY, x)
    batch = gl.Batch(x, jax.nn.one_hot(jnp.array([0, 2]), 3, dtype=x.dtype))
    gradient = gl.gradients(net, params, batch, CROSS_ENTROPY, [gl.rules.BPTT()], KEY)["BPTT"]
    value = jax.jit(lambda p: CROSS_ENTROPY(plan.outputs(net, p, x), batch))
    leaves, structure = jax.tree.flatten(params)
    for index, leaf in enumerate(leaves):
        direction = jax.random.normal(jax.random.key(index), leaf.shape, leaf.dtype)
        up, down = (
            value(jax.tree.unflatten(structure, [*leaves[:index], leaf + h * direction, *leaves[index + 1 :]]))
            for h in (1e-6, -1e-6)
        )
        expected = float((up - down) / 2e-6)
        assert abs(expected) > 1e-6
        np.testing.assert_allclose(float((jax.tree.leaves(gradient)[index] * direction).sum()), expected, rtol=1e-6)


def test_the_helper_refuses_a_silent_network():
    net, x = gl.connect([nn.Dense(4), gl.LIF(threshold=100.0)]), trains((5, 2, 5))
    with pytest.raises(AssertionError, match=r"layer 0 fires on 0.00"):
        assert_alive(net, net.init(KEY, x), x)
