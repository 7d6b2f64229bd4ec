"""The execution plan: chunks of time steps, time-batched between cycles, step by step inside.

A chunk of 10 to 25 steps goes through the network layer by layer: one matrix product over chunk x batch for a layer's
current, then the elementwise neuron steps, the state carried to the next chunk, so that a chunk's currents stay in the
processor's cache. Layers that form a cycle (a recurrent or feedback link) run step by step inside the chunk. The
backward sweep of every adjoint rule has the same shape in reverse. The user never chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.network import INPUT, Network, NetworkState, Params


class LayerRecord(NamedTuple):
    """What one layer did, time-major: state h_{t-1} before the step, current I_t, output s_t.

    `point` is the neuron's operating point in fewer arrays (`Neuron.point`), () where it has none. Whatever of the four
    nothing reads is not kept: the compiler removes it, and with it most of the tape's memory.
    """

    state: Any
    current: Array
    output: Array
    point: tuple[Array, ...] = ()


def blocks(net: Network) -> tuple[tuple[int, ...], ...]:
    """The layers in order, grouped so that every cycle lies inside one group.

    A delayed link from layer j back to layer i closes a cycle through all of i..j, because the chain leads from i to j;
    so the strongly connected components are intervals.
    """
    groups: list[list[int]] = []
    reach = -1
    for layer in range(len(net.neurons)):
        if layer <= reach:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        reach = max([reach, *(k.source for k in net.links if k.delay and k.target <= layer)])
    return tuple(tuple(group) for group in groups)


def is_cyclic(net: Network, block: tuple[int, ...]) -> bool:
    return any(link.delay for layer in block for link in net.links_into(layer))


def chunk_size(n_steps: int, step_bytes: int) -> int:
    """Steps per chunk, of a sequence whose widest layer has `step_bytes` per time step and batch.

    At most what fits the processor's cache, from 5 to 25 steps on a CPU (on a GPU as many as fit 64 MiB: there it is
    the number of kernels that costs). All steps when they are at most twice as many; else the largest divisor, down to
    two fifths, that gives three chunks or more; without such a divisor four fifths, with a shorter last chunk.
    Never two chunks: XLA's CPU compiler treats a loop of two rounds in a way that made it 2.5 times slower (measured).
    """
    if jax.default_backend() == "cpu":
        most = min(25, max(5, 2**20 // step_bytes))
    else:
        most = max(5, 2**26 // step_bytes)
    if n_steps <= 2 * most:
        return max(n_steps, 1)
    sizes = (size for size in range(most, 2 * most // 5 - 1, -1) if n_steps % size == 0 and n_steps // size >= 3)
    return next(sizes, min(4 * most // 5, n_steps // 3))


def chunk_for(net: Network, params: Params, inputs: Array) -> int:
    """`chunk_size` of a network's forward pass on inputs [time, batch, features...]."""
    widest = max(math.prod(shape) for shape in net.unit_shapes(params, inputs))
    return chunk_size(inputs.shape[0], widest * inputs.shape[1] * inputs.dtype.itemsize)


def chunk_of(layers: Sequence[LayerRecord]) -> int:
    """`chunk_size` for a sequence that was recorded."""
    outputs = [layer.output for layer in layers]
    return chunk_size(len(outputs[0]), max(math.prod(s.shape[1:]) * s.dtype.itemsize for s in outputs))


def scan_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, size: int, reverse: bool = False
) -> tuple[Any, Any]:
    """`lax.scan` over chunks of `size` steps: function(carry, chunk of xs) -> (carry, ys of the chunk)."""
    carry, ys, _ = scan_chunks_marked(function, carry, xs, size, reverse)
    return carry, ys


def scan_chunks_marked(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, size: int, reverse: bool = False
) -> tuple[Any, Any, Any]:
    """`scan_chunks`, and the carry with which each chunk began, [chunks, ...] in the order of time."""
    n_steps = jax.tree.leaves(xs)[0].shape[0]
    if n_steps == size:
        return *function(carry, xs), jax.tree.map(lambda leaf: leaf[None], carry)
    whole = n_steps // size * size
    tail = jax.tree.map(lambda x: x[whole:], xs)
    has_tail = whole < n_steps
    head = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), xs)

    def marked(carry: Any, chunk: Any) -> tuple[Any, Any]:
        after, ys = function(carry, chunk)
        return after, (ys, carry)

    if has_tail and reverse:
        carry, (tail_ys, tail_start) = marked(carry, tail)
    carry, (ys, starts) = jax.lax.scan(marked, carry, head, reverse=reverse)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if has_tail and not reverse:
        carry, (tail_ys, tail_start) = marked(carry, tail)
    if has_tail:
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, tail_ys)
        starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), starts, tail_start)
    return carry, ys, starts


