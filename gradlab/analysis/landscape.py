"""Loss landscapes: the loss on a plane through the space of weights, and the paths that training took.

After Li et al. (2018, Visualizing the Loss Landscape of Neural Nets, NeurIPS, arXiv:1712.09913);
`gradlab.analysis.plane` holds the equations of the plane and of the projection.

How not to read a landscape: a plane shows two directions out of thousands. `captured` says which share of a
path's squared displacement lies in the plane, `distance` how far each checkpoint is from it, and `path_loss` is
the true loss at the points of the path, off the plane.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradlab.analysis.linear_currents import losses_at
from gradlab.analysis.objective import LossOfParams, loss_function, losses_along
from gradlab.analysis.plane import (
    Plane,
    Projection,
    directed_plane,
    interpolation_plane,
    pca_plane,
    random_plane,
)
from gradlab.analysis.stored import read_arrays, write_arrays
from gradlab.analysis.trees import Params, leading_axes

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Landscape", "Plane", "Projection", "directed_plane", "interpolation_plane", "landscape", "loss_function",
    "losses_along", "pca_plane", "random_plane", "surface",
]  # fmt: skip

Extent = tuple[tuple[float, float], tuple[float, float]]

_PER_PATH = ("coordinates", "path_loss", "distance", "captured_at")
_NOT_STORED = "the file was written before distances were stored: compute the landscape again"


@dataclass(frozen=True, eq=False)
class Landscape:
    """A loss surface and the paths over it.

    Attributes:
        a, b: coordinates along x and y.
        loss: [len(b), len(a)], so that row i stands for b[i] and column j for a[j]. NaN where the loss is
            not a number.
        kind, explained, labels: as in `Plane`.
        coordinates: per path, [checkpoints, 2], the (a, b) of its checkpoints.
        path_loss: per path, [checkpoints], the true loss there, which is not the surface's when the path
            leaves the plane.
        captured: per path, the share of its squared displacement from the origin that the plane shows.
        distance: per path, [checkpoints], the length of the part outside the plane, in units of the weights.
        captured_at: per path, [checkpoints], the share `captured` of each checkpoint alone.
    """

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    kind: str = "custom"
    explained: tuple[float, ...] = ()
    coordinates: Mapping[str, np.ndarray] = field(default_factory=dict)
    path_loss: Mapping[str, np.ndarray] = field(default_factory=dict)
    captured: Mapping[str, float] = field(default_factory=dict)
    distance: Mapping[str, np.ndarray] = field(default_factory=dict)
    captured_at: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .npz file (no pickle), by rename, so that a half-written file never carries the name."""
        names = list(self.coordinates)
        arrays: dict[str, Any] = {"a": self.a, "b": self.b, "loss": self.loss, "kind": self.kind}
        arrays["explained"] = np.array(self.explained, dtype=np.float64)
        arrays["labels"] = np.array(self.labels, dtype=np.str_)
        arrays["names"] = np.array(names, dtype=np.str_)
        arrays["captured"] = np.array([self.captured[name] for name in names], dtype=np.float64)
        for what in _PER_PATH:
            held: Mapping[str, np.ndarray] = getattr(self, what)
            arrays |= {f"{what}_{i}": held[name] for i, name in enumerate(names) if name in held}
        return write_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Read what `save` wrote. A file from before distances were stored gives empty `distance`, `captured_at`."""
        data = read_arrays(path, "landscape", ("a", "b", "loss", "kind", "explained", "names", "captured"))
        names = [str(name) for name in data["names"]]
        per_path = {
            what: {name: data[f"{what}_{i}"] for i, name in enumerate(names) if f"{what}_{i}" in data}
            for what in _PER_PATH
        }
        return cls(
            a=data["a"],
            b=data["b"],
            loss=data["loss"],
            kind=str(data["kind"]),
            explained=tuple(float(share) for share in data["explained"]),
            captured={name: float(share) for name, share in zip(names, data["captured"], strict=True)},
            labels=tuple(str(label) for label in data.get("labels", ())),
            **per_path,
        )

    def loss_on_plane(self, name: str) -> np.ndarray:
        """The surface's loss where a path is projected to, [checkpoints], interpolated linearly in the grid.

        Its distance from `path_loss[name]` says how far the picture is from the truth. NaN outside the grid.
        """
        from scipy.interpolate import RegularGridInterpolator  # loaded here: slow to load, seldom needed

        at = RegularGridInterpolator((self.b, self.a), self.loss, bounds_error=False, fill_value=np.nan)
        return np.asarray(at(self.coordinates[name][:, ::-1]))

    def to_frame(self) -> pd.DataFrame:
        """One row per path and checkpoint: path, checkpoint, a, b, captured, distance, loss, loss_on_plane, flag.

        `captured` is that of the checkpoint alone, `loss` the true loss at it, `loss_on_plane` the surface's below
        it. `flag` says why a number is missing.
        """
        import pandas as pd  # loaded here: not needed to compute

        frames = [pd.DataFrame(self._rows(name)) for name in self.coordinates]
        columns = ["path", "checkpoint", "a", "b", "captured", "distance", "loss", "loss_on_plane", "flag"]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)

    def _rows(self, name: str) -> dict[str, Any]:
        at, true, ground = self.coordinates[name], self.path_loss[name], self.loss_on_plane(name)
        unknown = np.full(len(at), np.nan)
        lost = ~np.isfinite(at).all(axis=1)
        inside = (at >= (self.a.min(), self.b.min())).all(axis=1) & (at <= (self.a.max(), self.b.max())).all(axis=1)
        reasons = [
            (lost, "the parameters are not finite"),
            (~np.isfinite(true) & ~lost, "the loss is not finite"),
            (~inside & ~lost, "outside the grid"),
            (~np.isfinite(ground) & inside, "the surface is not finite here"),
            (np.full(len(at), name not in self.distance), _NOT_STORED),
        ]
        flags = ["; ".join(words for where, words in reasons if where[i]) for i in range(len(at))]
        return {
            "path": name,
            "checkpoint": np.arange(len(at)),
            "a": at[:, 0],
            "b": at[:, 1],
            "captured": self.captured_at.get(name, unknown),
            "distance": self.distance.get(name, unknown),
            "loss": true,
            "loss_on_plane": ground,
            "flag": flags,
        }

    def plot(self, ax: Any = None, view: Literal["contour", "surface"] = "contour", **options: Any) -> Any:
        """Draw it; returns the matplotlib Axes.

        Args:
            ax: where to draw; for "surface" three-dimensional axes.
            view: "contour" (`gradlab.report.plots_landscape.landscape`) or "surface", in three dimensions
                (`gradlab.report.plots_surface.surface`).
            options: passed to that function.
        """
        from gradlab.report import plots_landscape, plots_surface  # loaded here: matplotlib is not needed to compute

        if view not in ("contour", "surface"):
            raise ValueError(f"view={view!r}: there are 'contour' and 'surface'")
        draw: Any = plots_landscape.landscape if view == "contour" else plots_surface.surface
        return draw(self, ax=ax, **options)


def surface(
    loss_of_params: LossOfParams, plane: Plane, a: np.ndarray, b: np.ndarray, batch_size: int | None = None
) -> Landscape:
    """The loss at every point of a grid on the plane: `loss` is [len(b), len(a)].

    Args:
        loss_of_params: a function from parameters to a scalar that JAX can trace; `loss_function(net, batch, loss)`
            makes one.
        plane: the plane.
        a, b: coordinates along the two directions, one axis each.
        batch_size: how many points are evaluated at once (by vmap). None: as many as fit the processor's cache, or on
            an accelerator its memory. Memory does not grow with the number of points.
            The first layer's currents are computed once for all points where they are linear in the coordinates
            (`gradlab.analysis.linear_currents`; equal up to rounding, so that a membrane just at its threshold may
            spike otherwise); other functions are evaluated point by point on a CPU.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or b.ndim != 1 or not a.size or not b.size:
        raise ValueError(f"a and b must be vectors with at least one entry; their shapes are {a.shape} and {b.shape}")
    grid_b, grid_a = np.meshgrid(b, a, indexing="ij")
    points = np.stack([grid_a.ravel(), grid_b.ravel()], axis=1)
    loss = losses_at(loss_of_params, plane.origin, (plane.x, plane.y), points, batch_size)
    return Landscape(a, b, loss.reshape(len(b), len(a)), plane.kind, plane.explained, labels=plane.labels)


