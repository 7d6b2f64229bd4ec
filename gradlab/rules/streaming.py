"""The streaming form of every composed rule: traces forwards in time, memory that does not grow with the sequence.

Data flow of one step, layers from last to first:

    jacobians at this step; link inputs -> (trace) -> e_t -> (memory) -> R_t;   gradient += R_t met by the learning
    signal

It is what runs when the weights change inside the sequence. Tests hold its sum equal to `adjoint.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab.losses import Loss
from gradlab.network import Link, Network, Params
from gradlab.neurons import Subthreshold
from gradlab.rules import adjoint, dynamics, filters
from gradlab.rules.base import Shapes
from gradlab.rules.own_links import AFFINE, is_dense, own_diagonal, own_link
from gradlab.rules.running import mean_start, mean_step
from gradlab.rules.signals import Sweep
from gradlab.rules.synapses import InputShaped, Layout, OuterProduct, Unrolled, push
from gradlab.rules.traces import Unit, add
from gradlab.tape import Jacobians, Slices, jacobians

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule

LIMIT_BYTES = 2**31
"""Traces of one rule above this size are refused in words."""


class LayerTrace(NamedTuple):
    """One layer's traces: per link (trace, memory, e of the last step, what fades the input), per trained constant
    (trace, memory), the slope's mean, and what the trace's factors carry.
    """

    links: dict[str, Any]
    neuron: dict[str, Any]
    mean: Any
    posts: Any


class Now(NamedTuple):
    """What the traces of one layer read at one step."""

    net: Network
    params: Params
    layer: int
    slices: Slices
    unit: Unit
    kernel: Subthreshold | None


def start(
    rule: LocalRule, net: Network, params: Params, loss: Loss, feedback: Any, slices: Slices, n_steps: int, key: Array
) -> Any:
    """Traces at rest: zeros in the shapes that one step produces; and the gate's mask over the sequence."""
    mask = rule.gate.mask(n_steps, key)
    gate = None if mask is None else {"mask": mask, "step": jnp.zeros((), jnp.int32)}
    blank = {"layers": tuple(None for _ in net.neurons), "prediction": None, "gate": gate}

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
    # Some quantities do not begin at zero.
    begun = [_posts_at_rest(rule, net, params, k, slices) for k in range(len(net.neurons))]
    held = tuple(layer._replace(posts=posts) for layer, posts in zip(trace["layers"], begun, strict=True))
    return {**trace, "layers": held, "gate": gate}


def _posts_at_rest(rule: LocalRule, net: Network, params: Params, layer: int, slices: Slices) -> Any:
    trace = rule.at(net, layer).trace
    return trace.post_start(jacobians(net, params, layer, slices.layers[layer], trace.cut))


def step(
    rule: LocalRule, net: Network, params: Params, loss: Loss, trace: Any, feedback: Any, slices: Slices
) -> tuple[Any, Params]:
    """Fold one step: the new traces, and the gradient this step contributes."""
    held = trace["prediction"]
    if held is None:
        kernel = rule.prediction.filter(net, params, slices.error.dtype)
        held = () if kernel is None else filters.zeros(kernel, slices.layers[-1].output)
    held, error = rule.prediction.step(net, params, held, slices, loss)
    slices, gate = _through_gate(trace["gate"], slices._replace(error=error))
    grads = jax.tree.map(jnp.zeros_like, params)
    after = list(trace["layers"])
    sweep = Sweep(slices, {}, adjoint.readout_error(net, params, slices), loss, lead=1)
    for layer in reversed(range(len(net.neurons))):
        local = rule.at(net, layer)
        terms = adjoint.layer_terms(rule, net, params, layer, feedback, sweep)
        silent = jnp.zeros_like(slices.layers[layer].output)  # no error reaches a layer that nothing reads
        signal = adjoint.total(terms) if terms else silent
        jac = jacobians(net, params, layer, slices.layers[layer], local.trace.cut)
        after[layer], mean = _layer(local, net, params, layer, slices, jac, signal, after[layer], grads)
        if rule.signal.backpropagates:
            sweep.handed_down[layer] = (jac.D if mean is None or local.signal.slope == "instant" else mean) * signal
    return {"layers": tuple(after), "prediction": held, "gate": gate}, grads


