"""Products of sparse spikes: the sums of the compiled kernel, when they are taken, derivatives, and life without it."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, differ, living, run_compiled, trains
from jax import lax

import gradlab as gl
from gradlab import rules
from gradlab.native import build
from gradlab.sparse_products import SparseProducts, _packed, _sums

DENSE = (((1,), (0,)), ((), ()))
KERNEL = "gradlab_gather"
SIZES = [(1, 1, 1), (64, 64, 16), (65, 63, 10), (130, 200, 138), (1100, 70, 300), (3, 2200, 31)]
needs_kernel = pytest.mark.skipif(build.targets() is None, reason="no C++ compiler on this machine")


def plain(x, w):
    return x @ w


def products_of(how):
    return lambda x, w: how(x, w, DENSE)


def three(function, x, w, delta):
    """The product, and its pull-backs to inputs and weights."""
    out, pull = jax.vjp(function, x, w)
    return out, *pull(delta)


def case(rows=128, features=256, units=128, rate=0.05):
    """Spikes, weights and errors of a product that is just large enough."""
    keys = jax.random.split(jax.random.key(3), 2)
    shapes = (features, units), (rows, units)
    return trains((rows, features), rate=rate), *map(jax.random.normal, keys, shapes)


def uses_kernel(function, *arguments):
    return KERNEL in jax.jit(function).lower(*arguments).as_text()


@needs_kernel
@pytest.mark.parametrize(("rows", "features", "units"), SIZES)
def test_the_sums_are_the_products_at_any_size_and_density(rows, features, units):
    packed, sums = jax.jit(_packed, static_argnums=(1, 2)), jax.jit(_sums)
    for rate in (0.0, 0.02, 0.6, 1.0):
        x, w, delta = case(rows, features, units, rate)
        for transposed, y in ((False, w), (True, delta)):
            bits, is_sparse = packed(x, transposed, x.size)
            left = np.asarray(x.T if transposed else x, np.float64)
            exact = left @ np.asarray(y, np.float64)
            found = np.asarray(sums(bits, y), np.float64)
            bound = 2.0**-23 * np.sqrt(left.shape[1]) * (left @ np.abs(np.asarray(y, np.float64))).max()
            assert is_sparse and np.abs(found - exact).max() <= bound
            if exact.any() and left.size > 1:
                missed = np.argwhere(left)[0]
                left[tuple(missed)] = 0
                assert np.abs(left @ np.asarray(y, np.float64) - exact).max() > bound, "one spike less is seen"


@needs_kernel
def test_what_counts_as_sparse():
    x = trains((70, 90), rate=0.1)
    ones = int(x.sum())
    for transposed in (False, True):
        assert _packed(x, transposed, ones)[1] and not _packed(x, transposed, ones - 1)[1]
        assert _packed(jnp.where(x == 0, -0.0, x), transposed, ones)[1], "minus zero is zero"
        for strange in (0.5, 2.0, -1.0, jnp.nan, jnp.inf, 1e-30, 1 + 2.0**-23):
            assert not _packed(x.at[69, 89].set(strange), transposed, x.size)[1]


@needs_kernel
@pytest.mark.parametrize("strange", [0.5, jnp.nan, jnp.inf])
def test_analog_and_dense_inputs_give_the_dense_product_to_the_last_bit(strange):
    x, w, delta = case()
    x, w = x.at[:, 3].set(0), w.at[3, 4].set(jnp.inf)
    for inputs in (x.at[5, 7].set(strange), trains(x.shape, rate=0.5).at[:, 3].set(0)):
        found = jax.jit(lambda *a: three(products_of(SparseProducts()), *a))(inputs, w, delta)
        expected = jax.jit(lambda *a: three(plain, *a))(inputs, w, delta)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True))
        assert np.isnan(found[0][:, 4]).all()
    sparse = jax.jit(products_of(SparseProducts()))
    assert np.isfinite(sparse(x, w)).all(), "sums never meet what no spike selects"
    assert np.argwhere(np.isinf(sparse(x.at[9, 3].set(1), w))).tolist() == [[9, 4]]


@needs_kernel
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.6])
def test_products_and_gradients_are_those_of_dense(rate):
    given = case(131, 257, 141, rate)
    for how in (SparseProducts(), SparseProducts(densest=1.0)):
        found = jax.jit(lambda *a, how=how: three(products_of(how), *a))(*given)
        close(found, three(plain, *given), 1e-5)
    assert uses_kernel(products_of(SparseProducts()), *given[:2])
    if rate:
        x, *rest = given
        assert differ(found, three(plain, x.at[:, 200:].set(0), *rest)), "what comes last counts"


@needs_kernel
def test_forward_and_reverse_mode_and_both_orders_of_the_second():
    x, w, _ = case()
    v = jax.random.normal(jax.random.key(7), w.shape)

    def results(product):
        def loss(w):
            return (product(x, w) ** 3).mean()

        pushed = jax.jvp(product, (x, w), (0.3 * x, v))[1]
        hessian = jax.jvp(jax.grad(loss), (w,), (v,))[1]
        turned = jax.grad(lambda w: jax.jvp(loss, (w,), (v,))[1])(w)
        mixed = jax.grad(lambda s: (jax.grad(lambda w: (product(s, w) ** 3).mean())(w) ** 2).sum())(x)
        return pushed, hessian, turned, mixed

    found = jax.jit(lambda: results(products_of(SparseProducts())))()
    close(found, jax.jit(lambda: results(plain))(), 1e-5)
    assert differ(found, jax.jit(lambda: results(lambda x, w: (1 + 1e-3) * (x @ w)))(), 1e-4)


@needs_kernel
@pytest.mark.parametrize("axes", [a for a in itertools.product((None, 0), repeat=3) if a != (None,) * 3])
def test_vmap_over_any_of_the_factors(axes):
    given = case()
    stacks = [a if axis is None else jnp.stack([a, a[::-1]]) for a, axis in zip(given, axes, strict=True)]
    functions = products_of(SparseProducts()), plain
    found, expected = (jax.jit(jax.vmap(lambda *a, f=f: three(f, *a), in_axes=axes))(*stacks) for f in functions)
    close(found, expected, 1e-5)
    assert differ(found, jax.tree.map(lambda leaf: leaf[::-1], expected))


@needs_kernel
def test_inside_a_scan():
    x, w, _ = case()
    trains_of_chunks = jnp.stack([x, x[::-1], x[:, ::-1]])

    def summed(product, w):
        return lax.scan(lambda total, now: (total + product(now, w).sum(), None), 0.0, trains_of_chunks)[0]

    found, expected = (
        jax.jit(jax.grad(lambda w, f=f: summed(f, w)))(w) for f in (products_of(SparseProducts()), plain)
    )
    close(found, expected, 1e-5)
    assert differ(found, 2 * expected / 3)


def network(**settings):
    return gl.connect([m for n in (96, 64, 4) for m in (nn.Dense(n, **settings), gl.LIF(beta=0.8))])


@needs_kernel
def test_gradients_of_a_network_are_those_of_plain_dense():
    inputs = trains((16, 64, 128), rate=0.05)
    batch = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(64) % 4, 4))
    params = living(network(), inputs)
    sparse = network(dot_general=SparseProducts(densest=0.5))
    spikes = [[layer.output for layer in run_compiled(net, params, inputs)[1]] for net in (network(), sparse)]
    assert all(map(np.array_equal, *spikes)), "with this seed no membrane is within rounding of its threshold"
    # The two local rules share their products, stacked by `vmap`.
    chosen = [rules.BPTT(), rules.OSTL(), rules.OTTT()]
    loss = gl.PerStep(optax.softmax_cross_entropy)

    def gradients(net):
        return tuple(gl.gradients(net, params, batch, loss, chosen, jax.random.key(1)).values())

    expected = gradients(network())
    close(gradients(sparse), expected, 1e-4)
    assert differ(expected[:1], expected[1:2]), "rules differ by more than rounding"
    assert uses_kernel(lambda p: gl.gradients(sparse, p, batch, loss, chosen[:1], jax.random.key(1)), params)


@needs_kernel
def test_results_do_not_depend_on_threads(monkeypatch):
    x, w, _ = case()
    expected = np.asarray(jax.jit(products_of(SparseProducts()))(x, w))
    assert "threads = 0" in jax.jit(products_of(SparseProducts())).lower(x, w).as_text(), "as many as XLA has"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    alone = jax.jit(products_of(SparseProducts())).lower(x, w)
    assert "threads = 1" in alone.as_text() and "threads = 0" not in alone.as_text()
    assert np.array_equal(alone.compile()(x, w), expected)


@needs_kernel
def test_calls_side_by_side_end():
    x, w, delta = case()
    function = jax.jit(lambda *a: three(products_of(SparseProducts()), *a))
    expected = [np.asarray(leaf) for leaf in function(x, w, delta)]
    with ThreadPoolExecutor(6) as pool:
        found = [job.result(timeout=60) for job in [pool.submit(function, x, w, delta) for _ in range(60)]]
    assert all(np.array_equal(a, b) for one in found for a, b in zip(one, expected, strict=True))


def test_what_is_not_a_large_dense_layer_is_the_dense_product(x64):
    x, w = (array.astype(jnp.float32) for array in case()[:2])
    how = SparseProducts()
    others = [
        (x.astype(jnp.float64), w.astype(jnp.float64), DENSE, {}),
        (x, w.T, (((1,), (1,)), ((), ())), {}),
        (x[None], w[None], (((2,), (1,)), ((0,), (0,))), {}),
        (x, w, DENSE, {"precision": "highest"}),
        (x, w, DENSE, {"preferred_element_type": jnp.float64}),
        (x[:32], w, DENSE, {}),
        (x, w[:, :64], DENSE, {}),
        (x[:, :0], w[:0], DENSE, {}),
    ]
    assert build.targets() is None or uses_kernel(products_of(how), x, w), "the others differ from this in one thing"
    for lhs, rhs, dimensions, more in others:
        found, expected = (f(lhs, rhs, dimensions, **more) for f in (how, lax.dot_general))
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
        assert not uses_kernel(lambda a, b, d=dimensions, m=more: how(a, b, d, **m), lhs, rhs)


def test_a_share_is_from_0_to_1():
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            SparseProducts(densest=share)
    assert hash(SparseProducts()) == hash(SparseProducts()) and SparseProducts() != SparseProducts(0.5)


WITHOUT = """
import logging, numpy as np, jax, jax.numpy as jnp
logging.basicConfig()
from gradlab.sparse_products import SparseProducts
x = (jax.random.uniform(jax.random.key(0), (128, 256)) < 0.05).astype(jnp.float32)
w = jax.random.normal(jax.random.key(1), (256, 128))
for _ in range(3):
    found = SparseProducts()(x, w, (((1,), (0,)), ((), ())))
