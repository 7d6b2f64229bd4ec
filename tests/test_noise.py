"""Bias and variance of estimators: tables of gradients known entry by entry, rules of known noise, loops in NumPy."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import gradlab as gl
from gradlab.analysis import noise
from gradlab.analysis.noise import estimator_noise
from gradlab.report import plots_noise
from gradlab.rules import BPTT, OTTT, SLTT, UORO, Estimate, Rule
from gradlab.rules.sweep import backward
from gradlab.testing.networks import case, feed_forward

KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Noisy(Rule):
    """BPTT times `scale`, plus `shift` in every entry, plus normal noise of standard deviation `deviation`."""

    reference: ClassVar[str] = "a test"
    scale: float = 1.0
    shift: float = 0.0
    deviation: float = 0.0

    def gradient(self, net, params, tape, state, key):
        leaves, structure = jax.tree.flatten(backward(net, params, tape))
        keys = jax.random.split(key, len(leaves))
        made = [
            self.scale * g + self.shift + self.deviation * jax.random.normal(k, g.shape, g.dtype)
            for g, k in zip(leaves, keys, strict=True)
        ]
        return Estimate(jax.tree.unflatten(structure, made))


class Coins:
    """A task of random spikes for the small network."""

    def batch(self, key, size):
        x = (jax.random.uniform(key, (7, size, 5)) < 0.5).astype(jnp.float64)
        return gl.Batch(x, jax.nn.one_hot(jnp.arange(size) % 3, 3, dtype=x.dtype))


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        return case(feed_forward(widths=(4, 3)), n_steps=7, batch_size=4)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def batches_of(n, size=4):
    return [Coins().batch(jax.random.key(50 + i), size) for i in range(n)]


def measured(small, batches, rules, **settings):
    return estimator_noise(small.net, small.params, batches, small.loss, rules, KEY, **settings)


@pytest.fixture
def table(small, monkeypatch):
    """A function (rule table {name: [n, draws, parameters]}) -> what `estimator_noise` makes of these gradients."""
    leaves, structure = jax.tree.flatten(small.params)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def measure(rows, draws, healthy=True):
        batches, seen = batches_of(len(next(iter(rows.values())))), {}

        def gradients(net, params, batch, loss, rules, key):
            i = next(k for k, b in enumerate(batches) if b is batch)
            j = seen[i] = seen.get(i, -1) + 1
            found = {}
            for rule in rules:
                values = rows[rule.name][i, j if rows[rule.name].shape[1] > 1 else 0]
                parts = [p.reshape(leaf.shape) for p, leaf in zip(np.split(values, ends[:-1]), leaves, strict=True)]
                found[rule.name] = jax.tree.unflatten(structure, parts)
            return found

        monkeypatch.setattr(noise, "gradients", gradients)
        if healthy:
            monkeypatch.setattr(noise, "evaluate", lambda *_: {"silent_units": {}, "saturated_units": {}})
        rules = [Noisy(deviation=1.0)] if "Noisy(deviation=1.0)" in rows else []
        return measured(small, batches, rules, draws=draws)

    measure.size = int(ends[-1])
    measure.ends = ends
    return measure


NOISY = "Noisy(deviation=1.0)"


def drawn(rng, size, n=5, draws=3):
    """A reference g*_i and a rule's g_ij with a shift and noise of both kinds."""
    target = rng.normal(1.0, 0.7, (n, 1, size))
    own = 1.5 * target + rng.normal(0.3, 0.4, (n, 1, size)) + rng.normal(0.0, 0.5, (n, draws, size))
    return {"BPTT": target, NOISY: own}


