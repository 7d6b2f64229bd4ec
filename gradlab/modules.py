"""Flax modules as a network uses them: called on folded axes, initialised, and refused where they cannot be used.

Together with `network.py` this is the only place that calls Flax's `init` and `apply`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradlab.neurons import ALIF, IF, LI, LIF, CurrentLIF, Neuron
from gradlab.surrogates import SURROGATES

INPUT = -1
"""The source index of the network's input."""


@dataclasses.dataclass(frozen=True)
class Link:
    """An arrow into a layer. `connection` None means a bias-free Dense of the target's width.

    delay 0: the source's output of the same step; delay 1: of the step before.
    """

    source: int
    target: int
    connection: Any
    delay: int
    name: str


def function_of(link: Link, own: Any) -> Callable[[Any, Array], Array]:
    """The link's current as a pure function (parameters, x) -> current; `own` are its parameters, for their shapes."""
    module = link.connection
    if module is None:
        module = nn.Dense(own["kernel"].shape[-1], use_bias=False)
    return lambda p, x: module.apply({"params": p}, x)


def apply_to_steps(link: Link, function: Callable[[Array], Array], x: Array, lead: int) -> Array:
    """Apply a link's function of [batch, features...] to x with `lead` leading axes, which together play the batch.

    Where there are several devices a Dense layer takes them as they are: folded into one axis, samples that are spread
    over the devices could not stay there. On one device folding is 8 to 10 % faster, because the weights' gradient is
    then a plain product, without a transposed copy.
    """
    if jax.device_count() > 1 and x.ndim == lead + 1 and (link.connection is None or type(link.connection) is nn.Dense):
        return function(x)
    return apply_folded(function, x, lead)


def apply_folded(function: Callable[[Array], Array], x: Array, lead: int) -> Array:
    """Apply a function of [batch, features...] to x whose `lead` leading axes together play the batch."""
    y = function(x.reshape(-1, *x.shape[lead:]))
    return y.reshape(*x.shape[:lead], *y.shape[1:])


def rest(neuron: Any, current: Array) -> Any:
    """The state of a neuron or of a Flax cell before the first step."""
    if isinstance(neuron, Neuron):
        return neuron.initialize_carry(None, current.shape, current.dtype)
    carry = neuron.initialize_carry(jax.random.key(0), current.shape)
    return jax.tree.map(lambda leaf: leaf.astype(current.dtype), carry)


def init_chain(link: Link, key: Array, outputs: dict[int, Array], own: dict[str, Any]) -> Array:
    """Initialise the chain's connection into a layer; returns the layer's current."""
    x = outputs[link.source]
    own["connection"] = _init_connection(link.connection, jax.random.fold_in(key, 0), x, link)
    return _applied(link, own["connection"], x)


def init_extra(link: Link, key: Array, x: Array, target: Array, own: dict[str, Any]) -> None:
    """Initialise an extra link from an output x to the current `target`, which its own must fit, or ValueError."""
    module = nn.Dense(target.shape[-1], use_bias=False) if link.connection is None else link.connection
    where = f"the link from layer {link.source} to layer {link.target}"
    if link.connection is None and max(x.ndim, target.ndim) > 2:
        raise ValueError(
            f"{where} joins layers of shape {x.shape[1:]} and {target.shape[1:]}: "
            f"give its connection, links={{{link.target}: {{{link.source}: nn.Conv(...)}}}}"
        )
    own[link.name] = _init_connection(module, jax.random.fold_in(key, 1 + link.source), x, link)
    shape = _applied(link, own[link.name], x).shape
    if shape != target.shape:
        raise ValueError(
            f"{where} delivers {shape[1:]} per sample, but the layer's current is {target.shape[1:]}: "
            "give the link a connection of that shape"
        )


def init_neuron(neuron: Any, key: Array, current: Array) -> tuple[Array, Any]:
    """A layer's output at rest, and the parameters of its neuron."""
    for name in ("beta", "alpha", "threshold", "adaptation_decay", "adaptation_strength", "rate"):
        constant = getattr(neuron, name, None)
        if isinstance(constant, tuple) and len(constant) != current.shape[-1]:
            raise ValueError(f"{describe(neuron)}: {name} has {len(constant)} values for {current.shape[-1]} units")
    carry = rest(neuron, current)
    variables = neuron.init(jax.random.fold_in(key, 10_000), carry, current)
    return neuron.apply(variables, carry, current)[1], variables.get("params", {})


