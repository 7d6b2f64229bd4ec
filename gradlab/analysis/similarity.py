"""Means and intervals over seeds of a tidy frame of results.

A tidy frame has one row per number, with the columns `study, cell, network, train_rule, seed, step, rule,
layer, metric, value, flag`. `flag` is empty, or a sentence that says why the value is undefined (a silent
layer, for example). Undefined values never enter a mean: they are counted in `n_undefined` and their
reasons are kept.

Which interval. Studies have few seeds, often three. A bootstrap over three seeds can draw only ten different
samples, and its 95 % interval is just the smallest and the largest value, which covers the true mean in about
three cases of four. The default is therefore Student's t interval,

    (1)  mean -+ t((1 + level) / 2, n - 1) * s / sqrt(n)        s: standard deviation over the n seeds (n -
    1 below),

which is exact for normal seeds at every n >= 2 and honestly wide when n is small. The percentile bootstrap
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, doi:10.1201/9780429246593) is offered for groups
of at least `MIN_BOOTSTRAP_SEEDS` defined seeds; smaller groups get (1) even then, and the column `method`
says which was used. The end points are cut to the values a metric can take (a cosine has none above 1),
which leaves the coverage unchanged.

The mean here is a mean of metrics over seeds. The mean of cosines is not the cosine of mean gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

KEYS = ("study", "network", "train_rule", "step", "rule", "layer", "metric")
"""What tells the rows of one seed apart, and what `summarise` groups by when not told otherwise."""

MIN_BOOTSTRAP_SEEDS = 8
NO_REASON = "undefined, and no reason was recorded"
_TEXT = ("study", "cell", "network", "train_rule", "rule", "layer", "metric", "flag")
_LIMITS = {
    "cosine": (-1.0, 1.0), "angle": (0.0, 180.0), "optimal_scale_error": (0.0, 1.0), "top_overlap": (0.0, 1.0),
    "sign_agreement": (0.0, 1.0), "sign_coverage": (0.0, 1.0), "norm": (0.0, np.inf), "norm_ratio": (0.0, np.inf),
    "relative_error": (0.0, np.inf), "accuracy": (0.0, 1.0),
    "firing_rate": (0.0, np.inf), "silent_units": (0.0, np.inf), "saturated_units": (0.0, np.inf),
    "silent_outputs": (0.0, np.inf), "classes_never_predicted": (0.0, np.inf),
}  # fmt: skip


def tidy(frame: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    """A checked copy of a tidy frame.

    Empty text that a CSV reader turned into NaN becomes empty text again. Rows that carry a flag, or whose
    value is not finite, get the value NaN and a non-empty flag.

    Raises:
        ValueError: if a column that is needed is missing, or if there are no rows.
    """
    missing = [name for name in ("seed", "metric", value) if name not in frame.columns]
    if missing:
        raise ValueError(
            f"the frame has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(str, frame.columns))}. A tidy frame has the columns study, cell, network, "
            "train_rule, seed, step, rule, layer, metric, value, flag."
        )
    if frame.empty:
        raise ValueError("the frame has no rows: nothing matched the selection, or nothing was measured")
    frame = frame.copy()
    if "flag" not in frame.columns:
        frame["flag"] = ""
    for name in _TEXT:
        if name in frame.columns:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
    frame[value] = frame[value].astype(float)
    finite = np.isfinite(frame[value].to_numpy())
    flagged = frame["flag"].to_numpy() != ""
    frame.loc[~finite & ~flagged, "flag"] = NO_REASON
    frame.loc[~finite | flagged, value] = np.nan
    return frame


def summarise(
    frame: pd.DataFrame,
    by: Sequence[str] | None = None,
    value: str = "value",
    level: float = 0.95,
    method: str = "t",
    n_boot: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and interval over seeds, per group.

    Args:
        frame: a tidy frame.
        by: the columns that make a group; by default those of `KEYS` that the frame has. A group must hold
            at most one row per seed: rows of one seed are not independent, and counting them would make
            intervals too small.
        value: the column that is averaged.
        level: the share of intervals that should cover the mean.
        method: "t" for equation (1) of this module, or "bootstrap".
        n_boot: the number of bootstrap samples.
        seed: the seed of the bootstrap.

    Returns:
        One row per group, in order of first appearance: the columns `by`, then `mean`, `low`, `high` (NaN
        where fewer than two seeds are defined), `n` (seeds in the mean), `n_undefined` (seeds left out),
        `reason` (why they were left out, "" if none were) and `method`.

    Raises:
        ValueError: for an unknown method or level, a missing column, or several rows of one seed in a group.
    """
    if method not in ("t", "bootstrap"):
        raise ValueError(f"method must be 't' or 'bootstrap', not {method!r}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, not {level!r}")
    frame = tidy(frame, value)
    by = _group_columns(frame, by)
    _refuse_repeated_seeds(frame, by)
    groups = frame.groupby(by, sort=False, dropna=False)
    column = groups[value]
    table = pd.DataFrame({"mean": column.mean(), "n": column.count()})
    table["n_undefined"] = groups.size() - table["n"]
    quantile = stats.t.ppf(0.5 + level / 2, np.maximum(table["n"] - 1, 1))
    half = quantile * column.std(ddof=1) / np.sqrt(table["n"])  # the deviation of one seed is NaN
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    table["method"] = "t"
    undefined = frame[frame[value].isna()].groupby(by, sort=False, dropna=False)["flag"]
    table["reason"] = undefined.agg(lambda flags: "; ".join(dict.fromkeys(flags))).reindex(table.index)
    table["reason"] = table["reason"].astype(object).where(table["reason"].notna(), "")
    if method == "bootstrap":
        _bootstrap(table, column, level, n_boot, np.random.default_rng(seed))
    return _cut(table.reset_index())[[*by, "mean", "low", "high", "n", "n_undefined", "reason", "method"]]


