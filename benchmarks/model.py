"""The cost model of docs/performance.md, held against what the suite measured: `python benchmarks/model.py out.json`.

For Dense layers l of K_l inputs and N_l units, T steps, B samples, in float32:

    (1) multiply-adds of a gradient    M = T B (2 sum_l K_l N_l + sum_{l > 1} K_l N_l)
    (2) time                           t = M / rate + c T B sum_l N_l
    (3) kept memory                    m = 4 T B sum_l N_l

`rate` is that of the floor's products at the same size; c, the time of one neuron's step forwards and backwards, is
taken from the narrowest network and foretells the wider ones. (3) holds for BPTT and every deferred local rule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, w6
from benchmarks.w1 import layer_sizes

STEPS, BATCH = 500, 64


def neuron_steps(width: int, steps: int, batch: int) -> int:
    """T B sum_l N_l of W1's network."""
    return steps * batch * sum(units for _, units in layer_sizes(width))


def times(rows: Sequence[common.Row]) -> list[common.Row]:
    """(2) for W1's tape against its measured time over the floor."""
    tape = sorted((row for row in rows if row["program"] == "tape"), key=lambda row: row["width"])
    first = tape[0]
    above = (first["over_floor"] - 1) * first["floor_ms"]
    per_step = above / neuron_steps(first["width"], STEPS, BATCH)
    found = []
    for row in tape:
        multiply_adds = common.multiply_adds(layer_sizes(row["width"]), STEPS * BATCH)
        steps = neuron_steps(row["width"], STEPS, BATCH)
        found.append(
            {
                "width": row["width"],
                "billion_multiply_adds_per_s": multiply_adds / row["floor_ms"] / 1e6,
                "ns_per_neuron_step": 1e6 * (row["over_floor"] - 1) * row["floor_ms"] / steps,
                "predicted_over_floor": 1 + per_step * steps / row["floor_ms"],
                "measured_over_floor": row["over_floor"],
            }
        )
    return found


def memory(rows: Sequence[common.Row]) -> list[common.Row]:
    """(3) for W6's BPTT and OSTL against the temporary memory of the compiled programs."""
    return [
        {
            "width": row["width"],
            "steps": row["steps"],
            "program": row["program"],
            "predicted_MB": 4e-6 * neuron_steps(row["width"], row["steps"], w6.BATCH),
            "measured_MB": row["temporary_MB"],
        }
        for row in rows
        if row["program"] in ("BPTT", "OSTL")
    ]


def main(path: str) -> dict[str, Any]:
    """Print every part of the model that the file has numbers for."""
    workloads = json.loads(Path(path).read_text(encoding="utf-8"))["workloads"]
    parts = {name: part(workloads[name]) for name, part in (("w1", times), ("w6", memory)) if name in workloads}
    for name, rows in parts.items():
        print(f"{name}\n{common.table(rows)}\n")
    return parts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the JSON file of `python benchmarks/suite.py w1 w6 --json FILE`")
    main(sys.argv[1])
