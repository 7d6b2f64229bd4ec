"""The adjoint form of composed rules: their deferred gradients, computed backwards in time, exactly, many at once.

Data flow of one chunk of steps, layers from last to first:

    terms of the signal -> (memory, backwards) -> mu_t -> (trace, backwards) -> delta_t -> connection's VJP -> gradient
                       \\-> slope_t L_t = q_t -> connection's VJP with respect to its input -> signal of the layer below

One matrix product per layer, chunk and direction; memory per neuron, never per synapse. Rules that hear the same signal
share it (a `way`), rules that also agree on trace and memory in a layer share their delta there (a `Job`), and the
weight gradients of all jobs of a layer are one stacked product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab import plan
from gradlab.losses import Loss
from gradlab.network import Network, Params
from gradlab.rules import layers
from gradlab.rules.layers import LayerCarry
from gradlab.rules.products import parameter_gradients
from gradlab.rules.running import Job, running
from gradlab.rules.signals import Sweep, Term
from gradlab.tape import Slices, Tape, jacobians, replayed

__all__ = ["Learner", "gradients", "layer_terms", "readout_error", "total"]

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule


class Learner(NamedTuple):
    """One rule of a joint sweep, with its feedback weights and the key of its noise."""

    rule: LocalRule
    feedback: Any
    key: Array


class Assignment(NamedTuple):
    """Who shares what: per rule its way, per layer the jobs, per layer and rule the job, and per layer the job whose
    delta a way hands down, for ways that go through time.
    """

    ways: tuple[int, ...]
    jobs: tuple[tuple[Job, ...], ...]
    job_of: tuple[tuple[int, ...], ...]
    through: tuple[dict[int, int], ...]


def gradients(
    learners: Sequence[Learner], net: Network, params: Params, tape: Tape, by_step: bool = False
) -> list[Params]:
    """The deferred gradients of composed rules over the whole tape, in their order.

    With `by_step` they are split by the step at which the weights acted: leaves [time, ...], whose sum over time is the
    gradient.
    """
    shared = assign([learner.rule for learner in learners], net)
    views = {way: _view(learners[way], net, params, tape) for way in set(shared.ways)}
    forwards = tuple(running(net, params, k, tape.slices, jobs) for k, jobs in enumerate(shared.jobs))

    def chunk(carry: Any, now: Any) -> tuple[Any, None]:
        grads, held = carry
        updates, held = _chunk(learners, shared, net, params, tape.loss, held, *now)
        if by_step:
            return (grads, held), jax.tree.map(lambda leaf: leaf[None], updates)
        return (jax.tree.map(jnp.add, grads, updates), held), None

    start = tuple(
        tuple(layers.at_rest(net, params, k, tape.slices, job) for job in jobs) for k, jobs in enumerate(shared.jobs)
    )
    zero = [] if by_step else [jax.tree.map(jnp.zeros_like, params) for _ in learners]
    size = 1 if by_step else plan.chunk_of(tape.slices.layers)
    rows = (tape.slices, views, forwards)
    (grads, _), steps = plan.scan_chunks(chunk, (zero, start), rows, size, reverse=True)
    return steps if by_step else grads


def assign(rules: Sequence[LocalRule], net: Network) -> Assignment:
    """Find what the rules share. A way is named by the first rule that takes it."""
    keys = [rule.way(position) for position, rule in enumerate(rules)]
    ways = tuple(keys.index(key) for key in keys)
    jobs, job_of, through = [], [], []
    for layer in range(len(net.neurons)):
        found: dict[Any, Job] = {}
        chosen = [_job(found, rule.at(net, layer), way) for rule, way in zip(rules, ways, strict=True)]
        # What a way hands down through time is the delta of a job of its own.
        down = {way: rules[way].hands_down(net, layer) for way in dict.fromkeys(ways)}
        through.append({way: _job(found, local, way) for way, local in down.items() if local is not None})
        jobs.append(tuple(found.values()))
        job_of.append(tuple(chosen))
    return Assignment(ways, tuple(jobs), tuple(job_of), tuple(through))


def _job(found: dict[Any, Job], local: LocalRule, way: int) -> int:
    """The place of a layer's job among those found, where it is put if it is new."""
    # The way's first rule stands for its slope; the others differ at most in the mean that they do not use.
    name = (local.trace, local.memory, local.signal.slope, way)
    found.setdefault(name, Job(local, way))
    return list(found).index(name)


def _view(learner: Learner, net: Network, params: Params, tape: Tape) -> tuple[Array, Array] | None:
    """The error and the weight of every step as the rule sees them; None: as they are on the tape."""
    rule = learner.rule
    mask = rule.gate.mask(tape.n_steps, learner.key)
    plain = rule.prediction.filter(net, params, tape.slices.error.dtype) is None
    if plain and mask is None:
        return None
    error, weight = rule.prediction.errors(net, params, tape), tape.slices.weight
    if mask is None:
        return error, weight
    return gated(error, mask), gated(weight, mask)


def gated(values: Array, mask: Array) -> Array:
    """Values where the mask is true, zero elsewhere; the mask has values' leading axes."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, 0.0)


def _chunk(
    learners: Sequence[Learner],
    shared: Assignment,
    net: Network,
    params: Params,
    loss: Loss,
    carries: Any,
    slices: Slices,
    views: dict[int, Any],
    forwards: Any,
) -> tuple[list[Params], Any]:
    slices = replayed(net, params, slices)
    grads: list[Any] = [jax.tree.map(jnp.zeros_like, params) for _ in learners]
    after = list(carries)
    sweeps = {way: _sweep(net, params, loss, slices, view) for way, view in views.items()}
    for layer in reversed(range(len(net.neurons))):
        terms = {
            way: layer_terms(learners[way].rule, net, params, layer, learners[way].feedback, sweep)
            for way, sweep in sweeps.items()
        }
        if not any(terms.values()):
            continue
        carried: tuple[LayerCarry, ...] = carries[layer]
        jobs, through = shared.jobs[layer], shared.through[layer]
        found = layers.backwards(net, params, layer, slices, jobs, carried, terms, forwards[layer], through)
        after[layer] = found.carries
        for way, q in found.handed_down.items():
            sweeps[way].handed_down[layer] = q
            if layer == net.last and way in through:
                sweeps[way] = sweeps[way]._replace(readout_error=q)
        updates = parameter_gradients(net, params, layer, slices, shared.jobs[layer], found, forwards[layer])
        for grad, job in zip(grads, shared.job_of[layer], strict=True):
            grad[f"layer_{layer}"] = {**grad[f"layer_{layer}"], **updates[job]}
    return grads, tuple(after)


def _sweep(net: Network, params: Params, loss: Loss, slices: Slices, view: tuple[Array, Array] | None) -> Sweep:
    if view is not None:
        slices = slices._replace(error=view[0], weight=view[1])
    return Sweep(slices, {}, readout_error(net, params, slices), loss, lead=2)


def layer_terms(rule: LocalRule, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
    """The layer's learning signal: the loss's error at the output layer, the rule's signal elsewhere."""
    if layer == net.last:
        return [Term(layer, sweep.slices.error, lambda error: error)]
    return rule.signal.terms(net, params, layer, feedback, sweep)


def readout_error(net: Network, params: Params, slices: Slices) -> Array:
    """D_t error_t: the error on the current of the output layer."""
    return jacobians(net, params, net.last, slices.layers[-1]).D * slices.error


def total(terms: list[Term]) -> Array:
    signal = terms[0].pull(terms[0].error)
    for term in terms[1:]:
        signal = signal + term.pull(term.error)
    return signal
