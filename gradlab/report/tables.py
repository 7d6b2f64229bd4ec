"""Tables of results over seeds, as frames of numbers and as CSV, Markdown and LaTeX files.

A table of numbers has three columns per metric, `cosine`, `cosine_low` and `cosine_high`, and a column
`warning` that says when not to trust a row. CSV files keep these numbers; `readable` joins them to "0.91
[0.88, 0.94]" for people.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gradlab.analysis.similarity import summarise, tidy
from gradlab.report.labels import whole_layers

logger = logging.getLogger(__name__)

SIMILARITY_METRICS = ("cosine", "norm_ratio", "relative_error")
TRAINING_METRICS = ("train_loss", "test_loss", "accuracy", "silent_outputs", "classes_never_predicted")
_FLAT = 1e-6  # mean surrogate slope below which a layer passes no gradient


def similarity_table(
    frame: pd.DataFrame,
    step: int | None = None,
    metrics: Sequence[str] = SIMILARITY_METRICS,
    layers: Sequence[str] | None = None,
    level: float = 0.95,
    method: str = "t",
) -> pd.DataFrame:
    """Metrics of each rule's gradient per layer at one step: mean and interval over seeds.

    Args:
        frame: a tidy frame of results, not a summary.
        step: the training step; by default the last.
        metrics: the columns wanted.
        layers: by default the network and its whole layers; paths of parameters can be asked for.
        level, method: as in `gradlab.analysis.similarity.summarise`.

    Returns:
        One row per network, rule trained with, rule and layer; `seeds` is the smallest number of seeds
        behind a number of the row; `warning` is empty, or says why not to trust the row.

    Raises:
        ValueError: if nothing was measured at that step.
    """
    at = _at_step(frame, step, metrics)
    layers = whole_layers(at[at["metric"].isin(metrics)]) if layers is None else list(layers)
    rows = at[at["metric"].isin(metrics) & at["layer"].isin(layers)]
    table = _wide(summarise(rows, level=level, method=method), ["network", "train_rule", "rule", "layer"], metrics)
    health = _health(at)
    for i, row in table.iterrows():
        more = health.get((row["network"], row["train_rule"], row["layer"]), "")
        table.loc[i, "warning"] = "; ".join(filter(None, [row["warning"], more]))
    return table


def training_table(
    frame: pd.DataFrame,
    step: int | None = None,
    metrics: Sequence[str] = TRAINING_METRICS,
    level: float = 0.95,
    method: str = "t",
) -> pd.DataFrame:
    """Metrics of training at one step, per network and rule trained with; arguments as in `similarity_table`.

    The warning names silent outputs and classes that are never predicted: accuracies with and without them
    do not compare.
    """
    at = _at_step(frame, step, metrics)
    rows = at[at["metric"].isin(metrics) & (at["layer"] == "network")]
    table = _wide(summarise(rows, level=level, method=method), ["network", "train_rule"], metrics)
    for metric, words in (
        ("silent_outputs", "silent outputs"),
        ("classes_never_predicted", "classes never predicted"),
    ):
        if metric in table.columns:
            dead = table[metric] > 0
            notes = f"{words}: accuracy does not compare"
            table.loc[dead, "warning"] = [f"{old}; {notes}".lstrip("; ") for old in table.loc[dead, "warning"]]
    return table


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a metric and its interval in one text: "0.91 [0.88, 0.94]", or just "0.91"."""
    out = {}
    for column in table.columns:
        if f"{column}_low" in table.columns:
            ends = zip(table[column], table[f"{column}_low"], table[f"{column}_high"], strict=True)
            out[column] = [interval_text(*numbers) for numbers in ends]
        elif not _is_end(str(column), table):
            out[column] = [_cell(value) for value in table[column]]
    return pd.DataFrame(out, columns=list(out))


