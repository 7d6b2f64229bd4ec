"""What the tests of the Randman task share: a small task and points of it."""

from __future__ import annotations

import jax
import numpy as np

from gradlab.tasks import Randman

SMALL = {"classes": 3, "units": 6, "steps": 20, "manifold_dim": 2, "alpha": 2.0}
KEY = jax.random.key(0)


def points(task: Randman, size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`size` random coordinates and classes."""
    rng = np.random.default_rng(seed)
    x = rng.random((size, task.manifold_dim), np.float32)
    return x, rng.integers(0, task.classes, size)
