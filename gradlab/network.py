"""Networks: connections, neurons and links, with an explicit carry."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradlab.modules import (
    INPUT,
    Link,
    apply_to_steps,
    describe,
    freeze,
    function_of,
    init_chain,
    init_extra,
    init_neuron,
    is_hashable,
    refuse_mixing,
    refuse_mixing_units,
    refuse_part,
    refuse_wrong_point,
    rest,
)
from gradlab.neurons import Neuron

__all__ = ["INPUT", "Link", "Network", "NetworkState", "Params", "connect"]

Params = Any


class NetworkState(NamedTuple):
    """What the next step needs: per layer the neuron's state, and its last output where a delayed link reads it.

    `outputs` holds None for the other layers.
    """

    states: tuple[Any, ...]
    outputs: tuple[Array | None, ...]


@dataclass(frozen=True)
class Network:
    """Connections, neurons and links between them. Build it with `connect`; it holds no arrays.

    Parameters are a dict: params["layer_0"]["connection"], ["from_layer_1"] for an extra link, ["neuron"] where a
    neuron trains. Sequences are time-major, [time, batch, features...].
    """

    neurons: tuple[Any, ...]
    links: tuple[Link, ...]

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(f"layer_{index}" for index in range(len(self.neurons)))

    @property
    def last(self) -> int:
        """Index of the output layer."""
        return len(self.neurons) - 1

    def links_into(self, target: int) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.target == target)

    def links_from(self, source: int) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.source == source)

    def delays(self, layer: int) -> bool:
        """True when a delayed link reads this layer's output of the step before."""
        return any(link.delay for link in self.links_from(layer))

    def init(self, key: Array, inputs: Array) -> Params:
        """Parameters for inputs [time, batch, features...], cast to the inputs' dtype.

        Raises:
            ValueError: inputs of too few axes, not of a floating type, a connection that mixes samples, needs
                randomness, or keeps variables other than parameters; a neuron that mixes units, or whose operating
                point is not its own.
        """
        require_sequence(inputs)
        inputs = jnp.asarray(inputs)
        x = jnp.zeros(inputs.shape[1:], inputs.dtype)
        # Compiled as one: some hundred small operations would each be compiled alone.
        params = _jitted_fresh(self, key, x) if is_hashable(self) else jax.jit(partial(fresh, self))(key, x)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
            sizes = {INPUT: x.shape[1:], **dict(enumerate(self.unit_shapes(params, inputs)))}
            for link in self.links:
                own = params[f"layer_{link.target}"].get(link.name, {})
                refuse_mixing(link, own, key, jnp.zeros((2, *sizes[link.source]), x.dtype))
            for layer, neuron in enumerate(self.neurons):
                own = params[f"layer_{layer}"].get("neuron", {})
                refuse_mixing_units(neuron, own, key, jnp.zeros((1, *sizes[layer]), x.dtype))
                refuse_wrong_point(neuron, own, key, jnp.zeros((8, *sizes[layer]), x.dtype))
        return params

    def unit_shapes(self, params: Params, inputs: Array | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], ...]:
        """The shape of one sample's output, per layer."""
        # A compiled function's trace is kept, so that asking again costs nothing.
        step = partial(_jitted_outputs, self) if is_hashable(self) else self._outputs_of_step
        state = jax.eval_shape(step, params, _one_step(inputs))
        return tuple(output.shape[1:] for output in state)

    def _outputs_of_step(self, params: Params, x: Array) -> tuple[Array, ...]:
        outputs: dict[int, Array] = {INPUT: x}
        for layer in range(len(self.neurons)):
            current = self.current(params, self.links_into(layer)[0], outputs[layer - 1], lead=1)
            carry = rest(self.neurons[layer], current)
            outputs[layer] = self.neuron_step(params, layer, carry, current)[1]
        return tuple(outputs[layer] for layer in range(len(self.neurons)))

    def initial_state(self, params: Params, inputs: Array) -> NetworkState:
        """The state at rest (zeros) for inputs [time, batch, features...]."""
        x = _one_step(inputs)
        shapes = self.unit_shapes(params, inputs)
        states = []
        for layer, neuron in enumerate(self.neurons):
            if isinstance(neuron, Neuron):
                states.append(neuron.initialize_carry(None, (x.shape[0], *shapes[layer]), x.dtype))
            else:
                states.append(rest(neuron, jnp.zeros((x.shape[0], *shapes[layer]), x.dtype)))
        zeros = [jnp.zeros((x.shape[0], *shape), x.dtype) for shape in shapes]
        return NetworkState(tuple(states), tuple(z if self.delays(i) else None for i, z in enumerate(zeros)))

    def current(self, params: Params, link: Link, x: Array, lead: int) -> Array:
        """The current that a link delivers; the `lead` leading axes of x together are its batch."""
        return apply_to_steps(link, self._bound(params, link), x, lead)

    def weight_cotangent(self, params: Params, link: Link, x: Array, delta: Array, lead: int) -> Any | None:
        """sum over the leading axes of (d current / d parameters)^T delta; None when the link has no parameters."""
        own = params[f"layer_{link.target}"].get(link.name)
        if own is None:
            return None
        apply = function_of(link, own)
        return jax.vjp(lambda p: apply_to_steps(link, lambda y: apply(p, y), x, lead), own)[1](delta)[0]

    def input_cotangent(self, params: Params, link: Link, x: Array, delta: Array, lead: int) -> Array:
        """(d current / d x)^T delta: how an error on the target's current reaches the source's output."""
        return jax.vjp(lambda y: self.current(params, link, y, lead), x)[1](delta)[0]

    def neuron_step(
        self, params: Params, layer: int, carry: Any, current: Array, cut: str = "nothing"
    ) -> tuple[Any, Array]:
        """One step of a layer's neuron, (carry, current) -> (carry, output); `cut` as in `Neuron.cut`."""
        neuron = self.neurons[layer]
        if cut != "nothing":
            neuron = neuron.cut(cut)
        own = params[f"layer_{layer}"].get("neuron", {})
        return neuron.apply({"params": own}, carry, current)

    def point(self, params: Params, layer: int, carry: Any, current: Array) -> tuple[Array, ...]:
        """The layer's operating point in fewer arrays than (carry, current), or (); `Neuron.point`."""
        neuron = self.neurons[layer]
        # The gradient of trained constants needs the state and the current themselves.
        if not isinstance(neuron, Neuron) or "neuron" in params[f"layer_{layer}"] or not neuron.has_point:
            return ()
        same = all(leaf.dtype == current.dtype for leaf in jax.tree.leaves(carry))
        return neuron.point(carry, current) if same else ()  # of mixed types a point would have one of them

    def step(
        self, params: Params, state: NetworkState, x: Array
    ) -> tuple[NetworkState, tuple[Array, ...], tuple[Array, ...]]:
        """One time step on x [batch, features...]: the new state, and every layer's current and output."""
        outputs: dict[int, Array] = {INPUT: x}
        states, currents = [], []
        for layer in range(len(self.neurons)):
            links = self.links_into(layer)
            sources: list[Any] = [state.outputs[k.source] if k.delay else outputs[k.source] for k in links]
            current = _sum([self.current(params, k, y, lead=1) for k, y in zip(links, sources, strict=True)])
            carry, outputs[layer] = self.neuron_step(params, layer, state.states[layer], current)
            states.append(carry)
            currents.append(current)
        produced = tuple(outputs[layer] for layer in range(len(self.neurons)))
        kept = tuple(s if self.delays(i) else None for i, s in enumerate(produced))
        return NetworkState(tuple(states), kept), tuple(currents), produced

    def _bound(self, params: Params, link: Link) -> Callable[[Array], Array]:
        own = params[f"layer_{link.target}"].get(link.name, {})
        apply = function_of(link, own)
        return lambda x: apply(own, x)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>layer_{link.target}</td><td>{'input' if link.source < 0 else f'layer_{link.source}'}"
            f"{' (step before)' if link.delay else ''}</td><td>{html.escape(describe(link.connection))}</td>"
            f"<td>{html.escape(describe(self.neurons[link.target]))}</td></tr>"
            for link in self.links
        )
        head = "<tr><th>layer</th><th>reads</th><th>connection</th><th>neuron</th></tr>"
        return f"<table>{head}{rows}</table>"


