"""Planes through the space of weights, for loss landscapes.

A plane is a point (the origin) and two directions of the same shape as the parameters:

    (1)  theta(a, b) = origin + a * x + b * y

Its directions are random or your own, scaled to the weights (`gradlab.analysis.directions`), principal directions
of training paths, or lead from one set of parameters to two others. Paths are projected by least squares,

    (2)  (a, b) = argmin | theta - origin - a * x - b * y |

and never by dot products over norms, which are coordinates only if the directions are orthogonal and of
length one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.analysis.directions import IGNORED, Normalization, ignored_paths, normalised, random_direction
from gradlab.analysis.trees import Params, displacements, flat, leading_axes, path_names, require_same_shapes, unflat


class Projection(NamedTuple):
    """Where parameters stand relative to a plane. All arrays have the parameters' leading axes.

    Attributes:
        coordinates: [..., 2], the (a, b) of equation (2).
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
        kind: "random", "pca", "interpolation", "directed", or a word of your own.
        ignored: paths of the parameters that the plane does not move on purpose.
        explained: for "pca", the share of the squared displacements that each direction explains, else empty.
        labels: what the two axes are called in figures; empty: what the kind says.

    Raises:
        ValueError: if structures or shapes differ, the directions do not span a plane, or there is one label.
    """

    origin: Params
    x: Params
    y: Params
    kind: str = "custom"
    ignored: tuple[str, ...] = ()
    explained: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labels) not in (0, 2):
            raise ValueError(f"labels={self.labels!r}: a plane has two axes, give two labels or none")
        for name, direction in (("x", self.x), ("y", self.y)):
            lead = leading_axes(self.origin, direction, f"direction {name}")
            if lead:
                raise ValueError(f"direction {name} has the leading axes {lead}, a direction has none")
        axes = self._axes()
        norms = np.linalg.norm(axes, axis=0)
        if not np.all(np.isfinite(norms)) or not np.all(norms > 0):
            raise ValueError(f"directions must be finite and not zero; x has length {norms[0]}, y {norms[1]}")
        if np.linalg.svd(axes / norms, compute_uv=False)[-1] < 1e-6:
            raise ValueError("directions x and y are parallel: they span a line, not a plane")

    def point(self, a: Any, b: Any) -> Params:
        """The parameters at (a, b), equation (1). Works inside jax.jit."""
        return moved(self.origin, (self.x, self.y), (a, b))

    def project(self, params: Params) -> Projection:
        """Least-squares coordinates, equation (2), in float64. `params` may carry leading axes, as a
        trajectory does.

        Every parameter counts in `captured` and `distance`, the ignored ones too.
        """
        lead = leading_axes(self.origin, params, "params")
        displacement = displacements(self.origin, params)
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
        return np.stack([flat(self.x), flat(self.y)], axis=1)


def random_plane(
    params: Params, key: jax.Array, normalization: Normalization = "filter", ignore: Sequence[str] = IGNORED
) -> Plane:
    """A plane through `params` along two independent directions with N(0, 1) entries.

    Args:
        params: the origin.
        key: a JAX random key.
        normalization: "filter", "layer", "weight" or "none", as defined in `gradlab.analysis.directions`.
        ignore: names; a parameter is not moved if one part of its path has such a name. Parameters of fewer than
            two axes (thresholds, leaks) have no filters and are moved with "none" only.

    Raises:
        ValueError: for an unknown normalization, or if nothing is left to move.
    """
    ignored = ignored_paths(params, normalization, ignore)
    key_x, key_y = jax.random.split(key)
    x, y = (random_direction(params, k, normalization, ignore) for k in (key_x, key_y))
    return Plane(params, x, y, "random", ignored)


def directed_plane(
    origin: Params,
    x: Params,
    y: Params,
    normalization: Normalization = "filter",
    ignore: Sequence[str] = IGNORED,
    labels: Sequence[str] = (),
) -> Plane:
    """A plane along two directions of your own (gradients of two rules, say), scaled to the weights.

    Args:
        origin: parameters.
        x, y: directions, trees like the origin. `Plane(origin, x, y)` takes them as they are.
        normalization, ignore: as in `random_plane`.
        labels: what the two axes are called in figures.

    Raises:
        ValueError: for trees that differ, an unknown normalization, if nothing is left to move, or if the scaled
            directions do not span a plane.
    """
    for name, direction in (("x", x), ("y", y)):
        require_same_shapes(origin, direction, f"direction {name}")
    ignored = ignored_paths(origin, normalization, ignore)
    x, y = (normalised(direction, origin, normalization, ignore) for direction in (x, y))
    return Plane(origin, x, y, "directed", ignored, labels=tuple(labels))


def interpolation_plane(
    origin: Params, x_end: Params, y_end: Params, names: Sequence[str] = ("the origin", "the x end", "the y end")
) -> Plane:
    """The plane through three sets of parameters, which get the coordinates (0, 0), (1, 0) and (0, 1).

    Every parameter moves, biases and neurons' constants included: the ends must be reached.

    Args:
        origin, x_end, y_end: parameters, for example where training with three rules ended.
        names: what the three are called on the axes of figures.

    Raises:
        ValueError: for trees that differ, or three points on one line.
    """
    if len(names) != 3:
        raise ValueError(f"names={tuple(names)!r}: three points have three names")
    for name, end in (("x_end", x_end), ("y_end", y_end)):
        require_same_shapes(origin, end, name)
    x, y = (unflat(displacements(origin, end)[0], origin) for end in (x_end, y_end))
    labels = tuple(f"from {names[0]} to {end} (share of the way)" for end in names[1:])
    return Plane(origin, x, y, "interpolation", labels=labels)


def pca_plane(
    trajectories: Mapping[str, Params] | Sequence[Params], origin: Params, ignore: Sequence[str] = ()
) -> Plane:
    """The plane through `origin` that captures most of the squared displacement of all checkpoints together.

    Its directions are the first two right singular vectors, of length one, of the matrix with a row
    `theta - origin` per checkpoint. It is not centred on the mean of the checkpoints: the plane passes
    through `origin` (a run's final parameters, say), so `explained` is a share of squared displacement
    about the origin, not of variance. Checkpoints that are not finite (a run that diverged) are left out.

    Args:
        trajectories: parameters with leading axes (checkpoints), by name or in a list.
        origin: parameters.
        ignore: names of parameters that the plane does not move, as in `random_plane`. `explained` is a share of
            all displacement, the ignored parameters' included.

    Raises:
        ValueError: if the displacements do not span a plane.
    """
    runs = dict(trajectories) if isinstance(trajectories, Mapping) else dict(enumerate(trajectories))
    if not runs:
        raise ValueError("no trajectories: give at least one, or use random_plane")
    for name, run in runs.items():
        leading_axes(origin, run, f"trajectory {name!r}")
    ignored = ignored_paths(origin, "none", ignore)
    rows = np.concatenate([displacements(origin, run) for run in runs.values()])
    rows = rows[np.isfinite(rows).all(axis=1)]
    leaves = zip(path_names(origin), jax.tree.leaves(origin), strict=True)
    free = np.concatenate([np.full(np.size(leaf), name not in ignored) for name, leaf in leaves])
    _, values, vectors = np.linalg.svd(rows * free, full_matrices=False)
    if len(values) < 2 or not values[1] > 1e-6 * values[0]:
        raise ValueError(
            f"{len(rows)} finite checkpoints lie on one line through the origin (singular values "
            f"{values[:2]}): use random_plane, or give more checkpoints"
        )
    # A singular vector is defined up to its sign: make the largest entry positive.
    axes = [v * np.sign(v[np.argmax(np.abs(v))]) for v in vectors[:2]]
    explained = tuple(float(share) for share in values[:2] ** 2 / (rows**2).sum())
    return Plane(origin, unflat(axes[0], origin), unflat(axes[1], origin), "pca", ignored, explained)


def axis_labels(view: Any) -> tuple[str, str]:
    """What the two axes of a plane, a landscape or a map of one are called: its labels, or what its kind says."""
    if view.labels:
        return view.labels[0], view.labels[1]
    if view.kind == "pca" and len(view.explained) > 1:
        first, second = (f"{100 * share:{'.0f' if share >= 0.1 else '.2g'}} %" for share in view.explained[:2])
        return f"principal direction 1 ({first})", f"principal direction 2 ({second})"
    word = "random direction" if view.kind == "random" else "direction"
    return f"{word} 1 (multiples of it)", f"{word} 2 (multiples of it)"


def moved(origin: Params, directions: Sequence[Params], coordinates: Any) -> Params:
    """Equation (1) in any number of directions: origin + sum_k coordinates[k] directions[k]."""
    return jax.tree.map(
        lambda *leaves: combined([jnp.asarray(leaf) for leaf in leaves], coordinates), origin, *directions
    )


def combined(terms: Sequence[jax.Array], coordinates: Any) -> jax.Array:
    """terms[0] + sum_k coordinates[k] terms[k + 1], in the dtype of terms[0]."""
    total, *others = terms
    for number, term in enumerate(others):
        total = total + jnp.asarray(coordinates[number], total.dtype) * term
    return total
