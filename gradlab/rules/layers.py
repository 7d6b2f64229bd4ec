"""One layer of the adjoint sweep: memory and trace backwards through a chunk, for all jobs of the layer at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.network import INPUT, Link, Network, Params
from gradlab.rules import filters
from gradlab.rules.own_links import fixed_diagonal, own_diagonal, own_link
from gradlab.rules.running import Job, Running, mean_places
from gradlab.rules.signals import Term
from gradlab.rules.traces import Unit
from gradlab.tape import Slices, jacobians

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule

Terms = dict[int, list[Term]]


class LayerCarry(NamedTuple):
    """What a job's backward filters hand to the chunk before: per term the memory's state, the trace's, and
    delta_{t+1}.
    """

    memory: tuple[Any, ...]
    trace: Any
    delta: Array | None


class Found(NamedTuple):
    """A layer's share of a chunk: per job its carry, delta_t, delta_t of untraced biases, cotangents of trained
    constants; per way q_t.
    """

    carries: tuple[LayerCarry, ...]
    deltas: tuple[Array | None, ...]
    untraced: tuple[Array | None, ...]
    cotangents: tuple[Any, ...]
    handed_down: dict[int, Array]


def at_rest(net: Network, params: Params, layer: int, slices: Slices, job: Job) -> LayerCarry:
    """The carry after the last step."""
    local, record = job.local, slices.layers[layer]
    like = jnp.zeros_like(record.output[0])
    memories = []
    for target in local.term_targets(net, layer):
        kernel = local.memory_filter(net, params, layer, target)
        shape_of = like if kernel is None or kernel.shared else jnp.zeros_like(slices.layers[target].output[0])
        memories.append(() if kernel is None else filters.zeros(kernel, shape_of))
    own = local.own_filter(net, params, layer)
    follows = own_link(net, layer, local.trace.own) is not None
    return LayerCarry(tuple(memories), local.trace.zeros(own, len(record.state), like), like if follows else None)


def backwards(
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    jobs: Sequence[Job],
    carries: tuple[LayerCarry, ...],
    terms: Terms,
    forwards: Running,
    through: dict[int, int],
) -> Found:
    """Memory and trace of every job, backwards through a chunk; `through` as in `Assignment`.

    The neuron is linearised inside the loop over time, because its Jacobians would not stay in the processor's cache.
    """
    active = [j for j, job in enumerate(jobs) if terms[job.way]]
    hears = {way: [term.pull(term.error) for term in found] for way, found in terms.items() if found}
    prepared = {j: _prepare(net, params, layer, jobs[j], carries[j], terms[jobs[j].way]) for j in active}
    start = {j: (prepared[j].memory, carries[j].trace, carries[j].delta) for j in active}
    down = _hands_down(net, layer, jobs, active, through)
    after: dict[int, Any] = {}
    found: tuple[dict[Any, Any], ...] = ({}, {}, {}, {})  # deltas, deltas of untraced biases, cotangents, q
    places = mean_places(net, layer, jobs)
    for group in _groups(start):
        step = _step(net, params, layer, slices, {j: (jobs[j], prepared[j]) for j in group}, down, through, places)
        heard = {jobs[j].way: hears[jobs[j].way] for j in group}
        own = {j: (prepared[j].filtered, forwards.posts[j]) for j in group}
        rows, begin = (slices.layers[layer], heard, forwards.means, own), {j: start[j] for j in group}
        if jax.tree.leaves(begin):
            end, made = jax.lax.scan(step, begin, rows, reverse=True)
        else:
            end, made = step(begin, rows)  # nothing is carried: all steps at once
        after |= end
        for whole, part in zip(found, made, strict=True):
            whole |= part
    deltas, bare, cotangents, q = found
    count = range(len(jobs))
    return Found(
        tuple(LayerCarry(*after[j]) if j in after else carries[j] for j in count),
        tuple(deltas.get(j) for j in count),
        tuple(bare.get(j) for j in count),
        tuple(cotangents.get(j) for j in count),
        q,
    )


def _groups(start: dict[int, Any]) -> list[list[int]]:
    """Jobs that need no loop over time, and those that share one."""
    idle = [j for j, held in start.items() if not jax.tree.leaves(held)]
    busy = [j for j in start if j not in idle]
    return [group for group in (idle, busy) if group]


class Prepared(NamedTuple):
    """A job before its loop over time: per term its kernel, its signal if that was filtered already, and the memory's
    state.
    """

    kernels: tuple[Any, ...]
    filtered: dict[int, Array]
    memory: tuple[Any, ...]


def _prepare(net: Network, params: Params, layer: int, job: Job, carry: LayerCarry, terms: Sequence[Term]) -> Prepared:
    kernels, filtered, held = [], {}, []
    for index, (term, state) in enumerate(zip(terms, carry.memory, strict=True)):
        kernel = job.local.memory_filter(net, params, layer, term.target)
        if kernel is not None and not kernel.shared:
            # One leak per target unit: the filter must act before the connection's transpose mixes the units.
            state, error = jax.lax.scan(partial(filters.transpose, kernel), state, term.error, reverse=True)
            kernel, filtered[index] = None, term.pull(error)
        kernels.append(kernel)
        held.append(state)
    return Prepared(tuple(kernels), filtered, tuple(held))


def _step(
    net: Network,
    params: Params,
    layer: int,
    slices: Slices,
    group: dict[int, tuple[Job, Prepared]],
    down: dict[int, int],
    through: dict[int, int],
    places: Sequence[int | None],
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One step backwards of a few jobs: (carried, row) -> (carried, (deltas, of untraced biases, cotangents, q))."""
    units = slices.layers[layer].output.shape[2:]
    back = {j: _job_step(net, params, layer, units, job, prepared) for j, (job, prepared) in group.items()}
    cuts = {job.local.trace.cut for job, _ in group.values()}
    trained = "neuron" in params[f"layer_{layer}"]

    def step(held: Any, now: Any) -> tuple[Any, Any]:
        record, heard, means, own = now
        jacs = {cut: jacobians(net, params, layer, record, cut) for cut in cuts}
        mean = {j: None if places[j] is None else means[places[j]] for j in group}
        found = {j: back[j](held[j], record, jacs, heard, mean[j], *own[j]) for j in group}
        q = {
            way: found[j][1] if way in through else _handed(group[j][0].local, jacs, mean[j], heard[way])
            for way, j in down.items()
            if j in group
        }
        kept = {j: cotangents if trained else None for j, (_, _, _, cotangents) in found.items()}
        deltas, bare = ({j: f[i] for j, f in found.items()} for i in (1, 2))
        return {j: f[0] for j, f in found.items()}, (deltas, bare, kept, q)

    return step


