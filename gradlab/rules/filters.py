"""Linear filters with a few states, forwards in time and their exact transpose backwards.

A filter is a `Subthreshold`: (1) h_t = A h_{t-1} + B x_t,  y_t = c . h_t.  Its transpose, run backwards in time, is
(2) lambda_t = c L_t + A^T lambda_{t+1},  out_t = B . lambda_t,  so that sum_t L_t y_t = sum_t out_t x_t for any x and
L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.neurons import Subthreshold

States = tuple[Any, ...]


def normalised(filter: Subthreshold) -> Subthreshold:
    """The filter scaled to an instantaneous gain of one: impulse response c A^tau B / (c B)."""
    gain = filter.gain
    return filter._replace(c=tuple(c / gain for c in filter.c))


def zeros(filter: Subthreshold, like: Any) -> States:
    """The filter's state at rest for signals shaped like `like` (a pytree)."""
    return tuple(jax.tree.map(jnp.zeros_like, like) for _ in filter.B)


def forward(
    filter: Subthreshold, h: States, x: Any, scale: Callable[[Array, Any], Any] | None = None
) -> tuple[States, Any]:
    """One step of (1) on a pytree x; `scale(factor, leaf)` multiplies where factors are per unit and leaves have more
    axes.
    """
    times = _plain if scale is None else scale
    h = tuple(
        _add([*(_tree(times, a, state) for a, state in zip(row, h, strict=True)), _tree(times, b, x)])
        for row, b in zip(filter.A, filter.B, strict=True)
    )
    return h, _add([_tree(times, c, state) for c, state in zip(filter.c, h, strict=True)])


def transpose(filter: Subthreshold, p: States, signal: Array) -> tuple[States, Array]:
    """One step of (2) backwards in time; p carries A^T lambda_{t+1}."""
    lam = tuple(p_i + c * signal for p_i, c in zip(p, filter.c, strict=True))
    out = _add([b * state for b, state in zip(filter.B, lam, strict=True)])
    k = range(len(lam))
    return tuple(_add([filter.A[i][j] * lam[i] for i in k]) for j in k), out


def _plain(factor: Array, leaf: Array) -> Array:
    return factor * leaf


def _tree(times: Callable[[Array, Any], Any], factor: Array, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: times(factor, leaf), tree)


def _add(trees: list[Any]) -> Any:
    total = trees[0]
    for tree in trees[1:]:
        total = jax.tree.map(lambda a, b: a + b, total, tree)
    return total
