"""Figures of curvature: eigenvalues, spectral density, traces, rules' directions, and maps over a plane."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.report.labels import layer_label
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

_EIGENVALUE = "eigenvalue (loss per squared unit of weight)"
_CURVATURE = "curvature (loss per squared unit of weight)"
_MAPS = {
    "smallest": "smallest " + _EIGENVALUE,
    "largest": "largest " + _EIGENVALUE,
    "ratio": "|smallest / largest eigenvalue|",
}


def eigenvalues(frame: pd.DataFrame, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """The extreme eigenvalues by rank, with bars of the length of their residuals.

    Args:
        frame: as `Eigenvalues.to_frame` returns.
        ax: where to draw.
        legend: whether to draw the legend below the axes.
    """
    ax, alone = axes_for(ax)
    frame = _read(frame)
    handles = []
    ax.axhline(0.0, color="0.75", linewidth=0.6, zorder=0)
    for end, marker, face in (("largest", "o", "0.2"), ("smallest", "s", "white")):
        rows = frame[frame["metric"].str.startswith(end + "_")]
        if len(rows):
            ranks = np.arange(1, len(rows) + 1)
            ax.errorbar(
                ranks, rows["value"], rows["residual"], fmt=marker, color="0.2", markerfacecolor=face, capsize=2
            )
            handles.append(Line2D([], [], color="0.2", marker=marker, markerfacecolor=face, linestyle="", label=end))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="rank from that end of the spectrum", ylabel=_EIGENVALUE.replace(" (", "\n("))
    ax.margins(x=0.15)
    if legend:
        finish(ax, alone, handles, [*trust_notes(frame), *_reasons(frame)])
    return ax


def spectral_density(frame: pd.DataFrame, ax: Axes | None = None, *, floor: float = 1e-6, legend: bool = True) -> Axes:
    """The density of the eigenvalues on a logarithmic axis; what is below `floor` times its maximum is cut off.

    Args:
        frame: as `SpectralDensity.to_frame` returns.
        ax: where to draw.
        floor: lowest density shown, as a share of the highest: below it the smoothing alone is seen.
        legend: whether to draw the notes below the axes.
    """
    ax, alone = axes_for(ax)
    frame = _read(frame)
    rows = frame[frame["metric"] == "density"]
    x, density = rows["eigenvalue"].to_numpy(), rows["value"].to_numpy()
    lowest = floor * density.max()
    ax.fill_between(x, lowest, np.maximum(density, lowest), color="0.75", linewidth=0)
    (line,) = ax.plot(x, np.maximum(density, lowest), color="0.2", linewidth=0.7, label="smoothed density")
    ax.set_yscale("log")
    ax.set_ylim(lowest, 3 * density.max())
    ax.axvline(0.0, color="0.55", linewidth=0.6, linestyle=":")
    ax.set(xlabel=_EIGENVALUE, ylabel="density (share of the\neigenvalues per unit)")
    if legend:
        means = frame.set_index("metric")
        words = [
            f"{text} {float(means['value'][name]):.3g} (standard error {float(means['error'][name]):.2g})"
            for name, text in (("mean_eigenvalue", "mean"), ("mean_square_eigenvalue", "mean square"))
        ]
        finish(ax, alone, [line], [", ".join(words), *trust_notes(frame)])
    return ax


def trace(frame: pd.DataFrame, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """The trace of the network and of each layer's block, with bars of one standard error.

    Args:
        frame: as `Trace.to_frame` returns.
        ax: where to draw.
        legend: whether to draw the notes below the axes.
    """
    ax, alone = axes_for(ax)
    frame = _read(frame)
    rows = frame[frame["metric"] == "trace"]
    ax.axhline(0.0, color="0.75", linewidth=0.6, zorder=0)
    ax.errorbar(np.arange(len(rows)), rows["value"], rows["error"], fmt="o", color="0.2", capsize=2)
    handle = Line2D([], [], color="0.2", marker="o", linestyle="", label="trace; bars: one standard error")
    ax.set_xticks(np.arange(len(rows)), [layer_label(name) for name in rows["layer"]])
    ax.set_ylabel("trace (loss per squared\nunit of weight)")
    ax.margins(x=0.15)
    if legend:
        finish(ax, alone, [handle], trust_notes(frame))
    return ax


def curvature_along(frame: pd.DataFrame, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """The curvature along each rule's gradient, per layer; hollow: measured from the gradients on both sides.

    Where the filled and the hollow point of a rule differ, jumps of the gradient, which the second derivative does
    not see, rule its change.

    Args:
        frame: as `CurvatureAlong.to_frame` returns.
        ax: where to draw.
        legend: whether to draw the legend below the axes.
    """
    ax, alone = axes_for(ax)
    frame = _read(frame)
    rows = frame[frame["rule"] != ""]
    rules, layers = list(dict.fromkeys(rows["rule"])), list(dict.fromkeys(rows["layer"]))
    ax.axhline(0.0, color="0.75", linewidth=0.6, zorder=0)
    handles = []
    table = rows.set_index(["metric", "rule", "layer"])["value"]
    for i, rule in enumerate(rules):
        look = rule_style(rule)
        x = np.arange(len(layers)) + 0.7 * (i - (len(rules) - 1) / 2) / len(rules)
        for metric, face in (("measured_curvature", "white"), ("curvature", look.color)):
            y = [table[(metric, rule, layer)] for layer in layers]
            ax.plot(x, y, look.marker, color=look.color, markerfacecolor=face, markersize=4.5)
        handles.append(Line2D([], [], color=look.color, marker=look.marker, linestyle="", label=rule))
    for edge in np.arange(len(layers) - 1) + 0.5:
        ax.axvline(edge, color="0.9", linewidth=0.6, zorder=0)
    ax.set_xticks(np.arange(len(layers)), [layer_label(name) for name in layers])
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_ylabel(_CURVATURE.replace(" (", "\n("))
    _symmetric_log(ax, rows["value"].to_numpy())
    if legend:
        note = "filled: second derivative; hollow: measured from the gradients on both sides"
        finish(ax, alone, handles, [note, *trust_notes(frame), *_reasons(rows)])
    return ax


def hessian_map(
    frame: pd.DataFrame,
    metric: str = "ratio",
    ax: Axes | None = None,
    *,
    labels: Sequence[str] = ("direction 1 (multiples of it)", "direction 2 (multiples of it)"),
) -> Axes:
    """A map over a plane: "ratio" (|smallest / largest eigenvalue|), "smallest" or "largest"; undefined: hatched.

    Args:
        frame: as `HessianMap.to_frame` returns.
        metric: what is drawn.
        ax: where to draw.
        labels: of the two axes.

    Raises:
        ValueError: for another metric.
    """
    if metric not in _MAPS:
        raise ValueError(f"metric={metric!r}: there are {', '.join(map(repr, _MAPS))}")
    ax, _ = axes_for(ax)
    table = frame[frame["metric"] == metric].pivot(index="b", columns="a", values="value")
    values = np.ma.masked_invalid(table.to_numpy())
    if values.mask.any():
        ax.patch.set(hatch="////", edgecolor="0.6", facecolor="white", linewidth=0)
    norm, colors = _map_scale(values, metric)
    image = ax.pcolormesh(table.columns, table.index, values, norm=norm, cmap=colors, shading="nearest")
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, label=_MAPS[metric].replace(" (", "\n("), pad=0.02)
    bar.outline.set_linewidth(0.4)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    notes = [*trust_notes(frame, "at the origin"), *(["hatched: undefined"] if values.mask.any() else [])]
    ax.set_title("\n".join(textwrap.fill(note, 44) for note in notes), loc="left")
    return ax


def trust_notes(frame: pd.DataFrame, where: str = "") -> list[str]:
    """What a frame's "asymmetry" and "mismatch" say, in words."""
    values = frame.set_index("metric")["value"]
    asymmetry, mismatch = float(values["asymmetry"]), float(values["mismatch"])
    if np.isnan(mismatch):
        return ["the second derivative is zero"]
    notes = [f"mismatch with the measured change of the gradient {where}: {mismatch:.2g}".replace(" :", ":")]
    if asymmetry > 1e-3:
        notes.append(f"of the symmetric part; asymmetry {asymmetry:.2g}")
    if mismatch > 0.5:
        notes[0] += " (near or above 1: not foretold)"
    return notes


