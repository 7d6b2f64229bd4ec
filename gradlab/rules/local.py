"""The composed family: a local rule is a choice of trace, signal, memory and prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.losses import Loss
from gradlab.network import INPUT, Network, Params
from gradlab.neurons import Neuron, Subthreshold
from gradlab.rules import adjoint, streaming
from gradlab.rules.adjoint import Learner
from gradlab.rules.base import Estimate, Shapes, StreamingRule
from gradlab.rules.feedback import LocalReadout
from gradlab.rules.gates import EveryStep, Gate
from gradlab.rules.memories import Memory, Output, Prediction
from gradlab.rules.signals import Signal, SpatialBackprop
from gradlab.rules.traces import JacobianTrace, Trace
from gradlab.tape import Slices, Tape


@dataclasses.dataclass(frozen=True)
class ComposedRule(StreamingRule):
    """A rule that is a point of the space trace x signal x memory x gate x prediction.

    A named point is a subclass with one method, `compose`. Its adjoint form is `gradient`, its streaming form `stream`.
    """

    def compose(self) -> LocalRule:
        """The point of the space."""
        raise NotImplementedError

    def supports(self, net: Network, shapes: Shapes, loss: Loss, online: bool = False) -> str | None:
        reason = _objection(self.compose(), net, shapes, loss, online)
        return None if reason is None else self.refuse(reason)

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        return self.compose().signal.init(net, params, shapes)

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        (grad,) = adjoint.gradients([Learner(self.compose(), state, key)], net, params, tape)
        return Estimate(grad, state)

    def by_step(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Params | None:
        rule = self.compose()
        if any(rule.at(net, layer).trace.fades_input for layer in range(len(net.neurons))):
            return None  # the trace of the input runs forwards: its sweep knows the error's step, not the input's
        (grad,) = adjoint.gradients([Learner(rule, state, key)], net, params, tape, by_step=True)
        return grad

    def updated(self, net: Network, params: Params, state: Any) -> Any:
        return self.compose().signal.updated(net, params, state)

    def start(
        self, net: Network, params: Params, loss: Loss, state: Any, slices: Slices, n_steps: int, key: Array
    ) -> Any:
        return streaming.start(self.compose(), net, params, loss, state, slices, n_steps, key)

    def step(
        self, net: Network, params: Params, loss: Loss, trace: Any, state: Any, slices: Slices
    ) -> tuple[Any, Estimate]:
        gate = trace["gate"]
        info = {} if gate is None else {"teaches": gate["mask"][gate["step"]]}
        trace, grad = streaming.step(self.compose(), net, params, loss, trace, state, slices)
        return trace, Estimate(grad, state, info)


@dataclasses.dataclass(frozen=True)
class LocalRule(ComposedRule):
    """Any point of the space of local rules.

    Args:
        trace: temporal credit inside a layer (`NoTrace`, `SubthresholdTrace`, `JacobianTrace`, `FactorTrace`).
        signal: who tells a hidden layer that it erred (`SpatialBackprop`, `DirectFeedback`, `LocalReadout`).
        memory: the linear memory of the layer that reads the spikes (None, `NextLayer`, `ReadoutFilter`).
        gate: which steps teach (`EveryStep`, `RandomSteps`, `LastSteps`, `LabelEvents`).
        prediction: where the loss is put (`Output`, `LeakySum`).
        output: the rule of the last layer; None: this one without memory and with instantaneous slopes.

    Raises:
        TypeError, ValueError: a part of another kind; a leaky mean without the memory that defines it; a local read-out
            with a memory; an output rule with parts that only the whole rule has.
    """

    trace: Trace = JacobianTrace()
    signal: Signal = SpatialBackprop()
    memory: Memory | None = None
    gate: Gate = EveryStep()
    prediction: Prediction = Output()
    output: LocalRule | None = None

    def __post_init__(self):
        for name, kind in (("trace", Trace), ("signal", Signal), ("gate", Gate), ("prediction", Prediction)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"LocalRule({name}={getattr(self, name)!r}): give one of gradlab.rules' {name}s")
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise TypeError(f"LocalRule(memory={self.memory!r}): give NextLayer(), ReadoutFilter() or None")
        if self.output is not None:
            if not isinstance(self.output, LocalRule):
                raise TypeError(f"LocalRule(output={self.output!r}): give a LocalRule for the last layer")
            if self.output.output is not None or (self.output.prediction, self.output.gate) != (Output(), EveryStep()):
                raise ValueError(
                    "LocalRule(output=...): the rule of the last layer has no output, prediction or gate of its own"
                )
        if isinstance(self.signal, LocalReadout) and self.memory is not None:
            raise ValueError(
                "LocalRule(signal=LocalReadout(...)): a local read-out remembers nothing, leave memory out"
            )
        if self.trace.bias == "untraced" and self.trace.inside(self.memory is not None):
            raise ValueError('LocalRule: bias="untraced" with a memory needs slope="leaky_mean", as in A-OTPE')
        if self.uses_mean and self.memory is None:
            raise ValueError(
                f'{type(self).__name__}: slope="leaky_mean" is a mean under a memory\'s kernel: give memory=NextLayer()'
            )

        if self.signal.through is not None and (self.memory is not None or self.uses_mean):
            raise ValueError(
                "LocalRule(signal=...(through=...)): the error goes through the later layers' time already, leave "
                'memory out and use slope="instant"'
            )

    def compose(self) -> LocalRule:
        return self

    def hands_down(self) -> LocalRule | None:
        """The rule of one layer whose delta is the error that is handed down, for a signal that goes through time."""
        return None if self.signal.through is None else LocalRule(self.signal.through)

    @property
    def uses_mean(self) -> bool:
        return "leaky_mean" in (self.trace.slope, self.signal.slope)

    def needs_mean(self, net: Network, layer: int) -> bool:
        """True when the slope's leaky mean is used: by the trace, or by an error that is handed down to another
        layer.
        """
        below = any(link.source != INPUT and not link.delay for link in net.links_into(layer))
        return self.trace.slope == "leaky_mean" or (self.signal.slope == "leaky_mean" and below)

    def at(self, net: Network, layer: int) -> LocalRule:
        """The rule of one layer: the last layer has its own."""
        if layer != net.last:
            return self
        if self.output is not None:
            return self.output
        trace = dataclasses.replace(self.trace, slope="instant") if self.trace.slope != "instant" else self.trace  # type: ignore[call-arg]
        return LocalRule(trace)

    def memory_filter(self, net: Network, params: Params, layer: int, target: int | None = None) -> Subthreshold | None:
        """The memory's kernel for the term from `target` (the only target of the layer if None)."""
        if self.memory is None:
            return None
        if target is None:
            target = self.term_targets(net, layer)[0]
        return self.memory.filter(net, params, target, _dtype(params))

    def term_targets(self, net: Network, layer: int) -> list[int]:
        """The targets of the terms of the layer's signal, in order."""
        return [layer] if layer == net.last else self.signal.targets(net, layer)

    def way(self, position: int) -> Any:
        """What decides the rule's learning signals: rules of one way share them. `position` keeps private noise and
        feedback apart.
        """
        last = self.output or LocalRule()
        slopes = [
            (part.signal.slope, part.memory if part.signal.slope == "leaky_mean" else None) for part in (self, last)
        ]
        private = position if self.signal.has_state or self.gate.stochastic else None
        return (self.signal, *slopes, self.gate, self.prediction, private)

    def own_filter(self, net: Network, params: Params, layer: int) -> Subthreshold | None:
        """The layer's own sub-threshold constants, where the trace uses them."""
        if not self.trace.needs_subthreshold:
            return None
        return net.neurons[layer].subthreshold(params[f"layer_{layer}"].get("neuron", {}), _dtype(params))


