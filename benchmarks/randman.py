"""What a batch of Randman costs, in training steps of the network that it feeds.

Run `python benchmarks/randman.py`. A training step is the gradient of a 50-128-128-10 network of leaky
integrate-and-fire neurons by backpropagation through time, written out here as one plain scan. Batches and
steps are timed in turn, round after round, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from gradlab.losses import Batch
from gradlab.tasks import Randman

LEAK, SLOPE = 0.9526, 25.0
LIMIT = 3.0  # a batch may cost at most this many training steps


@jax.custom_jvp
def spike(v: Array) -> Array:
    """1 where v > 0."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (SLOPE * jnp.abs(v) + 1) ** 2


def initial(key: Array, widths: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """Weights (LeCun normal) and biases (zero) of every layer."""
    kernel = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(widths) - 1)
    shapes = zip(keys, itertools.pairwise(widths), strict=True)
    return [(kernel(k, shape), jnp.zeros(shape[1])) for k, shape in shapes]


def outputs(params: list[tuple[Array, Array]], inputs: Array) -> Array:
    """Output spikes [steps, size, classes] of the network: leak, soft reset, threshold 1."""

    def step(membranes: list[Array], x: Array) -> tuple[list[Array], Array]:
        new = []
        for (weight, bias), v in zip(params, membranes, strict=True):
            v = LEAK * v + x @ weight + bias
            x = spike(v - 1)
            new.append(v - x)
        return new, x

    start = [jnp.zeros((inputs.shape[1], bias.shape[0])) for _, bias in params]
    return lax.scan(step, start, inputs)[1]


def loss(params: list[tuple[Array, Array]], batch: Batch) -> Array:
    """Mean over steps and samples of the cross-entropy of the output spikes."""
    return optax.softmax_cross_entropy(outputs(params, batch.inputs), batch.targets).mean()


def interleaved(actions: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every action, all actions timed once in every round."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for r in range(rounds + 2):
        for name, action in actions.items():
            start = time.perf_counter()
            jax.block_until_ready(action(r))
            if r >= 2:  # the first rounds compile and warm the caches
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def drawing(task: Randman, keys: Array, size: int) -> Callable[[int], object]:
    """Draw the batch of round r."""
    return lambda r: task.batch(keys[r], size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="samples in a batch")
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), arguments.rounds + 2)
    tasks = {"rate code": Randman(), "time code": Randman(code="time")}
    batch = tasks["rate code"].batch(keys[0], arguments.size)
    params = initial(jax.random.key(1), (50, 128, 128, 10))
    gradient = jax.jit(jax.grad(loss))
    actions: dict[str, Callable[[int], object]] = {"training step": lambda r: gradient(params, batch)}
    for name, task in tasks.items():
        actions[name] = drawing(task, keys, arguments.size)
    medians = interleaved(actions, arguments.rounds)
    step = medians.pop("training step")
    print(f"{jax.devices()[0].device_kind}, batch of {arguments.size}, medians of {arguments.rounds} rounds")
    print(f"{'training step':14s} {1e3 * step:7.2f} ms")
    for name, seconds in medians.items():
        verdict = "within" if seconds <= LIMIT * step else "ABOVE"
        cost = f"{1e3 * seconds:7.2f} ms = {seconds / step:.2f} training steps"
        print(f"{name:14s} {cost} ({verdict} the limit of {LIMIT:g})")


if __name__ == "__main__":
    main()
