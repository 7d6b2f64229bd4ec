"""Figures: a summary goes in, matplotlib Axes come out. Nothing is computed here but positions of ink.

Every function takes an optional `ax`; without one it makes a figure in the style in force
(`gradlab.report.style`). Curves and maps take the frame that `gradlab.analysis.similarity.summarise`
returns, for one study, network and rule trained with. What is undefined is drawn as undefined (a gap,
hatching, a cross) and said in words beside the legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gradlab.report.labels import layer_label, metric_label, select, whole_layers
from gradlab.report.legends import axes_for, figure_legend, finish
from gradlab.report.plots_attribution import attribution, shares
from gradlab.report.plots_curvature import curvature_along, eigenvalues, hessian_map, spectral_density, trace
from gradlab.report.plots_landscape import landscape, out_of_plane, path_losses
from gradlab.report.plots_lines import line_profile
from gradlab.report.plots_maps import gram_matrix, rule_layer_map
from gradlab.report.plots_surface import surface
from gradlab.report.plots_time import lags, timeline
from gradlab.report.style import new_figure, rule_style

__all__ = [
    "attribution", "curvature_along", "eigenvalues", "gram_matrix", "hessian_map", "lags", "landscape",
    "learning_curves", "line_profile", "metric_label", "out_of_plane", "path_losses", "rule_layer_map", "shares",
    "similarity_panels", "similarity_trace", "spectral_density", "surface", "timeline", "trace",
]  # fmt: skip

_TARGETS = {"cosine": 1.0, "norm_ratio": 1.0, "projection": 1.0, "relative_error": 0.0}
_STEPS = "training step (updates of the weights)"
_SAME = 1e-4
_PARTIAL = "hollow: some seeds are undefined and left out"


def similarity_trace(
    summary: pd.DataFrame,
    metric: str = "cosine",
    layer: str = "network",
    ax: Axes | None = None,
    *,
    reference: str = "BPTT",
    legend: bool = True,
    log: bool | None = None,
) -> Axes:
    """A metric of the gradient over training: per rule, the mean line and the band of the interval.

    Args:
        summary: what `summarise` returns.
        metric, layer: what is drawn; `layer` is "network", "layer_0", ... or the path of a parameter.
        ax: where to draw.
        reference: the rule that the metric compares with, for the label.
        legend: whether to draw the legend below the axes.
        log: whether the vertical axis is logarithmic; None: it is for ratios of norms, which span orders of magnitude.
    """
    ax, alone = axes_for(ax)
    rows = select(summary, metric=metric, layer=layer)
    handles, notes = _trace(ax, rows, metric)
    ax.set(xlabel=_STEPS, ylabel=metric_label(metric, reference))
    ax.set_title(layer_label(layer), loc="left")
    if metric == "norm_ratio" if log is None else log:
        _logarithmic(ax, rows)
    if legend:
        finish(ax, alone, handles, notes)
    return ax


def similarity_panels(
    summary: pd.DataFrame,
    metric: str = "cosine",
    layers: Sequence[str] | None = None,
    *,
    reference: str = "BPTT",
    columns: int = 2,
    log: bool | None = None,
) -> Figure:
    """`similarity_trace` for several layers with one legend; by default the network and all whole layers."""
    rows = summary[summary["metric"] == metric]
    layers = whole_layers(rows) if layers is None else list(layers)
    columns = min(columns, len(layers))
    n_rows = -(-len(layers) // columns)
    height = 1.55 * n_rows + 0.75
    figure, axes = new_figure(n_rows, columns, height=height, sharex=True, sharey=True)
    entries: dict[str, Line2D] = {}
    notes: list[str] = []
    for ax, layer in zip(axes, layers, strict=False):
        handles, here = _trace(ax, select(summary, metric=metric, layer=layer), metric)
        entries |= {str(handle.get_label()): handle for handle in handles}
        notes += [note for note in here if note not in notes]
        ax.set_title(layer_label(layer), loc="left")
    if metric == "norm_ratio" if log is None else log:
        for ax in axes[: len(layers)]:
            _logarithmic(ax, rows[rows["layer"].isin(layers)])
    for ax in axes[len(layers) :]:
        ax.set_axis_off()
    for i, ax in enumerate(axes[: len(layers)]):
        if i + columns >= len(layers):  # nothing below it
            ax.tick_params(labelbottom=True)
            ax.set_xlabel(_STEPS)
        if i % columns == 0:
            ax.set_ylabel(metric_label(metric, reference))
    figure_legend(figure, list(entries.values()), notes)
    return figure


def learning_curves(
    summary: pd.DataFrame, metric: str = "accuracy", ax: Axes | None = None, *, legend: bool = True
) -> Axes:
    """A metric of training, per rule trained with; silent outputs are told beside it.

    Points where output units are silent or classes are never predicted are hollow, and the legend gives
    their mean number at the last step: an accuracy with dead outputs is not comparable with one without.
    """
    ax, alone = axes_for(ax)
    rows = select(summary, one=("study", "network", "layer"), metric=metric)
    handles, notes, marked = [], [], False
    for rule, part in rows.groupby("train_rule", sort=False):
        part = part.sort_values("step")
        void, label = _dead_outputs(summary, str(rule), part["step"])
        handles.append(_line(ax, part, str(rule), hollow=void))
        handles[-1].set_label(label)
        marked = marked or bool(void.any())
    if marked:
        notes.append("hollow: outputs silent or classes never predicted, so not comparable (number: mean at the end)")
    notes += [f"missing: {reason}" for reason in dict.fromkeys(rows["reason"]) if reason]
    ax.set(xlabel=_STEPS, ylabel=metric_label(metric))
    if metric == "accuracy":
        ax.set_ylim(0.0, 1.02)
    if legend:
        finish(ax, alone, handles, notes, columns=2 if marked else 3)
    return ax


def _trace(ax: Axes, rows: pd.DataFrame, metric: str) -> tuple[list[Line2D], list[str]]:
    """Draw all rules of one layer; return the legend's handles and what must be said in words."""
    handles, notes = [], []
    if metric in _TARGETS:
        ax.axhline(_TARGETS[metric], color="0.75", linewidth=0.6, zorder=0)
    undefined = rows[rows["n"] == 0]
    n_rules = rows["rule"].nunique()
    per_step = undefined.groupby("step")["rule"].nunique()
    everywhere = set(per_step.index[per_step == n_rules])
    for rule, part in rows.groupby("rule", sort=False):
        part = part.sort_values("step")
        handles.append(_line(ax, part, str(rule), hollow=(part["n_undefined"] > 0).to_numpy()))
        own = part.loc[(part["n"] == 0) & ~part["step"].isin(everywhere), "step"]
        if len(own):  # an empty line would still count in the layout, at the corner of the figure
            bottom = ax.get_xaxis_transform()
            ax.plot(own, np.full(len(own), 0.03), "x", color=rule_style(str(rule)).color, transform=bottom)
    _hatch(ax, np.sort(rows["step"].unique()), everywhere)
    spread = rows.groupby("step")["mean"].agg(lambda means: means.max() - means.min()).max()
    if n_rules > 1 and spread < _SAME:
        ax.text(0.5, 0.5, f"all rules agree within {_SAME:g}", transform=ax.transAxes, ha="center", color="0.4")
    if everywhere:
        notes.append(f"hatched: undefined ({_reasons(undefined[undefined['step'].isin(everywhere)])})")
    alone = undefined[~undefined["step"].isin(everywhere)]
    if len(alone):
        notes.append(f"crosses: undefined for that rule ({_reasons(alone)})")
    if ((rows["n_undefined"] > 0) & (rows["n"] > 0)).any():
        notes.append(_PARTIAL)
    return handles, notes


