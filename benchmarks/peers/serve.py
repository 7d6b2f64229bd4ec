"""What runs inside a peer's process: read the case, build the program, then run it once for every line on stdin.

Needs NumPy and nothing of gradlab, so that it works in the environment of any peer. A peer is a module with

    build(case, variant) -> Program

and ends with `serve(build)`. The driver (`benchmarks/peers/run.py`) starts it as

    python -m benchmarks.peers.NAME CASE.npz VARIANT time|memory
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """The workload: input spikes [time, batch, units], labels [batch], and the layers' weights and biases.

    Attributes:
        kernels: [inputs, outputs] each.
        reference: the gradient of `kernels` by backpropagation through time, as gradlab computes it.
    """

    inputs: np.ndarray
    labels: np.ndarray
    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    reference: tuple[np.ndarray, ...]
    beta: float
    slope: float

    @classmethod
    def load(cls, path: str) -> Case:
        with np.load(path) as stored:
            layers = range(int(stored["layers"]))

            def each(name: str) -> tuple[np.ndarray, ...]:
                return tuple(stored[f"{name}_{layer}"] for layer in layers)

            constants = float(stored["beta"]), float(stored["slope"])
            arrays = each("kernel"), each("bias"), each("reference")
            return cls(stored["inputs"], stored["labels"], *arrays, *constants)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [kernel.shape for kernel in self.kernels]

    @property
    def rows(self) -> int:
        return self.inputs.shape[0] * self.inputs.shape[1]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a peer built.

    Attributes:
        run: does the work once and waits for its end.
        version: of the peer.
        look: () -> (firing rate of every layer, gradient of every kernel [inputs, outputs]); None for the floor.
        note: how it differs from the case, if it does.
    """

    run: Callable[[], Any]
    version: str
    look: Callable[[], tuple[Sequence[float], Sequence[Any]]] | None = None
    note: str = ""


def status(field: str) -> float:
    """A line of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def added_memory(program: Program) -> float | None:
    """MB that one call adds to the resident memory; None on systems without /proc.

    The call runs once before, because the first one loads code and perhaps compiles; the driver starts the process so
    that nothing of that first call is still there to be used again.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    program.run()
    time.sleep(0.3)  # a thread that ran the program may free its memory a little after the result is there
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak to the present size
    before = status("VmRSS")
    program.run()
    return status("VmHWM") - before


def facts(program: Program, case: Case) -> dict[str, Any]:
    """Version, note, and how like the case the work is: rates, and the cosine of all kernels' gradient to BPTT's."""
    told: dict[str, Any] = {"version": program.version, "note": program.note}
    if program.look is not None:
        rates, grads = program.look()
        ours = np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in case.reference])
        theirs = np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in grads])
        told["rates"] = [float(rate) for rate in rates]
        told["cosine"] = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
        told["norm_ratio"] = float(np.linalg.norm(theirs) / np.linalg.norm(ours))
    return told


def serve(build: Callable[[Case, str], Program]) -> None:
    """Answer the driver: one line of JSON about the program, then the seconds of one run per line read."""
    path, variant, mode = sys.argv[1:4]
    case = Case.load(path)
    program = build(case, variant)
    if mode == "memory":
        print(json.dumps({"added_MB": added_memory(program)}), flush=True)
        return
    print(json.dumps(facts(program, case)), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        program.run()
        print(time.perf_counter() - begin, flush=True)