def _through_gate(gate: Any, slices: Slices) -> tuple[Slices, Any]:
    if gate is None:
        return slices, None
    teaches = gate["mask"][gate["step"]]
    error, weight = (adjoint.gated(values, teaches) for values in (slices.error, slices.weight))
    return slices._replace(error=error, weight=weight), {"mask": gate["mask"], "step": gate["step"] + 1}


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
    kernel = _per_unit(local.memory_filter(net, params, layer) if local.term_targets(net, layer) else None, jac.D)
    inside = local.trace.inside(kernel is not None)
    mean_state, mean = (old.mean if old else None), None
    if local.needs_mean(net, layer):
        assert kernel is not None  # LocalRule refuses a leaky mean without a memory
        mean_state, mean = mean_step(kernel, mean_state or mean_start(kernel, jac.D), jac.D)
    held, posts = local.trace.post_step(old.posts if old else local.trace.post_start(jac), jac)
    unit = Unit(jac, own, mean, posts)
    factors = (jnp.ones((), signal.dtype),) if inside else local.trace.outside(unit)
    now = Now(net, params, layer, slices, unit, kernel)
    links, neuron = {}, {}
    for link in net.links_into(layer):
        if link.name in params[f"layer_{layer}"]:
            layout = layout_of(local, net, params, link, slices.link_input(link))
            links[link.name], terms = _advance(local, now, layout, old.links[link.name] if old else None, inside)
            met = [layout.contract(params, f * signal, R) for f, R in zip(factors, terms, strict=True)]
            grads[f"layer_{layer}"][link.name] = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *met)
    for name, leaf in params[f"layer_{layer}"].get("neuron", {}).items():
        neuron[name], R = _advance_constant(local, now, name, old.neuron[name] if old else None)
        summed = (signal * R).sum(tuple(range(signal.ndim - leaf.ndim)))
        grads[f"layer_{layer}"]["neuron"][name] = summed
    return LayerTrace(links, neuron, mean_state, held), mean


def _per_unit(kernel: Subthreshold | None, like: Array) -> Subthreshold | None:
    """Constants per channel as constants per unit, because layouts tell factors apart by their number of axes."""
    if kernel is None or like.ndim == 2:
        return kernel
    return jax.tree.map(lambda entry: entry if entry.ndim == 0 else jnp.broadcast_to(entry, like.shape), kernel)


def _advance(local: LocalRule, now: Now, layout: Layout, old: Any, inside: bool) -> tuple[Any, tuple[Any, ...]]:
    """One link's trace, then its memory: ((trace, memory, e, faded), terms of R)."""
    net, params, slices = now.net, now.params, now.slices
    direct = layout.direct(params, slices.link_input(layout.link))
    trace, memory, e_before, faded = old if old is not None else (None, None, None, None)
    unit = now.unit
    if local.trace.fades_input:
        faded = dynamics.at_rest(layout.link, slices) if faded is None else faded
        faded, kept = dynamics.fade(net, params, layout.link, faded, slices)
        unit = unit._replace(fade=lambda held: layout.fade(held, kept))
    recurrent, scale = own_link(net, now.layer, local.trace.own), _tree_scale(layout)
    if recurrent is not None:
        e_before = jax.tree.map(jnp.zeros_like, direct) if e_before is None else e_before
        x = slices.link_input(recurrent)
        if local.trace.own == "full":
            returned = jax.tree.map(lambda leaf: push(net, params, recurrent, x, leaf), e_before)
        else:
            returned = scale(own_diagonal(net, params, recurrent, x), e_before)
        direct = add(direct, returned)
    if trace is None:
        trace = local.trace.zeros(unit.own, len(unit.jac.B), direct)
    trace, terms = local.trace.forward(unit, trace, direct, scale, inside)
    e = terms[0] if recurrent is not None else None
    if now.kernel is None:
        return (trace, (), e, faded), _without_bias(local, unit, layout, terms, direct)
    memory = tuple(filters.zeros(now.kernel, term) for term in terms) if memory is None else memory
    moved = [filters.forward(now.kernel, m, term, layout.scale) for m, term in zip(memory, terms, strict=True)]
    R = _without_bias(local, unit, layout, tuple(R for _, R in moved), direct)
    return (trace, tuple(m for m, _ in moved), e, faded), R


