"""Metrics of a gradient g against a reference r: plain functions of two vectors, accumulated in float64.

A cosine alone certifies nothing: a gradient twice too large has the same cosine. Every comparison therefore carries all
of these. Where a metric has no value (a zero vector has no direction) the functions return NaN; `gradlab.comparison`
says why.

Every function takes arrays of one shape (others are refused with a ValueError) and an `axis`, as NumPy's own do: None,
the default, reads each array as one vector and gives a number; an axis, or a tuple of axes, gives an array over the
other axes. In the equations g and r stand for `g` and `reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SIGN_FLOOR = 1e-2
"""Entries of the reference below this share of its root mean square do not count for sign agreement."""

TOP_SHARE = 0.1
"""The share of the entries, the largest ones, whose overlap is counted."""

Axis = int | tuple[int, ...] | None


def norm(g: ArrayLike, axis: Axis = None) -> Any:
    """(1) ||g||, the Euclidean norm."""
    return _plain(np.sqrt(_dot(_array(g), _array(g), axis)))


def cosine(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) <g, r> / (||g|| ||r||), in [-1, 1]; NaN when either is zero."""
    # One division at a time: the product of two tiny norms would underflow.
    return _plain(_ratio(_ratio(_inner(g, reference, axis), norm(g, axis)), norm(reference, axis)))


def angle(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) arccos(cosine), in degrees: 0 the same direction, 90 at right angles, 180 opposite; round-off below 1e-6."""
    return _plain(_degrees(cosine(g, reference, axis)))


def norm_ratio(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) ||g|| / ||r||; NaN when the reference is zero."""
    _pair(g, reference)
    return _plain(_ratio(norm(g, axis), norm(reference, axis)))


def relative_error(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) ||g - r|| / ||r||; NaN when the reference is zero."""
    a, b = _pair(g, reference)
    return _plain(_ratio(norm(a - b, axis), norm(b, axis)))


def projection(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) <g, r> / <r, r>: how much of the reference g contains; 2 for a gradient twice too large."""
    return _plain(_ratio(_inner(g, reference, axis), _inner(reference, reference, axis)))


