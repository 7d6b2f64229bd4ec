"""A figure of where the error of a gradient estimator comes from: its bias, its own noise, and the data's."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.report.labels import layer_label, select
from gradlab.report.legends import axes_for, finish

_PARTS = {
    "relative_bias": ("bias", "D", "#000000"),
    "relative_rule_noise": ("the rule's noise", "o", "#0072B2"),
    "relative_data_noise": ("the data's noise", "s", "#D55E00"),
}
_BESIDE = 0.22
_ROW = 0.36  # inches


def draw(frame: pd.DataFrame, ax: Axes | None = None, *, layer: str = "network", reference: str = "BPTT") -> Axes:
    """Per rule (rows) the bias, the rule's noise and the data's noise, relative to the mean gradient of the reference.

    Their squares add up to the expected squared distance of a single gradient from that mean gradient.

    Args:
        frame: what `EstimatorNoise.to_frame` returns.
        ax: where to draw.
        layer: "network", "layer_0", ... or the path of a parameter.
        reference: the rule that bias is measured against, for the label.
    """
    ax, alone = axes_for(ax)
    rows = select(frame, one=(), layer=layer)
    rows = rows[rows["metric"].isin(_PARTS)]
    rules = list(dict.fromkeys(rows["rule"]))
    values = rows["value"].to_numpy(float)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    ax.set_xscale("log")
    ax.set_xlim(low / 4, max(high, 1.0) * 1.6)
    ax.axvline(1.0, color="0.75", linewidth=0.6, zorder=0)
    for y in np.arange(1, len(rules)) - 0.5:
        ax.axhline(y, color="0.9", linewidth=0.5, zorder=0)
    for _, row in rows.iterrows():
        _mark(ax, row, rules.index(row["rule"]), low / 2.6)
    ax.set_yticks(range(len(rules)), rules)
    ax.set_ylim(len(rules) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"length relative to the mean gradient of {reference}")
    ax.set_title(layer_label(layer), loc="left")
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, label=name) for name, marker, color in _PARTS.values()
    ]
    finish(ax, alone, handles, _notes(rows), height=max(1.2, _ROW * len(rules)))
    return ax


def _mark(ax: Axes, row: pd.Series, place: int, edge: float) -> None:
    _, marker, color = _PARTS[row["metric"]]
    y = place + (list(_PARTS).index(row["metric"]) - 1) * _BESIDE
    if not np.isfinite(row["value"]):
        ax.plot(edge, y, "x", color=color)
    elif row["value"] == 0:
        ax.plot(edge, y, marker, color=color, markerfacecolor="white", markeredgewidth=0.7)
    else:
        ax.plot([edge * 1.5, row["value"]], [y, y], color=color, linewidth=0.4, alpha=0.5, zorder=1)
        ax.plot(row["value"], y, marker, color=color)


def _notes(rows: pd.DataFrame) -> list[str]:
    notes = []
    if (rows["value"] == 0).any():
        notes.append("hollow, at the left edge: exactly zero")
    undefined = rows[~np.isfinite(rows["value"].to_numpy(float))]
    if len(undefined):
        notes.append(f"crosses: undefined ({'; '.join(dict.fromkeys(undefined['flag']))})")
    return notes