def paired_difference(
    frame: pd.DataFrame,
    reference_rule: str,
    column: str = "rule",
    level: float = 0.95,
    method: str = "t",
    n_boot: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and interval over seeds of the difference to a reference, seed by seed.

        (2)  difference_seed = value_seed(rule) - value_seed(reference_rule)

    Seeds share their data and their first weights, so the difference is far steadier than either value. A
    pair with an undefined half is undefined, with the reason.

    Args:
        frame: a tidy frame.
        reference_rule: the rule that is subtracted.
        column: where rule names stand: "rule" (the rule compared) or "train_rule" (the rule trained with).
        level, method, n_boot, seed: as in `summarise`.

    Returns:
        The columns of `summarise`, without rows of the reference.

    Raises:
        ValueError: if the reference does not occur, or a key occurs twice.
    """
    frame = tidy(frame)
    keys = [name for name in KEYS if name in frame.columns]
    if column not in keys:
        raise ValueError(f"column must be 'rule' or 'train_rule' and must be in the frame, not {column!r}")
    known = list(dict.fromkeys(frame[column]))
    if reference_rule not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"no row has {column} == {reference_rule!r}; the frame has {names}")
    _refuse_repeated_seeds(frame, keys)
    pair = [name for name in keys if name != column] + ["seed"]
    is_reference = frame[column] == reference_rule
    reference = frame.loc[is_reference, [*pair, "value", "flag"]]
    both = frame[~is_reference].merge(reference, on=pair, how="left", suffixes=("", "_reference"))
    if both.empty:
        raise ValueError(f"the frame holds no rule but the reference {reference_rule!r}")
    theirs = both["flag_reference"].astype(object).where(both["flag_reference"].notna(), "it was not measured")
    reason = np.where(theirs != "", f"{reference_rule}: " + theirs, "")
    both["flag"] = np.where(both["flag"] != "", both["flag"], reason)
    both["value"] = both["value"] - both["value_reference"]
    # A difference of cosines may be negative or exceed 1: the limits of the metric are not its limits.
    both["metric"] = both["metric"] + _DIFFERENCE
    table = summarise(both, keys, level=level, method=method, n_boot=n_boot, seed=seed)
    table["metric"] = table["metric"].str.removesuffix(_DIFFERENCE)
    return table


_DIFFERENCE = " (difference)"


def cosines(gram: np.ndarray) -> np.ndarray:
    """All-pairs cosines of a Gram matrix of gradients: (3)  gram[i, j] / sqrt(gram[i, i] * gram[j, j]).

    `gram` is [rules, rules], the result too; rows and columns of a zero gradient, which has no direction,
    are NaN.
    """
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix is square, this array has the shape {gram.shape}")
    norms = np.sqrt(np.diag(gram))
    norms = np.where(norms > 0, norms, np.nan)
    # One division at a time: the product of two tiny norms would underflow.
    return gram / norms[:, None] / norms[None, :]


def _group_columns(frame: pd.DataFrame, by: Sequence[str] | None) -> list[str]:
    columns = [name for name in KEYS if name in frame.columns] if by is None else list(by)
    unknown = [name for name in columns if name not in frame.columns]
    if unknown or "seed" in columns or not columns:
        raise ValueError(
            f"by={columns} must name columns of the frame other than 'seed' (seeds are what is averaged); "
            f"it has {', '.join(map(str, frame.columns))}"
        )
    return columns


def _refuse_repeated_seeds(frame: pd.DataFrame, by: list[str]) -> None:
    repeated = frame.duplicated([*by, "seed"], keep=False)
    if not repeated.any():
        return
    first = frame[repeated].iloc[0]
    same = frame[(frame[[*by, "seed"]] == first[[*by, "seed"]]).all(axis=1)]
    varying = [name for name in KEYS if name in frame.columns and name not in by and same[name].nunique() > 1]
    where = ", ".join(f"{name}={first[name]!r}" for name in [*by, "seed"])
    way_out = f"select one, or add {', '.join(map(repr, varying))} to `by`" if varying else "drop the copies"
    raise ValueError(f"{len(same)} rows of one seed fall into one group ({where}): {way_out}")


def _bootstrap(table: pd.DataFrame, column: Any, level: float, n_boot: int, generator: np.random.Generator) -> None:
    draws: dict[int, np.ndarray] = {}
    for key, values in column:
        sample = values.dropna().to_numpy()
        if len(sample) < MIN_BOOTSTRAP_SEEDS:
            continue
        if len(sample) not in draws:
            draws[len(sample)] = generator.integers(len(sample), size=(n_boot, len(sample)))
        means = sample[draws[len(sample)]].mean(axis=1)
        ends = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
        key = key if table.index.nlevels > 1 else key[0]
        table.loc[key, ["low", "high"]] = ends
        table.loc[key, "method"] = "bootstrap"


def _cut(table: pd.DataFrame) -> pd.DataFrame:
    if "metric" not in table.columns:
        return table
    limits = [_LIMITS.get(metric, (-np.inf, np.inf)) for metric in table["metric"]]
    low, high = np.asarray(limits, dtype=float).T
    # The mean itself is never moved: rounding may put a cosine at 1 + 1e-16, and then the end point joins it.
    table["low"] = np.minimum(table["low"].clip(low, None), table["mean"].where(table["low"].notna()))
    table["high"] = np.maximum(table["high"].clip(None, high), table["mean"].where(table["high"].notna()))
    return table
