"""Checkpoints of a training run: one .npz file, written by rename, never pickled."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.modules import describe

if TYPE_CHECKING:
    from gradlab.losses import Batch
    from gradlab.training import Plan

logger = logging.getLogger(__name__)


class Checkpoint:
    """Where a run is saved; does nothing without a path."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint

    def save(self, held: dict[str, Any]) -> None:
        """Write everything needed to go on, so that a kill at any moment leaves the old file or the new one."""
        if self.path is None:
            return
        arrays = {f"carry_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(held["carry"]))}
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
        """What was saved, with the carry in the structure of `like`; None when there is nothing, or of another run."""
        if self.path is None or not self.path.exists():
            return None
        with np.load(self.path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(arrays["about"].tobytes().decode())
        leaves, structure = jax.tree.flatten(like)
        carry = [arrays.get(f"carry_{i}") for i in range(len(leaves))]
        fits = all(new is not None and new.shape == old.shape for new, old in zip(carry, leaves, strict=True))
        if about["fingerprint"] != self.fingerprint or not fits:
            logger.warning("%s belongs to another run and is not continued: it will be overwritten", self.path)
            return None
        names = sorted((n for n in arrays if n.startswith("points_")), key=lambda n: int(n.split("_")[1]))
        params = jax.tree.structure(like["params"])
        points = [jax.tree.unflatten(params, [arrays[n][k] for n in names]) for k in range(len(arrays["probes"]))]
        return {
            "step": about["step"],
            "carry": jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in carry]),
            "loss": arrays["loss"],
            "probes": arrays["probes"].tolist(),
            "points": points,
        }


def fingerprint(plan: Plan, carry: Any, first: Batch, seeds: Sequence[int], steps: int, stretch: int) -> str:
    """A text that differs between runs that are not the same.

    Functions cannot be compared across processes, so the task, the initial parameters and the optimizer are told by
    what they do: six digits of the mean size of a batch, of the parameters, and of the first update under a gradient
    of ones.
    """
    params, optimizer = (jax.tree.map(lambda leaf: leaf[0], carry[name]) for name in ("params", "optimizer"))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(plan.transformation().update)(ones, optimizer, params)
    parts = {
        "rule": plan.rule.name,
        "update": plan.update,
        "form": plan.form,
        "loss": f"{plan.loss!r} {getattr(plan.loss.function, '__name__', '')}",
        "network": [f"{k.source}>{k.target} {describe(k.connection)}" for k in plan.net.links],
        "neurons": [describe(neuron) for neuron in plan.net.neurons],
        "sizes": [plan.batch_size, list(seeds), steps, stretch],
        "values": [_mean_sizes(carry["params"]), _mean_sizes(tuple(first)), _mean_sizes(updates)],
    }
    return re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(parts))


def _mean_sizes(tree: Any) -> list[str]:
    return [f"{np.abs(np.asarray(leaf, np.float64)).mean():.6g}" for leaf in jax.tree.leaves(tree)]
