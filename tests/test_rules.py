"""Every rule through `check_rule`, against the per-synapse oracle, and refused where it must be."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rule_cases import GENTLE, RESETS, gradients_of, neuron

import gradlab as gl
from gradlab.engine import shapes_of
from gradlab.neurons import Subthreshold
from gradlab.rules import (
    ALL,
    BPTT,
    FPTT,
    OSTL,
    OTPE,
    OTTT,
    RTRL,
    SLTT,
    TBPTT,
    ApproximateOTPE,
    EProp,
    Estimate,
    FrontOTPE,
    LeakySum,
    LocalRule,
    ReadoutFilter,
    Rule,
    SpatialBackprop,
    SubthresholdTrace,
)
from gradlab.testing import assert_differs, assert_equal, case, check_rule, feed_forward, per_synapse, twins

pytestmark = pytest.mark.usefixtures("x64")


def _forward():
    return case()


def _recurrent():
    return case(feed_forward(neuron("lif"), links={0: [0], 1: [1]}))


def _with_read_out():
    return case(feed_forward([neuron("lif"), gl.LI(beta=0.7)], (7, 4), {0: [0]}))


def _oracle(name):
    return lambda on: per_synapse.gradient(on, name)


CHECKED = [
    (BPTT(), _recurrent, twins.bptt, (), ()),
    (TBPTT(k=2), _recurrent, lambda on: twins.tbptt(on, 2), (TBPTT(k=3),), ()),
    (RTRL(), _recurrent, twins.bptt, (), ()),
    (OSTL(), _forward, _oracle("OSTL"), (), ()),
    (OSTL(own="full"), _recurrent, lambda on: twins.ostl(on, own="full"), (OSTL(),), ()),
    (OTTT(), _forward, _oracle("OTTT"), (), ()),
    (OTPE(), _forward, _oracle("OTPE"), (), ()),
    (ApproximateOTPE(), _forward, _oracle("ApproximateOTPE"), (), ()),
    (FrontOTPE(), _forward, _oracle("FrontOTPE"), (), ()),
    (SLTT(), _recurrent, twins.sltt, (), ()),
    (EProp(), _with_read_out, twins.eprop, (EProp(feedback="random"),), ()),
    (EProp(feedback="random"), _forward, None, (EProp(feedback="random", seed=1),), ()),
    (FPTT(), _recurrent, None, (FPTT(weighted=False),), ()),
]


def _checks():
    for rule, on, oracle, variants, exempt in CHECKED:
        made = {}

        def built(on=on, made=made):
            if "case" not in made:
                made["case"] = on()
            return made["case"]

        names = [check.name for check in check_rule(rule, oracle=oracle, variants=variants, exempt=exempt)]
        for index, name in enumerate(names):
            group = pytest.mark.xdist_group(rule.name)
            yield pytest.param(rule, built, oracle, variants, exempt, index, id=f"{rule.name}-{name}", marks=group)


@pytest.mark.parametrize(("rule", "built", "oracle", "variants", "exempt", "index"), list(_checks()))
def test_rule(rule, built, oracle, variants, exempt, index):
    check_rule(rule, built(), oracle, variants, exempt)[index]()


def test_every_rule_is_checked():
    assert {type(rule) for rule in ALL} == {type(row[0]) for row in CHECKED}
    assert len({rule.name for rule in ALL}) == len(ALL)


@pytest.mark.parametrize(("reset", "detached"), RESETS)
def test_composed_rules_equal_loops_over_synapses(reset: str, detached: bool):
    on = case(feed_forward([neuron("lif", reset, detached)] * 3))
    rules = [OSTL(), OTTT(), SLTT(), OTPE(), ApproximateOTPE(), FrontOTPE()]
    found = gradients_of(on, rules)
    for rule in rules:
        assert_equal(found[rule.name], per_synapse.gradient(on, rule.name))
    assert_differs(found["OTPE"], per_synapse.gradient(on, "OSTL"))
    if reset != "zero":
        random = EProp(feedback="random")
        feedback = random.init(on.net, on.params, shapes_of(on.net, on.params, on.batch, on.loss))
        gradient = gradients_of(on, [random])[random.name]
        assert_equal(gradient, per_synapse.gradient(on, "EProp", {k: np.asarray(v) for k, v in feedback.items()}))
        assert_equal(gradient, twins.eprop(on, feedback))
        assert_differs(gradient, per_synapse.gradient(on, "EProp", {k: -np.asarray(v) for k, v in feedback.items()}))


@dataclasses.dataclass(frozen=True)
class TwiceBPTT(Rule):
    """A user's rule. (1) grad = factor BPTT. Drops: nothing. Exact when: factor = 1."""

    reference: ClassVar[str] = "written for this test, doi none"
    factor: float = 2.0

    def gradient(self, net, params, tape, state, key):
        grad = BPTT().gradient(net, params, tape, state, key).grad
        return Estimate(jax.tree.map(lambda leaf: self.factor * leaf, grad))