def _dtype(params: Params) -> Any:
    return jax.tree.leaves(params)[0].dtype


def _objection(rule: LocalRule, net: Network, shapes: Shapes, loss: Loss, online: bool) -> str | None:
    """Why the rule cannot treat this network and loss, or None."""
    reason = rule.signal.supports(net, shapes, loss) or rule.gate.objection(shapes.n_steps)
    if reason is not None:
        return reason
    if not isinstance(rule.prediction, Output) and not loss.streams:
        return f"it puts the loss on a filtered output, and {type(loss).__name__} is no sum over steps: use gl.PerStep"
    if online and not loss.streams:
        return (
            f"{type(loss).__name__} is known only at the end of the sequence: use gl.PerStep, or update once "
            f"per sequence"
        )
    down = rule.hands_down()
    for layer in range(len(net.neurons)):
        for local in (rule.at(net, layer), *([] if down is None else [down])):
            reason = _layer_objection(local, net, shapes, layer)
            if reason is not None:
                return reason
    if not isinstance(rule.prediction, Output):
        reason = _one_state(rule.prediction, net, shapes)
    if reason is None and online:
        reason = streaming.objection(rule, net, shapes, loss)
    return reason


def _layer_objection(local: LocalRule, net: Network, shapes: Shapes, layer: int) -> str | None:
    neuron, name = net.neurons[layer], f"layer_{layer}"
    kind = type(neuron).__name__
    if not isinstance(neuron, Neuron):
        return (
            f"{name} is a {kind}, whose units see each other inside one step; local rules need an elementwise neuron: "
            "use BPTT"
        )
    trains = "neuron" in shapes.params[name]
    if trains and (reason := local.trace.constants_objection()):
        return f"{name} trains constants of its neuron: {reason}"
    try:
        neuron.cut(local.trace.cut)
        if trains:
            neuron.cut(local.trace.constants_cut)
    except NotImplementedError as error:
        return f"{name}: {error}"
    if local.trace.needs_subthreshold:
        if _constants(net, shapes, layer) is None:
            return (
                f"{name} is a {kind}, which declares no constants below threshold: use a rule with "
                f"JacobianTrace, such as OSTL"
            )
        if reason := local.trace.links_objection(net, layer):
            return reason
        if local.trace.fades_input and not _constants(net, shapes, layer).shared:  # type: ignore[union-attr]
            return f"{name} has one leak per unit, and its input fades by one leak: use OTTT"
        if _blind(net, shapes, layer):
            return f"{name} is a {kind} whose current reaches the spike a step later, so {_NO_GAIN}: use OSTL or BPTT"
    return _memory_objection(local, net, shapes, layer)


