"""Figures of descent: ratios over step lengths, losses along rules' directions, losses between solutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.report.labels import select
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

_RELATIVE = "step length relative to the norm of the weights"
_WORDS = {
    "descent_ratio": "decrease of the loss relative to {reference}",
    "decrease": "decrease of the loss",
}
_WIDE = 20.0


def draw(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "descent_ratio",
    data: str = "train",
    reference: str = "BPTT",
) -> Axes:
    """The descent ratio (or the decrease of the loss) of every rule over the length of the step.

    Full markers: steps of matched length. Hollow: the optimizer's updates, at their own lengths. Thin dotted lines:
    what the gradients predict to first order.

    Args:
        frame: what `Descent.to_frame` returns.
        ax: where to draw.
        metric: "descent_ratio" or "decrease".
        data: "train" or "test".
        reference: for the label.
    """
    if metric not in _WORDS:
        raise ValueError(f"metric={metric!r}: choose from {', '.join(map(repr, _WORDS))}")
    ax, alone = axes_for(ax)
    rows = select(frame, one=(), data=data)
    handles = []
    for i, (rule, part) in enumerate(rows.groupby("rule", sort=False)):
        handles.append(_rule(ax, part, str(rule), metric, 0.03 * (i + 1)))
    ax.set_xscale("log")
    for level in (1.0, 0.0) if metric == "descent_ratio" else (0.0,):
        ax.axhline(level, color="0.75", linewidth=0.6, zorder=0)
    shown = rows[rows["metric"] == metric]
    if metric == "descent_ratio" and np.nanmax(np.abs(shown["value"]), initial=0.0) > _WIDE:
        ax.set_yscale("symlog", linthresh=1.0)
    ax.set(xlabel=_RELATIVE, ylabel=_WORDS[metric].format(reference=reference))
    if (rows["kind"] == "optimizer").any():
        handles.append(
            Line2D([], [], linestyle="", marker="o", color="0.4", markerfacecolor="white", label="optimizer")
        )
    predicted = {"descent_ratio": "predicted_ratio", "decrease": "predicted_decrease"}[metric]
    if (rows["metric"] == predicted).any():
        handles.append(Line2D([], [], linestyle=":", color="0.4", linewidth=0.8, label="first order"))
    ax.set_title("test data" if data == "test" else "", loc="left")
    finish(ax, alone, handles, _undefined(shown))
    return ax


def curves(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The loss along minus every rule's gradient over the length of the step; a star at the best length of the grid.

    `frame` is what `BestSteps.to_frame` returns.
    """
    ax, alone = axes_for(ax)
    handles, notes = [], []
    for rule, part in frame.groupby("rule", sort=False):
        look, curve = rule_style(str(rule)), part[(part["metric"] == "loss") & (part["length"] > 0)]
        ax.plot(curve["relative_length"], curve["value"], color=look.color, linestyle=look.line)
        one = {metric: group.iloc[0] for metric, group in part.groupby("metric")}
        best, decrease = one["best_relative_length"], one["best_decrease"]
        label = str(rule)
        if np.isfinite(best["value"]):
            height = curve.loc[curve["length"] == one["best_length"]["value"], "value"]
            ax.plot([best["value"]], height, "*", color=look.color, markersize=7, markeredgecolor="white", zorder=4)
            label += f": falls by {decrease['value']:.2g} at {best['value']:.2g}"
        else:
            notes.append(f"{rule}: {best['flag']}")
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, label=label))
    start = frame.loc[(frame["metric"] == "loss") & (frame["length"] == 0), "value"]
    ax.axhline(start.iloc[0], color="0.6", linewidth=0.6, zorder=0)
    ax.set_xscale("log")
    ax.set(xlabel=_RELATIVE, ylabel="loss after the step")
    finish(ax, alone, handles, ["grey: before the step; star: the best length of the grid", *notes], columns=1)
    return ax


def lines(frame: pd.DataFrame, ax: Axes | None = None, *, metric: str = "loss") -> Axes:
    """The loss or the accuracy on the straight lines between solutions; `frame` is what `Between.to_frame` returns.

    A line has the colour of its second solution, and the marker of its first in that one's colour.
    """
    ax, alone = axes_for(ax)
    rows = select(frame, one=(), metric=metric)
    handles = []
    for (first, second), part in rows.groupby(["rule", "other"], sort=False):
        one, two = rule_style(str(first)), rule_style(str(second))
        look: dict[str, Any] = {"color": two.color, "linestyle": two.line, "marker": one.marker}
        look |= {"markerfacecolor": one.color, "markeredgecolor": one.color}
        ax.plot(part["t"], part["value"], markevery=max(1, len(part) // 5), **look)
        pair = frame[(frame["rule"] == first) & (frame["other"] == second) & (frame["metric"] == "barrier")]
        known = bool(np.isfinite(pair["value"]).all())
        text = f": barrier {pair['value'].iloc[0]:.2g}" if known else ": barrier undefined"
        handles.append(Line2D([], [], label=f"{first} to {second}" + (text if metric == "loss" else ""), **look))
    ax.set(xlabel="way from the first solution (0) to the second (1)", ylabel=metric)
    if metric == "accuracy":
        ax.set(ylabel="accuracy (share)", ylim=(0.0, 1.02))
    notes = [f"gaps: {reason}" for reason in _reasons(rows)]
    finish(ax, alone, handles, notes, columns=1 if metric == "loss" else 2)
    return ax


def _rule(ax: Axes, part: pd.DataFrame, rule: str, metric: str, height: float) -> Line2D:
    """One rule's points; crosses for what is undefined stand at a height of their own, a share of the axes."""
    look = rule_style(rule)
    predicted = {"descent_ratio": "predicted_ratio", "decrease": "predicted_decrease"}[metric]
    matched, optimized = part[part["kind"] == "matched"], part[part["kind"] == "optimizer"]
    promise = matched[matched["metric"] == predicted].sort_values("length")
    ax.plot(promise["relative_length"], promise["value"], color=look.color, linestyle=":", linewidth=0.7)
    own = matched[matched["metric"] == metric].sort_values("length")
    ax.plot(own["relative_length"], own["value"], color=look.color, linestyle=look.line, marker=look.marker)
    after = optimized[optimized["metric"] == metric]
    ax.plot(after["relative_length"], after["value"], look.marker, color=look.color, markerfacecolor="white")
    void = own[~np.isfinite(own["value"].to_numpy(float))]
    if len(void):
        ax.plot(
            void["relative_length"], [height] * len(void), "x", color=look.color, transform=ax.get_xaxis_transform()
        )
    return Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=rule)


def _reasons(rows: pd.DataFrame) -> list[str]:
    """Why values are undefined; a flag that is empty comes back from a file as NaN."""
    return [flag for flag in dict.fromkeys(rows["flag"]) if isinstance(flag, str) and flag]


def _undefined(rows: pd.DataFrame) -> list[str]:
    reasons = _reasons(rows)
    return [f"crosses: undefined ({'; '.join(reasons)})"] if reasons else []
