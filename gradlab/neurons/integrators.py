"""Neurons with one state variable: integrate-and-fire, leaky integrate-and-fire, and the leaky read-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gradlab.neurons.base import Neuron, Scalar, Subthreshold, after_reset, leak_from
from gradlab.surrogates import FastSigmoid, Surrogate


class LIF(Neuron):
    """Leaky integrate-and-fire neuron; the carry holds the membrane after the reset.

    (1) v_t = beta u_{t-1} + I_t
    (2) s_t = H(v_t - threshold)                       slope ds/dv = surrogate(v_t - threshold)
    (3) u_t = v_t - threshold s_t                      reset="subtract"
        u_t = v_t (1 - s_t)                            reset="zero"
        u_t = v_t                                      reset="none"

    The input is not scaled by (1 - beta) and the reset acts in the step of the spike, as in Slax, and in SpikingJelly
    with `decay_input=False`. A neuron at its threshold fires (>=).

    Args:
        beta: share of the membrane that is left after one step, in [0, 1]; one number or a tuple with one per unit.
        threshold: membrane at which the neuron fires, > 0; one number or a tuple with one per unit.
        reset: "subtract" (soft), "zero" (hard) or "none".
        detach_reset: stop the gradient that flows through s_t in (3).
        surrogate: slope of the spike.
        trainable: which of "beta" and "threshold" are parameters; they are stored as `beta_logit` and `threshold_log`.

    Raises:
        ValueError: a constant outside its range, an unknown reset or trainable name.
    """

    beta: Scalar = 0.95
    threshold: Scalar = 1.0
    reset: str = "subtract"
    detach_reset: bool = False
    surrogate: Surrogate = FastSigmoid()
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=("beta",))
        super().__post_init__()

    @classmethod
    def from_time_constant(cls, tau: Scalar, dt: float, **settings: Any) -> LIF:
        """A LIF with (1) beta = exp(-dt / tau); tau and dt in the same unit of time."""
        return cls(beta=leak_from(tau, dt), **settings)

    @property
    def states(self) -> tuple[str, ...]:
        return ("membrane",)

    @nn.compact
    def __call__(self, carry: tuple[Array], inputs: Array) -> tuple[tuple[Array], Array]:
        (u,) = carry
        threshold = self.value("threshold", inputs.dtype)
        v = self.value("beta", inputs.dtype) * u + inputs
        s = self.surrogate(v - threshold)
        return (after_reset(v, s, threshold, self.reset, self.detach_reset),), s

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold:
        one = jnp.ones((), dtype)
        return Subthreshold(A=((self.value("beta", dtype, params),),), B=(one,), c=(one,))

    def point(self, carry: tuple[Array], inputs: Array) -> tuple[Array, ...]:
        return (self.value("beta", inputs.dtype, {}) * carry[0] + inputs,)

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        return (jnp.zeros_like(point[0]),), point[0]


class IF(Neuron):
    """Integrate-and-fire neuron: `LIF` without a leak.

    (1) v_t = u_{t-1} + I_t,   s_t = H(v_t - threshold),   u_t = reset of v_t as in `LIF` (3)

    Args: see `LIF`; only the threshold can be trained.
    """

    threshold: Scalar = 1.0
    reset: str = "subtract"
    detach_reset: bool = False
    surrogate: Surrogate = FastSigmoid()
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=())
        super().__post_init__()

    @property
    def states(self) -> tuple[str, ...]:
        return ("membrane",)

    @nn.compact
    def __call__(self, carry: tuple[Array], inputs: Array) -> tuple[tuple[Array], Array]:
        (u,) = carry
        threshold = self.value("threshold", inputs.dtype)
        v = u + inputs
        s = self.surrogate(v - threshold)
        return (after_reset(v, s, threshold, self.reset, self.detach_reset),), s

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold:
        one = jnp.ones((), dtype)
        return Subthreshold(A=((one,),), B=(one,), c=(one,))

    def point(self, carry: tuple[Array], inputs: Array) -> tuple[Array, ...]:
        return (carry[0] + inputs,)

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        return (jnp.zeros_like(point[0]),), point[0]


class LI(Neuron):
    """Leaky integrator, the usual graded read-out: no spike, no reset.

    (1) y_t = beta y_{t-1} + I_t,   output y_t

    Args:
        beta: share of the read-out that is left after one step, in [0, 1]; one number or a tuple with one per unit.
        trainable: ("beta",) to train it.
    """

    beta: Scalar = 0.95
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=("beta",))
        super().__post_init__()

    @classmethod
    def from_time_constant(cls, tau: Scalar, dt: float, **settings: Any) -> LI:
        """A leaky integrator with (1) beta = exp(-dt / tau); tau and dt in the same unit of time."""
        return cls(beta=leak_from(tau, dt), **settings)

    @property
    def states(self) -> tuple[str, ...]:
        return ("membrane",)

    @property
    def spiking(self) -> bool:
        return False

    @nn.compact
    def __call__(self, carry: tuple[Array], inputs: Array) -> tuple[tuple[Array], Array]:
        (y,) = carry
        y = self.value("beta", inputs.dtype) * y + inputs
        return (y,), y

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold:
        one = jnp.ones((), dtype)
        return Subthreshold(A=((self.value("beta", dtype, params),),), B=(one,), c=(one,))

    def point(self, carry: tuple[Array], inputs: Array) -> tuple[Array, ...]:
        return (self.value("beta", inputs.dtype, {}) * carry[0] + inputs,)

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        return (jnp.zeros_like(point[0]),), point[0]


class LeakyRate(Neuron):
    """Leaky rate unit: no spike, no reset.

    (1) r_t = (1 - rate) r_{t-1} + rate activation(I_t),   output r_t

    Args:
        rate: share of the new value in one step, 1 / tau for a time constant tau in steps; in [0, 1]; one number or a
            tuple with one per unit.
        activation: a function such as `jnp.tanh` or `jax.nn.relu`, applied to each unit.
        trainable: ("rate",) to train it.
    """

    rate: Scalar = 0.1
    activation: Callable[[Array], Array] = jnp.tanh
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self._validate(decays=("rate",))
        super().__post_init__()

    @property
    def states(self) -> tuple[str, ...]:
        return ("activity",)

    @property
    def spiking(self) -> bool:
        return False

    @nn.compact
    def __call__(self, carry: tuple[Array], inputs: Array) -> tuple[tuple[Array], Array]:
        (r,) = carry
        rate = self.value("rate", inputs.dtype)
        r = (1.0 - rate) * r + rate * self.activation(inputs)
        return (r,), r
