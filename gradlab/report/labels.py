"""What figures and tables call things, and the selection of what one of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

_LABELS = {
    "cosine": "cosine with {reference}",
    "norm_ratio": "norm relative to {reference}",
    "relative_error": "error relative to {reference}",
    "angle": "angle to {reference} (degrees)",
    "projection": "projection on {reference}",
    "optimal_scale": "factor that fits {reference} best",
    "optimal_scale_error": "error relative to {reference} at the best scale",
    "top_overlap": "largest tenth shared with {reference} (share of weights)",
    "sign_agreement": "same sign as {reference} (share of weights)",
    "sign_coverage": "weights counted for the sign (share)",
    "norm": "norm of the gradient",
    "firing_rate": "firing rate (spikes per unit and step)",
    "silent_units": "silent units",
    "saturated_units": "saturated units",
    "slope": "mean surrogate slope",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "accuracy": "test accuracy (share)",
    "silent_outputs": "silent output units",
    "classes_never_predicted": "classes never predicted",
}


def metric_label(metric: str, reference: str = "BPTT") -> str:
    """A metric's name in words, as it stands on an axis."""
    return _LABELS.get(metric, metric.replace("_", " ")).format(reference=reference)


def layer_label(name: str) -> str:
    return "network" if name == "network" else name if "/" in name else name.replace("_", " ")


def whole_layers(frame: pd.DataFrame) -> list[str]:
    """The network and its whole layers, without single parameters, in order."""
    names = [name for name in dict.fromkeys(frame["layer"]) if "/" not in name]
    return sorted(names, key=lambda name: (name != "network", len(name), name))


def select(
    summary: pd.DataFrame, one: Sequence[str] = ("study", "network", "train_rule"), **wanted: Any
) -> pd.DataFrame:
    rows = summary
    for column, value in wanted.items():
        found = rows[rows[column] == value]
        if found.empty:
            raise ValueError(
                f"the summary has no row with {column} == {value!r}; there is "
                f"{', '.join(map(repr, dict.fromkeys(rows[column])))}"
            )
        rows = found
    for column in one:
        if column in rows.columns and rows[column].nunique(dropna=False) > 1:
            names = ", ".join(map(repr, dict.fromkeys(rows[column])))
            raise ValueError(f"one figure shows one {column}, the summary has {names}: select one first")
    return rows
