"""Figures of an attribution: the ladder from a rule to the reference, and the Shapley values of its paths."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.report.labels import layer_label, metric_label
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

__all__ = ["PATH_COLORS", "attribution", "shares"]

PATH_COLORS = {
    "time inside the layer": "#0072B2", "reset": "#56B4E9", "adaptation": "#5D3A9B", "recurrence": "#009E73",
    "temporal trace": "#44AA99", "memory of later layers": "#E69F00", "feedback weights": "#D55E00",
    "learning signal": "#CC79A7", "place of the loss": "#8C564B", "steps that teach": "#7F7F7F",
    "links back to earlier layers": "#F0E442",
}  # fmt: skip
"""One colour per path in every figure."""


def attribution(
    frame: pd.DataFrame,
    metric: str = "cosine",
    layer: str = "network",
    kind: str = "ladder",
    ax: Axes | None = None,
    *,
    reference: str = "BPTT",
) -> Axes:
    """The gap between one rule and the reference, by path.

    Args:
        frame: what `Attribution.to_frame` returns, for one rule; with a column "seed" the mean over seeds is drawn.
        metric, layer: what is drawn.
        kind: "ladder", the metric as the paths are put back one after the other; "shapley", what each path is worth.
        ax: where to draw.
        reference: the reference's name, for the label.

    Raises:
        ValueError: another kind; rows that are not there; more than one rule.
    """
    if kind not in ("ladder", "shapley"):
        raise ValueError(f'kind={kind!r}: choose "ladder" or "shapley"')
    ax, _ = axes_for(ax)
    rows = frame[(frame["metric"] == metric) & (frame["layer"] == layer) & (frame["kind"] == kind)]
    if rows.empty:
        raise ValueError(f"the frame has no {kind} of {metric!r} in {layer!r}")
    names = list(dict.fromkeys(rows["rule"]))
    if len(names) > 1:
        raise ValueError(f"one figure shows one rule, the frame has {', '.join(names)}: select one, or use `shares`")
    (rule,) = names
    value = rows.groupby("path", sort=False)["value"].mean()
    labels = [str(rule) if path == "" else (f"+ {path}" if kind == "ladder" else path) for path in value.index]
    colors = [rule_style(str(rule)).color if path == "" else PATH_COLORS.get(str(path), "0.5") for path in value.index]
    places = range(len(value))
    ax.barh(places, value.fillna(0.0), color=colors, height=0.65)
    reach = max(1e-12, float(value.abs().max()))
    for place, number in zip(places, value, strict=True):
        text = "undefined" if pd.isna(number) else f"{number:.3f}"
        ax.annotate(text, (max(number, 0) if number == number else 0, place), (2, 0), textcoords="offset points",
                    va="center", fontsize="small")  # fmt: skip
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.6)
    ax.set_xlim(min(0.0, 1.15 * float(value.min())), max(0.0, float(value.max())) + 0.2 * reach)
    what = metric_label(metric, reference)
    ax.set_xlabel(what if kind == "ladder" else f"worth of the path in the {metric.replace('_', ' ')}")
    ax.set_title(layer_label(layer), loc="left")
    return ax


def shares(frame: pd.DataFrame, layer: str = "network", ax: Axes | None = None) -> Axes:
    """The share of each path in the gap of each rule: one row per rule, paths side by side; they add up to 1.

    Shares below zero stand left of the line: putting such a path back leads away from the reference in the mean over
    all orders.

    Args:
        frame: rows of `Attribution.to_frame` of several rules, joined; with a column "seed" the mean is drawn.
        layer: "network", a layer or a parameter.
        ax: where to draw.
    """
    ax, alone = axes_for(ax)
    rows = frame[(frame["kind"] == "share") & (frame["layer"] == layer)]
    if rows.empty:
        raise ValueError(f"the frame has no shares of {layer!r}")
    notes = _left_out(rows)
    table = rows.groupby(["rule", "path"], sort=False)["value"].mean().unstack()
    table = table.reindex(index=list(dict.fromkeys(rows["rule"])), columns=[p for p in PATH_COLORS if p in table])
    for place, (_, row) in enumerate(table.iterrows()):
        left, right = 0.0, 0.0
        for path, number in row.dropna().items():
            start = right if number >= 0 else left
            ax.barh(place, number, left=start, color=PATH_COLORS[str(path)], height=0.65, linewidth=0)
            left, right = (left, right + number) if number >= 0 else (left + number, right)
        if row.isna().all():
            ax.annotate("no gap", (0, place), (3, 0), textcoords="offset points", va="center", fontsize="small")
    ax.set_yticks(range(len(table)), [str(rule) for rule in table.index])
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.6)
    ax.axvline(1, color="0.75", linewidth=0.6, zorder=0)
    ax.set_xlabel("share of the gap to the reference (adds up to 1)")
    ax.set_title(layer_label(layer), loc="left")
    _legend(ax, alone, list(table.columns), notes)
    return ax


def _left_out(rows: pd.DataFrame) -> list[str]:
    """What must be said in words when some seeds of a rule are undefined: means leave them out."""
    if "seed" not in rows or not rows["value"].isna().any():
        return []
    lost = rows[rows["value"].isna()].groupby("rule", sort=False)["seed"].nunique()
    return [f"undefined in {count} of {rows['seed'].nunique()} seeds: {rule}" for rule, count in lost.items()]


def _legend(ax: Axes, alone: bool, names: list[str], notes: list[str]) -> None:
    handles = [Line2D([], [], color=PATH_COLORS[n], marker="s", linestyle="", markersize=5, label=n) for n in names]
    finish(ax, alone, handles, notes, columns=2)
