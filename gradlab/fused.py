"""A layer's neurons over all time steps in one kernel, states in registers: for graphics cards, off unless called.

XLA runs a scan over time as one launch of small kernels per step, which on a graphics card costs more than the steps
themselves. Here one Pallas kernel runs all steps of a block of units, forwards (`layer`) or backwards (`backward`), by
calling the neuron's own step, so that every elementwise neuron works that has the same constants in all units. Where
`refusal` gives a reason, both functions run the scan instead. Pallas is experimental in JAX: nothing else in gradlab
depends on this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.network import Network, Params
from gradlab.neurons import Neuron
from gradlab.plan import LayerRecord

UNITS = 128
"""Units (times samples) of one program at most: one per thread of four warps."""

STEPS = 4
"""Steps of one round of the loop at most: their loads do not wait for one another."""


def layer(
    net: Network, params: Params, layer: int, state: tuple[Array, ...], current: Array, interpret: bool = False
) -> tuple[tuple[Array, ...], LayerRecord]:
    """A layer's neurons over time, as `plan.run` steps them.

    (1) h_t, s_t = step(h_{t-1}, I_t),   t = 1..time

    Args:
        net, params, layer: whose neuron.
        state: h_0, a tuple of arrays [batch, units...].
        current: I, [time, batch, units...].
        interpret: run the kernel without compiling it, slowly, on any device: for tests.

    Returns:
        h at the end, and the record of state h_{t-1}, current I_t and output s_t, each [time, batch, units...].
    """

    def step(own: Any, h: Any, now: tuple[Array, ...]) -> tuple[Any, Any]:
        after, s = net.neuron_step(own, layer, h, now[0])
        return after, (s, *h)

    end, (output, *before) = _over_time(net, params, layer, step, state, (current,), False, interpret)
    return end, LayerRecord(tuple(before), current, output)


def backward(
    net: Network,
    params: Params,
    layer: int,
    record: LayerRecord,
    cotangent: tuple[Array, ...],
    signal: Array,
    interpret: bool = False,
) -> tuple[tuple[Array, ...], Array]:
    """The neurons' errors backwards through time, as BPTT's sweep steps them.

    (1) p_{t-1}, delta_t = J_t^T (p_t, L_t),   J_t the Jacobian of (1) of `layer`,   t = time..1

    Args:
        net, params, layer: whose neuron.
        record: what `layer` returned; its state and current are read.
        cotangent: p at the end, the error on the last state, a tuple of arrays [batch, units...].
        signal: L, the error on every output, [time, batch, units...].
        interpret: as in `layer`.

    Returns:
        p_0, the error on the first state, and delta, the error on every current, [time, batch, units...].
    """

    def step(own: Any, p: Any, now: tuple[Array, ...]) -> tuple[Any, Any]:
        error, current, *h = now
        _, pull = jax.vjp(lambda h, i: net.neuron_step(own, layer, h, i), tuple(h), current)
        before, delta = pull((p, error))
        return before, (delta,)

    rows = (signal, record.current, *record.state)
    before, (delta,) = _over_time(net, params, layer, step, cotangent, rows, True, interpret)
    return before, delta


def refusal(net: Network, params: Params, layer: int, current: Any) -> str | None:
    """Why a layer's steps cannot run in one kernel, or None; `current` has the shape [time, batch, units...]."""
    neuron = net.neurons[layer]
    if not isinstance(neuron, Neuron):
        return "the neuron is a Flax cell, whose units may see each other"
    fields = {f.name: getattr(neuron, f.name) for f in dataclasses.fields(neuron) if f.name != "trainable"}
    if named := [name for name, value in fields.items() if isinstance(value, tuple)]:
        return f"{', '.join(named)} differ from unit to unit"
    if jnp.result_type(current) != jnp.float32:
        return f"the current is {jnp.result_type(current)}, not float32"
    if _block(current.shape) < 32:
        return f"batch x units = {math.prod(current.shape[1:])} is no multiple of 32, the threads of a warp"
    return None


Step = Callable[[Any, Any, tuple[Array, ...]], tuple[Any, Any]]
"""(parameters, state, this step's rows) -> (next state, this step's results)."""


