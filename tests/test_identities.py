"""The identities between rules, element by element in float64, each with something nearby that must fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rule_cases import FEW, GENTLE, LIFS, RESETS, built, deferred, gradients_of, neuron, part, streamed, streams_of

import gradlab as gl
from gradlab import plan
from gradlab.engine import shapes_of
from gradlab.rules import (
    BPTT,
    OSTL,
    OTPE,
    OTTT,
    RTRL,
    SLTT,
    EProp,
    FrontOTPE,
    JacobianTrace,
    LocalRule,
    ReadoutFilter,
    SpatialBackprop,
)
from gradlab.testing import SmoothSpike, assert_differs, assert_equal, case, feed_forward, gradient_of, twins

pytestmark = pytest.mark.usefixtures("x64")


SQUARES = [f"square-{index}" for index in range(6)]
SPECIAL = [
    *("feedback-skip", "trained-constants", "leak-per-unit", "two-states-per-unit", "mixed", "scaled-input"),
    *("curved-links", "convolution", "convolution-channels"),
]
EVERY = [*LIFS, *SQUARES, *SPECIAL]


def networks(names: list[str]):
    """Tests on one network share its gradients, so that parallel runs keep them together."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in names])


def _marks(name: str) -> list:
    """Networks that have a brother of the same kind are left to the slow tests."""
    brothers = ("square-3", "square-4", "convolution-channels")
    return [pytest.mark.xdist_group(name), *([pytest.mark.slow] if name in brothers else [])]


def at_leisure(name: str) -> list:
    """Networks whose parts others cover too: their streaming forms are among the slow tests."""
    return [pytest.mark.slow] if name in FEW and "attached" not in name else []


def last(name: str) -> int:
    return built(name).net.last


@networks(EVERY)
def test_backpropagation_three_ways(name: str):
    found = deferred(name)
    assert_equal(found["BPTT"], found["BPTT(form=autodiff)"])
    assert_equal(found["RTRL"], found["BPTT(form=autodiff)"])
    assert_differs(found["OSTL"], found["BPTT"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[*_marks(n), *at_leisure(n)]) for n in EVERY])
def test_streaming_equals_adjoint(name: str):
    found, streams = deferred(name), streamed(name)
    assert {"OSTL", "SLTT", "FPTT"} <= set(streams)
    for rule, gradient in streams.items():
        assert_equal(gradient, found[rule])
    assert_differs(streams["SLTT"], found["OSTL"])


@networks(EVERY)
def test_truncation_at_its_ends(name: str):
    found = deferred(name)
    assert_equal(found["TBPTT"], found["BPTT"])  # blocks of 10 steps, 9 steps in all
    assert_equal(found["TBPTT(k=1)"], found["SLTT"])
    assert_differs(found["TBPTT(k=2)"], found["SLTT"])
    assert_differs(found["TBPTT(k=2)"], found["BPTT"])
    assert_equal(found["FPTT(weighted=False)"], found["SLTT"])
    assert_differs(found["FPTT"], found["SLTT"])


@networks([n for n in EVERY if n != "feedback-skip"])
def test_ostl_and_otpe_are_exact_in_the_output_layer(name: str):
    found = deferred(name)
    for rule in {"OSTL", "OTPE"} & set(found):
        assert_equal(found[rule], part(found["BPTT"], last(name)))
        assert_differs(found[rule], part(found["BPTT"], 0))
    assert_differs(found["SLTT"], part(found["BPTT"], last(name)))


def test_ostl_is_not_exact_in_an_output_layer_that_feeds_itself():
    found = deferred("feedback-skip")
    assert_differs(found["OSTL"], part(found["BPTT"], last("feedback-skip")))


@pytest.mark.parametrize("own", ["none", "full"])
def test_one_layer_is_exact_with_its_own_recurrence_in_the_trace(own: str):
    on = case(feed_forward(neuron("lif"), (4,), {0: [0]}))
    found = gradients_of(on, [BPTT(), OSTL(own=own)])
    (name,) = set(found) - {"BPTT"}
    (assert_equal if own == "full" else assert_differs)(found[name], found["BPTT"])


@networks(LIFS)
def test_ottt_equals_ostl_exactly_when_the_reset_leaves_the_leak_alone(name: str):
    found = deferred(name)
    same = "none" in name or "subtract-detached" in name
    (assert_equal if same else assert_differs)(found["OTTT"], found["OSTL"])
    assert_differs(found["SLTT"], found["OSTL"])


@pytest.mark.parametrize(("reset", "detached"), RESETS)
@pytest.mark.parametrize("hidden", ["lif", "adaptive"])
def test_otpe_is_exact_in_the_last_hidden_layer_when_the_output_is_a_leaky_integrator(
    hidden: str, reset: str, detached: bool
):
    output = gl.LIF(beta=0.7, reset=reset, detach_reset=detached, surrogate=GENTLE)
    on = case(feed_forward([neuron("lif"), neuron(hidden, "zero"), output]))
    found = gradients_of(on, [BPTT(), OTPE(), OSTL()])
    exact = reset == "none" or (reset == "subtract" and detached)
    (assert_equal if exact else assert_differs)(found["OTPE"], part(found["BPTT"], 1))
    assert_differs(found["OTPE"], part(found["BPTT"], 0))
    assert_differs(found["OSTL"], part(found["BPTT"], 1))


