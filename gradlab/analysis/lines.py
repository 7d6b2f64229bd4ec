"""The loss on a straight line through the space of weights: along one direction, or between two networks.

    (1)  theta(a) = origin + a * direction

The one-dimensional views of Li et al. (2018, Visualizing the Loss Landscape of Neural Nets, NeurIPS,
arXiv:1712.09913), whose normalisations are in `gradlab.analysis.directions`; between two networks it is the linear
interpolation of Goodfellow, Vinyals and Saxe (2015, Qualitatively characterizing neural network optimization
problems, ICLR, arXiv:1412.6544), where a = 0 is the first network and a = 1 the second.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gradlab.analysis.directions import IGNORED, Normalization, ignored_paths, normalised, random_direction
from gradlab.analysis.linear_currents import losses_at
from gradlab.analysis.objective import LossOfParams, loss_function
from gradlab.analysis.plane import moved
from gradlab.analysis.stored import read_arrays, write_arrays
from gradlab.analysis.trees import Params, displacements, flat, require_same_shapes, unflat

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LineProfile", "StraightLine", "directed_line", "line_between", "line_profile", "loss_function", "random_line",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class StraightLine:
    """A line through parameter space, equation (1).

    Attributes:
        origin: parameters.
        direction: a tree of the same structure and shapes; `a` counts multiples of it.
        label: what the axis of `a` is called in figures.
        ignored: paths of the parameters that the line does not move on purpose.

    Raises:
        ValueError: if structures or shapes differ, or the direction is zero or not finite.
    """

    origin: Params
    direction: Params
    label: str = "distance along the direction (multiples of it)"
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_same_shapes(self.origin, self.direction, "direction")
        length = float(np.linalg.norm(flat(self.direction)))
        if not 0 < length < np.inf:
            raise ValueError(f"the direction has the length {length}: it must be finite and not zero")

    def point(self, a: Any) -> Params:
        """The parameters at `a`, equation (1). Works inside jax.jit."""
        return moved(self.origin, (self.direction,), (a,))


def random_line(
    params: Params, key: jax.Array, normalization: Normalization = "filter", ignore: Sequence[str] = IGNORED
) -> StraightLine:
    """A line through `params` along a random direction; arguments as in `gradlab.analysis.plane.random_plane`."""
    ignored = ignored_paths(params, normalization, ignore)
    direction = random_direction(params, key, normalization, ignore)
    return StraightLine(params, direction, "random direction (multiples of it)", ignored)


def directed_line(
    origin: Params,
    direction: Params,
    normalization: Normalization = "filter",
    ignore: Sequence[str] = IGNORED,
    label: str = "distance along the direction (multiples of it)",
) -> StraightLine:
    """A line along a direction of your own, scaled to the weights; `StraightLine(...)` takes it as it is."""
    ignored = ignored_paths(origin, normalization, ignore)
    return StraightLine(origin, normalised(direction, origin, normalization, ignore), label, ignored)


def line_between(start: Params, end: Params, names: Sequence[str] = ("the start", "the end")) -> StraightLine:
    """The line from `start` (a = 0) to `end` (a = 1); every parameter moves. `names` stand on the axis of figures."""
    if len(names) != 2:
        raise ValueError(f"names={tuple(names)!r}: two ends have two names")
    require_same_shapes(start, end, "end")
    direction = unflat(displacements(start, end)[0], start)
    return StraightLine(start, direction, f"from {names[0]} (0) to {names[1]} (1)")


@dataclass(frozen=True, eq=False)
class LineProfile:
    """Losses along a line, or several.

    Attributes:
        a: [points], coordinates.
        loss: {curve: [points]}. NaN where the loss is not a number.
        label: what the axis of `a` is called.
    """

    a: np.ndarray
    loss: Mapping[str, np.ndarray]
    label: str = "distance along the direction (multiples of it)"

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule (the curve), layer "network", metric "loss", a, value, flag."""
        import pandas as pd  # loaded here: not needed to compute

        columns = ["rule", "layer", "metric", "a", "value", "flag"]
        rows = [
            (name, "network", "loss", float(a), value if np.isfinite(value) else np.nan, _flag(value))
            for name, losses in self.loss.items()
            for a, value in zip(self.a, losses.tolist(), strict=True)
        ]
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .npz file (no pickle), by rename."""
        names = np.array(list(self.loss), dtype=np.str_)
        curves = {f"loss_{i}": loss for i, loss in enumerate(self.loss.values())}
        return write_arrays(path, {"a": self.a, "names": names, "label": self.label, **curves})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LineProfile:
        """Read what `save` wrote."""
        data = read_arrays(path, "line profile", ("a", "names", "label"))
        loss = {str(name): data[f"loss_{i}"] for i, name in enumerate(data["names"])}
        return cls(data["a"], loss, str(data["label"]))

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw it (`gradlab.report.plots_lines.line_profile`); returns the matplotlib Axes."""
        from gradlab.report import plots_lines  # loaded here: matplotlib is not needed to compute

        return plots_lines.line_profile(self.to_frame(), ax=ax, **{"label": self.label, **options})


def line_profile(
    losses: LossOfParams | Mapping[str, LossOfParams],
    lines: StraightLine | Mapping[str, StraightLine],
    a: np.ndarray | None = None,
    batch_size: int | None = None,
) -> LineProfile:
    """The loss along a line: of one function or of several (other batches, say), along one line or several.

    Args:
        losses: a function from parameters to a scalar (`loss_function(net, batch, loss)`), or {name: function}.
        lines: a line, or {name: line}. With several of both the curves are named "line, loss".
        a: coordinates, [points]; None: 61 points from -1 to 2, which shows both sides of both ends.
        batch_size: as in `gradlab.analysis.landscape.surface`.

    Raises:
        ValueError: if `a` is no vector with entries, or nothing is given to evaluate.
    """
    a = np.linspace(-1.0, 2.0, 61) if a is None else np.asarray(a, dtype=np.float64)
    if a.ndim != 1 or not a.size:
        raise ValueError(f"a must be a vector with at least one entry; its shape is {a.shape}")
    several = isinstance(losses, Mapping), isinstance(lines, Mapping)
    functions: Mapping[str, LossOfParams] = losses if isinstance(losses, Mapping) else {"loss": losses}
    chosen = lines if isinstance(lines, Mapping) else {"": lines}
    if not functions or not chosen:
        raise ValueError("nothing to evaluate: give at least one loss and one line")
    curves = {}
    for line_name, line in chosen.items():
        for loss_name, function in functions.items():
            name = f"{line_name}, {loss_name}" if all(several) else line_name if several[1] else loss_name
            curves[name] = losses_at(function, line.origin, (line.direction,), a[:, None], batch_size)
    labels = {line.label for line in chosen.values()}
    return LineProfile(a, curves, labels.pop() if len(labels) == 1 else LineProfile.label)


def _flag(value: float) -> str:
    return "" if np.isfinite(value) else "the loss is not finite here"
