"""Second derivatives of a network's loss as matrix-free products, and how far they may be trusted.

A spiking network has two second derivatives, because the spike's step and its surrogate slope psi are no function
and its derivative:

    "surrogate"  (1)  H v = d/d theta [ d L(theta + e v) / d e at e = 0 ]
        Both derivatives treat the spike as a function with slope psi and curvature psi'. At each theta this is the
        Hessian of the smooth network that has these values and slopes there, so H is symmetric (a step s, a slope
        psi and a curvature psi' are the Taylor coefficients of some function). It is what differentiating
        twice gives in most software, and no function has it as its Hessian everywhere.
    "field"      (2)  J v = d g(theta + e v) / d e at e = 0,    g: the gradient that learning uses
        The derivative of the surrogate gradient as it is: between two jumps the spikes do not change, only the
        slopes do. Because g is not the gradient of any function, J is not symmetric. Its eigenvalues here are
        those of the symmetric part (J + J^T) / 2, which give v^T J v.

Without spikes, and with a smooth spike that is its own surrogate, both are the Hessian of the loss. Neither sees
the jumps that g makes where a spike appears or vanishes. Therefore every result carries two numbers, measured on
random v:

    (3)  asymmetry = ||H v - H^T v|| / ||H v||
    (4)  mismatch  = ||H v - [g(theta + e v) - g(theta - e v)] / (2 e)|| / ||H v||,   ||e v|| = step * ||theta||

(4) says how well the products foretell the change of the gradient over a step of that length: at 1 no better than
zero would, above 1 worse. That is not rare. Where many spikes lie near their threshold, and a surrogate is steep, the
jumps rule the gradient's change at every step length, and a spectrum is one of the surrogate, not of the loss.

The order of the derivatives matters for more than speed. JAX's rule for a custom derivative inside a scan, which a
network over time is, is forgotten by the backward sweep in some versions: `jax.jvp(jax.grad(L))` is (2) for
jax 0.10 and (1) for jax 0.12. Products here are written so that every version gives the same: (1) forwards first and
backwards last; (2) with a spike whose own value has its true derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gradlab.analysis.objective import LossOfParams, NetworkLoss, compiled, scalar
from gradlab.analysis.trees import Params, flat, require_same_shapes, unflat
from gradlab.network import Network
from gradlab.surrogates import Surrogate

Derivative = Literal["surrogate", "field"]

STEP = 1e-3
"""Length of the step of equation (4), as a share of the length of the parameters."""


class Trust(NamedTuple):
    """How far second derivatives may be trusted: equations (3) and (4), root mean squares over random vectors."""

    asymmetry: float
    mismatch: float
    step: float


class Products:
    """Products with the second derivative at fixed parameters, on flat vectors [n] of float64.

    Args:
        loss_of_params: a function from parameters to a scalar; "field" needs one of `loss_function(net, batch, loss)`.
        params: the point.
        derivative: "surrogate", equation (1), or "field", equation (2).

    Raises:
        ValueError: for an unknown derivative, parameters that are not finite or of several types, a loss that is no
            scalar, or "field" with a function whose spikes cannot be reached.
    """

    def __init__(self, loss_of_params: LossOfParams, params: Params, derivative: Derivative = "surrogate") -> None:
        function = _prepared(loss_of_params, derivative)
        self.derivative: Derivative = derivative
        self._product = compiled(_product, function, derivative=derivative)
        self._transposed = compiled(_transposed, function, derivative=derivative)
        self._gradient = compiled(_gradient, function)
        self.move_to(params)

    def move_to(self, params: Params) -> None:
        """Go to other parameters of the same shapes, without compiling again."""
        self.params = jax.tree.map(jnp.asarray, params)
        self.point = flat(self.params)
        if len({leaf.dtype for leaf in jax.tree.leaves(self.params)}) != 1:
            raise ValueError("the parameters are of several types: cast them to one, float32 or float64")
        if not np.isfinite(self.point).all():
            raise ValueError("the parameters are not finite: curvature is not defined here")

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.point.size

    @property
    def epsilon(self) -> float:
        """Round-off of one product, relative."""
        return float(jnp.finfo(jax.tree.leaves(self.params)[0].dtype).eps)

    def product(self, v: np.ndarray) -> np.ndarray:
        """H v."""
        return flat(self._product(self.params, unflat(v, self.params)))

    def transposed(self, v: np.ndarray) -> np.ndarray:
        """H^T v."""
        return flat(self._transposed(self.params, unflat(v, self.params)))

    def symmetric(self, v: np.ndarray) -> np.ndarray:
        """(H + H^T) v / 2. For "surrogate" that is H v."""
        if self.derivative == "surrogate":
            return self.product(v)
        return 0.5 * (self.product(v) + self.transposed(v))

    def gradient(self, at: np.ndarray | None = None) -> np.ndarray:
        """The surrogate gradient g, here or at the flat parameters `at`."""
        return flat(self._gradient(self.params if at is None else unflat(at, self.params)))

    def measured(self, v: np.ndarray, step: float = STEP) -> np.ndarray:
        """The change of the gradient along v, [g(theta + e v) - g(theta - e v)] / (2 e) of equation (4)."""
        e = step * (float(np.linalg.norm(self.point)) or 1.0) / float(np.linalg.norm(v))
        with np.errstate(invalid="ignore"):  # infinite minus infinite: `trust` looks
            return (self.gradient(self.point + e * v) - self.gradient(self.point - e * v)) / (2 * e)

    def trust(self, seed: int = 0, vectors: int = 2, step: float = STEP) -> Trust:
        """Measure equations (3) and (4); NaN where the second derivative is zero. ValueError if it is not finite."""
        random = np.random.default_rng(seed)
        skew, gap, total = 0.0, 0.0, 0.0
        for v in random.normal(size=(vectors, self.size)):
            hv = self.product(v)
            if not np.isfinite(hv).all():
                raise ValueError("the second derivative is not finite at these parameters: is the loss?")
            beside = self.measured(v, step)
            skew += float(np.sum((hv - self.transposed(v)) ** 2))
            # A gradient that is not finite a step away was not foretold.
            gap += float(np.sum((hv - beside) ** 2)) if np.isfinite(beside).all() else float("inf")
            total += float(np.sum(hv**2))
        if total == 0:
            return Trust(float("nan"), float("nan"), step)
        return Trust(float(np.sqrt(skew / total)), float(np.sqrt(gap / total)), step)


def hessian_product(
    loss_of_params: LossOfParams, params: Params, derivative: Derivative = "surrogate", transpose: bool = False
) -> Callable[[Params], Params]:
    """The function v -> H v at `params`, or v -> H^T v; v and the answer are trees like `params`.

    Args:
        loss_of_params: a function from parameters to a scalar that JAX can trace.
        params: the point at which the derivatives are taken.
        derivative: "surrogate" or "field", equations (1) and (2); "field" needs `loss_function(net, batch, loss)`.
        transpose: H^T v in the place of H v. For "surrogate" both are the same up to round-off.

    Raises:
        ValueError: for an unknown derivative, or a direction unlike the parameters.
    """
    function = _prepared(loss_of_params, derivative)
    run = compiled(_transposed if transpose else _product, function, derivative=derivative)

    def product(v: Params) -> Params:
        require_same_shapes(params, v, "the direction")
        return run(params, jax.tree.map(lambda p, d: jnp.asarray(d, jnp.asarray(p).dtype), params, v))

    return product


def _product(loss_of_params: LossOfParams, params: Params, v: Params, derivative: Derivative) -> Params:
    if derivative == "field":
        return jax.jvp(partial(_gradient, loss_of_params), (params,), (v,))[1]

    def slope(p: Params) -> jax.Array:
        return jax.jvp(lambda q: scalar(loss_of_params(q)), (p,), (v,))[1]

    return jax.grad(slope)(params)


def _transposed(loss_of_params: LossOfParams, params: Params, v: Params, derivative: Derivative) -> Params:
    # The product is linear in its direction; the transpose of that very map, whatever it is.
    zero = jax.tree.map(jnp.zeros_like, v)
    return jax.vjp(lambda u: _product(loss_of_params, params, u, derivative), zero)[1](v)[0]


def _gradient(loss_of_params: LossOfParams, params: Params) -> Params:
    return jax.grad(lambda p: scalar(loss_of_params(p)))(params)


def _prepared(loss_of_params: LossOfParams, derivative: Derivative) -> LossOfParams:
    if derivative not in get_args(Derivative):
        raise ValueError(f"derivative={derivative!r}: there are 'surrogate' and 'field'")
    if derivative == "surrogate":
        return loss_of_params
    if not isinstance(loss_of_params, NetworkLoss):
        raise ValueError(
            "derivative='field' needs to know where the spikes are: give loss_function(net, batch, loss), or take "
            "derivative='surrogate', which is the same for a function without spikes"
        )
    return dataclasses.replace(loss_of_params, net=_with_true_spikes(loss_of_params.net))


def _with_true_spikes(net: Network) -> Network:
    def changed(neuron: Any) -> Any:
        surrogate = getattr(neuron, "surrogate", None)
        if not (isinstance(neuron, nn.Module) and isinstance(surrogate, Surrogate)):
            return neuron
        return neuron.clone(surrogate=_TrueSpike(surrogate))

    return dataclasses.replace(net, neurons=tuple(changed(neuron) for neuron in net.neurons))


@dataclasses.dataclass(frozen=True)
class _TrueSpike(Surrogate):
    """A surrogate whose slope counts in the first derivative only; in the second the spike has its true one, zero."""

    base: Surrogate

    def __call__(self, x: jax.Array) -> jax.Array:
        return _fire_once(self.base, x)

    def slope_at(self, x: jax.Array) -> jax.Array:
        return self.base.slope_at(x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fire_once(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    return surrogate.spike(x)


@_fire_once.defjvp
def _fire_once_jvp(surrogate, primals, tangents):
    (x,), (dx,) = primals, tangents
    return surrogate.spike(x), surrogate.slope_at(x) * dx
