"""Batches over two devices: the numbers of one device, work and memory of half the samples each."""

import subprocess
import sys

import pytest

_CODE = """
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn, optax
import gradlab as gl
jax.config.update("jax_enable_x64", True)
steps, size, units = 60, 8, 12
net = gl.connect([nn.Dense(units), gl.LIF(beta=0.8, threshold=0.4), nn.Dense(10), gl.LI()], links={0: [0]})
loss = gl.PerStep(optax.softmax_cross_entropy)
random = np.random.default_rng(0)
x = jnp.asarray(random.uniform(size=(steps, size, 5)) < 0.3, float)
mask = jnp.ones((steps, size)).at[40:, 3].set(0)
batch = gl.Batch(x, jax.nn.one_hot(jnp.arange(size), 10, dtype=float), mask)
params = net.init(jax.random.key(0), x)
rate = gl.evaluate(net, params, batch, loss)["firing_rate"]["layer_0"]
assert 0.05 <= rate <= 0.6, rate
rules = [gl.rules.BPTT(), gl.rules.OSTL(own="full"), gl.rules.TBPTT(k=7)]

def run(batch):
    return gl.gradients(net, params, batch, loss, rules, jax.random.key(0))

def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(abs(np.asarray(x) - np.asarray(y)).max() / abs(np.asarray(y)).max()) for x, y in pairs)

spread = gl.shard(batch)
assert len(spread.inputs.addressable_shards) == 2
assert spread.inputs.addressable_shards[0].data.shape == (steps, size // 2, 5)
print(apart(run(spread), run(batch)))
# Half of the samples alone give another gradient.
print(apart(run(jax.tree.map(lambda a: a[:, :4] if a.ndim > 2 or a.shape == mask.shape else a[:4], batch)), run(batch)))
text = jax.jit(run).lower(spread).compile().as_text()
print(text.count("all-gather("), "all-reduce(" in text)

def task(key, size):
    bits = jax.random.uniform(key, (steps, size, 5)) < 0.3
    return gl.Batch(bits.astype(float), jax.nn.one_hot(jnp.arange(size), 10, dtype=float))

runs = [
    gl.train(net, t, loss, gl.rules.BPTT(), optax.sgd(0.1), steps=3, batch_size=size, params=params).params
    for t in (task, gl.Sharded(task))
]
print(apart(runs[1], runs[0]))
try:
    gl.shard(jax.tree.map(lambda a: a[:, :5] if a.ndim > 2 or a.shape == mask.shape else a[:5], batch))
except ValueError as error:
    print(error)
"""


pytestmark = pytest.mark.xdist_group("sharding")  # the process is started once


@pytest.fixture(scope="module")
def found():
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_two_devices_give_the_gradients_of_one(found):
    assert float(found[0]) < 1e-12
    assert float(found[1]) > 1e-2


def test_no_device_gathers_the_others_samples(found):
    assert found[2] == "0 True"


def test_training_on_two_devices_is_training_on_one(found):
    assert float(found[3]) < 1e-10


def test_unequal_shares_are_refused(found):
    assert found[4] == "5 samples cannot be shared equally by 2 devices: take a multiple of 2"
