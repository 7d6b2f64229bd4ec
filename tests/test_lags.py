"""Credit by delay, and gradients step by step of the sequence."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close

import gradlab as gl
from gradlab.analysis import lags
from gradlab.analysis.lags import lag_profile
from gradlab.analysis.timeline import over_time
from gradlab.rules import BPTT, DECOLLE, NDOT, OSTL, OTPE, OTTT, SLTT, TBPTT, UORO, EProp, Estimate, Rule
from gradlab.tape import record
from gradlab.testing import case, feed_forward

KEY = jax.random.key(0)
STEPS = 7
RULES = [OSTL(), OTTT(), OTPE(), SLTT(), EProp("random"), DECOLLE(), TBPTT(k=3)]


@pytest.fixture(scope="module")
def sample():
    with jax.enable_x64(True):
        yield case(feed_forward(links={0: [0]}), n_steps=STEPS, masked=True)


@pytest.fixture(scope="module")
def profile(sample):
    with jax.enable_x64(True):
        return lag_profile(*sample, [*RULES, UORO(), NDOT()], KEY)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_pairs_of_steps_as_automatic_differentiation_sees_them(x64, sample, profile):
    """Weights of their own for each step, and the loss of one step at a time: every pair (s, t) by `jax.jacrev`."""
    net, params, batch, loss = sample
    weights = loss.weights(batch.mask, *batch.inputs.shape[:2], batch.inputs.dtype)

    def losses(copies):
        state, found = net.initial_state(params, batch.inputs), []
        for t in range(STEPS):
            now = jax.tree.map(lambda leaf, t=t: leaf[t], copies)
            state, _, outputs = net.step(now, state, batch.inputs[t])
            found.append(jnp.sum(weights[t] * loss.function(outputs[-1], batch.targets)))
        return jnp.stack(found)

    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), params)
    pairs = jax.jit(jax.jacrev(losses))(copies)  # leaves [t, s, ...]
    by_lag = [
        flat(jax.tree.map(lambda leaf, lag=lag: sum(leaf[t, t - lag] for t in range(lag, STEPS)), pairs))
        for lag in range(STEPS)
    ]
    whole = np.sum(by_lag, axis=0)
    frame = profile.to_frame().query("rule == 'BPTT' and layer == 'network'").pivot(columns="metric", index="lag")
    np.testing.assert_allclose(frame["value"]["credit"], [v @ whole / (whole @ whole) for v in by_lag], atol=1e-12)
    norms = [np.linalg.norm(v) / np.linalg.norm(whole) for v in by_lag]
    np.testing.assert_allclose(frame["value"]["norm"], norms, rtol=1e-10)
    assert max(norms[1:]) > 0.05 and not np.allclose(frame["value"]["norm"], norms[::-1])


def test_lags_are_what_sliding_windows_add(x64, sample, profile):
    """BPTT's errors that go back over at most k - 1 steps, by other code."""
    windows = [TBPTT(k=k, window="sliding") for k in (1, 2, 3, 4)]
    grads = gl.gradients(*sample, [BPTT(), *windows], KEY)
    reference, *sums = [flat(tree) for tree in grads.values()]
    credit = np.cumsum(
        profile.to_frame().query("rule == 'BPTT' and layer == 'network' and metric == 'credit'")["value"]
    )
    np.testing.assert_allclose(credit[:4], [g @ reference / (reference @ reference) for g in sums], atol=1e-12)


def test_credits_add_up_to_the_projection(x64, sample, profile):
    frame = profile.to_frame().query("metric == 'credit'")
    found = gl.compare(*sample, RULES, KEY)
    for rule in found.rules:
        for layer in ("network", "layer_0", "layer_0/connection/kernel"):
            total = frame.query("rule == @rule and layer == @layer")["value"].sum()
            assert total == pytest.approx(found.metrics(rule, layer)["projection"], abs=1e-10), (rule, layer)
    late = frame.query("rule == 'SLTT' and lag > 0")["value"]
    assert (late == 0).all()  # a rule without memory
    assert (frame.query("rule == 'OSTL' and lag > 0 and layer == 'network'")["value"].abs() > 1e-4).any()


def test_bins_and_what_has_no_lags(x64, sample, profile, monkeypatch):
    assert set(profile.refusals) == {"UORO", "NDOT"} and "at which step the weights acted" in profile.refusals["UORO"]
    binned = lag_profile(*sample, [OTTT()], KEY, edges=[0, 1, 3]).to_frame()
    fine = profile.to_frame()
    for rule in ("BPTT", "OTTT"):
        query = f"rule == '{rule}' and layer == 'network' and metric == 'credit'"
        credit = fine.query(query)["value"].to_numpy()
        np.testing.assert_allclose(binned.query(query)["value"], [credit[0], credit[1:3].sum(), credit[3:].sum()])
    assert binned["last_lag"].unique().tolist() == [0, 2, STEPS - 1]
    for edges in ([], [1, 2], [0, 2, 2], [0, STEPS], [0, 1.5], (False, True), ["0"]):
        with pytest.raises(ValueError, match="give rising whole numbers from 0"):
            lag_profile(*sample, [OTTT()], KEY, edges=edges)
    with pytest.raises(ValueError, match="use BPTT as the reference"):
        lag_profile(*sample, [OTTT()], KEY, reference=UORO())
    whole = sample._replace(loss=gl.Accumulated(optax.softmax_cross_entropy))
    for analysis in (lag_profile, over_time):
        with pytest.raises(ValueError, match="Accumulated is no sum over steps"):
            analysis(*whole, [OTTT()], KEY)
    monkeypatch.setattr(lags, "LIMIT_BYTES", 1000)
    with pytest.raises(ValueError, match="above the limit"):
        lag_profile(*sample, [OTTT()], KEY)


