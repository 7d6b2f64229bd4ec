"""Statistics of scores over seeds and tasks: aggregates with bootstrap intervals, profiles, and a table per rule.

Definitions of Agarwal et al. 2021 (arXiv:2108.13264). The functions of arrays [seeds, tasks] can be used from here;
they are in `gradlab.analysis.bootstrap`, which also says how far to trust the intervals. This module adds what works on
tidy frames (`gradlab.analysis.similarity` describes them). Means with Student's interval are in `similarity.summarise`.

An undefined run never enters a number in silence. A seed counts for a rule only if it is defined in *every* task, so
that all tasks weigh the same; seeds left out are counted, with their reasons. What is left may flatter the rule: runs
that died are not a random choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from gradlab.analysis.bootstrap import (
    FEW_SEEDS,
    Interval,
    bootstrap_difference,
    caution,
    check_level,
    check_scores,
    ends,
    indices,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    resample,
    stratified_bootstrap,
)
from gradlab.analysis.scores import RuleScores, collect_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FEW_SEEDS", "Interval", "PerformanceProfile", "RuleScores", "bootstrap_difference", "collect_scores",
    "interquartile_mean", "mean", "median", "optimality_gap", "paired_differences", "performance_profile",
    "probability_of_improvement", "stratified_bootstrap", "summary_table",
]  # fmt: skip

_HIGHER = ("accuracy", "cosine", "sign_agreement", "sign_coverage")
_LOWER = ("loss", "train_loss", "test_loss", "relative_error", "silent_outputs", "classes_never_predicted")

DIFFERENCE, IMPROVEMENT = "difference: ", "improvement: "
"""Sentences of the column `warning` that begin so are about these columns only."""


@dataclasses.dataclass(frozen=True)
class PerformanceProfile:
    """The share of runs above each threshold, per rule, with pointwise intervals.

    Attributes:
        rules: names.
        thresholds: [thresholds].
        share, low, high: [rules, thresholds]; low and high are NaN for a rule with one seed.
        n: seeds per rule.
        warnings: per rule, why not to trust the intervals.
    """

    rules: tuple[str, ...]
    thresholds: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: tuple[int, ...]
    warnings: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, metric, threshold, value, low, high, n, flag, warning."""
        frames = []
        for i, rule in enumerate(self.rules):
            columns = {"threshold": self.thresholds, "value": self.share[i], "low": self.low[i], "high": self.high[i]}
            frame = pd.DataFrame(columns).assign(n=self.n[i], flag="", warning=self.warnings[i])
            for position, (name, text) in enumerate(
                (("rule", rule), ("layer", "network"), ("metric", "share_above_threshold"))
            ):
                frame.insert(position, name, text)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def plot(self, ax: Axes | None = None, *, label: str = "score") -> Axes:
        """A curve with its band per rule; `label` names the score, with its unit."""
        from gradlab.report import plots_statistics

        return plots_statistics.profiles(self.to_frame(), ax, label=label)


