"""BPTT in less memory: the same gradient from fewer kept steps, and the bytes that were promised."""

import dataclasses
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, differ, living, stack, trains

import gradlab as gl
from gradlab import plan
from gradlab.engine import shapes_of
from gradlab.rules import BPTT, checkpointing
from gradlab.rules.checkpointing import Schedule
from gradlab.tape import record

LOSS = gl.PerStep(optax.softmax_cross_entropy)


def setting(net, n_steps, dtype=jnp.float64):
    x = trains((n_steps, 2, 5), dtype=dtype)
    mask = jnp.ones((n_steps, 2), dtype).at[-7:, 1].set(0)
    return living(net, x), gl.Batch(x, jax.nn.one_hot(jnp.arange(2), 3, dtype=x.dtype), mask)


NETWORKS = {
    "feedforward": lambda: stack(),
    "feedback and skip": lambda: stack({0: [0, 2], 2: [0]}),
    "trained constants": lambda: gl.connect(
        [nn.Dense(6), gl.LIF(trainable=("beta",)), nn.Dense(3), gl.CurrentLIF(threshold=0.5)]
    ),
}
SCHEDULES = [Schedule(0, 1, (17,)), Schedule(0, 2, (20,)), Schedule(0, 3, (30, 7)), Schedule(0, 4, (30, 10, 3))]


@pytest.mark.parametrize(
    "kind", ["feedback and skip", "trained constants", pytest.param("feedforward", marks=pytest.mark.slow)]
)
def test_every_schedule_gives_the_gradient(x64, kind):
    net = NETWORKS[kind]()
    params, batch = setting(net, 53)  # 17 steps a chunk, and 2 left over

    @jax.jit
    def run(params):
        tape = record(net, params, batch, LOSS)
        whole = BPTT().gradient(net, params, tape, (), jax.random.key(0)).grad
        moved = jax.tree.map(lambda leaf: leaf.at[1].mul(1.5), tape.chunk_starts)
        wrong = checkpointing.backward(net, params, dataclasses.replace(tape, chunk_starts=moved), SCHEDULES[0])
        return whole, [checkpointing.backward(net, params, tape, chosen) for chosen in SCHEDULES], wrong

    whole, found, wrong = run(params)
    for gradient in found:
        close(gradient, whole, 1e-12)
    assert differ(wrong, whole)  # a segment that begins in another state is seen


class Narrow(gl.LIF):
    """A neuron whose output takes half the bytes of its input."""

    @nn.compact
    def __call__(self, carry, inputs):
        state, s = super().__call__(carry, inputs)
        return state, s.astype(jnp.float32)


def test_a_tape_in_other_chunks_than_its_outputs_suggest(x64):
    # 20 samples of 300 units: 21 steps fit a chunk at 8 bytes, 25 at 4.
    x = trains((200, 20, 5), dtype=jnp.float64)
    net = gl.connect([nn.Dense(300), Narrow(beta=0.8, threshold=0.3), nn.Dense(3), gl.LI()])
    params = net.init(jax.random.key(0), x)
    batch = gl.Batch(x, jax.nn.one_hot(jnp.arange(20) % 3, 3, dtype=x.dtype))
    shapes = shapes_of(net, params, batch, LOSS)
    chosen = BPTT(memory=10**7).schedule(shapes)
    assert (chosen.runs_again, chosen.segments) == (1, (20,))

    @jax.jit
    def run(params):
        tape = record(net, params, batch, LOSS)
        assert tape.chunk == 20 and plan.chunk_of(tape.slices.layers) == 25
        odd = Schedule(0, 1, (25,))  # a schedule of other chunks than the tape's
        whole = BPTT().gradient(net, params, tape, (), jax.random.key(0)).grad
        return whole, [checkpointing.backward(net, params, tape, c) for c in (chosen, odd)]

    whole, found = run(params)
    for gradient in found:
        close(gradient, whole, 1e-5)


