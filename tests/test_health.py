"""The health of a network: the error's flow against BPTT's own gradient, and rates and slopes against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import gradlab as gl
from gradlab.analysis.health import LayerHealth, NetworkHealth, error_flow, network_health
from gradlab.report import plots_health
from gradlab.rules import BPTT
from gradlab.surrogates import FastSigmoid
from gradlab.testing.networks import case, feed_forward, lif

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def recurrent():
    """Three layers, the first one recurrent, feedback from the second, a mask."""
    with jax.enable_x64(True):
        return case(feed_forward(widths=(6, 5, 4), links={0: [0, 1]}), n_steps=9, batch_size=4, masked=True)


def outputs(c):
    tape = gl.record(c.net, c.params, c.batch, c.loss)
    return np.asarray(c.batch.inputs), [np.asarray(layer.output) for layer in tape.slices.layers]


def test_the_errors_on_currents_give_bptts_weight_gradients(recurrent):
    c = recurrent
    flow = error_flow(c.net, c.params, c.batch, c.loss)
    exact = gl.gradients(c.net, c.params, c.batch, c.loss, [BPTT()], KEY)["BPTT"]
    x, s = outputs(c)
    for layer, read in enumerate((x, s[0], s[1])):
        error = np.asarray(flow.errors[layer])
        kernel = np.asarray(exact[f"layer_{layer}"]["connection"]["kernel"])
        bias = np.asarray(exact[f"layer_{layer}"]["connection"]["bias"])
        summed = sum(read[t].T @ error[t] for t in range(9))
        np.testing.assert_allclose(summed, kernel, rtol=0, atol=1e-12 * np.abs(kernel).max())
        np.testing.assert_allclose(error.sum((0, 1)), bias, rtol=0, atol=1e-12 * np.abs(bias).max())
        # Negative control: errors one step late are another gradient.
        shifted = sum(read[t].T @ error[t - 1] for t in range(1, 9))
        assert np.abs(shifted - kernel).max() > 1e-2 * np.abs(kernel).max()
    # A delayed link reads the step before.
    own = sum(s[0][t - 1].T @ np.asarray(flow.errors[0])[t] for t in range(1, 9))
    np.testing.assert_allclose(own, exact["layer_0"]["from_layer_0"]["kernel"], rtol=0, atol=1e-12 * np.abs(own).max())
    for got, expected in zip(jax.tree.leaves(flow.gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max() + 1e-300)


def test_flow_and_gradient_norms(recurrent):
    c = recurrent
    flow = error_flow(c.net, c.params, c.batch, c.loss)
    health = network_health(c.net, c.params, c.batch, c.loss)
    for index, (name, layer) in enumerate(health.layers.items()):
        error = np.asarray(flow.errors[index])
        norms = [np.sqrt(sum(e * e for e in error[t].ravel())) for t in range(9)]
        np.testing.assert_allclose(layer.flow, norms, rtol=1e-12)
        leaves = jax.tree.leaves(flow.gradient[name])
        squares = sum(float(np.sum(np.asarray(leaf) ** 2)) for leaf in leaves)
        assert layer.gradient == pytest.approx(squares**0.5, rel=1e-12) and squares > 0
    # The mask ends some samples early, all samples before the last step of the longest: no error after that.
    assert (health.counted == np.asarray(c.batch.mask).sum(1)).all()


def test_a_vanishing_flow_does_not_underflow():
    """Errors of 1e-30 have squares that float32 cannot hold."""
    with jax.enable_x64(False):
        net = feed_forward(lif(surrogate=gl.Arctan(2.0)), widths=(6, 4))
        c = case(net, n_steps=5, dtype=jnp.float32, loss=gl.PerStep(lambda y, z: 1e-30 * (y - z) ** 2))
        layer = network_health(c.net, c.params, c.batch, c.loss).layers["layer_0"]
    assert layer.flow.min() > 0 and layer.flow.max() < 1e-28 and layer.gradient > 0


def test_rates_and_shares_are_those_of_evaluate(recurrent):
    c = recurrent
    health, known = (f(c.net, c.params, c.batch, c.loss) for f in (network_health, gl.evaluate))
    _, s = outputs(c)
    mask = np.asarray(c.batch.mask)
    for index, (name, layer) in enumerate(health.layers.items()):
        assert layer.rates.mean() == pytest.approx(known["firing_rate"][name], rel=1e-12)
        assert layer.silent == pytest.approx(known["silent_units"][name])
        assert layer.saturated == pytest.approx(known["saturated_units"][name])
        assert layer.slope == pytest.approx(known["slope"][name], rel=1e-12)
        for unit in range(s[index].shape[2]):
            fired = sum(s[index][t, b, unit] for t in range(9) for b in range(4) if mask[t, b])
            assert layer.rates[unit] == pytest.approx(fired / mask.sum(), abs=1e-14)
        unmasked = s[index].mean((0, 1))
        assert np.abs(unmasked - layer.rates).max() > 1e-3  # negative control: the mask matters
        for t in range(9):
            expected = np.mean([s[index][t, b] for b in range(4) if mask[t, b]]) if mask[t].any() else np.nan
            np.testing.assert_allclose(layer.rate_per_step[t], expected, rtol=1e-12)


def test_slopes_against_a_simulation_by_hand():
    beta, slope = 0.8, 30.0
    c = case(feed_forward(lif(beta=beta, surrogate=FastSigmoid(slope)), widths=(7,)), n_steps=10, batch_size=3)
    own = c.params["layer_0"]["connection"]
    x, membrane, slopes = np.asarray(c.batch.inputs), np.zeros((3, 7)), []
    for t in range(10):
        v = beta * membrane + x[t] @ np.asarray(own["kernel"]) + np.asarray(own["bias"])
        slopes.append(1.0 / (slope * np.abs(v - 1.0) + 1.0) ** 2)
        membrane = v - (v >= 1.0)
    slopes = np.array(slopes)
    layer = network_health(c.net, c.params, c.batch, c.loss).layers["layer_0"]
    assert layer.peak == pytest.approx(slopes.max(), rel=1e-12)
    assert layer.slope == pytest.approx(slopes.mean(), rel=1e-12)
    assert layer.open == pytest.approx((slopes > 0.01 * slopes.max()).mean(), rel=1e-12)
    assert 0.05 < layer.open < 0.95


def network(factor=1.0, shift=0.0, mask_last=40):
    """Two hidden layers and a leaky read-out, the hidden weights scaled and shifted."""
    cell = gl.LIF(beta=0.9, surrogate=FastSigmoid(2.0))
    net = gl.connect([nn.Dense(12), cell, nn.Dense(10), cell, nn.Dense(3), gl.LI()])
    x = jnp.asarray(np.random.default_rng(0).random((40, 5, 8)) < 0.5, jnp.float64)
    params = net.init(jax.random.key(1), x)
    for name in ("layer_0", "layer_1"):
        params[name] = jax.tree.map(lambda leaf: factor * leaf + shift, params[name])
    mask = jnp.asarray(np.repeat(np.arange(40)[:, None] >= 40 - mask_last, 5, axis=1), x.dtype)
    targets = jax.nn.one_hot(jnp.arange(5) % 3, 3, dtype=x.dtype)
    loss = gl.PerStep(lambda y, z: (y - z) ** 2)
    return net, params, gl.Batch(x, targets, mask), loss


def test_advice_names_dead_layers_and_a_healthy_network_has_none():
    def said(**settings):
        return " | ".join(network_health(*network(**settings)).advice())

    assert said(factor=2.0, shift=0.05) == ""
    silent = said(factor=0.0, shift=-0.1)
    assert "layer_0: no unit fires: raise its input weights" in silent and "layer_1: no unit fires" in silent
    busy = said(factor=0.0, shift=2.0)
    assert "layer_0: 100% of its units fire at every step" in busy and "never fire" not in busy


def made(flow, **changes):
    """Advice on a network whose first layer has this flow; its output layer's is 1 at every step."""
    healthy = {
        "gradient": 1.0, "rates": np.full(4, 0.2), "silent": 0.0, "saturated": 0.0, "rate_per_step": np.full(20, 0.2),
        "slope": 0.1, "open": 0.3, "peak": 1.0,
    }  # fmt: skip
    hidden = LayerHealth(np.asarray(flow, float), **{**healthy, **changes})
    layers = {"layer_0": hidden, "layer_1": LayerHealth(np.ones(20), **healthy)}
    found = NetworkHealth(layers, np.full(20, 3.0)).advice()
    assert all(sentence.startswith("layer_0: ") for sentence in found)
    return " | ".join(found)


