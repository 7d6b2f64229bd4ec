"""Batches spread over several devices: each works on its share of the samples, by JAX's own sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradlab.losses import Batch


def shard(batch: Batch, devices: Sequence[Any] | None = None, targets_per_step: bool = False) -> Batch:
    """The same batch with its samples spread over devices in equal shares.

    What is computed from it, by `gl.gradients`, `gl.compare` or `gl.train` (`Sharded`), is spread in the same way: the
    compiler gives every device its samples' steps and sums the gradients over the devices at the end. Results are those
    of one device up to rounding. Layers of Dense connections stay spread; a connection that folds time into the batch
    (a convolution) is gathered on every device, right but not faster.

    Args:
        batch: inputs [time, batch, features...], targets [batch, ...], mask [time, batch] or None.
        devices: `jax.devices()` by default; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two.
        targets_per_step: the targets are [time, batch, ...], as in `gl.PerStep(..., targets_per_step=True)`.

    Raises:
        ValueError: a batch whose samples are not a multiple of the devices.
    """
    mesh = _mesh(tuple(jax.devices() if devices is None else devices))
    size, count = batch.inputs.shape[1], mesh.size
    if size % count:
        raise ValueError(f"{size} samples cannot be shared equally by {count} devices: take a multiple of {count}")
    whole, by_step = PartitionSpec("samples"), PartitionSpec(None, "samples")
    return Batch(
        _placed(batch.inputs, NamedSharding(mesh, by_step)),
        _placed(batch.targets, NamedSharding(mesh, by_step if targets_per_step else whole)),
        None if batch.mask is None else _placed(batch.mask, NamedSharding(mesh, by_step)),
    )


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A task whose batches are spread over all devices (`shard`): `gl.train(net, gl.Sharded(task), ...)`.

    Args:
        task: a task, with `batch(key, size)`.
        targets_per_step: as in `shard`.
    """

    task: Any
    targets_per_step: bool = False

    def batch(self, key: Array, size: int) -> Batch:
        """The task's batch, spread over the devices."""
        make = getattr(self.task, "batch", self.task)
        return shard(make(key, size), targets_per_step=self.targets_per_step)


@cache
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), ("samples",))


def _placed(values: Array, sharding: NamedSharding) -> Array:
    if isinstance(values, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(values, sharding)
    return jax.device_put(values, sharding)