def _where(link: Link) -> str:
    return f"the connection {describe(link.connection)} into layer {link.target}"


def _init_connection(module: Any, key: Array, x: Array, link: Link) -> Any:
    try:
        variables = module.init(key, x)
    except Exception as error:
        shape = x.shape[1:]
        raise ValueError(f"{_where(link)} does not fit its input of shape {shape} per sample: {error}") from error
    if other := sorted(set(variables) - {"params"}):
        raise ValueError(
            f"{_where(link)} keeps variables in {other}: a connection may hold parameters only and treat each sample "
            "by itself (normalisation over the batch would differ between chunks; use nn.LayerNorm or nn.GroupNorm)"
        )
    return variables.get("params", {})


def _applied(link: Link, own: Any, x: Array) -> Array:
    """The link's current, or a ValueError that says why there is none."""
    try:
        current = function_of(link, own)(own, x)
    except Exception as error:
        if "rng" in str(error).lower():
            raise ValueError(
                f"{_where(link)} needs randomness in each call, but connections are deterministic: leave it out, or "
                "set deterministic=True"
            ) from error
        raise ValueError(f"{_where(link)} cannot be applied to {x.shape}: {error}") from error
    if current.shape[:1] != x.shape[:1]:
        raise ValueError(f"{_where(link)} does not keep the batch axis: it turns {x.shape} into {current.shape}")
    return current


def refuse_mixing(link: Link, own: Any, key: Array, like: Array) -> None:
    """Refuse a connection whose answer for a sample depends on other samples; `like` has the shape of two samples."""
    if link.connection is None or type(link.connection) is nn.Dense:
        return

    def differences(own: Any, probe: Array) -> tuple[Array, Array]:
        together = _applied(link, own, probe)
        alone, beside = _applied(link, own, probe[:1]), _applied(link, own, probe.at[1].multiply(-3.0))
        size = jnp.max(jnp.abs(together))
        return jnp.max(jnp.abs(together[0] - alone[0])) / size, jnp.max(jnp.abs(together[0] - beside[0])) / size

    fewer, other = jax.jit(differences)(own, jax.random.normal(key, like.shape, like.dtype))
    # Another batch size may take another matrix product with other rounding, another neighbour may not.
    if fewer > 2e-2 or other > 1e-3:
        raise ValueError(f"{_where(link)} mixes the samples of a batch: chunked, batched and stepped runs would differ")


_OWN = (IF, LIF, LI, ALIF, CurrentLIF)
"""Gradlab's own neurons, known to be right."""


def refuse_mixing_units(neuron: Any, own: Any, key: Array, like: Array) -> None:
    """Refuse a `Neuron` whose units see each other: every local Jacobian would be wrong. `like` is [1, units...]."""
    if not isinstance(neuron, Neuron) or like.size < 2 or _is_elementwise(neuron):
        return

    def leak(own: Any, key: Array) -> Array:
        keys = jax.random.split(key, 1 + len(neuron.states))
        current = jax.random.normal(keys[0], like.shape, like.dtype)
        state = tuple(jax.random.normal(k, like.shape, like.dtype) for k in keys[1:])
        first = jnp.zeros(like.size, bool).at[0].set(True).reshape(like.shape)
        nudged = [jnp.where(first, x + 3.0, x) for x in (current, *state)]
        before = neuron.apply({"params": own}, state, current)
        after = neuron.apply({"params": own}, tuple(nudged[1:]), nudged[0])
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        moved = [jnp.max(jnp.where(first, 0.0, jnp.abs(a - b))) for a, b in pairs]
        return jnp.max(jnp.stack(moved))

    # Compiled twice in one program, equal units may differ by round-off.
    if jax.jit(leak)(own, key) > 1e-5:
        raise ValueError(
            f"the units of {describe(neuron)} see each other: a gl.Neuron acts on each unit by itself, because rules "
            "read its Jacobian unit by unit; put what mixes units into the connection, or derive from nn.RNNCellBase"
        )


