"""Planes through the space of weights, for loss landscapes.

A plane is a point (the origin) and two directions of the same shape as the parameters:

    (1)  theta(a, b) = origin + a * x + b * y

Random directions are scaled filter by filter (Li et al. 2018, Visualizing the Loss Landscape of Neural
Nets, NeurIPS, arXiv:1712.09913), because otherwise the sharpness seen depends on how weights happen to be
scaled:

    (2)  d_i <- d_i * |w_i| / (|d_i| + 1e-10)          i: one output unit

In Flax a Dense kernel is [in, out] and a Conv kernel [..., in, out]: the filter of an output unit is
everything but the last axis, a *column*. Paths are projected by least squares,

    (3)  (a, b) = argmin | theta - origin - a * x - b * y |

and never by dot products over norms, which are coordinates only if the directions are orthogonal and of
length one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Normalization = Literal["filter", "layer", "none"]


class Projection(NamedTuple):
    """Where parameters stand relative to a plane. All arrays have the parameters' leading axes.

    Attributes:
        coordinates: [..., 2], the (a, b) of equation (3).
        captured: [...], share of the squared displacement from the origin that lies in the plane, 0 to 1. A
            point at the origin lies in the plane: 1.
        distance: [...], the length of the part outside the plane, in units of the weights.
        share: captured share of all points together, sum of squares in the plane over sum of squares.
    """

    coordinates: np.ndarray
    captured: np.ndarray
    distance: np.ndarray
    share: float


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through parameter space, equation (1).

    Attributes:
        origin: parameters, a tree of arrays.
        x, y: directions, trees of the same structure and shapes. They need not be orthogonal or of length
            one.
        kind: "random" or "pca", or a word of your own.
        ignored: paths of the parameters that the plane does not move on purpose.
        explained: for "pca", the share of the squared displacements that each direction explains, else empty.

    Raises:
        ValueError: if structures or shapes differ, or the directions do not span a plane.
    """

    origin: Params
    x: Params
    y: Params
    kind: str = "custom"
    ignored: tuple[str, ...] = ()
    explained: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, direction in (("x", self.x), ("y", self.y)):
            lead = leading_axes(self.origin, direction, f"direction {name}")
            if lead:
                raise ValueError(f"direction {name} has the leading axes {lead}, a direction has none")
        axes = self._axes()
        norms = np.linalg.norm(axes, axis=0)
        if not np.all(np.isfinite(norms)) or not np.all(norms > 0):
            raise ValueError(f"directions must be finite and not zero; x has length {norms[0]}, y {norms[1]}")
        if np.linalg.svd(axes / norms, compute_uv=False)[-1] < 1e-8:
            raise ValueError("directions x and y are parallel: they span a line, not a plane")

    def point(self, a: Any, b: Any) -> Params:
        """The parameters at (a, b), equation (1). Works inside jax.jit."""
        return moved(self.origin, self.x, self.y, a, b)

    def project(self, params: Params) -> Projection:
        """Least-squares coordinates, equation (3), in float64. `params` may carry leading axes, as a
        trajectory does.

        Every parameter counts in `captured` and `distance`, the ignored ones too.
        """
        lead = leading_axes(self.origin, params, "params")
        displacement = _displacements(self.origin, params)
        axes = self._axes()
        norms = np.linalg.norm(axes, axis=0)
        finite = np.isfinite(displacement).all(axis=1)
        known = np.where(finite[:, None], displacement, 0.0)
        scaled = np.linalg.lstsq(axes / norms, known.T, rcond=None)[0]
        inside, total = (axes / norms @ scaled).T, (known**2).sum(axis=1)
        outside = ((known - inside) ** 2).sum(axis=1)
        captured = np.where(total > 0, 1 - outside / np.where(total > 0, total, 1.0), 1.0).clip(0.0, 1.0)
        share = float(np.clip(1 - outside.sum() / total.sum(), 0.0, 1.0)) if total.sum() > 0 else 1.0
        coordinates = np.where(finite[:, None], (scaled / norms[:, None]).T, np.nan)
        return Projection(
            coordinates.reshape(*lead, 2),
            np.where(finite, captured, np.nan).reshape(lead),
            np.where(finite, np.sqrt(outside), np.nan).reshape(lead),
            share,
        )

    def _axes(self) -> np.ndarray:
        return np.stack([_flat(self.x), _flat(self.y)], axis=1)