def optimal_scale(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) argmin over c of ||c g - r|| = <g, r> / <g, g>: the factor that g lacks; 1/2 for one twice too large."""
    return _plain(_ratio(_inner(g, reference, axis), _inner(g, g, axis)))


def optimal_scale_error(g: ArrayLike, reference: ArrayLike, axis: Axis = None) -> Any:
    """(1) min over c of ||c g - r|| / ||r|| = sqrt(1 - cosine^2): the error that no learning rate can mend, in [0, 1].

    It does not see the sign: g = -r has the error 0 at c = -1.
    """
    c = cosine(g, reference, axis)
    return _plain(np.sqrt(np.maximum(0.0, 1.0 - np.square(c))))


def top_overlap(g: ArrayLike, reference: ArrayLike, k: int) -> float:
    """(1) share of the k entries with the largest |g_i| that are also among the k with the largest |r_i|, in [0, 1].

    Zeros do not compete: where the reference has fewer than k entries that are not zero, k is their number. Ties are
    broken by position. Two unrelated vectors of n entries overlap by k / n in the mean; NaN when either is zero.

    Raises:
        ValueError: k is not between 1 and the number of entries; arrays of different shapes.
    """
    a, b = _pair(g, reference)
    if not 1 <= k <= a.size:
        raise ValueError(f"top_overlap(k={k!r}): k lies between 1 and the number of entries, {a.size}")
    shared, counted = top_counts(a.ravel(), b.ravel(), k)
    return shared / counted if a.any() and counted else float("nan")


def top_counts(g: np.ndarray, reference: np.ndarray, k: int) -> tuple[int, int]:
    """(shared entries, entries that count) of `top_overlap`, which may be added over parameters."""
    chosen = _top(reference, k)
    return len(_top(g, k) & chosen), len(chosen)


def _top(g: np.ndarray, k: int) -> set[int]:
    """The places of the k entries with the largest absolute values, of those that are not zero; of equal ones the
    first.
    """
    places = np.argsort(-np.abs(g), kind="stable")[:k]
    return set(places[g[places] != 0].tolist())


class SignAgreement(NamedTuple):
    """`agreement` among the entries that count, and their share `coverage`."""

    agreement: Any
    coverage: Any


def sign_agreement(g: ArrayLike, reference: ArrayLike, floor: float = SIGN_FLOOR, axis: Axis = None) -> SignAgreement:
    """(1) share of entries with sign(g_i) = sign(r_i) among those with |r_i| > floor * rms(r), and their share."""
    agree, counted = sign_counts(g, reference, floor, axis)
    size = np.sum(np.ones_like(_array(reference)), axis=axis)
    return SignAgreement(_plain(_ratio(agree, counted)), _plain(_ratio(counted, size)))


def sign_counts(g: ArrayLike, reference: ArrayLike, floor: float = SIGN_FLOOR, axis: Axis = None) -> tuple[Any, Any]:
    """(entries that agree in sign, entries that count), which may be added over parameters."""
    a, b = _pair(g, reference)
    if not b.size:
        return 0, 0
    counted = np.abs(b) > floor * np.sqrt(np.mean(b * b, axis=axis, keepdims=True))
    return np.sum((np.sign(a) == np.sign(b)) & counted, axis=axis), np.sum(counted, axis=axis)


def effective_learning_rate(update: ArrayLike, weights: ArrayLike, axis: Axis = None) -> Any:
    """(1) ||update|| / ||weights||: how far one step of the optimizer moves, relative to where it starts."""
    _pair(update, weights)
    return _plain(_ratio(norm(update, axis), norm(weights, axis)))


GRAM_METRICS = ("cosine", "angle", "norm_ratio", "relative_error", "projection", "optimal_scale", "optimal_scale_error")
"""The metrics that follow from inner products alone, `from_gram`."""


def from_gram(gram: ArrayLike, reference: int = 0) -> dict[str, np.ndarray]:
    """The metrics of all gradients against one of them, from their inner products alone.

    (1) gram_ij = <g_i, g_j>,   relative_error_i = sqrt(gram_ii - 2 gram_ir + gram_rr) / sqrt(gram_rr),   r = reference

    Args:
        gram: [..., rules, rules], float64.
        reference: the place of the reference among the rules.

    Returns:
        {name of `GRAM_METRICS`: [..., rules]}; NaN where a gradient has no direction. The relative error cancels: below
        about 1e-7 it is round-off of the inner products.
    """
    gram = np.asarray(gram, np.float64)
    gram = np.where(np.isfinite(gram), gram, np.nan)
    own = np.diagonal(gram, axis1=-2, axis2=-1)
    cross, square = gram[..., reference], own[..., reference, None]
    c = _ratio(_ratio(cross, np.sqrt(own)), np.sqrt(square))
    return {
        "cosine": c,
        "angle": _degrees(c),
        "norm_ratio": np.sqrt(_ratio(own, square)),
        "relative_error": np.sqrt(np.maximum(0.0, _ratio(own - 2 * cross + square, square))),
        "projection": _ratio(cross, square),
        "optimal_scale": _ratio(cross, own),
        "optimal_scale_error": np.sqrt(np.maximum(0.0, 1.0 - c**2)),
    }


def _array(value: ArrayLike) -> np.ndarray:
    return np.asarray(value, np.float64)


def _pair(g: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays of one shape: broadcasting would give a number that means nothing."""
    a, b = _array(g), _array(reference)
    if a.shape != b.shape:
        raise ValueError(f"two arrays of different shapes, {a.shape} and {b.shape}, cannot be compared entry by entry")
    return a, b


def _inner(a: ArrayLike, b: ArrayLike, axis: Axis) -> Any:
    return _dot(*_pair(a, b), axis)


def _dot(a: np.ndarray, b: np.ndarray, axis: Axis) -> Any:
    return np.dot(a.ravel(), b.ravel()) if axis is None else np.sum(a * b, axis=axis)


def _ratio(top: Any, bottom: Any) -> Any:
    bottom = np.asarray(bottom, np.float64)
    defined = (bottom > 0) & np.isfinite(bottom)
    return np.where(defined, np.asarray(top, np.float64) / np.where(defined, bottom, 1.0), np.nan)


def _degrees(cosine: Any) -> Any:
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def _plain(value: Any) -> Any:
    """A Python number in the place of an array without axes."""
    return value if np.ndim(value) else float(value)
