"""Curvature: products, eigenvalues, traces and densities against dense matrices, and what they cannot see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_parts import dense, network, ones, quadratic
from jax.flatten_util import ravel_pytree

import gradlab as gl
from gradlab.analysis import spectrum
from gradlab.analysis.curvature import (
    Products,
    curvature_along,
    hessian_product,
    loss_function,
    spectral_density,
    top_eigenvalues,
    trace,
)
from gradlab.analysis.density import lanczos
from gradlab.testing.networks import SmoothSpike, case, feed_forward


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# --- products ---


def test_products_of_a_smooth_network_equal_the_dense_hessian():
    loss, params = network(SmoothSpike())
    vector, tree = ravel_pytree(params)
    expected = np.asarray(jax.jit(jax.hessian(lambda v: loss(tree(v))))(vector))
    for derivative in ("surrogate", "field"):
        found = dense(hessian_product(loss, params, derivative), params)
        np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())
        trust = Products(loss, params, derivative).trust(step=1e-6)
        assert trust.asymmetry < 1e-12 and trust.mismatch < 1e-6
    # Negative control: the same network with a step for a spike has another second derivative.
    other, _ = network()
    assert np.abs(dense(hessian_product(other, params), params) - expected).max() > 1e-2 * np.abs(expected).max()


def unrolled(loss, surrogate):
    """The same loss as a plain loop over time, without a scan, on trees of the same shape."""

    def run(params):
        v1, v2, total = 0.0, 0.0, 0.0
        weights = loss.loss.weights(None, *loss.batch.inputs.shape[:2], jnp.float64)
        first, second = (params[name]["connection"] for name in ("layer_0", "layer_1"))
        for t, x in enumerate(loss.batch.inputs):
            v1 = 0.85 * v1 + x @ first["kernel"] + first["bias"]
            s1 = surrogate(v1 - 1.0)
            v1 = v1 - s1
            v2 = 0.85 * v2 + s1 @ second["kernel"] + second["bias"]
            s2 = surrogate(v2 - 1.0)
            v2 = v2 - s2
            total = total + jnp.sum(weights[t] * loss.loss.function(s2, loss.batch.targets))
        return total

    return run


def test_the_surrogate_hessian_is_symmetric_and_does_not_depend_on_the_loop():
    loss, params = network()
    plain = unrolled(loss, gl.FastSigmoid(3.0))
    np.testing.assert_allclose(float(loss(params)), float(plain(params)), rtol=1e-12)
    found = dense(hessian_product(loss, params), params)
    vector, tree = ravel_pytree(params)
    # Forwards over forwards: no version of JAX loses the spike's rule there.
    expected = np.asarray(jax.jit(jax.jacfwd(jax.jacfwd(lambda v: plain(tree(v)))))(vector))
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(found, found.T, atol=1e-12 * np.abs(expected).max())
    # It does not foretell how the gradient changes, and says so.
    assert Products(loss, params).trust(step=1e-6).mismatch > 0.1


def test_the_field_is_the_gradients_own_derivative_and_is_not_symmetric():
    loss, params = network()
    found = dense(hessian_product(loss, params, "field"), params)
    vector, tree = ravel_pytree(params)
    gradient = jax.jit(lambda v: ravel_pytree(jax.grad(loss)(tree(v)))[0])
    e = 1e-6
    columns = [(gradient(vector + e * u) - gradient(vector - e * u)) / (2 * e) for u in jnp.eye(vector.size)]
    size = np.abs(found).max()
    np.testing.assert_allclose(found, np.stack(columns, axis=1), atol=1e-7 * size)
    assert np.abs(found - found.T).max() > 0.1 * size  # the gradient is not the gradient of any function
    transposed = dense(hessian_product(loss, params, "field", transpose=True), params)
    np.testing.assert_allclose(transposed, found.T, atol=1e-12 * size)
    assert np.abs(dense(hessian_product(loss, params), params) - found).max() > 0.1 * size
    v = np.random.default_rng(0).normal(size=(2, vector.size))
    asymmetry = np.sqrt(((found @ v.T - found.T @ v.T) ** 2).sum() / ((found @ v.T) ** 2).sum())
    trust = Products(loss, params, "field").trust(step=1e-6)
    assert trust.asymmetry == pytest.approx(asymmetry, rel=1e-9) and asymmetry > 0.1
    assert trust.mismatch < 1e-6


def test_a_neuron_with_two_states_and_a_detached_reset_has_both_derivatives():
    net, params, batch, loss = case(feed_forward(gl.ALIF(beta=0.8, reset="zero", detach_reset=True), (4, 3)), n_steps=6)
    function = loss_function(net, batch, loss)
    assert Products(function, params).trust().asymmetry < 1e-12
    assert Products(function, params, "field").trust(step=1e-6).mismatch < 1e-5


# --- eigenvalues, trace, density ---


def test_everything_by_hand_on_a_diagonal_quadratic():
    params = ones()
    both = top_eigenvalues(quadratic, params, k=2, which="both")
    np.testing.assert_allclose(both.largest, [5.0, 3.0])
    np.testing.assert_allclose(both.smallest, [-2.0, 0.0], atol=1e-12)
    found = trace(quadratic, params, draws=4)  # every vector of signs gives the trace of a diagonal matrix
    assert found.values == pytest.approx({"network": 7.0, "layer_0": 6.0, "layer_1": 1.0})
    assert max(found.errors.values()) < 1e-12
    density = spectral_density(quadratic, params, draws=2)
    for nodes in density.nodes:
        np.testing.assert_allclose(nodes, [-2.0, 0.0, 1.0, 3.0, 5.0], atol=1e-9)
    directions = {"A": params, "B": {"layer_0": {"w": jnp.array([0.0, 0.0, 2.0])}, "layer_1": {"w": jnp.zeros(2)}}}
    along = curvature_along(quadratic, params, directions)
    np.testing.assert_allclose(along.values, [[7 / 5, 2.0, 0.5], [-2.0, -2.0, np.nan]], atol=1e-12)
    np.testing.assert_allclose(along.measured, along.values, atol=1e-9)
    assert along.flags == {("B", "layer_1"): "the gradient of B is zero"}
    frame = along.to_frame()
    assert list(frame.columns) == ["rule", "layer", "metric", "value", "flag"]
    assert (frame["value"].isna() == (frame["flag"] != "")).all()


@pytest.mark.parametrize("derivative", ["surrogate", "field"])
def test_eigenvalues_equal_those_of_the_dense_matrix(monkeypatch, derivative):
    loss, params = network()
    matrix = dense(hessian_product(loss, params, derivative), params)
    expected = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert not np.allclose(expected, np.sort(np.linalg.eigvals(matrix).real)) or derivative == "surrogate"
    for dense_to in (48, 0):  # the whole matrix, then Lanczos iterations
        monkeypatch.setattr(spectrum, "_DENSE", dense_to)
        found = top_eigenvalues(loss, params, k=3, which="both", derivative=derivative)
        np.testing.assert_allclose(found.largest, expected[::-1][:3], rtol=1e-6)
        np.testing.assert_allclose(found.smallest, expected[:3], rtol=1e-6)
        assert found.residuals["largest"].max() < 1e-5 * np.abs(expected).max()
        assert (found.trust.asymmetry > 0.1) == (derivative == "field")
    frame = found.to_frame()
    assert list(frame["metric"]) == [
        *(f"{end}_{i}" for end in ("largest", "smallest") for i in (1, 2, 3)), "asymmetry", "mismatch",
    ]  # fmt: skip
    assert not len(top_eigenvalues(loss, params).smallest)


def test_the_trace_is_exact_in_the_mean_and_within_its_errors():
    def loss(params):
        w = params["layer_0"]["w"]
        return jnp.sum(jnp.sin(w)[:, None] * jnp.cos(w)[None, :] * jnp.arange(16.0).reshape(4, 4))

    params = {"layer_0": {"w": jnp.array([0.3, -0.7, 1.1, 0.2])}}
    matrix = np.asarray(jax.hessian(lambda w: loss({"layer_0": {"w": w}}))(params["layer_0"]["w"]))
    every = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    assert trace(loss, params, draws=every).values["network"] == pytest.approx(np.trace(matrix), rel=1e-12)
    assert abs(trace(loss, params, draws=every[:3]).values["network"] - np.trace(matrix)) > 1e-3  # not for each few
    network_loss, params = network()
    blocks = dense(hessian_product(network_loss, params), params)
    found = trace(network_loss, params, draws=200, seed=1)
    sizes = np.cumsum([0, *(sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in params)])
    truth = {"network": np.trace(blocks)}
    truth |= {name: np.trace(blocks[i:j, i:j]) for name, i, j in zip(params, sizes[:-1], sizes[1:], strict=True)}
    for name, value in truth.items():
        assert abs(found.values[name] - value) < 4 * found.errors[name], name
        assert found.errors[name] < 0.5 * np.linalg.norm(blocks), name


def test_density_integrates_to_one_and_has_the_moments_of_the_matrix():
    loss, params = network()
    matrix = dense(hessian_product(loss, params), params)
    found = spectral_density(loss, params, draws=60, seed=3)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1.0, abs=1e-4)
    for power, truth in ((1, np.trace(matrix)), (2, np.sum(matrix**2))):
        value, error = found.moment(power)
        assert abs(value - truth / len(matrix)) < 4 * error
        smoothed = np.trapezoid(found.density * found.grid**power, found.grid)
        assert smoothed == pytest.approx(value + (power == 2) * found.width**2, rel=1e-3)
    # Negative control: twice the loss has twice the mean and four times the mean square.
    assert abs(found.moment(2)[0] - 4 * np.sum(matrix**2) / len(matrix)) > 4 * found.moment(2)[1]
    first, second = (spectral_density(loss, params, draws=2, steps=5, seed=s) for s in (0, 0))
    np.testing.assert_array_equal(first.density, second.density)


def test_lanczos_keeps_its_vectors_orthogonal():
    """With as many steps as parameters the nodes are the eigenvalues, each once; with few, the ends come first."""
    loss, params = network()
    products = Products(loss, params)
    expected = np.linalg.eigvalsh(dense(hessian_product(loss, params), params))
    nodes, weights = lanczos(products, np.random.default_rng(0).normal(size=products.size), products.size)
    assert weights.sum() == pytest.approx(1.0)
    gaps = np.abs(nodes[:, None] - expected).min(axis=1)
    assert gaps.max() < 1e-9 * np.abs(expected).max() and len(nodes) <= products.size
    few = lanczos(products, np.random.default_rng(0).normal(size=products.size), 4)[0]
    assert len(few) == 4 and expected[0] - 1e-12 <= few[0] and few[-1] <= expected[-1] + 1e-12


def test_curvature_along_rules_equals_the_dense_form():
    loss, params = network()
    rules = [gl.rules.BPTT(), gl.rules.OSTL()]
    gradients = gl.gradients(loss.net, params, loss.batch, loss.loss, rules, jax.random.key(0))
    matrix = dense(hessian_product(loss, params), params)
    found = curvature_along(loss, params, gradients, step=1e-6)
    field = dense(hessian_product(loss, params, "field"), params)
    for i, gradient in enumerate(gradients.values()):
        g = np.asarray(ravel_pytree(gradient)[0])
        assert found.values[i, 0] == pytest.approx(g @ matrix @ g / (g @ g), rel=1e-9)
        # What is measured on both sides is the other derivative, as long as no spike jumps.
        assert found.measured[i, 0] == pytest.approx(g @ field @ g / (g @ g), rel=1e-4)
        first = np.asarray(ravel_pytree(gradient["layer_0"])[0])
        block = matrix[: len(first), : len(first)]
        assert found.values[i, 1] == pytest.approx(first @ block @ first / (first @ first), rel=1e-9)
    assert found.rules == ("BPTT", "OSTL") and found.layers == ("network", "layer_0", "layer_1")


def test_float32_agrees_with_float64():
    loss, params = network()
    exact = top_eigenvalues(loss, params, which="both")
    with jax.enable_x64(False):
        single = loss_function(loss.net, jax.tree.map(lambda x: x.astype(jnp.float32), loss.batch), loss.loss)
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        found = top_eigenvalues(single, params, which="both")
        assert Products(single, params).product(np.ones(Products(single, params).size)).dtype == np.float64
    np.testing.assert_allclose([*found.largest, *found.smallest], [*exact.largest, *exact.smallest], rtol=1e-4)