@pytest.mark.parametrize("links", [{1: [1]}, {2: [2]}, {1: [2]}, {2: [0]}])
def test_otpe_is_not_exact_with_links_around_the_last_hidden_layer(links: dict):
    output = gl.LIF(beta=0.7, reset="none", surrogate=GENTLE)
    on = case(feed_forward([neuron("lif"), neuron("lif"), output], links=links))
    rule = OTPE() if links != {2: [0]} else LocalRule(JacobianTrace(), SpatialBackprop(), OTPE().compose().memory)
    found = gradients_of(on, [BPTT(), rule])
    exact = links == {2: [0]}  # a skip link from an earlier layer does not touch the last hidden layer
    (assert_equal if exact else assert_differs)(found[rule.name], part(found["BPTT"], 1))


def test_otpe_memory_of_an_output_with_two_states_and_of_one_leak_per_unit():
    for output in (
        gl.CurrentLIF(beta=0.8, alpha=0.5, reset="none", surrogate=GENTLE),
        gl.LI(beta=(0.5, 0.6, 0.8, 0.9)),
    ):
        on = case(feed_forward([neuron("lif"), output], (6, 4)))
        found = gradients_of(on, [BPTT(), OTPE(), OSTL()])
        assert_equal(found["OTPE"], found["BPTT"])
        assert_differs(found["OSTL"], found["BPTT"])


@pytest.mark.parametrize(("reset", "detached"), RESETS)
@pytest.mark.parametrize("kind", ["lif", "adaptive", "current"])
def test_symmetric_eprop_is_autodiff_with_recurrent_and_reset_paths_stopped(kind: str, reset: str, detached: bool):
    on = case(feed_forward([neuron(kind, reset, detached), gl.LI(beta=0.7)], (7, 4), {0: [0]}))
    found = gradients_of(on, [BPTT(), EProp()])
    plain = {"stop_link": lambda link: link.delay == 1, "cut": lambda layer: "reset"}
    assert_equal(found["EProp"], twins.loss_gradient(on, **plain))
    assert_differs(found["EProp"], found["BPTT"])
    assert_equal(streams_of(on, [EProp()])["EProp"], found["EProp"])


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_eprop_with_a_spiking_read_out(reset: str):
    on = case(feed_forward([neuron("lif"), neuron("lif", reset)], (7, 4), {0: [0]}))
    twin = twins.loss_gradient(on, stop_link=lambda link: link.delay == 1, cut=lambda layer: "reset")
    found = gradients_of(on, [EProp()])["EProp"]
    # A cut "subtract" reset leaves the read-out's leak; a cut "zero" reset does not.
    (assert_equal if reset == "subtract" else assert_differs)(part(found, 0), part(twin, 0))


@pytest.mark.parametrize("detached", [True, False])
def test_eprop_and_otpe_equal_bptt_for_one_forward_layer_with_a_detached_reset(detached: bool):
    on = case(feed_forward([neuron("lif", "subtract", detached), gl.LI(beta=0.7)], (7, 4)))
    found = gradients_of(on, [BPTT(), EProp(), OTPE(), SLTT()])
    (assert_equal if detached else assert_differs)(found["EProp"], found["BPTT"])
    assert_equal(found["OTPE"], found["BPTT"])
    assert_differs(found["SLTT"], found["BPTT"])


def test_full_recurrent_trace_with_the_read_outs_memory_is_bptt():
    on = case(feed_forward([neuron("lif"), gl.LI(beta=0.7)], (7, 4), {0: [0]}))
    exact = LocalRule(JacobianTrace(own="full"), SpatialBackprop(), ReadoutFilter())
    without = LocalRule(JacobianTrace(), SpatialBackprop(), ReadoutFilter())
    found = gradients_of(on, [BPTT(), exact, without])
    assert_equal(found[exact.name], found["BPTT"])
    assert_differs(found[without.name], found["BPTT"])
    assert_equal(streams_of(on, [exact])[exact.name], found["BPTT"])


@networks(["lif-subtract-attached-forward", "lif-zero-attached-forward"])
def test_front_otpe_is_exact_for_its_own_loss_in_the_output_layer(name: str):
    on = built(name)
    leak = on.net.neurons[-1].beta

    def front_loss(params):
        outputs = plan.outputs(on.net, params, on.batch.inputs)
        _, summed = jax.lax.scan(lambda o, s: (leak * o + s, leak * o + s), jnp.zeros_like(outputs[0]), outputs)
        return on.loss(summed, on.batch)

    found = deferred(name)
    assert_equal(found["FrontOTPE"], part(jax.grad(front_loss)(on.params), last(name)))
    assert_differs(found["FrontOTPE"], part(found["BPTT"], last(name)))
    assert_differs(found["FrontOTPE"], part(jax.grad(front_loss)(on.params), 1))


