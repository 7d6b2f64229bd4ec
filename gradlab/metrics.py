"""Metrics of a gradient g against a reference r: plain functions of two vectors, accumulated in float64.

A cosine alone certifies nothing: a gradient twice too large has the same cosine. Every comparison therefore carries all
of these. Where a metric has no value (a zero vector has no direction) the functions return NaN; `gradlab.comparison`
says why.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SIGN_FLOOR = 1e-2
"""Entries of the reference below this share of its root mean square do not count for sign agreement."""


def _vector(value: ArrayLike) -> np.ndarray:
    return np.asarray(value, np.float64).ravel()


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom > 0 and np.isfinite(bottom) else float("nan")


def norm(g: ArrayLike) -> float:
    """(1) ||g||, the Euclidean norm."""
    return float(np.linalg.norm(_vector(g)))


def cosine(g: ArrayLike, reference: ArrayLike) -> float:
    """(1) <g, r> / (||g|| ||r||), in [-1, 1]; NaN when either is zero."""
    a, b = _vector(g), _vector(reference)
    return _ratio(a @ b, norm(a) * norm(b))


def norm_ratio(g: ArrayLike, reference: ArrayLike) -> float:
    """(1) ||g|| / ||r||; NaN when the reference is zero."""
    return _ratio(norm(g), norm(reference))


def relative_error(g: ArrayLike, reference: ArrayLike) -> float:
    """(1) ||g - r|| / ||r||; NaN when the reference is zero."""
    return _ratio(norm(_vector(g) - _vector(reference)), norm(reference))


def projection(g: ArrayLike, reference: ArrayLike) -> float:
    """(1) <g, r> / <r, r>: how much of the reference g contains; 2 for a gradient twice too large."""
    a, b = _vector(g), _vector(reference)
    return _ratio(a @ b, b @ b)


class SignAgreement(NamedTuple):
    """`agreement` among the entries that count, and their share `coverage`."""

    agreement: float
    coverage: float


def sign_agreement(g: ArrayLike, reference: ArrayLike, floor: float = SIGN_FLOOR) -> SignAgreement:
    """(1) share of entries with sign(g_i) = sign(r_i) among those with |r_i| > floor * rms(r), and their share."""
    agree, counted = sign_counts(g, reference, floor)
    return SignAgreement(_ratio(agree, counted), _ratio(counted, _vector(reference).size))


def sign_counts(g: ArrayLike, reference: ArrayLike, floor: float = SIGN_FLOOR) -> tuple[int, int]:
    """(entries that agree in sign, entries that count), which may be added over parameters."""
    a, b = _vector(g), _vector(reference)
    counted = np.abs(b) > floor * np.sqrt(np.mean(b * b)) if b.size else np.zeros(0, bool)
    return int(np.sum(np.sign(a[counted]) == np.sign(b[counted]))), int(counted.sum())
