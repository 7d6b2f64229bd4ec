"""Every rule through `check_rule`; a user's rule, and faulty ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import numpy as np
import pytest
from rule_rows import CHECKED

import gradlab as gl
from gradlab.rules import (
    ALL,
    BPTT,
    OSTL,
    TBPTT,
    EProp,
    Estimate,
    Rule,
)
from gradlab.testing import assert_equal, case, check_rule, twins

pytestmark = pytest.mark.usefixtures("x64")


ONCE = ("eager equals compiled", "one compilation", "mean of samples", "zero mask", "causality", "documentation")
"""Checks that one row of a class is enough for: other hyper-parameters run the same code."""

EAGER = (OSTL, EProp, TBPTT)
"""Rules that the fast tests run without compilation, which takes seconds each; the slow tests run all."""


def _checks():
    seen = set()
    for row in CHECKED:
        again = type(row.rule) in seen
        seen.add(type(row.rule))
        names = [str(check) for check in check_rule(row.rule, None, row.expected, row.variants, tuple(row.exempt))]
        for index, name in enumerate(names):
            if again and name in ONCE:
                continue
            marks = [pytest.mark.xdist_group(row.rule.name)]
            if name == "eager equals compiled" and type(row.rule) not in EAGER:
                marks.append(pytest.mark.slow)
            yield pytest.param(row, index, id=f"{row.rule.name}-{name}", marks=marks)


@pytest.mark.parametrize(("row", "index"), list(_checks()))
def test_rule(row, index):
    check_rule(row.rule, row.network(), row.expected, row.variants, tuple(row.exempt))[index]()


def test_every_rule_is_checked():
    assert {type(rule) for rule in ALL} == {type(row.rule) for row in CHECKED}
    assert len({rule.name for rule in ALL}) == len(ALL)


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
