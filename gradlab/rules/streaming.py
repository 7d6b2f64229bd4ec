"""The streaming form of every composed rule: traces forwards in time, memory that does not grow with the sequence.

Data flow of one step, layers from last to first:

    jacobians at this step; link inputs -> (trace) -> e_t -> (memory) -> R_t;   gradient += R_t met by the learning
    signal

It is what runs when the weights change inside the sequence. Tests hold its sum equal to `adjoint.gradient`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab.losses import Loss
from gradlab.network import Link, Network, Params
from gradlab.neurons import Subthreshold
from gradlab.rules import adjoint, filters
from gradlab.rules.base import Shapes
from gradlab.rules.signals import SpatialBackprop, Sweep
from gradlab.rules.synapses import InputShaped, Layout, OuterProduct, Unrolled, push
from gradlab.rules.traces import JacobianTrace, NoTrace, add
from gradlab.tape import Jacobians, Slices, jacobians

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule

LIMIT_BYTES = 2**31
"""Traces of one layer above this size are refused in words."""


class LayerTrace(NamedTuple):
    """One layer's traces: per link (trace, memory, e of the last step), the same per trained constant, and the slope's
    mean.
    """

    links: dict[str, Any]
    neuron: dict[str, Any]
    mean: Any


def start(rule: LocalRule, net: Network, params: Params, loss: Loss, feedback: Any, slices: Slices) -> Any:
    """Traces at rest: zeros in the shapes that one step produces."""
    blank = {"layers": tuple(None for _ in net.neurons), "prediction": None}

    def grow(carry: Any) -> Any:
        grown = jax.eval_shape(lambda: step(rule, net, params, loss, carry, feedback, slices)[0])
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), grown)

    # A factor per unit widens a leaf that began input-shaped, and a widened state widens those that it drives, one step
    # later: step until the shapes settle.
    def shapes(tree: Any) -> Any:
        return jax.tree.map(jnp.shape, tree)

    trace = grow(blank)
    while shapes(after := grow(trace)) != shapes(trace):
        trace = after
    return trace


def step(
    rule: LocalRule, net: Network, params: Params, loss: Loss, trace: Any, feedback: Any, slices: Slices
) -> tuple[Any, Params]:
    """Fold one step: the new traces, and the gradient this step contributes."""
    held = trace["prediction"]
    if held is None:
        kernel = rule.prediction.filter(net, params, slices.error.dtype)
        held = () if kernel is None else filters.zeros(kernel, slices.layers[-1].output)
    held, error = rule.prediction.step(net, params, held, slices, loss)
    slices = slices._replace(error=error)
    grads = jax.tree.map(jnp.zeros_like, params)
    after = list(trace["layers"])
    sweep = Sweep(slices, {}, adjoint.readout_error(net, params, slices), lead=1)
    for layer in reversed(range(len(net.neurons))):
        local = rule.at(net, layer)
        signal = adjoint.total(adjoint.layer_terms(rule, net, params, layer, feedback, sweep))
        jac = jacobians(net, params, layer, slices.layers[layer], local.trace.cut)
        after[layer], mean = _layer(local, net, params, layer, slices, jac, signal, after[layer], grads)
        if isinstance(rule.signal, SpatialBackprop):
            sweep.handed_down[layer] = (jac.D if mean is None or local.signal.slope == "instant" else mean) * signal
    return {"layers": tuple(after), "prediction": held}, grads


def _layer(
    local: LocalRule,
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    jac: Jacobians,
    signal: Array,
    old: LayerTrace | None,
    grads: Any,
) -> tuple[LayerTrace, Array | None]:
    own = _per_unit(local.own_filter(net, params, layer), jac.D)
    kernel = _per_unit(local.memory_filter(net, params, layer), jac.D)
    inside = local.trace.inside(kernel is not None)
    mean_state, mean = (old.mean if old else None), None
    if local.needs_mean(net, layer):
        assert kernel is not None  # LocalRule refuses a leaky mean without a memory
        if mean_state is None:
            mean_state = (filters.zeros(kernel, jac.D), filters.zeros(kernel, jnp.ones((), jac.D.dtype)))
        mean_state, mean = adjoint.mean_step(kernel, mean_state, jac.D)
    met = signal if inside else local.trace.outside(own, jac, mean) * signal
    links, neuron = {}, {}
    for link in net.links_into(layer):
        if link.name in params[f"layer_{layer}"]:
            layout = layout_of(local, net, params, link, slices.link_input(link))
            before = old.links[link.name] if old else None
            links[link.name], R = _advance(local, net, params, layer, slices, jac, layout, before, own, kernel, inside)
            grads[f"layer_{layer}"][link.name] = layout.contract(params, met, R)
    for name, leaf in params[f"layer_{layer}"].get("neuron", {}).items():
        neuron[name], R = _advance_constant(
            local, net, params, layer, slices, jac, name, old.neuron[name] if old else None, kernel
        )
        summed = (signal * R).sum(tuple(range(signal.ndim - leaf.ndim)))
        grads[f"layer_{layer}"]["neuron"][name] = summed
    return LayerTrace(links, neuron, mean_state), mean


def _per_unit(kernel: Subthreshold | None, like: Array) -> Subthreshold | None:
    """Constants per channel as constants per unit, because layouts tell factors apart by their number of axes."""
    if kernel is None or like.ndim == 2:
        return kernel
    return jax.tree.map(lambda entry: entry if entry.ndim == 0 else jnp.broadcast_to(entry, like.shape), kernel)


def _advance(
    local: LocalRule,
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    jac: Jacobians,
    layout: Layout,
    old: Any,
    own: Any,
    kernel: Any,
    inside: bool,
) -> tuple[Any, Any]:
    """One link's trace, then its memory: ((trace, memory, e), R)."""
    direct = layout.direct(params, slices.link_input(layout.link))
    k = local.trace.states(own, len(jac.B))
    trace, memory, e_before = old if old is not None else (None, None, None)
    recurrent = adjoint.own_link(local, net, layer)
    if recurrent is not None:
        e_before = jax.tree.map(jnp.zeros_like, direct) if e_before is None else e_before
        x = slices.link_input(recurrent)
        direct = add(direct, jax.tree.map(lambda leaf: push(net, params, recurrent, x, leaf), e_before))
    if trace is None:
        trace = tuple(jax.tree.map(jnp.zeros_like, direct) for _ in range(k))
    scale = _tree_scale(layout)
    # Traces without the neuron's Jacobian keep the input's shape, which a factor per unit would not fit.
    drive = tuple(scale(b, direct) for b in jac.B) if isinstance(local.trace, JacobianTrace) else ()
    trace, e = local.trace.forward(own, trace, jac, drive, direct, scale, inside)
    R = e
    if kernel is not None:
        memory = filters.zeros(kernel, e) if memory is None else memory
        memory, R = filters.forward(kernel, memory, e, layout.scale)
    return (trace, memory if kernel is not None else (), e if recurrent is not None else None), R