def test_every_metric_equals_loops_over_batches_and_draws(table):
    n, m = 5, 3
    rows = drawn(np.random.default_rng(0), table.size, n, m)
    found = table(rows, draws=m)
    g, target = rows[NOISY], rows["BPTT"][:, 0]
    for group, part in (("network", slice(None)), ("layer_1/connection/bias", slice(table.ends[1], table.ends[2]))):
        rule = data = total = bias = spread = gsnr = 0.0
        of_mean = np.zeros(3)
        for p in range(*part.indices(table.size)):
            within = np.mean([sum((g[i, j, p] - g[i, :, p].mean()) ** 2 for j in range(m)) / (m - 1) for i in range(n)])
            means = [g[i, :, p].mean() for i in range(n)]
            across = sum((v - np.mean(means)) ** 2 for v in means) / (n - 1)
            gaps = [means[i] - target[i, p] for i in range(n)]
            rule, data = rule + within, data + across - within / m
            total += across - within / m + within
            spread += sum((d - np.mean(gaps)) ** 2 for d in gaps) / (n - 1)
            bias += np.mean(gaps) ** 2 - sum((d - np.mean(gaps)) ** 2 for d in gaps) / (n - 1) / n
            for j in range(m):
                own = [g[i, j, p] for i in range(n)]
                variance = sum((v - np.mean(own)) ** 2 for v in own) / (n - 1)
                gsnr += ((n - 3) / (n - 1) * np.mean(own) ** 2 / variance - 1 / n) / m
            a, b = np.mean(means), target[:, p].mean()
            of_mean += (a * b, a * a, b * b)
        size = len(range(*part.indices(table.size)))
        signal = of_mean[1] - (data + rule / m) / n
        unit = of_mean[2] - target[:, part].var(0, ddof=1).sum() / n
        single = [
            g[i, j, part] @ target[i, part] / np.linalg.norm(g[i, j, part]) / np.linalg.norm(target[i, part])
            for i in range(n)
            for j in range(m)
        ]
        expected = {
            "rule_variance": rule, "data_variance": data, "total_variance": total, "bias_square": bias,
            "bias": bias**0.5, "bias_noise": (spread / n) ** 0.5, "mean_norm_square": signal,
            "relative_bias": (bias / unit) ** 0.5, "relative_rule_noise": (rule / unit) ** 0.5,
            "relative_data_noise": (data / unit) ** 0.5, "signal_to_noise": (signal / total) ** 0.5,
            "noise_scale": 4 * total / signal, "gsnr": gsnr / size, "gsnr_coverage": 1.0,
            "cosine_of_mean_gradients": of_mean[0] / np.sqrt(of_mean[1] * of_mean[2]),
            "mean_of_cosines": np.mean(single), "sd_of_cosines": np.std(single, ddof=1), "undefined_cosines": 0.0,
        }  # fmt: skip
        got = found.metrics(NOISY, group)
        assert set(got) == set(expected)
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-10, abs=1e-13), (group, name)
    # Negative control: averaging is not commutative here; a mix-up of the two cosines would show.
    assert abs(got["cosine_of_mean_gradients"] - got["mean_of_cosines"]) > 1e-3


def test_the_noise_scale_is_the_two_batch_form_of_the_paper(table):
    n, B = 5, 4
    target = np.random.default_rng(1).normal(0.8, 1.0, (n, 1, table.size))
    found = table({"BPTT": target}, draws=2).metrics("BPTT")
    small, big = np.mean([g @ g for g in target[:, 0]]), np.sum(target[:, 0].mean(0) ** 2)
    square = (n * B * big - B * small) / (n * B - B)
    trace = (small - big) / (1 / B - 1 / (n * B))
    assert found["noise_scale"] == pytest.approx(trace / square, rel=1e-10)
    assert found["noise_scale"] != pytest.approx(trace / big, rel=1e-3)  # the biased form is another number


def test_the_estimates_are_unbiased(table):
    rng, n, m, size = np.random.default_rng(2), 2, 2, table.size
    names = ("rule_variance", "data_variance", "bias_square", "mean_norm_square")
    shift, target = rng.normal(0.0, 0.2, size), rng.normal(0.0, 0.2, size)
    got = []
    for _ in range(300):
        data = rng.normal(0.0, 0.3, (n, 1, size))
        own = target + shift + 1.5 * data + rng.normal(0.0, 0.5, (n, m, size))
        found = table({"BPTT": target + data, NOISY: own}, draws=m).metrics(NOISY)
        got.append([found[name] for name in names])
    # d_i has the data's variance 0.5^2 0.3^2 in it, which the correction takes out of the bias.
    truth = [0.25 * size, 1.5**2 * 0.09 * size, shift @ shift, (target + shift) @ (target + shift)]
    mean, error = np.mean(got, 0), np.std(got, 0, ddof=1) / np.sqrt(len(got))
    assert (np.abs(mean - truth) < 4 * error).all()
    assert (error < 0.15 * np.array(truth)).all()
    # Negative control: without its correction the squared bias is off by many standard errors.
    uncorrected = mean[2] + (0.25 * 0.09 + 0.25 / m) * size / n
    assert abs(uncorrected - truth[2]) > 8 * error[2]


