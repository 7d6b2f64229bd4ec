"""How many updates, or how much time, until a run of training reaches a target.

A run that does not reach the target within what was recorded is *censored*: it needs more than that, nobody knows how
many. It is never averaged as if it had reached the target in its last step, which would flatter the rules that fail
most often. What is given over seeds is therefore a median, and only where more than half of the runs reached the
target: the others then lie above it, wherever they lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from gradlab.analysis.similarity import tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RunToTarget(NamedTuple):
    """One run.

    Attributes:
        rule, seed: which.
        updates: steps until the target is reached; NaN if it is not.
        resolution: steps since the last defined measurement before: the target was reached somewhere between the two.
        last: the last step with a defined value; what is known of a run that did not reach the target.
        flag: "" or why `updates` is NaN.
    """

    rule: str
    seed: int
    updates: float
    resolution: float
    last: float
    flag: str


@dataclasses.dataclass(frozen=True)
class UpdatesToTarget:
    """What `updates_to_target` found.

    Attributes:
        runs: one entry per rule and seed.
        condition: what had to be reached, in words.
        target: the number in it.
        seconds_per_update: {rule: seconds}; None: results are in updates.
    """

    runs: tuple[RunToTarget, ...]
    condition: str
    target: float
    seconds_per_update: Mapping[str, float] | None = None

    @property
    def metric(self) -> str:
        return "updates_to_target" if self.seconds_per_update is None else "seconds_to_target"

    def to_frame(self) -> pd.DataFrame:
        """One row per run: rule, layer, seed, metric, value, flag, resolution, last, condition, target.

        `value`, `resolution` and `last` are updates, or seconds if seconds per update were given.
        """
        rows = []
        for run in self.runs:
            unit = 1.0 if self.seconds_per_update is None else self.seconds_per_update[run.rule]
            row: dict[str, Any] = {"rule": run.rule, "layer": "network", "seed": run.seed, "metric": self.metric}
            row |= {"value": run.updates * unit, "flag": run.flag, "resolution": run.resolution * unit}
            rows.append({**row, "last": run.last * unit, "condition": self.condition, "target": self.target})
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """One row per rule: rule, layer, metric ("median_..."), value, flag, n_reached, n.

        The median over seeds; NaN with a flag unless more than half of the runs reached the target, and unless every
        other run was followed for at least as long as the median.
        """
        rows = []
        for rule, part in self.to_frame().groupby("rule", sort=False):
            value, flag = _median(part["value"].to_numpy(), part["last"].to_numpy())
            row: dict[str, Any] = {"rule": rule, "layer": "network", "metric": f"median_{self.metric}", "value": value}
            rows.append({**row, "flag": flag, "n_reached": int(part["value"].notna().sum()), "n": len(part)})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A point per run and a bar at the median; runs that did not reach the target are arrows at the right edge."""
        from gradlab.report import plots_statistics

        return plots_statistics.updates(self.to_frame(), self.summary(), ax)


def updates_to_target(
    history: pd.DataFrame | Mapping[str, ArrayLike] | ArrayLike,
    target: float,
    smooth: int = 1,
    *,
    higher_is_better: bool,
    stay: bool = False,
    metric: str = "accuracy",
    column: str = "train_rule",
    layer: str = "network",
    steps: ArrayLike | None = None,
    seconds_per_update: float | Mapping[str, float] | None = None,
) -> UpdatesToTarget:
    """The first step at which a metric of training reaches a target.

        (1)  m[i] = mean(values[i - smooth + 1], ..., values[i])
        (2)  updates = steps[i] of the first i with m[i] >= target  (<= target if lower is better);
             with `stay`, of the first i from which this holds until the end of the record

    Args:
        history: a tidy frame; or {rule: [seeds, steps]}, for example of `Run.history["loss"]`; or one array [seeds,
            steps]. NaN is undefined: it cannot reach a target.
        target: the value to reach.
        smooth: how many measurements are averaged, the present one and those before it. A noisy metric reaches any
            target early by luck; `smooth` and `stay` guard against that.
        higher_is_better: True for accuracies, False for losses.
        stay: count only what is not lost again.
        metric, column, layer: for frames, the rows that are followed and the column with the rules' names.
        steps: for arrays, the number of updates before each measurement; None: 0, 1, 2, ..., which is right for the
            losses of `gl.train` with one update per iteration, where each is measured before its update.
        seconds_per_update: for all rules, or per rule; turns updates into seconds.

    Raises:
        ValueError: a frame without these rows or with several rows of one run and step, arrays that are not [seeds,
            steps], steps that do not increase, smoothing over more measurements than there are, seconds that are not
            positive or lacking for a rule.
    """
    if smooth != int(smooth) or smooth < 1:
        raise ValueError(f"smooth={smooth!r}: give the number of measurements to average, 1 for none")
    if not np.isfinite(target):
        raise ValueError(f"target={target!r} is not a finite number")
    if isinstance(history, pd.DataFrame):
        series = _from_frame(history, metric, column, layer)
        name = metric
    else:
        series = _from_arrays(history, steps)
        name = "metric"
    found = tuple(
        _run(rule, seed, at, values, why, (target, int(smooth), higher_is_better, stay))
        for rule, seed, at, values, why in series
    )
    words = f"{name} {'at least' if higher_is_better else 'at most'} {target:g}"
    words += f" (mean of {smooth})" if smooth > 1 else ""
    words += ", for good" if stay else ""
    rules = tuple(dict.fromkeys(run.rule for run in found))
    return UpdatesToTarget(found, words, float(target), _seconds(seconds_per_update, rules))


