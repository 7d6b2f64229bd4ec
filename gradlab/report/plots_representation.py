"""Heat maps of representational similarity (CKA): networks by networks, layers by layers.

n is the number of rows: samples for rates, samples times steps over time. Both draw from the frame of
`gradlab.analysis.representation.Representations`, or from a CSV file of one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradlab.report.labels import layer_label, select
from gradlab.report.legends import axes_for
from gradlab.report.plots_maps import heat_map

_NAMES = {"cka": "biased", "cka_debiased": "debiased"}
_KINDS = {"rates": "of rates", "time": "over time"}


def networks(frame: pd.DataFrame, layer: str, ax: Axes | None = None) -> Axes:
    """CKA between all networks in one layer; undefined values are hatched.

    Args:
        frame: what `Representations.to_frame` returns.
        layer: which layer.
        ax: where to draw.
    """
    ax, _ = axes_for(ax)
    rows = select(frame, one=("metric", "kind"), layer=layer, other_layer=layer)
    names = list(dict.fromkeys(rows["rule"]))
    _map(ax, rows, ("rule", "other_rule"), (names, names), (names, names))
    ax.set_aspect("equal")
    ax.tick_params(axis="x", labelrotation=40)
    for text in ax.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    ax.set_title(f"{layer_label(layer)}{_hatched(rows)}", loc="left")
    return ax


def layers(frame: pd.DataFrame, name: str, other: str, ax: Axes | None = None) -> Axes:
    """CKA between the layers of one network (rows) and those of another (columns); undefined values are hatched.

    Args:
        frame: what `Representations.to_frame` returns.
        name, other: which networks.
        ax: where to draw.
    """
    ax, _ = axes_for(ax)
    rows = select(frame, one=("metric", "kind"), rule=name, other_rule=other)
    keys = list(dict.fromkeys(rows["layer"]))
    labels = [layer_label(key) for key in keys]
    _map(ax, rows, ("layer", "other_layer"), (keys, keys), (labels, labels))
    ax.set(ylabel=name, xlabel=other)
    ax.set_aspect("equal")
    ax.set_title(_hatched(rows).lstrip(", "), loc="left")
    return ax


def _map(
    ax: Axes,
    rows: pd.DataFrame,
    columns: tuple[str, str],
    keys: tuple[list[str], list[str]],
    labels: tuple[list[str], list[str]],
) -> None:
    table = rows.set_index(list(columns))["value"]
    values = np.array([[table.get((a, b), np.nan) for b in keys[1]] for a in keys[0]], dtype=float)
    stars = np.zeros(values.shape, dtype=bool)
    # The scale of cosines ends at 1, as CKA does.
    first = rows.iloc[0]
    label = f"linear CKA {_KINDS[first['kind']]} ({_NAMES[first['metric']]}, n = {first['n']})"
    heat_map(ax, values, stars, labels[0], labels[1], "cosine", label)


def _hatched(rows: pd.DataFrame) -> str:
    return ", hatched: undefined" if rows["value"].isna().any() else ""
