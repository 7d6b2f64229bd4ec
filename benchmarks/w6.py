"""W6, peak memory of one gradient against the number of steps T and the width N.

`temporary_MB`: temporary memory of the compiled program, as the compiler tells it. `added_MB`: by how much one call
raises the resident memory of a fresh process that gives every larger array back to the system; this is what the machine
must have beside the inputs. `over_bptt`: added memory over BPTT's at the same size.

Rules that carry influence matrices forwards are not run but predicted, from shapes, by the rule's own count
(`predicted_MB`). "16 MiB" is BPTT with that budget for its forward pass; "online" is OSTL with an update at every step,
whose memory must not depend on T.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import common
from benchmarks.common import Options, Row

BATCH = 32
LENGTHS, WIDTH = (100, 1000, 10_000), 128
WIDTHS, LENGTH = (128, 256, 512), 100
PROGRAMS = ("BPTT", "BPTT, autodiff", "BPTT, 16 MiB", "TBPTT", "OSTL", "OSTL, online")
PREDICTED = ("RTRL", "SnAp")


def function(program: str, net: Any, params: Any, data: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A program and its arguments, to be compiled."""
    import jax
    import optax

    import gradlab as gl
    from benchmarks import w1
    from gradlab.engine import shapes_of
    from gradlab.online import online_sequence

    key = jax.random.key(2)
    if program == "OSTL, online":
        rule, optimizer = gl.rules.OSTL(), optax.sgd(1e-3)
        state = rule.init(net, params, shapes_of(net, params, data, w1.LOSS))
        carry = {"params": params, "optimizer": optimizer.init(params), "rule": state}
        return lambda c, b: online_sequence(net, w1.LOSS, rule, optimizer, c, b, key), (carry, data)
    chosen = {
        "BPTT": gl.rules.BPTT(),
        "BPTT, autodiff": gl.rules.BPTT(form="autodiff"),
        "BPTT, 16 MiB": gl.rules.BPTT(memory="16MiB"),
        "TBPTT": gl.rules.TBPTT(),
        "OSTL": gl.rules.OSTL(),
    }[program]
    return lambda p, b: gl.gradients(net, p, b, w1.LOSS, [chosen], key), (params, data)


def case(width: int, steps: int, batch: int) -> tuple[Any, Any, Any]:
    """W1's network and a batch of another length; memory does not depend on how often layers fire."""
    import jax

    import gradlab as gl
    from benchmarks import w1

    net = gl.connect([m for _, units in w1.layer_sizes(width) for m in (w1.nn.Dense(units), gl.LIF(beta=0.9))])
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype("float32")
    data = gl.Batch(inputs, jax.nn.one_hot(jax.numpy.arange(batch) % w1.CLASSES, w1.CLASSES))
    return net, net.init(jax.random.key(1), inputs[:1]), data


def one(program: str, width: int, steps: int, batch: int) -> dict[str, float | None]:
    """In a fresh process: temporary and added memory of a program."""
    import jax

    call, arguments = function(program, *case(width, steps, batch))
    compiled = jax.jit(call).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    return {
        "temporary_MB": common.temporary_megabytes(compiled),
        "added_MB": common.added_memory(lambda: compiled(*arguments)),
    }


def predicted(width: int, steps: int, batch: int) -> dict[str, float]:
    """MB of the influence matrices that rules would carry."""
    import gradlab as gl
    from benchmarks import w1
    from gradlab.engine import shapes_of
    from gradlab.rules.influence import kept_bytes
    from gradlab.rules.rtrl import influence_cost

    net, params, data = case(width, min(steps, 2), batch)
    shapes = shapes_of(net, params, data, w1.LOSS)
    snap = gl.rules.SnAp()
    return {"RTRL": influence_cost(net, shapes)[0] / 1e6, snap.name: kept_bytes(snap, net, shapes, w1.LOSS) / 1e6}


def run(options: Options) -> list[Row]:
    """One row per size and program."""
    sizes = [(WIDTH, steps) for steps in LENGTHS] + [(width, LENGTH) for width in options.widths or WIDTHS[1:]]
    if options.quick:
        sizes = [(8, 12)]
    rows: list[Row] = []
    for width, steps in sizes:
        batch = 4 if options.quick else BATCH
        programs = PROGRAMS[::2] if options.quick else PROGRAMS
        environment = common.giving_back()
        found = {
            name: common.fresh("benchmarks.w6", name, *map(str, (width, steps, batch)), environment=environment)
            for name in programs
        }
        base = found["BPTT"]["added_MB"]
        for name, memory in found.items():
            # Toy sizes may fit into what the process has; then there is nothing to compare with.
            over = memory["added_MB"] / base if base and memory["added_MB"] is not None else None
            rows.append({"width": width, "steps": steps, "program": name, **memory, "over_bptt": over})
        for name, megabytes in predicted(width, steps, batch).items():
            rows.append({"width": width, "steps": steps, "program": name, "predicted_MB": megabytes})
    return rows


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], *map(int, sys.argv[2:5]))))
