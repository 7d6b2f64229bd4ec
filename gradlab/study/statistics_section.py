"""The section of a study's report that says how sure one can be which rule trains better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradlab.study.sections import figure

if TYPE_CHECKING:
    import pandas as pd

    from gradlab.report.html import Section
    from gradlab.study.summary import Results

__all__ = ["statistics"]

_SHARE = 0.9
_TEXT = (
    "Scores are those of the last probe. The interquartile mean leaves out the best and the worst quarter of all runs; "
    "its interval is a bootstrap over seeds, each drawn for all networks together, since seeds share their first "
    "weights and data. The probability of improvement says how often a run of a rule is better than one of "
)


def statistics(found: Results) -> Section | None:
    """Return the comparison of the rules trained with, if there are at least two of them and accuracies."""
    from gradlab.report.html import Section

    rows = found.frame[(found.frame["rule"] == "") & (found.frame["layer"] == "network")]
    names = list(dict.fromkeys(rows["train_rule"]))
    reference = found.study.reference.name
    if len(names) < 2 or reference not in names or "accuracy" not in set(rows["metric"]) or found.missing:
        return None
    text = f"{_TEXT}{reference}. Read the warnings first."
    return Section("How sure is it?", [text, *_table(found, rows, reference), *_updates(found, rows, reference)])


def _table(found: Results, rows: pd.DataFrame, reference: str) -> list[Any]:
    from gradlab.analysis.statistics import summary_table
    from gradlab.report import plots_statistics, tables
    from gradlab.report.html import Table
    from gradlab.report.style import new_figure

    table = summary_table(rows, reference, together=True, column="train_rule", task="network")
    tables.to_files(table, found.root / "tables" / "statistics")
    wanted = ["rule", "iqm", "low", "high", "n", "difference", "difference_low", "difference_high", "improvement"]
    shown = table[[*wanted, "improvement_low", "improvement_high", "warning"]]
    shown = shown.rename(columns={"low": "iqm_low", "high": "iqm_high", "n": "seeds"})
    blocks: list[Any] = [Table(shown, "Accuracy over all networks: interquartile mean, 95 % bootstrap intervals.")]
    for name, draw, caption in (
        ("intervals", plots_statistics.intervals, "Interquartile mean of the accuracy with its 95 % interval."),
        ("improvement", plots_statistics.improvement, "How often a run is better than one of the reference."),
    ):
        drawn, (ax,) = new_figure()
        draw(table, ax)
        blocks.append(figure(found, drawn, name, caption))
    return blocks


def _updates(found: Results, rows: pd.DataFrame, reference: str) -> list[Any]:
    """Updates to a share of the accuracy that the reference ended with, per network."""
    from gradlab.analysis.updates import updates_to_target
    from gradlab.report import plots_statistics
    from gradlab.report.style import new_figure

    blocks: list[Any] = []
    accuracy = rows[rows["metric"] == "accuracy"]
    for network in dict.fromkeys(accuracy["network"]):
        own = accuracy[accuracy["network"] == network]
        ends = own[(own["train_rule"] == reference) & (own["step"] == own["step"].max())]["value"]
        if not ends.mean() > 0:
            continue
        target = round(_SHARE * float(ends.mean()), 3)
        reached = updates_to_target(own, target, higher_is_better=True, metric="accuracy")
        drawn, (ax,) = new_figure()
        plots_statistics.updates(reached.to_frame(), reached.summary(), ax)
        caption = (
            f"Updates until the test accuracy first reached {target:g}, nine tenths of what {reference} ended with "
            f"(network {network}), as far as the probes tell. An arrow: not reached."
        )
        blocks.append(figure(found, drawn, f"updates-to-target-{network}", caption))
    return blocks
