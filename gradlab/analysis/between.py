"""The loss on the straight line between solutions: are two rules' networks in one basin?

    (1)  L(t) = L((1 - t) theta_A + t theta_B),   t from 0 to 1
    (2)  barrier     = max over t of  L(t) - [(1 - t) L(0) + t L(1)]                never negative
    (3)  instability = max over t of  L(t)  -  [L(0) + L(1)] / 2

(3) is the barrier height of Frankle, Dziugaite, Roy & Carbin (2020, Linear Mode Connectivity and the Lottery Ticket
Hypothesis, ICML, arXiv:1912.05671), there of the error, here of the loss; it exceeds zero already where one end is
worse than the other. (2) measures from the chord, and does not (Entezari, Sedghi, Saukh & Neyshabur 2022, The Role of
Permutation Invariance in Linear Mode Connectivity of Neural Networks, ICLR, arXiv:2110.06296). Both are of the points
on the line that were evaluated: a higher point between two of them is not seen.

Hidden units can be exchanged without changing what a network computes. A barrier between two networks from different
first weights may be nothing else; from the same first weights it says that the rules went to different places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.analysis.trees import flat
from gradlab.checks import check
from gradlab.engine import are_classes
from gradlab.losses import Batch, Loss, spike_count_accuracy
from gradlab.modules import is_hashable
from gradlab.network import Network, Params

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Between", "Line", "between"]


class Line(NamedTuple):
    """One line: `loss` [points] at the shares t, `accuracy` [points] or None, ||theta_B - theta_A||."""

    loss: np.ndarray
    accuracy: np.ndarray | None
    distance: float


@dataclasses.dataclass(frozen=True, eq=False)
class Between:
    """What `between` found.

    Attributes:
        t: [points], the share of the second solution.
        lines: {(A, B): Line}.
    """

    t: np.ndarray
    lines: Mapping[tuple[str, str], Line]

    def barrier(self, first: str, second: str) -> float:
        """(2) of this module; NaN where a loss on the line is not finite."""
        loss, t = self._loss(first, second), self.t
        return _highest(loss - ((1 - t) * loss[0] + t * loss[-1]))

    def instability(self, first: str, second: str) -> float:
        """(3) of this module; NaN where a loss on the line is not finite."""
        loss = self._loss(first, second)
        return _highest(loss - (loss[0] + loss[-1]) / 2)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule (A), other (B), layer, metric, value, flag, t.

        "loss" and "accuracy" are the curves, one row per t; "barrier", "instability" and "distance" have no t.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for (first, second), line in self.lines.items():
            for metric, values in (("loss", line.loss), ("accuracy", line.accuracy)):
                for t, value in zip(self.t, () if values is None else values, strict=values is not None):
                    rows.append((first, second, metric, value, _flag(value, "the loss"), t))
            found = {"barrier": self.barrier(first, second), "instability": self.instability(first, second)}
            found["distance"] = line.distance
            rows += [
                (first, second, name, value, _flag(value, "a loss on the line"), np.nan)
                for name, value in found.items()
            ]
        frame = pd.DataFrame(rows, columns=["rule", "other", "metric", "value", "flag", "t"])
        frame.insert(2, "layer", "network")
        return frame

    def plot(self, ax: Any = None, metric: str = "loss") -> Any:
        """The loss (or the accuracy) along every line, barriers in the legend; returns the Axes."""
        from gradlab.report import plots_descent

        return plots_descent.lines(self.to_frame(), ax, metric=metric)

    def _loss(self, first: str, second: str) -> np.ndarray:
        if (first, second) not in self.lines:
            raise KeyError(f"no line from {first!r} to {second!r}; there are {', '.join(map(str, self.lines))}")
        return self.lines[first, second].loss


def between(
    net: Network,
    batch: Batch,
    loss: Loss,
    solutions: Mapping[str, Params],
    points: int = 21,
    reference: str | None = None,
) -> Between:
    """The loss, and the accuracy where targets are classes, on straight lines between solutions.

    Args:
        net, batch, loss: as in `gl.evaluate`.
        solutions: {name: parameters}, two or more, of the same network; rules' names give their colours in figures.
        points: how many points on each line, both ends included.
        reference: draw lines from this solution to each other one only; None: between all pairs.

    Raises:
        ValueError: fewer than two solutions or three points, an unknown reference, or parameters that do not fit.
    """
    if not isinstance(solutions, Mapping) or len(solutions) < 2:
        raise ValueError("solutions: give a dict {name: parameters} with at least two of them")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise ValueError(f"points={points!r}: a line needs a whole number of points, at least three")
    if reference is not None and reference not in solutions:
        raise ValueError(f"reference={reference!r} is no solution; there are {', '.join(map(repr, solutions))}")
    checked = {}
    for name, params in solutions.items():
        try:
            checked[name], data = check(net, params, batch, loss)
        except ValueError as error:
            raise ValueError(f"solution {name!r}: {error}") from error
    others = [name for name in solutions if name != reference]
    pairs = list(combinations(solutions, 2)) if reference is None else [(reference, name) for name in others]
    classes = are_classes(net, data, loss)
    run, t = _compiled(net, loss, classes), np.linspace(0.0, 1.0, points)
    found = {}
    for first, second in pairs:
        losses, accuracy = jax.device_get(run(checked[first], checked[second], jnp.asarray(t), data))
        distance = float(np.linalg.norm(flat(checked[second]) - flat(checked[first])))
        shares = None if accuracy is None else np.asarray(accuracy, np.float64)
        found[first, second] = Line(np.asarray(losses, np.float64), shares, distance)
    return Between(t, found)


def _compiled(net: Network, loss: Loss, classes: bool) -> Callable[..., Any]:
    if is_hashable(net, loss):
        return partial(_jitted_line, net, loss, classes)
    return jax.jit(partial(_line, net, loss, classes))


def _line(
    net: Network, loss: Loss, classes: bool, first: Params, second: Params, t: Array, batch: Batch
) -> tuple[Array, Array | None]:
    def at(share: Array) -> tuple[Array, Array | None]:
        # Weighted like this, both ends are the solutions themselves to the last bit.
        point = jax.tree.map(lambda a, b: (1 - share).astype(a.dtype) * a + share.astype(a.dtype) * b, first, second)
        output = plan.outputs(net, point, batch.inputs)
        counted = classes and output.ndim == 3
        accuracy = spike_count_accuracy(output, batch.targets, batch.mask).accuracy if counted else None
        return loss(output, batch), accuracy

    return jax.lax.map(at, t)


_jitted_line = jax.jit(_line, static_argnums=(0, 1, 2))


def _highest(values: np.ndarray) -> float:
    return float(values.max()) if np.isfinite(values).all() else np.nan


def _flag(value: float, what: str) -> str:
    return "" if np.isfinite(value) else f"{what} is not finite"