def random_plane(
    params: Params, key: jax.Array, normalization: Normalization = "filter", ignore: Sequence[str] = ("bias",)
) -> Plane:
    """A plane through `params` along two independent directions with N(0, 1) entries.

    Args:
        params: the origin.
        key: a JAX random key.
        normalization: "filter" for equation (2); "layer" scales each whole tensor to the norm of its
            weights; "none".
        ignore: names; a parameter is not moved if one part of its path has such a name. With "filter" and
            "layer" parameters of fewer than two axes (thresholds, leaks) are not moved either: they have no
            filters.

    Raises:
        ValueError: for an unknown normalization, or if nothing is left to move.
    """
    if normalization not in ("filter", "layer", "none"):
        raise ValueError(f"normalization must be 'filter', 'layer' or 'none', not {normalization!r}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [_name(path) for path, _ in leaves]
    still = [
        bool(set(name.split("/")) & set(ignore)) or (normalization != "none" and jnp.ndim(leaf) < 2)
        for name, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    if all(still):
        raise ValueError(f"nothing to move: all of {', '.join(paths)} are ignored (ignore={tuple(ignore)})")

    def direction(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(leaves))
        parts = [
            jnp.zeros_like(leaf) if fixed else _normalised(k, jnp.asarray(leaf), normalization)
            for k, fixed, (_, leaf) in zip(keys, still, leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), parts)

    key_x, key_y = jax.random.split(key)
    ignored = tuple(name for name, fixed in zip(paths, still, strict=True) if fixed)
    return Plane(params, direction(key_x), direction(key_y), "random", ignored)


def pca_plane(trajectories: Mapping[str, Params] | Sequence[Params], origin: Params) -> Plane:
    """The plane through `origin` that captures most of the squared displacement of all checkpoints together.

    Its directions are the first two right singular vectors, of length one, of the matrix with a row
    `theta - origin` per checkpoint. It is not centred on the mean of the checkpoints: the plane passes
    through `origin` (a run's final parameters, say), so `explained` is a share of squared displacement
    about the origin, not of variance. Checkpoints that are not finite (a run that diverged) are left out.

    Args:
        trajectories: parameters with leading axes (checkpoints), by name or in a list.
        origin: parameters.

    Raises:
        ValueError: if the displacements do not span a plane.
    """
    runs = dict(trajectories) if isinstance(trajectories, Mapping) else dict(enumerate(trajectories))
    for name, run in runs.items():
        leading_axes(origin, run, f"trajectory {name!r}")
    rows = np.concatenate([_displacements(origin, run) for run in runs.values()])
    rows = rows[np.isfinite(rows).all(axis=1)]
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    if len(values) < 2 or not values[1] > 1e-6 * values[0]:
        raise ValueError(
            f"{len(rows)} finite checkpoints lie on one line through the origin (singular values "
            f"{values[:2]}): use random_plane, or give more checkpoints"
        )
    # A singular vector is defined up to its sign: make the largest entry positive.
    axes = [v * np.sign(v[np.argmax(np.abs(v))]) for v in vectors[:2]]
    explained = tuple(float(share) for share in values[:2] ** 2 / (values**2).sum())
    return Plane(origin, _unflat(axes[0], origin), _unflat(axes[1], origin), "pca", (), explained)


def moved(origin: Params, x: Params, y: Params, a: Any, b: Any) -> Params:
    """Equation (1)."""

    def move(o: Any, dx: Any, dy: Any) -> jax.Array:
        o = jnp.asarray(o)
        return o + jnp.asarray(a, o.dtype) * dx + jnp.asarray(b, o.dtype) * dy

    return jax.tree_util.tree_map(move, origin, x, y)


def _normalised(key: jax.Array, weights: jax.Array, normalization: Normalization) -> jax.Array:
    direction = jax.random.normal(key, weights.shape, weights.dtype)
    if normalization == "none":
        return direction
    axes = tuple(range(weights.ndim - (normalization == "filter")))  # all but the output units' axis, or all
    norm = lambda array: jnp.sqrt(jnp.sum(array**2, axis=axes, keepdims=True))  # noqa: E731
    return direction * norm(weights) / (norm(direction) + 1e-10)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leading_axes(origin: Params, params: Params, what: str) -> tuple[int, ...]:
    """The leading axes that `params` has beyond `origin`; `what` names it in errors (ValueError)."""
    ours, theirs = jax.tree_util.tree_leaves_with_path(origin), jax.tree_util.tree_leaves_with_path(params)
    our_names, their_names = [_name(path) for path, _ in ours], [_name(path) for path, _ in theirs]
    if our_names != their_names:
        odd = sorted(set(our_names) ^ set(their_names))
        raise ValueError(f"{what} and the origin are different trees; they do not share {', '.join(odd)}")
    leads = set()
    for name, (_, our), (_, their) in zip(our_names, ours, theirs, strict=True):
        shape, base = np.shape(their), np.shape(our)
        if shape[len(shape) - len(base) :] != base:
            raise ValueError(f"{what}: {name} has the shape {shape}, not the origin's {base} at its end")
        leads.add(shape[: len(shape) - len(base)])
    if len(leads) > 1:
        raise ValueError(f"{what}: the leading axes differ between parameters: {sorted(leads)}")
    return leads.pop() if leads else ()


def _flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, dtype=np.float64).ravel() for leaf in jax.tree_util.tree_leaves(tree)])


def _displacements(origin: Params, params: Params) -> np.ndarray:
    """[points, parameters] in float64; leading axes are folded into points."""
    pairs = zip(jax.tree_util.tree_leaves(origin), jax.tree_util.tree_leaves(params), strict=True)
    parts = [
        (np.asarray(their, dtype=np.float64) - np.asarray(our, dtype=np.float64)).reshape(-1, np.size(our))
        for our, their in pairs
    ]
    return np.concatenate(parts, axis=1)


def _unflat(vector: np.ndarray, like: Params) -> Params:
    leaves, structure = jax.tree_util.tree_flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = [
        jnp.asarray(part.reshape(np.shape(leaf)), dtype=jnp.asarray(leaf).dtype)
        for part, leaf in zip(np.split(vector, ends), leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, parts)
