"""A report as one HTML file that needs nothing else: style inside, figures inside, no script, no request to
anywhere.

A report is a list of sections; a section is a title and blocks: text (a plain string is a paragraph),
`Figure`, `Table`, `Facts`, `Listing`, or sections of the next level. All text is escaped: nothing that
comes from data becomes markup.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from gradlab.report.style import to_bytes
from gradlab.report.tables import readable


@dataclass(frozen=True)
class Figure:
    """A figure with its caption.

    Attributes:
        image: a matplotlib figure, axes (their whole figure is shown), or the bytes of a PNG file.
        caption: what is seen, and how not to read it.
        alt: the same in a few words, for those who cannot see it; by default the caption.
        dpi: pixels per inch of the picture inside the file; it is shown at 96 pixels per inch or smaller.
    """

    image: Drawing | Axes | bytes
    caption: str
    alt: str = ""
    dpi: int = 220


@dataclass(frozen=True)
class Table:
    """A table with its caption; columns `x_low` and `x_high` are joined to `x`, as in `readable`."""

    frame: pd.DataFrame
    caption: str


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line: versions, settings, where files are."""

    items: Mapping[str, object]


@dataclass(frozen=True)
class Listing:
    """Text to be shown as it is: commands, a specification in JSON; folded away if it has a `summary`."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


Block = str | Figure | Table | Facts | Listing | Section


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write a report to one file, by rename, and return its path. The same input gives the same bytes.

    Args:
        path: the file.
        title: the title of the page.
        sections: what it holds; the table of contents is made from their titles.
        subtitle: a sentence under the title.
        provenance: names and values for a last section, "Provenance": versions, revision, seeds, device.

    Raises:
        TypeError: for a block that is none of the kinds of this module.
    """
    sections = list(sections)
    if provenance is not None:
        sections.append(Section("Provenance", [Facts(provenance)]))
    names = _names(sections)
    body = "".join(_section(section, 2, names) for section in sections)
    lead = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    contents = f'<nav aria-label="Contents"><h2>Contents</h2>{_contents(sections, names)}</nav>' if sections else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}</header>\n{contents}\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)
    return path


def _names(sections: Sequence[Section]) -> dict[int, str]:
    """An anchor per section object, unlike any other on the page."""
    names: dict[int, str] = {}
    used: set[str] = set()

    def visit(section: Section) -> None:
        base = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        name, count = base, 1
        while name in used:
            count += 1
            name = f"{base}-{count}"
        used.add(name)
        names[id(section)] = name
        for block in section.blocks:
            if isinstance(block, Section):
                visit(block)

    for section in sections:
        visit(section)
    return names


def _contents(sections: Sequence[Section], names: dict[int, str]) -> str:
    items = []
    for section in sections:
        inner = [block for block in section.blocks if isinstance(block, Section)]
        below = _contents(inner, names) if inner else ""
        items.append(f'<li><a href="#{names[id(section)]}">{escape(section.title)}</a>{below}</li>')
    return f"<ul>{''.join(items)}</ul>"


def _section(section: Section, level: int, names: dict[int, str]) -> str:
    tag = f"h{min(level, 6)}"
    blocks = "".join(
        _section(block, level + 1, names) if isinstance(block, Section) else _block(block) for block in section.blocks
    )
    return f'<section id="{names[id(section)]}">\n<{tag}>{escape(section.title)}</{tag}>\n{blocks}</section>\n'


def _block(block: object) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>\n"
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Facts):
        rows = (f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in block.items.items())
        return f"<dl>{''.join(rows)}</dl>\n"
    if isinstance(block, Listing):
        text = f"<pre>{escape(block.text)}</pre>"
        return (
            f"<details><summary>{escape(block.summary)}</summary>{text}</details>\n" if block.summary else f"{text}\n"
        )
    raise TypeError(f"a section holds text, Figure, Table, Facts, Listing or Section, not {type(block).__name__}")


def _figure(figure: Figure) -> str:
    png = figure.image if isinstance(figure.image, bytes) else to_bytes(figure.image, "png", figure.dpi)
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise TypeError("Figure.image must be a matplotlib figure or the bytes of a PNG file")
    # Width and height of the picture stand at a fixed place of a PNG file.
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    # 1.35 times the size in print: 7-point text is small on a screen.
    scale = 1.35 * 96 / figure.dpi
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" '
        f'width="{round(width * scale)}" height="{round(height * scale)}" '
        f'alt="{escape(figure.alt or figure.caption)}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    frame = readable(table.frame)
    head = "".join(f'<th scope="col">{escape(str(name).replace("_", " "))}</th>' for name in frame.columns)
    rows = []
    for row in frame.itertuples(index=False):
        warned = ' class="warned"' if "warning" in frame.columns and row[frame.columns.get_loc("warning")] else ""
        rows.append(f"<tr{warned}>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>")
    return (
        f'<div class="wide"><table><caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6570; --line: #d5dae0; --tint:
#f4f6f8;
  --warn: #fff4dc; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --soft: #a2adb8; --line:
#384049;
  --tint: #1d2329; --warn: #3a2f14; --link: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink); background:
var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
a { color: var(--link); }
p { max-width: 46rem; }
.subtitle { color: var(--soft); margin-top: 0; }
nav { background: var(--tint); border-radius: .4rem; padding: .6rem 1rem; }
nav h2 { font-size: 1rem; border: 0; margin: 0; }
nav ul { margin: .2rem 0; padding-left: 1.2rem; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; padding: .4rem; }
figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; max-width: 46rem; }
caption { caption-side: top; padding-bottom: .4rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid
var(--line); } td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 12rem; }
thead th { border-bottom: 2px solid var(--line); }
tr.warned { background: var(--warn); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1rem; font-size:
.9rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .7rem; overflow-x: auto; font-size: .82rem; border-radius: .3rem; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } td, td:last-child { white-space: normal; min-width: 0; padding-right: .4rem; } }
"""