def test_the_budget_chooses_the_cheapest_schedule_that_fits(x64):
    net = stack()
    params, batch = setting(net, 400)
    shapes = shapes_of(net, params, batch, LOSS)
    per_step = checkpointing.record_bytes(shapes)
    # One array for the LIF and for the read-out, two for the ALIF; 8 bytes, 2 samples.
    assert per_step == checkpointing.state_bytes(shapes) == 8 * 2 * (6 + 2 * 4 + 3)
    # In units of it: all of 400; 16 states of 25 steps and one such chunk; the square root; two and three levels.
    expected = {
        400: (400, 0, ()),
        41: (41, 1, (25,)),
        40: (40, 2, (20,)),
        33: (33, 3, (100, 25)),
        20: (19, 4, (100, 25, 7)),
    }
    for limit, (kept, again, segments) in expected.items():
        found = BPTT(memory=limit * per_step).schedule(shapes)
        assert found == Schedule(kept * per_step, again, segments)
    assert "give more memory" in BPTT(memory=100).supports(net, shapes, LOSS)
    with pytest.raises(ValueError, match="give more memory"):
        gl.gradients(net, params, batch, LOSS, [BPTT(memory="0.2KB")], jax.random.key(0))


def test_a_budget_is_a_size_or_a_number_of_bytes():
    sizes = {"1GiB": 2**30, "500MB": 5 * 10**8, "1.5 KiB": 1536, 77: 77, None: None}
    assert [checkpointing.bytes_of("BPTT", size) for size in sizes] == list(sizes.values())
    for size in ("1", "GiB", "1.2.3GB", "-1GB", "0B", 0, -5, True, 1.5, "1gib"):
        with pytest.raises(ValueError, match="give a size such as"):
            BPTT(memory=size)
    with pytest.raises(ValueError, match="only the form"):
        BPTT(form="autodiff", memory="1GiB")
    assert BPTT(memory="1GiB").name == "BPTT(memory=1GiB)"


def test_it_trains_in_windows_and_compares_as_bptt_does():
    net = stack()
    params, batch = setting(net, 60, jnp.float32)
    limited = BPTT(memory=4000)
    table = gl.compare(net, params, batch, LOSS, [limited], jax.random.key(0)).to_frame()
    errors = table.query("metric == 'relative_error' and rule == @limited.name").value
    assert len(errors) and errors.max() < 1e-5
    runs = [
        gl.train(
            net,
            lambda key, size: batch,
            LOSS,
            rule,
            optax.sgd(0.1),
            steps=2,
            batch_size=2,
            seeds=[0],
            update=30,
            params=params,
        )
        for rule in (BPTT(), limited)
    ]
    close(*(run.params for run in runs), 1e-5)


_MEMORY = """
import jax, jax.numpy as jnp, flax.linen as nn, optax
import gradlab as gl
from gradlab.engine import shapes_of
loss = gl.PerStep(optax.softmax_cross_entropy)
x = jnp.zeros((1000, 8, 64))
data = gl.Batch(x, jax.nn.one_hot(jnp.arange(8), 10))
net = gl.connect([nn.Dense(64), gl.LIF(), nn.Dense(64), gl.LIF(), nn.Dense(10), gl.LI()])
params = net.init(jax.random.key(0), x)
for memory in (None, "1MiB", "300KiB"):
    rule = gl.rules.BPTT(memory=memory)
    run = jax.jit(lambda p, b: gl.gradients(net, p, b, loss, [rule], jax.random.key(0)))
    used = run.lower(params, data).compile().memory_analysis().temp_size_in_bytes
    print(used, rule.schedule(shapes_of(net, params, data, loss)).kept_bytes)
"""


def test_the_compiler_needs_what_the_schedule_predicts():
    found = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, env={"JAX_PLATFORMS": "cpu"}
    )
    rows = np.array([line.split() for line in found.stdout.splitlines()], float)
    used, kept = rows.T
    extra = used - kept
    # Beyond what is kept: one chunk's currents and errors, outputs and errors of the read-out, gradients.
    assert (extra > 0).all() and (extra < 1.6e6).all()
    assert kept[0] > 4e6 and used[1] < used[0] / 2 and kept[1] <= 2**20 and kept[2] <= 300 * 2**10