def test_advice_names_a_flow_that_vanishes_or_explodes():
    steps = np.arange(20)
    assert made(np.ones(20)) == ""
    assert made(np.full(20, 1e-3)) == made(np.full(20, 1e3)) == "" and made(2.0 ** (steps - 10)) != ""
    assert "1.0e-05 times that of the output layer (vanishing with depth)" in made(np.full(20, 1e-5))
    assert "exploding with depth" in made(np.full(20, 1e5))
    assert "vanishing over time" in made(10.0 ** (steps - 19)) and "with depth" not in made(10.0 ** (steps - 19))
    assert "exploding over time" in made(10.0 ** (-steps)) and "vanishing" not in made(10.0 ** (-steps))
    assert made(1.3 ** (steps - 19)) == ""
    assert "no error reaches it" in made(np.zeros(20)) and "not finite" in made(np.full(20, np.inf))


def test_advice_names_rates_and_slopes_beyond_the_limits():
    flow = np.ones(20)
    assert "25% of its units never fire" in made(flow, silent=0.25) and made(flow, silent=0.24) == ""
    assert "30% of its units fire at every step" in made(flow, saturated=0.3) and made(flow, saturated=0.2) == ""
    assert "fires on 70% of its steps" in made(flow, rates=np.full(4, 0.7)) and made(flow, rates=np.full(4, 0.5)) == ""
    assert "only 0.5% of its unit-steps" in made(flow, open=0.005) and made(flow, open=0.02) == ""
    assert "zero at every step" in made(flow, open=0.0, peak=0.0)


