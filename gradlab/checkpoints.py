"""Checkpoints of a training run: one .npz file, written by rename, never pickled, continued by the same run only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab.factories import Optimizer
from gradlab.modules import describe, is_hashable

if TYPE_CHECKING:
    from gradlab.losses import Batch
    from gradlab.training import Plan

_WAY_OUT = "Nothing was computed or overwritten: give another file, or delete this one"
_UPDATES = 500
"""How many of a run's updates tell its optimizer: the first ones, and as many again, evenly spaced over the run."""


class Checkpoint:
    """Where a run is saved; does nothing without a path."""

    def __init__(self, path: str | Path | None, fingerprint: dict[str, str]) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint

    def save(self, held: dict[str, Any]) -> None:
        """Write everything needed to go on, so that a kill at any moment leaves the old file or the new one."""
        if self.path is None:
            return
        arrays = {f"carry_{i}": _numbers(leaf) for i, leaf in enumerate(jax.tree.leaves(held["carry"]))}
        points = [jax.tree.leaves(point) for point in held["points"]]
        arrays |= {f"points_{i}": np.stack(leaves) for i, leaves in enumerate(zip(*points, strict=True))}
        arrays |= {"loss": held["loss"], "probes": np.asarray(held["probes"])}
        about = json.dumps({"fingerprint": self.fingerprint, "step": held["step"]})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
        temporary.replace(self.path)

    def load(self, like: Any) -> dict[str, Any] | None:
        """What was saved, with the carry in the structure of `like`; None when there is no file.

        Raises:
            ValueError: the file belongs to another run, or is no checkpoint.
        """
        if self.path is None or not self.path.exists():
            return None
        arrays, about = self._read(self.path)
        leaves, structure = jax.tree.flatten(like)
        names = sorted((n for n in arrays if n.startswith("points_")), key=lambda n: int(n.split("_")[1]))
        params = jax.tree.structure(like["params"])
        points = [jax.tree.unflatten(params, [arrays[n][k] for n in names]) for k in range(len(arrays["probes"]))]
        carry = [_restored(arrays[f"carry_{i}"], leaf) for i, leaf in enumerate(leaves)]
        return {
            "step": about["step"],
            "carry": jax.tree.unflatten(structure, carry),
            "loss": arrays["loss"],
            "probes": arrays["probes"].tolist(),
            "points": points,
        }

    def _read(self, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and the facts in the file, once it is clear that they are of this run."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            about = json.loads(arrays["about"].tobytes().decode())
            found = dict(about["fingerprint"])
        except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no checkpoint of gradlab, or a damaged one. {_WAY_OUT}") from error
        others = [part for part, digest in self.fingerprint.items() if found.get(part) != digest]
        if others:
            raise ValueError(f"The checkpoint {path} is of another run: {', '.join(others)} differ. {_WAY_OUT}")
        return arrays, about


def fingerprint(
    plan: Plan, carry: Any, first: Batch, iterate: Callable[[Any, int], Any], sizes: dict[str, Any]
) -> dict[str, str]:
    """Texts (SHA-256), by part of a run, that are equal for two starts of the same run and differ between runs.

    Functions cannot be compared across processes, so what cannot be read is told by what it does, to the last bit: the
    optimizer by its updates along the run, everything else by two iterations of the run. Equal bits are promised on the
    same machine, with the same versions: a run is not continued elsewhere.

    Args:
        plan: the run.
        carry: parameters, optimizer and rule of all seeds before the first iteration.
        first: the first batch.
        iterate: (carry, number of the iteration) -> carry after this iteration, and its loss.
        sizes: "steps" and what else the run is told by.
    """
    # One iteration holds one update, one for each time step, or one for each window of steps.
    n_steps = first.inputs.shape[0]
    rate = -(-n_steps // plan.update) if isinstance(plan.update, int) else {"step": n_steps, "sequence": 1}[plan.update]
    frozen = getattr(getattr(type(plan.task), "__dataclass_params__", None), "frozen", False)
    places = sorted({0, sizes["steps"] // 2})
    parts: dict[str, Any] = {
        "settings": [plan.update, plan.form, plan.batch_size, json.dumps(sizes)],
        "learning rule": plan.rule.name,
        "loss": repr(plan.loss),
        "network": [f"{k.source}>{k.target} {k.delay} {describe(k.connection)}" for k in plan.net.links]
        + [describe(neuron) for neuron in plan.net.neurons],
        "task": [repr(plan.task) if frozen else "", tuple(first)],
        "optimizer": [
            repr(plan.optimizer) if isinstance(plan.optimizer, Optimizer) else "",
            _updates(plan, carry, sizes["steps"] * rate),
        ],
        "initial parameters": carry["params"],
        "results of an iteration": [
            iterate(carry | {"optimizer": _advanced(carry["optimizer"], place * rate)}, place) for place in places
        ],
    }
    return {name: _digest(part) for name, part in parts.items()}


def _updates(plan: Plan, carry: Any, total: int) -> Any:
    """Per parameter array, the sums of the updates made of a gradient of many sizes, along a run of `total` updates.

    What the first 500 updates show is seen; later in longer runs, what a schedule does at 500 evenly spaced updates.
    """
    params, optimizer = (jax.tree.map(lambda leaf: leaf[0], carry[name]) for name in ("params", "optimizer"))
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    gradient = jax.tree.unflatten(structure, [jnp.asarray(random.normal(size=p.shape), p.dtype) for p in leaves])
    counts = np.full(min(total, _UPDATES), -1, np.int32)
    if total > _UPDATES:
        counts = np.append(counts, np.linspace(0, min(total, 2**31) - 1, _UPDATES).round().astype(np.int32))

    # Sizes of 1e-3 to 1e3, so that the threshold of a clipping is seen.
    sizes = 10.0 ** (np.arange(len(counts)) % 7 - 3)
    # A function of the user's may change between two runs; a program compiled for it would not see that.
    lasting = isinstance(plan.optimizer, Optimizer) and is_hashable(plan)
    sums = partial(_jitted_sums, plan) if lasting else jax.jit(partial(_sums, plan))
    return sums(optimizer, params, gradient, counts, sizes)


def _sums(plan: Plan, state: Any, params: Any, gradient: Any, counts: Array, sizes: Array) -> Any:
    """Per step and parameter array the sum of the optimizer's update."""
    transformation = plan.transformation()

    def one(state: Any, now: tuple[Array, Array]) -> tuple[Any, Any]:
        count, size = now
        scaled = jax.tree.map(lambda leaf: leaf * size.astype(leaf.dtype), gradient)
        updates, state = transformation.update(scaled, _advanced(state, count), params)
        return state, jax.tree.map(jnp.sum, updates)

    return jax.lax.scan(one, state, (counts, sizes))[1]


_jitted_sums = jax.jit(_sums, static_argnums=0)


def _advanced(tree: Any, count: Any) -> Any:
    """An optimizer's state whose counters, as schedules read them, stand at `count`; as they are if it is negative."""

    def at(path: Any, leaf: Any) -> Any:
        name = getattr(path[-1], "name", getattr(path[-1], "key", "")) if path else ""
        if name != "count" or not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jnp.where(count < 0, leaf, count).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(at, tree)


def _digest(part: Any) -> str:
    """SHA-256 of texts and arrays, without the addresses in memory that differ in every process."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(part):
        if isinstance(leaf, str):
            content = re.sub(r" at 0x[0-9a-fA-F]+", "", leaf).encode()
            digest.update(f"text {len(content)} ".encode() + content)
        else:
            numbers = _numbers(leaf)
            digest.update(f"{numbers.dtype} {numbers.shape} ".encode() + numbers.tobytes())
    return digest.hexdigest()


def _numbers(leaf: Any) -> np.ndarray:
    """An array as NumPy can hold it; the random keys that some optimizers carry become whole numbers."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _restored(numbers: np.ndarray, like: Any) -> Array:
    """What `_numbers` was made of."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(numbers), impl=jax.random.key_impl(like))
    return jnp.asarray(numbers)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
