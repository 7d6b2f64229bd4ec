"""The exact backward sweep over a tape: backpropagation through time, chunk by chunk, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.network import Network, NetworkState, Params
from gradlab.neurons import Neuron
from gradlab.plan import LayerRecord
from gradlab.rules.products import add_neuron, add_weights
from gradlab.rules.traces import JacobianTrace, Unit
from gradlab.tape import Slices, Tape, jacobians, replayed


def backward(
    net: Network,
    params: Params,
    tape: Tape,
    cut_before: Array | np.ndarray | None = None,
    by_step: bool = False,
) -> Params:
    """The exact backward sweep over a tape; `cut_before` and `by_step` as in `sweep`."""
    end = jax.tree.map(jnp.zeros_like, tape.end)
    return sweep(net, params, tape.slices, end, cut_before, by_step)[0]


def sweep(
    net: Network,
    params: Params,
    slices: Slices,
    cotangent: NetworkState,
    cut_before: Array | np.ndarray | None = None,
    by_step: bool = False,
) -> tuple[Params, NetworkState]:
    """Back over slices, from the error on the state after them to the error on the state before them.

    Args:
        net, params, slices: what was run.
        cotangent: the error on the state after the last step: of every state, and of every output that is read later.
        cut_before: [time], the steps whose past is stopped; None: none.
        by_step: split the gradient by the step at which the weights acted.

    Returns:
        The gradient (leaves [time, ...] with `by_step`), and the error on the state before the first step.
    """
    dtype = slices.error.dtype
    n_steps = slices.inputs.shape[0]
    keep = jnp.ones(n_steps, dtype) if cut_before is None else 1 - jnp.asarray(cut_before, dtype)

    def chunk(carry: Any, now: Any) -> tuple[Any, None]:
        grads, held = carry
        update, held = _chunk(net, params, held, *now)
        if by_step:
            return (grads, held), jax.tree.map(lambda leaf: leaf[None], update)
        return (jax.tree.map(jnp.add, grads, update), held), None

    pending = {layer: s for layer, s in enumerate(cotangent.outputs) if s is not None}
    zero = () if by_step else jax.tree.map(jnp.zeros_like, params)
    start = (zero, (tuple(cotangent.states), pending))
    size = 1 if by_step else plan.chunk_of(slices.layers)
    (grads, (states, pending)), steps = plan.scan_chunks(chunk, start, (slices, keep), size, reverse=True)
    before = NetworkState(states, tuple(pending.get(layer) for layer in range(len(net.neurons))))
    return (steps if by_step else grads), before


def _chunk(net: Network, params: Params, held: Any, slices: Slices, keep: Array) -> tuple[Params, Any]:
    """One chunk backwards; held is (p per layer, error on the last output of the chunk before, per delayed source)."""
    slices = replayed(net, params, slices)
    grads = jax.tree.map(jnp.zeros_like, params)
    p, pending = list(held[0]), dict(held[1])
    deltas: dict[int, Array] = {}
    for block in reversed(plan.blocks(net)):
        outside = {layer: _signal(net, params, layer, slices, deltas, block) for layer in block}
        step = _block_step(net, params, block)
        trained = {layer for layer in block if "neuron" in params[f"layer_{layer}"]}
        start = ({k: p[k] for k in block}, {k: pending[k] for k in block if net.delays(k)})
        rows = (_rows(net, block, slices), outside, keep)
        (end, waiting), found = jax.lax.scan(step, start, rows, reverse=True)
        pending |= waiting
        for layer in reversed(block):
            p[layer] = end[layer]
            deltas[layer], *cotangents = found[layer]
            add_weights(grads, net, params, layer, slices, deltas[layer])
            if layer in trained:
                add_neuron(grads, net, params, layer, slices, "nothing", *cotangents)
    return grads, (tuple(p), pending)


def _signal(
    net: Network, params: Params, layer: int, slices: Slices, deltas: dict[int, Array], block: tuple[int, ...]
) -> Array:
    """The error on a layer's output from the loss and from later blocks, time-batched."""
    output = slices.layers[layer].output
    signal = slices.error if layer == net.last else jnp.zeros_like(output)
    for link in net.links_from(layer):
        if not link.delay and link.target not in block:
            signal = signal + net.input_cotangent(params, link, output, deltas[link.target], lead=2)
    return signal


def _rows(net: Network, block: tuple[int, ...], slices: Slices) -> Any:
    """What the block's backward step reads at each time: the layers' records, and the inputs of the links inside."""
    inside = [link for layer in block for link in net.links_into(layer) if link.source in block]
    inputs = {(link.source, link.target): slices.link_input(link) for link in inside}
    return {layer: slices.layers[layer] for layer in block}, inputs


def _block_step(net: Network, params: Params, block: tuple[int, ...]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One step backwards through the layers of a block."""

    def step(held: Any, row: Any) -> tuple[Any, Any]:
        p, pending = held
        (records, inputs), outside, keep = row
        before: dict[int, Any] = {}
        found: dict[int, Any] = {}
        waiting = {k: jnp.zeros_like(v) for k, v in pending.items()}
        for layer in reversed(block):
            signal = outside[layer] + pending[layer] if layer in pending else outside[layer]
            for link in net.links_from(layer):
                if not link.delay and link.target in block:
                    x = inputs[(link.source, link.target)]
                    signal = signal + net.input_cotangent(params, link, x, found[link.target][0], lead=1)
            before[layer], delta = _neuron_back(net, params, layer, records[layer], p[layer], signal)
            # The cotangents are kept only where a neuron's own constants are trained.
            found[layer] = (delta, p[layer], signal) if "neuron" in params[f"layer_{layer}"] else (delta,)
            for link in net.links_into(layer):
                if link.delay:
                    x = inputs[(link.source, link.target)]
                    waiting[link.source] = waiting[link.source] + net.input_cotangent(params, link, x, delta, lead=1)
        stop = (jax.tree.map(lambda leaf: leaf * keep, before), jax.tree.map(lambda leaf: leaf * keep, waiting))
        return stop, found

    return step


def _neuron_back(
    net: Network, params: Params, layer: int, record: LayerRecord, p: Any, signal: Array
) -> tuple[Any, Array]:
    """(1): the cotangents of h_{t-1} and of the current, from those of h_t and s_t.

    The neuron is linearised here, step by step, because its Jacobians would not stay in the processor's cache.
    """
    if not isinstance(net.neurons[layer], Neuron):
        _, pull = jax.vjp(lambda h, i: net.neuron_step(params, layer, h, i), record.state, record.current)
        return pull((p, signal))
    before, delta, _ = JacobianTrace().transpose(Unit(jacobians(net, params, layer, record)), p, signal)
    return before, delta
