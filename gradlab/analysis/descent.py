"""Does it matter? How far the loss falls along a rule's step, compared with the reference's.

A cosine is a property of two vectors; training only feels how far the loss falls. With g a rule's gradient and g* the
reference's (BPTT) on one batch, at the parameters theta,

    (1)  decrease(l)        = L(theta) - L(theta - l g / ||g||)                    a step of length l
    (2)  descent ratio      = decrease(l) of the rule / decrease(l) of the reference,   l = eta ||g*|| for both
    (3)  predicted decrease = l <g, g*> / ||g||,   predicted ratio = <g, g*> / (||g|| ||g*||)          first order

The rule's own length is taken away in (2), because a learning rate makes up for it. After an optimizer nothing is
matched:

    (4)  decrease = L(theta) - L(theta + u),   predicted decrease = -<u, g*>,
         u: the update that the optimizer makes of g, from a fresh state

L is the true loss of the spiking network, no smoothing: a staircase of the weights. A short step may not reach the next
stair; then its decrease is zero. Where the reference's own decrease is not positive, or lies within the round-off of
the loss, a ratio says nothing: it is undefined, with that reason, and both decreases are still given.

`best_steps` gives (1) on a grid of lengths. There is no search between its points: a search trusts that neighbours are
alike, and with jumps in L they are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array

from gradlab.analysis.rays import ROUND_OFF, Rays, losses_on_rays, ratio, rays, step_lengths, updates
from gradlab.checks import check
from gradlab.factories import Optimizer
from gradlab.losses import Batch, Loss
from gradlab.network import Network, Params
from gradlab.rules.base import Rule

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BestSteps", "Descent", "best_steps", "descent_ratios"]

LENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Step lengths relative to the norm of the parameters."""
_NOT_FINITE = "the loss after the step is not finite"