_Series = list[tuple[str, int, np.ndarray, np.ndarray, str]]  # rule, seed, steps, values, reasons of undefined values


def _run(
    rule: str, seed: int, steps: np.ndarray, values: np.ndarray, why: str, wanted: tuple[float, int, bool, bool]
) -> RunToTarget:
    target, smooth, higher, stay = wanted
    if len(values) < smooth:
        raise ValueError(f"smooth={smooth}, but {rule}, seed {seed}, has only {len(values)} measurements")
    means = np.lib.stride_tricks.sliding_window_view(values, smooth).mean(axis=-1)
    at = steps[smooth - 1 :]
    reached = means >= target if higher else means <= target  # never where the mean is NaN
    lasting = np.logical_and.accumulate(reached[::-1])[::-1]
    counted = lasting if stay else reached
    defined = np.isfinite(means)
    last = float(at[defined][-1]) if defined.any() else np.nan
    if counted.any():
        i = int(np.argmax(counted))
        before = max(at[:i][defined[:i]], default=0.0)
        return RunToTarget(rule, seed, float(at[i]), float(at[i] - before), last, "")
    if not defined.any():
        return RunToTarget(rule, seed, np.nan, np.nan, last, f"undefined throughout{why and f': {why}'}")
    flag = "reached, but lost again" if reached.any() else "not reached"
    flag += f" within {last:g} updates"
    if not defined.all():
        flag += f"; undefined at {int((~defined).sum())} of {len(defined)} measurements{why and f' ({why})'}"
    return RunToTarget(rule, seed, np.nan, np.nan, last, flag)


def _median(values: np.ndarray, last: np.ndarray) -> tuple[float, str]:
    reached = np.isfinite(values)
    if 2 * reached.sum() <= len(values):
        return np.nan, f"reached by {reached.sum()} of {len(values)} runs: a median needs more than half"
    found = float(np.median(np.where(reached, values, np.inf)))
    short = ~reached & ~(last >= found)
    if short.any():
        return np.nan, f"{short.sum()} of {len(values)} runs ended before the others' median without reaching it"
    return found, ""


def _from_arrays(history: Mapping[str, ArrayLike] | ArrayLike, steps: ArrayLike | None) -> _Series:
    series: _Series = []
    for rule, array in (history if isinstance(history, Mapping) else {"training": history}).items():
        values = np.asarray(array, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"the history of {rule} has shape {values.shape}: give [seeds, steps]")
        at = np.arange(values.shape[1]) if steps is None else np.asarray(steps, dtype=np.float64)
        if at.shape != values.shape[1:] or not (np.diff(at) > 0).all():
            raise ValueError(f"steps must be {values.shape[1]} increasing numbers, one per measurement of {rule}")
        series += [(rule, seed, at, _finite(row), "") for seed, row in enumerate(values)]
    if not series:
        raise ValueError("history holds no rule: give {rule name: array [seeds, steps]}")
    return series


def _from_frame(frame: pd.DataFrame, metric: str, column: str, layer: str) -> _Series:
    frame = tidy(frame)
    missing = [name for name in (column, "step") if name not in frame.columns]
    if missing:
        raise ValueError(f"the frame has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")
    rows = frame[frame["metric"] == metric]
    rows = rows[rows["layer"] == layer] if "layer" in rows.columns else rows
    if rows.empty:
        known = ", ".join(map(repr, dict.fromkeys(frame["metric"])))
        raise ValueError(f"no row has metric {metric!r} and layer {layer!r}; the metrics are {known}")
    if rows.duplicated([column, "seed", "step"]).any():
        raise ValueError(f"several rows have one {column}, seed and step: select one network, study and rule first")
    series: _Series = []
    for key, part in rows.groupby([column, "seed"], sort=False):
        rule, seed = cast(tuple[str, int], key)
        part = part.sort_values("step")
        why = "; ".join(flag for flag in dict.fromkeys(part["flag"]) if flag)
        series.append((str(rule), int(seed), part["step"].to_numpy(float), part["value"].to_numpy(), why))
    return series


def _finite(values: np.ndarray) -> np.ndarray:
    # An infinite loss has not reached anything either, and would warn in a mean.
    return np.where(np.isfinite(values), values, np.nan)


def _seconds(given: float | Mapping[str, float] | None, rules: tuple[str, ...]) -> dict[str, float] | None:
    if given is None:
        return None
    table = dict(given) if isinstance(given, Mapping) else dict.fromkeys(rules, given)
    for rule in rules:
        if not 0 < table.get(rule, np.nan) < np.inf:
            raise ValueError(f"seconds_per_update has no positive number for {rule}: {table.get(rule)!r}")
    return {rule: float(table[rule]) for rule in rules}