def _memory_objection(local: LocalRule, net: Network, shapes: Shapes, layer: int) -> str | None:
    if local.memory is None:
        return None
    targets = local.term_targets(net, layer)
    kernels = []
    for target in targets:
        reader = local.memory.layer(net, target)
        if not isinstance(net.neurons[reader], Neuron) or _constants(net, shapes, reader) is None:
            return (
                f"its memory is that of layer_{reader}, a {type(net.neurons[reader]).__name__} without constants "
                f"below threshold"
            )
        if _blind(net, shapes, reader):
            return f"its memory is that of layer_{reader}, whose current reaches the spike a step later, so {_NO_GAIN}"
        kernel = _constants(net, shapes, reader)
        if reader != target and kernel is not None and not kernel.shared:
            return (
                f"its memory is that of layer_{reader}, which has one leak per unit, but layer_{layer} sends its error "
                f"through layer_{target}: use NextLayer(), or one leak in layer_{reader}"
            )
        kernels.append(kernel)
    if local.needs_mean(net, layer) and (len(set(targets)) > 1 or not all(k.shared for k in kernels if k is not None)):
        return (
            f"the leaky mean of layer_{layer}'s slope needs one leak in the layer that it feeds, but it "
            f"feeds layers {targets} "
            'or one with a leak per unit: use slope="instant" in a LocalRule, or OSTL'
        )
    return None


_NO_GAIN = "it has no instantaneous slope"


def _blind(net: Network, shapes: Shapes, layer: int) -> bool:
    """True when a layer's current does not change its spike variable in the same step (c0 . B0 = 0)."""
    if "neuron" in shapes.params[f"layer_{layer}"]:
        return (
            False  # the constants are trained and not known here; every trainable neuron of gradlab has a gain of one
        )
    with jax.ensure_compile_time_eval():
        constants = net.neurons[layer].subthreshold({}, shapes.dtype)
        return constants is not None and bool(jnp.any(constants.gain == 0))


def _constants(net: Network, shapes: Shapes, layer: int) -> Subthreshold | None:
    """The shapes of a layer's sub-threshold constants."""
    own = shapes.params[f"layer_{layer}"].get("neuron", {})
    return jax.eval_shape(lambda p: net.neurons[layer].subthreshold(p, shapes.dtype), own)


def _one_state(prediction: Prediction, net: Network, shapes: Shapes) -> str | None:
    own = _constants(net, shapes, net.last)
    if getattr(prediction, "decay", None) is not None:
        return None
    if "neuron" in shapes.params[f"layer_{net.last}"]:
        return "the leaky sum takes its leak from the output neuron, whose constants train: give LeakySum(decay=...)"
    if own is None or len(own.B) != 1:
        return (
            "the leaky sum takes its leak from the output neuron, which must have one state: give LeakySum(decay=...)"
        )
    return None
