"""Parameter trees as vectors in float64, and the names of their leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any


def path_names(tree: Params) -> list[str]:
    """The path of every leaf, "layer_0/connection/kernel", in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def flat(tree: Params) -> np.ndarray:
    """All entries of a tree as one vector of float64."""
    return np.concatenate([np.asarray(leaf, dtype=np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def unflat(vector: np.ndarray, like: Params) -> Params:
    """A vector as a tree of the shapes and dtypes of `like`: the inverse of `flat`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = [
        jnp.asarray(part.reshape(np.shape(leaf)), dtype=jnp.asarray(leaf).dtype)
        for part, leaf in zip(np.split(vector, ends), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def displacements(origin: Params, params: Params) -> np.ndarray:
    """`params` minus the origin, [points, parameters] in float64; leading axes of `params` are folded into points."""
    pairs = zip(jax.tree.leaves(origin), jax.tree.leaves(params), strict=True)
    parts = [
        (np.asarray(their, dtype=np.float64) - np.asarray(our, dtype=np.float64)).reshape(-1, np.size(our))
        for our, their in pairs
    ]
    return np.concatenate(parts, axis=1)


def leading_axes(origin: Params, params: Params, what: str) -> tuple[int, ...]:
    """The leading axes that `params` has beyond `origin`; `what` names it in errors (ValueError)."""
    our_names, their_names = path_names(origin), path_names(params)
    if our_names != their_names:
        odd = sorted(set(our_names) ^ set(their_names))
        raise ValueError(f"{what} and the origin are different trees; they do not share {', '.join(odd)}")
    leads = set()
    for name, our, their in zip(our_names, jax.tree.leaves(origin), jax.tree.leaves(params), strict=True):
        shape, base = np.shape(their), np.shape(our)
        if shape[len(shape) - len(base) :] != base:
            raise ValueError(f"{what}: {name} has the shape {shape}, not the origin's {base} at its end")
        leads.add(shape[: len(shape) - len(base)])
    if len(leads) > 1:
        raise ValueError(f"{what}: the leading axes differ between parameters: {sorted(leads)}")
    return leads.pop() if leads else ()


def require_same_shapes(origin: Params, params: Params, what: str) -> None:
    """Raise ValueError unless `params` has the structure and the shapes of `origin`."""
    lead = leading_axes(origin, params, what)
    if lead:
        raise ValueError(f"{what} has the leading axes {lead}: give one set of parameters, without such axes")


def layer_slices(tree: Params) -> dict[str, slice]:
    """{layer: its part of `flat(tree)`}; a layer is the first part of a path, "layer_0"."""
    found: dict[str, slice] = {}
    start = 0
    for name, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        layer, end = name.split("/")[0], start + int(np.size(leaf))
        found[layer] = slice(found[layer].start if layer in found else start, end)
        start = end
    return found
