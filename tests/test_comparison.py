"""The comparison: its numbers on gradients made by hand, dead layers, frames and pictures."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import living, trains

import gradlab as gl
from gradlab import metrics
from gradlab.comparison import METRICS, NETWORK, Comparison
from gradlab.rules import BPTT, OSTL, TBPTT, Estimate, Rule

KEY = jax.random.key(0)
LOSS = gl.PerStep(optax.softmax_cross_entropy)
NET = gl.connect([nn.Dense(6), gl.LIF(beta=0.8, threshold=0.8), nn.Dense(3), gl.LI(0.9)])
INPUTS = trains((7, 4, 5))
TARGETS = jax.nn.one_hot(jnp.array([0, 2, 1, 2]), 3)
BATCH = gl.Batch(INPUTS, TARGETS)


@pytest.fixture(scope="module")
def params():
    return living(NET, INPUTS)


@dataclasses.dataclass(frozen=True)
class Scaled(Rule):
    """BPTT times a factor: the bug that a cosine cannot see."""

    reference: ClassVar[str] = "none"
    factor: float = 2.0

    def gradient(self, net, params, tape, state, key):
        return Estimate(jax.tree.map(lambda g: self.factor * g, BPTT().gradient(net, params, tape, state, key).grad))


HEALTHY = {"silent_units": {"layer_0": 0.0}, "saturated_units": {"layer_0": 0.0}}


def built(gradients, health=HEALTHY):
    """A comparison of gradients written down by hand."""
    return Comparison.build(NET, gradients, health, {})


def tree(a, b, c):
    return {
        "layer_0": {"connection": {"kernel": np.array(a, np.float32)}},
        "layer_1": {"connection": {"kernel": np.array(b, np.float32), "bias": np.array(c, np.float32)}},
    }


HAND = {
    "reference": tree([[3.0, 4.0]], [[1.0], [0.0]], [0.0]),
    "twice": tree([[6.0, 8.0]], [[2.0], [0.0]], [0.0]),
    "turned": tree([[4.0, -3.0]], [[0.0], [1.0]], [0.0]),
    "mixed": tree([[3.0, 4.0]], [[-1.0], [0.0]], [2.0]),
}


def test_gram_matrices_and_metrics_of_hand_made_gradients():
    found = built(HAND)
    assert found.layers == ("layer_0", "layer_1")
    np.testing.assert_array_equal(
        found.gram["layer_0/connection/kernel"], [[25, 50, 0, 25], [50, 100, 0, 50], [0, 0, 25, 0], [25, 50, 0, 25]]
    )
    np.testing.assert_array_equal(found.gram_of("layer_1")[0], [1, 2, 0, -1])
    np.testing.assert_array_equal(found.gram_of()[0], [26, 52, 0, 24])
    np.testing.assert_allclose(found.cosines("layer_1")[0], [1, 1, 0, -1 / np.sqrt(5)])
    twice = found.metrics("twice")
    expected = {"cosine": 1, "norm_ratio": 2, "projection": 2, "relative_error": 1, "sign_agreement": 1}
    assert {name: twice[name] for name in expected} == pytest.approx(expected)
    turned = found.metrics("turned")
    assert turned["cosine"] == 0 and turned["projection"] == 0 and turned["norm_ratio"] == pytest.approx(1)
    assert turned["relative_error"] == pytest.approx(np.sqrt(2))
    mixed = found.metrics("mixed", "layer_1")
    assert mixed["cosine"] == pytest.approx(-1 / np.sqrt(5)) and mixed["norm_ratio"] == pytest.approx(np.sqrt(5))
    assert mixed["relative_error"] == pytest.approx(np.sqrt(8)) and mixed["projection"] == -1
    # Of the three entries of layer_1 only one is not zero in the reference, and its sign is wrong.
    assert mixed["sign_agreement"] == 0 and mixed["sign_coverage"] == pytest.approx(1 / 3)
    assert mixed["norm"] == pytest.approx(np.sqrt(5))


def test_the_comparison_s_numbers_are_those_of_the_plain_metrics():
    random = np.random.default_rng(0)
    gradients = {k: tree(*(random.normal(size=s) for s in ((5, 6), (6, 3), (3,)))) for k in ("r", "a", "b")}
    found = built(gradients)
    flat = {
        k: np.concatenate([leaf.ravel().astype(float) for leaf in jax.tree.leaves(t)]) for k, t in gradients.items()
    }
    for name in ("r", "a", "b"):
        own = found.metrics(name)
        for metric in ("cosine", "norm_ratio", "relative_error", "projection"):
            assert own[metric] == pytest.approx(getattr(metrics, metric)(flat[name], flat["r"]), abs=1e-14)
        assert own["norm"] == pytest.approx(metrics.norm(flat[name]))


def test_a_rule_twice_too_large_is_caught_by_everything_but_the_cosine(params):
    found = gl.compare(NET, params, BATCH, LOSS, [Scaled(), Scaled(factor=-1.0)], KEY)
    for group in (NETWORK, "layer_0", "layer_1/connection/bias"):
        twice, reverse = found.metrics("Scaled", group), found.metrics("Scaled(factor=-1.0)", group)
        expected = {"cosine": 1, "norm_ratio": 2, "projection": 2, "relative_error": 1, "sign_agreement": 1}
        assert {k: twice[k] for k in expected} == pytest.approx(expected, rel=1e-6)
        expected = {"cosine": -1, "norm_ratio": 1, "projection": -1, "relative_error": 2, "sign_agreement": 0}
        assert {k: reverse[k] for k in expected} == pytest.approx(expected, rel=1e-6)


def test_a_small_relative_error_does_not_drown_in_the_gram_matrix():
    """From inner products alone, g.g - 2 g.r + r.r, an error of 1e-9 would be rounding noise."""
    reference = np.ones((1, 4)) * 1e3
    near = reference.copy()
    near[0, 0] *= 1 + 4e-9
    wide = {k: {"layer_0": {"connection": {"kernel": v}}} for k, v in (("reference", reference), ("near", near))}
    found = built(wide)
    assert found.metrics("near")["relative_error"] == pytest.approx(2e-9, rel=1e-6)
    gram = found.gram_of()
    cancelled = np.sqrt(max(gram[1, 1] - 2 * gram[0, 1] + gram[0, 0], 0.0) / gram[0, 0])
    assert cancelled != pytest.approx(2e-9, rel=0.1)


def test_float32_gradients_are_reduced_in_float64():
    values = np.concatenate([[1e4], np.full(100_000, 1e-3)]).astype(np.float32)[None]
    found = built({"reference": {"layer_0": {"connection": {"kernel": values}}}})
    exact = 1e8 + 100_000 * float(np.float32(1e-3)) ** 2
    assert found.gram_of().dtype == np.float64
    assert found.gram_of()[0, 0] == pytest.approx(exact, rel=1e-13)
    assert float(values[0] @ values[0]) != pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(("bias", "word"), [(-50.0, "silent"), (50.0, "saturated")])
def test_dead_layers_have_no_direction_and_say_why(params, bias, word):
    own = params["layer_0"]["connection"]
    dead = {**params, "layer_0": {"connection": {**own, "bias": own["bias"] + bias}}}
    found = gl.compare(NET, dead, BATCH, LOSS, [OSTL()], KEY)
    reason = found.dead_layers()["layer_0"]
    assert f"layer_0 is {word}" in reason
    for group in (NETWORK, "layer_0", "layer_0/connection/kernel"):
        values = found.metrics("OSTL", group)
        assert np.isnan(values["cosine"]) and np.isnan(values["relative_error"]) and found.flag("OSTL", group) == reason
        assert np.isfinite(values["norm"])
    assert (
        found.flag("OSTL", "layer_1/connection/bias") == ""
        and found.metrics("OSTL", "layer_1/connection/bias")["cosine"]
    )
    frame = found.to_frame()
    undefined = frame[frame["value"].isna()]
    assert len(undefined) and (undefined["flag"] != "").all()
    assert "undefined" in found._repr_html_() and word in found._repr_html_()
    alive = gl.compare(NET, params, BATCH, LOSS, [OSTL()], KEY)
    assert alive.dead_layers() == {} and not alive.to_frame()["value"].isna().any()


def test_zero_and_infinite_gradients_are_flagged():
    zero = tree([[0.0, 0.0]], [[1.0], [0.0]], [0.0])
    found = built({"reference": HAND["reference"], "zero": zero, "bad": tree([[np.inf, 0]], [[1.0], [0.0]], [0.0])})
    assert found.flag("zero", "layer_0") == "the gradient of zero is zero"
    assert found.flag("zero", NETWORK) == "" and found.metrics("zero")["norm_ratio"] < 1
    assert found.flag("bad", "layer_0") == "the gradient of bad is not finite"
    assert found.flag("zero", "layer_1/connection/bias") == "the gradient of reference is zero"
    assert np.isnan(found.cosines("layer_0")[0, 1])


def test_the_frame_is_tidy(params):
    found = gl.compare(NET, params, BATCH, LOSS, [OSTL(), TBPTT(k=2)], KEY)
    frame = found.to_frame()
    assert list(frame.columns) == ["rule", "layer", "metric", "value", "flag"]
    groups = [NETWORK, "layer_0", "layer_1", *found.gram]
    assert "layer_0/connection/kernel" in groups and len(frame) == 3 * len(groups) * len(METRICS)
    chosen = frame[(frame.rule == "TBPTT(k=2)") & (frame.layer == "layer_0") & (frame.metric == "norm_ratio")]
    assert float(chosen["value"].iloc[0]) == found.metrics("TBPTT(k=2)", "layer_0")["norm_ratio"]
    with pytest.raises(KeyError, match="'layer_7' is no part of the network; there are"):
        found.metrics("OSTL", "layer_7")


def test_a_comparison_shows_itself(params):
    found = gl.compare(NET, params, BATCH, LOSS, [OSTL(), TBPTT(k=2)], KEY)
    shown = found._repr_html_()
    assert (
        "TBPTT(k=2)" in shown and "rule (against BPTT)" in shown and f"{found.metrics('OSTL')['cosine']:.3f}" in shown
    )
    ax = found.plot("norm_ratio")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["OSTL", "TBPTT(k=2)"]
    drawn = {text.get_text() for text in ax.texts}
    assert f"{found.metrics('TBPTT(k=2)', 'layer_0')['norm_ratio']:.2f}" in drawn and "step" not in ax.get_title(
        loc="left"
    )
    with pytest.raises(ValueError, match="metric='angel': choose from"):
        found.plot("angel")
