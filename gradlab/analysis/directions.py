"""Directions in the space of weights, normalised after Li et al. (2018).

A random direction shows a sharpness that depends on how the weights happen to be scaled. Li et al. (2018,
Visualizing the Loss Landscape of Neural Nets, NeurIPS, arXiv:1712.09913) therefore scale it to the weights,

    (1)  d_i <- d_i * |w_i| / |d_i|      "filter": i runs over output units; "layer": over whole parameters
    (2)  d_i <- d_i * |w_i|              "weight": i runs over single entries

In Flax a Dense kernel is [in, out] and a Conv kernel [..., in, out]: the filter of an output unit is everything
but the last axis, a *column*. (The authors' code, written for kernels that begin with the output unit, adds 1e-10
to the denominator of (1); a filter of the direction that is zero stays zero here without it, and one as short as
a gradient can be is scaled exactly. In (2) that code multiplies by w itself: the same for random directions,
whose signs are as likely either way, but not for directions of your own.)

Parameters of fewer than two axes (biases, thresholds, leaks) have no filters. They are not moved under any
normalisation but "none"; neither are those that `ignore` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.analysis.trees import Params, path_names, require_same_shapes

Normalization = Literal["filter", "layer", "weight", "none"]

IGNORED = ("bias", "scale", "neuron")
"""What is not moved by default: biases, the scales of normalisation layers, and trained constants of neurons."""


def random_direction(
    params: Params, key: jax.Array, normalization: Normalization = "filter", ignore: Sequence[str] = IGNORED
) -> Params:
    """A direction with N(0, 1) entries, normalised to `params`; arguments and errors as `normalised`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    parts = [jax.random.normal(k, np.shape(w), jnp.asarray(w).dtype) for k, w in zip(keys, leaves, strict=True)]
    return normalised(jax.tree.unflatten(structure, parts), params, normalization, ignore)


def normalised(
    direction: Params, params: Params, normalization: Normalization = "filter", ignore: Sequence[str] = IGNORED
) -> Params:
    """A direction scaled to the weights `params`, equations (1) and (2), computed in float64.

    Args:
        direction: a tree like `params`.
        params: the weights w.
        normalization: "filter", "layer" or "weight"; "none" leaves the lengths as they are.
        ignore: names; the direction is zero in a parameter if one part of its path has such a name.

    Raises:
        ValueError: for an unknown normalization, trees that differ, or if nothing is left to move.
    """
    require_same_shapes(params, direction, "direction")
    still = set(ignored_paths(params, normalization, ignore))
    leaves, structure = jax.tree.flatten(params)
    parts = []
    for name, w, d in zip(path_names(params), leaves, jax.tree.leaves(direction), strict=True):
        moved = np.zeros(np.shape(w)) if name in still else _scaled(np.asarray(d), np.asarray(w), normalization)
        parts.append(jnp.asarray(moved, jnp.asarray(w).dtype))
    return jax.tree.unflatten(structure, parts)


def ignored_paths(params: Params, normalization: Normalization, ignore: Sequence[str] = IGNORED) -> tuple[str, ...]:
    """The paths of the parameters that a direction does not move."""
    if normalization not in get_args(Normalization):
        known = ", ".join(map(repr, get_args(Normalization)))
        raise ValueError(f"normalization must be one of {known}, not {normalization!r}")
    if isinstance(ignore, str):
        raise ValueError(f"ignore={ignore!r} is one string: give a tuple of names, ({ignore!r},)")
    names = path_names(params)
    still = tuple(
        name
        for name, w in zip(names, jax.tree.leaves(params), strict=True)
        if set(name.split("/")) & set(ignore) or (normalization != "none" and np.ndim(w) < 2)
    )
    if len(still) == len(names):
        raise ValueError(
            f"nothing to move: all of {', '.join(names)} are ignored (ignore={tuple(ignore)}, and with "
            f"normalization={normalization!r} parameters of fewer than two axes)"
        )
    return still


def _scaled(direction: np.ndarray, weights: np.ndarray, normalization: Normalization) -> np.ndarray:
    d, w = direction.astype(np.float64), weights.astype(np.float64)
    if normalization == "none":
        return d
    if normalization == "weight":
        return d * np.abs(w)
    axes: Any = tuple(range(w.ndim - (normalization == "filter")))  # all but the output units' axis, or all
    long, short = (np.sqrt(np.sum(array**2, axis=axes, keepdims=True)) for array in (w, d))
    return d * np.divide(long, short, out=np.zeros_like(short), where=short > 0)