def landscape(
    loss_of_params: LossOfParams,
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
        trajectories: name -> parameters with one leading axis (checkpoints), of as many rules and seeds as wanted.
        points: grid points per axis, or (along x, along y).
        margin: how far the grid reaches beyond the trajectories and the origin, as a share of their width.
        extent: ((a_min, a_max), (b_min, b_max)) instead of that choice. By default it reaches to -1 and 1 at least
            in a plane of normalised directions, and to all three points of an interpolation plane.
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
    (a_low, a_high), (b_low, b_high) = extent or _extent(plane, projections.values(), margin)
    a, b = np.linspace(a_low, a_high, n_a), np.linspace(b_low, b_high, n_b)
    ground = surface(loss_of_params, plane, a, b, batch_size)
    return Landscape(
        ground.a,
        ground.b,
        ground.loss,
        plane.kind,
        plane.explained,
        {name: projection.coordinates for name, projection in projections.items()},
        {name: losses_along(loss_of_params, run, batch_size) for name, run in trajectories.items()},
        {name: projection.share for name, projection in projections.items()},
        {name: projection.distance for name, projection in projections.items()},
        {name: projection.captured for name, projection in projections.items()},
        plane.labels,
    )


def _extent(plane: Plane, projections: Iterable[Projection], margin: float) -> Extent:
    corners = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]] if plane.kind == "interpolation" else [[0.0, 0.0]]
    points = np.concatenate([corners, *(projection.coordinates for projection in projections)])
    points = points[np.isfinite(points).all(axis=1)]
    low, high = points.min(axis=0), points.max(axis=0)
    width = high - low
    if not width.any():
        return (-1.0, 1.0), (-1.0, 1.0)
    # A path along one axis still needs a strip to be seen on.
    missing = np.maximum(0.0, 0.2 * width.max() - width)
    low, high = low - missing / 2, high + missing / 2
    low, high = low - margin * (high - low), high + margin * (high - low)
    # Among random directions the paths are a dot; the plane is read one filter norm each way.
    least = 1.0 if plane.kind in ("random", "directed") else 0.0
    low, high = np.minimum(low, -least), np.maximum(high, least)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
