"""A trace of the input that fades as the presynaptic neuron's own membrane does (NDOT)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.network import INPUT, Link, Network, Params
from gradlab.neurons import Neuron
from gradlab.rules.own_links import AFFINE, is_dense
from gradlab.rules.traces import Scale, Terms, Trace, Unit
from gradlab.tape import Slices


class Fade(NamedTuple):
    """What a trace keeps in one step: of the input, () or [batch, ...], and of an input that is constantly 1, ()."""

    input: Array
    constant: Array


@dataclasses.dataclass(frozen=True)
class DynamicsTrace(Trace):
    """The input's trace, faded by the presynaptic neuron's own dynamics.

    (1) a_t = f_t a_{t-1} + x_t,   f_t = clip(r_{t-1} / r_{t-2}, -leak, leak),   e_t = D_t a_t
    (2) delta_t = D_t L_t,   grad = sum_t delta_t a_t

    r is the membrane of the presynaptic neuron after its reset, leak its leak; where r_{t-2} = 0, f_t = leak. The
    network's input has no membrane, and a bias no neuron: they fade by the leak of the layer itself. For a link that
    reads the output of the step before, (1) is that of the step before.
    """

    needs_subthreshold = True
    fades_input = True

    def input_shaped(self, own: Any) -> bool:
        return True

    def zeros(self, own: Any, k: int, like: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, like)

    def forward(self, unit: Unit, h: Any, direct: Any, scale: Scale, inside: bool) -> tuple[Any, Terms]:
        h = jax.tree.map(jnp.add, unit.fade(h), direct)
        return h, (scale(unit.jac.D, h) if inside else h,)

    def transpose(self, unit: Unit, p: Any, signal: Array) -> tuple[Any, Array, Any]:
        return p, unit.jac.D * signal, ()

    def constants_objection(self) -> str | None:
        return "a trace of the input is not defined for trained constants of a neuron: use OSTL, or trainable=()"

    def links_objection(self, net: Network, layer: int) -> str | None:
        """Why the links into a layer have no such trace, or None."""
        for link in net.links_into(layer):
            if not is_dense(link) and type(link.connection) not in AFFINE:
                return f"layer_{layer} has a connection that is not one Dense or Conv: use OTTT"
            source = net.neurons[link.source] if link.source != INPUT else None
            if source is not None and not (isinstance(source, Neuron) and len(source.states) == 1):
                return f"layer_{layer} reads layer_{link.source}, which has more than a membrane: use OTTT"
        own = net.neurons[layer]
        if not isinstance(own, Neuron) or len(own.states) != 1:
            return f"layer_{layer} has more than a membrane, so that no single leak fades its input: use OTTT"
        return None


def at_rest(link: Link, slices: Slices) -> Any:
    """What `fade` carries before the first step: the source's last membranes; `slices` is one step."""
    if link.source == INPUT:
        return ()
    membrane = jnp.zeros_like(slices.layers[link.source].output)
    return (membrane,) * (2 if link.delay else 1)


def fade(net: Network, params: Params, link: Link, held: Any, slices: Slices) -> tuple[Any, Fade]:
    """(carried, f_t) of one step."""
    own = _leak(net, params, link.target, slices)
    if link.source == INPUT:
        return (), Fade(own, own)
    now = slices.layers[link.source].state[0]  # r_{t-1}
    newer, older = (now, held[0]) if not link.delay else (held[0], held[1])
    leak = _leak(net, params, link.source, slices)
    ratio = jnp.where(older == 0, leak, newer / jnp.where(older == 0, 1.0, older))
    return (now, *held)[: len(held)], Fade(jnp.clip(ratio, -leak, leak), own)


def _leak(net: Network, params: Params, layer: int, slices: Slices) -> Array:
    constants = net.neurons[layer].subthreshold(params[f"layer_{layer}"].get("neuron", {}), slices.inputs.dtype)
    return constants.A[0][0]


def traced_input(net: Network, params: Params, link: Link, slices: Slices) -> tuple[Array, Array]:
    """(a_t, a_t of a constant 1) of (1) over the whole time."""

    def advance(carry: Any, now: Slices) -> tuple[Any, Any]:
        held, a, one = carry
        held, f = fade(net, params, link, held, now)
        a, one = f.input * a + now.link_input(link), f.constant * one + 1.0
        return (held, a, one), (a, one)

    first = jax.tree.map(lambda leaf: leaf[0], slices)
    x = first.link_input(link)
    start = (at_rest(link, first), jnp.zeros_like(x), jnp.zeros((), x.dtype))
    return jax.lax.scan(advance, start, slices)[1]


def weight_gradient(net: Network, params: Params, link: Link, traced: tuple[Array, Array], delta: Array) -> Any:
    """sum_t VJP(connection) at the traced input, whose constant part has its own total weight, at delta_t."""
    a, one = traced
    at_trace = net.weight_cotangent(params, link, a, delta, lead=2)
    # Without input every row has the same derivative: one row with the sum of the errors does for all.
    extra = jnp.tensordot(one - 1.0, delta.sum(1), 1)[None, None]
    of_constants = net.weight_cotangent(params, link, jnp.zeros_like(a[:1, :1]), extra, lead=2)
    return jax.tree.map(jnp.add, at_trace, of_constants)
