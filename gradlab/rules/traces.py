"""Traces: how a local rule assigns credit over time inside one layer.

Each trace has two faces that are exact transposes of each other. `forward` advances the derivative of the layer's
output with respect to its parameters, e_t = ds_t/d theta, by one step. `transpose` takes the learning signal backwards
through the same linear recursion and returns delta_t, the error on the layer's current, so that
sum_t L_t e_t = sum_t delta_t dI_t/d theta.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.network import Network
from gradlab.neurons import Subthreshold
from gradlab.rules import filters
from gradlab.tape import Jacobians

Scale = Callable[[Array, Any], Any]
Terms = tuple[Any, ...]


class Unit(NamedTuple):
    """What a trace reads of its layer at one step.

    Attributes:
        jac: the local Jacobians of the variant that the trace asks for.
        own: the layer's sub-threshold filter; None for traces that do not ask for it.
        mean: the leaky mean of the slope, where it is used.
        posts: the trace's own quantities per unit (`Trace.post_step`).
        fade: what a step leaves of a trace of the input, in the streaming form of traces that fade it themselves.
    """

    jac: Jacobians
    own: Subthreshold | None = None
    mean: Array | None = None
    posts: tuple[Array, ...] = ()
    fade: Callable[[Any], Any] = lambda trace: trace


CUTS = ("nothing", "reset", "adaptation", "spike")
"""The paths of a neuron's Jacobian that a trace may stop."""

OWN = ("none", "diagonal", "full")
"""How much of a layer's link to itself a trace follows."""


@dataclasses.dataclass(frozen=True)
class Trace(abc.ABC):
    """Temporal credit inside one layer. `cut` names the variant of the neuron that is linearised (`Neuron.cut`).

    A trace may have quantities per unit of its own that run forwards in time (`post_start`, `post_step`).
    """

    cut = "nothing"
    own = "none"
    slope = "instant"
    bias = "traced"
    needs_subthreshold = False
    fades_input = False
    """True for a trace of the input that is no filter of fixed constants: only then are inputs traced forwards."""

    def inside(self, has_memory: bool) -> bool:
        """True when the surrogate slope is part of e_t; False when it may multiply the learning signal instead.

        The two agree without a memory, and outside is cheaper: the trace keeps the shape of the input.
        """
        return has_memory and self.slope == "instant"

    def input_shaped(self, own: Subthreshold | None) -> bool:
        """True when no factor of the trace (with the slope outside) differs between units."""
        return False

    @abc.abstractmethod
    def zeros(self, own: Subthreshold | None, k: int, like: Any) -> Any:
        """The trace at rest, for leaves shaped like `like` (a pytree); k state variables."""

    @abc.abstractmethod
    def forward(self, unit: Unit, h: Any, direct: Any, scale: Scale, inside: bool) -> tuple[Any, Terms]:
        """(trace, terms of e): one step; `direct` is dI_t. One term, or, outside, one for each of `outside`."""

    @abc.abstractmethod
    def transpose(self, unit: Unit, p: Any, signal: Array) -> tuple[Any, Array, Any]:
        """(p, delta, cotangent of h_t): one step backwards in time."""

    def outside(self, unit: Unit) -> tuple[Array, ...]:
        """The factors of the learning signal when the slope is outside the trace."""
        return (unit.jac.D,)

    def forward_constant(self, unit: Unit, h: Any, drive: Any, direct: Array) -> tuple[Any, Array]:
        """(trace, e) of a trained constant of the neuron; drive = dh_t/dconstant, direct = ds_t/dconstant."""
        raise NotImplementedError(f"{type(self).__name__} is not defined for trained constants")

    def constants_objection(self) -> str | None:
        """Why the trace is not defined for a neuron's trained constants, or None."""
        return None

    def links_objection(self, net: Network, layer: int) -> str | None:
        """Why the trace is not defined for the links into a layer, or None."""
        return None

    def post_start(self, jac: Jacobians) -> Any:
        """What `post_step` carries, before the first step."""
        return ()

    def post_step(self, held: Any, jac: Jacobians) -> tuple[Any, tuple[Array, ...]]:
        """(carried, posts) of one step."""
        return (), ()

    @property
    def has_posts(self) -> bool:
        return False

    @property
    def constants_cut(self) -> str:
        """The variant of the neuron whose trained constants are differentiated."""
        return self.cut


