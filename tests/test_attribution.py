"""The gap between a rule and BPTT, split over the paths that the rule drops."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import close, differ

import gradlab as gl
from gradlab import metrics
from gradlab.analysis.attribution import attribute, shapley
from gradlab.rules import (
    BPTT,
    OSTL,
    OTTT,
    SLTT,
    UORO,
    DirectFeedback,
    EProp,
    JacobianTrace,
    LocalRule,
    NextLayer,
    RandomSteps,
    SpatialBackprop,
    paths,
)
from gradlab.surrogates import FastSigmoid
from gradlab.testing import case, feed_forward

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def adaptive(**settings):
    return gl.ALIF(beta=0.8, adaptation_strength=0.4, surrogate=FastSigmoid(3.0), **settings)


def along(cut="nothing", own="full"):
    """BPTT along some of the paths inside the layers only."""
    trace = JacobianTrace(cut, own)
    return LocalRule(trace, SpatialBackprop(through=trace))


def gradients(sample, *rules):
    return [*gl.gradients(*sample, list(rules), KEY).values()]


@pytest.mark.parametrize("links", [None, {0: [0], 2: [0, 2]}])
def test_the_space_of_rules_holds_bptt(links):
    sample = case(feed_forward(adaptive(), links=links), n_steps=7)
    exact, reference, local = gradients(sample, paths.EXACT, BPTT(), OSTL(own="full"))
    close(exact, reference)
    assert differ(local, reference)  # the same traces, but no memory of later layers


@pytest.mark.parametrize("cut", ["reset", "adaptation", "spike"])
def test_a_path_put_back_is_what_the_neuron_says(cut):
    """Errors through time with a path cut are BPTT's in the network whose neurons stop that path."""
    sample = case(feed_forward(adaptive(), links={0: [0]}), n_steps=7)
    stopped = {"detach_reset": cut != "adaptation", "detach_adaptation": cut != "reset"}
    twin = sample._replace(net=feed_forward(adaptive(**stopped), links={0: [0]}))
    (found,), (reference,), (whole,) = (
        gradients(sample, along(cut)), gradients(twin, BPTT()), gradients(sample, BPTT())
    )  # fmt: skip
    close(found, reference)
    assert differ(found, whole)


