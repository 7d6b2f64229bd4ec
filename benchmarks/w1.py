"""W1, the reference workload: one gradient of three layers of leaky integrate-and-fire neurons, against its floor.

Three Dense layers (the last one with 10 units) of width N, 500 steps, a batch of 64, softmax cross-entropy, float32:
the forward pass and the gradient of all weights, every layer firing on 3 to 20 % of its steps. The floor is the time of
the matrix products alone (`common.floor`).

Programs: `tape`, BPTT as gradlab computes it; `tape, sparse`, the same with `SparseProducts`, which adds up the weights
that spikes select and so may stay below the floor; `autodiff`, `jax.grad` of gradlab's forward pass; `scan`, `jax.grad`
of a plain scan over time steps, as most libraries do it; `OSTL`, a local rule on the same tape; with `--devices 2` also
`tape, spread`, the same BPTT on a batch that `gl.shard` spreads over so many devices (on a CPU, parts of it);
where JAX sees several devices the other programs are up to a tenth slower than on one (`modules.apply_to_steps`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import gradlab as gl
from benchmarks import common
from benchmarks.common import Options, Row
from gradlab import rules
from gradlab.sparse_products import SparseProducts

LOSS = gl.PerStep(optax.softmax_cross_entropy)
CLASSES = 10
WIDTHS = (128, 256, 512, 1024)


def layer_sizes(width: int, outputs: int = CLASSES) -> list[tuple[int, int]]:
    """(inputs, outputs) of the three layers."""
    return [(width, width), (width, width), (width, outputs)]


def network(width: int, outputs: int = CLASSES, **dense: Any) -> gl.Network:
    """Three layers of leaky integrate-and-fire neurons; `dense` are settings of their Dense connections."""
    modules = [(nn.Dense(units, **dense), gl.LIF(beta=0.9)) for _, units in layer_sizes(width, outputs)]
    return gl.connect([module for pair in modules for module in pair])


def case(width: int, steps: int, batch: int, outputs: int = CLASSES) -> tuple[gl.Network, Any, gl.Batch]:
    """The network, parameters under which every layer fires on 3 to 20 % of steps, and a batch of spike trains.

    Raises:
        RuntimeError: no such parameters were found.
    """
    net = network(width, outputs)
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype(jnp.float32)
    params = net.init(jax.random.key(1), inputs)
    data = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(batch) % outputs, outputs))
    for layer in net.layer_names:
        for _ in range(20):
            rate = gl.evaluate(net, params, data, LOSS)["firing_rate"][layer]
            if 0.05 <= rate <= 0.15:
                break
            factor = 1.25 if rate < 0.05 else 0.85
            params = {**params, layer: jax.tree.map(lambda leaf, f=factor: leaf * f, params[layer])}
    found = gl.evaluate(net, params, data, LOSS)["firing_rate"]
    if not all(0.03 <= rate <= 0.2 for rate in found.values()):
        raise RuntimeError(f"a layer is outside 3 to 20 % of steps: {found}")
    return net, params, data


def scan_loss(net: gl.Network, params: Any, batch: gl.Batch) -> Any:
    """The loss of a plain scan over time steps."""

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state, _, outputs = net.step(params, state, x)
        return state, outputs[-1]

    outputs = jax.lax.scan(step, net.initial_state(params, batch.inputs), batch.inputs)[1]
    return LOSS(outputs, batch)


def gradient_of(net: gl.Network, rule: rules.Rule) -> Any:
    """The compiled function (parameters, batch) -> gradient of one rule."""
    return jax.jit(lambda p, b: gl.gradients(net, p, b, LOSS, [rule], jax.random.key(3)))


def functions(net: gl.Network, sparse: gl.Network) -> dict[str, Any]:
    """Every program, to be compiled for (parameters, batch); `sparse` is the network with sparse products."""
    return {
        "tape": gradient_of(net, rules.BPTT()),
        "tape, sparse": gradient_of(sparse, rules.BPTT()),
        "autodiff": gradient_of(net, rules.BPTT(form="autodiff")),
        "OSTL": gradient_of(net, rules.OSTL()),
        "scan": jax.jit(jax.grad(lambda p, b: scan_loss(net, p, b))),
    }


def run(options: Options) -> list[Row]:
    """One row per width and program."""
    steps, batch = (12, 8) if options.quick else (500, 64)
    return [row for width in options.widths_or(WIDTHS) for row in measure(width, steps, batch, options)]


def measure(width: int, steps: int, batch: int, options: Options) -> list[Row]:
    """The rows of one width."""
    net, params, data = case(width, steps, batch)
    sparse = network(width, dot_general=SparseProducts())
    compiled = {name: f.lower(params, data).compile() for name, f in functions(net, sparse).items()}
    actions = {"floor": common.floor(layer_sizes(width), steps * batch)}
    actions |= {name: (lambda c=program: c(params, data)) for name, program in compiled.items()}
    if len(jax.devices()) > 1:
        spread, function = gl.shard(data), gradient_of(net, rules.BPTT())
        compiled["tape, spread"] = function.lower(params, spread).compile()
        actions["tape, spread"] = lambda: function(params, spread)
    times = common.interleaved(actions, options.rounds_or(15 if width < 1024 else 7))
    return [
        {
            "width": width,
            "program": name,
            "over_floor": common.ratio(times, name, "floor"),
            "ms": common.milliseconds(times[name]),
            "floor_ms": common.milliseconds(times["floor"]),
            "temporary_MB": common.temporary_megabytes(program),
        }
        for name, program in compiled.items()
    ]
