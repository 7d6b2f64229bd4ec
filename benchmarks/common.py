"""What all benchmarks share: interleaved timing, the floor of matrix products, memory, tables and the machine.

A workload is a module with `run(options) -> list of flat rows`; `benchmarks/suite.py` runs, prints and stores them.
Every number that matters is a ratio of two times taken in the same round, and what is told is the median over rounds:
whatever else the machine does slows both. Absolute times are there to know the order of magnitude.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

Action = Callable[[], Any]
Row = dict[str, Any]
Sizes = Sequence[tuple[int, int]]

ROOT = Path(__file__).resolve().parent.parent
SETTLING = 0.3  # seconds: the thread that ran a program frees its memory a little after the result is there
# glibc gives arrays above 32 MiB back to the system and takes fresh pages at the next call, which costs about as much
# as the products at these sizes. With these settings it keeps them.
KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "100000000",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a workload is asked for; None leaves the choice to the workload.

    Attributes:
        quick: toy sizes and few rounds: the programs run, the numbers mean nothing.
        widths: hidden units per layer.
        rounds: timed rounds.
        every: also programs that the workload leaves out because they take long.
    """

    quick: bool = False
    widths: tuple[int, ...] | None = None
    rounds: int | None = None
    every: bool = False

    def widths_or(self, usual: Sequence[int]) -> tuple[int, ...]:
        return self.widths or ((8,) if self.quick else tuple(usual))

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (2 if self.quick else usual)


def interleaved(actions: Mapping[str, Action], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of every action in every round; all actions run once in every round, after `warm` untimed rounds."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + warm):
        for name, action in actions.items():
            begin = time.perf_counter()
            jax.block_until_ready(action())
            if number >= warm:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str, less: str | None = None) -> float:
    """(1) median over rounds of (time of `name` - time of `less`) / time of `base`, all of the same round."""
    rest = times[less] if less else [0.0] * len(times[name])
    rounds = zip(times[name], rest, times[base], strict=True)
    return statistics.median((own - other) / base_time for own, other, base_time in rounds)


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def multiply_adds(sizes: Sizes, rows: int) -> int:
    """Multiply-adds of forward and backward products of Dense layers of these (inputs, outputs), `rows` at once.

    (2) rows (2 sum_l in_l out_l + sum_{l > 1} in_l out_l): no error is handed down to the data.
    """
    products = [a * b for a, b in sizes]
    return rows * (2 * sum(products) + sum(products[1:]))


def floor(sizes: Sizes, rows: int, repeats: int = 1) -> Action:
    """The products of (2) alone, compiled, `repeats` times one after the other: no program that needs them is faster.

    `rows` is steps x batch: each product takes all steps and samples at once, the best case.
    """
    keys = iter(jax.random.split(jax.random.key(2), 3 * len(sizes)))
    inputs = [jax.random.normal(next(keys), (rows, a)) for a, _ in sizes]
    weights = [jax.random.normal(next(keys), size) for size in sizes]
    errors = [jax.random.normal(next(keys), (rows, b)) for _, b in sizes]
    compiled = jax.jit(products).lower(inputs, weights, errors).compile()

    def action() -> Any:
        # Waiting each time keeps the program from filling the memory with results that nobody reads.
        return [jax.block_until_ready(compiled(inputs, weights, errors)) for _ in range(repeats)][-1]

    return action


def products(inputs: Any, weights: Any, errors: Any) -> Any:
    """Forward, back through all layers but the first, and the weights' gradients."""
    forward = [jax.lax.dot(x, w) for x, w in zip(inputs, weights, strict=True)]
    back = [jax.lax.dot(e, w.T) for e, w in zip(errors[1:], weights[1:], strict=True)]
    gradients = [jax.lax.dot(x.T, e) for x, e in zip(inputs, errors, strict=True)]
    return forward, back, gradients


def temporary_megabytes(compiled: Any) -> float | None:
    """Temporary memory of a compiled program in MB; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 1e6


def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB on Linux: "VmRSS" now, "VmHWM" its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def added_memory(action: Action) -> float | None:
    """MB by which the peak resident memory during a call exceeds the memory before; None where there is no /proc.

    The call runs once before, because the first one loads code; start the process with `giving_back()`, so that nothing
    of that first call is still there to be used again.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    jax.block_until_ready(action())
    time.sleep(SETTLING)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak to the present size
    before = resident()
    jax.block_until_ready(action())
    return resident("VmHWM") - before


def fresh(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run `python -m module arguments` in a process of its own; the JSON of its last line.

    Raises:
        RuntimeError: the process failed; its last lines are in the message.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def giving_back() -> dict[str, str]:
    """An environment in which every array of 16 kB or more goes back to the system, whatever this process does."""
    return {
        "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_MMAP_MAX_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
    }


def allocator() -> str:
    """ "kept" when large arrays stay with the process between calls, "system" when they are given back."""
    return "kept" if all(os.environ.get(name) == value for name, value in KEPT.items()) else "system"


def use_allocator(wanted: str) -> None:
    """Start this program again with the wanted setting ("kept" or "system"), which is read when a process starts.

    Only glibc knows these variables; elsewhere both settings are the same and nothing happens.
    """
    if platform.system() != "Linux" or allocator() == wanted:
        return
    rest = {name: value for name, value in os.environ.items() if name not in KEPT}
    os.execve(sys.executable, sys.orig_argv, rest | (KEPT if wanted == "kept" else {}))


def use_cores(count: int | None) -> None:
    """Keep this program and what it starts on so many cores (Linux); before JAX starts its threads.

    On a machine that does other work, programs with two threads wait for the slower one: with one core all programs
    suffer alike.
    """
    if count is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def use_devices(count: int | None) -> None:
    """Let JAX see a processor as so many devices; before JAX first looks for them."""
    if count is not None:
        flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}"]
        os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


def load() -> float | None:
    """Processes that wanted to run in the last minute: what else the machine does. None where it does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine() -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        **packages,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "allocator": allocator(),
        "load": load(),
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one column per key in order of first appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    wide = [max(len(line[i]) for line in cells) for i in range(len(names))]
    text = [[isinstance(row.get(name), str) for row in rows] for name in names]

    def line(values: Sequence[str]) -> str:
        sides = (v.ljust(w) if any(t) else v.rjust(w) for v, w, t in zip(values, wide, text, strict=True))
        return "  ".join(sides).rstrip()

    return "\n".join(map(line, cells))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return str(value)
