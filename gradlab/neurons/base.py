"""What every neuron shares: an elementwise recurrent cell with an explicit carry."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Scalar = float | tuple[float, ...]
"""A constant of a neuron: one number for the layer, or one per unit."""


class Subthreshold(NamedTuple):
    """The linear dynamics of a neuron that does not fire: (1) h_t = A h_{t-1} + B I_t.

    (2) c . A^n B is what a current moves in the spike variable (membrane minus threshold) n steps later.

    Nested tuples over the k states; every entry is an array of shape () (shared by the layer) or (units,).
    """

    A: tuple[tuple[Array, ...], ...]
    B: tuple[Array, ...]
    c: tuple[Array, ...]

    @property
    def gain(self) -> Array:
        """c . B: what one unit of current does to the spike variable at once."""
        return jnp.asarray(sum(c * b for c, b in zip(self.c, self.B, strict=True)))

    @property
    def shared(self) -> bool:
        """True when the layer has one set of constants, not one per unit."""
        return all(entry.ndim == 0 for entry in jax.tree.leaves(self))


class Neuron(nn.RNNCellBase):
    """An elementwise recurrent cell: `state, output = neuron.apply(variables, state, current)`.

    Unit i sees only its own state and its own current; the state is a tuple of k arrays of the current's shape. A new
    neuron writes `__call__`, `states` (the names of its k state variables) and, where the rules that need it shall
    work, `subthreshold` and `cut`; `point` and
    `at_point` together save memory and time. Because it is a Flax `RNNCellBase`, `nn.RNN(neuron)` works as it is.
    """

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state variables, in the order of the carry."""
        raise NotImplementedError

    @property
    def spiking(self) -> bool:
        """True when the output is a spike (0 or 1), False for a graded read-out."""
        return True

    @property
    def num_feature_axes(self) -> int:
        return 1

    def initialize_carry(self, rng: Array | None, input_shape: tuple[int, ...], dtype: Any = float) -> Any:
        """The state at rest: zeros. `rng` is part of Flax's interface and is not used.

        Flax's `nn.RNN` gives no dtype; the default is then JAX's own float, so that it runs in 64 bits too.
        """
        return tuple(jnp.zeros(input_shape, dtype) for _ in self.states)

    def subthreshold(self, params: dict[str, Any], dtype: Any) -> Subthreshold | None:
        """The constants of the neuron below threshold, or None when it has no such linear regime."""
        return None

    def point(self, carry: Any, inputs: Array) -> tuple[Array, ...]:
        """What a step with fixed constants depends on, in fewer arrays than (carry, inputs); () when there are none.

        A LIF's step depends on v = beta u + I alone, so that a recording of v is enough to linearise it again.
        """
        return ()

    @property
    def has_point(self) -> bool:
        """True for a class with an operating point of its own: one that changes the step that it inherited must write
        `point` and `at_point` anew, or has none.
        """
        names = ("__call__", "point", "at_point")
        step, *points = (next(k for k, cls in enumerate(type(self).__mro__) if name in vars(cls)) for name in names)
        return type(self).point is not Neuron.point and max(points) <= step

    def at_point(self, point: tuple[Array, ...]) -> tuple[Any, Array]:
        """A (carry, inputs) at which the step, and its derivatives, are those of the `point`."""
        raise NotImplementedError(f"{type(self).__name__} has point() but no at_point()")

    def cut(self, path: str) -> Neuron:
        """The same neuron with a path of its Jacobian stopped, forward values unchanged.

        `path` is "nothing", "reset" (the spike's effect on the membrane through the reset), "adaptation" (its effect on
        the neuron's adaptation, for those that adapt) or "spike" (every effect of the spike on the neuron's own next
        state).
        """
        if path in ("nothing", "adaptation"):
            return self
        if path not in ("reset", "spike"):
            raise ValueError(f'cut={path!r}: choose "nothing", "reset", "adaptation" or "spike"')
        if not self.spiking:
            return self
        if "detach_reset" not in self.__dataclass_fields__:
            raise NotImplementedError(f"{type(self).__name__} does not say how to cut {path!r}: give it a cut() method")
        return self.clone(detach_reset=True)

    def value(self, name: str, dtype: Any, params: dict[str, Any] | None = None) -> Array:
        """The constant `name`: fixed, or trained in a form that keeps it in its range.

        (1) beta-like constants in (0, 1):  value = 1 / (1 + exp(-<name>_logit))
        (2) thresholds > 0:                 value = exp(<name>_log)

        Inside `apply` the parameter is declared; outside, `params` holds the neuron's parameters.
        """
        constant = getattr(self, name)
        if name not in getattr(self, "trainable", ()):
            return jnp.asarray(constant, dtype)
        positive = name == "threshold"
        key = f"{name}_log" if positive else f"{name}_logit"
        if params is not None:
            raw = jnp.asarray(params[key], dtype)
        else:
            start = _inverse(constant, positive)
            raw = self.param(key, lambda _: jnp.asarray(start, dtype)).astype(dtype)
        return jnp.exp(raw) if positive else jax.nn.sigmoid(raw)

    def _validate(self, decays: tuple[str, ...]) -> None:
        """Refuse constants outside their range when the neuron is built."""
        who = type(self).__name__
        trainable = getattr(self, "trainable", ())
        known = (*decays, *(("threshold",) if hasattr(self, "threshold") else ()))
        if isinstance(trainable, str):
            raise TypeError(f"{who}(trainable={trainable!r}): give a tuple of names, ({trainable!r},)")
        for name in trainable:
            if name not in known:
                raise ValueError(f"{who}(trainable={trainable!r}): {name!r} cannot be trained; choose from {known}")
        for name in known:
            _check_constant(who, name, getattr(self, name), name in trainable)
        reset = getattr(self, "reset", "none")
        if reset not in ("subtract", "zero", "none"):
            raise ValueError(f'{who}(reset={reset!r}): choose "subtract", "zero" or "none"')
        surrogate = getattr(self, "surrogate", None)
        if isinstance(surrogate, type) or (surrogate is not None and not callable(surrogate)):
            raise TypeError(f"{who}(surrogate={surrogate!r}): give an instance such as gl.FastSigmoid(slope=25.0)")