@dataclasses.dataclass(frozen=True)
class NoTrace(Trace):
    """No temporal credit: (1) e_t = D_t dI_t   and (2) delta_t = D_t L_t."""

    def input_shaped(self, own: Subthreshold | None) -> bool:
        return True

    def zeros(self, own: Subthreshold | None, k: int, like: Any) -> Any:
        return ()

    def forward(self, unit: Unit, h: Any, direct: Any, scale: Scale, inside: bool) -> tuple[Any, Terms]:
        return (), (scale(unit.jac.D, direct) if inside else direct,)

    def transpose(self, unit: Unit, p: Any, signal: Array) -> tuple[Any, Array, Any]:
        return (), unit.jac.D * signal, tuple(jnp.zeros_like(signal) for _ in unit.jac.B)

    def forward_constant(self, unit: Unit, h: Any, drive: Any, direct: Array) -> tuple[Any, Array]:
        return (), direct


@dataclasses.dataclass(frozen=True)
class JacobianTrace(Trace):
    """The neuron's own Jacobian, spikes and resets included.

    (1) E_t = A_t E_{t-1} + B_t dI_t,   e_t = C_t E_{t-1} + D_t dI_t
    (2) delta_t = B_t . p_t + D_t L_t,   p_{t-1} = A_t^T p_t + C_t L_t
    (3) own="full":      dI_t -> dI_t + R e_{t-1},         L_t -> L_t + R^T delta_{t+1},   R the layer's link to itself
        own="diagonal":  dI_t -> dI_t + diag(R) e_{t-1},   L_t -> L_t + diag(R) delta_{t+1}

    Args:
        cut: "nothing", "reset", "adaptation" or "spike": which path of the neuron's own Jacobian is stopped
            (`Neuron.cut`).
        own: "none" leaves the layer's link to itself out, "diagonal" keeps each unit's own share of it, "full" all.
    """

    cut: str = "nothing"
    own: str = "none"

    def __post_init__(self):
        if self.cut not in CUTS:
            raise ValueError(f"JacobianTrace(cut={self.cut!r}): choose from {CUTS}")
        if self.own not in OWN:
            raise ValueError(f'JacobianTrace(own={self.own!r}): choose "none", "diagonal" or "full"')

    def inside(self, has_memory: bool) -> bool:
        return has_memory or self.own != "none"

    def zeros(self, own: Subthreshold | None, k: int, like: Any) -> Any:
        return tuple(jax.tree.map(jnp.zeros_like, like) for _ in range(k))

    def forward(self, unit: Unit, h: Any, direct: Any, scale: Scale, inside: bool) -> tuple[Any, Terms]:
        jac = unit.jac
        # Outside, e is never formed: its parts meet the signal one by one, which saves an array per synapse and step.
        terms = (_combine(scale, jac.C, h, scale(jac.D, direct)),) if inside else (*h, direct)
        rows = zip(jac.A, jac.B, strict=True)
        return tuple(_combine(scale, row, h, scale(b, direct)) for row, b in rows), terms

    def outside(self, unit: Unit) -> tuple[Array, ...]:
        return (*unit.jac.C, unit.jac.D)

    def transpose(self, unit: Unit, p: Any, signal: Array) -> tuple[Any, Array, Any]:
        jac, delta = unit.jac, unit.jac.D * signal
        for b, p_i in zip(jac.B, p, strict=True):
            delta = delta + b * p_i
        k = range(len(p))
        before = tuple(sum((jac.A[i][j] * p[i] for i in k), jac.C[j] * signal) for j in k)
        return before, delta, p

    def forward_constant(self, unit: Unit, h: Any, drive: Any, direct: Array) -> tuple[Any, Array]:
        e = _combine(jnp.multiply, unit.jac.C, h, direct)
        return tuple(_combine(jnp.multiply, row, h, d) for row, d in zip(unit.jac.A, drive, strict=True)), e