Connections = Mapping[int, Any]


def connect(modules: Sequence[Any], links: Mapping[int, Sequence[int] | Connections] | None = None) -> Network:
    """Chain connections and neurons into a network, with extra links.

    Args:
        modules: Flax Linen connections (Dense, Conv, any deterministic module that acts on each sample; several in a
            row, and plain functions such as an activation, are chained) alternating with neurons (`gl.LIF`, `gl.LI`,
            ..., or a Flax cell). Lists in their fields become tuples.
        links: extra arrows, {target: [sources]} or {target: {source: connection}}, counting connection-neuron pairs
            from 0. The source's output enters the target from the step before when source >= target (recurrence,
            feedback) and from the same step when source < target (skip). Without a connection, a Dense without bias of
            the target's width.

    Raises:
        TypeError, ValueError: a chain that does not alternate, something that is no module, or a link to a layer that
            does not exist or that the chain has.
    """
    if isinstance(modules, nn.Module) or not isinstance(modules, Sequence) or not modules:
        raise TypeError("connect needs a list such as [nn.Dense(128), gl.LIF(), nn.Dense(10), gl.LI()]")
    neurons: list[Any] = []
    found: list[Link] = []
    pending: list[Any] = []
    for position, item in enumerate(modules):
        refuse_part(item, position)
        if not isinstance(item, nn.RNNCellBase):
            pending.append(freeze(item))
            continue
        if not pending:
            raise ValueError(
                f"item {position}, {describe(item)}, has no connection before it: put one (nn.Dense(...)) between"
            )
        found.append(Link(len(neurons) - 1, len(neurons), _chained(pending), 0, "connection"))
        neurons.append(freeze(item))
        pending = []
    if pending:
        raise ValueError(
            f"the network ends with {describe(pending[-1])}: end it with a neuron (gl.LI() for a plain read-out)"
        )
    found += _extra_links(links or {}, len(neurons))
    return Network(tuple(neurons), tuple(sorted(found, key=lambda k: (k.target, k.name != "connection", k.source))))


