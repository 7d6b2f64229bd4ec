"""Similarity of representations (CKA) and activities of networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ortho_group

from gradlab.analysis import representation
from gradlab.analysis.representation import activity, cka, compare_representations
from gradlab.losses import Batch
from gradlab.testing import networks

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(30, 6)), RNG.normal(size=(30, 4))
WIDE = RNG.normal(size=(8, 20))

# CKA.


def hsic(x, y, debiased):
    """Song et al. 2012, equation (5) for the unbiased estimate, written with n x n kernels and nothing simplified."""
    k, l = x @ x.T, y @ y.T
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l, one = k * (1 - np.eye(n)), l * (1 - np.eye(n)), np.ones(n)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(
    ("x", "y"), [(X, Y), (X, X @ RNG.normal(size=(6, 6))), (WIDE, WIDE + X[:8, :1]), (X[:8], WIDE)]
)
def test_equal_to_explicit_kernels(x, y, debiased):
    """Tall and wide matrices, so that products over features and over rows are both tried."""
    expected = hsic(x, y, debiased) / np.sqrt(hsic(x, x, debiased) * hsic(y, y, debiased))
    assert cka(x, y, debiased) == pytest.approx(expected, rel=1e-12)
    assert cka(x, y, debiased) != pytest.approx(cka(x, y, not debiased), rel=1e-3)  # negative control


def test_by_hand():
    # Centred, x is (-1, 0, 1) and y is (-1, 2, -1) / 3 on two equal axes: they are orthogonal.
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert cka(x, y) == pytest.approx(0.0, abs=1e-15)
    # z is (-1, -1, 2) / 3: <x, z>^2 / (|x|^2 |z|^2) = 1 / (2 * 6 / 9) = 3 / 4.
    z = np.array([[0.0], [0.0], [1.0]])
    assert cka(x, z) == pytest.approx(0.75)


@pytest.mark.parametrize("debiased", [False, True])
def test_rotations_scales_and_shifts_are_not_seen(debiased):
    rotation = ortho_group.rvs(6, random_state=0)
    assert cka(X, 3.0 * X @ rotation + 5.0, debiased) == pytest.approx(1.0, abs=1e-12)
    assert cka(X, X[:, ::-1], debiased) == pytest.approx(1.0, abs=1e-12)
    stretched = X @ np.diag([10.0, 1, 1, 1, 1, 1])  # negative control: invertible, but no rotation
    assert cka(X, stretched, debiased) < 0.9
    assert cka(X, X[::-1], debiased) < 0.5  # negative control: other rows belong together
    assert cka(X, Y, debiased) == pytest.approx(cka(Y, X, debiased))


def test_unrelated_activities_are_alike_only_by_bias():
    draws = [RNG.normal(size=(2, 20, 100)) for _ in range(100)]
    biased, debiased = ([cka(x, y, d) for x, y in draws] for d in (False, True))
    assert np.mean(biased) == pytest.approx(0.83, abs=0.01), "the number in the docstring"
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / 10 and np.std(debiased) < 0.1


def test_what_has_no_cka():
    with pytest.raises(ValueError, match="x does not vary from row to row"):
        cka(np.ones((30, 3)), X)
    one = np.zeros((30, 3))
    one[4] = 1 / 3
    with pytest.raises(ValueError, match="y varies in a single row"):
        cka(X, one, debiased=True)
    assert 0 < cka(X, one) < 1, "the biased estimate has a value there"
    one[5, 0] = 0.5
    assert -1 <= cka(X, one, debiased=True) <= 1
    for x, words in ((X[:, 0], "rows, features"), (X * np.nan, "finite"), (X[:20], "x has 20 rows, y 30")):
        with pytest.raises(ValueError, match=words):
            cka(x, X)
    with pytest.raises(ValueError, match="3 rows are too few"):
        cka(X[:3], Y[:3], debiased=True)


# Activities.


def test_rates_and_steps_by_loops(x64):
    case = networks.case(masked=True, batch_size=4)
    mask = np.asarray(case.batch.mask).copy()
    mask[:, 1] = 0  # a sample of which nothing counts
    batch = Batch(case.batch.inputs, case.batch.targets, jnp.asarray(mask))
    state = case.net.initial_state(case.params, batch.inputs)
    outputs = []
    for x in batch.inputs:
        state, _, now = case.net.step(case.params, state, x)
        outputs.append(now)
    rates, steps = activity(case.net, case.params, batch), activity(case.net, case.params, batch, "time")
    for index, layer in enumerate(case.net.layer_names):
        s = np.stack([np.asarray(now[index]) for now in outputs])
        by_hand = [sum(s[t, b] for t in range(9) if mask[t, b]) / mask[:, b].sum() for b in (0, 2, 3)]
        np.testing.assert_allclose(rates[layer], by_hand, rtol=1e-12)
        every = [s[t, b] for t in range(9) for b in range(4) if mask[t, b]]
        np.testing.assert_array_equal(steps[layer], every)
        assert rates[layer].dtype == steps[layer].dtype == np.float64
    without = activity(case.net, case.params, batch._replace(mask=None))  # negative control: the mask matters
    assert without["layer_0"].shape[0] == 4 and not np.allclose(without["layer_0"][[0, 2, 3]], rates["layer_0"])


def test_activity_at_the_door():
    case = networks.case(dtype=jnp.float32)
    inputs, targets, _ = case.batch
    with pytest.raises(ValueError, match="'rates', 'time'"):
        activity(case.net, case.params, case.batch, "spikes")
    with pytest.raises(TypeError, match=r"gl\.Batch"):
        activity(case.net, case.params, inputs)
    with pytest.raises(ValueError, match="leaves out every step"):
        activity(case.net, case.params, Batch(inputs, targets, jnp.zeros(inputs.shape[:2])))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 9\)"):
        activity(case.net, case.params, Batch(inputs, targets, jnp.ones((3, 9))))
    with pytest.raises(ValueError, match="has shape") as error:
        compare_representations(case.net, {"BPTT": case.params, "OTTT": wider(case.params)}, case.batch)
    assert error.value.__notes__ == ["this is about the parameters 'OTTT'"]


def wider(params):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params)


# Networks.


@pytest.fixture(scope="module")
def trained():
    """A network, two changed copies and a silent one, on a batch of 24 sequences."""
    case = networks.case(networks.feed_forward(widths=(6, 5, 8)), batch_size=24, n_steps=12, dtype=jnp.float32)
    params = {"BPTT": case.params}
    for i, name in enumerate(("OTTT", "SLTT")):
        noise = jax.tree.map(lambda w, i=i: 0.1 * jax.random.normal(jax.random.key(i), w.shape), case.params)
        params[name] = jax.tree.map(jnp.add, case.params, noise)
    params["dead"] = {**case.params, "layer_1": jax.tree.map(lambda w: -jnp.abs(w) - 1, case.params["layer_1"])}
    return case, params


def test_all_pairs_of_networks_and_layers(trained):
    case, params = trained
    for kind, debiased in (("rates", True), ("time", False)):
        found = compare_representations(case.net, params, case.batch, kind, debiased)
        one, other = (activity(case.net, params[name], case.batch, kind) for name in ("OTTT", "SLTT"))
        expected = [[cka(one[i], other[j], debiased) for j in found.layers] for i in found.layers]
        np.testing.assert_allclose(found.between("OTTT", "SLTT"), expected, rtol=1e-12)
        np.testing.assert_array_equal(found.between("SLTT", "OTTT"), found.between("OTTT", "SLTT").T)
        assert found.of_layer("layer_0")[1, 2] == pytest.approx(expected[0][0])
        np.testing.assert_allclose(np.diag(found.of_layer("layer_0")), 1.0)
        assert found.n_rows == (24 if kind == "rates" else 24 * 12)
        assert found.between("BPTT", "OTTT")[0, 0] < 0.999


def test_a_silent_layer_is_flagged(trained):
    case, params = trained
    found = compare_representations(case.net, params, case.batch)
    assert found.flags["dead", "layer_1"] == "layer_1 of dead is silent: no unit fired on this batch"
    matrix = found.of_layer("layer_1")
    assert np.isnan(matrix[3]).all() and np.isnan(matrix[:, 3]).all() and np.isfinite(matrix[:3, :3]).all()
    frame = found.to_frame()
    assert len(frame) == (4 * 3) ** 2 and set(frame["metric"]) == {"cka_debiased"}
    assert ((frame["flag"] != "") == frame["value"].isna()).all()
    assert set(compare_representations(case.net, params, case.batch, debiased=False).to_frame()["metric"]) == {"cka"}


def test_renamed_units_are_the_same_representation(trained):
    """Units of layer 0 in another order, and the weights below and above with them."""
    case, params = trained
    order = np.array([3, 0, 5, 1, 4, 2])
    first, second = params["BPTT"]["layer_0"]["connection"], params["BPTT"]["layer_1"]["connection"]
    moved = {
        **params["BPTT"],
        "layer_0": {"connection": {"kernel": first["kernel"][:, order], "bias": first["bias"][order]}},
        "layer_1": {"connection": {**second, "kernel": second["kernel"][order]}},
    }
    found = compare_representations(case.net, {"one": params["BPTT"], "moved": moved}, case.batch)
    np.testing.assert_allclose(np.diag(found.between("one", "moved"))[:2], 1.0, rtol=1e-6)
    rates = activity(case.net, moved, case.batch)["layer_0"]
    assert not np.allclose(rates, activity(case.net, params["BPTT"], case.batch)["layer_0"])  # negative control


def test_networks_are_compiled_once(trained, monkeypatch):
    case, params = trained
    traced = []
    outputs = representation._outputs
    counting = jax.jit(lambda net, p, x: traced.append(1) or outputs(net, p, x), static_argnums=0)
    monkeypatch.setattr(representation, "_jitted_outputs", counting)
    compare_representations(case.net, params, case.batch)
    assert len(traced) == 1
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_representations(case.net, {}, case.batch)
    small = Batch(case.batch.inputs[:, :3], case.batch.targets[:3])
    with pytest.raises(ValueError, match="3 rows, too few"):
        compare_representations(case.net, params, small)


def test_figures(trained, tmp_path):
    from gradlab.report import plots_representation as plots

    case, params = trained
    found = compare_representations(case.net, params, case.batch)
    found.to_frame().to_csv(tmp_path / "cka.csv", index=False)
    for ax in (found.plot("layer_1"), plots.networks(pd.read_csv(tmp_path / "cka.csv"), "layer_1")):
        shown = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)
        np.testing.assert_allclose(shown, found.of_layer("layer_1"))
        assert ax.get_title(loc="left") == "layer 1, hatched: undefined"
        assert [text.get_text() for text in ax.get_yticklabels()] == ["BPTT", "OTTT", "SLTT", "dead"]
    ax = found.plot_layers("BPTT", "OTTT")
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), found.between("BPTT", "OTTT"))
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("BPTT", "OTTT") and ax.get_title(loc="left") == ""
    labels = [other.get_ylabel() for other in ax.get_figure().axes]
    assert "linear CKA of rates (debiased, n = 24)" in labels
    with pytest.raises(ValueError, match="no network is named 'RTRL'"):
        found.plot_layers("BPTT", "RTRL")
    with pytest.raises(ValueError, match="no layer is named 'layer_9'"):
        found.plot("layer_9")