def performance_profile(
    scores: Mapping[str, ArrayLike],
    thresholds: ArrayLike,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    *,
    together: bool = False,
) -> PerformanceProfile:
    """How many runs score higher than each threshold (the run-score distribution).

        (1)  share(tau) = mean over tasks and seeds of [scores > tau]

    Where the curve of one rule lies above that of another everywhere, every quantile of its runs is better. The
    bands hold for one threshold at a time, not for the whole curve.

    Args:
        scores: {rule: [seeds, tasks] or [seeds]}.
        thresholds: [thresholds], increasing.
        level, n_boot, seed, together: as in `stratified_bootstrap`; every rule begins with the same seed.

    Raises:
        ValueError: scores that are not finite, no rules, thresholds that do not increase.
    """
    taus = np.asarray(thresholds, dtype=np.float64)
    if taus.ndim != 1 or not taus.size or not np.isfinite(taus).all() or (np.diff(taus) <= 0).any():
        raise ValueError(f"thresholds must be a list of increasing numbers, not {thresholds!r}")
    if not scores:
        raise ValueError("scores hold no rule: give {rule name: array [seeds, tasks]}")
    check_level(level, n_boot)
    checked = {rule: check_scores(values, f"scores of {rule}") for rule, values in scores.items()}
    share = np.array([[(values > tau).mean() for tau in taus] for values in checked.values()])
    low, high = np.full(share.shape, np.nan), np.full(share.shape, np.nan)
    for i, values in enumerate(checked.values()):
        if len(values) > 1:
            samples = resample(values, indices(seed, n_boot, values.shape, together))
            for j, tau in enumerate(taus):
                low[i, j], high[i, j] = ends((samples > tau).mean(axis=(1, 2)), level)
    n = tuple(len(values) for values in checked.values())
    warnings = tuple(caution(len(values)) for values in checked.values())
    return PerformanceProfile(tuple(checked), taus, share, low, high, n, warnings)


def paired_differences(
    frame: pd.DataFrame,
    reference_rule: str,
    metric: str = "accuracy",
    *,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    together: bool = False,
    **where: Any,
) -> pd.DataFrame:
    """Differences of the interquartile mean to a reference, resampled seed by seed (`bootstrap_difference`).

    The counterpart with Student's interval for a mean over seeds is `similarity.paired_difference`.

    Args:
        frame: a tidy frame.
        reference_rule: the rule that is subtracted.
        metric: the rows that are scores.
        level, n_boot, seed, together: as in `stratified_bootstrap`.
        **where: `column`, `task`, `layer` and `step` of `collect_scores`.

    Returns:
        One row per rule but the reference: rule, layer, metric, value, low, high, n (seeds that both rules have), flag
        (why the value is undefined), warning.

    Raises:
        ValueError: as `collect_scores`, and for a reference that does not occur.
    """
    settings: dict[str, Any] = {"level": level, "n_boot": n_boot, "seed": seed, "together": together}
    found = collect_scores(frame, metric, **where)
    reference = _reference(found, reference_rule)
    rows: list[dict[str, Any]] = []
    for rule, own in found.items():
        if rule != reference_rule:
            got = _difference(own, reference, settings)
            flag = "" if got.n else f"no seed is defined for both {rule} and {reference_rule} in every task"
            row = {"rule": rule, "layer": where.get("layer", "network"), "metric": metric}
            rows.append({**row, **got._asdict(), "flag": flag})
    return pd.DataFrame(rows, columns=["rule", "layer", "metric", *Interval._fields, "flag"])


