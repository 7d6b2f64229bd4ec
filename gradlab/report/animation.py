"""Training as a film: paths that grow over a loss landscape, beside their true loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.animation import AbstractMovieWriter, FFMpegWriter, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradlab.analysis.landscape import Landscape
from gradlab.report.legends import figure_legend
from gradlab.report.plots_landscape import ground
from gradlab.report.style import new_figure, rule_style

_HEIGHT = 3.2  # inches


def animate(
    landscape: Landscape,
    path: str | os.PathLike[str],
    fps: float = 10,
    *,
    steps: Sequence[int] | None = None,
    hold: float = 1.5,
    dpi: int = 120,
    label: str = "loss",
    log: bool | None = None,
) -> Path:
    """Write a film of training: a frame per checkpoint, the paths over the surface, the true loss beside it.

    The last point of a path is filled with the colour of its *true* loss, as in the still picture. A path that ends
    early (a run that diverged) stays where it ended. As wide as the style in force says; two columns are best,
    `with gradlab.report.style.style("nature", 2)`.

    Args:
        landscape: what `gradlab.analysis.landscape.landscape` returns, with at least one path.
        path: the file; its ending chooses the format: .gif, or .mp4 where the program ffmpeg is installed.
        fps: frames per second.
        steps: the training step of each checkpoint, for the title and the axis; None: checkpoints are numbered.
        hold: seconds that the last frame stays.
        dpi: dots per inch.
        label: the name of the loss, with its unit if it has one.
        log: logarithmic colours, as in `gradlab.report.plots_landscape.landscape`.

    Returns:
        The path of the file.

    Raises:
        ValueError: for another ending, a landscape without paths, steps of another number than the longest path's
            checkpoints, or numbers out of range.
        RuntimeError: for .mp4 where ffmpeg is not installed.
    """
    path = Path(path)
    writer = _writer(path, fps)
    if not landscape.coordinates:
        raise ValueError("the landscape has no paths: there is nothing to animate")
    n = max(len(points) for points in landscape.coordinates.values())
    if steps is not None and len(steps) != n:
        raise ValueError(f"{len(steps)} steps for {n} checkpoints: give one per checkpoint of the longest path")
    if not hold >= 0:
        raise ValueError(f"hold={hold!r}: give seconds, 0 or more")
    figure, update = _stage(landscape, n, steps, label, log)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")  # the writer reads the format from the ending
    with mpl.rc_context({"savefig.bbox": "standard"}), writer.saving(figure, str(unfinished), dpi):
        for frame in [*range(n), *[n - 1] * round(hold * fps)]:
            update(frame)
            writer.grab_frame()
    os.replace(unfinished, path)
    return path


def _writer(path: Path, fps: float) -> AbstractMovieWriter:
    if not 0 < fps <= 60:
        raise ValueError(f"fps={fps!r}: give frames per second, above 0 and up to 60")
    ending = path.suffix.lower()
    if ending == ".gif":
        return PillowWriter(fps=fps)  # type: ignore[arg-type]
    if ending != ".mp4":
        raise ValueError(f"{path.name} ends with {ending!r}: films are written as .gif or .mp4")
    if not FFMpegWriter.isAvailable():
        raise RuntimeError("writing .mp4 needs the program ffmpeg, which is not installed: install it, or write a .gif")
    return FFMpegWriter(fps=fps)  # type: ignore[arg-type]


def _stage(
    landscape: Landscape, n: int, steps: Sequence[int] | None, label: str, log: bool | None
) -> tuple[Figure, Callable[[int], None]]:
    """The figure with all that does not move, and the function that moves the rest to a frame."""
    figure, (left, right) = new_figure(1, 2, height=_HEIGHT, width_ratios=(1.25, 1.0))
    norm, colors = ground(left, landscape, log, label)
    at = np.arange(n) if steps is None else np.asarray(steps)
    _loss_axes(right, landscape, at, label, "checkpoint (number)" if steps is None else "training step (updates)")
    movers = []
    for name, points in landscape.coordinates.items():
        look = rule_style(name)
        (path,) = left.plot([], [], color=look.color, linestyle=look.line)
        (head,) = left.plot([], [], look.marker, color=look.color, markersize=6, zorder=4)
        (curve,) = right.plot([], [], color=look.color, linestyle=look.line)
        (end,) = right.plot([], [], look.marker, color=look.color, zorder=4)
        movers.append((points, landscape.path_loss[name], path, head, curve, end))
    handles = [_handle(name) for name in landscape.coordinates]
    figure_legend(figure, handles, ["fill of a path's last point: the true loss there"], columns=4)
    title = figure.suptitle(_words(0, at, steps), x=0.01, ha="left", fontsize=mpl.rcParams["axes.titlesize"])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # nothing may shift from frame to frame

    def update(frame: int) -> None:
        for points, true, path, head, curve, end in movers:
            last = min(frame, len(points) - 1)
            path.set_data(points[: last + 1].T)
            head.set_data(points[last : last + 1].T)
            head.set_markerfacecolor(colors(norm(true[last])) if np.isfinite(true[last]) else "white")
            curve.set_data(at[: last + 1], true[: last + 1])
            end.set_data(at[last : last + 1], true[last : last + 1])
        title.set_text(_words(frame, at, steps))

    return figure, update


def _loss_axes(ax: Axes, landscape: Landscape, at: np.ndarray, label: str, across: str) -> None:
    losses = np.concatenate([*landscape.path_loss.values()])
    known = losses[np.isfinite(losses)]
    if known.size:
        low, high = float(known.min()), float(known.max())
        room = 0.06 * (high - low) or 0.5
        ax.set_ylim(low - room, high + room)
    room = 0.03 * (at[-1] - at[0]) or 0.5
    ax.set_xlim(at[0] - room, at[-1] + room)
    ax.set(xlabel=across, ylabel=f"true {label} along the path")


def _handle(name: str) -> Line2D:
    look = rule_style(name)
    return Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=name)


def _words(frame: int, at: np.ndarray, steps: Any) -> str:
    return f"checkpoint {frame} of {len(at) - 1}" if steps is None else f"training step {at[frame]} of {at[-1]}"
