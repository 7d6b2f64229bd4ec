"""Loss landscapes: the loss on a plane through the space of weights, and the paths that training took.

After Li et al. (2018, Visualizing the Loss Landscape of Neural Nets, NeurIPS, arXiv:1712.09913);
`gradlab.analysis.plane` holds the equations of the plane and of the projection.

How not to read a landscape: a plane shows two directions out of thousands. `captured` says which share of a
path's squared displacement lies in the plane, and `path_loss` is the true loss at the points of the path,
off the plane.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.analysis.plane import Params, Plane, Projection, leading_axes, moved, pca_plane, random_plane

__all__ = [
    "Landscape", "Plane", "Projection", "landscape", "losses_along", "pca_plane", "random_plane", "surface",
]  # fmt: skip

Loss = Callable[[Params], jax.Array]
Extent = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Landscape:
    """A loss surface and the paths over it.

    Attributes:
        a, b: coordinates along x and y.
        loss: [len(b), len(a)], so that row i stands for b[i] and column j for a[j]. NaN where the loss is
            not a number.
        kind, explained: as in `Plane`.
        coordinates: per path, [checkpoints, 2], the (a, b) of its checkpoints.
        path_loss: per path, [checkpoints], the true loss there, which is not the surface's when the path
            leaves the plane.
        captured: per path, the share of its squared displacement from the origin that the plane shows.
    """

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    kind: str = "custom"
    explained: tuple[float, ...] = ()
    coordinates: Mapping[str, np.ndarray] = field(default_factory=dict)
    path_loss: Mapping[str, np.ndarray] = field(default_factory=dict)
    captured: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .npz file (no pickle), by rename, so that a half-written file never carries the name."""
        path = Path(path)
        names = list(self.coordinates)
        arrays: dict[str, Any] = {"a": self.a, "b": self.b, "loss": self.loss, "kind": np.array(self.kind)}
        arrays["explained"] = np.array(self.explained, dtype=np.float64)
        arrays["names"] = np.array(names, dtype=np.str_)
        arrays["captured"] = np.array([self.captured[name] for name in names], dtype=np.float64)
        for i, name in enumerate(names):
            arrays[f"coordinates_{i}"] = self.coordinates[name]
            arrays[f"path_loss_{i}"] = self.path_loss[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(unfinished, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            names = [str(name) for name in data["names"]]
            return cls(
                a=data["a"],
                b=data["b"],
                loss=data["loss"],
                kind=str(data["kind"]),
                explained=tuple(float(share) for share in data["explained"]),
                coordinates={name: data[f"coordinates_{i}"] for i, name in enumerate(names)},
                path_loss={name: data[f"path_loss_{i}"] for i, name in enumerate(names)},
                captured={name: float(share) for name, share in zip(names, data["captured"], strict=True)},
            )

    def loss_on_plane(self, name: str) -> np.ndarray:
        """The surface's loss where a path is projected to, [checkpoints], interpolated linearly in the grid.

        Its distance from `path_loss[name]` says how far the picture is from the truth. NaN outside the grid.
        """
        from scipy.interpolate import RegularGridInterpolator  # loaded here: slow to load, seldom needed

        at = RegularGridInterpolator((self.b, self.a), self.loss, bounds_error=False, fill_value=np.nan)
        return np.asarray(at(self.coordinates[name][:, ::-1]))

    def plot(self, ax: Any = None) -> Any:
        """Draw it (`gradlab.report.plots.landscape`); returns the matplotlib Axes."""
        from gradlab.report import plots  # loaded here: matplotlib is not needed to compute

        return plots.landscape(self, ax=ax)


def surface(
    loss_of_params: Loss, plane: Plane, a: np.ndarray, b: np.ndarray, batch_size: int | None = None
) -> Landscape:
    """The loss at every point of a grid on the plane: `loss` is [len(b), len(a)].

    Args:
        loss_of_params: a function from parameters to a scalar that JAX can trace.
        plane: the plane.
        a, b: coordinates along the two directions, one axis each.
        batch_size: how many points are evaluated at once (by vmap); None evaluates them one after the
            other, which is the faster choice on CPU and needs the least memory.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or b.ndim != 1 or not a.size or not b.size:
        raise ValueError(f"a and b must be vectors with at least one entry; their shapes are {a.shape} and {b.shape}")
    grid_b, grid_a = np.meshgrid(b, a, indexing="ij")
    points = jnp.asarray(np.stack([grid_a.ravel(), grid_b.ravel()], axis=1))

    @jax.jit
    def evaluate(origin: Params, x: Params, y: Params, points: jax.Array) -> jax.Array:
        # The trees are arguments, or the compiler would try to fold them as constants.
        def at(c: jax.Array) -> jax.Array:
            return _scalar(loss_of_params(moved(origin, x, y, c[0], c[1])))

        return jax.lax.map(at, points, batch_size=batch_size)

    loss = np.asarray(evaluate(plane.origin, plane.x, plane.y, points), dtype=np.float64)
    return Landscape(a, b, loss.reshape(len(b), len(a)), plane.kind, plane.explained)


def losses_along(loss_of_params: Loss, trajectory: Params, batch_size: int | None = None) -> np.ndarray:
    """The true loss at each checkpoint of a trajectory (one leading axis): [checkpoints]."""
    evaluate = jax.jit(lambda run: jax.lax.map(lambda p: _scalar(loss_of_params(p)), run, batch_size=batch_size))
    return np.asarray(evaluate(jax.tree_util.tree_map(jnp.asarray, trajectory)), dtype=np.float64)


def landscape(
    loss_of_params: Loss,
    plane: Plane,
    trajectories: Mapping[str, Params],
    points: int | tuple[int, int] = 31,
    margin: float = 0.15,
    extent: Extent | None = None,
    batch_size: int | None = None,
) -> Landscape:
    """The surface around some trajectories, their projections, and the true loss along them.

    Args:
        loss_of_params: a function from parameters to a scalar.
        plane: the plane.
        trajectories: name -> parameters with one leading axis (checkpoints).
        points: grid points per axis, or (along x, along y).
        margin: how far the grid reaches beyond the trajectories and the origin, as a share of their width.
        extent: ((a_min, a_max), (b_min, b_max)) instead of that choice. By default it reaches to -1 and 1
            at least in a random plane, and without trajectories.
        batch_size: as in `surface`.
    """
    projections = {}
    for name, run in trajectories.items():
        lead = leading_axes(plane.origin, run, f"trajectory {name!r}")
        if len(lead) != 1 or lead[0] == 0:
            raise ValueError(f"trajectory {name!r} must have one leading axis (checkpoints), not {lead}")
        projections[name] = plane.project(run)
    n_a, n_b = (points, points) if isinstance(points, int) else points
    if min(n_a, n_b) < 2:
        raise ValueError(f"points must be at least 2 per axis, not {points}")
    # In a random plane the paths are a dot; it is read one filter norm each way.
    least = 1.0 if plane.kind == "random" else 0.0
    extent = extent or _extent([p.coordinates for p in projections.values()], margin, least)
    (a_low, a_high), (b_low, b_high) = extent
    ground = surface(
        loss_of_params, plane, np.linspace(a_low, a_high, n_a), np.linspace(b_low, b_high, n_b), batch_size
    )
    return Landscape(
        ground.a,
        ground.b,
        ground.loss,
        plane.kind,
        plane.explained,
        {name: projection.coordinates for name, projection in projections.items()},
        {name: losses_along(loss_of_params, run, batch_size) for name, run in trajectories.items()},
        {name: projection.share for name, projection in projections.items()},
    )


def _extent(paths: Sequence[np.ndarray], margin: float, least: float) -> Extent:
    points = np.concatenate([np.zeros((1, 2)), *paths])
    points = points[np.isfinite(points).all(axis=1)]
    low, high = points.min(axis=0), points.max(axis=0)
    width = high - low
    if not width.any():
        return (-1.0, 1.0), (-1.0, 1.0)
    # A path along one axis still needs a strip to be seen on.
    missing = np.maximum(0.0, 0.2 * width.max() - width)
    low, high = low - missing / 2, high + missing / 2
    low, high = low - margin * (high - low), high + margin * (high - low)
    low, high = np.minimum(low, -least), np.maximum(high, least)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def _scalar(loss: jax.Array) -> jax.Array:
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_of_params must return a scalar, it returned the shape {jnp.shape(loss)}")
    return loss
