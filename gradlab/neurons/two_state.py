"""Neurons with two state variables: synaptic current, and adaptive threshold."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradlab.neurons.base import Neuron, Scalar, Subthreshold, after_reset
from gradlab.surrogates import FastSigmoid, Surrogate


class CurrentLIF(Neuron):
    """Leaky integrate-and-fire neuron with an exponentially decaying synaptic current; the carry is (membrane,
    current).

    (1) i_t = alpha i_{t-1} + I_t
    (2) v_t = beta u_{t-1} + i_t
    (3) s_t = H(v_t - threshold),   u_t = reset of v_t as in `LIF` (3); the synaptic current is not reset

    The membrane sees the current of the same step (the `Synaptic` neuron of snnTorch); some libraries delay it by one.

    Args:
        beta: share of the membrane left after one step; alpha: share of the synaptic current left after one step; both
            in [0, 1], one number or a tuple with one per unit.
        threshold, reset, detach_reset, surrogate: see `LIF`.
        trainable: any of "beta", "alpha", "threshold".
    """

    beta: Scalar = 0.95
    alpha: Scalar = 0.9
    threshold: Scalar = 1.0
    reset: str = "subtract"
    detach_reset: bool = False
    surrogate: Surrogate = FastSigmoid()
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=("beta", "alpha"))
        super().__post_init__()

    @property
    def states(self) -> tuple[str, ...]:
        return ("membrane", "current")

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        u, i = carry
        threshold = self.value("threshold", inputs.dtype)
        i = self.value("alpha", inputs.dtype) * i + inputs
        v = self.value("beta", inputs.dtype) * u + i
        s = self.surrogate(v - threshold)
        return (after_reset(v, s, threshold, self.reset, self.detach_reset), i), s

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold:
        alpha, beta = self.value("alpha", dtype, params), self.value("beta", dtype, params)
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        return Subthreshold(A=((beta, alpha), (zero, alpha)), B=(one, one), c=(one, zero))

    def point(self, carry: tuple[Array, Array], inputs: Array) -> tuple[Array, ...]:
        u, i = carry
        return u, self.value("alpha", inputs.dtype, {}) * i + inputs

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        u, i = point
        return (u, jnp.zeros_like(i)), i


class ALIF(Neuron):
    """Leaky integrate-and-fire neuron with an adaptive threshold; the carry is (membrane, adaptation).

    (1) v_t = beta u_{t-1} + I_t
    (2) s_t = H(v_t - threshold - adaptation_strength a_{t-1})
    (3) u_t = reset of v_t as in `LIF` (3), by the base threshold
    (4) a_t = adaptation_decay a_{t-1} + s_t

    This is the neuron of Bellec et al. (2020, doi 10.1038/s41467-020-17236-y); their a at time t is a_{t-1} here,
    because the carry is the state after the step.

    Args:
        beta: share of the membrane left after one step; adaptation_decay: share of the adaptation left; both in [0, 1],
            one number or a tuple with one per unit.
        adaptation_strength: how much the threshold rises per unit of adaptation (their beta).
        threshold, reset, detach_reset, surrogate: see `LIF`; detach_reset stops (3), not (4).
        detach_adaptation: stop the gradient that flows through s_t in (4).
        trainable: any of "beta", "adaptation_decay", "threshold".
    """

    beta: Scalar = 0.95
    adaptation_decay: Scalar = 0.98
    adaptation_strength: Scalar = 0.2
    threshold: Scalar = 1.0
    reset: str = "subtract"
    detach_reset: bool = False
    detach_adaptation: bool = False
    surrogate: Surrogate = FastSigmoid()
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=("beta", "adaptation_decay"))
        super().__post_init__()

    @property
    def states(self) -> tuple[str, ...]:
        return ("membrane", "adaptation")

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        u, a = carry
        threshold = self.value("threshold", inputs.dtype)
        v = self.value("beta", inputs.dtype) * u + inputs
        s = self.surrogate(v - threshold - self.value("adaptation_strength", inputs.dtype) * a)
        fed_back = jax.lax.stop_gradient(s) if self.detach_adaptation else s
        a = self.value("adaptation_decay", inputs.dtype) * a + fed_back
        return (after_reset(v, s, threshold, self.reset, self.detach_reset), a), s

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold:
        beta, decay = self.value("beta", dtype, params), self.value("adaptation_decay", dtype, params)
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        strength = self.value("adaptation_strength", dtype)
        return Subthreshold(A=((beta, zero), (zero, decay)), B=(one, zero), c=(one, -strength))

    def cut(self, path: str) -> Neuron:
        cut = super().cut(path)
        return cut.clone(detach_adaptation=True) if path in ("adaptation", "spike") else cut

    def point(self, carry: tuple[Array, Array], inputs: Array) -> tuple[Array, ...]:
        u, a = carry
        return self.value("beta", inputs.dtype, {}) * u + inputs, a

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        v, a = point
        return (jnp.zeros_like(v), a), v
