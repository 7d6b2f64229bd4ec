"""BPTT in less memory: the forward pass is kept at a few steps only, and run again between them (checkpointing)."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab import plan
from gradlab.network import Network, NetworkState, Params
from gradlab.rules.base import Shapes
from gradlab.rules.sweep import sweep
from gradlab.tape import Slices, Tape, delayed_outputs

_DEEPEST = 5
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What BPTT keeps of a forward pass of T steps, with R bytes per recorded step and S bytes per state.

    (1) everything                            T R                         no step is run again
    (2) the state at every chunk of c steps   (T / c) S + c R             every step is run once again
    (3) the state at every `segments[0]`-th step, inside such a segment at every `segments[1]`-th, ..., inside the last
        one everything                        sum of states + segments[-1] R    every step is run len(segments) + 1
                                                                          times again

    (3) is the binomial schedule with equal parts on every level; with one level its least memory is 2 sqrt(T R S).

    Attributes:
        kept_bytes: predicted bytes of the forward pass that are kept at once. Not counted: inputs, outputs and errors,
            the working memory of one chunk, and with (3) the inputs of one segment. So (3) helps where states are wide
            and inputs narrow; where inputs are as wide as layers, (2) may need less.
        runs_again: how many times the forward pass is run in addition to the first.
        segments: steps per segment, from the outermost to the innermost level; () for (1).
    """

    kept_bytes: int
    runs_again: int
    segments: tuple[int, ...] = ()


def schedule(shapes: Shapes, limit: int | None) -> Schedule | None:
    """The cheapest schedule whose kept bytes are at most `limit`; None when there is none."""
    return next((found for found in _schedules(shapes) if limit is None or found.kept_bytes <= limit), None)


def least_bytes(shapes: Shapes) -> int:
    """The least that any schedule keeps."""
    return min(found.kept_bytes for found in _schedules(shapes))


def _schedules(shapes: Shapes) -> list[Schedule]:
    """Schedules in the order of their cost; of each depth (3) that with the longest innermost segments first."""
    n_steps, record, state = shapes.n_steps, record_bytes(shapes), state_bytes(shapes)
    chunk = plan.chunk_size(n_steps, max(map(math.prod, shapes.units)) * shapes.batch_size * shapes.dtype.itemsize)
    found = [Schedule(n_steps * record, 0)]
    if chunk < n_steps:
        found.append(Schedule(-(-n_steps // chunk) * state + chunk * record, 1, (chunk,)))
    for depth in range(1, _DEEPEST + 1):
        for parts in range(2, n_steps + 1):
            segments = _segments(n_steps, parts, depth)
            if len(set(segments)) < depth:
                break
            found.append(Schedule(_kept(n_steps, segments, record, state), depth + 1, segments))
    return found


def _segments(n_steps: int, parts: int, depth: int) -> tuple[int, ...]:
    """Segments of each level when every one is cut into so many parts."""
    segments, size = [], n_steps
    for _ in range(depth):
        size = -(-size // parts)
        segments.append(size)
    return tuple(segments)


def _kept(n_steps: int, segments: tuple[int, ...], record: int, state: int) -> int:
    outer = (n_steps, *segments)
    states = sum(-(-whole // part) for whole, part in zip(outer, segments, strict=False))
    return states * state + segments[-1] * record


def record_bytes(shapes: Shapes) -> int:
    """R: what the tape keeps of one step for BPTT, as `LayerRecord` says."""
    kept = [layer.point or (layer.state, layer.current, layer.output) for layer in shapes.slices.layers]
    return _bytes((kept, shapes.slices.delayed))


def state_bytes(shapes: Shapes) -> int:
    """S: the network's state."""
    return _bytes(([layer.state for layer in shapes.slices.layers], shapes.slices.delayed))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_of(rule: str, memory: Any) -> int | None:
    """A budget such as "1GiB", "500 MB" or a number of bytes; None stays None.

    Raises:
        ValueError: what is none of these.
    """
    if memory is None:
        return None
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?i?B)\s*", memory) if isinstance(memory, str) else None
    if match is None or match[2] not in _UNITS or match[1].count(".") > 1 or not float(match[1]) > 0:
        raise ValueError(f'{rule}(memory={memory!r}): give a size such as "1GiB" or "500MB", or a number of bytes')
    return int(float(match[1]) * _UNITS[match[2]])


def backward(net: Network, params: Params, tape: Tape, chosen: Schedule) -> Params:
    """The gradient of a tape of which nothing is read but the inputs, the errors and, for (2), the chunks' first
    states; what else it recorded is then never kept.
    """
    rows, cotangent = (tape.slices.inputs, tape.slices.error), jax.tree.map(jnp.zeros_like, tape.end)
    if chosen.runs_again == 1 and chosen.segments == (tape.chunk,):
        return _over(net, params, rows, tape.chunk_starts, cotangent, chosen.segments)[0]
    # Not the first of the chunks' states: reading one would keep them all.
    first = net.initial_state(params, tape.slices.inputs) if tape.part is None else tape.part.start
    return _segmented(net, params, rows, first, cotangent, chosen.segments)[0]


def _segmented(
    net: Network, params: Params, rows: Any, start: NetworkState, cotangent: NetworkState, segments: tuple[int, ...]
) -> tuple[Params, NetworkState]:
    """The gradient over rows (inputs, errors) from a state on, and the error on that state."""
    inputs, error = rows
    if not segments:
        _, layers = plan.run(net, params, inputs, start)
        empty = jnp.zeros((inputs.shape[0], 0), error.dtype)  # targets and weights are in the errors
        slices = Slices(inputs, layers, delayed_outputs(start, layers), error, empty, empty)
        return sweep(net, params, slices, cotangent)
    n_segments = inputs.shape[0] // segments[0]

    def ahead(state: NetworkState, number: Array) -> tuple[NetworkState, NetworkState]:
        return plan.run(net, params, _part(inputs, number, segments[0]), state)[0], state

    last, starts = jax.lax.scan(ahead, start, jnp.arange(n_segments))
    if n_segments * segments[0] < inputs.shape[0]:
        starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), starts, last)
    return _over(net, params, rows, starts, cotangent, segments)


def _over(
    net: Network, params: Params, rows: Any, starts: NetworkState, cotangent: NetworkState, segments: tuple[int, ...]
) -> tuple[Params, NetworkState]:
    """Segment by segment backwards, each from its own first state; the last one may be shorter."""
    size, n_steps = segments[0], rows[0].shape[0]
    n_whole = n_steps // size

    def segment(carry: Any, now: Any) -> tuple[Any, None]:
        grads, held = carry
        start, number = now
        part = jax.tree.map(lambda leaf: _part(leaf, number, size), rows)
        update, held = _segmented(net, params, part, start, held, segments[1:])
        return (jax.tree.map(jnp.add, grads, update), held), None

    carry = (jax.tree.map(jnp.zeros_like, params), cotangent)
    if n_whole * size < n_steps:
        tail = jax.tree.map(lambda leaf: leaf[n_whole * size :], rows)
        last = jax.tree.map(lambda leaf: leaf[n_whole], starts)
        carry = _segmented(net, params, tail, last, cotangent, segments[1:])
    firsts = jax.tree.map(lambda leaf: leaf[:n_whole], starts)
    carry, _ = jax.lax.scan(segment, carry, (firsts, jnp.arange(n_whole)), reverse=True)
    return carry


def _part(values: Array, number: Array, size: int) -> Array:
    """A segment of a sequence, taken when it is needed: cut up beforehand, the whole sequence would be copied."""
    return jax.lax.dynamic_slice_in_dim(values, number * size, size)
