"""Nothing is compiled twice: one compilation for each shape, in training, in comparisons and in studies."""

import collections
import contextlib
import logging
import re

import flax.linen as nn
import jax
import optax
from study_parts import tiny
from training_parts import LOSS, NET, SGD, TASK, Task

import gradlab as gl
from gradlab.study import cells


class _Count(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def emit(self, record):
        match = re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage())
        if match:
            self.found[match[1]] += 1


@contextlib.contextmanager
def counted():
    """How often each function is compiled, by JAX's own log."""
    handler, log = _Count(), logging.getLogger("jax")
    log.addHandler(handler)
    try:
        with jax.log_compiles():
            yield handler.found
    finally:
        log.removeHandler(handler)


def test_the_counter_counts():
    twice = jax.jit(lambda x: x + 1)
    with counted() as found:
        for value in (1.0, 2.0, 3):  # a float, a float, an integer: two types
            twice(value)
    assert sum(found.values()) == 2


def test_training_compiles_once_for_each_shape():
    def run(batch_size, seeds=(0,), steps=7):
        gl.train(NET, TASK, LOSS, gl.rules.OSTL(), SGD, steps=steps, batch_size=batch_size, seeds=seeds, probe_every=3)

    with counted() as found:
        run(4)  # 7 steps in stretches of 3, 3 and 1
        run(4)
        run(4, seeds=(5,), steps=30)
        assert found["_stretch"] == 1
        run(6)
        assert found["_stretch"] == 2
    with counted() as again:
        run(4, seeds=(7,))
        run(6, seeds=(8,))
    assert not again


def test_comparisons_compile_once_for_each_shape():
    rules = [gl.rules.OSTL(), gl.rules.OTPE()]
    with counted() as found:
        for seed, size in ((0, 4), (1, 4), (2, 6), (3, 6), (4, 4)):
            batch = Task().batch(jax.random.key(seed), size)
            gl.compare(NET, NET.init(jax.random.key(seed), batch.inputs), batch, LOSS, rules, jax.random.key(seed))
    assert found["_run_rules"] == found["_evaluate"] == 2


def test_a_study_compiles_once_for_each_network(tmp_path):
    def network(units):
        return gl.connect([nn.Dense(units), gl.LIF(beta=0.9), nn.Dense(3), gl.LIF(beta=0.9)])

    networks = {"narrow": network(4), "wide": network(7)}
    study = tiny(
        networks=networks,
        trained=(gl.rules.BPTT(),),
        compared=(gl.rules.SLTT(),),
        loss=gl.PerStep(optax.softmax_cross_entropy),
        spot_checks=(),
        landscape=None,
    ).with_profile("default")
    text = study.to_json()
    assert len(study.cells()) == 2 and len(study.seeds) == 2 and len(study.probe_steps) == 4
    with counted() as found:
        for cell in study.cells():
            cells.run_cell(text, cell.index, str(tmp_path / "first"))
    assert found["_stretch"] == found["_run_rules"] == 2
    with counted() as again:
        for cell in study.cells():
            cells.run_cell(text, cell.index, str(tmp_path / "second"))
    assert not again, again
