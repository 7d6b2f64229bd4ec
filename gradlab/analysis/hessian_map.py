"""Maps of the extreme eigenvalues of the second derivative over a plane: is what looks convex convex?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab.analysis.hessian import Derivative, Products, Trust
from gradlab.analysis.objective import LossOfParams
from gradlab.analysis.plane import Plane, axis_labels
from gradlab.analysis.spectrum import ZERO, NoConvergence, extremes, trust_rows
from gradlab.analysis.stored import read_arrays, write_arrays
from gradlab.groups import NETWORK

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("smallest", "largest", "ratio")

_NO_POSITIVE = "no eigenvalue is positive: the ratio says nothing"


@dataclass(frozen=True, eq=False)
class HessianMap:
    """Extreme eigenvalues over a plane.

    Attributes:
        a, b: coordinates along x and y.
        smallest, largest: [len(b), len(a)], eigenvalues; NaN where `flags` says why.
        flags: [len(b), len(a)], "" or the reason.
        derivative, trust: of `gradlab.analysis.hessian`, `trust` at the origin of the plane.
        kind, explained, labels: as in `gradlab.analysis.plane.Plane`.
    """

    a: np.ndarray
    b: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    flags: np.ndarray
    derivative: Derivative
    trust: Trust
    kind: str = "custom"
    explained: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def ratio(self) -> np.ndarray:
        """[len(b), len(a)], |smallest / largest|; NaN where the largest is not positive."""
        safe = np.where(self.largest > 0, self.largest, np.nan)
        return np.abs(self.smallest / safe)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule "", layer "network", metric ("smallest", "largest", "ratio"), a, b, value, flag; then
        "asymmetry" and "mismatch" at the origin.
        """
        import pandas as pd  # loaded here: not needed to compute

        rows: list[tuple[Any, ...]] = []
        for metric in METRICS:
            for (i, j), value in np.ndenumerate(getattr(self, metric)):
                missing = _NO_POSITIVE if metric == "ratio" and np.isnan(value) else ""
                flag = str(self.flags[i, j]) or missing
                rows.append(("", NETWORK, metric, self.a[j], self.b[i], value, flag))
        rows += [(*row[:3], 0.0, 0.0, *row[3:]) for row in trust_rows(self.trust)]
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "a", "b", "value", "flag"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .npz file (no pickle), by rename."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("a", "b", "smallest", "largest")}
        arrays |= {"flags": self.flags.astype(np.str_), "derivative": self.derivative, "kind": self.kind}
        arrays |= {"trust": np.array(self.trust), "explained": np.array(self.explained, np.float64)}
        return write_arrays(path, {**arrays, "labels": np.array(self.labels, dtype=np.str_)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HessianMap:
        """Read what `save` wrote."""
        needed = ("a", "b", "smallest", "largest", "flags", "derivative", "trust", "kind", "explained", "labels")
        data: dict[str, Any] = read_arrays(path, "map of eigenvalues", needed)
        return cls(
            **{name: data[name] for name in ("a", "b", "smallest", "largest", "flags")},
            derivative=str(data["derivative"]),  # type: ignore[arg-type]
            trust=Trust(*data["trust"].tolist()),
            kind=str(data["kind"]),
            explained=tuple(data["explained"].tolist()),
            labels=tuple(data["labels"].tolist()),
        )

    def plot(self, ax: Any = None, metric: str = "ratio", **options: Any) -> Any:
        """Draw it (`gradlab.report.plots_curvature.hessian_map`); returns the matplotlib Axes."""
        from gradlab.report import plots_curvature  # loaded here: matplotlib is not needed to compute

        return plots_curvature.hessian_map(self.to_frame(), metric, ax=ax, **{"labels": axis_labels(self), **options})


def hessian_map(
    loss_of_params: LossOfParams,
    plane: Plane,
    a: np.ndarray,
    b: np.ndarray,
    seed: int = 0,
    tolerance: float = 1e-2,
    derivative: Derivative = "surrogate",
) -> HessianMap:
    """The smallest and the largest eigenvalue of the second derivative at every point of a grid on a plane.

    Section 5 of Li et al. (2018, arXiv:1712.09913) maps |smallest / largest|: near zero the loss is convex up to flat
    directions, however the plane cuts it; a plane that looks convex shows two curvatures of many. The
    eigenvalues are those of all parameters, also of those that the plane does not move.

    Each point costs some dozens of products, so that the grid is coarser than that of a landscape: 11 by 11, say.

    Args:
        loss_of_params: a function from parameters to a scalar; `loss_function(net, batch, loss)` makes one.
        plane: the plane.
        a, b: coordinates along the two directions, one axis each.
        seed: of the first vectors of the iterations.
        tolerance: residual at which an eigenvalue counts as found, relative to it.
        derivative: "surrogate" or "field", see `gradlab.analysis.hessian`.

    Raises:
        ValueError: if `a` or `b` is no vector with entries, or the second derivative at the origin is not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or b.ndim != 1 or not a.size or not b.size:
        raise ValueError(f"a and b must be vectors with at least one entry; their shapes are {a.shape} and {b.shape}")
    products = Products(loss_of_params, plane.origin, derivative)
    trust = products.trust(seed)
    smallest, largest = np.full((len(b), len(a)), np.nan), np.full((len(b), len(a)), np.nan)
    flags = np.full(smallest.shape, "", dtype=object)
    for i, j in np.ndindex(*smallest.shape):
        products.move_to(plane.point(a[j], b[i]))
        smallest[i, j], largest[i, j], flags[i, j] = _ends(products, seed, tolerance)
    known = flags.astype(np.str_)
    return HessianMap(a, b, smallest, largest, known, derivative, trust, plane.kind, plane.explained, plane.labels)


def _ends(products: Products, seed: int, tolerance: float) -> tuple[float, float, str]:
    """The smallest and the largest eigenvalue, or why there are none: the other points count all the same."""
    probe = products.symmetric(np.random.default_rng(seed).normal(size=products.size))
    if not np.isfinite(probe).all():
        return np.nan, np.nan, "the second derivative is not finite here"
    if not probe.any():
        return np.nan, np.nan, ZERO
    try:
        low, high = extremes(products, 1, True, seed, tolerance)
    except NoConvergence as error:
        return np.nan, np.nan, str(error)
    return float(low[0][0]), float(high[0][0]), ""
