"""The composed family: a local rule is a choice of trace, signal, memory and prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array

from gradlab.losses import Loss
from gradlab.network import INPUT, Network, Params
from gradlab.neurons import Subthreshold
from gradlab.rules import adjoint, streaming
from gradlab.rules.adjoint import Learner
from gradlab.rules.base import Estimate, Shapes, StreamingRule
from gradlab.rules.feedback import LocalReadout
from gradlab.rules.gates import EveryStep, Gate
from gradlab.rules.memories import Memory, Output, Prediction
from gradlab.rules.objections import objection
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
        reason = objection(self.compose(), net, shapes, loss, online)
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

    def hands_down(self, net: Network, layer: int) -> LocalRule | None:
        """The rule of one layer whose delta is the error that is handed down, for a signal that goes through time.

        Where the loss is put on a filtered output, the last layer's error goes through that filter too.
        """
        if self.signal.through is None:
            return None
        filtered = layer == net.last and self.output is not None
        return LocalRule(self.signal.through, memory=self.output.memory if filtered else None)  # type: ignore[union-attr]

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
        # An error that goes through time is handed down through the filter of the last layer, too.
        filtered = self.output.memory if self.signal.through is not None and self.output is not None else None
        return (self.signal, *slopes, self.gate, self.prediction, filtered, private)

    def own_filter(self, net: Network, params: Params, layer: int) -> Subthreshold | None:
        """The layer's own sub-threshold constants, where the trace uses them."""
        if not self.trace.needs_subthreshold:
            return None
        return net.neurons[layer].subthreshold(params[f"layer_{layer}"].get("neuron", {}), _dtype(params))


def _dtype(params: Params) -> Any:
    return jax.tree.leaves(params)[0].dtype