@dataclasses.dataclass(frozen=True)
class PooledMean(TwiceBPTT):
    """A faulty rule. (1) grad = BPTT times the batch size. Drops: nothing. Exact when: never."""

    def gradient(self, net, params, tape, state, key):
        estimate = super().gradient(net, params, tape, state, key)
        return Estimate(jax.tree.map(lambda leaf: leaf * tape.slices.inputs.shape[1], estimate.grad))


def _check(rule, name, **settings):
    (found,) = [check for check in check_rule(rule, **settings) if check.name == name]
    return found


def test_a_users_rule_works_without_registration_and_its_faults_are_found():
    rule = TwiceBPTT()
    _check(rule, "shapes and types")()
    _check(rule, "mean of samples")()
    with pytest.raises(AssertionError, match="differs by"):
        _check(rule, "oracle", oracle=twins.bptt)()
    _check(TwiceBPTT(factor=1.0), "oracle", oracle=twins.bptt)()
    with pytest.raises(AssertionError, match="differs by"):
        _check(PooledMean(), "mean of samples")()
    on = case()
    table = gl.compare(on.net, on.params, on.batch, on.loss, [rule], jax.random.key(0)).metrics("TwiceBPTT")
    assert table["cosine"] == pytest.approx(1.0)
    assert table["norm_ratio"] == pytest.approx(2.0)
    assert table["projection"] == pytest.approx(2.0)
    assert table["relative_error"] == pytest.approx(1.0)


def _refusal(rule, net, inputs=5, loss=None, online=False, batch_size=3):
    loss = gl.PerStep(optax.softmax_cross_entropy) if loss is None else loss
    shape = (inputs,) if isinstance(inputs, int) else inputs
    x = jnp.zeros((9, batch_size, *shape))
    params = jax.eval_shape(lambda key: net.init(key, x), jax.random.key(0))  # refusals look at shapes only
    batch = gl.Batch(x, jnp.zeros((batch_size, 4)))
    return rule.supports(net, shapes_of(net, params, batch, loss), loss, online=online)


class Late(gl.Neuron):
    """A neuron whose membrane sees the current of the step before."""

    @property
    def states(self):
        return ("membrane", "current")

    def __call__(self, carry, inputs):
        u, i = carry
        v = 0.9 * u + i
        return (v, 0.8 * i + inputs), GENTLE(v - 1.0)

    def subthreshold(self, params, dtype):
        a, b, one, zero = (jnp.asarray(value, dtype) for value in (0.9, 0.8, 1.0, 0.0))
        return Subthreshold(A=((a, one), (zero, b)), B=(zero, one), c=(one, zero))


