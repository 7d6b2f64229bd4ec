"""The execution plan: chunked runs against step-by-step ones and NumPy, chunk sizes, blocks of the layer graph."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, differ, living, network_loop, run_compiled, stack, trains
from scipy.sparse.csgraph import connected_components

import gradlab as gl
from gradlab import plan

GRAPHS = {
    "chain": None,
    "recurrent": {0: [0], 1: [1]},
    "feedback": {0: [1]},
    "skip": {2: [0]},
    "all": {0: [0, 2], 1: [1], 2: [0, 2]},
}


@pytest.mark.parametrize(("name", "n_steps"), [*((n, 53) for n in GRAPHS), *(("all", t) for t in (7, 50, 75))])
def test_a_chunked_run_is_the_numpy_simulation(x64, name, n_steps):
    net = stack(GRAPHS[name])
    x = trains((n_steps, 2, 5), dtype=jnp.float64)
    params = living(net, x)
    _, records = run_compiled(net, params, x)
    currents, outputs = network_loop(net, params, x)
    for layer, record in enumerate(records):
        np.testing.assert_allclose(record.current, currents[layer], atol=1e-12)
        np.testing.assert_allclose(record.output, outputs[layer], atol=1e-12)
    if name == "all":  # negative control: without its extra links the network does something else
        bare = jax.tree.map(jnp.asarray, params)
        for layer in bare.values():
            for link in [k for k in layer if k.startswith("from_")]:
                layer[link] = jax.tree.map(jnp.zeros_like, layer[link])
        assert not np.allclose(run_compiled(net, bare, x)[1][-1].output, outputs[-1])


@pytest.mark.parametrize("name", ["chain", "all"])
def test_a_chunked_run_is_the_step_by_step_run_and_can_be_cut_anywhere(x64, name):
    net, n_steps = stack(GRAPHS[name]), 53
    x = trains((n_steps, 2, 5), dtype=jnp.float64)
    params = living(net, x)
    end, records = run_compiled(net, params, x)

    def step(state, now):
        after, currents, outputs = net.step(params, state, now)
        return after, (state.states, currents, outputs)

    last, (before, currents, outputs) = jax.lax.scan(step, net.initial_state(params, x), x)
    close(last, end)
    close(
        (before, currents, outputs),
        tuple(tuple(getattr(r, f) for r in records) for f in ("state", "current", "output")),
    )
    middle, first = run_compiled(net, params, x[:30])
    finish, second = run_compiled(net, params, x[30:], middle)
    close(finish, end)
    close(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), records)
    # Forgetting the state in the middle is seen.
    assert differ(run_compiled(net, params, x[30:])[1][-1].output, second[-1].output)


def test_the_carry_holds_the_delayed_outputs_and_nothing_more():
    x = trains((4, 2, 5))
    net = stack({0: [0, 2]})
    state = net.initial_state(living(net, x), x)
    assert [len(s) for s in state.states] == [1, 2, 1]
    assert [None if s is None else s.shape for s in state.outputs] == [(2, 6), None, (2, 3)]
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))


def test_chunk_sizes():
    steps = (1, 7, 50, 51, 53, 60, 75, 100, 107, 130)
    assert [plan.chunk_size(n, 2**15) for n in steps] == [1, 7, 50, 17, 17, 20, 25, 25, 20, 13]
    # Wide layers take fewer steps, so that a chunk stays in the cache.
    assert [plan.chunk_size(500, 2**power) for power in (10, 15, 16, 17, 18, 20)] == [25, 25, 10, 5, 5, 5]
    for n in range(1, 400):
        size = plan.chunk_size(n, 2**15)
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