def interval_text(mean: float, low: float, high: float) -> str:
    """A mean with its interval, rounded so that the interval's width keeps two significant digits.

    Without an interval only the mean is given, and "(all seeds)" says that all seeds have the same value.

    >>> interval_text(0.91234, 0.8834, 0.9412)
    '0.912 [0.883, 0.941]'
    """
    if math.isnan(mean):
        return "undefined"
    if math.isnan(low) or math.isnan(high):
        return f"{mean:.3g}"
    width = high - low
    if width <= 0:
        return f"{mean:.4g} (all seeds)"
    if 0 < max(abs(low), abs(high)) < 1e-3 or abs(mean) >= 1e5:
        return f"{mean:.2e} [{low:.2e}, {high:.2e}]"
    digits = min(max(1 - math.floor(math.log10(width)), 0), 5)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def to_files(table: pd.DataFrame, stem: str | os.PathLike[str]) -> list[Path]:
    """Write `stem.csv` (numbers in full), `stem.md` and `stem.tex` (readable; booktabs); return the paths."""
    text = readable(table)
    contents = {
        "csv": table.to_csv(index=False, lineterminator="\n"),
        "md": markdown(text),
        "tex": latex(text),
    }
    paths = []
    for suffix, content in contents.items():
        path = Path(f"{os.fspath(stem)}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(content, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
        paths.append(path)
    logger.info("wrote %s", ", ".join(map(str, paths)))
    return paths


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table. Pipes and line breaks inside cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def escape(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    head = [escape(_head(name)) for name in table.columns]
    rows = [[escape(_cell(value)) for value in row] for row in table.itertuples(index=False)]
    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows))


def latex(table: pd.DataFrame) -> str:
    r"""A LaTeX `tabular` in the style of the booktabs package (`\usepackage{booktabs}`), all text escaped."""
    rows = [[_head(name) for name in table.columns]]
    rows += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [" & ".join(map(_escape_latex, row)) for row in rows]
    # A row that starts with a bracket would be read as an option of the line break before it.
    lines = [f"{{}}{line}" if line.startswith("[") else line for line in lines]
    body = "".join(f"{line} \\\\\n" for line in lines[1:])
    return (
        f"\\begin{{tabular}}{{{'l' * len(table.columns)}}}\n\\toprule\n{lines[0]} \\\\\n\\midrule\n"
        f"{body}\\bottomrule\n\\end{{tabular}}\n"
    )


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", "\n": " ",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _head(name: object) -> str:
    return str(name).replace("_", " ")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "undefined" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _is_end(column: str, table: pd.DataFrame) -> bool:
    base, _, end = column.rpartition("_")
    return end in ("low", "high") and base in table.columns


def _at_step(frame: pd.DataFrame, step: int | None, metrics: Sequence[str]) -> pd.DataFrame:
    frame = tidy(frame)
    measured = frame[frame["metric"].isin(metrics)]
    if measured.empty:
        known = ", ".join(dict.fromkeys(frame["metric"]))
        raise ValueError(f"none of the metrics {', '.join(metrics)} was measured; the frame has {known}")
    step = measured["step"].max() if step is None else step
    if step not in set(measured["step"]):
        steps = ", ".join(map(str, sorted(measured["step"].unique())))
        raise ValueError(f"nothing was measured at step {step}; the steps are {steps}")
    return frame[frame["step"] == step]


def _wide(summary: pd.DataFrame, keys: list[str], metrics: Sequence[str]) -> pd.DataFrame:
    if "study" in summary.columns and summary["study"].nunique() > 1:
        raise ValueError(f"one table holds one study, not {', '.join(summary['study'].unique())}: select one first")
    keys = [key for key in keys if key in summary.columns]
    rows = []
    for key, group in summary.groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        by_metric = group.set_index("metric")
        for metric in metrics:
            if metric in by_metric.index:
                ends = by_metric.loc[metric, ["mean", "low", "high"]]
                row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), ends, strict=True))
        rows.append(row | {"seeds": int(group["n"].min()), "warning": _warning(group)})
    return pd.DataFrame(rows)


def _warning(group: pd.DataFrame) -> str:
    notes = []
    lost = int(group["n_undefined"].max())
    if lost:
        total = int((group["n"] + group["n_undefined"]).max())
        reasons = "; ".join(dict.fromkeys(filter(None, group["reason"])))
        names = ", ".join(group.loc[group["n_undefined"] > 0, "metric"])
        notes.append(f"{names} undefined for {lost} of {total} seeds ({reasons})")
    elif group["n"].min() < 2:
        notes.append("one seed: no interval")
    elif group["n"].min() < 3:
        notes.append("two seeds: the interval is hardly informative")
    return "; ".join(notes)


def _health(at: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """Per network, rule trained with and layer: a warning if the layer can pass no gradient in some seed."""
    notes: dict[tuple[str, str, str], str] = {}
    for metric, least, words in (
        ("firing_rate", 0.0, "layer silent"),
        ("slope", _FLAT, "no surrogate slope"),
    ):
        rows = at[(at["metric"] == metric) & (at["value"] <= least)]
        for (network, rule, layer), group in rows.groupby(["network", "train_rule", "layer"], sort=False):
            key, note = (str(network), str(rule), str(layer)), f"{words} in {group['seed'].nunique()} seeds"
            notes[key] = "; ".join(filter(None, [notes.get(key, ""), note]))
    return notes
