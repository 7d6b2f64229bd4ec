"""Why a composed rule cannot treat a network and a loss, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from gradlab.losses import Loss
from gradlab.network import Network
from gradlab.neurons import Neuron, Subthreshold
from gradlab.rules import streaming
from gradlab.rules.base import Shapes
from gradlab.rules.memories import Output, Prediction

if TYPE_CHECKING:
    from gradlab.rules.local import LocalRule


def objection(rule: LocalRule, net: Network, shapes: Shapes, loss: Loss, online: bool) -> str | None:
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
    for layer in range(len(net.neurons)):
        down = rule.hands_down(net, layer)
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
