"""What the tests of training share: two small networks, a task, and one call of `gl.train`."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import gradlab as gl

T, INPUTS, CLASSES = 6, 5, 3
LOSS = gl.PerStep(optax.softmax_cross_entropy)
SQUARE = gl.PerStep(optax.l2_loss)
NET = gl.connect(
    [nn.Dense(6), gl.LIF(beta=0.8, threshold=0.6, surrogate=gl.FastSigmoid(4.0)), nn.Dense(CLASSES), gl.LI(0.9)]
)
ONE_LAYER = gl.connect(
    [nn.Dense(CLASSES), gl.LIF(beta=0.8, threshold=0.5, reset="zero", surrogate=gl.FastSigmoid(2.0))]
)
SGD = gl.Optimizer("sgd", learning_rate=0.1)
PLAIN = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True)
class Task:
    """Random spike trains whose rate tells the class; the masks have unequal lengths."""

    masked: bool = False

    def batch(self, key, size):
        label_key, spike_key = jax.random.split(key)
        labels = jax.random.randint(label_key, (size,), 0, CLASSES)
        rate = 0.2 + 0.5 * jax.nn.one_hot(labels, INPUTS)
        inputs = (jax.random.uniform(spike_key, (T, size, INPUTS)) < rate).astype(float)
        mask = (jnp.arange(T)[:, None] < T - jnp.arange(size)).astype(float) if self.masked else None
        return gl.Batch(inputs, jax.nn.one_hot(labels, CLASSES, dtype=inputs.dtype), mask)


TASK, MASKED = Task(), Task(masked=True)


def keys_of(seed):
    """The keys for the initial parameters and for the stream of batches of one seed."""
    return (jax.random.fold_in(jax.random.key(seed), k) for k in (0, 1))


def begun(net, task, seed, size):
    """Initial parameters and the first batches' keys, as a user who follows the documentation would make them."""
    first, stream = keys_of(seed)
    batches = [task.batch(jax.random.fold_in(stream, i), size) for i in range(4)]
    params = net.init(first, batches[0].inputs)
    return params, batches


def fit(rule, net=NET, task=TASK, loss=LOSS, optimizer=SGD, steps=3, batch_size=4, **settings):
    return gl.train(net, task, loss, rule, optimizer, steps=steps, batch_size=batch_size, **settings)


class Killed(Exception):
    pass


def kill_at(step, seen):
    def on_probe(now, params):
        seen.append(now)
        if now == step:
            raise Killed

    return on_probe
