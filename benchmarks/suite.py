"""Run the benchmarks: `python benchmarks/suite.py w1 w2 --json numbers.json`, or all of them without a name.

Each workload is a module of this folder with `run(options)`. It prints one table, and the JSON file is written again
after each workload, so that a run which is stopped keeps what it has. Numbers are ratios of times taken in turn,
medians over rounds (`benchmarks/common.py`). The first line and the file tell the versions, the machine, and whether
the allocator keeps memory between calls.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

WORKLOADS = {
    "w1": "one gradient against the time of its matrix products",
    "w2": "the deferred gradient of every rule",
    "w3": "a loss landscape",
    "w4": "training throughput",
    "w5": "compile time and first call",
    "w6": "peak memory",
}


def measure(name: str, options: common.Options) -> list[common.Row]:
    """The rows of one workload.

    Raises:
        ValueError: there is no such workload in this copy.
    """
    if name not in WORKLOADS or importlib.util.find_spec(f"benchmarks.{name}") is None:
        there = [known for known in WORKLOADS if importlib.util.find_spec(f"benchmarks.{known}")]
        raise ValueError(f"no workload {name!r} here; there are {there}")
    return importlib.import_module(f"benchmarks.{name}").run(options)


def suite(names: Sequence[str], options: common.Options, path: Path | None = None) -> dict[str, Any]:
    """Run workloads, print their tables; the result as it is stored in `path`."""
    result: dict[str, Any] = {"machine": common.machine(), "quick": options.quick, "workloads": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), flush=True)
    for name in names:
        begin, load = time.perf_counter(), common.load()
        rows = measure(name, options)
        result["workloads"][name] = rows
        head = f"{name}: {WORKLOADS[name]} ({time.perf_counter() - begin:.0f} s, load before {load})"
        print(f"\n{head}\n{common.table(rows)}", flush=True)
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--quick", action="store_true", help="toy sizes: do the programs run?")
    parser.add_argument("--widths", type=int, nargs="+", help="hidden units per layer")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--all", action="store_true", help="also what takes long")
    parser.add_argument("--cores", type=int, help="keep to so many cores (Linux); 1 where other work runs beside")
    parser.add_argument(
        "--devices", type=int, help="let JAX see so many devices in the processor (w1 spreads over them)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument(
        "--allocator",
        choices=("kept", "system"),
        default="kept",
        help="kept: large arrays stay with the process between calls (Linux); system: they are given back",
    )
    given = parser.parse_args(arguments)
    unknown = [name for name in given.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown}; there are {list(WORKLOADS)}")
    common.use_allocator(given.allocator)
    common.use_cores(given.cores)
    common.use_devices(given.devices)
    there = [name for name in WORKLOADS if importlib.util.find_spec(f"benchmarks.{name}")]
    widths = tuple(given.widths) if given.widths else None
    options = common.Options(given.quick, widths, given.rounds, given.all)
    suite(given.workloads or there, options, given.json)


if __name__ == "__main__":
    main()
