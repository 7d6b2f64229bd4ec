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
    assert metrics.angle(g, R) == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-6)
    assert metrics.optimal_scale_error(g, R) == pytest.approx(np.sqrt(1 - cosine**2), abs=1e-7)


def test_twice_too_large_keeps_its_cosine_and_is_caught_by_the_others():
    """The mistake that a cosine hides: each other metric of length must tell it."""
    random = np.random.default_rng(3)
    g, r = random.normal(size=(2, 50))
    for blind in (metrics.cosine, metrics.angle, metrics.optimal_scale_error):
        assert blind(2 * g, r) == pytest.approx(blind(g, r), rel=1e-12)
    assert metrics.top_overlap(2 * g, r, 5) == metrics.top_overlap(g, r, 5)
    for seeing in (metrics.norm_ratio, metrics.projection):
        assert seeing(2 * g, r) == pytest.approx(2 * seeing(g, r), rel=1e-12)
    assert metrics.optimal_scale(2 * r, r) == pytest.approx(0.5, rel=1e-12)
    assert metrics.relative_error(2 * r, r) == pytest.approx(1.0, rel=1e-12) != metrics.relative_error(r, r)


def test_the_optimal_scale_is_the_best_one():
    g, r = np.array([1.0, 2.0, 0.0]), np.array([0.0, 3.0, 4.0])
    best = metrics.optimal_scale(g, r)
    assert best == pytest.approx(6.0 / 5.0)
    assert metrics.relative_error(best * g, r) == pytest.approx(metrics.optimal_scale_error(g, r))
    assert metrics.relative_error(1.01 * best * g, r) > metrics.optimal_scale_error(g, r)


def test_overlap_of_the_largest_entries():
    r = np.array([5.0, -4.0, 3.0, 0.0, 1.0])
    assert metrics.top_overlap([0.0, 9.0, -8.0, 7.0, 0.0], r, 2) == 0.5  # {1, 2} and {0, 1}
    assert metrics.top_overlap(-r, r, 3) == 1.0 and metrics.top_overlap(1 / (np.abs(r) + 1), r, 2) == 0.0
    assert np.isnan(metrics.top_overlap(np.zeros(5), r, 2))
    # Zeros do not compete: two vectors with nothing in common share nothing, however many zeros they share.
    apart = np.zeros((2, 100))
    apart[0, :5], apart[1, 50:55] = 1.0, 1.0
    assert metrics.top_overlap(*apart, 20) == 0.0 and metrics.top_overlap(apart[1], apart[1], 20) == 1.0
    assert metrics.top_counts(apart[0], np.zeros(100), 20) == (0, 0)
    for k in (0, 6):
        with pytest.raises(ValueError, match="between 1 and the number of entries, 5"):
            metrics.top_overlap(r, r, k)


@pytest.mark.parametrize("other", [np.ones((4, 1)), np.ones(1), 1.0, np.ones((2, 2))])
def test_arrays_of_different_shapes_are_refused(other):
    """Broadcast, four ones and a column of four ones would have the cosine 4."""
    names = ("cosine", "angle", "norm_ratio", "relative_error", "projection", "optimal_scale", "optimal_scale_error")
    for metric in [
        *(getattr(metrics, name) for name in names),
        metrics.sign_agreement,
        metrics.effective_learning_rate,
    ]:
        with pytest.raises(ValueError, match="different shapes"):
            metric(np.ones(4), other)
    with pytest.raises(ValueError, match="different shapes"):
        metrics.top_overlap(np.ones(4), other, 1)


def test_the_effective_learning_rate():
    assert metrics.effective_learning_rate([0.3, 0.4], [3.0, 4.0]) == pytest.approx(0.1)
    assert np.isnan(metrics.effective_learning_rate([0.3, 0.4], [0.0, 0.0]))


@pytest.mark.parametrize("axis", [0, 1, (0, 2), -1])
def test_axes_are_reduced_as_in_numpy(axis):
    g, r = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    axes = tuple(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    kept = [a for a in range(3) if a not in axes]
    moved = [np.transpose(x, (*kept, *axes)).reshape(-1, int(np.prod([x.shape[a] for a in axes]))) for x in (g, r)]
    shape = tuple(g.shape[a] for a in kept)
    names = ("cosine", "angle", "norm_ratio", "relative_error", "projection", "optimal_scale", "optimal_scale_error")
    for name in names:
        metric = getattr(metrics, name)
        expected = np.array([metric(a, b) for a, b in zip(*moved, strict=True)]).reshape(shape)
        np.testing.assert_allclose(metric(g, r, axis), expected, rtol=1e-12)
        assert not np.allclose(metric(g, r, axis), metric(g, r))
    agreement = metrics.sign_agreement(g, r, axis=axis).agreement
    expected = [metrics.sign_agreement(a, b).agreement for a, b in zip(*moved, strict=True)]
    np.testing.assert_allclose(agreement, np.reshape(expected, shape))


def test_all_pairs_follow_from_the_gram_matrix():
    rows = np.random.default_rng(1).normal(size=(4, 30))
    for reference in (0, 2):
        found = metrics.from_gram(rows @ rows.T, reference)
        assert set(found) == set(metrics.GRAM_METRICS)
        for name, values in found.items():
            expected = [getattr(metrics, name)(row, rows[reference]) for row in rows]
            np.testing.assert_allclose(values, expected, rtol=1e-7, atol=2e-6)
    assert np.isnan(metrics.from_gram(np.array([[0.0, 0.0], [0.0, 1.0]]))["cosine"]).all()
    assert np.isnan(metrics.from_gram(np.array([[np.inf, 0.0], [0.0, 1.0]]))["norm_ratio"]).all()


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