def refuse_wrong_point(neuron: Any, own: Any, key: Array, like: Array) -> None:
    """Refuse a `Neuron` of one's own that steps otherwise at its operating point: its gradients would be wrong.

    `like` is [samples, units...]; what is compared are the step and its derivative along a random direction.
    """
    if not isinstance(neuron, Neuron) or type(neuron) in _OWN or jax.tree.leaves(own) or not neuron.has_point:
        return
    keys = iter(jax.random.split(key, 2 + 2 * len(neuron.states)))

    def drawn() -> tuple[tuple[Array, ...], Array]:
        values = [jax.random.normal(next(keys), like.shape, like.dtype) for _ in range(1 + len(neuron.states))]
        return tuple(values[1:]), values[0]

    at, along = drawn(), drawn()
    point = neuron.point(*at)
    for variant in _variants(neuron) if point else ():
        step = jax.jit(partial(jax.jvp, partial(variant.apply, {"params": own})))
        pairs = zip(jax.tree.leaves(step(at, along)), jax.tree.leaves(step(neuron.at_point(point), along)), strict=True)
        if any(jnp.max(jnp.abs(a - b)) > 1e-3 * (1 + jnp.max(jnp.abs(a))) for a, b in pairs):
            raise ValueError(
                f"{describe(neuron)} steps otherwise at its operating point than where the point was taken: let its "
                "point() and at_point() follow its __call__, or let point() return ()"
            )


def _variants(neuron: Neuron) -> list[Neuron]:
    """The neuron, and itself with each path cut that it says how to cut."""
    found = [neuron]
    for path in ("reset", "adaptation", "spike"):
        try:
            found.append(neuron.cut(path))
        except NotImplementedError:
            continue
    return found


def _is_elementwise(neuron: Neuron) -> bool:
    """True for gradlab's own neurons with its own spikes: known to be elementwise, so that trying it can be spared."""
    spike = getattr(neuron, "surrogate", None)
    return type(neuron) in _OWN and (spike is None or type(spike) in SURROGATES)


def freeze(value: Any) -> Any:
    """A module with tuples in the place of lists, so that it can be hashed and compiled once."""
    if isinstance(value, list | tuple):
        items = [freeze(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not isinstance(value, nn.Module):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in ("parent", "name")}
    changed = {name: freeze(held) for name, held in fields.items()}
    changed = {name: held for name, held in changed.items() if held is not fields[name] and held != fields[name]}
    return value.clone(**changed) if changed else value


def refuse_part(item: Any, position: int) -> None:
    """Raise TypeError for what is neither a Linen module nor a plain function."""
    where = f"item {position} of the network is "
    if isinstance(item, type):
        raise TypeError(f"{where}the class {item.__name__}: give an instance, {item.__name__}(...)")
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(item, nnx.Module):
        raise TypeError(
            f"{where}an NNX module, whose parameters a network cannot see: give nnx.bridge.ToLinen(nnx.Linear, ...)"
        )
    if not callable(item):
        raise TypeError(f"{where}{item!r}: give Flax Linen modules, functions and neurons")


def describe(module: Any) -> str:
    """A module in one line, with the fields that differ from their defaults."""
    if module is None:
        return "Dense(use_bias=False)"
    if isinstance(module, nn.Module):
        defaults = {f.name: f.default for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
        fields = {name: getattr(module, name) for name in defaults}
        shown = ", ".join(f"{k}={_show(v)}" for k, v in fields.items() if not _same(v, defaults[k]))
        return f"{type(module).__name__}({shown})"
    return getattr(module, "__name__", repr(module))


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_show(item) for item in value)})"
    return describe(value) if isinstance(value, nn.Module) or callable(value) else repr(value)


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:
        return False


def is_hashable(*values: Any) -> bool:
    """True when the values can be static arguments of a compiled function."""
    try:
        hash(values)
    except TypeError:
        return False
    return True