@dataclasses.dataclass(frozen=True)
class SubthresholdTrace(Trace):
    """The neuron's constants below threshold: spikes and resets leave the trace alone, so it has the shape of the
    input.

    (1) a_t = A0 a_{t-1} + B0 dI_t,   e_t = psi_t c0 . a_t,   psi_t = D_t / (c0 . B0)
    (2) delta_t = B0 . lambda_t,   lambda_t = c0 psi_t L_t + A0^T lambda_{t+1}
    (3) of a trained constant w of the neuron:  a_t = A0 a_{t-1} + dh_t/dw,   e_t = psi_t c0 . A0 a_{t-1} + ds_t/dw,
        both derivatives with the spike's own paths stopped

    Args:
        slope: "instant", or "leaky_mean": psi_t is replaced by its running mean under the memory's filter, multiplied
            onto the signal.
        bias: "traced", as an input that is constantly 1, or "untraced", its current step only, as public code of OTTT
            and OTPE does.
    """

    slope: str = "instant"
    bias: str = "traced"
    needs_subthreshold = True

    @property
    def constants_cut(self) -> str:
        return "spike"

    def __post_init__(self):
        if self.slope not in ("instant", "leaky_mean"):
            raise ValueError(f'SubthresholdTrace(slope={self.slope!r}): choose "instant" or "leaky_mean"')
        if self.bias not in ("traced", "untraced"):
            raise ValueError(f'SubthresholdTrace(bias={self.bias!r}): choose "traced" or "untraced"')

    def input_shaped(self, own: Subthreshold | None) -> bool:
        assert own is not None
        return own.shared

    def zeros(self, own: Subthreshold | None, k: int, like: Any) -> Any:
        assert own is not None
        return filters.zeros(own, like)

    def forward(self, unit: Unit, h: Any, direct: Any, scale: Scale, inside: bool) -> tuple[Any, Terms]:
        assert unit.own is not None
        h, e = filters.forward(unit.own, h, direct, scale)
        return h, (scale(unit.jac.D / unit.own.gain, e) if inside else e,)

    def transpose(self, unit: Unit, p: Any, signal: Array) -> tuple[Any, Array, Any]:
        # With the leaky mean the signal has been multiplied already, before the memory's filter.
        assert unit.own is not None
        weighted = (signal if self.slope == "leaky_mean" else signal * unit.jac.D) / unit.own.gain
        before, delta = filters.transpose(unit.own, p, weighted)
        return before, delta, p

    def outside(self, unit: Unit) -> tuple[Array, ...]:
        assert unit.own is not None
        slope = unit.jac.D if unit.mean is None or self.slope == "instant" else unit.mean
        return (slope / unit.own.gain,)

    def constants_objection(self) -> str | None:
        if self.slope == "leaky_mean":
            return "a leaky mean of slopes is not defined for trained constants of a neuron: use OTPE, or trainable=()"
        return None

    def forward_constant(self, unit: Unit, h: Any, drive: Any, direct: Array) -> tuple[Any, Array]:
        assert unit.own is not None
        moved = tuple(_combine(jnp.multiply, row, h, jnp.zeros_like(direct)) for row in unit.own.A)
        e = direct + unit.jac.D / unit.own.gain * sum(c * state for c, state in zip(unit.own.c, moved, strict=True))
        return tuple(state + d for state, d in zip(moved, drive, strict=True)), e


def add(a: Any, b: Any) -> Any:
    """The sum of two pytrees."""
    return jax.tree.map(jnp.add, a, b)


def _combine(scale: Scale, factors: Any, states: Any, last: Any) -> Any:
    """last + sum over factors f of f times its state."""
    total = last
    for factor, state in zip(factors, states, strict=True):
        total = add(total, scale(factor, state))
    return total