def run(
    net: Network, params: Params, inputs: Array, state: NetworkState | None = None
) -> tuple[NetworkState, tuple[LayerRecord, ...]]:
    """Run the network on inputs [time, batch, features...]; the last state and every layer's record over all steps."""
    return run_marked(net, params, inputs, state)[:2]


def run_marked(
    net: Network, params: Params, inputs: Array, state: NetworkState | None = None
) -> tuple[NetworkState, tuple[LayerRecord, ...], NetworkState]:
    """`run`, and the state before each chunk, [chunks, ...]."""
    state = net.initial_state(params, inputs) if state is None else state

    def chunk(carry: NetworkState, x: Array) -> tuple[NetworkState, tuple[LayerRecord, ...]]:
        return _run_chunk(net, params, carry, x)

    return scan_chunks_marked(chunk, state, inputs, chunk_for(net, params, inputs))


def outputs(net: Network, params: Params, inputs: Array) -> Array:
    """The output layer's sequence [time, batch, units...]."""
    return run(net, params, inputs)[1][-1].output


def _run_chunk(
    net: Network, params: Params, state: NetworkState, x: Array
) -> tuple[NetworkState, tuple[LayerRecord, ...]]:
    produced: dict[int, Array] = {INPUT: x}
    states, last = list(state.states), list(state.outputs)
    records: list[LayerRecord] = []
    for block in blocks(net):
        run_block = _run_cycle if is_cyclic(net, block) else _run_layer
        for layer, end, record in run_block(net, params, block, states, last, produced):
            states[layer], produced[layer] = end, record.output
            last[layer] = record.output[-1] if net.delays(layer) else None
            records.append(record)
    return NetworkState(tuple(states), tuple(last)), tuple(records)


def _run_layer(net, params, block, states, last, produced):
    """A layer without delayed links: one time-batched product, then the neuron's steps."""
    (layer,) = block
    current = sum_currents(net, params, net.links_into(layer), produced, lead=2)

    def step(h, i):
        following, s = net.neuron_step(params, layer, h, i)
        return following, (h, s, net.point(params, layer, h, i))

    end, (before, s, point) = jax.lax.scan(step, states[layer], current)
    return [(layer, end, LayerRecord(before, current, s, point))]


def _run_cycle(net, params, block, states, last, produced):
    """Layers in a cycle: what comes from outside is time-batched, the rest runs step by step."""
    inside = {layer: [k for k in net.links_into(layer) if k.source in block] for layer in block}
    outside = {layer: [k for k in net.links_into(layer) if k.source not in block] for layer in block}
    external = {k: sum_currents(net, params, links, produced, lead=2) for k, links in outside.items() if links}

    def step(carry, external_now):
        before, previous = carry
        now, after, records = dict(previous), {}, {}
        for layer in block:
            terms = [external_now[layer]] if layer in external_now else []
            for link in inside[layer]:
                source = previous[link.source] if link.delay else now[link.source]
                terms.append(net.current(params, link, source, lead=1))
            current = sum(terms[1:], terms[0])
            after[layer], now[layer] = net.neuron_step(params, layer, before[layer], current)
            point = net.point(params, layer, before[layer], current)
            records[layer] = LayerRecord(before[layer], current, now[layer], point)
        # Only outputs that a delayed link reads are carried.
        return (after, {layer: now[layer] for layer in previous}), records

    start = ({k: states[k] for k in block}, {k: last[k] for k in block if net.delays(k)})
    (end, _), records = jax.lax.scan(step, start, external)
    return [(layer, end[layer], records[layer]) for layer in block]


def sum_currents(net: Network, params: Params, links: Any, produced: dict[int, Array], lead: int) -> Array:
    """The summed current of several links from outputs of the same step."""
    terms = [net.current(params, link, produced[link.source], lead) for link in links]
    return sum(terms[1:], terms[0])
