"""W4, training throughput: samples per second of `gl.train` on Randman, compiled between probes.

The network of the study `randman_rates`: 50 inputs, three Dense layers of N, N and 10 units with leaky
integrate-and-fire neurons, 50 steps, a batch of 128. Between two probes 10 iterations run in one compiled stretch: the
batch is drawn, the gradient taken, the optimizer (Adamax) stepped. The floor is the time of the matrix products of the
same iterations, taken at every probe; `drawing` is the time of drawing the same batches.

Columns: `seeds`, trained in one call; `by`, gl.train as it is, or the same iteration under `jax.vmap` over the seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import gradlab as gl
from benchmarks import common
from benchmarks.common import Options, Row
from gradlab import rules
from gradlab.tasks import Randman

LOSS = gl.PerStep(optax.softmax_cross_entropy)
RUNS = (
    (rules.BPTT(), "sequence", 1),
    (rules.OSTL(), "sequence", 1),
    (rules.OSTL(), "step", 1),
    (rules.BPTT(), "sequence", 8),
)
UNITS, CLASSES = 50, 10


def network(width: int) -> gl.Network:
    neuron = gl.LIF(beta=0.9525741268224334)
    return gl.connect([m for units in (width, width, CLASSES) for m in (nn.Dense(units), neuron)])


def vmapped(
    net: gl.Network, task: Any, rule: rules.Rule, optimizer: Any, size: int, seeds: int, count: int
) -> Callable[[], Any]:
    """`count` iterations of all seeds side by side, compiled."""
    transformation = optimizer.build()

    def iteration(held: Any, key: Any) -> tuple[Any, None]:
        params, state = held
        batch = task.batch(key, size)
        gradient = gl.gradients(net, params, batch, LOSS, [rule], jax.random.fold_in(key, 1))[rule.name]
        updates, state = transformation.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def one(params: Any, key: Any) -> Any:
        begin = (params, transformation.init(params))
        return jax.lax.scan(iteration, begin, jax.random.split(key, count))[0]

    keys = jax.random.split(jax.random.key(0), seeds)
    example = task.batch(keys[0], size)
    params = jax.vmap(lambda key: net.init(key, example.inputs))(keys)
    compiled = jax.jit(jax.vmap(one)).lower(params, keys).compile()
    return lambda: compiled(params, keys)


def drawing(task: Any, size: int, seeds: int, count: int) -> Callable[[], Any]:
    """The batches of `count` iterations of all seeds, drawn one after the other, compiled."""

    def one(total: Any, key: Any) -> tuple[Any, None]:
        batch = task.batch(key, size)
        return total + batch.inputs.sum() + batch.targets.sum(), None

    keys = jax.random.split(jax.random.key(0), seeds * count)
    compiled = jax.jit(lambda k: jax.lax.scan(one, jnp.zeros(()), k)[0]).lower(keys).compile()
    return lambda: compiled(keys)


def timed_training(
    train: Callable[[int, Callable[..., None]], Any], beside: dict[str, common.Action], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every stretch of training ("train"), and of the actions that run at the probes between them."""
    times: dict[str, list[float]] = {"train": [], **{name: [] for name in beside}}
    began: list[float] = []

    def at_probe(step: int, params: Any) -> None:
        if len(began) > 1:  # the first stretch is compiled
            times["train"].append(time.perf_counter() - began[-1])
            for name, action in beside.items():
                begin = time.perf_counter()
                jax.block_until_ready(action())
                times[name].append(time.perf_counter() - begin)
        began.append(time.perf_counter())

    train(rounds + 1, at_probe)
    return times


def measure(width: int, rule: rules.Rule, update: str, seeds: int, options: Options) -> list[Row]:
    """Rows of one way to train."""
    toy = {"units": 4, "steps": 6, "alpha": 4.0}
    task = Randman(classes=CLASSES, **(toy if options.quick else {"units": UNITS}))
    size, count = (8, 2) if options.quick else (128, 10)
    net, optimizer = network(width), gl.Optimizer("adamax", learning_rate=1e-3)
    sizes = [(task.units, width), (width, width), (width, CLASSES)]
    beside = {"floor": common.floor(sizes, task.steps * size, repeats=seeds * count)}
    beside["drawing"] = drawing(task, size, seeds, count)
    if seeds > 1:
        beside["vmap"] = vmapped(net, task, rule, optimizer, size, seeds, count)
    for action in beside.values():
        jax.block_until_ready(action())

    def train(stretches: int, at_probe: Callable[..., None]) -> Any:
        run = partial(gl.train, net, task, LOSS, rule, optimizer, batch_size=size, update=update)
        return run(steps=stretches * count, probe_every=count, seeds=range(seeds), on_probe=at_probe)

    times = timed_training(train, beside, options.rounds_or(10 if seeds == 1 else 5))
    rows: list[Row] = []
    for name, by in (("train", "gl.train"), ("vmap", "vmap")):
        if name in times:
            row: Row = {"width": width, "rule": rule.name, "update": update, "seeds": seeds, "by": by}
            row["samples_per_second"] = 1e3 * size * count * seeds / common.milliseconds(times[name])
            row["over_floor"] = common.ratio(times, name, "floor")
            row["drawing_over_floor"] = common.ratio(times, "drawing", "floor")
            row["floor_ms_per_iteration"] = common.milliseconds(times["floor"]) / count
            rows.append(row)
    return rows


def run(options: Options) -> list[Row]:
    """One row per way to train."""
    runs = [(rules.BPTT(), "sequence", 2)] if options.quick else RUNS
    return [
        row
        for width in options.widths_or((128,))
        for rule, update, seeds in runs
        for row in measure(width, rule, update, seeds, options)
    ]
