"""Why does a network not learn? Firing, surrogate slopes and the flow of BPTT's error, per layer, unit and step.

    (1)  delta_t = d loss / d I_t      the error on a layer's current, by BPTT: all paths, over layers and over time
    (2)  flow_t  = ||delta_t||         over the batch and the layer's units
    (3)  gradient of a connection's kernel = sum over t of x_t^T delta_t

A layer's weights learn from its inputs and from (1) alone, so that a flow that vanishes on its way, from the output
layer down or from the last step back, says where learning stops. It is measured as the derivative with respect to a
current of zero that is added to every layer at every step.

Steps that the mask leaves out count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.analysis.health_result import LayerHealth, NetworkHealth
from gradlab.analysis.trees import flat
from gradlab.checks import check
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import INPUT, Network, NetworkState, Params
from gradlab.tape import jacobians

__all__ = ["Flow", "LayerHealth", "NetworkHealth", "error_flow", "network_health"]

OPEN = 0.01
"""A slope counts as open when it exceeds this share of the layer's largest on the batch."""


class Flow(NamedTuple):
    """BPTT's gradient of the parameters, and per layer its error on the current, [time, batch, units...]: (1)."""

    gradient: Params
    errors: tuple[Array, ...]


def error_flow(net: Network, params: Params, batch: Batch, loss: Loss) -> Flow:
    """BPTT's error on every layer's current at every step, equation (1); errors as `gl.gradients`.

    Its memory is that of all layers' currents over the whole sequence, three or four times.
    """
    params, batch = check(net, params, batch, loss)
    return _compiled(_jitted_flow, _flow, net, loss)(params, batch)


def network_health(net: Network, params: Params, batch: Batch, loss: Loss) -> NetworkHealth:
    """Firing rates, surrogate slopes and gradient flow of every layer on one batch, and what may be wrong, in words.

    Arguments and errors as `gl.evaluate`, whose definitions of silent and saturated units these are.
    """
    params, batch = check(net, params, batch, loss)
    gradient, errors = jax.device_get(error_flow(net, params, batch, loss))
    firing = jax.device_get(_compiled(_jitted_firing, _firing, net, loss)(params, batch))
    n_steps, size = batch.inputs.shape[:2]
    counted = np.ones((n_steps, size)) if batch.mask is None else np.asarray(batch.mask, np.float64)
    layers = {}
    for index, name in enumerate(net.layer_names):
        # In float64 here: squares of a vanishing error would underflow in float32, and the flow would look cut off.
        rows = np.asarray(errors[index], np.float64).reshape(n_steps, -1)
        norm = np.linalg.norm(flat(gradient[name])) if jax.tree.leaves(gradient[name]) else 0.0
        shown = {key: np.asarray(value, np.float64) for key, value in firing[index].items()}
        layers[name] = LayerHealth(np.linalg.norm(rows, axis=1), float(norm), **_shares(shown, counted))
    return NetworkHealth(layers, counted.sum(1))


def _shares(shown: dict[str, np.ndarray], counted: np.ndarray) -> dict[str, Any]:
    """Sums over steps and samples that count, as means; None for a layer that does not spike."""
    if not shown:
        return dict.fromkeys(("rates", "silent", "saturated", "rate_per_step", "slope", "open", "peak"))
    total, per_step = counted.sum(), counted.sum(1)
    ever, always = shown["ever"].ravel() > 0, shown["always"].ravel() > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_per_step = np.where(per_step > 0, shown["per_step"] / per_step, np.nan)
    return {
        "rates": (shown["per_unit"] / max(total, 1.0)).ravel(),
        "silent": float(1 - ever.mean()),
        "saturated": float(always.mean()),
        "rate_per_step": rate_per_step,
        "slope": float(shown["slope"] / max(total, 1.0)),
        "open": float(shown["open"] / max(total, 1.0)),
        "peak": float(shown["peak"]),
    }


def _flow(net: Network, loss: Loss, params: Params, batch: Batch) -> Flow:
    n_steps, size = batch.inputs.shape[:2]
    dtype = batch.inputs.dtype
    shapes = _current_shapes(net, params, batch)
    zeros = tuple(jnp.zeros((n_steps, size, *shape), dtype) for shape in shapes)

    def value(own: Params, added: tuple[Array, ...]) -> Array:
        def step(state: NetworkState, now: tuple[Array, tuple[Array, ...]]) -> tuple[NetworkState, Array]:
            return _step(net, own, state, *now)

        _, output = jax.lax.scan(step, net.initial_state(own, batch.inputs), (batch.inputs, added))
        return loss(output, batch)

    return Flow(*jax.grad(value, argnums=(0, 1))(params, zeros))


def _step(
    net: Network, params: Params, state: NetworkState, x: Array, added: tuple[Array, ...]
) -> tuple[NetworkState, Array]:
    """One step of the network with a current added to every layer: the state after it, and the last layer's output."""
    outputs: dict[int, Array] = {INPUT: x}
    states = []
    for layer, current in enumerate(added):
        for link in net.links_into(layer):
            source: Any = state.outputs[link.source] if link.delay else outputs[link.source]
            current = current + net.current(params, link, source, lead=1)
        carry, outputs[layer] = net.neuron_step(params, layer, state.states[layer], current)
        states.append(carry)
    kept = tuple(outputs[layer] if net.delays(layer) else None for layer in range(len(added)))
    return NetworkState(tuple(states), kept), outputs[net.last]


def _current_shapes(net: Network, params: Params, batch: Batch) -> list[tuple[int, ...]]:
    """The shape of one sample's current, per layer."""
    state = net.initial_state(params, batch.inputs)
    _, currents, _ = jax.eval_shape(net.step, params, state, batch.inputs[0])
    return [current.shape[1:] for current in currents]


def _firing(net: Network, loss: Loss, params: Params, batch: Batch) -> list[dict[str, Array]]:
    """Per spiking layer sums over the steps and samples that count; an empty dict for other layers."""
    _, layers = plan.run(net, params, batch.inputs)
    dtype = layers[-1].output.dtype
    mask = jnp.ones(batch.inputs.shape[:2], dtype) if batch.mask is None else batch.mask.astype(dtype)
    found: list[dict[str, Array]] = []
    for index, layer in enumerate(layers):
        if not getattr(net.neurons[index], "spiking", False):
            found.append({})
            continue
        counts = mask.reshape(*mask.shape, *(1,) * (layer.output.ndim - 2))
        slope = jacobians(net, params, index, layer).D * counts
        peak, units = jnp.abs(slope).max(), tuple(range(2, layer.output.ndim))
        fired = (layer.output != 0) & (counts > 0)
        found.append(
            {
                "per_unit": (layer.output * counts).sum((0, 1)),
                "ever": jnp.any(fired, axis=(0, 1)),
                "always": jnp.all(fired | (counts == 0), axis=(0, 1)),
                "per_step": (layer.output * counts).mean(units).sum(1),
                "slope": slope.mean(units).sum(),
                "open": (jnp.abs(slope) > OPEN * peak).astype(dtype).mean(units).sum(),
                "peak": peak,
            }
        )
    return found


_jitted_flow = jax.jit(_flow, static_argnums=(0, 1))
_jitted_firing = jax.jit(_firing, static_argnums=(0, 1))


def _compiled(jitted: Callable[..., Any], plain: Callable[..., Any], net: Network, loss: Loss) -> Callable[..., Any]:
    """The cached compiled function while network and loss are hashable, a new one closed over them otherwise."""
    return partial(jitted, net, loss) if is_hashable(net, loss) else jax.jit(partial(plain, net, loss))