def summary_table(
    frame: pd.DataFrame,
    reference_rule: str,
    metric: str = "accuracy",
    *,
    higher_is_better: bool | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    together: bool = False,
    **where: Any,
) -> pd.DataFrame:
    """One row per rule: its interquartile mean, its difference to a reference, and when not to trust them.

    Args:
        frame: a tidy frame.
        reference_rule: the rule that the others are compared with.
        metric: the rows that are scores.
        higher_is_better: whether more of the metric is better; None: known for accuracies, losses and cosines.
        level, n_boot, seed, together: as in `stratified_bootstrap`.
        **where: `column`, `task`, `layer` and `step` of `collect_scores`.

    Returns:
        rule, layer, metric; `iqm`, `low`, `high`, `n` (seeds), `n_left_out`; `difference`, `difference_low`,
        `difference_high` (to the reference, `paired_differences`), `n_pairs`; `improvement`, `improvement_low`,
        `improvement_high` (`probability_of_improvement`: that a run is *better* than one of the reference); `level`,
        `reference` and `warning`. The reference has no difference to itself: NaN, and n_pairs 0.

    Raises:
        ValueError: as `collect_scores`, for a reference that does not occur, and for a metric of which it is not known
            whether more is better.
    """
    better = _direction(metric, higher_is_better)
    settings: dict[str, Any] = {"level": level, "n_boot": n_boot, "seed": seed, "together": together}
    found = collect_scores(frame, metric, **where)
    reference = _reference(found, reference_rule)
    rows: list[dict[str, Any]] = []
    for rule, own in found.items():
        alone = stratified_bootstrap(own.values, **settings) if own.seeds else _NONE
        difference, chance = _NONE, _NONE
        sentences = _warnings(own, alone)
        if rule != reference_rule:
            difference = _difference(own, reference, settings)
            x, y = _common(own, reference)
            if difference.n:
                chance = probability_of_improvement(better * x, better * y, **settings, paired=True)
            if chance.n and chance.low == chance.high:
                sentences.append(f"{IMPROVEMENT}{chance.value:.3g} in all resamples, so its interval has no width")
            sentences += _warnings_of_difference(difference, own, reference, reference_rule)
        row: dict[str, Any] = {"rule": rule, "layer": where.get("layer", "network"), "metric": metric}
        row |= {"iqm": alone.value, "low": alone.low, "high": alone.high, "n": alone.n, "n_left_out": own.left_out}
        row |= {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
        row |= {"n_pairs": difference.n, "improvement": chance.value, "improvement_low": chance.low}
        row |= {"improvement_high": chance.high, "level": level, "reference": reference_rule}
        rows.append({**row, "warning": "; ".join(sentences)})
    return pd.DataFrame(rows)


_NONE = Interval(np.nan, np.nan, np.nan, 0, "")


def _warnings(own: RuleScores, interval: Interval) -> list[str]:
    found = [interval.warning] if interval.warning else []
    if not own.seeds:
        found.append(f"undefined: {own.reason}")
    elif own.left_out:
        found.append(f"{own.left_out} of {own.left_out + len(own.seeds)} seeds left out ({own.reason})")
    if own.dead:
        found.append(
            f"outputs silent or classes never predicted in {own.dead} of {own.values.size} runs: not comparable"
        )
    return found


def _warnings_of_difference(difference: Interval, own: RuleScores, reference: RuleScores, name: str) -> list[str]:
    if not difference.n:
        return [f"{DIFFERENCE}no seed in common with {name}"] if own.seeds else []
    found = []
    if difference.n < len(own.seeds):
        found.append(f"{DIFFERENCE}only {difference.n} of {len(own.seeds)} seeds are defined for {name} too")
    if reference.dead and not own.dead:
        found.append(f"{DIFFERENCE}{name} has silent outputs or classes never predicted, not comparable")
    if difference.low <= 0 <= difference.high:
        found.append(f"{DIFFERENCE}the interval contains 0")
    return found


def _difference(own: RuleScores, reference: RuleScores, settings: Mapping[str, Any]) -> Interval:
    x, y = _common(own, reference)
    return bootstrap_difference(x, y, **settings) if len(x) else _NONE


def _common(own: RuleScores, reference: RuleScores) -> tuple[np.ndarray, np.ndarray]:
    """Scores [seeds, tasks] of the seeds that both have, in the same order."""
    seeds = [seed for seed in own.seeds if seed in reference.seeds]
    rows = [[scores.seeds.index(seed) for seed in seeds] for scores in (own, reference)]
    return own.values[rows[0]], reference.values[rows[1]]


def _reference(found: Mapping[str, RuleScores], name: str) -> RuleScores:
    if name not in found:
        raise ValueError(f"no rule is named {name!r}; the frame has {', '.join(map(repr, found))}")
    return found[name]


def _direction(metric: str, higher_is_better: bool | None) -> float:
    if higher_is_better is None and metric not in _HIGHER + _LOWER:
        raise ValueError(f"whether more {metric} is better is not known: say higher_is_better=True or False")
    return 1.0 if (metric in _HIGHER if higher_is_better is None else higher_is_better) else -1.0
