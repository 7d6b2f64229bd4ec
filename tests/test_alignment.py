"""Alignment of the optimizer's updates."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import gradlab as gl
from gradlab.analysis.alignment import update_alignment
from gradlab.rules import OTTT, SLTT
from gradlab.testing import case

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_updates_are_compared_after_the_optimizer():
    sample = case(n_steps=6)
    rules = [OTTT(), SLTT()]
    grads = {name: flat(tree) for name, tree in gl.gradients(*sample, [gl.rules.BPTT(), *rules], KEY).items()}
    # The first step of Adam is the sign of the gradient.
    signs = update_alignment(*sample, rules, KEY, optax.adam(0.1, eps=1e-30))
    sgd = update_alignment(*sample, rules, KEY, gl.Optimizer("sgd", learning_rate=0.1))
    for name in ("OTTT", "SLTT"):
        a, b = np.sign(grads[name]), np.sign(grads["BPTT"])
        assert signs.comparison.metrics(name)["cosine"] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)
        plain = gl.metrics.cosine(grads[name], grads["BPTT"])
        assert sgd.comparison.metrics(name)["cosine"] == pytest.approx(plain, abs=1e-12)
        assert signs.comparison.metrics(name)["cosine"] != pytest.approx(plain, abs=1e-3)
    frame = sgd.to_frame().query("metric == 'effective_learning_rate' and layer == 'network'").set_index("rule")
    weights = flat(sample.params)
    for name, gradient in grads.items():
        expected = 0.1 * np.linalg.norm(gradient) / np.linalg.norm(weights)
        assert frame.loc[name, "value"] == pytest.approx(expected, rel=1e-10)


def test_states_of_the_optimizer_are_used_and_checked():
    sample = case(n_steps=5)
    adam = optax.adam(0.1)
    past = adam.update(jax.tree.map(lambda leaf: leaf * 0 + 1.0, sample.params), adam.init(sample.params))[1]
    fresh, aged = (update_alignment(*sample, [SLTT()], KEY, adam, states=s) for s in (None, {"SLTT": past}))
    assert fresh.comparison.metrics("SLTT")["cosine"] != pytest.approx(aged.comparison.metrics("SLTT")["cosine"])
    with pytest.raises(ValueError, match=r"states are given for \['OSTL'\]"):
        update_alignment(*sample, [SLTT()], KEY, adam, states={"OSTL": past})