class Steps(NamedTuple):
    """Steps of every rule from the same parameters, and what they did to the loss on one batch.

    Attributes:
        loss: L(theta).
        length: [rules, steps], in units of the parameters.
        decrease: [rules, steps], equation (1) or (4).
        predicted: [rules, steps], equation (3) or (4); None on data that the gradients are not from.
    """

    loss: float
    length: np.ndarray
    decrease: np.ndarray
    predicted: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """What `descent_ratios` found.

    Attributes:
        rays: the rules' gradients, the reference's first.
        steps: {(kind, data): Steps}, kind "matched" or "optimizer", data "train" or "test".
    """

    rays: Rays
    steps: Mapping[tuple[str, str], Steps]

    @property
    def rules(self) -> tuple[str, ...]:
        return self.rays.rules

    def ratio(self, rule: str, step: int = 0, kind: str = "matched", data: str = "train") -> tuple[float, str]:
        """(2), or the same ratio after the optimizer, of the step at this position; and why it is undefined, or ""."""
        if rule not in self.rules:
            raise KeyError(f"{rule!r} was not measured; there are {', '.join(self.rules)}")
        if (kind, data) not in self.steps:
            raise KeyError(f"{(kind, data)} was not measured; there are {', '.join(map(str, self.steps))}")
        reference = self.rules[0]
        if reason := self.rays.flags.get(reference) or self.rays.flags.get(rule):
            return np.nan, reason
        found = self.steps[kind, data]
        own = found.decrease[self.rules.index(rule), step]
        return ratio(own, found.decrease[0, step], found.loss, self.rays.epsilon, reference)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, metric, value, flag, kind, data, length, relative_length, rate.

        `length` is that of the step, `relative_length` over ||theta||, `rate` over the gradient of the reference (of
        matched steps only). Metrics: "descent_ratio", "decrease", "loss" (before the step), and on the training data
        "predicted_ratio" and "predicted_decrease".
        """
        import pandas as pd

        rows = []
        for (kind, data), found in self.steps.items():
            for i, rule in enumerate(self.rules):
                for k, length in enumerate(found.length[i]):
                    size = self.rays.norms[0] if kind == "matched" else 0.0
                    rate = length / size if np.isfinite(size) and size > 0 else np.nan
                    relative = length / self.rays.norm if self.rays.norm > 0 else np.nan
                    for metric, value, flag in self._metrics(rule, k, kind, data):
                        rows.append((rule, "network", metric, value, flag, kind, data, length, relative, rate))
        names = ["rule", "layer", "metric", "value", "flag", "kind", "data", "length", "relative_length", "rate"]
        return pd.DataFrame(rows, columns=names)

    def plot(self, ax: Any = None, metric: str = "descent_ratio", data: str = "train") -> Any:
        """The descent ratio (or the decrease) over the length of the step; returns the Axes."""
        from gradlab.report import plots_descent

        return plots_descent.draw(self.to_frame(), ax, metric=metric, data=data, reference=self.rules[0])

    def _metrics(self, rule: str, step: int, kind: str, data: str) -> list[tuple[str, float, str]]:
        found, row = self.steps[kind, data], self.rules.index(rule)
        reason = self.rays.flags.get(rule, "")
        decrease = found.decrease[row, step]
        lost = reason or ("" if np.isfinite(decrease) else _NOT_FINITE)
        rows = [("descent_ratio", *self.ratio(rule, step, kind, data))]
        rows.append(("decrease", np.nan if lost else decrease, lost))
        rows.append(("loss", found.loss, "" if np.isfinite(found.loss) else "the loss is not finite"))
        if found.predicted is None:
            return rows
        own, unit = found.predicted[row, step], found.predicted[0, step]
        none = reason or self.rays.flags.get(self.rules[0], "")
        uphill = none or ("" if unit > 0 else f"to first order {self.rules[0]}'s step does not lower the loss")
        rows.append(("predicted_ratio", np.nan if uphill else own / unit, uphill))
        rows.append(("predicted_decrease", np.nan if none else own, none))
        return rows


def descent_ratios(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    lengths: Sequence[float] = LENGTHS,
    optimizer: Optimizer | optax.GradientTransformation | None = None,
    reference: Rule | None = None,
    test_batch: Batch | None = None,
    *,
    rates: Sequence[float] | None = None,
) -> Descent:
    """The decrease of the loss along every rule's step over the reference's: equations (1) to (4) of this module.

    Args:
        net, params, batch, loss, rules, key: as in `gl.compare`; the reference comes first in the result.
        lengths: step lengths relative to the norm of all parameters.
        optimizer: take its update of each gradient too: `gl.Optimizer` or an optax transformation.
        reference: None: BPTT.
        test_batch: measure the losses on these data too; the gradients stay those of `batch`.
        rates: learning rates eta instead of lengths, l = eta ||g*||.

    Raises:
        TypeError, ValueError: lengths or rates that are not positive, rates where the reference's gradient is zero,
            lengths where the parameters are, something that is no optimizer, and what `gl.gradients` refuses.
    """
    found = rays(net, params, batch, loss, rules, key, reference)
    moves = {"matched": (found.downhill, step_lengths(found, lengths, rates))}
    if optimizer is not None:
        moves["optimizer"] = (updates(optimizer, found), np.ones(1))
    batches = {"train": batch} if test_batch is None else {"train": batch, "test": test_batch}
    run = losses_on_rays(net, loss)
    steps = {}
    for kind, (directions, far) in moves.items():
        stacked = found.stacked(directions)
        with np.errstate(invalid="ignore", over="ignore"):
            predicted = np.outer(-directions @ found.gradients[0], far)
        for data, part in batches.items():
            _, part = check(net, params, part, loss)
            # Length zero is L(theta), by the same program as the other points: their difference has its round-off only.
            points = jnp.asarray(np.concatenate([[0.0], far]))
            losses = np.asarray(run(found.origin, stacked, points, part), np.float64)
            length = np.outer(np.linalg.norm(directions, axis=1), far)
            decrease = losses[:, :1] - losses[:, 1:]
            steps[kind, data] = Steps(float(losses[0, 0]), length, decrease, predicted if data == "train" else None)
    return Descent(found, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class BestSteps:
    """What `best_steps` found.

    Attributes:
        rays: the rules' gradients, the reference's first.
        lengths: [points], in units of the parameters, ascending.
        loss: L(theta).
        losses: [rules, points], L(theta - length g / ||g||).
    """

    rays: Rays
    lengths: np.ndarray
    loss: float
    losses: np.ndarray

    @property
    def rules(self) -> tuple[str, ...]:
        return self.rays.rules

    def best(self, rule: str) -> tuple[float, float, str]:
        """(best length, decrease there, why there is none or "") among the points of the grid.

        Of lengths that are equally good, the shortest. At an edge of the grid the best is not known.
        """
        losses = self.losses[self.rules.index(rule)]
        if reason := self.rays.flags.get(rule):
            return np.nan, np.nan, reason
        if not np.isfinite(losses).any() or not np.isfinite(self.loss):
            return np.nan, np.nan, "the losses are not finite"
        place = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
        decrease = self.loss - losses[place]
        if decrease <= ROUND_OFF * self.rays.epsilon * abs(self.loss):
            return np.nan, np.nan, "no length of the grid lowers the loss by more than round-off"
        for edge, word in ((0, "shortest"), (len(losses) - 1, "longest")):
            if place == edge:
                return np.nan, np.nan, f"the {word} length of the grid is the best: widen the grid"
        return float(self.lengths[place]), float(decrease), ""

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, metric, value, flag, length, relative_length.

        "loss" is the curve, one row per length, length 0 included; "best_length", "best_relative_length",
        "best_decrease" and "best_ratio" (the best decrease over the reference's) have no length.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        scale = 1 / self.rays.norm if self.rays.norm > 0 else np.nan
        _, unit, none = self.best(self.rules[0])
        for i, rule in enumerate(self.rules):
            reason = self.rays.flags.get(rule, "")
            for length, value in zip([0.0, *self.lengths], [self.loss, *self.losses[i]], strict=True):
                flag = reason or ("" if np.isfinite(value) else _NOT_FINITE)
                rows.append((rule, "network", "loss", np.nan if flag else value, flag, length, length * scale))
            length, decrease, flag = self.best(rule)
            both = flag or (f"{self.rules[0]}: {none}" if none else "")
            found = (("best_length", length), ("best_relative_length", length * scale), ("best_decrease", decrease))
            rows += [(rule, "network", metric, value, flag, np.nan, np.nan) for metric, value in found]
            rows.append((rule, "network", "best_ratio", np.nan if both else decrease / unit, both, np.nan, np.nan))
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "flag", "length", "relative_length"])

    def plot(self, ax: Any = None) -> Any:
        """The loss along every rule's direction, the best lengths marked; returns the Axes."""
        from gradlab.report import plots_descent

        return plots_descent.curves(self.to_frame(), ax)