@dataclasses.dataclass(frozen=True)
class Squared(Rule):
    """A rule that is not linear in the error."""

    def gradient(self, net, params, tape, state, key):
        return Estimate(jax.tree.map(lambda leaf: leaf * jnp.sum(jnp.abs(tape.slices.error)) ** 2, params))


@pytest.fixture(scope="module")
def timeline(sample):
    with jax.enable_x64(True):
        return over_time(*sample, [OTTT(), OTPE(), SLTT(), Squared()], KEY)


@pytest.mark.parametrize("rule", [OTTT(), OTPE()], ids=["OTTT", "OTPE"])
def test_steps_are_what_an_online_rule_adds(x64, sample, timeline, rule):
    """The streaming form's update of every step, and its running sum, by other code than the adjoint's."""
    net, params, batch, loss = sample
    tape = record(net, params, batch, loss)
    state = rule.init(net, params, gl.engine.shapes_of(*sample))
    trace = rule.start(net, params, loss, state, jax.tree.map(lambda x: x[0], tape.slices), STEPS, KEY)
    rows = []
    for t in range(STEPS):
        trace, estimate = rule.step(net, params, loss, trace, state, jax.tree.map(lambda x, t=t: x[t], tape.slices))
        rows.append(flat(estimate.grad))
    place = timeline.rules.index(rule.name)
    for gram, vectors in ((timeline.gram, rows), (timeline.cumulative, np.cumsum(rows, axis=0))):
        squares = sum(gram.values())[:, place, place]
        np.testing.assert_allclose(squares, [v @ v for v in vectors], rtol=1e-10)
        assert not np.allclose(squares, [v @ v for v in vectors][::-1], rtol=1e-3)


def test_the_last_cumulative_step_is_the_comparison(x64, sample, timeline):
    found = gl.compare(*sample, [OTTT(), OTPE(), SLTT()], KEY)
    frame = timeline.to_frame().query("kind == 'cumulative' and step == @STEPS - 1")
    for rule in timeline.rules:
        for metric in ("cosine", "norm_ratio", "projection"):
            value = frame.query("rule == @rule and metric == @metric and layer == 'layer_1'")["value"].item()
            assert value == pytest.approx(found.metrics(rule, "layer_1")[metric], abs=1e-9)
    first = timeline.to_frame().query("kind == 'step' and step == 0 and metric == 'cosine' and layer == 'network'")
    assert first["value"].min() > 1 - 1e-9  # without a past all rules agree
    assert frame.query("metric == 'cosine' and rule == 'SLTT'")["value"].max() < 0.999


def test_what_is_no_sum_over_steps_is_left_out_with_the_reason(x64, sample, timeline):
    assert set(timeline.refusals) == {"Squared"} and "no sum over the steps" in timeline.refusals["Squared"]
    assert timeline.rules == ("BPTT", "OTTT", "OTPE", "SLTT")
    with pytest.raises(ValueError, match="use BPTT as the reference"):
        over_time(*sample, [OTTT()], KEY, reference=Squared())
    masked = timeline.to_frame().query("step == 0 and metric == 'cosine'")
    assert masked["value"].isna().eq(masked["flag"] != "").all()


def test_gradients_that_are_not_finite_are_said_to_be(x64, sample):
    """A loss of 1e200 overflows the inner products, and every undefined number says why."""
    wild = sample._replace(loss=gl.PerStep(lambda o, target: 1e200 * optax.softmax_cross_entropy(o, target)))
    for found in (lag_profile(*wild, [SLTT()], KEY, edges=[0, 1]), over_time(*wild, [SLTT()], KEY)):
        frame = found.to_frame()
        undefined = frame["value"].isna()
        assert undefined.any() and undefined.eq(frame["flag"] != "").all()
        assert frame["flag"].str.contains("not finite").any()


def test_rules_split_their_gradient_by_step(x64, sample):
    """Every rule that knows at which step the weights acted: the parts add up to its gradient."""
    net, params, batch, loss = sample
    tape = record(net, params, batch, loss)
    rules = [BPTT(), TBPTT(k=3), OSTL(own="full"), OTPE(), EProp("random")]
    for rule, grad in zip(rules, gl.gradients(*sample, rules, KEY).values(), strict=True):
        state = rule.init(net, params, gl.engine.shapes_of(*sample))
        split = jax.jit(lambda rule=rule, state=state: rule.by_step(net, params, tape, state, KEY))()
        assert all(leaf.shape[0] == STEPS for leaf in jax.tree.leaves(split))
        close(jax.tree.map(lambda leaf: leaf.sum(0), split), grad)


def test_the_figures_show_the_frames(x64, profile, timeline):
    ax = profile.plot("layer_0")
    named = [text.get_text() for text in ax.get_figure().legends[0].get_texts()]
    assert ax.get_xlabel().startswith("lag") and any(text.startswith("BPTT (sum 1.00)") for text in named)
    credit = profile.to_frame().query("rule == 'BPTT' and layer == 'layer_0' and metric == 'credit'")["value"]
    assert any(np.allclose(line.get_ydata(), credit) for line in ax.get_lines() if len(line.get_ydata()) == STEPS)
    ax = timeline.plot("cosine", "layer_0")
    wanted = timeline.to_frame().query(
        "rule == 'SLTT' and layer == 'layer_0' and metric == 'cosine' and kind == 'cumulative'"
    )["value"]
    assert any(np.allclose(line.get_ydata(), wanted) for line in ax.get_lines() if len(line.get_ydata()) == STEPS)
    with pytest.raises(ValueError, match="no layer 'layer_9'"):
        profile.plot("layer_9")
