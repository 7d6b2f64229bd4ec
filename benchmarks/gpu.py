"""What gradlab costs on a graphics card, in one command and eight minutes: `python benchmarks/gpu.py`.

Every number is a ratio of times measured in turns in one run, or a time beside the one it is a ratio to. Sections, each
with its own share of the time: `products` (products of spikes in bfloat16 parts, against every precision that JAX
offers: time, and error against float64), `neurons` (one kernel for all time steps against XLA's scan), `w1` (one
gradient of three layers against its floor, the matrix products alone), `w2` (each rule's gradient over BPTT's),
`precision` (what every precision does to every rule's cosine to BPTT), `w3` (a loss surface), `w4` (training, one and
eight seeds).

The results are written to a JSON file after every section. A section that fails leaves its error there and the next
one runs; a case for which no time is left is recorded as skipped. `--toy` runs everything in tiny sizes on any machine,
`--sections w1 w2` some of it. It needs jax, flax, optax, numpy and jaxtyping; gradlab is imported from this repository.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from gpu_timing import Clock, OutOfTimeError

SHARES = {"products": 45, "neurons": 45, "w1": 200, "w2": 60, "precision": 45, "w3": 25, "w4": 40}
"""Seconds of each section, 460 in all."""


def memory() -> dict[str, int]:
    """Bytes on the device: in use now, and at most so far; empty where the device does not tell."""
    told = jax.local_devices()[0].memory_stats() or {}
    return {name: told[name] for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in told}


def run(names: Sequence[str], toy: bool, target: Path, minutes: float) -> dict[str, Any]:
    """Run the sections, writing the JSON file after each; returns what was written."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path += [] if root in sys.path else [root]  # gradlab need not be installed
    import gpu_sections

    device = jax.devices()[0]
    results: dict[str, Any] = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "toy": toy,
        "sections": {},
    }
    scale = minutes * 60 / sum(SHARES.values())
    for name in names:
        begin = time.monotonic()
        clock = Clock(SHARES[name] * scale, per_case=0.02 if toy else 2.0)
        try:
            found = gpu_sections.SECTIONS[name](clock, toy)
        except OutOfTimeError:
            found = {"skipped": "time"}
        except Exception:
            found = {"error": traceback.format_exc()[-4000:]}
        found["seconds"] = round(time.monotonic() - begin, 1)
        found["device_memory"] = memory()
        results["sections"][name] = found
        target.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"{name}: {found['seconds']} s", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--sections", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=sum(SHARES.values()) / 60, help="time of all sections")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the results go")
    options = parser.parse_args(arguments)
    return run(options.sections, options.toy, options.json, options.minutes)


if __name__ == "__main__":
    main()