class Stopped(nn.Module):
    """A Dense without bias whose input passes no gradient: an own link that learns, but hands no error back."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return jax.lax.stop_gradient(x) @ kernel


def test_recurrence_left_out_is_a_link_that_passes_no_error():
    sample = case(feed_forward(adaptive(), links={0: [0]}), n_steps=7)
    twin = sample._replace(net=feed_forward(adaptive(), links={0: {0: Stopped(6)}}))
    (found, whole), (reference,) = gradients(sample, along(own="none"), BPTT()), gradients(twin, BPTT())
    close(found, reference)
    assert differ(found, whole)


GAPS = {
    "SLTT": (SLTT(), {"time inside the layer", "reset", "adaptation", "recurrence", "memory of later layers"}),
    "OTTT": (OTTT(), {"reset", "adaptation", "recurrence", "memory of later layers"}),
    "EProp": (EProp("random"), {"reset", "recurrence", "feedback weights", "memory of later layers"}),
    "gate": (
        LocalRule(JacobianTrace(own="full"), SpatialBackprop(), NextLayer(), RandomSteps(4)),
        {"memory of later layers", "steps that teach"},
    ),
}


@pytest.mark.parametrize(
    ("name", "links"), [*((name, {0: [0]}) for name in GAPS), ("gate", {0: [0, 1]})], ids=[*GAPS, "links back"]
)
def test_the_values_add_up_to_the_gap(name, links):
    rule, dropped = GAPS[name]
    sample = case(feed_forward(adaptive(), (5, 4, 3), links), n_steps=6)
    found = attribute(rule, *sample, key=KEY)
    own, reference = gl.gradients(*sample, [rule, BPTT()], KEY).values()
    rest = {"links back to earlier layers"} if 1 in links[0] else set()
    assert set(found.paths) == dropped | rest
    own, reference = paths_of(own), paths_of(reference)
    for path, values in found.values.items():
        gap = reference[path] - own[path]
        np.testing.assert_allclose(values.sum(0), gap, rtol=0, atol=1e-10 * max(np.abs(gap).max(), 1e-3))
        assert np.abs(values).max(1).min() > 0 or path.startswith("layer_2")  # no player is a dummy below the output
    for layer in ("network", "layer_0"):
        assert sum(found.share(layer).values()) == pytest.approx(1.0, abs=1e-10)
        for metric, exact in (("cosine", 1.0), ("relative_error", 0.0), ("norm_ratio", 1.0)):
            total = sum(found.split(metric, layer).values())
            start = found.metric((), metric, layer)
            assert total == pytest.approx(exact - start, abs=1e-7) and abs(total) > 1e-3
    vectors = [np.concatenate([*tree.values()]) for tree in (own, reference)]
    assert found.metric(()) == pytest.approx(metrics.cosine(*vectors), abs=1e-10)
    assert found.metric(found.paths[:1]) != pytest.approx(found.metric(()), abs=1e-6)


def paths_of(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.ravel(leaf) for path, leaf in flat}


def test_shapley_values_are_the_mean_over_all_orders():
    rng = np.random.default_rng(0)
    subsets = [s for size in range(5) for s in itertools.combinations(range(4), size)]
    values = {subset: rng.normal(size=3) for subset in subsets}
    expected = np.zeros((4, 3))
    for order in itertools.permutations(range(4)):
        for place, player in enumerate(order):
            before = tuple(sorted(order[:place]))
            expected[player] += values[tuple(sorted((*before, player)))] - values[before]
    found = shapley(values, 4)
    np.testing.assert_allclose(found, expected / 24, rtol=1e-12)
    np.testing.assert_allclose(found.sum(0), values[(0, 1, 2, 3)] - values[()], rtol=1e-12)
    alone = values[(0,)] - values[()]
    assert not np.allclose(found[0], alone)  # the first step of a ladder is no Shapley value


def test_two_players_by_hand():
    """v: nothing 0, the first 1, the second 2, both 6: the 3 that they gain together are shared."""
    assert shapley({(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 6.0}, 2).tolist() == [2.5, 3.5]


def test_a_rule_that_is_exact_has_no_gap_and_says_so():
    sample = case(feed_forward(adaptive(detach_reset=True), (4,), links={0: [0]}), n_steps=5)
    found = attribute(EProp(), *sample)
    assert found.paths == ("recurrence",) and not np.isnan(found.share()["recurrence"])
    exact = attribute(OSTL(own="full"), *sample)
    assert exact.paths == () and exact.metric(()) == pytest.approx(1.0) and exact.share() == {}
    silent = sample._replace(params=jax.tree.map(lambda leaf: leaf * 0 - 1.0, sample.params))
    frame = attribute(EProp(), *silent).to_frame()
    assert frame["value"].isna().eq(frame["flag"] != "").all()


def test_the_frame_and_the_figure_tell_the_same():
    sample = case(feed_forward(), n_steps=5)
    found = attribute(SLTT(), *sample)
    frame = found.to_frame()
    ladder = frame[(frame["kind"] == "ladder") & (frame["metric"] == "cosine") & (frame["layer"] == "layer_0")]
    assert ladder["path"].tolist() == ["", *found.paths] and ladder["value"].iloc[-1] == pytest.approx(1.0)
    assert ladder["value"].iloc[0] == pytest.approx(found.metric((), "cosine", "layer_0"))
    ax = found.plot("cosine", "layer_0")
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, ladder["value"])
    assert ax.get_yticklabels()[0].get_text() == "SLTT"
    bars = found.plot("cosine", "layer_0", kind="shapley").patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [*found.split("cosine", "layer_0").values()])


def test_what_cannot_be_split_is_refused():
    sample = case(n_steps=4)
    with pytest.raises(TypeError, match=r"UORO is no composed rule.*lag_profile"):
        attribute(UORO(), *sample)
    with pytest.raises(ValueError, match="leave memory out"):
        LocalRule(JacobianTrace(), SpatialBackprop(through=JacobianTrace()), NextLayer())
    with pytest.raises(ValueError, match="leave one out"):
        SpatialBackprop("leaky_mean", through=JacobianTrace())
    with pytest.raises(ValueError, match="goes through no read-out"):
        DirectFeedback("random", of="target", through=JacobianTrace())
    with pytest.raises(TypeError, match="give a JacobianTrace, or None"):
        SpatialBackprop(through="all")
    shapes = gl.engine.shapes_of(*sample)
    assert "known only afterwards" in paths.EXACT.supports(sample.net, shapes, sample.loss, online=True)
    assert paths.EXACT.supports(sample.net, shapes, sample.loss) is None
