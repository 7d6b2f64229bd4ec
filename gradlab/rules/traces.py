"""Traces: how a local rule assigns credit over time inside one layer.

Each trace has two faces that are exact transposes of each other. `forward` advances the derivative of the layer's
output with
respect to its parameters, e_t = ds_t/d theta, by one step. `transpose` takes the learning signal backwards through the
same
linear recursion and returns delta_t, the error on the layer's current, so that sum_t L_t e_t = sum_t delta_t dI_t/d
theta.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.neurons import Subthreshold
from gradlab.rules import filters
from gradlab.tape import Jacobians

Scale = Callable[[Array, Any], Any]


@dataclasses.dataclass(frozen=True)
class Trace(abc.ABC):
    """Temporal credit inside one layer. `cut` names the variant of the neuron that is linearised (`Neuron.cut`)."""

    cut = "nothing"
    own = "none"
    slope = "instant"
    needs_subthreshold = False

    def inside(self, has_memory: bool) -> bool:
        """True when the surrogate slope is part of e_t; False when it may multiply the learning signal instead.

        The two agree without a memory, and outside is cheaper: the trace keeps the shape of the input.
        """
        return has_memory and self.slope == "instant"

    @abc.abstractmethod
    def states(self, own: Subthreshold | None, k: int) -> int:
        """How many state variables the trace keeps."""

    @abc.abstractmethod
    def forward(
        self, own: Subthreshold | None, h: Any, jac: Jacobians, drive: Any, direct: Any, scale: Scale, inside: bool
    ) -> tuple[Any, Any]:
        """(trace, e): one step; `drive` is per state dh/dI dI, `direct` is dI itself, `own` the sub-threshold
        filter.
        """

    @abc.abstractmethod
    def transpose(self, own: Subthreshold | None, p: Any, jac: Jacobians, signal: Array) -> tuple[Any, Array, Any]:
        """(p, delta, cotangent of h_t): one step backwards in time."""

    def outside(self, own: Subthreshold | None, jac: Jacobians, mean: Array | None) -> Array:
        """The factor of the learning signal when the slope is outside the trace."""
        return jac.D


@dataclasses.dataclass(frozen=True)
class NoTrace(Trace):
    """No temporal credit: (1) e_t = D_t dI_t   and (2) delta_t = D_t L_t."""

    def states(self, own: Subthreshold | None, k: int) -> int:
        return 0

    def forward(
        self, own: Subthreshold | None, h: Any, jac: Jacobians, drive: Any, direct: Any, scale: Scale, inside: bool
    ) -> tuple[Any, Any]:
        return (), scale(jac.D, direct) if inside else direct

    def transpose(self, own: Subthreshold | None, p: Any, jac: Jacobians, signal: Array) -> tuple[Any, Array, Any]:
        return (), jac.D * signal, tuple(jnp.zeros_like(signal) for _ in jac.B)


@dataclasses.dataclass(frozen=True)
class JacobianTrace(Trace):
    """The neuron's own Jacobian, spikes and resets included.

    (1) E_t = A_t E_{t-1} + B_t dI_t,   e_t = C_t E_{t-1} + D_t dI_t
    (2) delta_t = B_t . p_t + D_t L_t,   p_{t-1} = A_t^T p_t + C_t L_t
    (3) own="full":  dI_t -> dI_t + R e_{t-1},   L_t -> L_t + R^T delta_{t+1},   R the layer's link to itself

    Args:
        cut: "nothing", "reset" or "spike": which path of the neuron's own Jacobian is stopped.
        own: "none" leaves the layer's link to itself out, "full" keeps it.
    """

    cut: str = "nothing"
    own: str = "none"

    def __post_init__(self):
        if self.cut not in ("nothing", "reset", "spike"):
            raise ValueError(f'JacobianTrace(cut={self.cut!r}): choose "nothing", "reset" or "spike"')
        if self.own not in ("none", "full"):
            raise ValueError(f'JacobianTrace(own={self.own!r}): choose "none" or "full"')

    def inside(self, has_memory: bool) -> bool:
        return True

    def states(self, own: Subthreshold | None, k: int) -> int:
        return k

    def forward(
        self, own: Subthreshold | None, h: Any, jac: Jacobians, drive: Any, direct: Any, scale: Scale, inside: bool
    ) -> tuple[Any, Any]:
        def combine(row, last):
            total = last
            for factor, state in zip(row, h, strict=True):
                total = add(total, scale(factor, state))
            return total

        e = combine(jac.C, scale(jac.D, direct))
        return tuple(combine(row, d) for row, d in zip(jac.A, drive, strict=True)), e

    def transpose(self, own: Subthreshold | None, p: Any, jac: Jacobians, signal: Array) -> tuple[Any, Array, Any]:
        delta = jac.D * signal
        for b, p_i in zip(jac.B, p, strict=True):
            delta = delta + b * p_i
        k = range(len(p))
        before = tuple(sum((jac.A[i][j] * p[i] for i in k), jac.C[j] * signal) for j in k)
        return before, delta, p


@dataclasses.dataclass(frozen=True)
class SubthresholdTrace(Trace):
    """The neuron's constants below threshold: spikes and resets leave the trace alone, so it has the shape of the
    input.

    (1) a_t = A0 a_{t-1} + B0 dI_t,   e_t = psi_t c0 . a_t,   psi_t = D_t / (c0 . B0)
    (2) delta_t = B0 . lambda_t,   lambda_t = c0 psi_t L_t + A0^T lambda_{t+1}

    slope="leaky_mean" replaces psi_t by its running mean under the memory's filter, multiplied onto the signal.
    """

    slope: str = "instant"
    needs_subthreshold = True

    def __post_init__(self):
        if self.slope not in ("instant", "leaky_mean"):
            raise ValueError(f'SubthresholdTrace(slope={self.slope!r}): choose "instant" or "leaky_mean"')

    def states(self, own: Subthreshold | None, k: int) -> int:
        assert own is not None
        return len(own.B)

    def forward(
        self, own: Subthreshold | None, h: Any, jac: Jacobians, drive: Any, direct: Any, scale: Scale, inside: bool
    ) -> tuple[Any, Any]:
        assert own is not None
        h, e = filters.forward(own, h, direct, scale)
        return h, scale(jac.D / own.gain, e) if inside else e

    def transpose(self, own: Subthreshold | None, p: Any, jac: Jacobians, signal: Array) -> tuple[Any, Array, Any]:
        assert own is not None
        # With the leaky mean the signal has been multiplied already, before the memory's filter.
        weighted = (signal if self.slope == "leaky_mean" else signal * jac.D) / own.gain
        p, delta = filters.transpose(own, p, weighted)
        return p, delta, ()

    def outside(self, own: Subthreshold | None, jac: Jacobians, mean: Array | None) -> Array:
        assert own is not None
        slope = jac.D if mean is None or self.slope == "instant" else mean
        return slope / own.gain


def add(a: Any, b: Any) -> Any:
    """The sum of two pytrees."""
    return jax.tree.map(jnp.add, a, b)