def _job_step(
    net: Network, params: Params, layer: int, units: tuple[int, ...], job: Job, prepared: Prepared
) -> Callable[..., Any]:
    """One step backwards of one job: -> (carried, delta, delta of an untraced bias, (cotangent of h_t, mu_t))."""
    local = job.local
    own, link = local.own_filter(net, params, layer), own_link(net, layer, local.trace.own)
    fixed = None if link is None or local.trace.own == "full" else fixed_diagonal(net, params, link, units)

    def back(held, record, jacs, heard, mean, filtered, posts):
        states, p, delta_after = held
        signals = [filtered.get(i, signal) for i, signal in enumerate(heard[job.way])]
        weighted = [signal * mean for signal in signals] if local.trace.slope == "leaky_mean" else signals
        states, mu = _remember(prepared.kernels, states, weighted)
        if link is not None:
            mu = mu + _returned(net, params, link, record.output, delta_after, local.trace.own, fixed)
        jac = jacs[local.trace.cut]
        p, delta, cotangent = local.trace.transpose(Unit(jac, own, mean, posts), p, mu)
        bare = _slope(local, jac, mean) * sum(signals[1:], signals[0]) if local.trace.bias == "untraced" else None
        return (states, p, None if link is None else delta), delta, bare, (cotangent, mu)

    return back


def _returned(net: Network, params: Params, link: Link, x: Array, delta: Array, own: str, fixed: Array | None) -> Array:
    """R^T delta_{t+1}, or diag(R) delta_{t+1}: the error that the layer's link to itself brings back."""
    if own == "full":
        return net.input_cotangent(params, link, x, delta, lead=1)
    return (own_diagonal(net, params, link, x) if fixed is None else fixed) * delta


def _remember(kernels: Sequence[Any], states: Any, signals: list[Array]) -> tuple[tuple[Any, ...], Array]:
    """mu_t: every term through its memory, one step backwards, and their sum."""
    after, passed = [], []
    for kernel, state, signal in zip(kernels, states, signals, strict=True):
        if kernel is not None:
            state, signal = filters.transpose(kernel, state, signal)
        after.append(state)
        passed.append(signal)
    return tuple(after), sum(passed[1:], passed[0])


def _hands_down(
    net: Network, layer: int, jobs: Sequence[Job], active: Sequence[int], through: dict[int, int]
) -> dict[int, int]:
    """Way -> a job that knows its slope, for the ways on which this layer hands its error to a layer below; the job
    whose delta is handed down, for those in `through`.
    """
    if not any(link.source != INPUT and not link.delay for link in net.links_into(layer)):
        return {}
    found: dict[int, int] = {}
    for j in active:
        found.setdefault(jobs[j].way, through.get(jobs[j].way, j))
    return found


def _slope(local: LocalRule, jac: Any, mean: Any) -> Any:
    """The slope that multiplies the signal of an untraced bias."""
    return jac.D if local.trace.slope == "instant" else mean


def _handed(local: LocalRule, jacs: Any, mean: Array | None, signals: Sequence[Array]) -> Array:
    """q_t = slope_t L_t."""
    slope = jacs[local.trace.cut].D if mean is None or local.signal.slope == "instant" else mean
    return slope * sum(signals[1:], signals[0])
