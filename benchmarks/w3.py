"""W3, a loss landscape: a filter-normalised surface of 51 x 51 points, forward passes only.

A Dense layer of width N with leaky integrate-and-fire neurons and a read-out layer of 10 such units, 50 steps, a batch
of 64, softmax cross-entropy, float32. The floor is the time of the products that are left when the first layer's
currents are computed once for the whole surface: three of the first layer, and one of the read-out layer per point,
each with all steps and samples at once.

Programs: `gradlab`, `gradlab.analysis.landscape.surface`; `gradlab, point by point`, what it does with a function that
it cannot look into; `plain, K at once`, a scan over steps written by hand, mapped over the points in groups of K by
vmap (the best of them is what one gets without gradlab); `plain, a call per point`, that program called in a loop, as
tools for landscapes do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradlab as gl
from benchmarks import common
from benchmarks.common import Options, Row
from gradlab.analysis import linear_currents
from gradlab.analysis.landscape import Plane, loss_function, random_plane, surface
from gradlab.analysis.objective import NetworkLoss

CLASSES = 10
BETA = 0.9
GROUPS = (1, 4, 16)
LOSS = gl.PerStep(optax.softmax_cross_entropy)


def case(width: int, steps: int, batch: int) -> tuple[NetworkLoss, Plane]:
    """A network after 30 updates of BPTT, as a function of its parameters, and a plane through them."""
    net = gl.connect([nn.Dense(width), gl.LIF(beta=BETA), nn.Dense(CLASSES), gl.LIF(beta=BETA)])
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype(jnp.float32)
    function = loss_function(net, gl.Batch(inputs, jax.nn.one_hot(jnp.arange(batch) % CLASSES, CLASSES)), LOSS)
    optimizer = optax.adam(1e-2)
    params = jax.tree.map(lambda leaf: 2.0 * leaf, net.init(jax.random.key(1), inputs))

    @jax.jit
    def trained(params: Any) -> Any:
        def update(carry: Any, _: None) -> Any:
            now, state = carry
            change, state = optimizer.update(jax.grad(function)(now), state)
            return (optax.apply_updates(now, change), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), None, length=30)[0][0]

    return function, random_plane(trained(params), jax.random.key(2))


def plain_loss(params: Any, inputs: Any, targets: Any) -> Any:
    """The same loss in plain JAX: products of all steps at once, then a scan over the steps."""

    def layer(x: Any, own: Any) -> Any:
        current = x @ own["connection"]["kernel"] + own["connection"]["bias"]

        def step(u: Any, i: Any) -> Any:
            v = BETA * u + i
            spike = (v >= 1.0).astype(v.dtype)
            return v - spike, spike

        return jax.lax.scan(step, jnp.zeros_like(current[0]), current)[1]

    outputs = layer(layer(inputs, params["layer_0"]), params["layer_1"])
    return optax.softmax_cross_entropy(outputs, targets).mean()


def plain(function: NetworkLoss, plane: Plane, points: np.ndarray, group: int) -> Callable[[], Any]:
    """All points in one compiled program, `group` at once."""

    @jax.jit
    def run(origin: Any, x: Any, y: Any, inputs: Any, targets: Any, points: Any) -> Any:
        def at(c: Any) -> Any:
            params = jax.tree.map(lambda o, dx, dy: o + c[0] * dx + c[1] * dy, origin, x, y)
            return plain_loss(params, inputs, targets)

        return jax.lax.map(at, points, batch_size=group if group > 1 else None)

    given = (plane.origin, plane.x, plane.y, function.batch.inputs, function.batch.targets, jnp.asarray(points))
    return lambda: run(*given)


def call_per_point(function: NetworkLoss, plane: Plane, points: np.ndarray) -> Callable[[], list[float]]:
    """One call of a compiled program per point."""
    run = jax.jit(plain_loss)
    move = jax.jit(lambda a, b: plane.point(a, b))
    return lambda: [float(run(move(a, b), function.batch.inputs, function.batch.targets)) for a, b in points.tolist()]


def floor(width: int, rows: int, points: int) -> Callable[[], Any]:
    """The products that remain."""
    keys = jax.random.split(jax.random.key(3), 4)
    inputs, spikes = (jax.random.normal(key, (rows, width)) for key in keys[:2])
    weights = jax.random.normal(keys[2], (3, width, width))
    readouts = jax.random.normal(keys[3], (points, width, CLASSES))

    @jax.jit
    def run(inputs: Any, spikes: Any, weights: Any, readouts: Any) -> Any:
        # One entry of each product is kept: storing them all would take longer than the products.
        first = [jax.lax.dot(inputs, w) for w in weights]
        return first, jax.lax.map(lambda w: jax.lax.optimization_barrier(jax.lax.dot(spikes, w))[0, 0], readouts)

    return lambda: run(inputs, spikes, weights, readouts)


def temporary_megabytes(function: NetworkLoss, plane: Plane, points: int) -> float | None:
    """Temporary memory of the program that gradlab runs over blocks of a surface of so many points."""
    ways = (plane.x, plane.y)
    terms = jax.jit(linear_currents._terms)(function, plane.origin, ways)
    together, block = linear_currents._sizes(function, plane.origin, points, None)
    run = jax.jit(linear_currents._block, static_argnames=("together", "small"))
    small = linear_currents._is_small(function, plane.origin)
    given = (function, terms, plane.origin, ways, jnp.zeros((block, 2)))
    return common.temporary_megabytes(run.lower(*given, together=together, small=small).compile())


def measure(width: int, steps: int, batch: int, side: int, options: Options) -> list[Row]:
    """The rows of one width."""
    function, plane = case(width, steps, batch)
    axis = np.linspace(-1.0, 1.0, side)
    grid_b, grid_a = np.meshgrid(axis, axis, indexing="ij")
    points = np.stack([grid_a.ravel(), grid_b.ravel()], axis=1)
    one_by_one = jax.jit(partial(linear_currents._one_by_one, batch_size=None))
    given = (function, plane.origin, (plane.x, plane.y), jnp.asarray(points))
    actions: dict[str, Callable[[], Any]] = {
        "floor": floor(width, steps * batch, len(points)),
        "gradlab": lambda: surface(function, plane, axis, axis).loss,
        "gradlab, point by point": lambda: one_by_one(*given),
        **{f"plain, {group} at once": plain(function, plane, points, group) for group in GROUPS},
        "plain, a call per point": call_per_point(function, plane, points),
    }
    found = {name: np.ravel(action()) for name, action in actions.items() if name != "floor"}
    times = common.interleaved(actions, options.rounds_or(5), warm=1)
    times["best plain"] = [min(now) for now in zip(*(times[f"plain, {g} at once"] for g in GROUPS), strict=True)]
    return [
        {
            "width": width,
            "points": len(points),
            "program": name,
            "over_best_plain": common.ratio(times, name, "best plain"),
            "over_floor": common.ratio(times, name, "floor"),
            "ms_per_point": common.milliseconds(times[name]) / len(points),
            # A spike that rounding moves makes a small jump: more than that would be another surface.
            "largest_difference": float(np.abs(losses - found["plain, 1 at once"]).max()),
            **(
                {
                    "temporary_MB": temporary_megabytes(function, plane, len(points)),
                    "temporary_MB_11x11": temporary_megabytes(function, plane, 121),
                }
                if name == "gradlab"
                else {}
            ),
        }
        for name, losses in found.items()
    ]


def run(options: Options) -> list[Row]:
    """One row per width and program."""
    steps, batch, side = (8, 4, 5) if options.quick else (50, 64, 51)
    return [row for width in options.widths_or((128,)) for row in measure(width, steps, batch, side, options)]
