"""The paths of credit that a composed rule drops or replaces, and the rule with some of them put back.

BPTT follows every path from a weight to the loss. A composed rule leaves some out:

    "time inside the layer"     the neuron's own state, from step to step
    "reset", "adaptation"       the spike's effect on the neuron's own next state
    "recurrence"                the layer's link to itself
    "temporal trace"            all of these at once, for a trace that approximates them
    "memory of later layers"    the state through which a later layer remembers this layer's spike
    "feedback weights"          the transposed weights by which errors go down
    "learning signal"           the network's error itself, where a target or a local loss stands for it
    "place of the loss"         the outputs, where the loss is put on a filtered output
    "steps that teach"          the steps that a gate shuts out

`restored(rule, net, paths)` is again a composed rule, so that every subset can be computed on one tape. With all paths
it is `EXACT`, whose gradient is BPTT's in networks without links back to earlier layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from gradlab.network import Network
from gradlab.neurons import ALIF, IF, LI, LIF, CurrentLIF
from gradlab.rules.feedback import DirectFeedback, LocalReadout
from gradlab.rules.gates import EveryStep
from gradlab.rules.local import LocalRule
from gradlab.rules.memories import Output
from gradlab.rules.own_links import own_link
from gradlab.rules.signals import Signal, SpatialBackprop
from gradlab.rules.traces import JacobianTrace, NoTrace, SubthresholdTrace, Trace

TIME, RESET, ADAPTATION, RECURRENCE = "time inside the layer", "reset", "adaptation", "recurrence"
TRACE, MEMORY, WEIGHTS = "temporal trace", "memory of later layers", "feedback weights"
SIGNAL, LOSS, GATE = "learning signal", "place of the loss", "steps that teach"

FULL = JacobianTrace(own="full")
EXACT = LocalRule(FULL, SpatialBackprop(through=FULL))
"""BPTT as a point of the composed family, for networks without links back to earlier layers."""

_CUTS = {
    (True, True): "nothing", (False, True): "reset", (True, False): "adaptation", (False, False): "spike",
}  # fmt: skip


def dropped(rule: LocalRule, net: Network) -> list[str]:
    """The paths that a rule drops or replaces in a network, in the order of this module's list."""
    found = [*_dropped_by_traces(rule, net)]
    if net.last > 0:  # without a hidden layer there is nothing to hand down
        found += [MEMORY] if rule.signal.through != FULL else []
        found += _dropped_by_signal(rule.signal, net)
    found += [LOSS] if rule.prediction != Output() else []
    found += [GATE] if rule.gate != EveryStep() else []
    return found


def restored(rule: LocalRule, net: Network, paths: Collection[str]) -> LocalRule:
    """The rule with some of the paths that it drops put back; the rule itself with none of them."""
    if not paths:
        return rule
    approximates = TRACE in dropped(rule, net)
    # What the network does not have counts as put back, so that no rule cuts what is not there.
    paths = {*paths, *({RESET, ADAPTATION, RECURRENCE} - set(_paths_of(net)))}
    trace, memory = _trace(rule.trace, paths, approximates), rule.memory
    signal = _signal(rule.signal, paths)
    through = _through(signal, rule.trace, paths, approximates) if MEMORY in paths else None
    if net.last == 0:
        through = EXACT.signal  # no layer below hears it
    if through is not None:
        signal, memory = through, None
        trace = dataclasses.replace(trace, slope="instant") if trace.slope != "instant" else trace  # type: ignore[call-arg]
    prediction = Output() if LOSS in paths else rule.prediction
    gate = EveryStep() if GATE in paths else rule.gate
    output = None if rule.output is None else _output(rule.output, paths, approximates)
    if trace.slope == "instant" and output == LocalRule(trace):
        output = None  # what the last layer does by itself
    return LocalRule(trace, signal, memory, gate, prediction, output)


def objection(rule: LocalRule, net: Network) -> str | None:
    """Why the paths of a network cannot be put back one by one, or None."""
    if all({RESET, ADAPTATION} <= _kept(trace) for trace in _traces(rule)):
        return None
    for layer, neuron in enumerate(net.neurons):
        try:
            [neuron.cut(path) for path in ("reset", "adaptation", "spike")]
        except (NotImplementedError, ValueError) as error:
            return f"layer_{layer}: {error}"
    return None


def _output(output: LocalRule, paths: Collection[str], approximates: bool) -> LocalRule:
    """The rule of the last layer, whose memory is that of the place where the loss is put."""
    trace = _trace(output.trace, paths, approximates)
    if LOSS not in paths or output.memory is None:
        return LocalRule(trace, output.signal, output.memory)
    return LocalRule(trace)


