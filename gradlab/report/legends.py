"""Legends below the axes, with what must be said in words, and figures that grow to make room for them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from gradlab.report.style import new_figure

_AXIS_WORDS = 0.6  # inches: title, tick labels and label of the horizontal axis
_LEFT = 0.3  # inches that a legend may begin left of the axes, below the tick labels
_BELOW_AXES = 27 / 72  # inches from the axes to a legend that clears the label of the axis


def axes_for(ax: Axes | None) -> tuple[Axes, bool]:
    """The axes given, or new ones, and whether they are alone in a figure that lays itself out."""
    if ax is None:
        return new_figure()[1][0], True
    figure = ax.get_figure(root=True)
    return ax, figure is not None and figure.axes == [ax] and figure.get_layout_engine() is not None


def finish(
    ax: Axes,
    alone: bool,
    handles: Sequence[Line2D],
    notes: Sequence[str],
    columns: int = 3,
    height: float = 1.8,
) -> None:
    """Put the legend below the axes; a figure of these axes alone grows until they have `height` inches."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    if alone:
        room = figure_legend(figure, handles, notes, columns)
        figure.set_size_inches(figure.get_figwidth(), height + _AXIS_WORDS + room)
        return
    place = ax.get_subplotspec()
    width = figure.get_figwidth() / (place.get_gridspec().ncols if place else 1)
    title = _words(notes, width)
    below = figure.dpi_scale_trans + ScaledTranslation(0, 0, cast(Any, ax.transAxes))
    legend = ax.legend(
        handles=list(handles), loc="upper left", bbox_to_anchor=(-_LEFT, -_BELOW_AXES), bbox_transform=below,
        ncols=columns, columnspacing=1.2, borderaxespad=0.0, title=title,
    )  # fmt: skip
    _align(legend)
    # The layout must keep the height free, but not the width: a colour bar would stand beyond the legend.
    legend.set_in_layout(False)
    room = _height(handles, title, columns) + _BELOW_AXES
    ax.add_patch(Rectangle((0, -room), 0.01, room, transform=below, fill=False, linewidth=0, clip_on=False))


def figure_legend(figure: Figure, handles: Sequence[Line2D], notes: Sequence[str], columns: int = 3) -> float:
    """A legend below all axes of a figure; returns its height in inches, about."""
    title = _words(notes, figure.get_figwidth())
    legend = figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, columnspacing=1.2, title=title
    )
    _align(legend)
    return _height(handles, title, columns)


def _height(handles: Sequence[Line2D], title: str | None, columns: int) -> float:
    lines = -(-len(handles) // columns) + (title.count("\n") + 1 if title else 0)
    return (lines + 1) * 1.45 * _points() / 72


def _align(legend: Any) -> None:
    legend.set_alignment("left")
    legend.get_title().set_fontsize(legend.get_texts()[0].get_fontsize())


def _words(notes: Sequence[str], inches: float) -> str | None:
    width = max(30, int(inches * 125 / _points()))
    return "\n".join(textwrap.fill(note, width) for note in notes) or None


def _points() -> float:
    return float(FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points())
