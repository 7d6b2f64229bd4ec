"""Figures of statistics over seeds: intervals per rule, probabilities of improvement, profiles, updates to a target.

All draw from the frames of `gradlab.analysis.statistics` and `gradlab.analysis.updates`, or from a CSV file of one, and
compute nothing. What the frame's column `warning` or `flag` says stands below the axes, once for all rules it concerns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.report.labels import metric_label, select
from gradlab.report.legends import axes_for, finish
from gradlab.report.style import rule_style

_ROW = 0.24  # inches of height per rule
_GREY = "0.45"


def intervals(table: pd.DataFrame, ax: Axes | None = None, *, quantity: str = "iqm", label: str = "") -> Axes:
    """The interquartile mean per rule with its interval, or its difference to the reference.

    Args:
        table: what `summary_table` returns.
        ax: where to draw.
        quantity: "iqm", or "difference".
        label: the name of the score with its unit; by default the metric's.

    Raises:
        ValueError: for another quantity, or several layers or metrics in one table.
    """
    if quantity not in ("iqm", "difference"):
        raise ValueError(f"quantity={quantity!r}: choose 'iqm' or 'difference'")
    ax, alone = axes_for(ax)
    table = _words(select(table, one=("layer", "metric", "reference")), quantity)
    label = label or metric_label(table["metric"].iloc[0], table["reference"].iloc[0])
    if quantity == "difference":
        rows = table[table["rule"] != table["reference"]].reset_index(drop=True)
        ends = rows[["difference", "difference_low", "difference_high", "n_pairs"]]
        ax.axvline(0, color="0.75", linewidth=0.6, zorder=0)
        ax.set_xlabel(f"{label}: difference to {table['reference'].iloc[0]}")
    else:
        rows, ends = table, table[["iqm", "low", "high", "n"]]
        ax.set_xlabel(label)
    for i, (value, low, high, _) in enumerate(ends.itertuples(index=False)):
        _interval(ax, i, rows["rule"][i], (value, low, high), bool(rows["warning"][i]))
    _rule_axis(ax, rows["rule"], ends.iloc[:, 3])
    what = "interquartile mean" if quantity == "iqm" else "difference of interquartile means"
    _finish(ax, alone, len(rows), what, table, _said(rows))
    return ax


def improvement(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The probability that a run of a rule is better than one of the reference: bars from one half, with intervals.

    Args:
        table: what `summary_table` returns.
        ax: where to draw.
    """
    ax, alone = axes_for(ax)
    table = _words(select(table, one=("layer", "metric", "reference")), "improvement")
    rows = table[table["rule"] != table["reference"]].reset_index(drop=True)
    ends = rows[["improvement", "improvement_low", "improvement_high"]]
    for i, (value, low, high) in enumerate(ends.itertuples(index=False)):
        if not np.isnan(value):
            ax.barh(i, value - 0.5, left=0.5, height=0.55, color=rule_style(rows["rule"][i]).color, alpha=0.3)
        _interval(ax, i, rows["rule"][i], (value, low, high), bool(rows["warning"][i]))
    ax.axvline(0.5, color="0.3", linewidth=0.6)
    ax.set(xlim=(-0.02, 1.02), xlabel=f"probability of a better run than {table['reference'].iloc[0]}")
    _rule_axis(ax, rows["rule"], rows["n_pairs"])
    _finish(ax, alone, len(rows), "probability (line at 0.5: no difference)", table, _said(rows))
    return ax


def profiles(frame: pd.DataFrame, ax: Axes | None = None, *, label: str = "score") -> Axes:
    """Performance profiles: the share of runs above each threshold, with pointwise bands.

    Args:
        frame: what `PerformanceProfile.to_frame` returns.
        ax: where to draw.
        label: the name of the score, with its unit.
    """
    ax, alone = axes_for(ax)
    frame = _words(frame)
    handles = []
    for rule, part in frame.groupby("rule", sort=False):
        look = rule_style(str(rule))
        at = part["threshold"].to_numpy()
        ax.fill_between(at, part["low"].to_numpy(), part["high"].to_numpy(), color=look.color, alpha=0.15, linewidth=0)
        ax.plot(at, part["value"].to_numpy(), color=look.color, linestyle=look.line)
        text = f"{rule} (n = {part['n'].iloc[0]})"
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, label=text))
    ax.set(xlabel=f"threshold of the {label}", ylabel="share of runs above the threshold", ylim=(-0.02, 1.02))
    finish(ax, alone, handles, ["n: seeds; bands: intervals at each threshold alone", *_said(frame)])
    return ax


