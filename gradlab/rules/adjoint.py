"""The adjoint form of every composed rule: its deferred gradient, computed backwards in time, exactly.

Data flow of one chunk of steps, layers from last to first:

    terms of the signal -> (memory, backwards) -> mu_t -> (trace, backwards) -> delta_t -> connection's VJP -> gradient
                       \\-> slope_t L_t = q_t -> connection's VJP with respect to its input -> signal of the layer below

One matrix product per layer, chunk and direction; memory per neuron, never per synapse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab import plan
from gradlab.network import Network, Params
from gradlab.rules import filters
from gradlab.rules.signals import SpatialBackprop, Sweep, Term
from gradlab.tape import Slices, Tape, jacobians

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule


class LayerCarry(NamedTuple):
    """What a layer's backward filters hand to the chunk before: per term the memory's state, the trace's, and
    delta_{t+1}.
    """

    memory: tuple[Any, ...]
    trace: Any
    delta: Array | None


def gradient(rule: LocalRule, net: Network, params: Params, tape: Tape, feedback: Any) -> Params:
    """The deferred gradient of a composed rule over the whole tape."""
    slices = tape.slices._replace(error=rule.prediction.errors(net, params, tape))
    means = leaky_means(rule, net, params, slices)

    def chunk(carry: Any, now: Any) -> tuple[Any, None]:
        grads, layers = carry
        update, layers = _chunk(rule, net, params, feedback, layers, *now)
        return (jax.tree.map(jnp.add, grads, update), layers), None

    start = tuple(_start(rule, net, params, layer, slices) for layer in range(len(net.neurons)))
    zero = jax.tree.map(jnp.zeros_like, params)
    size = plan.chunk_size(tape.n_steps)
    (grads, _), _ = plan.scan_chunks(chunk, (zero, start), (slices, means), size, reverse=True)
    return grads


def _chunk(
    rule: LocalRule,
    net: Network,
    params: Params,
    feedback: Any,
    carries: tuple[LayerCarry, ...],
    slices: Slices,
    means: dict[int, Array],
) -> tuple[Params, tuple[LayerCarry, ...]]:
    grads: Any = jax.tree.map(jnp.zeros_like, params)
    after = list(carries)
    sweep = Sweep(slices, {}, readout_error(net, params, slices), lead=2)
    for layer in reversed(range(len(net.neurons))):
        local = rule.at(net, layer)
        terms = layer_terms(rule, net, params, layer, feedback, sweep)
        if not terms:
            continue
        hands_down = isinstance(rule.signal, SpatialBackprop) and any(k.source >= 0 for k in net.links_into(layer))
        found = _layer(local, net, params, layer, slices, carries[layer], terms, means.get(layer), hands_down)
        after[layer] = found.carry
        add_weights(grads, net, params, layer, slices, found.delta)
        if found.cotangents is not None:
            add_neuron(grads, net, params, layer, slices, local.trace.cut, *found.cotangents)
        if found.handed_down is not None:
            sweep.handed_down[layer] = found.handed_down
    return grads, tuple(after)


def layer_terms(rule: LocalRule, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
    """The layer's learning signal: the loss's error at the output layer, the rule's signal elsewhere."""
    if layer == net.last:
        return [Term(layer, sweep.slices.error, lambda error: error)]
    return rule.signal.terms(net, params, layer, feedback, sweep)


def readout_error(net: Network, params: Params, slices: Slices) -> Array:
    """D_t error_t: the error on the current of the output layer."""
    return jacobians(net, params, net.last, slices.layers[-1]).D * slices.error


def total(terms: list[Term]) -> Array:
    signal = terms[0].pull(terms[0].error)
    for term in terms[1:]:
        signal = signal + term.pull(term.error)
    return signal


def leaky_means(rule: LocalRule, net: Network, params: Params, slices: Slices) -> dict[int, Array]:
    """The running mean of the slope D_t under the memory's filter, forwards over the whole time, for the layers that
    ask for it.
    """
    means = {}
    for layer in range(len(net.neurons)):
        local = rule.at(net, layer)
        if local.needs_mean(net, layer):
            kernel = local.memory_filter(net, params, layer)
            assert kernel is not None  # LocalRule refuses a leaky mean without a memory
            first = slices.layers[layer].output[0]
            start = (filters.zeros(kernel, first), filters.zeros(kernel, jnp.ones((), first.dtype)))

            def advance(h: Any, record: Any, kernel: Any = kernel, layer: int = layer) -> tuple[Any, Array]:
                return mean_step(kernel, h, jacobians(net, params, layer, record).D)

            _, means[layer] = jax.lax.scan(advance, start, slices.layers[layer])
    return means


def mean_step(kernel: Any, h: Any, slope: Array) -> tuple[Any, Array]:
    """(1) g_t = filter(D)_t / filter(1)_t; for one leak kappa, r_t = kappa r_{t-1} + 1, g_t = (kappa r_{t-1} g_{t-1} +
    D_t) / r_t.
    """
    top, weighted = filters.forward(kernel, h[0], slope)
    bottom, weight = filters.forward(kernel, h[1], jnp.ones((), slope.dtype))
    return (top, bottom), weighted / weight


def term_targets(rule: LocalRule, net: Network, layer: int) -> list[int]:
    """The targets of the terms that `layer_terms` will give, in order."""
    return [layer] if layer == net.last else rule.signal.targets(net, layer)


