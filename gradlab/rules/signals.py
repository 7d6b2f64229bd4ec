"""Learning signals: who tells a hidden layer that it erred."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.losses import Loss
from gradlab.network import Link, Network, Params, fresh
from gradlab.rules.base import Shapes
from gradlab.rules.traces import JacobianTrace
from gradlab.tape import Slices

Pull = Callable[[Array], Array]


class Term(NamedTuple):
    """One source of a layer's learning signal: an error on `target`'s current, and the map from it to this layer's
    output.
    """

    target: int
    error: Array
    pull: Pull


class Sweep(NamedTuple):
    """What is known when a layer's signal is formed.

    Attributes:
        slices: the steps, with the error, target and weight that the rule sees; `lead` leading axes are time and batch.
        handed_down: the errors q on the currents of later layers.
        readout_error: the error on the read-out's current.
        loss: for signals that put it elsewhere.
    """

    slices: Slices
    handed_down: dict[int, Array]
    readout_error: Array
    loss: Loss
    lead: int


@dataclasses.dataclass(frozen=True)
class Signal(abc.ABC):
    """A learning signal for hidden layers."""

    slope = "instant"
    backpropagates = False
    """True when an error is handed from layer to layer."""
    uses_target = False
    """True when the signal is made from the target or a local loss, not from the network's error."""
    through = cast("JacobianTrace | None", None)
    """The time inside later layers that an error goes through on its way down; None: none. Only known afterwards."""

    @abc.abstractmethod
    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        """The terms of the layer's signal; empty when no error reaches the layer."""

    @abc.abstractmethod
    def targets(self, net: Network, layer: int) -> list[int]:
        """The targets of `terms`, in order, known before any value is."""

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        """Feedback weights at the start of a run; they depend on the signal's seed and the layer, on nothing else."""
        return {}

    def updated(self, net: Network, params: Params, feedback: Any) -> Any:
        """Feedback weights after the optimizer changed the parameters."""
        return feedback

    @property
    def has_state(self) -> bool:
        """True when the signal has feedback weights of its own."""
        return False

    def supports(self, net: Network, shapes: Shapes, loss: Loss) -> str | None:
        return None


@dataclasses.dataclass(frozen=True)
class SpatialBackprop(Signal):
    """Backpropagation through the layers of the same time step.

    (1) L_t = sum over same-step links  W^T q_t,      q_t = slope_t L_t of the layer above

    Args:
        slope: "instant", the surrogate slope D_t of the step (OSTL, OTTT), or "leaky_mean", its running mean under the
            layer's memory, (2) r_t = kappa r_{t-1} + 1,  g_t = (kappa r_{t-1} g_{t-1} + D_t) / r_t  (OTPE).
        weights: "own", or "random", fixed weights in the place of W, drawn like new ones of the same network (feedback
            alignment).
        seed: of the random weights.
        through: the time inside the layers that hand an error down. None: none, q_t = slope_t L_t. With a trace,
            (3) q_t = delta_t, the error on the current that the trace's transpose gives: the error reaches the layers
            below through the later layers' own memory, as in BPTT. `LocalRule(JacobianTrace(own="full"),
            SpatialBackprop(through=JacobianTrace(own="full")))` is BPTT for networks without links back to earlier
            layers. It needs the errors of later steps, so it has no streaming form.
    """

    slope: str = "instant"
    weights: str = "own"
    seed: int = 0
    through: JacobianTrace | None = None
    backpropagates = True

    def __post_init__(self):
        if self.slope not in ("instant", "leaky_mean"):
            raise ValueError(f'SpatialBackprop(slope={self.slope!r}): choose "instant" or "leaky_mean"')
        if self.weights not in ("own", "random"):
            raise ValueError(f'SpatialBackprop(weights={self.weights!r}): choose "own" or "random"')
        require_through(self)
        if self.through is not None and self.slope != "instant":
            raise ValueError('SpatialBackprop(slope="leaky_mean", through=...): a mean stands for time, leave one out')

    @property
    def has_state(self) -> bool:
        return self.weights == "random"

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        if self.weights == "own":
            return {}
        # Another stream of random numbers than `net.init` draws from, or seed 0 would give the network's own weights.
        key = jax.random.fold_in(jax.random.key(self.seed), 0x0FEEDBAC)
        return fresh(net, key, jnp.zeros(shapes.slices.inputs.shape, shapes.dtype))

    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        links = [k for k in net.links_from(layer) if not k.delay]
        weights = params if self.weights == "own" else feedback
        return [Term(k.target, sweep.handed_down[k.target], pull_through(net, weights, k, sweep)) for k in links]

    def targets(self, net: Network, layer: int) -> list[int]:
        return [k.target for k in net.links_from(layer) if not k.delay]


def require_through(signal: Signal) -> None:
    """Raise TypeError unless the time that a signal goes through is a JacobianTrace or None."""
    if signal.through is not None and not isinstance(signal.through, JacobianTrace):
        raise TypeError(f"{type(signal).__name__}(through={signal.through!r}): give a JacobianTrace, or None")


def pull_through(net: Network, params: Params, link: Link, sweep: Sweep) -> Pull:
    x = sweep.slices.link_input(link)
    return lambda error: net.input_cotangent(params, link, x, error, sweep.lead)
