"""Comparing a repeated run with the stored one that its specification came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gradlab.study.cells import cell_folder
from gradlab.study.rows import read_rows
from gradlab.study.spec import Study

__all__ = ["compare_with_stored"]


def compare_with_stored(spec: Path, study: Study, results: Path) -> Iterator[str]:
    """Yield, per cell, whether the repeated numbers equal those stored beside the specification.

    Args:
        spec: the `spec.json` of a study's folder, or of one cell's.
        study: what it describes.
        results: where it was run again.
    """
    for cell in study.cells():
        new = cell_folder(study, cell, results).path / "metrics.csv"
        beside = [spec.parent / "cells" / cell.folder / "metrics.csv", spec.parent / "metrics.csv"]
        old = next((path for path in beside if path.exists()), None)
        if old is None:
            yield f"{cell.name}: nothing is stored beside {spec.name} to compare with"
        elif old.read_bytes() == new.read_bytes():
            yield f"{cell.name}: equal to the stored numbers, byte for byte"
        else:
            yield f"{cell.name}: {_difference(old, new)}"


def _difference(old: Path, new: Path) -> str:
    a, b = read_rows([old]), read_rows([new])
    keys = ["seed", "step", "rule", "layer", "metric"]
    both = a.merge(b, on=keys, suffixes=("_old", "_new"))
    if len(both) != len(a) or len(both) != len(b):
        return f"DIFFERENT rows: {len(a)} stored, {len(b)} now, {len(both)} in common"
    gap = (both["value_old"] - both["value_new"]).abs()
    worst = both.iloc[int(gap.fillna(-1.0).to_numpy().argmax())]
    where = ", ".join(f"{key} {worst[key]}" for key in keys if worst[key] != "")
    return f"DIFFERENT numbers: at most by {gap.max():.3g} ({where}); other hardware or versions do this"
