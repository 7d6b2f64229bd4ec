"""Matrix products of sparse spikes on a CPU: only the rows that a spike selects are added up.

`nn.Dense(512, dot_general=SparseProducts())` is a Dense layer whose products skip the zeros of its inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from gradlab.linear import FORWARD, TO_WEIGHTS, is_dense_layer, linear
from gradlab.native import build

WORD = 64  # bits that the kernel takes at once
LEAST_ROWS = 64  # inputs at once (and features) below which a call costs more than it saves
LEAST_WORK = 2**22  # multiply-adds of the dense product, likewise


@dataclasses.dataclass(frozen=True)
class SparseProducts:
    """A `dot_general` for Flax's Dense on a CPU: products of sparse spikes, float32, without the zeros.

    (1) y_r      = sum over i with x_ri = 1 of W_i                                          (current)
    (2) dW_i     = sum over r with x_ri = 1 of delta_r                                      (weights' gradient)
    (3) dx       = delta W^T                                                                (error handed down, dense)

    with x [rows, features] spikes, W [features, units] weights, delta [rows, units] errors. Each call looks at its x:
    where all entries are 0 or 1 and at most a share `densest` of them are 1, (1) and (2) are sums; otherwise, and for
    analog inputs, they are the dense products, by `lax.dot_general`. The results are those of float32 products up to
    the order of summation, which is that of the indices for any number of threads; a network whose membrane lies
    within that rounding of its threshold may spike otherwise. One exception: a weight or error that is infinite or NaN
    reaches only sums whose spike selects it (in a dense product 0 times infinity is NaN in all of them).

    Forward mode, reverse mode, `jax.vmap` (one after the other) and higher derivatives work. The kernel is compiled by
    the machine's C++ compiler at the first use and kept in the user's cache folder; without a compiler, on other
    platforms than CPU, for other types than float32, for products that are small and for all but Dense's, this *is*
    `lax.dot_general`. Arrays that are spread over several devices are gathered on each: right, but no faster.

    Args:
        densest: the share of ones up to which sums are taken, from 0 to 1.

    Raises:
        ValueError: a share below 0 or above 1.
    """

    densest: float = 0.2

    def __post_init__(self):
        if not 0 <= self.densest <= 1:
            raise ValueError(f"SparseProducts(densest={self.densest!r}): give a share of ones from 0 to 1")

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Array:
        """The product of inputs [..., features] and weights [features, units]; arguments as `lax.dot_general`'s."""
        plain = precision is None and all(
            dtype == jnp.float32 for dtype in (lhs.dtype, rhs.dtype, preferred_element_type or jnp.float32)
        )
        if not (plain and is_dense_layer(lhs, rhs, dimension_numbers) and _pays(lhs, rhs) and build.targets()):
            return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
        product = _product(self.densest, _threads(), lhs.reshape(-1, lhs.shape[-1]), rhs)
        return product.reshape(*lhs.shape[:-1], rhs.shape[1])


def _pays(lhs: Array, rhs: Array) -> bool:
    """True on a CPU for products large enough that sums can be faster."""
    rows, features = math.prod(lhs.shape[:-1]), lhs.shape[-1]
    large = min(rows, features) >= LEAST_ROWS and rows * features * rhs.shape[1] >= LEAST_WORK
    return jax.default_backend() == "cpu" and large


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(densest: float, threads: int, x: Array, weights: Array) -> Array:
    return _by_density(densest, False, threads)(x, weights)


def _product_jvp(densest: float, threads: int, primals: Any, tangents: Any) -> tuple[Array, Any]:
    (x, weights), (dx, dweights) = primals, tangents
    moved = []
    if not isinstance(dx, SymbolicZero):
        moved.append(lax.dot_general(dx, weights, FORWARD))
    if not isinstance(dweights, SymbolicZero):
        moved.append(_of_weights(densest, threads, x, dweights))
    out = _product(densest, threads, x, weights)
    return out, sum(moved[1:], moved[0]) if moved else jnp.zeros_like(out)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _of_weights(densest: float, threads: int, x: Array, moved: Array) -> Array:
    """(1) of a change of the weights; transposed, (2)."""
    return linear(
        lambda w: lax.dot_general(x, w, FORWARD),
        lambda w: _by_density(densest, False, threads)(x, w),
        lambda delta: _by_density(densest, True, threads)(x, delta),
        moved,
        (x.shape[0], moved.shape[1]),
    )


@functools.cache
def _by_density(densest: float, transposed: bool, threads: int = 0) -> Callable[[Array, Array], Array]:
    """x y, or x^T y: as sums where x is sparse, else as a dense product."""

    @jax.custom_batching.custom_vmap
    def product(x: Array, y: Array) -> Array:
        return _chosen(x, y, densest, transposed, threads)

    @product.def_vmap
    def _(size: int, batched: list[bool], x: Array, y: Array) -> tuple[Array, bool]:
        # One after the other: side by side, `cond` would compute both of its branches.
        stacked = tuple(array for array, one in zip((x, y), batched, strict=True) if one)

        def at(items: tuple[Array, ...]) -> Array:
            own = iter(items)
            return product(*(next(own) if one else array for array, one in zip((x, y), batched, strict=True)))

        return lax.map(at, stacked), True

    return product


@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _chosen(x: Array, y: Array, densest: float, transposed: bool, threads: int) -> Array:
    """x y, or x^T y, in the way that the ones of x choose when the program runs."""
    axes = TO_WEIGHTS if transposed else FORWARD
    bits, is_sparse = _packed(x, transposed, int(densest * x.size), threads)
    return lax.cond(
        is_sparse,
        lambda bits, x, y: _sums(bits, y, threads),
        lambda bits, x, y: lax.dot_general(x, y, axes),
        *(bits, x, y),
    )


def _packed(x: Array, transposed: bool, most: int, threads: int = 0) -> tuple[Array, Array]:
    """Which entries of x (or x^T) are 1, a bit each, row by row; and whether the others are 0, and at most `most` 1."""
    rows, across = x.shape[::-1] if transposed else x.shape
    out = jax.ShapeDtypeStruct((rows, 2 * -(-across // WORD)), jnp.uint32), jax.ShapeDtypeStruct((), jnp.bool_)
    call = jax.ffi.ffi_call(_target("Pack"), out)
    bits, is_sparse = call(x, transposed=transposed, most=np.int64(most), threads=np.int64(threads))
    return bits, is_sparse


def _sums(bits: Array, y: Array, threads: int = 0) -> Array:
    """For each row of bits the sum of the rows of y that it selects."""
    out = jax.ShapeDtypeStruct((bits.shape[0], y.shape[1]), y.dtype)
    return jax.ffi.ffi_call(_target("Gather"), out)(bits, y, threads=np.int64(threads))


def _target(handler: str) -> str:
    names = build.targets()
    if names is None:
        raise RuntimeError("the kernel of SparseProducts was asked for where it could not be compiled")
    return names[handler]


def _threads() -> int:
    """One thread where XLA itself was told to use one (a study's worker processes); 0: as many as XLA has."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return int("intra_op_parallelism_threads=1" in flags)
