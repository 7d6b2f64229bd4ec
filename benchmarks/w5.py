"""W5, what waiting costs: compile time and the first call, each in a fresh process without a cache on disk.

Columns: `import_s`, importing gradlab; `first_call_s`, the first call of the function that users call, which traces,
compiles and runs; `second_call_s`, the same again; `trace_s` and `compile_s`, the two parts of making the program,
taken in another process by `jax.jit(f).lower(...)` and `.compile()`; `over_scan`, the first call over that of the plain
scan over W1's steps in the same round.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import common
from benchmarks.common import Options, Row

BASE = "W1, plain scan"
PROGRAMS = (BASE, "W1, BPTT", "W1, ten rules", "landscape, 21 x 21 points")
WITHOUT_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def function(program: str, width: int, steps: int, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A program as (function, arguments)."""
    import jax

    import gradlab as gl
    from benchmarks import w1, w2

    # No search for living layers here: it would compile a part of what is measured.
    net = gl.connect([m for _, units in w1.layer_sizes(width) for m in (w1.nn.Dense(units), gl.LIF(beta=0.9))])
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype("float32")
    data = gl.Batch(inputs, jax.nn.one_hot(jax.numpy.arange(batch) % w1.CLASSES, w1.CLASSES))
    params = net.init(jax.random.key(1), inputs)
    if program == BASE:
        return jax.grad(lambda p: w1.scan_loss(net, p, data)), (params,)
    if program.startswith("landscape"):
        return landscape(net, data, width > 8), (params,)
    chosen = w2.TEN[: 10 if width > 8 else 2] if "ten" in program else w2.TEN[:1]
    return lambda p: gl.gradients(net, p, data, w1.LOSS, chosen, jax.random.key(2)), (params,)


def landscape(net: Any, data: Any, full: bool) -> Callable[[Any], Any]:
    """A random filter-normalised plane around the parameters, on the first 50 steps."""
    import jax

    import gradlab as gl
    from benchmarks import w1
    from gradlab.analysis.landscape import landscape as surface
    from gradlab.analysis.objective import loss_function

    loss = loss_function(net, gl.Batch(data.inputs[:50], data.targets), w1.LOSS)

    def call(params: Any) -> Any:
        plane = gl.analysis.random_plane(params, jax.random.key(5))
        path = jax.tree.map(lambda leaf: leaf[None], params)
        return surface(loss, plane, {"start": path}, points=21 if full else 3).loss

    return call


def one(program: str, mode: str, width: int, steps: int, batch: int) -> dict[str, float]:
    """In a fresh process: the seconds of the calls, or of tracing and compiling."""
    began = time.perf_counter()
    import jax

    import gradlab  # noqa: F401

    imported = time.perf_counter() - began
    call, arguments = function(program, width, steps, batch)
    if mode == "stages":
        begin = time.perf_counter()
        lowered = jax.jit(call).lower(*arguments)
        traced = time.perf_counter()
        lowered.compile()
        return {"trace_s": traced - begin, "compile_s": time.perf_counter() - traced}
    # Users write jax.jit around a gradient of their own; gradlab's functions compile by themselves.
    ready = jax.jit(call) if program == BASE else call
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(ready(*arguments))
        seconds.append(time.perf_counter() - begin)
    return {"import_s": imported, "first_call_s": seconds[0], "second_call_s": seconds[1]}


def run(options: Options) -> list[Row]:
    """One row per program; every round starts every program in a process of its own."""
    shape = (8, 12, 8) if options.quick else ((options.widths or (128,))[0], 500, 64)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(1 if options.quick else options.rounds or 3):
        for name, rounds in found.items():
            modes = ("calls",) if name.startswith("landscape") else ("calls", "stages")
            parts = [
                common.fresh("benchmarks.w5", name, mode, *map(str, shape), environment=WITHOUT_CACHE) for mode in modes
            ]
            rounds.append({key: value for part in parts for key, value in part.items()})
    return [row(name, rounds, found[BASE], shape[0]) for name, rounds in found.items()]


def row(name: str, rounds: list[dict[str, float]], base: list[dict[str, float]], width: int) -> Row:
    """Medians over rounds."""
    told: Row = {"width": width, "program": name}
    ratios = [own["first_call_s"] / other["first_call_s"] for own, other in zip(rounds, base, strict=True)]
    told["over_scan"] = statistics.median(ratios)
    for key in ("import_s", "first_call_s", "second_call_s", "trace_s", "compile_s"):
        values = [each[key] for each in rounds if key in each]
        told[key] = statistics.median(values) if values else None
    return told


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))))