def best_steps(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    lengths: Sequence[float] | None = None,
    reference: Rule | None = None,
    *,
    rates: Sequence[float] | None = None,
) -> BestSteps:
    """The loss along minus every rule's gradient on a grid of lengths, and the best length: equation (1).

    Args:
        net, params, batch, loss, rules, key, reference: as in `descent_ratios`.
        lengths: relative to the norm of all parameters; None: 33 lengths from 1e-4 to 1 in equal ratios.
        rates: learning rates eta instead of lengths, l = eta ||g*||.

    Raises:
        TypeError, ValueError: as in `descent_ratios`; fewer than three lengths.
    """
    found = rays(net, params, batch, loss, rules, key, reference)
    far = np.unique(step_lengths(found, np.geomspace(1e-4, 1.0, 33) if lengths is None else lengths, rates))
    if len(far) < 3:
        raise ValueError(f"{len(far)} different lengths: the best of a grid can be inside it only from three on")
    _, batch = check(net, params, batch, loss)
    points = jnp.asarray(np.concatenate([[0.0], far]))
    losses = np.asarray(losses_on_rays(net, loss)(found.origin, found.stacked(found.downhill), points, batch))
    losses = losses.astype(np.float64)
    return BestSteps(found, far, float(losses[0, 0]), losses[:, 1:])