def _start(rule: LocalRule, net: Network, params: Params, layer: int, slices: Slices) -> LayerCarry:
    local = rule.at(net, layer)
    record = slices.layers[layer]
    like = jnp.zeros_like(record.output[0])
    memories = []
    for target in term_targets(rule, net, layer):
        kernel = local.memory_filter(net, params, layer, target)
        shape_of = like if kernel is None or kernel.shared else jnp.zeros_like(slices.layers[target].output[0])
        memories.append(() if kernel is None else filters.zeros(kernel, shape_of))
    own = local.own_filter(net, params, layer)
    trace = tuple(like for _ in range(local.trace.states(own, len(record.state))))
    return LayerCarry(tuple(memories), trace, like if own_link(local, net, layer) is not None else None)


def own_link(local: LocalRule, net: Network, layer: int) -> Any:
    """The layer's link to itself, when the trace follows it."""
    if local.trace.own == "none":
        return None
    return next((k for k in net.links_into(layer) if k.source == layer), None)


class Found(NamedTuple):
    """A layer's share of a chunk: carry; delta_t; q_t where it is handed down; cotangents where constants train."""

    carry: LayerCarry
    delta: Array
    handed_down: Array | None
    cotangents: Any


def _layer(
    local: LocalRule,
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    carry: LayerCarry,
    terms: list[Term],
    mean: Array | None,
    hands_down: bool,
) -> Found:
    """Memory and trace of one layer, backwards through a chunk.

    The neuron is linearised inside the loop over time, because its Jacobians would not stay in the processor's cache.
    """
    kernels, signals, whole, memory = _signals(local, net, params, layer, terms, carry.memory)
    own, link = local.own_filter(net, params, layer), own_link(local, net, layer)
    trained = "neuron" in params[f"layer_{layer}"]
    x = None if link is None else slices.layers[layer].output  # what the link reads at the step after

    def back(held: Any, now: Any) -> tuple[Any, Any]:
        states, p, delta_after = held
        record, signals_now, whole_now, mean_now, x_now = now
        jac = jacobians(net, params, layer, record, local.trace.cut)
        if local.trace.slope == "leaky_mean":
            signals_now = [signal * mean_now for signal in signals_now]
        states, mu = _remember(kernels, states, signals_now)
        if link is not None:
            mu = mu + net.input_cotangent(params, link, x_now, delta_after, lead=1)
        p, delta, cotangent = local.trace.transpose(own, p, jac, mu)
        slope = jac.D if mean_now is None or local.signal.slope == "instant" else mean_now
        down = slope * whole_now if hands_down else None
        return (states, p, None if link is None else delta), (delta, down, (cotangent, mu) if trained else None)

    rows = (slices.layers[layer], signals, whole, mean, x)
    start = (memory, carry.trace, carry.delta)
    if not jax.tree.leaves(start):
        (states, p, after), (delta, down, cotangents) = back(start, rows)  # nothing is carried: all steps at once
    else:
        (states, p, after), (delta, down, cotangents) = jax.lax.scan(back, start, rows, reverse=True)
    return Found(LayerCarry(states, p, after), delta, down, cotangents)


def _signals(
    local: LocalRule, net: Network, params: Params, layer: int, terms: list[Term], memory: tuple[Any, ...]
) -> tuple[list[Any], list[Array], Array, tuple[Any, ...]]:
    """Per term its kernel and signal for the loop over time; the whole signal without memory; the memories' states."""
    kernels, signals, held = [], [], []
    whole = total(terms)
    for term, state in zip(terms, memory, strict=True):
        kernel = local.memory_filter(net, params, layer, term.target)
        signal = whole if len(terms) == 1 else term.pull(term.error)
        if kernel is not None and not kernel.shared:
            # One leak per target unit: the filter must act before the connection's transpose mixes the units.
            state, error = _filter_back(kernel, state, term.error)
            kernel, signal = None, term.pull(error)
        kernels.append(kernel)
        signals.append(signal)
        held.append(state)
    return kernels, signals, whole, tuple(held)


def _remember(kernels: list[Any], states: tuple[Any, ...], signals: list[Array]) -> tuple[tuple[Any, ...], Array]:
    """mu_t: every term through its memory, one step backwards, and their sum."""
    after, passed = [], []
    for kernel, state, signal in zip(kernels, states, signals, strict=True):
        if kernel is not None:
            state, signal = filters.transpose(kernel, state, signal)
        after.append(state)
        passed.append(signal)
    return tuple(after), sum(passed[1:], passed[0])


def _filter_back(kernel: Any, state: Any, signal: Array) -> tuple[Any, Array]:
    return jax.lax.scan(lambda p, s: filters.transpose(kernel, p, s), state, signal, reverse=True)


def add_weights(grads: Any, net: Network, params: Params, layer: int, slices: Slices, delta: Array) -> None:
    """Add each link's weight gradient of this layer, one time-batched product per link, into the dict `grads`."""
    own = grads[f"layer_{layer}"]
    for link in net.links_into(layer):
        update = net.weight_cotangent(params, link, slices.link_input(link), delta, lead=2)
        if update is not None:
            own[link.name] = update


def add_neuron(
    grads: Any, net: Network, params: Params, layer: int, slices: Slices, cut: str, cotangent: Any, signal: Array
) -> None:
    """Add the gradient of a layer's trained constants: the neuron's own VJP with cotangents (of h_t, of s_t)."""
    key = f"layer_{layer}"
    if "neuron" not in params[key]:
        return
    record = slices.layers[layer]

    def step(own: Any) -> tuple[Any, Array]:
        replaced = {**params, key: {**params[key], "neuron": own}}
        return net.neuron_step(replaced, layer, record.state, record.current, cut)

    grads[key]["neuron"] = jax.vjp(step, params[key]["neuron"])[1]((cotangent, signal))[0]