def _chained(pending: list[Any]) -> Any:
    return pending[0] if len(pending) == 1 and isinstance(pending[0], nn.Module) else nn.Sequential(tuple(pending))


def _extra_links(links: Mapping[int, Sequence[int] | Connections], count: int) -> list[Link]:
    if not isinstance(links, Mapping) or any(isinstance(sources, int | str) for sources in links.values()):
        raise TypeError(f"links={links!r}: give {{target: [sources]}} or {{target: {{source: connection}}}}")
    made = []
    for target, sources in links.items():
        pairs = dict(sources) if isinstance(sources, Mapping) else dict.fromkeys(sources)
        for source, connection in pairs.items():
            where = f"link from layer {source} to layer {target}"
            if not (target in range(count) and source in range(count)):
                raise ValueError(f"{where}: the network's layers are 0 to {count - 1}")
            if source == target - 1:
                raise ValueError(f"{where}: the chain has it already")
            made.append(Link(source, target, freeze(connection), int(source >= target), f"from_layer_{source}"))
    return made


def fresh(net: Network, key: Array, x: Array) -> Params:
    """New parameters for one step of inputs x [batch, features...], in x's dtype."""
    outputs: dict[int, Array] = {INPUT: x}
    currents: dict[int, Array] = {}
    params: dict[str, Any] = {}
    for layer, neuron in enumerate(net.neurons):
        layer_key = jax.random.fold_in(key, layer)
        own: dict[str, Any] = {}
        currents[layer] = init_chain(net.links_into(layer)[0], layer_key, outputs, own)
        outputs[layer], own["neuron"] = init_neuron(neuron, layer_key, currents[layer])
        params[f"layer_{layer}"] = own
    for link in net.links:
        if link.name != "connection":
            own = params[f"layer_{link.target}"]
            init_extra(link, jax.random.fold_in(key, link.target), outputs[link.source], currents[link.target], own)
    kept = {name: {k: v for k, v in own.items() if jax.tree.leaves(v)} for name, own in params.items()}
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), kept)


_jitted_fresh = jax.jit(fresh, static_argnums=0)


_jitted_outputs = jax.jit(Network._outputs_of_step, static_argnums=0)


def _sum(arrays: Sequence[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _one_step(inputs: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)


def require_sequence(inputs: Any) -> None:
    """Raise ValueError unless inputs are floats [time, batch, features...] with at least one entry."""
    if not hasattr(inputs, "shape"):
        raise ValueError(f"inputs are a {type(inputs).__name__}: give an array [time, batch, features...]")
    shape = tuple(inputs.shape)
    if len(shape) < 3:
        raise ValueError(
            f"inputs have shape {shape}: gradlab is time-major and needs [time, batch, features...], at least three "
            "axes (a single sequence: inputs[:, None])"
        )
    if 0 in shape:
        raise ValueError(f"inputs have shape {shape}, [time, batch, features...]: an axis is empty")
    dtype = jnp.result_type(inputs)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"inputs are {dtype}: give floats, for example inputs.astype(jnp.float32)")
