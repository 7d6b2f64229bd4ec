"""Checkpoints: the same run goes on to the same bits; another run is refused, whatever hides the difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_parts import CLASSES, ONE_LAYER, TASK, Killed, fit, kill_at

import gradlab as gl
from gradlab.rules import FPTT, OSTL, SLTT


def same(a, b):
    """Two runs agree in every bit."""
    for x, y in zip(jax.tree.leaves((a.params, a.trajectory)), jax.tree.leaves((b.params, b.trajectory)), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.history["loss"], b.history["loss"])
    np.testing.assert_array_equal(a.probe_steps, b.probe_steps)


@pytest.mark.parametrize("update", ["sequence", "step"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, update):
    settings = {
        "steps": 7,
        "probe_every": 2,
        "update": update,
        "seeds": (0, 3),
        "optimizer": gl.Optimizer("adam", learning_rate=0.01),
    }
    whole = fit(FPTT(), **settings)
    file, seen = tmp_path / "deep" / "run.npz", []
    with pytest.raises(Killed):
        fit(FPTT(), checkpoint=file, on_probe=kill_at(4, seen), **settings)
    assert seen == [0, 2, 4] and [f.name for f in file.parent.iterdir()] == ["run.npz"]
    seen.clear()
    resumed = fit(FPTT(), checkpoint=file, on_probe=kill_at(None, seen), **settings)
    assert seen == [4, 6, 7]  # the probe that was not written is taken again, the written ones are not
    same(resumed, whole)
    assert resumed.probe_steps.tolist() == [0, 2, 4, 6, 7]
    # A finished run is only read.
    seen.clear()
    same(fit(FPTT(), checkpoint=file, on_probe=kill_at(None, seen), **settings), whole)
    assert seen == []


def scaled_net(scale):
    return gl.connect([nn.Dense(CLASSES), lambda x: scale * x, ONE_LAYER.neurons[0]])


def steep_net(scale):
    """Networks whose outputs are equal and whose gradients are not."""
    return gl.connect([nn.Dense(CLASSES), lambda x: x + scale * (x - jax.lax.stop_gradient(x)), ONE_LAYER.neurons[0]])


def scaled_loss(scale):
    return gl.PerStep(lambda outputs, targets: scale * optax.l2_loss(outputs, targets))


def turned(shift):
    """A task that a mean over the batch cannot tell from its neighbour: the inputs change places."""

    def task(key, size):
        batch = TASK.batch(key, size)
        return batch._replace(inputs=jnp.roll(batch.inputs, shift, axis=2))

    return task


@dataclasses.dataclass(frozen=True)
class Made:
    """A task with a function, which prints with its address in memory, and a field that no early batch shows."""

    function: Callable
    late: int = 0

    def batch(self, key, size):
        return self.function(key, size)


def spike_times(**fields):
    return gl.tasks.Randman(code="time", **({"classes": CLASSES, "units": 5, "steps": 6, "alpha": 2.0} | fields))


def rich(clip=90.0, boundary=300):
    """An optimizer that prints as functions and shows nothing of itself in the first iteration."""
    return optax.chain(optax.clip(clip), optax.sgd(optax.piecewise_constant_schedule(0.1, {boundary: 0.1})))


def noisy(seed):
    """It carries a random key, which NumPy cannot hold."""
    return optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(seed)), optax.sgd(0.1))


def warm(steps):
    return optax.sgd(optax.linear_schedule(0.0, 0.1, steps))


def saving(every, boundary):
    """The learning rate counts the saved-up updates, of which there is one in `every` iterations."""
    inner = optax.sgd(optax.piecewise_constant_schedule(0.1, {boundary: 0.1}))
    return optax.MultiSteps(inner, every).gradient_transformation()


START = {
    "rule": SLTT(),
    "net": scaled_net(1.0),
    "loss": scaled_loss(1.0),
    "optimizer": rich(),
    "steps": 400,
    "probe_every": 1,
}
LATE = START | {"optimizer": rich(boundary=60_000), "steps": 100_000}
TIMES = START | {"task": spike_times()}
WARM = START | {"optimizer": warm(200)}
NAMED = START | {"optimizer": gl.Optimizer("sgd", learning_rate=0.1, momentum=1e-30)}
# A run's settings, those of another run, and the part that must be named.
WRITTEN = {
    "manifold_seed": (TIMES, {"task": spike_times(manifold_seed=1)}, "task"),
    "alpha": (TIMES, {"task": spike_times(alpha=1.9)}, "task"),
    "task function": (START | {"task": turned(0)}, {"task": turned(1)}, "task"),
    "field": (START | {"task": Made(turned(0))}, {"task": Made(turned(0), late=1)}, "task"),
    "schedule": (START, {"optimizer": rich(boundary=301)}, "optimizer"),
    "late schedule": (LATE, {"optimizer": rich(boundary=60_200)}, "optimizer"),
    "warm-up": (WARM, {"optimizer": warm(201)}, "optimizer"),
    "clipping": (START, {"optimizer": rich(clip=91.0)}, "optimizer"),
    "noise": (START | {"optimizer": noisy(0)}, {"optimizer": noisy(1)}, "optimizer"),
    "saving up": (START | {"optimizer": saving(20, 5)}, {"optimizer": saving(20, 6)}, "optimizer"),
    "named": (NAMED, {"optimizer": gl.Optimizer("sgd", learning_rate=0.1, momentum=2e-30)}, "optimizer"),
    "neuron": (
        START,
        {"net": gl.connect([nn.Dense(CLASSES), lambda x: x, gl.LIF(beta=0.81, threshold=0.5, reset="zero")])},
        "network",
    ),
    "rule": (START, {"rule": OSTL()}, "learning rule"),
    "time of the loss": (START, {"loss": gl.PerStep(optax.l2_loss, time="sum")}, "loss"),
    "update": (START, {"update": "step"}, "settings"),
    "form": (START, {"form": "streaming"}, "settings"),
    "batch_size": (START, {"batch_size": 5}, "settings"),
    "seeds": (START, {"seeds": (0, 1)}, "settings"),
    "steps": (START, {"steps": 401}, "settings"),
    "probe_every": (START, {"probe_every": 2}, "settings"),
}
BEHAVIOUR = "results of an iteration"
HIDDEN = {
    "function in the network": (START, {"net": scaled_net(1.001)}, BEHAVIOUR),
    "function in the loss": (START, {"loss": scaled_loss(1.001)}, BEHAVIOUR),
    "function under a warm-up": (WARM | {"net": steep_net(0.0)}, {"net": steep_net(0.001)}, BEHAVIOUR),
}


def kill_always(seen):
    def on_probe(now, params):
        seen.append(now)
        raise Killed

    return on_probe


def refused(tmp_path, one, other):
    """The parts that are named when a run finds the checkpoint of another one, whose file must be kept."""
    file, seen = tmp_path / "run.npz", []
    with pytest.raises(Killed):
        fit(checkpoint=file, on_probe=kill_at(1, []), **one)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is of another run") as caught:
        fit(checkpoint=file, on_probe=kill_always(seen), **(one | other))
    assert str(file) in str(caught.value) and "give another file, or delete this one" in str(caught.value)
    assert seen == [] and file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["run.npz"]
    with pytest.raises(Killed):  # the run itself is not refused
        fit(checkpoint=file, on_probe=kill_at(1, seen), **one)
    assert seen == [1]
    return str(caught.value).split("another run: ")[1].split(" differ")[0].split(", ")


@pytest.mark.parametrize("name", WRITTEN)
def test_another_run_is_refused_by_what_it_is(tmp_path, monkeypatch, name):
    """Nothing is trained here: what an iteration does must not be needed to see the difference."""

    def compiled(plan, length):
        return lambda carry, keys, first, count: (carry, np.zeros((len(keys), count)))

    monkeypatch.setattr(gl.training, "_compiled", compiled)
    one, other, part = WRITTEN[name]
    found = refused(tmp_path, one, other)
    assert part in found
    assert "initial parameters" not in found or name in ("seeds", "neuron")


@pytest.mark.parametrize("name", HIDDEN)
def test_another_run_is_refused_by_what_it_does(tmp_path, name):
    one, other, part = HIDDEN[name]
    assert refused(tmp_path, one, other) == [part]


def test_a_run_rebuilt_from_its_functions_goes_on(tmp_path):
    """The negative control: every part is made anew, as in another process, where no function is the same object."""

    def run(**settings):
        return fit(
            SLTT(),
            net=scaled_net(1.5),
            task=Made(turned(1)),
            loss=scaled_loss(0.5),
            optimizer=optax.chain(rich(boundary=2), noisy(0)),
            probe_every=1,
            **settings,
        )

    with pytest.raises(Killed):
        run(checkpoint=tmp_path / "run.npz", on_probe=kill_at(2, []))
    seen = []
    same(run(checkpoint=tmp_path / "run.npz", on_probe=kill_at(None, seen)), run())
    assert seen == [2, 3]


def test_given_parameters_are_part_of_the_run(tmp_path):
    batch = TASK.batch(jax.random.key(0), 4)
    params = START["net"].init(jax.random.key(0), batch.inputs)
    settings = START | {"checkpoint": tmp_path / "run.npz", "steps": 1}
    fit(**settings, params=params)
    nudged = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3), params)
    with pytest.raises(ValueError, match="initial parameters"):
        fit(**settings, params=nudged)
    fit(**settings, params=params)


def _old(file):
    about = json.dumps({"fingerprint": "a text", "step": 1}).encode()
    with file.open("wb") as opened:
        np.savez(opened, about=np.frombuffer(about, np.uint8))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("my notes"),
        lambda file: np.savez(file, weights=np.ones(3)),
        lambda file: np.save(file.open("wb"), np.ones(3)),
        _old,
    ],
    ids=["empty", "text", "other arrays", "one array", "older"],
)
def test_a_file_that_is_no_checkpoint_is_kept(tmp_path, write):
    file = tmp_path / "run.npz"
    write(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"run.npz is no checkpoint of gradlab, or a damaged one.*give another file"):
        fit(**START, checkpoint=file)
    assert file.read_bytes() == before


def test_half_a_checkpoint_is_kept(tmp_path):
    file = tmp_path / "run.npz"
    fit(**(START | {"steps": 1}), checkpoint=file)
    half = file.read_bytes()[:-400]
    file.write_bytes(half)
    with pytest.raises(ValueError, match="or a damaged one"):
        fit(**(START | {"steps": 1}), checkpoint=file)
    assert file.read_bytes() == half
