"""Figures of the loss along straight lines through the space of weights."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style


def line_profile(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    label: str = "distance along the direction (multiples of it)",
    loss_label: str = "loss",
    log: bool = False,
    legend: bool = True,
) -> Axes:
    """The loss along a line, a curve per rule or batch; thin vertical lines mark 0 and 1.

    Args:
        frame: rule, metric, a, value, flag, as `LineProfile.to_frame` returns.
        ax: where to draw.
        label, loss_label: of the axes.
        log: logarithmic loss; points that are not positive are left out then, and said to be.
        legend: whether to draw the legend below the axes.
    """
    ax, alone = axes_for(ax)
    rows = frame[frame["metric"] == "loss"]
    # A CSV reader makes NaN of empty text.
    handles, notes = [], [f"missing: {reason}" for reason in dict.fromkeys(rows["flag"].dropna()) if reason]
    for mark in (0.0, 1.0):
        if rows["a"].min() < mark < rows["a"].max():
            ax.axvline(mark, color="0.8", linewidth=0.6, zorder=0)
    for name, curve in rows.groupby("rule", sort=False):
        handles.append(_curve(ax, str(name), curve["a"].to_numpy(), curve["value"].to_numpy()))
    if log:
        ax.set_yscale("log", nonpositive="mask")
        if (rows["value"] <= 0).any():
            notes.append("missing: losses that are not positive have no logarithm")
    ax.set(xlabel=label, ylabel=loss_label)
    ax.margins(x=0.02)
    if legend and (len(handles) > 1 or notes):
        finish(ax, alone, handles, notes)
    return ax


def _curve(ax: Axes, name: str, a: np.ndarray, loss: np.ndarray) -> Line2D:
    # "OSTL, test batch" has the look of OSTL's other curves by colour; its own dashes tell them apart.
    rule, _, rest = name.partition(", ")
    look = rule_style(f"{rule}({rest})" if rest else rule)
    (line,) = ax.plot(a, loss, color=look.color, linestyle=look.line, label=name)
    line.set(marker=look.marker, markevery=max(1, len(a) // 10))
    return line
