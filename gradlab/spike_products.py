"""Matrix products of spikes on units that multiply bfloat16 numbers: exact inputs, weights in two or three parts.

`nn.Dense(128, dot_general=SpikeProducts(parts=3))` is a Dense layer whose products run in bfloat16 with float32 sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from gradlab.linear import FORWARD, TO_INPUTS, TO_WEIGHTS, is_dense_layer, linear


@dataclasses.dataclass(frozen=True)
class SpikeProducts:
    """A `dot_general` for Flax's Dense: products x W of spikes x, float32 in and out, multiplied in bfloat16.

    A spike (0 or 1, or a whole number up to 256) is the same number in bfloat16, and a float32 number y is, to its last
    bit, a sum of three bfloat16 numbers:

    (1) y_1 = bf16(y),   y_2 = bf16(y - y_1),   y_3 = bf16(y - y_1 - y_2)                  8, 16 or 24 bits of y
    (2) x W       = sum_j x W_j,                                 j = 1..parts               (current, x exact)
    (3) x^T delta = sum_j x^T delta_j,                           j = 1..parts               (weights' gradient, x exact)
    (4) delta W^T = sum_{i + j <= parts + 1} delta_i W_j^T                                  (error handed down)

    with every product summed in float32, small terms first. parts=1 is plain mixed precision: states and sums in
    float32, products in bfloat16. parts=2 leaves relative errors of about 2^-17 in a weight; parts=3 is as good as
    float32. Products: (2) and (3) take `parts`, (4) takes 1, 3 or 6. It pays on hardware that multiplies bfloat16
    faster than float32 by more than that number: measure it. Forward mode, reverse mode, `jax.vmap` and their
    combinations work; second derivatives with respect to inputs and weights at once are computed in float32.

    **Inputs that are not exact** in bfloat16 (analog inputs, traces, spikes scaled by dropout) make every result NaN,
    or raise ValueError where their values are known, because a wrong number would look right. For them there is
    `exact_inputs=False`, which splits the inputs too, as (4) does, at its number of products.

    Splitting float32 into bfloat16 parts: Henry, Tang & Heinecke (2019), arXiv:1904.06376.

    Args:
        parts: bfloat16 parts of a float32 number, 1, 2 or 3.
        exact_inputs: the left factor's values are exact in bfloat16.

    Raises:
        ValueError: another number of parts; when called, factors that are not inputs [..., features] times weights
            [features, units], a precision, or known inputs that are not exact.
        TypeError: when called, factors that are not float32.
    """

    parts: int = 3
    exact_inputs: bool = True

    def __post_init__(self):
        if self.parts not in (1, 2, 3) or isinstance(self.parts, bool):
            raise ValueError(f"SpikeProducts(parts={self.parts!r}): choose 1, 2 or 3")

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Array:
        """The product of inputs [..., features] and weights [features, units]; arguments as `lax.dot_general`'s."""
        self._check(lhs, rhs, dimension_numbers, precision, preferred_element_type)
        product = _product(self, lhs.reshape(-1, lhs.shape[-1]), rhs)
        return product.reshape(*lhs.shape[:-1], rhs.shape[1])

    def _check(self, lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any, element: Any) -> None:
        if not is_dense_layer(lhs, rhs, dimension_numbers):
            raise ValueError(
                f"SpikeProducts multiplies inputs [..., features] and weights [features, units], not {lhs.shape} and "
                f"{rhs.shape} over {dimension_numbers}: use it in nn.Dense"
            )
        if any(dtype != jnp.float32 for dtype in (lhs.dtype, rhs.dtype, element or jnp.float32)):
            raise TypeError(
                f"SpikeProducts gives products of float32 numbers, not of {lhs.dtype} and {rhs.dtype}: leave out "
                "dot_general for other types"
            )
        if precision is not None:
            raise ValueError(f"SpikeProducts(parts={self.parts}) is a precision itself: leave out {precision!r}")
        if self.exact_inputs and _is_known_to_differ(lhs):
            raise ValueError(
                "the inputs of SpikeProducts are no spikes: some are not exact in bfloat16. For analog inputs give "
                "SpikeProducts(exact_inputs=False)"
            )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(how: SpikeProducts, x: Array, weights: Array) -> Array:
    return _split_product(how.parts, x, weights, FORWARD, how.exact_inputs)


def _product_jvp(how: SpikeProducts, primals: Any, tangents: Any) -> tuple[Array, Any]:
    (x, weights), (dx, dweights) = primals, tangents
    moved = []
    if not isinstance(dx, SymbolicZero):
        moved.append(_of_inputs(how, weights, dx))
    if not isinstance(dweights, SymbolicZero):
        moved.append(_of_weights(how, x, dweights))
    out = _product(how, x, weights)
    return out, sum(moved[1:], moved[0]) if moved else jnp.zeros_like(out)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _of_weights(how: SpikeProducts, x: Array, moved: Array) -> Array:
    """x times a change of the weights; transposed, (3)."""
    return linear(
        lambda w: lax.dot_general(x, w, FORWARD, precision="highest"),
        lambda w: _split_product(how.parts, x, w, FORWARD, how.exact_inputs),
        lambda delta: _split_product(how.parts, x, delta, TO_WEIGHTS, how.exact_inputs),
        moved,
        (x.shape[0], moved.shape[1]),
    )


def _of_inputs(how: SpikeProducts, weights: Array, moved: Array) -> Array:
    """A change of the inputs, which is no spike, times the weights; transposed, (4)."""
    return linear(
        lambda x: lax.dot_general(x, weights, FORWARD, precision="highest"),
        lambda x: _split_product(how.parts, x, weights, FORWARD, False),
        lambda delta: _split_product(how.parts, delta, weights, TO_INPUTS, False),
        moved,
        (moved.shape[0], weights.shape[1]),
    )


def _split_product(parts: int, left: Array, right: Array, axes: Any, exact: bool) -> Array:
    """(2), (3) with `exact`, where the left factor is a bfloat16 number already; (4) without."""
    if exact:
        right = jnp.where(_is_exact(left), right, jnp.nan)
    lefts = [left.astype(jnp.bfloat16)] if exact else _split(left, parts)
    rights = _split(right, parts)
    pairs = [(i, j) for i in range(len(lefts)) for j in range(parts) if i + j < parts]
    pairs.sort(key=lambda pair: -sum(pair))
    dot = _dot(axes)
    terms = [dot(lefts[i], rights[j]) for i, j in pairs]
    return sum(terms[1:], terms[0])


def _dot(axes: Any) -> Callable[[Array, Array], Array]:
    """The product of two bfloat16 matrices in float32.

    XLA's CPU compiler lacks it for some of the forms that `vmap` makes of it; there the same numbers are multiplied as
    float32, which gives the same products.
    """

    def of_parts(left: Array, right: Array) -> Array:
        return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)

    def widened(left: Array, right: Array) -> Array:
        return lax.dot_general(left.astype(jnp.float32), right.astype(jnp.float32), axes, precision="highest")

    dot = jax.custom_batching.custom_vmap(of_parts)

    @dot.def_vmap
    def _(size: int, batched: list[bool], left: Array, right: Array) -> tuple[Array, bool]:
        along = tuple(0 if one else None for one in batched)
        cpu, other = (jax.vmap(product, in_axes=along) for product in (widened, of_parts))
        return lax.platform_dependent(left, right, cpu=cpu, default=other), True

    return dot


def _split(y: Array, parts: int) -> list[Array]:
    """(1). Not by `astype` alone: compilers may take a number that was rounded and widened for the number itself."""
    found = []
    for _ in range(parts):
        rounded = _rounded(y)
        found.append(rounded.astype(jnp.bfloat16))
        y = y - rounded
    return found


def _rounded(y: Array) -> Array:
    """y rounded to bfloat16, as float32."""
    return lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)


def _is_exact(x: Array) -> Array:
    return jnp.all(_rounded(x) == x)


def _is_known_to_differ(x: Array) -> bool:
    """True when the values are known, and not exact in bfloat16."""
    if isinstance(x, jax.core.Tracer):
        return False
    with jax.ensure_compile_time_eval():
        return not bool(_is_exact(x))
