"""Small networks that are alive: every spiking layer fires on 5 to 60 % of its steps, so that no proof is about
zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradlab import plan
from gradlab.losses import Batch, Loss, PerStep
from gradlab.network import Network, Params, connect
from gradlab.neurons import LIF
from gradlab.surrogates import FastSigmoid, Surrogate

LOWEST, HIGHEST = 0.05, 0.6
"""Firing rates between which a layer counts as alive."""


class Case(NamedTuple):
    """A network with everything that a rule's gradient depends on."""

    net: Network
    params: Params
    batch: Batch
    loss: Loss


@dataclasses.dataclass(frozen=True)
class SmoothSpike(Surrogate):
    """A spike that is its own surrogate: s = 1 / (1 + exp(-slope x)), so that finite differences can confirm a
    gradient.
    """

    slope: float = 4.0

    def spike(self, x: Array) -> Array:
        return jax.nn.sigmoid(self.slope * x)

    def slope_at(self, x: Array) -> Array:
        p = jax.nn.sigmoid(self.slope * x)
        return self.slope * p * (1.0 - p)


def case(
    net: Network | None = None,
    *,
    n_steps: int = 9,
    batch_size: int = 3,
    inputs: int | Sequence[int] = 5,
    classes: int | None = None,
    loss: Loss | None = None,
    masked: bool = False,
    seed: int = 0,
    dtype: Any = jnp.float64,
) -> Case:
    """A seeded case; the weights are scaled layer by layer until each spiking layer is alive.

    Args:
        net: the network; None: 5-6-5-4 LIF with attached "subtract" reset.
        n_steps, batch_size, inputs, classes: sizes; `inputs` may be a shape such as (6, 6, 2); classes None: one per
            output unit.
        loss: None: softmax cross-entropy at each step, mean over time.
        masked: leave out some steps, a different number for each sample.
        seed, dtype: of inputs and parameters.
    """
    net = feed_forward() if net is None else net
    loss = PerStep(optax.softmax_cross_entropy) if loss is None else loss
    shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.random((n_steps, batch_size, *shape)) < 0.4, dtype)
    params = net.init(jax.random.key(seed), x)
    width = int(np.prod(net.unit_shapes(params, x)[-1])) if classes is None else classes
    targets = jax.nn.one_hot(jnp.arange(batch_size) % width, width, dtype=dtype)
    if len(net.unit_shapes(params, x)[-1]) != 1:
        raise ValueError("the output layer of a case is flat: end the network with a Dense")
    lengths = n_steps - np.arange(batch_size) % max(n_steps // 2, 1)
    mask = jnp.asarray(np.arange(n_steps)[:, None] < lengths, dtype) if masked else None
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _biased(path, leaf, rng), params)
    params = make_alive(net, params, x)
    return Case(net, params, Batch(x, targets, mask), loss)


def feed_forward(
    neuron: Any = None,
    widths: Sequence[int] = (6, 5, 4),
    links: Mapping[int, Any] | None = None,
    output: Any = None,
) -> Network:
    """A chain of Dense layers with one neuron, or one per layer, and a read-out neuron of its own if given."""
    neuron = lif() if neuron is None else neuron
    neurons = [*neuron] if isinstance(neuron, list | tuple) else [neuron] * len(widths)
    if output is not None:
        neurons[-1] = output
    modules: list[Any] = []
    for width, cell in zip(widths, neurons, strict=True):
        modules += [nn.Dense(width), cell]
    return connect(modules, links)


def lif(**settings: Any) -> LIF:
    """A LIF with a gentle slope, so that no path's share of a gradient drowns in round-off."""
    return LIF(**{"beta": 0.85, "surrogate": FastSigmoid(3.0), **settings})


def firing_rates(net: Network, params: Params, inputs: Array) -> dict[str, float]:
    """The mean output per step of each spiking layer."""
    _, layers = jax.jit(lambda p, x: plan.run(net, p, x))(params, inputs)
    spiking = [getattr(neuron, "spiking", False) for neuron in net.neurons]
    rows = zip(net.layer_names, layers, spiking, strict=True)
    return {name: float(layer.output.mean()) for name, layer, fires in rows if fires}


def assert_alive(net: Network, params: Params, inputs: Array) -> None:
    """Raise AssertionError when a spiking layer fires on less than 5 % or more than 60 % of its steps."""
    for name, rate in firing_rates(net, params, inputs).items():
        if not LOWEST <= rate <= HIGHEST:
            raise AssertionError(
                f"{name} fires on {rate:.1%} of its steps: a proof on it would be about zeros or constants"
            )


def make_alive(net: Network, params: Params, inputs: Array) -> Params:
    """Scale each spiking layer's incoming weights, first layer first, until it fires at about a quarter of its
    steps.
    """
    outputs = jax.jit(lambda p, x: [layer.output.mean() for layer in plan.run(net, p, x)[1]])
    for layer, neuron in enumerate(net.neurons):
        if getattr(neuron, "spiking", False):
            scales = np.geomspace(0.3, 12.0, 16)
            tries = [_scaled(net, params, layer, scale) for scale in scales]
            rates = np.array([float(outputs(p, inputs)[layer]) for p in tries])
            params = tries[int(np.argmin(np.abs(rates - 0.25)))]
    assert_alive(net, params, inputs)
    return params


def _scaled(net: Network, params: Params, layer: int, scale: float) -> Params:
    name = f"layer_{layer}"
    own = {
        key: value if key == "neuron" else jax.tree.map(lambda w: w * scale, value)
        for key, value in params[name].items()
    }
    return {**params, name: own}


def _biased(path: Any, leaf: Array, rng: np.random.Generator) -> Array:
    """Biases that are not zero, so that a mistake in their gradient shows."""
    if jax.tree_util.keystr(path).endswith("['bias']"):
        return jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype)
    return leaf
