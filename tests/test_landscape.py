"""Loss landscapes: planes, projections, surfaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from landscape_parts import flat, skew_plane, tree, wavy

from gradlab.analysis.landscape import (
    Landscape,
    Plane,
    directed_plane,
    interpolation_plane,
    landscape,
    losses_along,
    pca_plane,
    random_plane,
    surface,
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_a_point_of_the_plane_comes_back_where_it_was_put():
    plane = skew_plane()
    projection = plane.project(plane.point(0.4, -0.7))
    np.testing.assert_allclose(projection.coordinates, [0.4, -0.7], atol=1e-6)
    assert projection.captured == pytest.approx(1.0) and projection.distance == pytest.approx(0.0, abs=1e-9)
    # Negative control: dot products over norms, the well-known mistake, put it elsewhere.
    d, axes = flat(plane.point(0.4, -0.7)) - flat(plane.origin), (flat(plane.x), flat(plane.y))
    wrong = [d @ axis / np.linalg.norm(axis) for axis in axes]
    assert np.abs(np.array(wrong) - [0.4, -0.7]).max() > 0.5


def test_projection_of_a_trajectory_off_the_plane():
    plane = skew_plane()
    run = tree(3, lead=(4, 2))
    projection = plane.project(run)
    assert projection.coordinates.shape == (4, 2, 2) and projection.captured.shape == (4, 2)
    # Independent: normal equations, one point at a time.
    axes = np.stack([flat(plane.x), flat(plane.y)], axis=1)
    d = flat(jax.tree_util.tree_map(lambda leaf: leaf[3, 1], run)) - flat(plane.origin)
    expected = np.linalg.solve(axes.T @ axes, axes.T @ d)
    np.testing.assert_allclose(projection.coordinates[3, 1], expected, rtol=1e-10)
    np.testing.assert_allclose(projection.distance[3, 1], np.linalg.norm(d - axes @ expected), rtol=1e-10)
    assert 0 < projection.captured[3, 1] < 0.9 and 0 < projection.share < 0.9


def test_the_origin_lies_in_the_plane_and_a_diverged_point_is_nan():
    plane = skew_plane()
    assert plane.project(plane.origin).captured == 1.0
    broken = jax.tree_util.tree_map(lambda leaf: leaf.at[..., 0].set(jnp.nan), tree(1))
    assert np.isnan(plane.project(broken).coordinates).all()


def test_filter_normalisation_scales_columns_of_a_non_square_kernel():
    params = tree(0)
    plane = random_plane(params, jax.random.key(0))
    weights, direction = (np.asarray(t["layer_0"]["connection"]["kernel"]) for t in (params, plane.x))
    np.testing.assert_allclose(np.linalg.norm(direction, axis=0), np.linalg.norm(weights, axis=0), rtol=1e-8)
    # Negative control: the rows, which are right in libraries that store [out, in], do not agree.
    rows = np.linalg.norm(direction, axis=1) / np.linalg.norm(weights, axis=1)
    assert np.abs(rows - 1).max() > 0.1
    weights, direction = (np.asarray(t["layer_1"]["connection"]["kernel"]) for t in (params, plane.x))
    norm = lambda w: np.sqrt((w**2).sum(axis=(0, 1, 2)))  # noqa: E731
    np.testing.assert_allclose(norm(direction), norm(weights), rtol=1e-8)
    assert norm(direction).shape == (5,)


def test_biases_and_neuron_parameters_stay():
    plane = random_plane(tree(0), jax.random.key(0))
    assert plane.ignored == ("layer_0/connection/bias", "layer_0/neuron/leak")
    for direction in (plane.x, plane.y):
        assert not np.any(direction["layer_0"]["connection"]["bias"])
        assert not np.any(direction["layer_0"]["neuron"]["leak"])
    free = random_plane(tree(0), jax.random.key(0), "none", ignore=())
    assert free.ignored == () and np.all(free.x["layer_0"]["neuron"]["leak"])


def test_layer_and_no_normalisation():
    params = tree(0)
    by_layer = random_plane(params, jax.random.key(0), "layer")
    free = random_plane(params, jax.random.key(0), "none")
    for name in ("layer_0", "layer_1"):
        weights = np.linalg.norm(params[name]["connection"]["kernel"])
        assert np.linalg.norm(by_layer.x[name]["connection"]["kernel"]) == pytest.approx(weights)
        assert np.linalg.norm(free.x[name]["connection"]["kernel"]) != pytest.approx(weights)
    assert np.abs(flat(free.x) @ flat(free.y)) < 0.5 * np.linalg.norm(flat(free.x)) * np.linalg.norm(flat(free.y))


def test_pca_plane_holds_a_planar_trajectory():
    truth = skew_plane()
    points = np.random.default_rng(0).normal(size=(12, 2))
    run = jax.vmap(truth.point)(points[:, 0], points[:, 1])
    plane = pca_plane({"one": run}, truth.origin)
    assert sum(plane.explained) == pytest.approx(1.0) and plane.explained[0] >= plane.explained[1]
    assert plane.project(run).share == pytest.approx(1.0, abs=1e-12)
    axes = np.stack([flat(plane.x), flat(plane.y)])
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    # Negative control: a trajectory with a part outside is not captured; `explained` and `project` agree.
    outside = jax.tree_util.tree_map(lambda p, q: p + 0.3 * q, run, tree(9, lead=(12,)))
    plane = pca_plane([run, outside], truth.origin)
    both = jax.tree_util.tree_map(lambda p, q: jnp.concatenate([p, q]), run, outside)
    assert sum(plane.explained) < 0.999
    assert plane.project(both).share == pytest.approx(sum(plane.explained), rel=1e-9)


def test_quadratic_loss_gives_the_exact_paraboloid():
    plane = skew_plane()
    a, b = np.linspace(-1, 2, 7), np.linspace(-2, 1, 4)

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(params))

    ground = surface(loss, plane, a, b)
    assert ground.loss.shape == (4, 7)
    o, x, y = flat(plane.origin), flat(plane.x), flat(plane.y)
    A, B = np.meshgrid(a, b)
    exact = o @ o + 2 * A * (o @ x) + 2 * B * (o @ y) + A**2 * (x @ x) + B**2 * (y @ y) + 2 * A * B * (x @ y)
    np.testing.assert_allclose(ground.loss, exact, rtol=1e-12)
    assert not np.allclose(ground.loss[:4, :4], ground.loss[:4, :4].T)  # negative control: a transposed grid differs
    np.testing.assert_allclose(surface(loss, plane, a, b, batch_size=5).loss, exact, rtol=1e-12)


def test_surface_equals_a_numpy_evaluation():
    plane = skew_plane()
    inputs = np.random.default_rng(5).normal(size=(8, 5))

    def loss(params):
        connection = params["layer_0"]["connection"]
        return jnp.mean(jnp.tanh(inputs @ connection["kernel"] + connection["bias"]) ** 2)

    a, b = np.array([-0.2, 0.1, 0.5]), np.array([0.3, -0.4])
    ground = surface(loss, plane, a, b)
    for i, j in np.ndindex(2, 3):
        kernel, bias = (
            np.asarray(plane.origin["layer_0"]["connection"][n])
            + a[j] * np.asarray(plane.x["layer_0"]["connection"][n])
            + b[i] * np.asarray(plane.y["layer_0"]["connection"][n])
            for n in ("kernel", "bias")
        )
        assert ground.loss[i, j] == pytest.approx(np.mean(np.tanh(inputs @ kernel + bias) ** 2), rel=1e-12)


def test_landscape_covers_its_trajectories_and_tells_the_true_loss():
    origin = tree(0)
    runs = {
        name: jax.tree_util.tree_map(lambda o, t: o + 0.2 * t, origin, tree(s, (6,)))
        for name, s in (("A", 1), ("B", 2))
    }
    view = landscape(wavy, pca_plane(runs, origin), runs, points=(9, 5))
    assert view.loss.shape == (5, 9)
    for name, run in runs.items():
        inside = view.coordinates[name]
        assert (view.a[0] < inside[:, 0]).all() and (inside[:, 0] < view.a[-1]).all()
        assert (view.b[0] < inside[:, 1]).all() and (inside[:, 1] < view.b[-1]).all()
        true = [float(wavy(jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], run))) for i in range(6)]
        np.testing.assert_allclose(view.path_loss[name], true, rtol=1e-12)
        assert 0 < view.captured[name] < 1


def test_path_loss_equals_the_surface_for_a_path_inside_the_plane_only():
    plane = skew_plane()
    run = jax.vmap(plane.point)(jnp.array([0.1, -0.2]), jnp.array([0.3, 0.5]))
    ground = surface(wavy, plane, np.array([0.1, -0.2]), np.array([0.3, 0.5]))
    np.testing.assert_allclose(losses_along(wavy, run), np.diag(ground.loss), rtol=1e-12)
    off = jax.tree_util.tree_map(lambda leaf, t: leaf + 0.1 * t, run, tree(7, (2,)))
    assert np.abs(losses_along(wavy, off) - np.diag(ground.loss)).min() > 1e-3


def test_a_loss_that_is_not_a_number_stays_nan_and_spoils_nothing_else():
    plane = skew_plane()
    first = lambda p: p["layer_0"]["connection"]["kernel"][0, 0]  # noqa: E731
    ground = surface(lambda p: jnp.log(first(p)), plane, np.linspace(-2, 2, 9), np.array([-1.0, 0.0, 1.0]))
    assert 0 < np.isnan(ground.loss).sum() < ground.loss.size


@pytest.mark.parametrize("n", [0, 2])
def test_save_and_load(tmp_path, n):
    origin = tree(0)
    runs = {f"TBPTT(k={i})": tree(i + 1, (3,)) for i in range(n)}
    plane = random_plane(origin, jax.random.key(1))
    view = landscape(wavy, plane, runs, points=3)
    again = Landscape.load(view.save(tmp_path / "deep" / "view.npz"))
    for name in ("a", "b", "loss"):
        np.testing.assert_array_equal(getattr(again, name), getattr(view, name))
    assert (again.kind, again.explained, dict(again.captured)) == (
        view.kind,
        view.explained,
        dict(view.captured),
    )
    assert list(again.coordinates) == list(runs)
    for name in runs:
        np.testing.assert_array_equal(again.coordinates[name], view.coordinates[name])
        np.testing.assert_array_equal(again.path_loss[name], view.path_loss[name])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["view.npz"]


def test_bad_input_is_refused_in_words():
    origin, plane = tree(0), skew_plane()
    with pytest.raises(ValueError, match="parallel"):
        Plane(origin, tree(1), jax.tree_util.tree_map(lambda leaf: -2 * leaf, tree(1)))
    with pytest.raises(ValueError, match="not zero"):
        Plane(origin, tree(1), jax.tree_util.tree_map(jnp.zeros_like, origin))
    with pytest.raises(ValueError, match="layer_1/connection/kernel"):
        plane.project({"layer_0": origin["layer_0"]})
    with pytest.raises(ValueError, match="layer_0/connection/kernel has the shape"):
        plane.project(jax.tree_util.tree_map(jnp.transpose, origin))
    with pytest.raises(ValueError, match="normalization must be"):
        random_plane(origin, jax.random.key(0), "filters")
    with pytest.raises(ValueError, match="nothing to move"):
        random_plane({"bias": jnp.ones((2, 2))}, jax.random.key(0))
    with pytest.raises(ValueError, match="one line"):
        pca_plane([jax.vmap(lambda t: plane.point(t, 0.0))(jnp.arange(5.0))], origin)
    with pytest.raises(ValueError, match="scalar"):
        surface(lambda p: p["layer_0"]["connection"]["bias"], plane, np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="one leading axis"):
        landscape(wavy, plane, {"A": origin})


# --- normalisations, directions of one's own, planes through three points ---


def test_a_point_comes_back_in_float32_too():
    plane = skew_plane()
    single = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), (plane.origin, plane.x, plane.y))
    with jax.enable_x64(False):
        plane = Plane(*single)
        point = plane.point(0.4, -0.7)
        assert flat(point).dtype == np.float32
        np.testing.assert_allclose(plane.project(point).coordinates, [0.4, -0.7], atol=1e-6)
        assert np.abs(plane.project(plane.point(0.4, -0.7001)).coordinates - [0.4, -0.7]).max() > 1e-6


def test_normalisation_by_weight_keeps_the_directions_signs():
    params, own = tree(0), tree(5)
    plane = directed_plane(params, own, tree(6), "weight")
    w, d, x = (np.asarray(t["layer_0"]["connection"]["kernel"]) for t in (params, own, plane.x))
    np.testing.assert_allclose(x, d * np.abs(w), rtol=1e-12)
    assert not np.allclose(x, d * w)  # negative control: the signs of the weights would turn the direction
    assert not np.any(plane.x["layer_0"]["connection"]["bias"]) and len(plane.ignored) == 2


def test_directions_of_ones_own_are_scaled_filter_by_filter_however_short():
    params = tree(0)
    own = jax.tree_util.tree_map(lambda leaf: 1e-30 * leaf, tree(5))
    own["layer_0"]["connection"]["kernel"] = own["layer_0"]["connection"]["kernel"].at[:, 1].set(0.0)
    plane = directed_plane(params, own, tree(6), labels=("gradient of BPTT", "gradient of OSTL"))
    w, x = (np.asarray(t["layer_0"]["connection"]["kernel"]) for t in (params, plane.x))
    np.testing.assert_allclose(np.linalg.norm(x, axis=0)[[0, 2]], np.linalg.norm(w, axis=0)[[0, 2]], rtol=1e-12)
    assert not x[:, 1].any()  # a filter that the direction leaves alone stays
    rows = np.linalg.norm(x[:, [0, 2]], axis=1) / np.linalg.norm(w[:, [0, 2]], axis=1)
    assert np.abs(rows - 1).max() > 0.1  # negative control: the other axis
    assert (plane.kind, plane.labels) == ("directed", ("gradient of BPTT", "gradient of OSTL"))


def test_names_that_are_ignored():
    params = {**tree(0), "norm": {"scale": jnp.ones((3, 4))}}
    plane = random_plane(params, jax.random.key(0))
    assert "norm/scale" in plane.ignored and not np.any(plane.x["norm"]["scale"])
    assert np.any(random_plane(params, jax.random.key(0), ignore=("bias",)).x["norm"]["scale"])
    free = random_plane(params, jax.random.key(0), "none")
    assert not np.any(free.x["layer_0"]["neuron"]["leak"])  # a trained constant of a neuron stays by default
    runs = [tree(3, (6,))]
    still = pca_plane(runs, tree(0), ignore=("bias", "neuron"))
    assert not np.any(still.x["layer_0"]["neuron"]["leak"]) and np.any(pca_plane(runs, tree(0)).x["layer_0"]["neuron"])
    # What is ignored counts in the whole displacement: shares agree with the projection.
    assert still.project(runs[0]).share == pytest.approx(sum(still.explained), rel=1e-9)
    assert sum(still.explained) < sum(pca_plane(runs, tree(0)).explained)


def test_interpolation_plane_gives_its_three_points_the_corners():
    origin, x_end, y_end = tree(0), tree(1), tree(2)
    plane = interpolation_plane(origin, x_end, y_end, names=("BPTT", "OSTL", "SLTT"))
    for params, corner in ((origin, (0, 0)), (x_end, (1, 0)), (y_end, (0, 1))):
        np.testing.assert_allclose(plane.project(params).coordinates, corner, atol=1e-12)
        np.testing.assert_allclose(flat(plane.point(*corner)), flat(params), atol=1e-12)
    assert np.abs(plane.project(tree(3)).coordinates - [1, 0]).max() > 0.1  # negative control: a fourth point
    assert plane.labels == ("from BPTT to OSTL (share of the way)", "from BPTT to SLTT (share of the way)")
    view = landscape(wavy, plane, {}, points=3)
    assert view.a[0] < 0 and view.a[-1] > 1 and view.b[0] < 0 and view.b[-1] > 1
    with pytest.raises(ValueError, match="parallel"):
        between = jax.tree_util.tree_map(lambda o, e: ((o + e) / 2).astype(jnp.float32), origin, x_end)
        interpolation_plane(origin, x_end, between)
