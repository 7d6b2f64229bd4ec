"""The gap between a rule and BPTT, split over the paths that the rule drops."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import close, differ

import gradlab as gl
from gradlab import metrics, plan
from gradlab.analysis.attribution import attribute, shapley
from gradlab.rules import (
    ALL,
    BPTT,
    OSTL,
    OTTT,
    SLTT,
    UORO,
    ComposedRule,
    DirectFeedback,
    EProp,
    FrontOTPE,
    JacobianTrace,
    LocalRule,
    NextLayer,
    RandomSteps,
    SpatialBackprop,
    paths,
)
from gradlab.surrogates import FastSigmoid
from gradlab.testing import case, feed_forward
from gradlab.testing.networks import lif

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
    ("name", "links"),
    [
        pytest.param("SLTT", {0: [0]}, id="SLTT"),
        pytest.param("OTTT", {0: [0]}, id="OTTT", marks=pytest.mark.slow),  # SLTT drops what it drops, and time
        pytest.param("EProp", {0: [0]}, id="EProp"),
        pytest.param("gate", {0: [0]}, id="gate"),
        pytest.param("gate", {0: [0, 1]}, id="links back"),
    ],
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


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", ["lif", "alif", "recurrent", "one layer"])
def test_every_subset_of_every_composed_rule_is_a_rule_and_the_whole_is_bptt(kind, reset):
    """No path is forgotten: with all of them put back each rule is `EXACT`, not by a shortcut but part by part."""
    neuron = gl.ALIF(reset=reset) if kind in ("alif", "recurrent") else gl.LIF(reset=reset)
    widths, links = ((4,), None) if kind == "one layer" else ((5, 4, 3), {0: [0]} if kind == "recurrent" else None)
    net = feed_forward(neuron, widths, links)
    composed = [rule for rule in ALL if isinstance(rule, ComposedRule)]
    assert len(composed) > 15
    for rule in composed:
        point = rule.compose()
        names = paths.dropped(point, net)
        corners = [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]
        made = {corner: paths.restored(point, net, corner) for corner in corners}
        assert made[()] == point
        assert not names or made[tuple(names)] == paths.EXACT, rule.name
        for name in names:
            assert len(names) == 1 or made[(name,)] != paths.EXACT, (rule.name, name)


def test_constants_below_threshold_are_an_approximation_where_a_spike_scales_the_membrane():
    """With a reset to zero OTTT's trace is no part of the Jacobian: it is one path of its own, not the reset."""
    net = feed_forward(lif(reset="zero", detach_reset=True), (5, 4, 3))
    assert paths.dropped(OTTT().compose(), net) == ["temporal trace", "memory of later layers"]
    assert paths.dropped(OSTL().compose(), net) == ["memory of later layers"]
    found = attribute(OTTT(), *case(net, n_steps=8))
    assert abs(found.share("layer_0")["temporal trace"]) > 1e-3
    alone = case(feed_forward(lif(reset="zero", detach_reset=True), (4,)), n_steps=8)
    assert attribute(OTTT(), *alone).paths == ("temporal trace",)


def test_a_loss_on_a_filtered_output_reaches_the_layers_below_through_the_filter():
    """FrontOTPE with all paths put back but the place of the loss is BPTT of the loss on the leaky sum."""
    sample = case(feed_forward(lif(), (5, 4, 3)), n_steps=8)
    point = FrontOTPE().compose()
    names = paths.dropped(point, sample.net)
    assert "place of the loss" in names
    corner = paths.restored(point, sample.net, [name for name in names if name != "place of the loss"])
    weights = sample.loss.weights(None, *sample.batch.inputs.shape[:2], sample.batch.inputs.dtype)
    decay = sample.net.neurons[-1].beta

    def leaky(params):
        outputs, total, value = plan.outputs(sample.net, params, sample.batch.inputs), 0.0, 0.0
        for t in range(len(outputs)):
            total = decay * total + outputs[t]
            value = value + (weights[t] * sample.loss.function(total, sample.batch.targets)).sum()
        return value

    # Beside a rule with the same signal and prediction but another filter, which must not share its errors.
    beside = LocalRule(corner.trace, corner.signal, prediction=corner.prediction)
    alike = dataclasses.replace(beside, output=LocalRule(corner.trace, memory=corner.output.memory))
    other, found, again, plain = gradients(sample, beside, corner, alike, BPTT())
    for gradient in (found, again):
        close(gradient, jax.grad(leaky)(sample.params))
    assert differ(found, plain) and differ(found, other)
    assert sum(attribute(FrontOTPE(), *sample).share("layer_0").values()) == pytest.approx(1.0)


class Mute(gl.LIF):
    """A neuron that does not say how to cut its reset."""

    def cut(self, path):
        if path != "nothing":
            raise NotImplementedError(f"Mute does not say how to cut {path!r}: give it a cut() method")
        return self


def test_a_neuron_that_does_not_say_how_to_cut_its_reset_is_refused():
    sample = case(feed_forward(Mute(0.85, surrogate=FastSigmoid(3.0)), (4, 3)), n_steps=5)
    with pytest.raises(ValueError, match="cannot be split over paths: layer_0: Mute does not say how to cut 'reset'"):
        attribute(OTTT(), *sample)
    assert attribute(OSTL(), *sample).paths == ("memory of later layers",)  # it keeps the reset: nothing to cut


def test_two_players_by_hand():
    """v: nothing 0, the first 1, the second 2, both 6: the 3 that they gain together are shared."""
    assert shapley({(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 6.0}, 2).tolist() == [2.5, 3.5]


def test_a_rule_that_is_exact_has_no_gap_and_says_so():
    sample = case(feed_forward(adaptive(detach_reset=True), (4,), links={0: [0]}), n_steps=5)
    found = attribute(EProp(), *sample)
    assert found.paths == ("recurrence",) and not np.isnan(found.share()["recurrence"])
    exact = attribute(OSTL(own="full"), *sample)
    assert exact.paths == () and exact.metric(()) == pytest.approx(1.0) and exact.share() == {}
    shares = exact.to_frame().query("kind == 'share'")
    assert set(shares["path"]) == {""} and set(shares["flag"]) == {"the rule equals the reference here"}
    with pytest.raises(ValueError, match="give a list of paths among"):
        found.metric("recurrence")
    with pytest.raises(ValueError, match="choose from cosine"):
        found.metric([], "sign")
    with pytest.raises(ValueError, match="layer='layer_9' is no part"):
        found.share("layer_9")
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


class Halved(OSTL):
    """A composed rule with a gradient of its own, which its parts do not know."""

    def gradient(self, net, params, tape, state, key):
        found = super().gradient(net, params, tape, state, key)
        return found._replace(grad=jax.tree.map(lambda leaf: leaf / 2, found.grad))


def test_what_cannot_be_split_is_refused():
    sample = case(n_steps=4)
    with pytest.raises(TypeError, match="Halved is no composed rule"):
        attribute(Halved(), *sample)
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
