"""Matrix products that are computed in a way of their own, and that JAX can still differentiate as linear functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

FORWARD = (((1,), (0,)), ((), ()))
TO_INPUTS = (((1,), (1,)), ((), ()))
TO_WEIGHTS = (((0,), (0,)), ((), ()))


def is_dense_layer(lhs: Array, rhs: Array, dimension_numbers: Any) -> bool:
    """True for the product of a Dense layer: inputs [..., features] and weights [features, units]."""
    (contracted, batched) = jax.tree.map(int, dimension_numbers)
    dense = ((lhs.ndim - 1,), (0,)), ((), ())
    return rhs.ndim == 2 and (tuple(map(tuple, contracted)), tuple(map(tuple, batched))) == dense


def linear(exact: Any, forward: Any, transposed: Any, x: Array, shape: tuple[int, int]) -> Array:
    """`forward(x)` as a linear function of x whose transpose is `transposed`.

    Rounding, or a call of compiled code, hides from JAX that products are linear, and that they are each other's
    transposes. Its one function that is told so, and knows forward mode, reverse mode and `vmap`, solves linear
    equations: these,

    (1) u = x,   v - exact(u) = 0

    have the solution v = exact(x), found by putting the first line into the second.
    """
    # Each side must depend on x and be depended on: an empty corner of x padded with zeros does, at no cost.
    u, v = lax.custom_linear_solve(
        lambda unknown: (unknown[0], unknown[1] - exact(unknown[0])),
        (x, _nothing_of(x, shape)),
        solve=lambda _, right: (right[0], right[1] + forward(right[0])),
        transpose_solve=lambda _, right: (right[0] + transposed(right[1]), right[1]),
    )
    return v + _nothing_of(u, shape)


def _nothing_of(x: Array, shape: tuple[int, int]) -> Array:
    """Zeros that JAX takes for a function of x."""
    return lax.pad(x[:0, :0], jnp.zeros((), x.dtype), [(0, size, 0) for size in shape])
