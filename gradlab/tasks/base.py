"""What tasks share: their contract, random numbers that never change, random spike times, checks."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradlab.losses import Batch


@runtime_checkable
class Task(Protocol):
    """Anything with a pure `batch(key, size)`: the same key gives the same batch, inside jax.jit and outside.

    Tasks that should appear in a study are frozen dataclasses whose fields are plain numbers and strings.
    """

    def batch(self, key: Array, size: int) -> Batch:
        """A batch of `size` samples: inputs [steps, size, features...], targets [size, ...], mask or None."""
        ...


def fixed_uniform(shape: tuple[int, ...], seed: int, *stream: int) -> np.ndarray:
    """float64 U[0, 1) of a given shape, the same on every machine and NumPy version.

    (1) number = floor(bits / 2^11) 2^-53, bits: the raw PCG64 stream, which NumPy promises never to change

    Args:
        shape: shape of the numbers, drawn in C order.
        seed: a whole number, 0 or more.
        stream: whole numbers that name one of many independent streams of the seed.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(math.prod(shape))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def random_times(key: Array, counts: Array, steps: int) -> Array:
    """For each element of `counts`, exactly that many spikes on a uniformly random subset of the steps.

    Selection sampling: one pass over time and no sorting.

    (1) P(spike at t | the past) = r_t / (steps - t),   r_t: spikes still to be placed at step t = 0, 1, ...

    The subsets of different elements are independent.

    Args:
        key: a random key.
        counts: whole numbers in [0, steps], any shape.
        steps: number of time steps.

    Returns:
        float32 [steps, *counts.shape] of 0 and 1.
    """

    def step(left: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        step_key, remaining = now
        # u <= 1 - 2^-23, so that u * remaining < remaining even after rounding: every spike finds its place.
        chosen = jax.random.uniform(step_key, left.shape, jnp.float32) * remaining < left
        spikes = chosen.astype(jnp.float32)
        return left - spikes, spikes

    remaining = jnp.arange(steps, 0, -1, dtype=jnp.float32)
    return lax.scan(step, counts.astype(jnp.float32), (jax.random.split(key, steps), remaining))[1]


def check_whole(where: str, name: str, value: object, least: int) -> None:
    """Raise TypeError unless `value` is an int, ValueError if it lies below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}({name}={value!r}): give a whole number (int)")
    if value < least:
        raise ValueError(f"{where}({name}={value}): must be at least {least}")
