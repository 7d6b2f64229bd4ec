"""W2: what each rule's deferred gradient costs, in time and memory of backpropagation through time (BPTT).

Three layers of leaky integrate-and-fire neurons of width N, 100 steps, a batch of 32, float32, every layer firing on 3
to 20 % of its steps. Columns: `over_bptt`, the rule's gradient with its forward pass over BPTT's with its;
`over_floor`, the same over the time of BPTT's matrix products; `memory_over_bptt`, temporary memory of the compiled
program over BPTT's.

With `--all` also `second`, what the rule adds to a tape that BPTT uses already, over BPTT; `third`, what it adds to a
tape that BPTT and OSTL use; and a convolutional network. By products alone a second rule that hands errors down costs
5/8 of BPTT, a third one with OSTL's signals 3/8; `product_floor` counts those of ten rules on one tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import gradlab as gl
from benchmarks import common, w1
from benchmarks.common import Options, Row
from gradlab import rules
from gradlab.engine import shapes_of
from gradlab.rules.local import ComposedRule
from gradlab.rules.streaming import trace_bytes

LOSS = w1.LOSS
WIDTHS = (128, 256)
FORWARDS = (rules.RTRL, rules.SnAp, rules.UORO, rules.KFRTRL)
TEN = (
    *(rules.BPTT(), rules.OSTL(), rules.OTTT(), rules.OTPE(), rules.ApproximateOTPE(), rules.SLTT()),
    *(rules.ESDRTRL(), rules.STLLR(), rules.DECOLLE(), rules.DirectFeedbackAlignment()),
)
MORE = (rules.EProp(feedback="random"), rules.BPTT(form="autodiff"), rules.TBPTT(window="sliding"))
CONVOLUTIONAL = (rules.BPTT(), rules.OSTL(), rules.OTPE(), rules.EProp(feedback="random"), rules.OTTT())


def convolutional(steps: int, batch: int) -> tuple[gl.Network, Any, gl.Batch]:
    """A small convolutional network, where streaming traces would hold a patch per unit."""
    neuron = gl.LIF(beta=0.9)
    flat = [lambda x: x.reshape(x.shape[0], -1), nn.Dense(10), neuron]
    net = gl.connect([nn.Conv(16, (3, 3)), neuron, nn.Conv(32, (3, 3), strides=(2, 2)), neuron, *flat])
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, 16, 16, 2)) < 0.2).astype(jnp.float32)
    data = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(batch) % 10, 10))
    return net, net.init(jax.random.key(1), inputs), data


def program(net: gl.Network, chosen: Sequence[rules.Rule], params: Any, batch: gl.Batch) -> Any:
    """The compiled gradients of the rules on one tape; random feedback is drawn before, as in a run of training."""
    shapes = shapes_of(net, params, batch, LOSS)
    states = {rule.name: rule.init(net, params, shapes) for rule in chosen}

    def compute(p: Any, b: gl.Batch) -> Any:
        found = gl.estimates(net, p, b, LOSS, chosen, jax.random.key(2), states)
        return {name: estimate.grad for name, estimate in found.items()}

    return jax.jit(compute).lower(params, batch).compile()


def why_not(rule: rules.Rule, net: gl.Network, params: Any, batch: gl.Batch) -> str | None:
    """None for a rule with a deferred gradient of this network, else the reason why there is none."""
    if isinstance(rule, FORWARDS):
        return "carries an influence forwards in time"
    return rule.supports(net, shapes_of(net, params, batch, LOSS), LOSS)


def product_floor(layers: int = 3) -> float:
    """Matrix products of the ten rules over those of BPTT, when equal signals and equal errors are computed once.

    BPTT: one per layer forwards, one for its weights, one that hands the error down to each hidden layer. Each further
    rule: one per layer for its weights, but none in an output layer that another rule treats alike (OTPE and
    DirectFeedbackAlignment as OSTL, A-OTPE and DECOLLE as OTTT). Errors handed down: once for the rules with
    instantaneous slopes, once for the two with leaky means; direct feedback one per hidden layer, local read-outs two.
    """
    hidden = layers - 1
    bptt = 2 * layers + hidden
    further = 9 * layers - 4 + 2 * hidden + hidden + 2 * hidden
    return (bptt + further) / bptt


def programs(
    net: gl.Network, chosen: Sequence[rules.Rule], params: Any, batch: gl.Batch, every: bool
) -> dict[str, Any]:
    """BPTT, every rule alone, and with `every` also as the second and the third rule on one tape."""
    bptt, ostl = rules.BPTT(), rules.OSTL()
    found = {bptt.name: program(net, [bptt], params, batch)}
    for rule in chosen:
        if rule != bptt:
            found[rule.name] = program(net, [rule], params, batch)
    if every:
        for rule in [ostl, *(r for r in chosen if r not in (bptt, ostl))]:
            found[f"second {rule.name}"] = program(net, [bptt, rule], params, batch)
            if rule != ostl:
                found[f"third {rule.name}"] = program(net, [bptt, ostl, rule], params, batch)
        found["ten"] = program(net, TEN, params, batch)
    return found


def measure(name: str, net: gl.Network, params: Any, batch: gl.Batch, options: Options, sizes: Any) -> list[Row]:
    """Rows of one network; `sizes` are its Dense layers' (inputs, outputs), empty when there is no floor for it."""
    if options.quick:
        asked = (rules.BPTT(), rules.OSTL(), rules.RTRL())
    else:
        asked = (*rules.ALL, *MORE) if sizes else CONVOLUTIONAL
    reasons = {rule: why_not(rule, net, params, batch) for rule in asked}
    chosen = [rule for rule, reason in reasons.items() if reason is None]
    every = options.every and bool(sizes)
    compiled = programs(net, chosen, params, batch, every)
    steps, size = batch.inputs.shape[:2]
    actions = {"floor": common.floor(sizes, steps * size)} if sizes else {}
    actions |= {key: (lambda c=value: c(params, batch)) for key, value in compiled.items()}
    times = common.interleaved(actions, options.rounds_or(20))
    memory = {key: common.temporary_megabytes(value) for key, value in compiled.items()}
    rows = [{"network": name, **costs(rule.name, times, memory)} for rule in chosen]
    if every:
        measured = common.ratio(times, "ten", rules.BPTT().name)
        rows.append({"network": name, "rule": "ten rules on one tape", "over_bptt": measured})
        rows.append({"network": name, "rule": "ten rules, products only", "over_bptt": product_floor()})
    return rows + [{"network": name, "rule": r.name, "not_measured": why} for r, why in reasons.items() if why]