def test_a_layer_that_does_not_spike_has_no_rates():
    health = network_health(*network(factor=2.0, shift=0.05))
    readout = health.layers["layer_2"]
    assert readout.rates is None and readout.flow.shape == (40,)
    frame = health.to_frame()
    rows = frame[(frame["layer"] == "layer_2") & (frame["metric"] == "firing_rate")]
    assert rows["value"].isna().all() and (rows["flag"] == "the layer does not spike").all()


def test_the_frame_is_tidy_and_the_figures_are_drawn_from_files(recurrent, tmp_path):
    c = recurrent
    health = network_health(c.net, c.params, c.batch, c.loss)
    frame = health.to_frame()
    assert (frame["value"].isna() == (frame["flag"] != "")).all()
    assert not frame.duplicated(["layer", "metric", "unit", "step"]).any()
    frame.to_csv(tmp_path / "health.csv", index=False)
    frame = pd.read_csv(tmp_path / "health.csv")
    ax = plots_health.draw(frame)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.sort(health.layers["layer_0"].rates)[::-1])
    assert "spikes per unit and step" in ax.get_ylabel()
    ax = plots_health.draw(frame, kind="flow")
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown[2], health.layers["layer_2"].flow)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer 0", "layer 1", "layer 2"]
    assert "hatched" not in ax.get_title(loc="left")
    dead = plots_health.draw(network_health(*network(factor=2.0, mask_last=2)).to_frame(), kind="flow")
    assert dead.images[0].norm.vmax > dead.images[0].norm.vmin > 0
    with pytest.raises(ValueError, match="choose from"):
        plots_health.draw(frame, kind="slopes")
    with pytest.raises(ValueError, match="no layer of this network spikes"):
        plots_health.rates(frame[frame["metric"] == "error_flow"])
    with pytest.raises(ValueError, match="no flow to draw"):
        plots_health.flow(frame.assign(value=0.0))
