"""Results as .npz files: no pickle, and never a half-written file under the final name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> Path:
    """Write arrays by name to a .npz file, by rename; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))
    os.replace(unfinished, path)
    return path


def read_arrays(path: str | os.PathLike[str], what: str, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises:
        ValueError: if one of the `needed` names is missing: the file is no `what`.
    """
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{os.fspath(path)} is not a stored {what}: it lacks {', '.join(missing)}")
    return arrays
