"""Maps of eigenvalues, refusals of curvature in words, one program for all products, and the figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from curvature_parts import network, ones, quadratic

import gradlab as gl
from gradlab import plan
from gradlab.analysis.curvature import (
    HessianMap,
    Products,
    curvature_along,
    hessian_map,
    hessian_product,
    spectral_density,
    top_eigenvalues,
    trace,
)
from gradlab.analysis.plane import Plane, random_plane
from gradlab.report import plots_curvature
from gradlab.testing.networks import SmoothSpike


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# --- maps ---


def test_a_map_has_the_eigenvalues_of_each_point(tmp_path):
    def loss(params):
        return jnp.sum(jnp.cosh(params["w"]) * jnp.arange(1.0, 7.0).reshape(2, 3)) - 3 * jnp.prod(params["w"])

    params = {"w": jnp.array([[0.5, -0.4, 0.3], [0.2, 0.6, -0.1]])}
    plane = random_plane(params, jax.random.key(0))
    a, b = np.array([-1.0, 0.0, 1.0]), np.array([-2.0, 2.0])
    found = hessian_map(loss, plane, a, b, tolerance=1e-8)
    matrix = jax.jit(jax.hessian(lambda w: loss({"w": w.reshape(2, 3)})))
    for i, j in np.ndindex(2, 3):
        values = np.linalg.eigvalsh(np.asarray(matrix(plane.point(a[j], b[i])["w"].ravel())))
        assert found.smallest[i, j] == pytest.approx(values[0], rel=1e-6)
        assert found.largest[i, j] == pytest.approx(values[-1], rel=1e-6)
        assert found.ratio[i, j] == pytest.approx(abs(values[0] / values[-1]), rel=1e-6)
    assert np.ptp(found.largest) > 1e-2
    again = HessianMap.load(found.save(tmp_path / "map.npz"))
    pd.testing.assert_frame_equal(again.to_frame(), found.to_frame())
    assert again.plot(metric="smallest").get_xlabel() == "random direction 1 (multiples of it)"
    with pytest.raises(ValueError, match="'ratio'"):
        plots_curvature.hessian_map(found.to_frame(), "width")


def test_a_map_says_where_it_has_no_value():
    def loss(params):
        w = params["w"]
        return -jnp.sum(w**2) + jnp.where(w[0, 0] > 1.4, jnp.nan, 0.0) * jnp.sum(w**2)

    plane = Plane({"w": jnp.ones((2, 2))}, {"w": jnp.array([[1.0, 0], [0, 0]])}, {"w": jnp.array([[0, 1.0], [0, 0]])})
    found = hessian_map(loss, plane, np.array([0.0, 0.5]), np.zeros(1))
    frame = found.to_frame().set_index(["metric", "a"])
    assert frame.loc[("smallest", 0.0), "value"] == pytest.approx(-2.0)
    assert frame.loc[("ratio", 0.0), "flag"] == "no eigenvalue is positive: the ratio says nothing"
    assert frame.loc[("largest", 0.5), "flag"] == "the second derivative is not finite here"
    assert "hatched: undefined" in found.plot().get_title(loc="left")


# --- the door, and figures ---


def test_bad_input_is_refused_in_words():
    loss, params = network()
    with pytest.raises(ValueError, match="'surrogate' and 'field'"):
        hessian_product(loss, params, "true")
    with pytest.raises(ValueError, match=r"give loss_function\(net, batch, loss\)"):
        top_eigenvalues(quadratic, ones(), derivative="field")
    with pytest.raises(ValueError, match="from 1 to 2, for 5 parameters"):
        top_eigenvalues(quadratic, ones(), k=3, which="both")
    with pytest.raises(ValueError, match="there are 'largest' and 'both'"):
        top_eigenvalues(quadratic, ones(), which="smallest")
    with pytest.raises(ValueError, match="at least one vector of 5 entries"):
        trace(quadratic, ones(), draws=np.ones((2, 4)))
    with pytest.raises(ValueError, match="draws=0"):
        spectral_density(quadratic, ones(), draws=0)
    with pytest.raises(ValueError, match="too narrow"):
        spectral_density(quadratic, ones(), width=1e-6)
    with pytest.raises(ValueError, match="the gradient of OSTL"):
        curvature_along(quadratic, ones(), {"OSTL": {"layer_0": ones()["layer_0"]}})
    with pytest.raises(ValueError, match="no directions"):
        curvature_along(quadratic, ones(), {})
    with pytest.raises(ValueError, match="parameters are not finite"):
        Products(quadratic, jax.tree.map(lambda leaf: jnp.nan * leaf, ones()))
    with pytest.raises(ValueError, match="second derivative is not finite"):
        trace(lambda p: jnp.sqrt(jnp.sum(p["w"] - 1.0)), {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="must return a scalar"):
        trace(lambda p: p["w"], {"w": jnp.ones(3)})


def test_a_dead_network_is_said_to_be_one():
    found = top_eigenvalues(lambda p: 0.0 * jnp.sum(p["layer_0"]["w"]), ones())
    assert found.largest[0] == 0 and "no gradient passes" in found.flag and np.isnan(found.trust.mismatch)
    assert found.to_frame()["flag"].str.contains("no gradient passes").all()
    with pytest.raises(ValueError, match="a density would be a line"):
        spectral_density(lambda p: jnp.sum(p["layer_0"]["w"]), ones())


def test_one_program_for_all_products_of_a_network(monkeypatch):
    loss, params = network(beta=0.86)
    traces, run = [], plan.run
    monkeypatch.setattr(plan, "run", lambda *given: traces.append(1) or run(*given))
    hessian_map(loss, random_plane(params, jax.random.key(0)), np.linspace(-0.1, 0.1, 2), np.zeros(1))
    before = len(traces)
    top_eigenvalues(loss, params, which="both")
    spectral_density(loss, params, steps=3, draws=2)
    assert before > 0 and len(traces) == before
    trace(loss, params, draws=2, derivative="field")
    assert len(traces) > before  # negative control: the other derivative is another program


def words_of(ax):
    legend = ax.get_figure().legends[0]
    return "\n".join(text.get_text() for text in [legend.get_title(), *legend.get_texts()])


def test_figures_are_drawn_from_stored_frames_and_warn(tmp_path):
    loss, params = network()
    gradients = gl.gradients(
        loss.net, params, loss.batch, loss.loss, [gl.rules.BPTT(), gl.rules.SLTT()], jax.random.key(0)
    )
    results = {
        "curvature_along": curvature_along(loss, params, gradients),
        "eigenvalues": top_eigenvalues(loss, params, k=2, which="both"),
        "trace": trace(loss, params, draws=3),
        "spectral_density": spectral_density(loss, params, draws=2),
    }
    for name, result in results.items():
        result.to_frame().to_csv(tmp_path / "frame.csv", index=False)
        ax = getattr(plots_curvature, name)(pd.read_csv(tmp_path / "frame.csv"))
        said = " ".join(words_of(ax).split())
        assert "mismatch with the measured change of the gradient" in said and "not foretold" in said
        assert "unit of weight" in ax.get_ylabel() + ax.get_xlabel()
    assert results["spectral_density"].plot().get_yscale() == "log"
    smooth, params = network(SmoothSpike())
    said = words_of(top_eigenvalues(smooth, params).plot())
    assert "mismatch" in said and "foretold" not in said  # negative control
    ax = results["curvature_along"].plot()
    drawn = [line for line in ax.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(drawn[0].get_ydata(), results["curvature_along"].measured[0])
    np.testing.assert_allclose(drawn[1].get_ydata(), results["curvature_along"].values[0])