@networks(["square-1", "square-2", "square-3", *SPECIAL])
def test_ostl_equals_its_stop_gradient_twin(name: str):
    on, found = built(name), deferred(name)
    assert_equal(found["OSTL"], twins.ostl(on))
    assert_differs(found["OSTL"], twins.sltt(on))
    assert_equal(found["SLTT"], twins.sltt(on))
    if name in ("square-1", "square-3", "curved-links"):
        assert_equal(found["OSTL(own=full)"], twins.ostl(on, own="full"))
        assert_differs(found["OSTL(own=full)"], found["OSTL"])


@networks(
    ["square-0", "square-1", "leak-per-unit", "two-states-per-unit", "mixed", "scaled-input", "convolution-channels"]
)
def test_ottt_equals_its_stop_gradient_twin(name: str):
    found = deferred(name)
    assert_equal(found["OTTT"], twins.ottt(built(name)))
    assert_differs(found["OTTT"], found["OSTL"])


@networks(["lif-zero-attached-forward", "mixed", "scaled-input", "two-states-per-unit", "convolution"])
def test_otpe_in_the_last_hidden_layer_equals_its_twin(name: str):
    found = deferred(name)
    assert_equal(found["OTPE"], twins.otpe_last_hidden(built(name)))
    assert_differs(found["OSTL"], twins.otpe_last_hidden(built(name)))


@pytest.mark.parametrize("kind", ["lif", "current", "adaptive"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_finite_differences_confirm_bptt_on_a_smooth_spike(kind: str, reset: str):
    cell = neuron(kind, reset).clone(surrogate=SmoothSpike(3.0))
    net = feed_forward([cell, cell], (5, 4), {0: [0]})
    on = case(net, inputs=4, n_steps=6)
    gradient = gradient_of(BPTT(), on)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), on.params)
    value = jax.jit(lambda p: on.loss(plan.outputs(net, p, on.batch.inputs), on.batch))

    def along(h: float) -> float:
        moved = [jax.tree.map(lambda p, d, s=s: p + s * h * d, on.params, direction) for s in (1, -1)]
        return float((value(moved[0]) - value(moved[1])) / (2 * h))

    slope = sum(
        float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    extrapolated = (4 * along(1e-4) - along(2e-4)) / 3
    assert extrapolated == pytest.approx(slope, rel=1e-8)
    ostl = gradient_of(OSTL(), on)
    wrong = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(ostl), jax.tree.leaves(direction), strict=True))
    assert extrapolated != pytest.approx(wrong, rel=1e-4)


def test_masks_and_losses_reach_every_rule():
    net = feed_forward(neuron("lif"), links={0: [0]})
    for loss in (
        gl.PerStep(optax.softmax_cross_entropy, time="sum"),
        gl.PerStep(optax.l2_loss),
        gl.Accumulated(optax.softmax_cross_entropy),
    ):
        on = case(net, loss=loss, masked=True)
        rules = [BPTT(), BPTT(form="autodiff"), OSTL(), OTTT(), OTPE(), RTRL()]
        found = gradients_of(on, rules)
        assert_equal(found["BPTT"], found["BPTT(form=autodiff)"])
        assert_equal(found["RTRL"], found["BPTT"])
        assert_equal(found["OSTL"], part(found["BPTT"], net.last))
        plain = gradients_of(on._replace(batch=on.batch._replace(mask=None)), rules)
        assert_differs(plain["OSTL"], found["OSTL"])
        if loss.streams:
            for name, gradient in streams_of(on, rules).items():
                assert_equal(gradient, found[name])


def test_random_feedback_depends_on_its_seed_and_the_layer_only():
    on = built("lif-subtract-attached-forward")
    shapes = shapes_of(on.net, on.params, on.batch, on.loss)
    first, again = (
        EProp(feedback="random").init(on.net, p, shapes) for p in (on.params, jax.tree.map(jnp.ones_like, on.params))
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    other = EProp(feedback="random", seed=1).init(on.net, on.params, shapes)
    assert not bool((first["layer_0"] == other["layer_0"]).any())
    assert not bool((first["layer_0"][:, :5] == first["layer_1"]).any())
    a, b = (
        gl.gradients(on.net, on.params, on.batch, on.loss, [EProp(feedback="random")], jax.random.key(k))
        for k in (0, 1)
    )
    assert_equal(a["EProp(feedback=random)"], b["EProp(feedback=random)"], 0.0)


def test_front_otpe_is_not_the_gradient_of_the_plain_loss():
    on = built("lif-none-attached-forward")
    found = gradients_of(on, [BPTT(), FrontOTPE(), OTPE()])
    assert_differs(found["FrontOTPE"], found["OTPE"])
