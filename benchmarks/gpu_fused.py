"""One kernel for all time steps of a layer (`gradlab.fused`) against XLA's scan, for `gpu.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import Action, Clock, buildable, cases, ratios

import gradlab as gl
from gradlab import fused
from gradlab.plan import LayerRecord

UNROLLS = (1, 10, 50)


def neurons(clock: Clock, toy: bool) -> dict[str, Any]:
    """The neurons' steps alone, forwards and backwards, for several neurons and sizes."""
    steps = 8 if toy else 500
    kinds = {"LIF": gl.LIF(beta=0.9), "ALIF": gl.ALIF(), "CurrentLIF": gl.CurrentLIF()}
    sizes = [("LIF", 8)] if toy else [("LIF", 128), ("LIF", 1024), ("ALIF", 1024), ("LIF", 4096), ("CurrentLIF", 1024)]
    rows = cases(clock, sizes, lambda case: _neurons_case(clock, kinds[case[0]], case[1], steps, interpret=toy))
    return {"steps": steps, "batch": 8 if toy else 64, "rows": rows}


def _neurons_case(clock: Clock, neuron: Any, width: int, steps: int, interpret: bool) -> dict[str, Any]:
    batch = 8 if interpret else 64
    net = gl.connect([nn.Dense(width), neuron])
    params = net.init(jax.random.key(0), jnp.zeros((steps, batch, 3)))
    current = 0.1 + 0.3 * jax.random.normal(jax.random.key(1), (steps, batch, width))
    signal = jax.random.normal(jax.random.key(2), current.shape)
    zero = tuple(jnp.zeros((batch, width)) for _ in neuron.states)
    run = partial(fused.layer, net, params, 0, interpret=interpret)
    record = jax.jit(run)(zero, current)[1]
    pull = partial(fused.backward, net, params, 0, interpret=interpret)
    found: dict[str, Any] = {
        "firing_rate": float(record.output.mean()),
        "refusal": fused.refusal(net, params, 0, current),
    }
    for name, kernel, arguments in (("forward", run, (zero, current)), ("backward", pull, (record, zero, signal))):
        scan = _forward if name == "forward" else _backward
        functions = {f"scan, {n} at once": partial(scan, net, params, n) for n in UNROLLS} | {"kernel": kernel}
        failures: dict[str, str] = {}
        builders = {n: partial(_action, f, arguments) for n, f in functions.items()}
        actions = buildable(clock, builders, failures)
        found[name] = {"times": ratios(clock.times(actions), "scan, 1 at once"), "failures": failures}
        if "kernel" in actions:
            found[name]["difference"] = difference(actions["kernel"](), actions["scan, 1 at once"]())
    return found


def _action(function: Any, arguments: Any) -> Action:
    return partial(jax.jit(function), *arguments)


def _forward(net: gl.Network, params: Any, unroll: int, state: Any, current: Any) -> Any:
    def step(h: Any, now: Any) -> Any:
        after, s = net.neuron_step(params, 0, h, now)
        return after, (h, s)

    end, (before, output) = jax.lax.scan(step, state, current, unroll=unroll)
    return end, LayerRecord(before, current, output)


def _backward(net: gl.Network, params: Any, unroll: int, record: LayerRecord, cotangent: Any, signal: Any) -> Any:
    def step(p: Any, now: Any) -> Any:
        _, pull = jax.vjp(lambda h, i: net.neuron_step(params, 0, h, i), *now[:2])
        return pull((p, now[2]))

    return jax.lax.scan(step, cotangent, (record.state, record.current, signal), reverse=True, unroll=unroll)


def difference(found: Any, wanted: Any) -> float:
    """The largest difference of any entry, over the largest entry of its array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    worst = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def fused_gradient(net: gl.Network, loss: Any, params: Any, batch: gl.Batch) -> Any:
    """BPTT of a plain chain of layers: one product per layer for all steps, neurons in one kernel per layer."""
    records, x = [], batch.inputs
    states = net.initial_state(params, batch.inputs).states
    for layer, state in enumerate(states):
        current = net.current(params, net.links_into(layer)[0], x, lead=2)
        records.append((x, fused.layer(net, params, layer, state, current)[1]))
        x = records[-1][1].output
    signal, grads = loss.errors(x, batch), {}
    for layer in reversed(range(len(states))):
        (x, record), link = records[layer], net.links_into(layer)[0]
        end = jax.tree.map(jnp.zeros_like, states[layer])
        _, delta = fused.backward(net, params, layer, record, end, signal)
        grads[f"layer_{layer}"] = {"connection": net.weight_cotangent(params, link, x, delta, lead=2)}
        if layer:
            signal = net.input_cotangent(params, link, x, delta, lead=2)
    return grads