assert np.array_equal(found, jax.lax.dot(x, w))
"""


def test_without_a_compiler_there_is_one_warning_and_the_dense_product(tmp_path):
    variables = {**os.environ, "CXX": "/nonexistent/c++", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING:gradlab.native.build") == 1 and "/nonexistent/c++" in done.stderr
    assert not list(tmp_path.iterdir())


COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "{version}"; exit 0; fi
echo call >> "$(dirname "$0")/calls"
for last; do :; done
echo made > "$last"
exit {status}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that only says that it was called, and an empty cache folder."""

    def write(version="1", status=0):
        path = tmp_path / "compiler"
        path.write_text(COMPILER.format(version=version, status=status), encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path

    return write


def test_the_library_is_compiled_once_for_each_compiler(compiler):
    folder = compiler()
    first = build.built()
    assert first == build.built() and first.read_text() == "made\n"
    compiler(version="2")
    assert build.built() != first
    assert (folder / "calls").read_text().split() == ["call"] * 2
    assert len(list((folder / "cache" / "gradlab").iterdir())) == 2, "no drafts are left"


def test_a_compiler_that_fails_a_broken_library_and_a_folder_that_is_none_are_told(compiler, caplog, monkeypatch):
    folder = compiler(status=3)
    with caplog.at_level(logging.WARNING):
        assert build.targets.__wrapped__() is None
        assert not list((folder / "cache" / "gradlab").iterdir())
        compiler()
        assert build.targets.__wrapped__() is None, "what the compiler wrote is no library"
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        assert build.targets.__wrapped__() is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all("in the dense way" in text for text in said)
    assert "failed" in said[0] and "sparse_products-" in said[1] and "/dev/null" in said[2]