def _plain(trace: Trace, net: Network) -> bool:
    """True for a trace that is the neurons' own Jacobian with paths left out, False for an approximation of it.

    Constants below threshold are the Jacobian without the spike's paths in neurons that are known not to scale their
    membrane with the spike, as a reset to zero does.
    """
    if isinstance(trace, SubthresholdTrace):
        known = all(type(n) in (IF, LIF, LI, ALIF, CurrentLIF) for n in net.neurons)
        zero = any(getattr(n, "reset", "none") == "zero" for n in net.neurons)
        return trace.slope == "instant" and trace.bias == "traced" and known and not zero
    return isinstance(trace, NoTrace | JacobianTrace)


def _traces(rule: LocalRule) -> list[Trace]:
    return [rule.trace, *([] if rule.output is None else [rule.output.trace])]


def _dropped_by_traces(rule: LocalRule, net: Network) -> list[str]:
    traces = _traces(rule)
    if not all(_plain(trace, net) for trace in traces):
        return [TRACE]
    keeps = [_kept(trace) for trace in traces]
    exists = [TIME, *_paths_of(net)]
    return [path for path in exists if not all(path in kept for kept in keeps)]


def _kept(trace: Trace) -> set[str]:
    """The paths inside a layer that a plain trace follows."""
    if isinstance(trace, SubthresholdTrace):
        return {TIME}
    if not isinstance(trace, JacobianTrace):
        return set()
    kept = {TIME} | ({RECURRENCE} if trace.own == "full" else set())
    kept |= {RESET} if trace.cut in ("nothing", "adaptation") else set()
    return kept | ({ADAPTATION} if trace.cut in ("nothing", "reset") else set())


def _paths_of(net: Network) -> list[str]:
    """The paths inside a layer, besides time, that some layer of the network has."""
    neurons = [neuron for neuron in net.neurons if getattr(neuron, "spiking", False)]
    resets = any(_cuts(neuron, "reset") and getattr(neuron, "reset", "") != "none" for neuron in neurons)
    adapts = any(_cuts(neuron, "adaptation") for neuron in neurons)
    recurs = any(own_link(net, layer, "full") is not None for layer in range(len(net.neurons)))
    return [path for path, there in ((RESET, resets), (ADAPTATION, adapts), (RECURRENCE, recurs)) if there]


def _cuts(neuron: Any, path: str) -> bool:
    """True when a neuron has the path, and says how to cut it."""
    try:
        return bool(neuron.cut(path) != neuron)
    except (NotImplementedError, ValueError):
        return False


def _dropped_by_signal(signal: Signal, net: Network) -> list[str]:
    if isinstance(signal, LocalReadout) or signal.uses_target:
        return [SIGNAL]
    if isinstance(signal, DirectFeedback):
        # With one hidden layer the transposed weights into the read-out are those that backpropagation takes.
        return [] if signal.matrix == "symmetric" and net.last == 1 else [WEIGHTS]
    return [] if isinstance(signal, SpatialBackprop) and signal.weights == "own" else [WEIGHTS]


def _trace(trace: Trace, paths: Collection[str], approximates: bool) -> Trace:
    if approximates:
        return FULL if TRACE in paths else trace
    kept = _kept(trace) | set(paths)
    whole = {TIME, RESET, ADAPTATION, RECURRENCE}
    return _with(kept, trace) if TIME in kept and (kept & whole) != (_kept(trace) & whole) else trace


def _with(kept: Collection[str], base: Trace) -> JacobianTrace:
    """The neuron's own Jacobian along these paths; without recurrence, as much of the own link as `base` follows."""
    own = "full" if RECURRENCE in kept else getattr(base, "own", "none")
    return JacobianTrace(_CUTS[RESET in kept, ADAPTATION in kept], own)


def _signal(signal: Signal, paths: Collection[str]) -> Signal:
    if not {WEIGHTS, SIGNAL} & set(paths):
        return signal
    return SpatialBackprop(slope=signal.slope)


def _through(signal: Signal, base: Trace, paths: Collection[str], approximates: bool) -> Signal | None:
    """The signal through the later layers' time, along the paths that the rule follows or that are put back; None for
    one that no later layer hands down.
    """
    time = FULL if approximates or signal.through is not None else _with(_kept(base) | set(paths), base)
    if isinstance(signal, SpatialBackprop):
        return dataclasses.replace(signal, slope="instant", through=time)
    if isinstance(signal, DirectFeedback) and signal.of == "error":
        return dataclasses.replace(signal, through=time)
    return None
