"""Descent along rules' steps, against losses evaluated one point at a time; lines between solutions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import gradlab as gl
from gradlab.analysis.between import Between, Line, between
from gradlab.analysis.descent import best_steps, descent_ratios
from gradlab.analysis.rays import ratio
from gradlab.report import plots_descent
from gradlab.rules import BPTT, OSTL, OTTT, SLTT, Estimate, Rule
from gradlab.rules.sweep import backward
from gradlab.testing.networks import SmoothSpike, case, feed_forward, lif

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Scaled(Rule):
    """BPTT times a number."""

    reference: ClassVar[str] = "a test"
    by: float = 2.0

    def gradient(self, net, params, tape, state, key):
        return Estimate(jax.tree.map(lambda g: self.by * g, backward(net, params, tape)))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def spiking():
    with jax.enable_x64(True):
        return case(feed_forward(widths=(8, 4)), n_steps=12, batch_size=6, masked=True)


@pytest.fixture(scope="module")
def smooth():
    with jax.enable_x64(True):
        return case(feed_forward(lif(surrogate=SmoothSpike()), widths=(6, 4)), n_steps=8, batch_size=4)


def loss_at(c, params, batch=None):
    return gl.evaluate(c.net, params, c.batch if batch is None else batch, c.loss)["loss"]


def moved(params, direction, by):
    return jax.tree.map(lambda p, d: p + by * np.asarray(d), params, direction)


def length_of(tree):
    return np.sqrt(sum(float(np.sum(np.asarray(leaf) ** 2)) for leaf in jax.tree.leaves(tree)))


def inner(a, b):
    return sum(float(np.sum(np.asarray(x) * np.asarray(y))) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def gradient(c, rule):
    return gl.gradients(c.net, c.params, c.batch, c.loss, [rule], KEY)[rule.name]


def other_batch(c):
    rng = np.random.default_rng(7)
    return c.batch._replace(inputs=jnp.asarray(rng.random(c.batch.inputs.shape) < 0.4, c.batch.inputs.dtype))


def test_decreases_equal_losses_evaluated_one_by_one(spiking):
    c, test = spiking, other_batch(spiking)
    found = descent_ratios(c.net, c.params, c.batch, c.loss, [OSTL(), SLTT()], KEY, (0.02, 0.3), test_batch=test)
    frame = found.to_frame().set_index(["rule", "data", "metric", "relative_length"])["value"]
    target, theta = gradient(c, BPTT()), length_of(c.params)
    for rule in (BPTT(), OSTL(), SLTT()):
        g = gradient(c, rule)
        for relative in (0.02, 0.3):
            length = relative * theta
            for data, batch in (("train", c.batch), ("test", test)):
                fall = loss_at(c, c.params, batch) - loss_at(c, moved(c.params, g, -length / length_of(g)), batch)
                best = loss_at(c, c.params, batch) - loss_at(
                    c, moved(c.params, target, -length / length_of(target)), batch
                )
                assert frame[rule.name, data, "decrease", relative] == pytest.approx(fall, rel=1e-9, abs=1e-13)
                got = frame[rule.name, data, "descent_ratio", relative]
                assert got == pytest.approx(fall / best, rel=1e-9) if best > 0 else np.isnan(got)
            predicted = length * inner(g, target) / length_of(g)
            assert frame[rule.name, "train", "predicted_decrease", relative] == pytest.approx(predicted, rel=1e-12)
            cosine = inner(g, target) / length_of(g) / length_of(target)
            assert frame[rule.name, "train", "predicted_ratio", relative] == pytest.approx(cosine, rel=1e-12)
    # The test must see real steps: the loss moves, and the rules move it differently.
    falls = [frame[rule, "train", "decrease", 0.02] for rule in ("BPTT", "OSTL", "SLTT")]
    assert min(np.abs(falls)) > 1e-4 and len(set(falls)) == 3


def test_the_reference_and_any_multiple_of_it_have_ratio_one_at_matched_length_only(spiking):
    c = spiking
    sgd = gl.Optimizer("sgd", learning_rate=0.2)
    found = descent_ratios(c.net, c.params, c.batch, c.loss, [BPTT(), Scaled()], KEY, (0.01, 0.1), sgd)
    for step in (0, 1):
        assert found.ratio("BPTT", step) == (1.0, "") and found.ratio("Scaled", step) == (1.0, "")
    assert found.ratio("BPTT", kind="optimizer") == (1.0, "")
    share, flag = found.ratio("Scaled", kind="optimizer")
    assert not flag and abs(share - 1.0) > 0.01
    frame = found.to_frame()
    rows = frame[(frame["kind"] == "optimizer") & (frame["metric"] == "decrease")].set_index("rule")["length"]
    assert rows["Scaled"] == pytest.approx(2 * rows["BPTT"], rel=1e-12)


def test_after_the_optimizer_from_a_fresh_state(spiking):
    c = spiking
    chain = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(3e-2, weight_decay=0.1))
    named = gl.Optimizer("adam", learning_rate=3e-2)
    for optimizer, build in ((named, named.build()), (chain, chain)):
        found = descent_ratios(c.net, c.params, c.batch, c.loss, [OTTT()], KEY, (0.01,), optimizer)
        frame = found.to_frame()
        frame = frame[frame["kind"] == "optimizer"].set_index(["rule", "metric"])
        falls = {}
        for rule in (BPTT(), OTTT()):
            g = gradient(c, rule)
            u = build.update(g, build.init(c.params), c.params)[0]
            falls[rule.name] = loss_at(c, c.params) - loss_at(c, moved(c.params, u, 1.0))
            assert frame.loc[(rule.name, "decrease"), "value"] == pytest.approx(falls[rule.name], rel=1e-9)
            assert frame.loc[(rule.name, "decrease"), "length"] == pytest.approx(length_of(u), rel=1e-12)
            predicted = -inner(u, gradient(c, BPTT()))
            assert frame.loc[(rule.name, "predicted_decrease"), "value"] == pytest.approx(predicted, rel=1e-10)
        share = frame.loc[("OTTT", "descent_ratio"), "value"]
        assert share == pytest.approx(falls["OTTT"] / falls["BPTT"], rel=1e-9)


def test_short_steps_of_a_smooth_network_keep_the_first_orders_promise(smooth):
    c = smooth
    found = descent_ratios(c.net, c.params, c.batch, c.loss, [OTTT()], KEY, (1e-5, 0.3)).to_frame()
    table = found.pivot(index=["rule", "relative_length"], columns="metric", values="value")
    for rule in ("BPTT", "OTTT"):
        near, far = table.loc[(rule, 1e-5)], table.loc[(rule, 0.3)]
        assert near["decrease"] == pytest.approx(near["predicted_decrease"], rel=1e-3)
        assert far["decrease"] != pytest.approx(far["predicted_decrease"], rel=0.1)
    assert table.loc[("OTTT", 1e-5), "descent_ratio"] == pytest.approx(
        table.loc[("OTTT", 1e-5), "predicted_ratio"], rel=1e-3
    )
    assert table.loc[("OTTT", 1e-5), "predicted_ratio"] < 0.999


def test_rates_are_lengths_in_gradients(spiking):
    c = spiking
    found = descent_ratios(c.net, c.params, c.batch, c.loss, [OSTL()], KEY, rates=(0.5, 2.0)).to_frame()
    size = length_of(gradient(c, BPTT()))
    rows = found[found["metric"] == "decrease"]
    np.testing.assert_allclose(rows["length"], [0.5 * size, 2 * size] * 2, rtol=1e-12)
    np.testing.assert_allclose(rows["rate"], [0.5, 2.0] * 2, rtol=1e-12)
    np.testing.assert_allclose(rows["relative_length"], rows["length"] / length_of(c.params), rtol=1e-12)
    g = gradient(c, BPTT())
    fall = loss_at(c, c.params) - loss_at(c, moved(c.params, g, -2.0))
    assert rows["value"].iloc[1] == pytest.approx(fall, rel=1e-9)


def test_ascent_is_negative_and_an_ascending_reference_undefined(smooth):
    c = smooth
    up, zero = Scaled(by=-1.0), Scaled(by=0.0)
    found = descent_ratios(c.net, c.params, c.batch, c.loss, [up, zero], KEY, (0.01,))
    assert found.ratio(up.name)[0] < -0.5
    assert found.ratio(zero.name)[1] == f"the gradient of {zero.name} is zero"
    against = descent_ratios(c.net, c.params, c.batch, c.loss, [BPTT()], KEY, (0.01,), reference=up)
    frame = against.to_frame().set_index(["rule", "metric"])
    assert np.isnan(frame.loc[("BPTT", "descent_ratio"), "value"])
    assert frame.loc[("BPTT", "descent_ratio"), "flag"] == f"the step of {up.name} does not lower the loss"
    # Both decreases are still there.
    assert frame.loc[("BPTT", "decrease"), "value"] > 0 > frame.loc[(up.name, "decrease"), "value"]


def test_a_decrease_within_round_off_is_no_unit():
    epsilon = float(np.finfo(np.float32).eps)
    assert "round-off" in ratio(1e-6, 1e-6, 2.0, epsilon, "R")[1]
    assert ratio(1e-6, 1e-6, 0.2, epsilon, "R") == (1.0, "")
    assert "not lower" in ratio(1.0, 0.0, 2.0, epsilon, "R")[1] and "finite" in ratio(np.inf, 1.0, 2.0, epsilon, "R")[1]


def test_best_steps_are_the_best_of_an_honest_grid(spiking):
    c = spiking
    lengths = np.geomspace(1e-3, 1.0, 13)
    found = best_steps(c.net, c.params, c.batch, c.loss, [SLTT(), Scaled(by=0.0)], KEY, lengths)
    for row, rule in enumerate((BPTT(), SLTT())):
        g = gradient(c, rule)
        losses = [loss_at(c, moved(c.params, g, -l * length_of(c.params) / length_of(g))) for l in lengths]
        np.testing.assert_allclose(found.losses[row], losses, rtol=1e-10)
        length, decrease, flag = found.best(rule.name)
        place = int(np.argmin(losses))
        assert 0 < place < 12 and not flag
        assert length == pytest.approx(lengths[place] * length_of(c.params), rel=1e-12)
        assert decrease == pytest.approx(loss_at(c, c.params) - min(losses), rel=1e-9)
    frame = found.to_frame()
    assert frame[(frame["rule"] == "Scaled(by=0.0)")]["value"].isna().all()
    table = frame[frame["length"].isna()].set_index(["rule", "metric"])["value"]
    assert table["BPTT", "best_ratio"] == 1.0
    share = found.best("SLTT")[1] / found.best("BPTT")[1]
    assert table["SLTT", "best_ratio"] == pytest.approx(share, rel=1e-12)


def test_the_best_at_an_edge_of_the_grid_is_not_known(smooth):
    c = smooth
    wide = best_steps(c.net, c.params, c.batch, c.loss, [], KEY, np.geomspace(1e-4, 10, 21))
    best = wide.best("BPTT")[0] / length_of(c.params)
    short = best_steps(c.net, c.params, c.batch, c.loss, [], KEY, best * np.array([0.01, 0.02, 0.05]))
    long = best_steps(c.net, c.params, c.batch, c.loss, [], KEY, best * np.array([1.5, 2.0, 3.0]))
    assert "longest" in short.best("BPTT")[2] and "shortest" in long.best("BPTT")[2]
    up = best_steps(c.net, c.params, c.batch, c.loss, [Scaled(by=-1.0)], KEY, best * np.array([0.1, 0.2, 0.5]))
    assert "no length" in up.best("Scaled(by=-1.0)")[2]
    assert up.to_frame().set_index("metric").loc["best_length", "value"].isna().all()


def test_a_second_call_compiles_nothing():
    traced = []

    def counting(outputs, targets):
        traced.append(1)
        return optax.softmax_cross_entropy(outputs, targets)

    c = case(feed_forward(widths=(5, 3)), loss=gl.PerStep(counting), n_steps=5)
    sgd, solutions = gl.Optimizer("sgd", learning_rate=0.1), {"A": c.params, "B": c.params, "C": c.params}

    def all_three(key):
        descent_ratios(c.net, c.params, c.batch, c.loss, [OSTL()], key, (0.01, 0.1), sgd)
        best_steps(c.net, c.params, c.batch, c.loss, [OSTL()], key)
        between(c.net, c.batch, c.loss, solutions, points=5)

    all_three(KEY)
    first = len(traced)
    all_three(jax.random.key(1))
    # Only the door's look at the loss function on bare shapes is left, once per check.
    checks = len(traced) - first
    all_three(jax.random.key(2))
    assert 0 <= checks < first and len(traced) - first == 2 * checks
    assert checks <= 12


def test_the_loss_between_solutions(spiking):
    c = spiking
    names = ("BPTT", "OSTL", "SLTT")
    ends = dict(zip(names, [moved(c.params, gradient(c, r), -4.0) for r in (BPTT(), OSTL(), SLTT())], strict=True))
    found = between(c.net, c.batch, c.loss, ends, points=5)
    assert list(found.lines) == [("BPTT", "OSTL"), ("BPTT", "SLTT"), ("OSTL", "SLTT")]
    assert list(between(c.net, c.batch, c.loss, ends, 5, "OSTL").lines) == [("OSTL", "BPTT"), ("OSTL", "SLTT")]
    line = found.lines["OSTL", "SLTT"]
    for t, value, accuracy in zip(found.t, line.loss, line.accuracy, strict=True):
        point = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, ends["OSTL"], ends["SLTT"])
        health = gl.evaluate(c.net, point, c.batch, c.loss)
        assert value == pytest.approx(health["loss"], rel=1e-12) and accuracy == pytest.approx(health["accuracy"])
    apart = jax.tree.map(lambda a, b: a - b, ends["OSTL"], ends["SLTT"])
    assert line.distance == pytest.approx(length_of(apart), rel=1e-12)
    back = between(c.net, c.batch, c.loss, {"SLTT": ends["SLTT"], "OSTL": ends["OSTL"]}, points=5)
    np.testing.assert_allclose(back.lines["SLTT", "OSTL"].loss, line.loss[::-1], rtol=1e-10)
    assert np.ptp(line.loss) > 1e-3  # negative control: a reversed flat line would prove nothing


def test_barriers_of_curves_made_by_hand():
    t = np.linspace(0.0, 1.0, 5)
    curves = {
        ("A", "B"): 1.0 + 2 * t + 4 * t * (1 - t),  # a hill of height 1 on a slope
        ("A", "C"): 1.0 + t,  # a slope alone
        ("B", "C"): 2.0 - t * (1 - t),  # a valley
        ("C", "D"): np.array([1.0, np.inf, 1.0, 1.0, 1.0]),
    }
    found = Between(t, {pair: Line(curve, None, 1.0) for pair, curve in curves.items()})
    assert found.barrier("A", "B") == pytest.approx(1.0)
    assert found.instability("A", "B") == pytest.approx(3.25 - 2.0)
    assert found.barrier("A", "C") == pytest.approx(0.0, abs=1e-15)
    assert found.instability("A", "C") == pytest.approx(0.5)  # a slope alone has no barrier, and yet this is positive
    assert found.barrier("B", "C") == 0.0
    assert np.isnan(found.barrier("C", "D"))
    frame = found.to_frame()
    assert (frame["value"].isna() | ~np.isfinite(frame["value"])).eq(frame["flag"] != "").all()


def test_bad_input_is_refused_in_words(spiking):
    c = spiking
    args = (c.net, c.params, c.batch, c.loss, [OSTL()], KEY)
    with pytest.raises(ValueError, match="positive numbers"):
        descent_ratios(*args, lengths=(0.1, -0.1))
    with pytest.raises(ValueError, match="positive numbers"):
        best_steps(*args, rates=())
    with pytest.raises(ValueError, match="three on"):
        best_steps(*args, lengths=(0.1, 0.2, 0.2))
    with pytest.raises(TypeError, match="adam"):
        descent_ratios(*args, optimizer="adam")
    with pytest.raises(ValueError, match="rates need a gradient"):
        descent_ratios(*args, rates=(0.1,), reference=Scaled(by=0.0))
    with pytest.raises(KeyError, match="was not measured"):
        descent_ratios(*args).ratio("OTTT")
    with pytest.raises(ValueError, match="at least two"):
        between(c.net, c.batch, c.loss, {"A": c.params})
    with pytest.raises(ValueError, match="at least three"):
        between(c.net, c.batch, c.loss, {"A": c.params, "B": c.params}, points=2)
    with pytest.raises(ValueError, match="no solution"):
        between(c.net, c.batch, c.loss, {"A": c.params, "B": c.params}, reference="C")
    with pytest.raises(ValueError, match="solution 'B': params lack"):
        between(c.net, c.batch, c.loss, {"A": c.params, "B": {"layer_0": c.params["layer_0"]}})


def test_figures_are_drawn_from_files(spiking, tmp_path):
    c = spiking
    results = {
        "ratios": descent_ratios(
            c.net, c.params, c.batch, c.loss, [OSTL(), Scaled(by=0.0)], KEY, optimizer=optax.sgd(0.1)
        ),
        "curves": best_steps(c.net, c.params, c.batch, c.loss, [OSTL(), Scaled(by=0.0)], KEY),
        "lines": between(c.net, c.batch, c.loss, {"BPTT": c.params, "OSTL": moved(c.params, c.params, 0.5)}),
    }
    frames = {}
    for name, result in results.items():
        result.to_frame().to_csv(tmp_path / f"{name}.csv", index=False)
        frames[name] = pd.read_csv(tmp_path / f"{name}.csv")
    ax = plots_descent.draw(frames["ratios"])
    assert ax.get_xscale() == "log" and "relative to BPTT" in ax.get_ylabel()
    words = ax.figure.legends[0].get_title().get_text().replace("\n", " ")
    assert "the gradient of Scaled(by=0.0) is zero" in words
    assert ax.get_ylabel() != plots_descent.draw(frames["ratios"], metric="decrease").get_ylabel()
    ax = plots_descent.curves(frames["curves"])
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert any(label.startswith("BPTT: falls by") for label in labels)
    ax = plots_descent.lines(frames["lines"])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), results["lines"].lines["BPTT", "OSTL"].loss)
    assert "share" in plots_descent.lines(frames["lines"], metric="accuracy").get_ylabel()
    with pytest.raises(ValueError, match="choose from"):
        plots_descent.draw(frames["ratios"], metric="cosine")