def _without_bias(local: LocalRule, unit: Unit, layout: Layout, terms: tuple[Any, ...], direct: Any) -> tuple[Any, ...]:
    """The terms with an untraced bias: its derivative of this step only, in the units of the sub-threshold filter."""
    if local.trace.bias == "traced":
        return terms
    assert unit.own is not None
    now = jax.tree.map(lambda leaf: layout.scale(unit.own.gain, leaf), direct)  # type: ignore[union-attr]
    return tuple(layout.replace_biases(term, now) for term in terms)


def _tree_scale(layout: Layout) -> Callable[[Array, Any], Any]:
    return lambda factor, tree: jax.tree.map(lambda leaf: layout.scale(factor, leaf), tree)


def _advance_constant(local: LocalRule, now: Now, name: str, old: Any) -> tuple[Any, Array]:
    """The trace of one trained constant of a neuron: dh/dconstant and ds/dconstant by one jvp, [batch, units]."""
    key, record = f"layer_{now.layer}", now.slices.layers[now.layer]
    own = now.params[key]["neuron"]

    def cell(leaf: Array) -> tuple[Any, Array]:
        replaced = {**now.params, key: {**now.params[key], "neuron": {**own, name: leaf}}}
        return now.net.neuron_step(replaced, now.layer, record.state, record.current, local.trace.constants_cut)

    _, (drive, direct) = jax.jvp(cell, (own[name],), (jnp.ones_like(own[name]),))
    trace, memory = old if old is not None else (local.trace.zeros(now.unit.own, len(now.unit.jac.B), direct), None)
    trace, e = local.trace.forward_constant(now.unit, trace, drive, direct)
    if now.kernel is None:
        return (trace, ()), e
    memory = filters.zeros(now.kernel, e) if memory is None else memory
    memory, R = filters.forward(now.kernel, memory, e)
    return (trace, memory), R


def layout_of(local: LocalRule, net: Network, params: Params, link: Link, x: Array) -> Layout:
    """The smallest layout that holds this rule's trace of this link with input x [batch, ...]."""
    if local.trace.own == "full" and own_link(net, link.target, "full") is not None:
        return Unrolled(net, link)
    if is_dense(link) and x.ndim == 2:
        return OuterProduct(net, link)
    shared = type(link.connection) in AFFINE and _is_shared(local, net, params, link.target)
    return InputShaped(net, link) if shared else Unrolled(net, link)


def _is_shared(local: LocalRule, net: Network, params: Params, layer: int) -> bool:
    """True when every factor inside the trace is one number for the layer."""
    own, kernel = local.own_filter(net, params, layer), local.memory_filter(net, params, layer)
    outside = not local.trace.inside(kernel is not None)
    return outside and local.trace.input_shaped(own) and (kernel is None or kernel.shared)


def objection(rule: LocalRule, net: Network, shapes: Shapes, loss: Loss) -> str | None:
    """Why the streaming form cannot treat this network, or None."""
    if rule.signal.through is not None:
        return "its errors go through the time of later layers, which is known only afterwards: use the adjoint form"
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
        if own_link(net, layer, local.trace.own) is not None and "neuron" in shapes.params[name]:
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
        return start(rule, net, params, loss, feedback, slices, shapes.n_steps, jax.random.key(0))

    traces = jax.eval_shape(made, shapes.params, shapes.slices)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(traces))
