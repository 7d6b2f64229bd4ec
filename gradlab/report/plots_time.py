"""Figures over the steps of one sequence: metrics step by step, and credit by delay."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.report.labels import layer_label, metric_label
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

__all__ = ["lags", "timeline"]

_TARGETS = {"cosine": 1.0, "norm_ratio": 1.0, "projection": 1.0, "relative_error": 0.0, "angle": 0.0}
_CREDIT = {
    "credit": "credit, share of the gradient of {reference}",
    "norm": "length, relative to the gradient of {reference}",
    "cosine": "cosine with {reference} at the same lag",
}


def timeline(
    frame: pd.DataFrame,
    metric: str = "cosine",
    layer: str = "network",
    ax: Axes | None = None,
    *,
    reference: str = "BPTT",
    legend: bool = True,
) -> Axes:
    """A metric at every step of the sequence: thin, of that step's loss alone; thick, of all steps until then.

    Args:
        frame: what `Timeline.to_frame` returns; with a column "seed" the mean over seeds is drawn.
        metric, layer: what is drawn.
        ax: where to draw.
        reference: the rule that the metric compares with; it is left out.
        legend: whether to draw the legend below the axes.

    Raises:
        ValueError: the frame has no such metric or layer.
    """
    ax, alone = axes_for(ax)
    rows = _chosen(frame, metric=metric, layer=layer)
    if metric in _TARGETS:
        ax.axhline(_TARGETS[metric], color="0.75", linewidth=0.6, zorder=0)
    handles = []
    for rule, part in rows[rows["rule"] != reference].groupby("rule", sort=False):
        look = rule_style(str(rule))
        for kind, width, opacity in (("step", 0.5, 0.45), ("cumulative", 1.3, 1.0)):
            mean = part[part["kind"] == kind].groupby("step")["value"].mean()
            ax.plot(mean.index, mean, color=look.color, linestyle=look.line, linewidth=width, alpha=opacity)
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, label=str(rule)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="time step of the sequence", ylabel=metric_label(metric, reference))
    ax.set_title(layer_label(layer), loc="left")
    if legend:
        notes = ["thin: the loss of that step alone; thick: all steps until then"]
        finish(ax, alone, handles, notes + (["gaps: undefined"] if rows["value"].isna().any() else []))
    return ax


def lags(
    frame: pd.DataFrame,
    layer: str = "network",
    metric: str = "credit",
    ax: Axes | None = None,
    *,
    reference: str = "BPTT",
    legend: bool = True,
) -> Axes:
    """Credit by the delay between a weight's action and the error, one line per rule.

    Args:
        frame: what `LagProfile.to_frame` returns; with a column "seed" the mean over seeds is drawn.
        layer, metric: what is drawn: "credit", "norm" or "cosine".
        ax: where to draw.
        reference: the rule that the credit is a share of.
        legend: whether to draw the legend below the axes.

    Raises:
        ValueError: the frame has no such metric or layer.
    """
    ax, alone = axes_for(ax)
    rows = _chosen(frame, metric=metric, layer=layer)
    ax.axhline(0.0, color="0.75", linewidth=0.6, zorder=0)
    handles = []
    for rule, part in rows.groupby("rule", sort=False):
        look, mean = rule_style(str(rule)), part.groupby("lag")["value"].mean()
        shown = np.unique(np.linspace(0, len(mean) - 1, 12).round().astype(int))
        ax.plot(mean.index, mean, color=look.color, linestyle=look.line, marker=look.marker, markevery=shown.tolist())
        label = f"{rule} (sum {mean.sum():.2f})" if metric == "credit" else str(rule)
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=label))
    last = rows.groupby("lag")["last_lag"].first()
    binned = bool((last != last.index).any())
    if binned:
        ax.set_xscale("symlog", linthresh=1)
    where = "lag from action to error (time steps)" + (", first of each bin; values are sums of bins" if binned else "")
    ax.set(xlabel=where, ylabel=_CREDIT[metric].format(reference=reference))
    ax.set_title(layer_label(layer), loc="left")
    if legend:
        finish(ax, alone, handles, [], columns=2)
    return ax


def _chosen(frame: pd.DataFrame, **wanted: str) -> pd.DataFrame:
    for column, value in wanted.items():
        if value not in set(frame[column]):
            raise ValueError(f"the frame has no {column} {value!r}; it has {', '.join(dict.fromkeys(frame[column]))}")
        frame = frame[frame[column] == value]
    return frame