def _over_time(
    net: Network,
    params: Params,
    layer: int,
    step: Step,
    start: tuple[Array, ...],
    rows: tuple[Array, ...],
    reverse: bool,
    interpret: bool,
) -> tuple[Any, Any]:
    """`lax.scan` of a step that acts on each unit by itself, in one kernel where that can be."""

    def scan(params: Params, start: Any, rows: Any) -> tuple[Any, Any]:
        return jax.lax.scan(partial(step, params), start, rows, reverse=reverse)

    reason = refusal(net, params, layer, rows[0])
    if interpret and reason:
        raise ValueError(f"layer {layer} cannot run in one kernel: {reason}")
    if reason:
        return scan(params, start, rows)
    kernel = partial(_in_one_kernel, step, reverse=reverse, interpret=interpret)
    own = {name: value if name == f"layer_{layer}" else {} for name, value in params.items()}
    own[f"layer_{layer}"] = {k: v for k, v in own[f"layer_{layer}"].items() if k == "neuron"}
    if interpret:
        return kernel(own, start, rows)
    return jax.lax.platform_dependent(own, start, rows, cuda=kernel, default=scan)


def _in_one_kernel(
    step: Step, params: Params, start: tuple[Array, ...], rows: tuple[Array, ...], reverse: bool, interpret: bool
) -> tuple[Any, Any]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    shape = rows[0].shape
    n_steps, size, block = shape[0], math.prod(shape[1:]), _block(shape)
    constants, tree = jax.tree.flatten(params)
    flat = (
        [c.reshape(1) for c in constants],
        [h.reshape(size) for h in start],
        [x.reshape(n_steps, size) for x in rows],
    )
    results = jax.eval_shape(step, params, start, tuple(x[0] for x in rows))[1]
    kernel = partial(_kernel, step, tree, n_steps, reverse)
    one = pl.BlockSpec((1,), lambda i: (0,))
    unit = pl.BlockSpec((block,), lambda i: (i,))
    line = pl.BlockSpec((n_steps, block), lambda i: (0, i))
    end, found = pl.pallas_call(
        kernel,
        grid=(size // block,),
        in_specs=jax.tree.map(
            lambda x, spec: spec, flat, ([one] * len(flat[0]), [unit] * len(start), [line] * len(rows))
        ),
        out_specs=([unit] * len(start), [line] * len(results)),
        out_shape=(
            [jax.ShapeDtypeStruct((size,), h.dtype) for h in start],
            [jax.ShapeDtypeStruct((n_steps, size), r.dtype) for r in results],
        ),
        compiler_params=triton.CompilerParams(num_warps=max(block // 32, 1)),
        interpret=interpret,
        name="neurons_backward" if reverse else "neurons_forward",
    )(*flat)
    return tuple(h.reshape(shape[1:]) for h in end), tuple(x.reshape(shape) for x in found)


def _kernel(
    step: Step, tree: Any, n_steps: int, reverse: bool, constants: Any, start: Any, rows: Any, end: Any, found: Any
) -> None:
    """The steps of one block of units; all arguments after `reverse` are references to memory."""
    params = jax.tree.unflatten(tree, [ref[0] for ref in constants])
    stride = next(n for n in range(STEPS, 0, -1) if n_steps % n == 0)

    def several(number: Array, h: Any) -> Any:
        times = [number * stride + k for k in range(stride)]
        times = [n_steps - 1 - t for t in times] if reverse else times
        loaded = [tuple(ref[t, :] for ref in rows) for t in times]
        for t, now in zip(times, loaded, strict=True):
            h, results = step(params, h, now)
            for ref, value in zip(found, results, strict=True):
                ref[t, :] = value
        return h

    last = jax.lax.fori_loop(0, n_steps // stride, several, tuple(ref[:] for ref in start))
    for ref, value in zip(end, last, strict=True):
        ref[:] = value


def _block(shape: tuple[int, ...]) -> int:
    """Units of one program: the largest power of two up to UNITS that divides batch x units."""
    return math.gcd(math.prod(shape[1:]), UNITS)