def costs(rule: str, times: dict[str, list[float]], memory: dict[str, float | None]) -> Row:
    """The columns of one rule."""
    bptt = rules.BPTT().name
    own, base = memory[rule], memory[bptt]
    row: Row = {"rule": rule, "over_bptt": common.ratio(times, rule, bptt)}
    row["over_floor"] = common.ratio(times, rule, "floor") if "floor" in times else None
    row["ms"] = common.milliseconds(times[rule])
    row["memory_over_bptt"] = own / base if own is not None and base else None
    if f"second {rule}" in times:
        row["second"] = common.ratio(times, f"second {rule}", bptt, less=bptt)
    if f"third {rule}" in times:
        row["third"] = common.ratio(times, f"third {rule}", bptt, less="second OSTL")
    return row


def run(options: Options) -> list[Row]:
    """One row per network and rule, and one per rule that has no deferred gradient."""
    steps, batch = (12, 8) if options.quick else (100, 32)
    rows: list[Row] = []
    for width in options.widths_or(WIDTHS):
        case = w1.case(width, steps, batch, outputs=width)
        rows += measure(f"3 x {width}", *case, options, w1.layer_sizes(width, width))
    if options.every:
        net, params, data = convolutional(*((5, 2) if options.quick else (25, 16)))
        found = measure("convolutional", net, params, data, options, [])
        shapes = shapes_of(net, params, data, LOSS)
        by_name = {rule.name: rule for rule in CONVOLUTIONAL if isinstance(rule, ComposedRule)}
        for row in found:
            if row["rule"] in by_name:
                row["streaming_traces_MB"] = trace_bytes(by_name[row["rule"]].compose(), net, shapes, LOSS) / 1e6
        rows += found
    return rows
