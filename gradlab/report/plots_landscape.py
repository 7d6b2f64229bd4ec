"""Figures of a loss landscape: the surface with the paths of training, and the true loss along the paths."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.analysis.landscape import Landscape
from gradlab.analysis.plane import axis_labels
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

_LOG_FROM = 20.0
_LEVELS = 14


def landscape(
    landscape: Landscape,
    ax: Axes | None = None,
    *,
    log: bool | None = None,
    label: str = "loss",
    legend: bool = True,
) -> Axes:
    """Filled contours of the loss on a plane, with the paths that training took, projected by least squares.

    A path starts at the ring and ends at the star. Its points are filled with the colour of their *true*
    loss: where that differs from the ground around them, the path is off the plane, and the surface is not where
    training was. The legend gives the share of each path's squared displacement that lies in the plane.

    Args:
        landscape: what `gradlab.analysis.landscape.landscape` returns.
        ax: where to draw.
        log: logarithmic levels; by default if all losses are positive and the largest is 20 times the
            smallest.
        label: the name of the loss, with its unit if it has one.
        legend: whether to draw the legend below the axes.

    Raises:
        ValueError: if no loss is a finite number, or for log=True with losses that are not positive.
    """
    ax, alone = axes_for(ax)
    norm, colors = ground(ax, landscape, log, label)
    handles = [_path(ax, landscape, name, norm, colors) for name in landscape.coordinates]
    if legend and handles:
        note = "ring: start; star: end; fill of a point: the true loss there"
        finish(ax, alone, handles, [note, "percent: share of the squared displacement"], columns=1, height=2.5)
    return ax


def ground(ax: Axes, landscape: Landscape, log: bool | None, label: str) -> tuple[Normalize, Colormap]:
    """Draw the surface alone, with its colour bar; returns the scale of its colours."""
    norm, levels = loss_scale(landscape.loss, log)
    colors = ground_colors()
    surface = np.ma.masked_invalid(landscape.loss)
    if surface.mask.any():
        ax.patch.set(hatch="////", edgecolor="0.6", facecolor="white", linewidth=0)
        ax.set_title("hatched: the loss is not a number", loc="left")
    filled = ax.contourf(landscape.a, landscape.b, surface, levels=levels, norm=norm, cmap=colors)
    ax.contour(landscape.a, landscape.b, surface, levels=levels, colors="0.35", linewidths=0.25)
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(filled, ax=ax, label=label, pad=0.02)
    bar.outline.set_linewidth(0.4)
    if isinstance(norm, LogNorm):
        bar.set_ticks(levels[:: max(1, len(levels) // 6)].tolist())
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        bar.ax.minorticks_off()
    across, up = axis_labels(landscape)
    ax.set(xlim=landscape.a[[0, -1]], ylim=landscape.b[[0, -1]], xlabel=across, ylabel=up)
    ax.spines[:].set_visible(True)
    return norm, colors


def path_losses(landscape: Landscape, ax: Axes | None = None, *, label: str = "loss", legend: bool = True) -> Axes:
    """The true loss along each path (line) and the loss of the surface below its projection (thin, dotted).

    Where the two part, the plane does not show the loss that training saw.
    """
    ax, alone = axes_for(ax)
    handles = []
    for name, true in landscape.path_loss.items():
        look = rule_style(name)
        ax.plot(true, color=look.color, linestyle=look.line, marker=look.marker)
        ax.plot(landscape.loss_on_plane(name), color=look.color, linestyle=":", linewidth=0.7)
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=name))
    handles.append(Line2D([], [], color="0.4", linestyle=":", linewidth=0.7, label="surface below"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="checkpoint (number)", ylabel=label)
    if legend:
        finish(ax, alone, handles, [])
    return ax


def out_of_plane(frame: pd.DataFrame, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """The distance of each checkpoint from the plane, per path.

    Args:
        frame: path, checkpoint, distance, flag, as `Landscape.to_frame` returns.
        ax: where to draw.
        legend: whether to draw the legend below the axes.
    """
    ax, alone = axes_for(ax)
    handles = []
    for name, rows in frame.groupby("path", sort=False):
        look = rule_style(str(name))
        (line,) = ax.plot(rows["checkpoint"], rows["distance"], color=look.color, linestyle=look.line)
        line.set(marker=look.marker, label=str(name))
        handles.append(line)
    missing = frame.loc[frame["distance"].isna(), "flag"]
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="checkpoint (number)", ylabel="distance from the plane\n(units of the weights)")
    ax.set_ylim(bottom=0.0)
    if legend:
        finish(ax, alone, handles, [f"missing: {reason}" for reason in dict.fromkeys(missing)])
    return ax


def loss_scale(loss: np.ndarray, log: bool | None) -> tuple[Normalize, np.ndarray]:
    """Colours and levels for a surface; logarithmic as `landscape` says."""
    finite = loss[np.isfinite(loss)]
    if not finite.size:
        raise ValueError("no point of the surface has a finite loss: there is nothing to draw")
    low, high = float(finite.min()), float(finite.max())
    if log is None:
        log = low > 0 and high > _LOG_FROM * low
    if log and low <= 0:
        raise ValueError(f"log=True needs positive losses, the smallest is {low:.3g}")
    if not high > low:  # a flat surface still has a level
        low, high = low - 0.5, high + 0.5
        log = False
    if log:
        return LogNorm(low, high), np.geomspace(low, high, _LEVELS)
    levels = np.asarray(MaxNLocator(_LEVELS).tick_values(low, high))
    return Normalize(levels[0], levels[-1]), levels


def ground_colors() -> Colormap:
    """Pale greys and blues: the colours of the rules must stand out on every part of the surface."""
    return LinearSegmentedColormap.from_list("ground", colormaps["bone"](np.linspace(0.98, 0.42, 64)))


def _path(ax: Axes, landscape: Landscape, name: str, norm: Normalize, colors: Colormap) -> Line2D:
    look = rule_style(name)
    points, true = landscape.coordinates[name], landscape.path_loss[name]
    halo = [patheffects.withStroke(linewidth=2.4, foreground="white")]
    ax.plot(*points.T, color=look.color, linestyle=look.line, path_effects=halo)
    face = colors(norm(np.ma.masked_invalid(true)))
    ax.scatter(
        points[:, 0],
        points[:, 1],
        c=face,
        edgecolors=look.color,
        marker=look.marker,
        s=14,
        linewidths=0.7,
        zorder=3,
    )
    ax.plot(*points[0], "o", markersize=6, markerfacecolor="none", color=look.color, zorder=4)
    ax.plot(
        *points[-1],
        "*",
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.5,
        color=look.color,
        zorder=5,
    )
    share = f"{_percent(landscape.captured[name])} in the plane"
    text = f"{name}: {share}, loss {true[0]:.3g} to {true[-1]:.3g}"
    return Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, markerfacecolor="none", label=text)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
