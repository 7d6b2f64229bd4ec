"""From a tidy frame to scores [seeds, tasks] per rule, with what had to be left out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from gradlab.analysis.similarity import KEYS, tidy

_DEAD = ("silent_outputs", "classes_never_predicted")


class RuleScores(NamedTuple):
    """The scores of one rule.

    Attributes:
        values: [seeds, tasks], float64, all defined.
        seeds, tasks: what the rows and columns are.
        left_out: seeds that are undefined in at least one task.
        reason: why, "" if none was left out.
        dead: runs in `values` with silent outputs or classes never predicted.
    """

    values: np.ndarray
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    left_out: int
    reason: str
    dead: int


def collect_scores(
    frame: pd.DataFrame,
    metric: str = "accuracy",
    *,
    column: str | None = None,
    task: str | None = None,
    layer: str = "network",
    step: int | None = None,
) -> dict[str, RuleScores]:
    """Scores of every rule from a tidy frame, at one step of training.

    Args:
        frame: a tidy frame (`gradlab.analysis.similarity.tidy`).
        metric: the rows that are scores.
        column: where the rules' names stand, "train_rule" or "rule". None: "rule" if the metric is about a
            gradient, that is if these rows name one, otherwise "train_rule".
        task: the column that tells tasks apart. None: "task" or "network", whichever the frame has first.
        layer: which layer's rows, if the frame has layers.
        step: which step's rows, if the frame has steps. None: the last one of the frame. A run that has no row there,
            because it ended early, is left out for that reason.

    Returns:
        {rule: scores}, in order of first appearance. A rule none of whose seeds is defined in every task has values
        of shape [0, tasks].

    Raises:
        ValueError: a column, metric, layer or step that the frame does not have, or several rows of one rule, task
            and seed.
    """
    frame = tidy(frame).reset_index(drop=True)
    rows = _only(_only(frame, "metric", metric), "layer", layer)
    column = _rule_column(rows, column)
    task = _task_column(rows, task)
    # From the rows of all steps: who ended early must be missed, not forgotten.
    every_seed = rows.groupby(column, sort=False)["seed"].unique()
    tasks = tuple(dict.fromkeys(rows[task])) if task else ("",)
    if "step" in rows.columns:
        step = rows["step"].max() if step is None else step
        rows = _only(rows, "step", step)
    keys = [column, "seed", *([task] if task else [])]
    _refuse_copies(rows, keys)
    dead = _dead_runs(frame, column, task, step)
    return {
        str(rule): _of_rule(rows[rows[column] == rule], sorted(seeds), tasks, task, step, dead.get(str(rule), set()))
        for rule, seeds in every_seed.items()
    }


def _of_rule(
    rows: pd.DataFrame, seeds: list[int], tasks: tuple[str, ...], task: str | None, step: int | None, dead: set
) -> RuleScores:
    at = dict(zip(zip(rows["seed"], rows[task] if task else [""] * len(rows), strict=True), rows.index, strict=True))
    missing = "not measured" if step is None else f"not measured at step {step}"
    reasons: dict[str, None] = {}
    kept, values = [], []
    for seed in seeds:
        places = [at.get((seed, name)) for name in tasks]
        flags = [missing if place is None else str(rows.at[place, "flag"]) for place in places]
        if any(flags):
            reasons |= dict.fromkeys(flag for flag in flags if flag)
        else:
            kept.append(seed)
            values.append([rows.at[place, "value"] for place in places])
    array = np.array(values, dtype=np.float64).reshape(len(kept), len(tasks))
    n_dead = sum((seed, name) in dead for seed in kept for name in tasks)
    return RuleScores(array, tuple(kept), tasks, len(seeds) - len(kept), "; ".join(reasons), n_dead)


def _dead_runs(frame: pd.DataFrame, column: str, task: str | None, step: int | None) -> dict[str, set]:
    """Rule -> {(seed, task)} of runs whose outputs are silent, or that never predict some class, at this step."""
    rows = frame[frame["metric"].isin(_DEAD) & (frame["value"] > 0)]
    if step is not None:
        rows = rows[rows["step"] == step]
    found: dict[str, set] = {}
    for rule, seed, name in zip(rows[column], rows["seed"], rows[task] if task else [""] * len(rows), strict=True):
        found.setdefault(rule, set()).add((seed, name))
    return found


def _only(rows: pd.DataFrame, name: str, wanted: object) -> pd.DataFrame:
    if name not in rows.columns:
        return rows
    found = rows[rows[name] == wanted]
    if found.empty:
        there = ", ".join(map(repr, dict.fromkeys(rows[name])))
        raise ValueError(f"the frame has no row with {name} == {wanted!r}; there is {there}")
    return found


def _rule_column(rows: pd.DataFrame, column: str | None) -> str:
    if column is None:
        named = "rule" in rows.columns and (rows["rule"] != "").any()
        column = "rule" if named else "train_rule"
    if column not in rows.columns:
        raise ValueError(f"the frame has no column {column!r} with the rules' names; it has {', '.join(rows.columns)}")
    return column


def _task_column(rows: pd.DataFrame, task: str | None) -> str | None:
    if task is not None and task not in rows.columns:
        raise ValueError(f"the frame has no column {task!r} that tells tasks apart; it has {', '.join(rows.columns)}")
    return task if task is not None else next((name for name in ("task", "network") if name in rows.columns), None)


def _refuse_copies(rows: pd.DataFrame, keys: list[str]) -> None:
    copies = rows[rows.duplicated(keys, keep=False)]
    if copies.empty:
        return
    first = copies.iloc[0]
    same = copies[(copies[keys] == first[keys]).all(axis=1)]
    varying = [name for name in KEYS if name in rows.columns and name not in keys and same[name].nunique() > 1]
    where = ", ".join(f"{name}={first[name]!r}" for name in keys)
    way_out = f"select one {' and one '.join(map(repr, varying))} first" if varying else "drop the copies"
    raise ValueError(f"{len(same)} rows are one run ({where}): {way_out}")