def test_the_gsnr_is_unbiased_and_the_plug_in_is_not(table):
    rng, n = np.random.default_rng(3), 8
    got = [
        table({"BPTT": rng.normal(0.5, 1.0, (n, 1, table.size))}, draws=2).metrics("BPTT")["gsnr"] for _ in range(60)
    ]
    error = np.std(got, ddof=1) / np.sqrt(len(got))
    assert abs(np.mean(got) - 0.25) < 4 * error < 0.1
    plug_in = (np.mean(got) + 1 / n) * (n - 1) / (n - 3)
    assert abs(plug_in - 0.25) > 8 * error


def test_a_rule_of_known_bias_and_noise(small):
    size = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    found = measured(small, batches_of(6), [Noisy(shift=0.2, deviation=0.005)], draws=8)
    got = found.metrics("Noisy(shift=0.2, deviation=0.005)")
    # 6 * 7 degrees of freedom per parameter.
    assert got["rule_variance"] == pytest.approx(0.005**2 * size, rel=5 * np.sqrt(2 / (6 * 7 * size)))
    assert got["bias_square"] == pytest.approx(0.2**2 * size, rel=0.03)
    exact = found.metrics("BPTT")
    assert exact["rule_variance"] == exact["bias_square"] == exact["bias_noise"] == 0.0
    # The same data move both: without the rule's noise their variances are the same number.
    assert got["data_variance"] == pytest.approx(exact["data_variance"], rel=0.05)


def test_twice_the_gradient_keeps_cosine_and_signal_to_noise_but_is_biased(small):
    found = measured(small, batches_of(5), [Noisy(scale=2.0), Noisy(scale=-1.0)], draws=2)
    twice, exact = found.metrics("Noisy(scale=2.0)"), found.metrics("BPTT")
    for name in ("cosine_of_mean_gradients", "mean_of_cosines", "signal_to_noise", "gsnr", "noise_scale"):
        assert twice[name] == pytest.approx(exact[name], rel=1e-10), name
    assert twice["relative_bias"] == pytest.approx(1.0, rel=1e-10)
    assert twice["data_variance"] == pytest.approx(4 * exact["data_variance"], rel=1e-10)
    away = found.metrics("Noisy(scale=-1.0)")
    assert away["mean_of_cosines"] == pytest.approx(-1.0) and away["relative_bias"] == pytest.approx(2.0)


def test_only_stochastic_rules_have_noise_of_their_own(small):
    found = measured(small, batches_of(3), [BPTT(), SLTT(), UORO()], draws=4)
    assert found.draws == {"BPTT": 1, "SLTT": 1, "UORO": 4} and found.rules == ("BPTT", "SLTT", "UORO")
    for rule in ("BPTT", "SLTT"):
        assert found.metrics(rule)["rule_variance"] == 0.0
    got = found.metrics("UORO")
    assert got["rule_variance"] > 0.1 * found.metrics("BPTT")["total_variance"]
    # UORO is unbiased: its bias must drown in the noise of the estimate, SLTT's need not.
    assert got["bias_square"] < 9 * got["bias_noise"] ** 2


def test_draws_that_are_zero_on_the_first_batch_tell_nothing(table):
    rows = drawn(np.random.default_rng(4), table.size, 3, 3)
    rows[NOISY][0] = 0.0
    found = table(rows, draws=3)
    assert found.draws[NOISY] == 3 and found.metrics(NOISY)["rule_variance"] > 0
    assert found.metrics(NOISY)["undefined_cosines"] == pytest.approx(1 / 3)
    rows[NOISY][0] = 1.0  # negative control: equal draws that are not zero
    assert table(rows, draws=3).draws[NOISY] == 1


