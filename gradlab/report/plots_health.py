"""Figures of a network's health: firing rates of all units, and the flow of the error over layers and steps."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradlab.report.labels import layer_label
from gradlab.report.legends import axes_for, finish

_DECADES = 12
"""Errors more than this many decades below the largest are drawn in the palest colour."""


def draw(frame: pd.DataFrame, ax: Axes | None = None, *, kind: str = "rates") -> Axes:
    """One figure of a network's health.

    Args:
        frame: what `NetworkHealth.to_frame` returns.
        ax: where to draw.
        kind: "rates" for `rates`, "flow" for `flow`.
    """
    kinds = {"rates": rates, "flow": flow}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(map(repr, kinds))}")
    return kinds[kind](frame, ax)


def rates(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Firing rates of each layer's units, sorted: a flat end at 0 is silent units, one at 1 saturated ones."""
    ax, alone = axes_for(ax)
    rows = frame[frame["metric"] == "unit_rate"]
    if rows.empty:
        raise ValueError("no layer of this network spikes: there are no firing rates to draw")
    layers = list(dict.fromkeys(rows["layer"]))
    colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(layers)))
    handles = []
    for layer, color in zip(layers, colors, strict=True):
        values = np.sort(rows.loc[rows["layer"] == layer, "value"].to_numpy(float))[::-1]
        place = (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) <= 40 else ""
        ax.plot(place, values, color=color, marker=marker, markersize=2.4)
        shares = frame[frame["layer"] == layer].set_index("metric")["value"]
        ends = f"{shares['silent_units']:.0%} silent, {shares['saturated_units']:.0%} saturated"
        handles.append(
            Line2D([], [], color=color, marker=marker, markersize=2.4, label=f"{layer_label(layer)}: {ends}")
        )
    ax.set(xlim=(0, 1), ylim=(-0.02, None), xlabel="units of a layer, most active first (share)")
    ax.set_ylabel("firing rate (spikes per unit and step)")
    finish(ax, alone, handles, [], columns=1)
    return ax


def flow(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The norm of BPTT's error on each layer's current, layers over steps, on a logarithmic colour scale."""
    ax, alone = axes_for(ax)
    rows = frame[frame["metric"] == "error_flow"]
    layers = list(dict.fromkeys(rows["layer"]))
    values = np.stack([rows.loc[rows["layer"] == layer, "value"].to_numpy(float) for layer in layers])
    known = values[np.isfinite(values) & (values > 0)]
    if not known.size:
        raise ValueError("the error is zero or not finite everywhere: there is no flow to draw")
    low = max(known.min(), known.max() * 10.0**-_DECADES)
    norm = LogNorm(low if low < known.max() else low / 2, known.max())
    image = ax.imshow(
        np.ma.masked_where(~(values > 0), values), norm=norm, cmap="cividis", aspect="auto", origin="lower"
    )
    blank = ~(values > 0)
    for i, t in zip(*np.nonzero(blank), strict=True):
        box = Rectangle((t - 0.5, i - 0.5), 1, 1, facecolor="none", hatch="////", edgecolor="0.7", linewidth=0)
        ax.add_patch(box)
    ax.set_yticks(range(len(layers)), [layer_label(layer) for layer in layers])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("time step of the sequence")
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, label="norm of BPTT's error\non the currents", pad=0.02)
    bar.outline.set_visible(False)
    notes = ["hatched: no error arrives"] if blank.any() else []
    if known.min() < low:
        notes.append(f"palest: {_DECADES} decades below the largest, or less")
    ax.set_title("; ".join(notes), loc="left")
    if alone:
        figure.set_size_inches(figure.get_figwidth(), 0.9 + max(0.6, 0.3 * len(layers)))
    return ax
