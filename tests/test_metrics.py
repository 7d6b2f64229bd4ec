"""Metrics of two vectors, on cases worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from gradlab import metrics

R = np.array([3.0, 4.0])


@pytest.mark.parametrize(
    ("g", "cosine", "norm_ratio", "relative_error", "projection"),
    [
        ([3.0, 4.0], 1.0, 1.0, 0.0, 1.0),
        ([6.0, 8.0], 1.0, 2.0, 1.0, 2.0),
        ([-3.0, -4.0], -1.0, 1.0, 2.0, -1.0),
        ([4.0, -3.0], 0.0, 1.0, np.sqrt(2.0), 0.0),
        ([5.0, 0.0], 0.6, 1.0, np.sqrt(20.0) / 5.0, 0.6),
        ([0.0, 1.0], 0.8, 0.2, np.sqrt(18.0) / 5.0, 0.16),
    ],
)
def test_hand_cases(g, cosine, norm_ratio, relative_error, projection):
    assert metrics.cosine(g, R) == pytest.approx(cosine, abs=1e-15)
    assert metrics.norm_ratio(g, R) == pytest.approx(norm_ratio)
    assert metrics.relative_error(g, R) == pytest.approx(relative_error)
    assert metrics.projection(g, R) == pytest.approx(projection, abs=1e-15)


def test_the_optimal_scale_follows_from_the_others():
    """||g - p r||^2 = ||g||^2 (1 - cosine^2) with p the projection: the metrics belong together."""
    random = np.random.default_rng(0)
    g, r = random.normal(size=(2, 40))
    rest = metrics.norm(g - metrics.projection(g, r) * r)
    assert rest == pytest.approx(metrics.norm(g) * np.sqrt(1 - metrics.cosine(g, r) ** 2))
    assert metrics.projection(g, r) == pytest.approx(metrics.cosine(g, r) * metrics.norm_ratio(g, r))
    assert metrics.projection(g, r) != pytest.approx(metrics.projection(r, g))  # it is not symmetric


def test_a_zero_vector_has_no_direction():
    zero = np.zeros(2)
    assert np.isnan(metrics.cosine(zero, R)) and np.isnan(metrics.cosine(R, zero))
    for metric in (metrics.norm_ratio, metrics.relative_error, metrics.projection):
        assert np.isnan(metric(R, zero))
    assert metrics.norm_ratio(zero, R) == 0.0 and metrics.relative_error(zero, R) == 1.0
    assert np.isnan(metrics.sign_agreement(R, zero).agreement) and metrics.sign_agreement(R, zero).coverage == 0.0


def test_sign_agreement_counts_only_entries_that_matter():
    reference = np.array([1.0, -1.0, 1.0, 1e-6])
    assert metrics.sign_counts([2.0, -3.0, -0.1, -5.0], reference) == (2, 3)
    agreement = metrics.sign_agreement([2.0, -3.0, -0.1, -5.0], reference)
    assert agreement.agreement == pytest.approx(2 / 3) and agreement.coverage == pytest.approx(3 / 4)
    assert metrics.sign_agreement([2.0, -3.0, -0.1, -5.0], reference, floor=0.0).agreement == pytest.approx(2 / 4)
    assert metrics.sign_counts([0.0, -1.0, 1.0, 1.0], reference) == (2, 3)  # a zero agrees with nothing


def test_float32_vectors_are_accumulated_in_float64():
    g = jnp.concatenate([jnp.array([1e4], jnp.float32), jnp.full(100_000, 1e-3, jnp.float32)])
    exact = np.sqrt(1e8 + 100_000 * float(np.float32(1e-3)) ** 2)
    assert metrics.norm(g) == pytest.approx(exact, rel=1e-12)
    assert float(jnp.linalg.norm(g)) != pytest.approx(exact, rel=1e-11)


def test_shapes_do_not_matter_and_order_does():
    a, b = np.arange(6.0).reshape(2, 3), np.array([[1.0, -2.0, 3.0], [0.0, 5.0, 1.0]])
    assert metrics.cosine(a, b) == metrics.cosine(a.ravel(), b.ravel())
    assert metrics.cosine(a, b) != metrics.cosine(a, b[:, ::-1])