def after_reset(v: Array, spike: Array, threshold: Array, reset: str, detach: bool) -> Array:
    """The membrane after a spike: v - threshold s ("subtract"), v (1 - s) ("zero"), or v ("none")."""
    if reset == "none":
        return v
    s = jax.lax.stop_gradient(spike) if detach else spike
    return v - threshold * s if reset == "subtract" else v * (1.0 - s)


def leak_from(tau: Scalar, dt: float) -> Scalar:
    """(1) beta = exp(-dt / tau), for one time constant or one per unit, in the same unit as dt."""
    if not dt > 0 or any(not t > 0 for t in _as_tuple(tau)):
        raise ValueError(f"from_time_constant(tau={tau!r}, dt={dt!r}): both must be positive, in the same unit")
    return tuple(math.exp(-dt / t) for t in tau) if isinstance(tau, tuple | list) else math.exp(-dt / tau)


def _as_tuple(value: Scalar) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _check_constant(who: str, name: str, value: Scalar, trained: bool) -> None:
    numbers = _as_tuple(value)
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
        raise TypeError(
            f"{who}({name}={value!r}): give a number, or a tuple with one number per unit "
            "(arrays cannot be hashed; write tuple(array.tolist()))"
        )
    for number in numbers:
        if name == "threshold":
            if not 0 < number < math.inf:
                raise ValueError(f"{who}(threshold={number!r}): the threshold must be positive")
        elif not (0 < number < 1 if trained else 0 <= number <= 1):
            bounds = "strictly between 0 and 1 to be trained" if trained else "between 0 and 1"
            raise ValueError(f"{who}({name}={number!r}): the decay factor of one time step must lie {bounds}")


def _inverse(value: Scalar, positive: bool) -> Any:
    def invert(number: float) -> float:
        return math.log(number) if positive else math.log(number / (1.0 - number))

    return [invert(number) for number in value] if isinstance(value, tuple | list) else invert(value)