def _read(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with empty text where a CSV reader made NaN of it."""
    return frame.assign(
        **{name: frame[name].astype(object).where(frame[name].notna(), "") for name in ("rule", "flag")}
    )


def _reasons(frame: pd.DataFrame) -> list[str]:
    return [f"note: {flag}" for flag in dict.fromkeys(frame["flag"]) if flag]


def _symmetric_log(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis on both sides of zero where the values span more than two orders of magnitude."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size and sizes.max() > 100 * sizes.min():
        ax.set_yscale("symlog", linthresh=max(sizes.min(), 1e-4 * sizes.max()))


def _map_scale(values: np.ma.MaskedArray, metric: str) -> tuple[Normalize, str]:
    known = values.compressed()
    if not known.size:
        return Normalize(0.0, 1.0), "cividis"
    low, high = float(known.min()), float(known.max())
    if metric == "ratio":
        if low > 0 and high > 20 * low:
            return LogNorm(low, high), "cividis"
        return Normalize(0.0, max(high, 1e-12)), "cividis"
    most = max(abs(low), abs(high)) or 1.0
    if np.abs(known[known != 0]).size and most > 100 * np.abs(known[known != 0]).min():
        return SymLogNorm(1e-2 * most, vmin=-most, vmax=most), "RdBu_r"
    return Normalize(-most, most), "RdBu_r"