def updates(frame: pd.DataFrame, summary: pd.DataFrame | None = None, ax: Axes | None = None) -> Axes:
    """Updates, or seconds, to a target: a point per seed, an arrow at the right edge for a run that did not get there.

    Args:
        frame: what `UpdatesToTarget.to_frame` returns.
        summary: what its `summary` returns, for the medians; None: no medians.
        ax: where to draw.
    """
    ax, alone = axes_for(ax)
    rules, counts = list(dict.fromkeys(frame["rule"])), []
    for i, rule in enumerate(rules):
        part = frame.loc[frame["rule"] == rule, "value"].to_numpy()
        counts.append(f"{np.isfinite(part).sum()} of {len(part)}")
        _runs(ax, i, rule, part)
        if summary is not None:
            for median in summary.loc[summary["rule"] == rule, "value"].dropna():
                line = [i - 0.36, i + 0.36]
                ax.plot([median, median], line, color=rule_style(rule).color, linewidth=3, alpha=0.35, zorder=1)
    known = pd.concat([frame["value"], frame["last"]]).max()
    ax.set_xlim(0, known * 1.04 if known > 0 else 1)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    _rule_axis(ax, rules, counts, "{} reached")
    seconds = frame["metric"].iloc[0] == "seconds_to_target"
    ax.set_xlabel("training time until reached (s)" if seconds else "updates of the weights until reached")
    handles = [_key("o", "one seed", face="none"), _key(">", "not reached")]
    if summary is not None:
        handles.append(Line2D([], [], color=_GREY, linewidth=3, alpha=0.35, label="median over seeds"))
    notes = [f"target: {frame['condition'].iloc[0]}", *_reasons(frame, summary)]
    finish(ax, alone, handles, notes, height=_height(len(rules)))
    return ax


def _runs(ax: Axes, row: int, rule: str, values: np.ndarray) -> None:
    """One rule's runs, one below the other so that equal ones can be told apart."""
    look = rule_style(rule)
    heights = row + (np.linspace(-0.24, 0.24, len(values)) if len(values) > 1 else np.zeros(1))
    reached = np.isfinite(values)
    hollow: dict[str, Any] = {"color": look.color, "markerfacecolor": "none", "markersize": 4, "markeredgewidth": 0.7}
    if reached.any():  # an empty line would still count in the layout, at the corner of the figure
        ax.plot(values[reached], heights[reached], look.marker, **hollow)
    if not reached.all():
        right = ax.get_yaxis_transform()  # x: share of the axes, y: the rule's row
        edge = np.ones(int((~reached).sum()))
        ax.plot(edge, heights[~reached], ">", color=look.color, transform=right, clip_on=False, zorder=3)


def _reasons(frame: pd.DataFrame, summary: pd.DataFrame | None) -> list[str]:
    """What the medians' flags say, and what the runs' flags say beyond having been followed for so long."""
    notes = []
    if summary is not None:
        lines = _by_sentence(summary["rule"], _texts(summary["flag"]))
        notes += [f"no median: {line}" for line in lines]
    special = _texts(frame["flag"]).where(_texts(frame["flag"]).str.contains("undefined|lost"), "")
    return notes + _by_sentence(frame["rule"], special)


def _rule_axis(ax: Axes, rules: Sequence[str] | pd.Series, counts: object, pattern: str = "n = {}") -> None:
    names = [f"{rule} ({pattern.format(n)})" for rule, n in zip(rules, counts, strict=True)]  # type: ignore[call-overload]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _interval(ax: Axes, row: int, rule: str, ends: tuple[float, float, float], hollow: bool) -> None:
    look, (value, low, high) = rule_style(rule), ends
    if np.isnan(value):
        ax.text(0.02, row, "undefined", transform=ax.get_yaxis_transform(), va="center", color=_GREY)
        return
    if not np.isnan(low):  # one seed has no interval
        ax.plot([low, high], [row, row], color=look.color)
    ax.plot(value, row, look.marker, color=look.color, markerfacecolor="white" if hollow else look.color, markersize=5)


def _finish(ax: Axes, alone: bool, n: int, what: str, table: pd.DataFrame, notes: list[str]) -> None:
    handles = [Line2D([], [], color=_GREY, marker="o", label=f"{what}, {100 * table['level'].iloc[0]:g} % interval")]
    if notes:
        notes = ["n: seeds; hollow: not to be trusted without these words", *notes]
    finish(ax, alone, handles, notes or ["n: seeds"], columns=1, height=_height(n))


def _said(table: pd.DataFrame) -> list[str]:
    return _by_sentence(table["rule"], table["warning"])


def _by_sentence(rules: pd.Series, texts: pd.Series) -> list[str]:
    """One line per sentence, with the rules it is about."""
    about: dict[str, list[str]] = {}
    for rule, text in zip(rules, texts, strict=True):
        for sentence in filter(None, text.split("; ")):
            about.setdefault(sentence, [])
            if rule not in about[sentence]:
                about[sentence].append(rule)
    everyone = rules.nunique()
    return [
        f"{'all rules' if len(names) == everyone and everyone > 1 else ', '.join(names)}: {sentence}"
        for sentence, names in about.items()
    ]


def _words(table: pd.DataFrame, quantity: str = "") -> pd.DataFrame:
    """With empty text where a CSV reader put NaN, and without sentences that are about another quantity."""
    others = tuple(f"{name}: " for name in ("difference", "improvement") if name != quantity)

    def own(text: str) -> str:
        return "; ".join(part.removeprefix(f"{quantity}: ") for part in text.split("; ") if not part.startswith(others))

    return table.assign(warning=_texts(table["warning"]).map(own)).reset_index(drop=True)


def _texts(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").astype(str)


def _key(marker: str, label: str, face: str = _GREY) -> Line2D:
    return Line2D([], [], color=_GREY, marker=marker, markerfacecolor=face, linestyle="", label=label)


def _height(n: int) -> float:
    return max(0.9, 0.2 + _ROW * n)
