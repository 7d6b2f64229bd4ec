"""The canonical text of a specification: it round-trips, is stable, tells values apart, refuses the rest."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradlab as gl
from gradlab.factories import Initializer, Optimizer
from gradlab.study import canonical
from gradlab.study.spec import LandscapeSpec

ROOT = Path(gl.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Plain:
    number: float = 1.0
    names: tuple[str, ...] = ()


def net(beta=0.9, features=3, links=None):
    modules = [
        nn.Dense(features, kernel_init=Initializer("normal", stddev=0.1)),
        gl.LIF(beta=beta),
        nn.Dense(2),
        gl.LI(),
    ]
    return gl.connect(modules, links=links)


VALUES = {
    "none": None,
    "numbers": (1, 1.0, -0.0, 0.1 + 0.2, 2**70, True, 1e-320),
    "infinite": (float("inf"), float("-inf")),
    "nested": {"a": [1, (2, [3])], 4: {"b": ()}, (1, "x"): None},
    "text": 'quotes " and \u00e9 and \n',
    "dataclass": Plain(0.5, ("x", "y")),
    "library dataclass": LandscapeSpec(points=7, planes=("random", "pca")),
    "initializer": Initializer("variance_scaling", scale=2.0, mode="fan_in", distribution="normal"),
    "optimizer": Optimizer("adamax", learning_rate=1e-3),
    "dense": nn.Dense(4),
    "conv": nn.Conv(4, (3, 3), strides=2, use_bias=False),
    "sequential": nn.Sequential((nn.Dense(3), nn.relu, jnp.tanh)),
    "precision": nn.Dense(3, param_dtype=jnp.float64),
    "neuron": gl.LIF(beta=(0.8, 0.9), surrogate=gl.FastSigmoid(slope=10.0)),
    "network": net(),
    "recurrent": net(links={0: [0], 1: {1: nn.Dense(2)}}),
    "loss": gl.PerStep(optax.softmax_cross_entropy),
    "function": optax.softmax_cross_entropy,
    "class": Plain,
}


@pytest.mark.parametrize("name", VALUES)
def test_round_trip(name):
    value = VALUES[name]
    text = canonical.dumps(value)
    back = canonical.loads(text)
    assert back == value
    assert type(back) is type(value)
    assert canonical.dumps(back) == text


def test_texts_differ_where_values_differ():
    different = [
        *VALUES.values(),
        (1,), [1], (1.0,), ("1",), (True,), {1: 1}, {"1": 1}, -0.0, 0.0, np.nextafter(0.1, 1.0), 0.1,
        nn.Dense(5), nn.Dense(4, use_bias=False), net(beta=0.91), net(links={1: [1]}), Plain(),
        LandscapeSpec(),
        Initializer("normal", stddev=0.1), Initializer("normal", stddev=0.2), Initializer("normal"),
    ]  # fmt: skip
    texts = [canonical.dumps(value) for value in different]
    assert len(set(texts)) == len(texts)


def test_equal_values_have_one_text_whatever_their_order():
    assert canonical.dumps({"b": 1, "a": 2}) == canonical.dumps({"a": 2, "b": 1})
    assert canonical.dumps(np.float64(0.1)) == canonical.dumps(0.1)
    assert canonical.dumps(nn.Dense(3, use_bias=True)) == canonical.dumps(nn.Dense(3))
    first, second = Initializer("uniform", scale=1.0), Initializer("uniform", scale=1.0)
    assert first == second and hash(first) == hash(second)


def test_defaults_of_our_own_modules_are_written_and_those_of_flax_are_not():
    # If a default of the library changed, the stored text must still mean the old value.
    assert "beta" in canonical.encode(gl.LIF())["fields"]
    assert canonical.encode(nn.Dense(3))["fields"] == {"features": 3}


def test_identity_ignores_white_space_only():
    text = canonical.dumps(VALUES["nested"])
    assert canonical.identity(text.replace(",", ", \n")) == canonical.identity(text)
    assert canonical.identity(text) != canonical.identity(text.replace("3", "4"))


def test_identity_is_the_same_in_processes_with_other_hash_seeds():
    script = (
        "import flax.linen as nn, gradlab as gl\n"
        "from gradlab.factories import Initializer\n"
        "from gradlab.study import canonical\n"
        "dense = nn.Dense(3, kernel_init=Initializer('normal', stddev=.1))\n"
        "net = gl.connect([dense, gl.LIF(beta=.9), nn.Dense(2), gl.LI()])\n"
        "names = {name: 1 for name in {'a', 'b', 'c'}}\n"
        "print(canonical.identity(canonical.dumps({'n': net, 'x': names})), hash('a'))\n"
    )
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.append(run.stdout.split())
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1], "negative control: the hash seeds do differ"
    assert found[0][0] == canonical.identity(canonical.dumps({"n": net(), "x": {"a": 1, "b": 1, "c": 1}}))


def _closure():
    return lambda x: x


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Plain(number=_closure()), r"study\.number"),
        ({"a": (1, lambda x: x)}, r"study\['a'\]\[1\]"),
        (nn.Dense(3, kernel_init=nn.initializers.normal(0.1)), r"study\.kernel_init"),
        (gl.PerStep(lambda a, b: a - b), r"study\.function"),
        (np.ones(3), "study is a ndarray"),
        (jnp.ones(3), "study is a"),
        ({1, 2}, "study is a set"),
        (gl.Batch(None, None), "study is a Batch"),
    ],
)
def test_what_has_no_canonical_form_is_refused_by_its_place(value, place):
    with pytest.raises(canonical.CanonicalError, match=place):
        canonical.dumps(value, "study")


def test_a_partial_function_round_trips():
    value = functools.partial(optax.sigmoid_focal_loss, gamma=2.0)
    back = canonical.loads(canonical.dumps(value))
    assert (back.func, back.args, back.keywords) == (value.func, value.args, value.keywords)


def test_public_paths_are_preferred():
    assert canonical.import_path(optax.softmax_cross_entropy) == "optax.softmax_cross_entropy"
    assert canonical.import_path(nn.Dense) == "flax.linen.Dense"
    assert "_src" not in canonical.import_path(jax.nn.gelu)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"function":"nosuchpackage.f"}', "nosuchpackage.f"),
        ('{"function":"optax.no_such_loss"}', "optax.no_such_loss"),
        ('{"type":"os.system","fields":{"command":"true"}}', "not a dataclass"),
        ('{"type":"gradlab.factories.Initializer","fields":{"nme":"normal"}}', "does not accept"),
        ('{"what":1}', "Not a canonical form"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(canonical.CanonicalError, match=message):
        canonical.loads(text)


class TestFactories:
    def test_initializer_draws_what_jax_draws(self):
        key = jax.random.key(3)
        ours = Initializer("lecun_normal")(key, (4, 5), jnp.float32)
        assert np.array_equal(ours, jax.nn.initializers.lecun_normal()(key, (4, 5), jnp.float32))
        assert not np.array_equal(ours, Initializer("he_normal")(key, (4, 5)))
        assert np.array_equal(Initializer("zeros")(key, (2,)), np.zeros(2))
        assert nn.Dense(2, kernel_init=Initializer("ones")).init(key, jnp.ones((1, 3)))["params"]["kernel"].sum() == 6

    def test_optimizer_steps_as_optax_does(self):
        ours, theirs = Optimizer("sgd", learning_rate=0.5, momentum=0.9).build(), optax.sgd(0.5, momentum=0.9)
        grad = jnp.array([1.0, -2.0])
        assert np.array_equal(ours.update(grad, ours.init(grad))[0], theirs.update(grad, theirs.init(grad))[0])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Initializer("lecun_norml"), "Did you mean 'lecun_normal'"),
            (lambda: Initializer("normal", std=0.1), "takes: stddev"),
            (lambda: Initializer("zeros", scale=1.0), "takes no arguments"),
            (lambda: Optimizer("adamx", learning_rate=1e-3), "Did you mean 'adamax'"),
            (lambda: Optimizer("adam", lr=1e-3), "takes: learning_rate"),
            (lambda: Optimizer("adam"), "learning_rate"),
        ],
    )
    def test_mistakes_get_the_way_out(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_frozen_hashable_printable(self):
        made = Optimizer("adam", learning_rate=1e-3, b1=0.8)
        assert eval(repr(made)) == made
        assert len({made, Optimizer("adam", b1=0.8, learning_rate=1e-3), Optimizer("adam", learning_rate=1e-3)}) == 2
        with pytest.raises(AttributeError, match="frozen"):
            made.name = "sgd"
