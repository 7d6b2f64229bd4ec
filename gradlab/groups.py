"""Parameters by name, and the groups that results are given for: the network, its layers, single parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

NETWORK = "network"
"""The name of the whole network in the column "layer"."""


def by_parameter(tree: Any, lead: int = 0) -> dict[str, np.ndarray]:
    """A nested dict of arrays as {path: float64 [leading axes..., entries]}, in the dict's sorted order.

    Args:
        tree: parameters, or a gradient like them.
        lead: how many leading axes of each leaf are kept.
    """
    found: dict[str, np.ndarray] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping):
            for name in sorted(node):
                visit(node[name], f"{prefix}/{name}" if prefix else str(name))
        else:
            array = np.asarray(node, np.float64)
            found[prefix] = array.reshape(*array.shape[:lead], -1)

    visit(tree, "")
    return found


def groups(paths: Iterable[str]) -> dict[str, list[str]]:
    """{group: the parameter paths in it}: "network", each layer, each parameter by its path."""
    paths = list(paths)
    layers = dict.fromkeys(path.split("/")[0] for path in paths)
    found = {NETWORK: paths}
    found |= {layer: [path for path in paths if path.startswith(layer + "/")] for layer in layers}
    return found | {path: [path] for path in paths}


def summed(values: Mapping[str, np.ndarray], paths: Iterable[str]) -> np.ndarray:
    """The sum over parameters of numbers that add up over them, such as inner products."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sum([values[path] for path in paths], axis=0)


def inner(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The inner products rows @ others; what overflows is infinite, and is flagged where it is shown."""
    with np.errstate(over="ignore", invalid="ignore"):
        return rows @ others
