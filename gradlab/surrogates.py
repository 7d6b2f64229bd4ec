"""Surrogate spike functions: a step forwards, a smooth slope backwards.

A spike is s = H(x) with x the distance of the membrane from its threshold. Its true derivative is zero almost
everywhere, so learning replaces it by a surrogate slope psi(x) = ds/dx (Neftci, Mostafa & Zenke 2019, doi
10.1109/MSP.2019.2931595). Each class here is a frozen dataclass built on `jax.custom_jvp`: forward mode and reverse
mode give the same surrogate answer, and the slope is itself differentiable. Second derivatives of a network are another
matter (`gradlab.analysis.hessian`): through a scan, orders of differentiation differ between versions of JAX.

To add one: subclass `Surrogate` as a frozen dataclass and write `slope_at`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fire(surrogate: Surrogate, x: Array) -> Array:
    return surrogate.spike(x)


@_fire.defjvp
def _fire_jvp(surrogate, primals, tangents):
    (x,), (dx,) = primals, tangents
    return _fire(surrogate, x), surrogate.slope_at(x) * dx


@dataclasses.dataclass(frozen=True)
class Surrogate(abc.ABC):
    """A spike function: called on x = membrane - threshold it gives s = H(x), with H(0) = 1, in x's dtype."""

    def __call__(self, x: Array) -> Array:
        return _fire(self, x)

    def spike(self, x: Array) -> Array:
        """The value s. Override it only for a smooth spike, as the finite-difference proofs do."""
        return (x >= 0).astype(x.dtype)

    @abc.abstractmethod
    def slope_at(self, x: Array) -> Array:
        """The surrogate derivative psi(x), of x's shape and dtype."""

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{type(self).__name__}({name}={value!r}): {name} must be positive")


@dataclasses.dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """(1) psi(x) = 1 / (slope |x| + 1)^2, the SuperSpike slope with peak 1 at x = 0.

    Zenke & Ganguli 2018, doi 10.1162/neco_a_01086. The area is 2 / slope.
    """

    slope: float = 25.0

    def __post_init__(self):
        self._require_positive("slope")

    def slope_at(self, x: Array) -> Array:
        root = 1.0 / (self.slope * jnp.abs(x) + 1.0)
        return root * root


@dataclasses.dataclass(frozen=True)
class Arctan(Surrogate):
    """(1) psi(x) = (slope / 2) / (1 + (pi slope x / 2)^2), the derivative of arctan(pi slope x / 2) / pi + 1/2.

    Fang et al. 2021, doi 10.1109/ICCV48922.2021.00266. Other libraries leave out factors of this form; the area here is
    one.
    """

    slope: float = 2.0

    def __post_init__(self):
        self._require_positive("slope")

    def slope_at(self, x: Array) -> Array:
        return (self.slope / 2.0) / (1.0 + jnp.square(math.pi / 2.0 * self.slope * x))


@dataclasses.dataclass(frozen=True)
class Sigmoid(Surrogate):
    """(1) psi(x) = slope p (1 - p),  p = 1 / (1 + exp(-slope x)).   Written through p so that it never overflows."""

    slope: float = 4.0

    def __post_init__(self):
        self._require_positive("slope")

    def slope_at(self, x: Array) -> Array:
        # sigmoid(-|z|) keeps the factor that vanishes exact: 1 - sigmoid(z) would round to zero for z > 17 in float32.
        small = jax.nn.sigmoid(-jnp.abs(self.slope * x))
        return self.slope * small * (1.0 - small)


@dataclasses.dataclass(frozen=True)
class Triangular(Surrogate):
    """(1) psi(x) = height max(0, 1 - |x| / width).

    Bellec et al. 2020, doi 10.1038/s41467-020-17236-y, use height 0.3. The area is height * width.
    """

    height: float = 1.0
    width: float = 1.0

    def __post_init__(self):
        self._require_positive("height", "width")

    def slope_at(self, x: Array) -> Array:
        return self.height * jnp.maximum(0.0, 1.0 - jnp.abs(x) / self.width)


@dataclasses.dataclass(frozen=True)
class MultiGaussian(Surrogate):
    """(1) psi(x) = height [ (1 + h) N(x; 0, sigma) - h N(x; sigma, s sigma) - h N(x; -sigma, s sigma) ]

    with N(x; mean, deviation) the normal density, `h` the depth of the negative side lobes and `s` their relative width
    (Yin, Corradi & Bohte 2021, doi 10.1038/s42256-021-00397-w). The slope is negative in the side lobes.
    """

    sigma: float = 0.5
    h: float = 0.15
    s: float = 6.0
    height: float = 0.5

    def __post_init__(self):
        self._require_positive("sigma", "s", "height")

    def slope_at(self, x: Array) -> Array:
        def normal(mean: float, deviation: float) -> Array:
            return jnp.exp(-0.5 * jnp.square((x - mean) / deviation)) / (math.sqrt(2.0 * math.pi) * deviation)

        wide = self.s * self.sigma
        lobes = normal(self.sigma, wide) + normal(-self.sigma, wide)
        return self.height * ((1.0 + self.h) * normal(0.0, self.sigma) - self.h * lobes)


SURROGATES = (FastSigmoid, Arctan, Sigmoid, Triangular, MultiGaussian)
"""The spikes of this module."""
