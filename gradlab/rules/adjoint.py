"""The adjoint form of every composed rule: its deferred gradient, computed backwards in time, exactly.

Data flow of one chunk of steps, layers from last to first:

    terms of the signal -> (memory, backwards) -> mu_t -> (trace, backwards) -> delta_t -> connection's VJP -> gradient
                       \\-> slope_t L_t = q_t -> connection's VJP with respect to its input -> signal of the layer below

One matrix product per layer, chunk and direction; memory per neuron, never per synapse.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab import plan
from gradlab.network import Network, Params
from gradlab.rules import filters
from gradlab.rules.signals import SpatialBackprop, Sweep, Term
from gradlab.tape import Jacobians, Slices, Tape, jacobians

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
        jac = jacobians(net, params, layer, slices.layers[layer], local.trace.cut)
        signal, mean = total(terms), means.get(layer)
        after[layer], delta, cotangent, mu = _layer(local, net, params, layer, slices, carries[layer], terms, jac, mean)
        add_weights(grads, net, params, layer, slices, delta)
        add_neuron(grads, net, params, layer, slices, local.trace.cut, cotangent, mu)
        if isinstance(local.signal, SpatialBackprop):
            sweep.handed_down[layer] = (jac.D if mean is None or local.signal.slope == "instant" else mean) * signal
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
            slope = jacobians(net, params, layer, slices.layers[layer]).D
            start = (filters.zeros(kernel, slope[0]), filters.zeros(kernel, jnp.ones((), slope.dtype)))
            _, means[layer] = jax.lax.scan(partial(mean_step, kernel), start, slope)
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


def _layer(
    local: LocalRule,
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    carry: LayerCarry,
    terms: list[Term],
    jac: Jacobians,
    mean: Array | None,
) -> tuple[LayerCarry, Array, Any, Array]:
    """Memory and trace of one layer, backwards through a chunk: the new carry, delta, the cotangents of h_t, and mu."""
    own = local.own_filter(net, params, layer)
    factor = mean if local.trace.slope == "leaky_mean" else None
    kernels, signals, memories = [], [], list(carry.memory)
    for index, term in enumerate(terms):
        kernel = local.memory_filter(net, params, layer, term.target)
        error = term.error
        if kernel is not None and not kernel.shared:
            # One leak per target unit: the filter must act before the connection's transpose mixes the units.
            memories[index], error = _filter_back(kernel, memories[index], error)
            kernel = None
        signal = term.pull(error)
        kernels.append(kernel)
        signals.append(signal if factor is None else signal * factor)
    link = own_link(local, net, layer)
    x = None if link is None else slices.link_input(link)

    def back(held, now):
        states, p, delta_after = held
        jac_now, signals_now, x_now = now
        states = list(states)
        mu = jnp.zeros_like(delta_shape)
        for index, (kernel, signal) in enumerate(zip(kernels, signals_now, strict=True)):
            if kernel is not None:
                states[index], signal = filters.transpose(kernel, states[index], signal)
            mu = mu + signal
        if link is not None:
            mu = mu + net.input_cotangent(params, link, x_now, delta_after, lead=1)
        p, delta, cotangent = local.trace.transpose(own, p, jac_now, mu)
        return (states, p, None if link is None else delta), (delta, cotangent, mu)

    delta_shape = signals[0][0]
    if not carry.trace and link is None and all(kernel is None for kernel in kernels):
        mu = sum(signals[1:], signals[0])
        _, delta, cotangent = local.trace.transpose(own, (), jac, mu)
        return LayerCarry(tuple(memories), (), None), delta, cotangent, mu
    held = [m if k is not None else () for m, k in zip(memories, kernels, strict=True)]
    (held, p, delta_after), (delta, cotangent, mu) = jax.lax.scan(
        back, (held, carry.trace, carry.delta), (jac, signals, x), reverse=True
    )
    memories = [h if k is not None else m for h, k, m in zip(held, kernels, memories, strict=True)]
    return LayerCarry(tuple(memories), p, delta_after), delta, cotangent, mu


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