def _tree_scale(layout: Layout) -> Callable[[Array, Any], Any]:
    return lambda factor, tree: jax.tree.map(lambda leaf: layout.scale(factor, leaf), tree)


def _advance_constant(local, net, params, layer, slices, jac, name, old, kernel):
    """The trace of one trained constant of a neuron: dh/dconstant and ds/dconstant by one jvp, [batch, units]."""
    key, record = f"layer_{layer}", slices.layers[layer]
    own = params[key]["neuron"]

    def cell(leaf: Array) -> tuple[Any, Array]:
        replaced = {**params, key: {**params[key], "neuron": {**own, name: leaf}}}
        return net.neuron_step(replaced, layer, record.state, record.current, local.trace.cut)

    _, (drive, direct) = jax.jvp(cell, (own[name],), (jnp.ones_like(own[name]),))
    trace, memory = old if old is not None else (None, None)
    if isinstance(local.trace, NoTrace):
        trace, e = (), direct
    else:
        trace = tuple(jnp.zeros_like(direct) for _ in drive) if trace is None else trace
        unit = jac._replace(D=jnp.ones((), direct.dtype))
        trace, e = local.trace.forward(None, trace, unit, drive, direct, lambda factor, leaf: factor * leaf, True)
    if kernel is None:
        return (trace, ()), e
    memory = filters.zeros(kernel, e) if memory is None else memory
    memory, R = filters.forward(kernel, memory, e)
    return (trace, memory), R


AFFINE = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)
"""Connections whose current is affine in their input."""


def layout_of(local: LocalRule, net: Network, params: Params, link: Link, x: Array) -> Layout:
    """The smallest layout that holds this rule's trace of this link with input x [batch, ...]."""
    if adjoint.own_link(local, net, link.target) is not None:
        return Unrolled(net, link)
    if is_dense(link.connection) and x.ndim == 2:
        return OuterProduct(net, link)
    shared = type(link.connection) in AFFINE and _is_shared(local, net, params, link.target)
    return InputShaped(net, link) if shared else Unrolled(net, link)


def is_dense(connection: Any) -> bool:
    """True for a connection whose weight gradient is an outer product: a Dense, or a link's default."""
    return connection is None or type(connection) is nn.Dense


def _is_shared(local: LocalRule, net: Network, params: Params, layer: int) -> bool:
    """True when every factor inside the trace is one number for the layer."""
    own, kernel = local.own_filter(net, params, layer), local.memory_filter(net, params, layer)
    fixed = isinstance(local.trace, NoTrace) or (own is not None and own.shared)
    return fixed and not local.trace.inside(kernel is not None) and (kernel is None or kernel.shared)


def objection(rule: LocalRule, net: Network, shapes: Shapes, loss: Loss) -> str | None:
    """Why the streaming form cannot treat this network, or None."""
    for layer in range(len(net.neurons)):
        local, name = rule.at(net, layer), f"layer_{layer}"
        if local.memory is not None and layer != net.last:
            targets = local.signal.targets(net, layer)
            if len(set(targets)) > 1:
                return (
                    f"{name} feeds layers {targets}, and the streaming form keeps one memory per layer: use the "
                    f"adjoint form"
                )
            kernel = jax.eval_shape(lambda p, r=local, k=layer: r.memory_filter(net, p, k), shapes.params)
            if not kernel.shared:
                return (
                    f"{name} feeds a layer with one leak per unit, which only the adjoint form can apply: use the "
                    f"adjoint form"
                )
        if adjoint.own_link(local, net, layer) is not None and "neuron" in shapes.params[name]:
            return f"{name} trains constants of its neuron and has a traced link to itself: use the adjoint form"
    needed = trace_bytes(rule, net, shapes, loss)
    if needed > LIMIT_BYTES:
        return (
            f"its streaming traces would take {needed / 2**30:.1f} GiB (batch x units x parameters), "
            f"above the limit of "
            f"{LIMIT_BYTES / 2**30:.1f} GiB: use the adjoint form, or a smaller batch"
        )
    return None


def trace_bytes(rule: LocalRule, net: Network, shapes: Shapes, loss: Loss) -> int:
    """Bytes of all streaming traces, found from shapes alone."""

    def made(params: Params, slices: Slices) -> Any:
        feedback = rule.signal.init(net, params, shapes)
        return start(rule, net, params, loss, feedback, slices)

    traces = jax.eval_shape(made, shapes.params, shapes.slices)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(traces))
