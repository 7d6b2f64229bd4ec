"""Products of spikes in bfloat16 parts: how exact they are, that every mode differentiates them, what is refused."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, differ, living, trains

import gradlab as gl
from gradlab import rules
from gradlab.spike_products import SpikeProducts, _split

DENSE = (((1,), (0,)), ((), ()))


def plain(x, w):
    return x @ w


def products_of(how):
    return lambda x, w: how(x, w, DENSE)


def three(function, x, w, delta):
    """The product, and its pull-backs to inputs and weights."""
    out, pull = jax.vjp(function, x, w)
    return out, *pull(delta)


def errors(function, x, w, delta):
    """Relative errors of the three against float64 in NumPy."""
    found = jax.jit(lambda *a: three(function, *a))(x, w, delta)
    x, w, delta = (np.asarray(a, np.float64) for a in (x, w, delta))
    exact = (x @ w, delta @ w.T, x.T @ delta)
    pairs = zip(found, exact, strict=True)
    return np.array([np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs])


def case(features, rate, spread, rows=64, units=32):
    """Spikes, weights and errors whose sizes span many orders of magnitude (e^spread is one standard deviation)."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = trains((rows, features), rate=rate)
    w = jax.random.normal(keys[0], (features, units)) * jnp.exp(spread * jax.random.normal(keys[1], (features, units)))
    delta = jax.random.normal(keys[2], (rows, units)) * jnp.exp(spread * jax.random.normal(keys[3], (rows, units)))
    return x, w, delta


CASES = [(64, 0.01, 0.5), (512, 0.2, 3.0), (4096, 0.05, 1.0)]


@pytest.mark.parametrize(("features", "rate", "spread"), CASES)
def test_three_parts_are_as_good_as_float32_and_fewer_are_not(features, rate, spread):
    given = case(features, rate, spread)
    bound = 2 * np.maximum(errors(plain, *given), 2.0**-25)
    for exact in (True, False):
        one, two, full = (errors(products_of(SpikeProducts(parts, exact)), *given) for parts in (1, 2, 3))
        assert (full <= bound).all(), f"{full} against {bound / 2} in float32"
        assert (two > bound).all() and (two < 2.0**-14).all(), two
        assert (one > 2.0**-13).all() and (one < 2.0**-7).all(), one


def test_three_parts_hold_every_bit_and_two_do_not():
    w = case(64, 0.1, 3.0)[1]
    split = jax.jit(_split, static_argnums=1)
    held = {parts: sum(np.asarray(part, np.float64) for part in split(w, parts)) for parts in (2, 3)}
    assert (held[3] == np.asarray(w, np.float64)).all()
    assert (held[2] != np.asarray(w, np.float64)).any()


def test_whole_numbers_up_to_256_are_exact_and_257_is_not():
    w = case(8, 0.1, 1.0)[1]
    for largest, exact in ((256, True), (257, False)):
        x = jnp.full((3, 8), float(largest))
        found = np.asarray(jax.jit(products_of(SpikeProducts()))(x, w))
        assert np.isfinite(found).all() if exact else np.isnan(found).all()


def test_inputs_that_are_no_spikes_never_give_a_number():
    x, w, delta = case(32, 0.2, 1.0)
    scaled = x / 0.9
    for function in (products_of(SpikeProducts()), products_of(SpikeProducts(parts=1))):
        with pytest.raises(ValueError, match="exact_inputs=False"):
            function(scaled, w)
        out, to_inputs, to_weights = jax.jit(lambda *a, f=function: three(f, *a))(scaled, w, delta)
        assert np.isnan(out).all() and np.isnan(to_weights).all()
        assert np.isfinite(to_inputs).all(), "the error handed down does not read the inputs"
    assert (errors(products_of(SpikeProducts(exact_inputs=False)), scaled, w, delta) < 1e-6).all()


def test_forward_and_reverse_mode_and_both_orders_of_the_second():
    x, w, _ = case(16, 0.3, 0.5, rows=6, units=5)
    v = jax.random.normal(jax.random.key(7), w.shape)

    def results(product):
        def loss(w):
            return (product(x, w) ** 3).sum()

        pushed = jax.jvp(product, (x, w), (0.3 * x, v))[1]
        jacobian = jax.vmap(jax.jacfwd(lambda s: product(s[None], w)[0]))(x)
        hessian = jax.jvp(jax.grad(loss), (w,), (v,))[1]
        turned = jax.grad(lambda w: jax.jvp(loss, (w,), (v,))[1])(w)
        mixed = jax.grad(lambda s: (jax.grad(lambda w: (product(s, w) ** 3).sum())(w) ** 2).sum())(x)
        return pushed, jacobian, hessian, turned, mixed

    found = jax.jit(lambda: results(products_of(SpikeProducts(exact_inputs=False))))()
    close(found, jax.jit(lambda: results(plain))(), 1e-6)
    assert differ(found, jax.jit(lambda: results(products_of(SpikeProducts(1, exact_inputs=False))))())


@pytest.mark.parametrize("axes", [a for a in itertools.product((None, 0), repeat=3) if a != (None,) * 3])
def test_vmap_over_any_of_the_factors(axes):
    given = case(16, 0.3, 0.5, rows=6, units=5)
    stacks = [a if axis is None else jnp.stack([a, 1 - a]) for a, axis in zip(given, axes, strict=True)]
    function = products_of(SpikeProducts())
    found = jax.jit(jax.vmap(lambda *a: three(function, *a), in_axes=axes))(*stacks)
    close(found, jax.vmap(lambda *a: three(plain, *a), in_axes=axes)(*stacks), 1e-6)


def network(**settings):
    return gl.connect([m for n in (10, 4) for m in (nn.Dense(n, **settings), gl.LIF(beta=0.8))])


def test_gradients_of_a_network_are_those_of_float32():
    inputs = trains((12, 5, 9))
    batch = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(5) % 4, 4))
    loss = gl.PerStep(optax.softmax_cross_entropy)
    params = living(network(), inputs)
    found = {}
    for parts in (None, 1, 3):
        net = network() if parts is None else network(dot_general=SpikeProducts(parts))
        # The two local rules share their products, stacked by `vmap`.
        chosen = [rules.BPTT(), rules.OSTL(), rules.OTTT()]
        found[parts] = tuple(gl.gradients(net, params, batch, loss, chosen, jax.random.key(1)).values())
    close(found[3], found[None], 1e-4)
    assert differ(found[1], found[None], 1e-3), "one part rounds the weights"


def test_what_is_refused_says_the_way_out():
    x, w, _ = case(8, 0.2, 1.0)
    with pytest.raises(ValueError, match="choose 1, 2 or 3"):
        SpikeProducts(parts=4)
    with pytest.raises(ValueError, match=r"use it in nn\.Dense"):
        SpikeProducts()(x, w.T, (((1,), (1,)), ((), ())))
    with pytest.raises(TypeError, match="bfloat16"):
        SpikeProducts()(x.astype(jnp.bfloat16), w, DENSE)
    with pytest.raises(ValueError, match="leave out 'highest'"):
        nn.Dense(3, dot_general=SpikeProducts(), precision="highest").init(jax.random.key(0), x)
    assert hash(SpikeProducts()) == hash(SpikeProducts()) and SpikeProducts() != SpikeProducts(2)


def test_float64_is_refused_rather_than_rounded(x64):
    with pytest.raises(TypeError, match="float64"):
        SpikeProducts()(jnp.ones((2, 3)), jnp.ones((3, 2)), DENSE)
