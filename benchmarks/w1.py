"""The reference workload W1: one gradient of three layers of leaky integrate-and-fire neurons, against its floor.

Run `python benchmarks/w1.py --widths 128 256`. Three Dense layers (the last one with 10 units) of width N, 500 steps, a
batch of 64, softmax cross-entropy, float32: the forward pass and the gradient of all weights. The floor is the time of
the matrix products alone, `jax.lax.dot` at the same sizes in the same run: forward, backward through all layers but the
first, and the weights' gradients. All programs are timed once in every round, so that whatever else the machine does
slows all of them; what is printed is the median over rounds of the ratio to the floor within a round.

Programs: `tape`, BPTT as gradlab computes it; `autodiff`, `jax.grad` of gradlab's forward pass; `scan`, `jax.grad` of a
plain scan over time steps, as most libraries do it; `OSTL`, a local rule on the same tape.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import gradlab as gl
from gradlab import rules

LOSS = gl.PerStep(optax.softmax_cross_entropy)
CLASSES = 10


def case(width: int, steps: int, batch: int) -> tuple[gl.Network, Any, gl.Batch]:
    """The network, parameters under which every layer fires on 3 to 20 % of steps, and a batch of spike trains."""
    modules = [m for units in (width, width, CLASSES) for m in (nn.Dense(units), gl.LIF(beta=0.9))]
    net = gl.connect(modules)
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype(jnp.float32)
    params = net.init(jax.random.key(1), inputs)
    data = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(batch) % CLASSES, CLASSES))
    for layer in net.layer_names:
        for _ in range(12):
            rate = gl.evaluate(net, params, data, LOSS)["firing_rate"][layer]
            if 0.05 <= rate <= 0.15:
                break
            factor = 1.25 if rate < 0.05 else 0.85
            params = {**params, layer: jax.tree.map(lambda leaf, f=factor: leaf * f, params[layer])}
    found = gl.evaluate(net, params, data, LOSS)["firing_rate"]
    if not all(0.03 <= rate <= 0.2 for rate in found.values()):
        raise RuntimeError(f"a layer is outside 3 to 20 % of steps: {found}")
    return net, params, data


def floor(width: int, rows: int) -> Callable[[], Any]:
    """The products alone, of all steps and samples at once."""
    sizes = [(width, width), (width, width), (width, CLASSES)]
    keys = iter(jax.random.split(jax.random.key(2), 9))
    inputs = [jax.random.normal(next(keys), (rows, a)) for a, _ in sizes]
    weights = [jax.random.normal(next(keys), size) for size in sizes]
    errors = [jax.random.normal(next(keys), (rows, b)) for _, b in sizes]

    @jax.jit
    def products(inputs: Any, weights: Any, errors: Any) -> Any:
        forward = [jax.lax.dot(x, w) for x, w in zip(inputs, weights, strict=True)]
        back = [jax.lax.dot(e, w.T) for e, w in zip(errors[1:], weights[1:], strict=True)]
        gradients = [jax.lax.dot(x.T, e) for x, e in zip(inputs, errors, strict=True)]
        return forward, back, gradients

    return lambda: products(inputs, weights, errors)


def scan_loss(net: gl.Network, params: Any, batch: gl.Batch) -> Any:
    """The loss of a plain scan over time steps."""

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state, _, outputs = net.step(params, state, x)
        return state, outputs[-1]

    outputs = jax.lax.scan(step, net.initial_state(params, batch.inputs), batch.inputs)[1]
    return LOSS(outputs, batch)


def programs(width: int, steps: int, batch: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every program, compiled, with its arguments."""
    net, params, data = case(width, steps, batch)
    key = jax.random.key(3)

    def rule(chosen: Any) -> Any:
        return jax.jit(lambda p, b: gl.gradients(net, p, b, LOSS, [chosen], key))

    functions = {
        "tape": rule(rules.BPTT()),
        "autodiff": rule(rules.BPTT(form="autodiff")),
        "OSTL": rule(rules.OSTL()),
        "scan": jax.jit(jax.grad(lambda p, b: scan_loss(net, p, b))),
    }
    return {name: (f.lower(params, data).compile(), (params, data)) for name, f in functions.items()}


def measure(width: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of every program's time over the floor's, and its temporary memory."""
    found = programs(width, options.steps, options.batch)
    actions: dict[str, Callable[[], Any]] = {"floor": floor(width, options.steps * options.batch)}
    actions |= {name: (lambda c=compiled, a=data: c(*a)) for name, (compiled, data) in found.items()}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(options.rounds + 2):
        for name, action in actions.items():
            begin = time.perf_counter()
            jax.block_until_ready(action())
            if number >= 2:  # the first rounds warm the caches
                times[name].append(time.perf_counter() - begin)
    row: dict[str, Any] = {"width": width, "floor_ms": 1e3 * statistics.median(times["floor"])}
    for name, (compiled, _) in found.items():
        ratios = [own / base for own, base in zip(times[name], times["floor"], strict=True)]
        analysis = compiled.memory_analysis()
        megabytes = None if analysis is None else analysis.temp_size_in_bytes / 1e6
        row[name] = {"ratio": statistics.median(ratios), "temporary_megabytes": megabytes}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    rows = [measure(width, options) for width in options.widths]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}: time over the floor (memory)")
    for row in rows:
        cells = [
            f"{n} {c['ratio']:.2f} ({c['temporary_megabytes'] or 0:.0f} MB)"
            for n, c in row.items()
            if isinstance(c, dict)
        ]
        print(f"N = {row['width']:5d}  floor {row['floor_ms']:.1f} ms   {'   '.join(cells)}")
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