def _logarithmic(ax: Axes, rows: pd.DataFrame) -> None:
    """A logarithmic axis around the means: an interval that reaches down to zero would push them to the top."""
    positive = rows["mean"][rows["mean"] > 0]
    if len(positive):
        ax.set_yscale("log")
        ax.set_ylim(positive.min() / 2, positive.max() * 2)


def _line(ax: Axes, part: pd.DataFrame, rule: str, hollow: np.ndarray) -> Line2D:
    look = rule_style(rule)
    step, mean = part["step"].to_numpy(), part["mean"].to_numpy()
    ax.fill_between(step, part["low"].to_numpy(), part["high"].to_numpy(), color=look.color, alpha=0.15, linewidth=0)
    ax.plot(step, mean, color=look.color, linestyle=look.line)
    shown = np.zeros(len(step), dtype=bool)
    shown[:: max(1, len(step) // 10)] = True  # a marker on every point would hide the line
    for mask, face in ((shown & ~hollow, look.color), (hollow, "white")):
        ax.plot(step[mask], mean[mask], look.marker, color=look.color, markerfacecolor=face, markeredgewidth=0.7)
    return Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=rule)


def _hatch(ax: Axes, steps: np.ndarray, undefined: set[Any]) -> None:
    """Hatch the stretch around each step at which no rule is defined, half way to its neighbours."""
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    for i, step in enumerate(steps):
        if step in undefined:
            box = Rectangle(
                (edges[i], 0),
                edges[i + 1] - edges[i],
                1,
                transform=ax.get_xaxis_transform(),
                facecolor="none",
            )
            box.set(hatch="////", edgecolor="0.7", linewidth=0, zorder=0)
            ax.add_patch(box)


def _dead_outputs(summary: pd.DataFrame, rule: str, steps: pd.Series) -> tuple[np.ndarray, str]:
    """Per step whether an output is dead, and the legend's entry with the numbers at the last step."""
    void, ends = np.zeros(len(steps), dtype=bool), []
    for metric, words in (("silent_outputs", "silent"), ("classes_never_predicted", "never predicted")):
        rows = summary[(summary["metric"] == metric) & (summary["train_rule"] == rule)]
        if rows.empty:
            continue
        numbers = rows.set_index("step")["mean"].reindex(steps).to_numpy()
        void |= numbers > 0
        if numbers[-1] > 0:
            ends.append(f"{numbers[-1]:.2g} {words}")
    return void, f"{rule} ({', '.join(ends)})" if ends else rule


def _reasons(rows: pd.DataFrame) -> str:
    return "; ".join(dict.fromkeys(rows["reason"]))
