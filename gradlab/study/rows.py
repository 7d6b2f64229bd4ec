"""The rows of `metrics.csv`: one measured number each, in one tidy layout for all that reads them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "REFUSED", "comparison_rows", "read_rows", "rows_to_csv", "training_rows"]

COLUMNS = (
    "study",
    "cell",
    "network",
    "train_rule",
    "seed",
    "step",
    "rule",
    "layer",
    "metric",
    "value",
    "flag",
)
"""Columns of the tidy table; `rule` is empty for numbers that are not about a gradient."""

REFUSED = "refused"
"""The metric of a row that records why a rule was not compared; the sentence is in `flag`."""

Row = dict[str, Any]


def comparison_rows(comparison: Any, names: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the rows of a `gradlab.Comparison`, its refusals included.

    Args:
        comparison: what `gradlab.compare` returned.
        names: if given, only the rules that are its keys are kept, renamed to its values.
    """
    for record in comparison.to_frame().to_dict("records"):
        name = record["rule"] if names is None else names.get(record["rule"])
        if name:  # rows without a rule are about the network; they come from the held-out batch
            yield _row(name, record["layer"], record["metric"], record["value"], record["flag"])
    for rule, sentence in comparison.refusals.items():
        yield _row(rule if names is None else names.get(rule, rule), "network", REFUSED, math.nan, sentence)


def training_rows(measured: Mapping[str, Any], rename: Mapping[str, str]) -> Iterator[Row]:
    """Yield rows of numbers about the network itself: numbers are the whole network's, dictionaries are by
    layer.

    Args:
        measured: what `gradlab.evaluate` returned.
        rename: other names for some of the metrics.
    """
    for metric, value in measured.items():
        by_layer = value if isinstance(value, Mapping) else {"network": value}
        for layer, number in by_layer.items():
            yield _row("", layer, rename.get(metric, metric), number, "")


def _row(rule: str, layer: str, metric: str, value: Any, flag: Any) -> Row:
    number = float(value)
    flag = flag if isinstance(flag, str) else ""
    if not math.isfinite(number) and not flag:
        flag = "not a finite number"
    return {"rule": rule, "layer": layer, "metric": metric, "value": number, "flag": flag}


def rows_to_csv(rows: Iterable[Row], header: bool) -> bytes:
    """Return rows as CSV; numbers are written with the fewest digits that give the same number back."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({**row, "value": repr(float(row["value"]))})
    return text.getvalue().encode()


def read_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """Read `metrics.csv` files into one table with the columns `COLUMNS`; empty text stays empty text."""
    import pandas as pd

    text = {name: str for name in COLUMNS if name not in ("seed", "step", "value")}
    # Python's own float reads back exactly the number that was written.
    options: dict[str, Any] = {"dtype": text, "keep_default_na": False, "converters": {"value": float}}
    frames = [pd.read_csv(path, **options) for path in paths]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
