"""SnAp: real-time recurrent learning inside a layer, with only the entries that a parameter reaches within n steps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab.losses import Loss
from gradlab.network import Link, Network, Params
from gradlab.neurons import Neuron
from gradlab.plan import LayerRecord
from gradlab.rules.base import Estimate, Shapes, StreamingRule
from gradlab.rules.influence import (
    add_own,
    advance,
    blank,
    blank_state,
    current_influence,
    dense_blocks,
    kept_bytes,
    known_too_late,
    larger_than,
    own_derivatives,
    require_limit,
    spatial_errors,
)
from gradlab.rules.own_links import own_link
from gradlab.rules.synapses import Unrolled
from gradlab.tape import Slices, Tape

PROBES = 16
"""Random inputs on which a Jacobian is looked at: an entry counts as zero when it is zero on all of them."""


@dataclasses.dataclass(frozen=True)
class SnAp(StreamingRule):
    """Sparse n-step approximation of real-time recurrent learning. Each layer is a recurrent core of its own.

    (1) dI_t = direct derivative + R e_{t-1},   R the layer's link to itself
    (2) S_t = M (A_t S_{t-1} + B_t dI_t),   e_t = M (C_t S_{t-1} + D_t dI_t)
    (3) M keeps an entry (unit, parameter) where the parameter moves the unit's state within n steps of the core, the
    step that uses it included: M = 1 where (P^(n-1) F) > 0, F the pattern of the direct derivative, P that of the core
    (a unit always reaches itself; the state variables of a unit are one block)
    (4) grad = sum_t L_t e_t,   L_t = W^T (D_t L_t of the layer above)

    The patterns are those of Jacobian entries that are zero whatever the input: of connections and links at the
    parameters with which the rule begins (`init`), zeros of a kernel included, and kept from then on, however the
    parameters change; of cells whose units see each other (`nn.GRUCell`) at random weights. The current of such a cell
    enters all its units, so that nothing of the connection into it is left out.
    Drops: what OSTL drops (paths through other layers and time together), and inside the layer the influence on units
    that a parameter reaches only after n steps or more.
    Exact when: OSTL(own="full") is and n is larger than the longest of the shortest ways between units of the layer
    (n=2 for a dense link to itself and for a GRU; any n for neurons without such a link).
    n=1 on a Dense layer follows the diagonal of R only. Parameters that several units share (a convolution's) keep the
    influence on all of these units, and what these units send to each other.
    Other implementations: the authors' code for n=1 keeps the entries whose direct derivative is not zero at the very
    step, which would cut a trace whenever its input is silent; the pattern here is that of the structure.
    No adjoint form: the mask works on single entries of S, so that there is no recursion of a unit's size to reverse.
    Cost per step: as RTRL inside each layer, memory batch x states x parameters; the entries that M drops are stored as
        zeros, so that this is a study of what they are worth and not a saving.

    Args:
        n: how many steps of the core are followed, at least 1.
        limit_bytes: largest influence matrices that are allowed, default 2 GiB.
    """

    reference: ClassVar[str] = "Menick, Elsen, Evci, Osindero, Simonyan & Graves (2021), ICLR, arXiv 2006.07232"
    n: int = 1
    limit_bytes: int = 2**31

    def __post_init__(self):
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"SnAp(n={self.n!r}): the number of steps is a whole number, at least one")
        require_limit(self)

    def supports(self, net: Network, shapes: Shapes, loss: Loss, online: bool = False) -> str | None:
        if late := known_too_late(loss, online):
            return self.refuse(late)
        for layer, record in enumerate(shapes.slices.layers):
            if any(leaf.shape != record.output.shape for leaf in jax.tree.leaves(record.state)):
                kind = type(net.neurons[layer]).__name__
                return self.refuse(
                    f"layer_{layer} is a {kind} whose state and output differ in shape, so that no state belongs to a "
                    "unit: use RTRL"
                )
        needed = kept_bytes(self, net, shapes, loss)
        reason = larger_than(self.limit_bytes, needed, "its influence matrices (batch x states x parameters)")
        return None if reason is None else self.refuse(reason)

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        return {name: _mask(net, params, shapes, k, self.n) for k, name in enumerate(net.layer_names)}

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        return self.stream(net, params, tape, state, key)

    def start(
        self, net: Network, params: Params, loss: Loss, state: Any, slices: Slices, n_steps: int, key: Array
    ) -> Any:
        influence, before = {}, {}
        for layer, name in enumerate(net.layer_names):
            influence[name] = blank_state(slices.layers[layer], params[name])
            if own_link(net, layer) is not None:
                before[name] = blank(slices.layers[layer].output, params[name])
        return {"influence": influence, "before": before}

    def step(
        self, net: Network, params: Params, loss: Loss, trace: Any, state: Any, slices: Slices
    ) -> tuple[Any, Estimate]:
        influence, output, grads = {}, {}, {}
        errors = spatial_errors(net, params, slices)
        for layer, name in enumerate(net.layer_names):
            record = slices.layers[layer]

            def carried(link: Link, name: str = name) -> Any:
                return trace["before"][name] if link.source == link.target else None

            current = current_influence(net, params, layer, layer, slices, carried)
            after, e = advance(net, params, layer, record)(trace["influence"][name], current)
            after, e = add_own(net, params, layer, record, after, e)
            influence[name] = tuple(_kept(state[name], leaf) for leaf in after)
            output[name] = _kept(state[name], e)
            error = errors[layer]
            grads[name] = jax.tree.map(lambda leaf, error=error: jnp.tensordot(error, leaf, error.ndim), output[name])
        before = {name: output[name] for name in trace["before"]}
        return {"influence": influence, "before": before}, Estimate(grads, state)


def _kept(mask: Any, influence: Any) -> Any:
    """The entries of an influence that a mask without batch axis keeps."""
    return jax.tree.map(lambda keep, leaf: jnp.where(keep, leaf, 0), mask, influence)


def _mask(net: Network, params: Params, shapes: Shapes, layer: int, n: int) -> Any:
    """M of equation (3): a pytree like the layer's parameters, of booleans [units..., axes of the parameter...]."""
    name, units = f"layer_{layer}", shapes.units[layer]
    size = int(np.prod(units))
    entering, inside, own = _unit_patterns(net, params, shapes, layer)
    within = jnp.eye(size, dtype=bool) | inside
    link = own_link(net, layer)
    if link is not None:
        within = within | _product(entering, _link_pattern(net, params, shapes, link).reshape(-1, size))
    reach = jax.lax.fori_loop(0, min(n, size) - 1, lambda _, reached: _product(within, reached), jnp.eye(size) > 0)
    masks = {}
    for part, leaves in params[name].items():
        if part == "neuron":
            direct = own
        else:
            (into,) = (link for link in net.links_into(layer) if link.name == part)
            currents = _direct_pattern(net, params, shapes, into)
            direct = jax.tree.map(lambda leaf: _product(entering, leaf), currents)
        masks[part] = jax.tree.map(
            lambda leaf, like: _product(reach, leaf).reshape(*units, *like.shape), direct, leaves
        )
    return masks


def _product(a: Array, b: Array) -> Array:
    """The Boolean product of two patterns."""
    return a.astype(jnp.float32) @ b.astype(jnp.float32) > 0


def _unit_patterns(net: Network, params: Params, shapes: Shapes, layer: int) -> tuple[Array, Array, Any]:
    """Which currents enter which units, which units see which, and which units the neuron's own parameters move.

    The patterns are [units, currents], [units, units], and per parameter [units, entries].
    """
    units = shapes.units[layer]
    size = int(np.prod(units))
    own = params[f"layer_{layer}"].get("neuron", {})
    if isinstance(net.neurons[layer], Neuron):
        alone = jnp.eye(size, dtype=bool)
        return alone, alone, jax.tree.map(lambda leaf: _broadcast_pattern(leaf.shape, units), own)
    return _cell_patterns(net, params, shapes, layer)


def _broadcast_pattern(shape: tuple[int, ...], units: tuple[int, ...]) -> Array:
    """Which units a neuron's constant of this shape is for: it is broadcast against the units."""
    entries = np.arange(int(np.prod(shape)))
    try:
        read = np.broadcast_to(entries.reshape(shape), units).reshape(-1)
    except ValueError:
        return jnp.ones((int(np.prod(units)), entries.size), bool)
    return jnp.asarray(read[:, None] == entries)


def _cell_patterns(net: Network, params: Params, shapes: Shapes, layer: int) -> tuple[Array, Array, Any]:
    """`_unit_patterns` of a cell whose units see each other, from its Jacobian at random weights, states, currents."""
    key, name = jax.random.key(0), f"layer_{layer}"
    record = shapes.slices.layers[layer]._replace(point=())
    size = int(np.prod(record.output.shape[1:]))
    own = _random(jax.random.fold_in(key, 0), params[name].get("neuron", {}))
    drawn = {**params, name: {**params[name], "neuron": own}}
    like = LayerRecord(*(jax.tree.map(lambda s: jax.ShapeDtypeStruct((PROBES, *s.shape[1:]), s.dtype), record)))
    probe = LayerRecord(*_random(jax.random.fold_in(key, 1), tuple(like)))
    rows = dense_blocks(net, drawn, layer, probe)

    def pattern(leaf: Array) -> Array:
        return jnp.any(leaf != 0, axis=0).reshape(size, -1)

    entering = jnp.any(jnp.stack([pattern(row[-1]) for row in rows]), axis=0)
    inside = jnp.any(jnp.stack([pattern(block) for row in rows for block in row[:-1]]), axis=0)
    if not jax.tree.leaves(own):
        return entering, inside, own
    moved = own_derivatives(net, drawn, layer, probe)
    return entering, inside, jax.tree.map(lambda *leaves: jnp.any(jnp.stack([pattern(x) for x in leaves]), 0), *moved)


def _random(key: Array, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)


def _direct_pattern(net: Network, params: Params, shapes: Shapes, link: Link) -> Any:
    """Which currents each of a link's parameters moves: per parameter [currents, entries]."""
    layout, currents = Unrolled(net, link), shapes.slices.layers[link.target].current.shape[1:]
    found = _on_probes(shapes, link, lambda x: layout.direct(params, x))
    return jax.tree.map(lambda leaf: leaf.reshape(int(np.prod(currents)), -1), found)


def _link_pattern(net: Network, params: Params, shapes: Shapes, link: Link) -> Array:
    """Which currents each output of the link's source moves."""

    def derivative(x: Array) -> Array:
        return jax.jacrev(lambda y: net.current(params, link, y[None], lead=1)[0])(x[0])

    return _on_probes(shapes, link, lambda x: derivative(x)[None])


def _on_probes(shapes: Shapes, link: Link, derivative: Any) -> Any:
    """Where a derivative, a pytree of arrays [1, ...], is not zero on some random input of a link."""
    like = shapes.slices.link_input(link)
    x = jax.random.normal(jax.random.key(link.source + 1), (PROBES, *like.shape[1:]), like.dtype)
    # Small inputs as well: a squashing function's slope at large ones may be rounded to zero.
    x = x * jnp.geomspace(1.0, 0.01, PROBES, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    def look(seen: Any, probe: Array) -> tuple[Any, None]:
        found = jax.tree.map(lambda leaf: leaf[0] != 0, derivative(probe[None]))
        return jax.tree.map(jnp.logical_or, seen, found), None

    blank_pattern = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape[1:], bool),
        jax.eval_shape(derivative, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)),
    )
    return jax.lax.scan(look, blank_pattern, x)[0]
