"""A loss landscape in three dimensions, with the paths of training at the height of their true loss."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradlab.analysis.landscape import Landscape
from gradlab.analysis.plane import axis_labels
from gradlab.report.legends import figure_legend
from gradlab.report.plots_landscape import ground_colors, loss_scale
from gradlab.report.style import rule_style


def surface(
    landscape: Landscape,
    ax: Any = None,
    *,
    log: bool | None = None,
    label: str = "loss",
    legend: bool = True,
    elevation: float = 32.0,
    azimuth: float = -60.0,
) -> Any:
    """The surface in three dimensions; returns the matplotlib Axes3D.

    A path is drawn at the height of its *true* loss, with a thin dotted line down (or up) to the surface above its
    projection: the longer these are, the less the surface is where training was.

    Args:
        landscape: what `gradlab.analysis.landscape.landscape` returns.
        ax: three-dimensional axes, `figure.add_subplot(projection="3d")`.
        log: logarithmic height; by default as in `gradlab.report.plots_landscape.landscape`.
        label: the name of the loss, with its unit if it has one.
        legend: whether to draw the legend below the axes.
        elevation, azimuth: where the reader stands, in degrees.

    Raises:
        ValueError: for flat axes, if no loss is a finite number, or for log=True with losses that are not positive.
    """
    norm, _ = loss_scale(landscape.loss, log)
    logarithmic = isinstance(norm, LogNorm)
    alone = ax is None
    if ax is None:
        ax = _new_axes()
    if not hasattr(ax, "plot_surface"):
        raise ValueError('these axes are flat: give figure.add_subplot(projection="3d")')
    a, b = np.meshgrid(landscape.a, landscape.b)
    height = _height(landscape.loss, logarithmic)
    ax.plot_surface(
        a, b, np.ma.masked_invalid(height), facecolors=_faces(landscape.loss, norm), rstride=1, cstride=1,
        linewidth=0.15, edgecolor=(0.35, 0.35, 0.35, 0.5), shade=False, alpha=0.75,
    )  # fmt: skip
    handles = [_path(ax, landscape, name, logarithmic) for name in landscape.coordinates]
    across, up = axis_labels(landscape)
    size = mpl.rcParams["axes.labelsize"]
    for name, text in (("x", across), ("y", up), ("z", label)):
        # Set aslant, a long label would reach into the legend.
        getattr(ax, f"set_{name}label")(textwrap.fill(text, 22), labelpad=_points(size) * (0.2 if name != "z" else 0.6))
        ax.tick_params(axis=name, pad=0.1 * _points(size))
    ax.view_init(elevation, azimuth)
    if logarithmic:
        ax.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.pane.set(facecolor="white", edgecolor="0.8")
    if not np.isfinite(landscape.loss).all():
        ax.set_title("holes: the loss is not a number", loc="left")
    if legend and alone and handles:
        note = "height of a path: its true loss; dotted: to the surface at its projection; star: end"
        figure_legend(ax.get_figure(root=True), handles, [note], columns=2)
    return ax


def _points(size: Any) -> float:
    return float(FontProperties(size=size).get_size_in_points())


def _new_axes() -> Any:
    width = mpl.rcParams["figure.figsize"][0]
    figure = Figure(figsize=(width, width), layout="constrained")
    FigureCanvasAgg(figure)
    ax: Any = figure.add_subplot(projection="3d")
    # Three-dimensional axes leave no room for the label of their height.
    ax.set_box_aspect(None, zoom=0.8)
    return ax


def _height(loss: np.ndarray, logarithmic: bool) -> np.ndarray:
    known = np.where(np.isfinite(loss), loss, np.nan)
    if not logarithmic:
        return known
    return np.log10(np.where(known > 0, known, np.nan))


def _faces(loss: np.ndarray, norm: Any) -> np.ndarray:
    """Colours of the faces: that of the corner with the lowest indices, as `plot_surface` takes them."""
    return np.asarray(ground_colors()(norm(np.ma.masked_invalid(loss))))


def _path(ax: Any, landscape: Landscape, name: str, logarithmic: bool) -> Line2D:
    look = rule_style(name)
    points = landscape.coordinates[name]
    true = _height(landscape.path_loss[name], logarithmic)
    below = _height(landscape.loss_on_plane(name), logarithmic)
    # Drawn last and above: the sorting of surfaces by depth would hide paths that lie on them.
    (line,) = ax.plot(points[:, 0], points[:, 1], true, color=look.color, linestyle=look.line, zorder=10)
    line.set(marker=look.marker, markersize=0.7 * mpl.rcParams["lines.markersize"])
    for (x, y), top, foot in zip(points, true, below, strict=True):
        if np.isfinite((x, y, top, foot)).all():
            ax.plot([x, x], [y, y], [foot, top], color=look.color, linestyle=":", linewidth=0.6, zorder=9)
    ax.plot(
        points[-1:, 0], points[-1:, 1], true[-1:], "*", color=look.color, markersize=8, markeredgecolor="white",
        markeredgewidth=0.5, zorder=11,
    )  # fmt: skip
    return Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=name)
