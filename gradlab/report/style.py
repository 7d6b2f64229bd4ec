"""How figures look: journal widths and fonts, and one colour, line and marker per learning rule.

Colours are those of Okabe and Ito (2008, Color Universal Design), which readers with any common colour
blindness can tell apart; lines differ in dashes and markers too, so that a grey print can be read. A rule
keeps its look in every figure, whatever else is drawn. Figures are made without pyplot, so nothing here
changes global state for good.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Dashes = Literal["-"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class RuleStyle:
    """Colour (hex), line style and marker, as matplotlib takes them."""

    color: str
    line: Dashes
    marker: str


_DASHED: Dashes = (0, (5.0, 1.5))
_DOTTED: Dashes = (0, (1.2, 1.2))
_DASH_DOT: Dashes = (0, (5.0, 1.2, 1.2, 1.2))
_LONG: Dashes = (0, (9.0, 2.0))
_LINES: tuple[Dashes, ...] = ("-", _DASHED, _DOTTED, _DASH_DOT, _LONG)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
_OTHER_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F7F7F",
    "#8C564B",
    "#5D3A9B",
)

RULE_STYLES: dict[str, RuleStyle] = {
    "BPTT": RuleStyle("#000000", "-", "o"),
    "OSTL": RuleStyle("#0072B2", "-", "s"),
    "OTTT": RuleStyle("#D55E00", _DASHED, "^"),
    "OTPE": RuleStyle("#009E73", "-", "D"),
    "ApproximateOTPE": RuleStyle("#E69F00", _DASH_DOT, "v"),
    "SLTT": RuleStyle("#CC79A7", _DOTTED, "X"),
    "RTRL": RuleStyle("#7F7F7F", _LONG, "P"),
    "TBPTT": RuleStyle("#56B4E9", _DASHED, "h"),
    "EProp": RuleStyle("#56B4E9", "-", "p"),
    "RFLO": RuleStyle("#8C564B", "-", "<"),
    "UORO": RuleStyle("#5D3A9B", _DOTTED, ">"),
    "KFRTRL": RuleStyle("#5D3A9B", _DASHED, "<"),
    "SnAp": RuleStyle("#7F7F7F", _DASH_DOT, "s"),
    "FPTT": RuleStyle("#8C564B", _DASHED, "o"),
    "SyntheticGradient": RuleStyle("#8C564B", _DOTTED, "^"),
    "OSTTP": RuleStyle("#0072B2", _DASHED, "v"),
    "DRTRL": RuleStyle("#0072B2", _DOTTED, "D"),
    "ESDRTRL": RuleStyle("#0072B2", _DASH_DOT, "X"),
    "NDOT": RuleStyle("#D55E00", _DOTTED, "v"),
    "FrontOTPE": RuleStyle("#009E73", _DASHED, "o"),
    "DECOLLE": RuleStyle("#CC79A7", "-", "P"),
    "TESS": RuleStyle("#CC79A7", _DASHED, "h"),
    "STLLR": RuleStyle("#CC79A7", _DASH_DOT, "p"),
    "FeedbackAlignment": RuleStyle("#E69F00", "-", "<"),
    "DirectFeedbackAlignment": RuleStyle("#E69F00", _DASHED, ">"),
    "DRTP": RuleStyle("#E69F00", _DOTTED, "s"),
    "ETLP": RuleStyle("#56B4E9", _DOTTED, "D"),
}
"""The look of rules, by class name. Any other rule gets a look from a hash of its name, always the same."""


def rule_style(name: str) -> RuleStyle:
    """The look of a rule. `TBPTT(k=1)` has the colour of `TBPTT`; its parameters choose dashes and marker."""
    base, _, parameters = name.partition("(")
    known = RULE_STYLES.get(base)
    if known is None:
        known = RuleStyle(_OTHER_COLORS[_hash(base, "color") % len(_OTHER_COLORS)], *_dashes_and_marker(base))
    return RuleStyle(known.color, *_dashes_and_marker(name)) if parameters else known


def _dashes_and_marker(name: str) -> tuple[Dashes, str]:
    return _LINES[_hash(name, "line") % len(_LINES)], _MARKERS[_hash(name, "marker") % len(_MARKERS)]


def _hash(name: str, purpose: str) -> int:
    # Not Python's hash(): that differs from one process to the next.
    return int.from_bytes(hashlib.sha256(f"{purpose} of {name}".encode()).digest()[:8], "big")


_SANS = ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"]
_SERIF = ["Times New Roman", "Times", "STIXGeneral"]
_JOURNALS: dict[str, tuple[tuple[float, float], float, dict[str, Any]]] = {
    # (width of one column, of two) in inches, font size in points, fonts
    "nature": ((3.50, 7.20), 7.0, {"font.family": "sans-serif", "mathtext.fontset": "dejavusans"}),
    "ieee": ((3.50, 7.16), 8.0, {"font.family": "serif", "mathtext.fontset": "stix"}),
    "neurips": ((2.70, 5.50), 8.0, {"font.family": "serif", "mathtext.fontset": "stix"}),
}

_FILES: dict[Any, Any] = {  # settings that count when a file is written
    "pdf.fonttype": 42,  # TrueType outlines: text stays text, and publishers accept it
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "gradlab",  # otherwise the names inside an SVG file are random
    "savefig.bbox": "standard",  # a tight box would change the width that the journal asks for
}


def settings(journal: str = "nature", columns: int = 1) -> dict[Any, Any]:
    """The matplotlib settings of `style`, as a dictionary."""
    if journal not in _JOURNALS or columns not in (1, 2):
        known = ", ".join(map(repr, _JOURNALS))
        raise ValueError(f"style({journal!r}, columns={columns!r}): journals are {known}; columns are 1 or 2")
    widths, size, fonts = _JOURNALS[journal]
    width = widths[columns - 1]
    return {
        **_FILES,
        **fonts,
        "font.sans-serif": _SANS,
        "font.serif": _SERIF,
        "figure.figsize": (width, 0.68 * min(width, 3.5)),
        "figure.dpi": 150,
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "legend.fontsize": size - 0.5,
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.2,
        "hatch.linewidth": 0.4,
    }


@contextmanager
def style(journal: str = "nature", columns: int = 1) -> Iterator[None]:
    """Draw in the style of a journal: its column width (89 mm for Nature), fonts of 7 or 8 points.

    Args:
        journal: "nature", "ieee" or "neurips".
        columns: how many of the journal's two columns the figure spans. NeurIPS has one; there 1 means half
            of it.

    Raises:
        ValueError: for an unknown journal or number of columns.
    """
    with mpl.rc_context(settings(journal, columns)):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, height: float | None = None, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with its axes, row by row, as wide as the style in force says.

    Args:
        rows, columns: the grid of axes.
        height: in inches; by default the style's height per row.
        **subplots: passed to `Figure.subplots`, for example `sharey=True`.
    """
    width, row_height = mpl.rcParams["figure.figsize"]
    figure = Figure(figsize=(width, height or row_height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, list(grid.ravel())


def save(
    figure: Figure | Axes,
    stem: str | os.PathLike[str],
    formats: Sequence[str] = ("pdf", "png"),
    dpi: int = 300,
) -> list[Path]:
    """Write `stem.pdf`, `stem.png`, ...; return the paths. Equal data give equal bytes: no dates inside."""
    paths = []
    for suffix in formats:
        path = Path(f"{os.fspath(stem)}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(to_bytes(figure, suffix, dpi))
        os.replace(unfinished, path)
        paths.append(path)
    return paths


def to_bytes(figure: Figure | Axes, suffix: str = "png", dpi: int = 300) -> bytes:
    """A figure, or the figure that axes belong to, as the bytes of a file: "png", "pdf" or "svg"."""
    dates: dict[str, dict[str, Any]] = {
        "png": {},
        "pdf": {"CreationDate": None, "ModDate": None},
        "svg": {"Date": None},
    }
    if suffix not in dates:
        raise ValueError(f"a figure can be written as {', '.join(dates)}, not as {suffix!r}")
    drawing = figure.get_figure(root=True) if isinstance(figure, Axes) else figure
    assert drawing is not None
    buffer = io.BytesIO()
    with mpl.rc_context(_FILES):
        drawing.savefig(buffer, format=suffix, dpi=dpi, metadata=dates[suffix])
    return buffer.getvalue()