def test_what_has_no_value_says_why(table, small):
    rng = np.random.default_rng(5)
    rows = drawn(rng, table.size, 3, 2)
    flags = table(rows, draws=2).flags(NOISY)
    assert "needs four" in flags["gsnr"] and not flags["signal_to_noise"]
    rows[NOISY] = rng.normal(0.0, 1.0, rows[NOISY].shape) * 1e3
    rows[NOISY] -= rows[NOISY].mean((0, 1))
    found = table(rows, draws=2)
    assert "not positive" in found.flags(NOISY)["signal_to_noise"]
    assert np.isnan(found.metrics(NOISY)["signal_to_noise"])
    rows[NOISY][:] = 0.0
    assert "zero" in table(rows, draws=2).flags(NOISY)["mean_of_cosines"]
    rows[NOISY][1, 1, 0] = np.inf
    assert set(table(rows, draws=2).flags(NOISY).values()) == {f"a gradient of {NOISY} or BPTT is not finite"}
    same = {"BPTT": np.ones((3, 1, table.size))}
    quiet = table(same, draws=2)
    assert quiet.metrics("BPTT")["noise_scale"] == 0.0 and "no noise" in quiet.flags("BPTT")["signal_to_noise"]


def test_a_dead_layer_has_no_direction(small):
    silent = jax.tree.map(lambda leaf: leaf * 1.0, small.params)
    silent["layer_0"] = jax.tree.map(lambda leaf: leaf * 0.0 - 1.0, silent["layer_0"])
    found = estimator_noise(small.net, silent, batches_of(2), small.loss, [OTTT()], KEY, draws=2)
    for group in ("network", "layer_0", "layer_0/connection/kernel"):
        assert "layer_0 is silent on 2 of 2 batches" in found.flags("OTTT", group)["mean_of_cosines"]
        assert found.flags("OTTT", group)["data_variance"] == ""
    alive = measured(small, batches_of(2), [OTTT()], draws=2)
    assert alive.flags("OTTT")["mean_of_cosines"] == ""


def test_a_task_gives_the_batches(small):
    found = measured(small, Coins(), [SLTT()], draws=2, n_batches=3, size=5)
    again = measured(small, Coins(), [SLTT()], draws=2, n_batches=3, size=5)
    assert (found.n_batches, found.batch_size) == (3, 5)
    assert found.metrics("SLTT", "layer_0") == again.metrics("SLTT", "layer_0")
    other = estimator_noise(
        small.net, small.params, Coins(), small.loss, [SLTT()], jax.random.key(9), draws=2, n_batches=3, size=5
    )
    assert found.metrics("BPTT")["data_variance"] != other.metrics("BPTT")["data_variance"]


def test_bad_input_is_refused_in_words(small):
    with pytest.raises(ValueError, match="at least two"):
        measured(small, batches_of(1), [SLTT()])
    with pytest.raises(TypeError, match=r"list of gl\.Batch"):
        measured(small, small.batch, [SLTT()])
    with pytest.raises(ValueError, match="batch 1 has inputs of shape"):
        measured(small, [*batches_of(1), *batches_of(1, size=5)], [SLTT()])
    with pytest.raises(ValueError, match="at least 2"):
        measured(small, batches_of(2), [SLTT()], draws=1)
    with pytest.raises(ValueError, match="n_batches"):
        measured(small, Coins(), [SLTT()])
    with pytest.raises(ValueError, match="are for a task"):
        measured(small, batches_of(2), [SLTT()], size=3)
    found = measured(small, batches_of(2), [SLTT()], draws=2)
    with pytest.raises(KeyError, match="no part of the network"):
        found.metrics("SLTT", "layer_7")
    with pytest.raises(KeyError, match="was not measured"):
        found.metrics("OTTT")


def test_the_frame_survives_a_file_and_can_be_drawn(table, tmp_path):
    rows = drawn(np.random.default_rng(6), table.size, 4, 2)
    rows[NOISY] = rows[NOISY][:, :1] * np.ones((1, 2, 1)) + np.random.default_rng(7).normal(0, 9, rows[NOISY].shape)
    frame = table(rows, draws=2).to_frame()
    assert list(frame.columns[:5]) == ["rule", "layer", "metric", "value", "flag"]
    assert (frame["value"].isna() == (frame["flag"] != "")).all()
    negative = frame[(frame["metric"] == "data_variance") & (frame["value"] < 0)]
    assert len(negative) and (negative["note"] != "").all()
    frame.to_csv(tmp_path / "noise.csv", index=False)
    ax = plots_noise.draw(pd.read_csv(tmp_path / "noise.csv"))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["BPTT", NOISY]
    assert "relative to the mean gradient of BPTT" in ax.get_xlabel()
    shown = {float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
    value = frame[(frame["metric"] == "relative_rule_noise") & (frame["layer"] == "network")]["value"].max()
    assert any(x == pytest.approx(value) for x in shown)