def test_refusals_say_why_and_what_to_use():
    deep = feed_forward(neuron("lif"))
    assert 'feedback="random"' in _refusal(EProp(), deep)
    assert "PerStep" in _refusal(FrontOTPE(), deep, loss=gl.Accumulated(optax.softmax_cross_entropy))
    assert "once per sequence" in _refusal(OSTL(), deep, loss=gl.Accumulated(optax.softmax_cross_entropy), online=True)
    assert _refusal(OSTL(), deep, loss=gl.Accumulated(optax.softmax_cross_entropy)) is None
    trained = feed_forward([gl.LIF(trainable=("beta",)), gl.LI()], (5, 4))
    assert "OSTL" in _refusal(OTTT(), trained)
    assert _refusal(OSTL(), trained) is None
    gru = gl.connect([nn.Dense(6), nn.GRUCell(6), nn.Dense(4), gl.LI()])
    assert "elementwise" in _refusal(OSTL(), gru)
    assert _refusal(BPTT(), gru) is None
    skip = feed_forward(neuron("lif"), (6, 5, 5, 4), {3: [1]})
    assert "one leak" in _refusal(OTPE(), skip)
    per_unit = feed_forward([neuron("lif"), gl.LI(beta=(0.5, 0.6, 0.7, 0.8))], (6, 4))
    assert _refusal(OTPE(), per_unit) is None
    assert "adjoint form" in _refusal(OTPE(), per_unit, online=True)
    by_index = feed_forward([neuron("lif"), neuron("lif"), gl.LI(beta=(0.3, 0.5, 0.7, 0.9))], (5, 4, 4))
    assert "one leak per unit" in _refusal(LocalRule(memory=ReadoutFilter()), by_index)
    assert _refusal(LocalRule(memory=ReadoutFilter()), feed_forward(neuron("lif"))) is None
    leak_trains = feed_forward([neuron("lif"), gl.LIF(trainable=("beta",))], (6, 4))
    assert "LeakySum(decay=...)" in _refusal(FrontOTPE(), leak_trains)
    late = feed_forward([Late(), Late()], (6, 4))
    assert "step later" in _refusal(OTTT(), late)
    assert "step later" in _refusal(OTPE(), late)
    assert _refusal(OSTL(), late) is None
    two_states = feed_forward([neuron("lif"), neuron("current")], (6, 4))
    assert "LeakySum(decay=...)" in _refusal(FrontOTPE(), two_states)


def test_rtrl_is_refused_with_its_bytes_before_it_runs():
    wide = feed_forward(neuron("lif"), (256, 256, 4))
    reason = _refusal(RTRL(), wide, batch_size=64)
    assert "GiB" in reason and "multiplications" in reason and "fewer samples" in reason
    assert _refusal(RTRL(limit_bytes=2**50), wide, batch_size=64) is None


def test_streaming_traces_above_the_limit_are_refused_with_their_bytes():
    net = gl.connect([nn.Conv(16, (3, 3)), neuron("lif"), lambda x: x.reshape(x.shape[0], -1), nn.Dense(4), gl.LI()])
    reason = _refusal(OSTL(), net, inputs=(24, 24, 8), online=True, batch_size=32)
    assert "GiB" in reason and "adjoint" in reason
    assert _refusal(OSTL(), net, inputs=(24, 24, 8), batch_size=32) is None
    assert _refusal(OTTT(), net, inputs=(24, 24, 8), online=True, batch_size=32) is None


def test_a_leaky_mean_needs_a_memory():
    with pytest.raises(ValueError, match="NextLayer"):
        LocalRule(SubthresholdTrace("leaky_mean"), SpatialBackprop())
    with pytest.raises(ValueError, match="choose"):
        SpatialBackprop("mean")
    for wrong in (0, 2.5, "3"):
        with pytest.raises(ValueError, match="whole number of steps"):
            TBPTT(k=wrong)
    with pytest.raises(ValueError, match="choose"):
        OSTL(own="diagonal")
    with pytest.raises(ValueError, match=r"EProp\(feedback='adaptive'\)"):
        EProp(feedback="adaptive")
    with pytest.raises(TypeError, match="trace"):
        LocalRule("jacobian")
    with pytest.raises(ValueError, match="LeakySum"):
        LeakySum(1.5)
    with pytest.raises(ValueError, match="last layer"):
        LocalRule(output=LocalRule(output=LocalRule()))


def test_names_carry_what_differs_from_the_defaults():
    assert TBPTT(k=1).name == "TBPTT(k=1)"
    assert EProp(feedback="random", seed=3).name == "EProp(feedback=random, seed=3)"
    assert OSTL().name == "OSTL"


def test_equality_notices_what_is_not_a_number():
    good = {"a": {"bias": np.ones(2)}, "b": {"kernel": np.ones(1)}}
    bad = {"a": {"bias": np.array([np.nan, 1.0])}, "b": {"kernel": np.ones(1)}}
    assert_equal(good, good)
    for found, expected in ((bad, good), (good, bad)):
        with pytest.raises(AssertionError, match="bias"):
            assert_equal(found, expected)


@dataclasses.dataclass(frozen=True)
class Unhashable(TwiceBPTT):
    """A faulty rule. (1) grad = 2 BPTT. Drops: nothing. Exact when: never."""

    __hash__ = None


def test_a_rule_that_compiles_at_every_call_is_found():
    _check(TwiceBPTT(), "one compilation")()
    with pytest.raises(AssertionError, match="compiled again"):
        _check(Unhashable(), "one compilation")()
