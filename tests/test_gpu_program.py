"""The benchmark for graphics cards in tiny sizes, and the kernel that runs a layer's neurons over all time steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, differ, living, neuron_loop, trains

import gradlab as gl
from gradlab import fused, rules

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu
import gpu_fused
import gpu_timing

LOSS = gl.PerStep(optax.softmax_cross_entropy)
NEURONS = (
    gl.LIF(beta=0.8),
    gl.LIF(beta=0.7, reset="zero", trainable=("beta", "threshold"), surrogate=gl.Arctan()),
    gl.ALIF(beta=0.8, threshold=0.8, surrogate=gl.MultiGaussian()),
    gl.LeakyRate(),
)
SHAPE = (6, 4, 8)


def one_layer(neuron):
    """A layer of 8 units, parameters, currents over 6 steps for 4 samples, and errors on its outputs and last state."""
    net = gl.connect([nn.Dense(8), neuron])
    keys = jax.random.split(jax.random.key(0), 3)
    current, signal = 1.2 * jax.random.normal(keys[0], SHAPE), jax.random.normal(keys[1], SHAPE)
    cotangent = tuple(jnp.full(SHAPE[1:], 0.3 + k) for k in range(len(neuron.states)))
    return net, net.init(keys[2], jnp.zeros((2, 4, 3))), current, signal, cotangent


def rest(neuron):
    return tuple(jnp.zeros(SHAPE[1:]) for _ in neuron.states)


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: f"{type(n).__name__}-{len(getattr(n, 'trainable', ()))}")
def test_kernel_is_the_equations_and_its_way_back_their_derivative(neuron):
    net, params, current, signal, cotangent = one_layer(neuron)
    end, record = fused.layer(net, params, 0, rest(neuron), current, interpret=True)
    states, outputs = neuron_loop(neuron, current)
    assert 0.02 < np.abs(outputs).mean() < 0.9, "the layer is alive"
    close((record.output, end), (outputs, states[-1]), 1e-5)
    close(
        record.state,
        tuple(np.stack([np.zeros(SHAPE[1:]), *(s[k] for s in states[:-1])]) for k in range(len(end))),
        1e-5,
    )

    def scan(start, current):
        after, s = jax.lax.scan(lambda h, i: net.neuron_step(params, 0, h, i), start, current)
        return after, s

    wanted = jax.vjp(scan, rest(neuron), current)[1]((cotangent, signal))
    found = fused.backward(net, params, 0, record, cotangent, signal, interpret=True)
    close(found, wanted, 1e-5)
    assert differ(fused.backward(net, params, 0, record, rest(neuron), signal, interpret=True), wanted)


def test_without_a_graphics_card_the_scan_runs_and_gives_the_same():
    net, params, current, signal, cotangent = one_layer(gl.LIF(beta=0.8))
    start = rest(gl.LIF())
    found = jax.jit(lambda: fused.layer(net, params, 0, start, current))()
    close(found, fused.layer(net, params, 0, start, current, interpret=True), 1e-6)
    back = jax.jit(lambda: fused.backward(net, params, 0, found[1], cotangent, signal))()
    close(back, fused.backward(net, params, 0, found[1], cotangent, signal, interpret=True), 1e-6)


@pytest.mark.parametrize(
    ("neuron", "shape", "reason"),
    [
        (gl.LIF(beta=(0.8,) * 8), SHAPE, "beta differ from unit to unit"),
        (gl.LIF(), (6, 3, 8), "no multiple of 32"),
        (nn.GRUCell(8), SHAPE, "a Flax cell"),
    ],
)
def test_what_cannot_run_in_one_kernel_runs_in_the_scan(neuron, shape, reason):
    net = gl.connect([nn.Dense(8), neuron])
    params = net.init(jax.random.key(0), jnp.zeros((2, shape[1], 3)))
    current = jax.random.normal(jax.random.key(1), shape)
    start = net.initial_state(params, jnp.zeros((2, shape[1], 3))).states[0]
    assert reason in fused.refusal(net, params, 0, current)
    if isinstance(neuron, gl.Neuron):
        with pytest.raises(ValueError, match=reason):
            fused.layer(net, params, 0, start, current, interpret=True)
        _, record = fused.layer(net, params, 0, start, current)
        close(record.output, neuron_loop(neuron, current)[1], 1e-5)
    assert fused.refusal(*one_layer(gl.LIF())[:2], 0, jnp.zeros(SHAPE)) is None


def lowered_for_cuda(function):
    """The program that XLA would get for a graphics card; none is needed. Later versions of JAX ask which card."""
    if jax.__version__.startswith("0.10."):
        return jax.jit(function).trace().lower(lowering_platforms=("cuda",)).as_text()
    card = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        return jax.jit(function).trace().lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("neuron", "kernel"), [(gl.ALIF(), True), (gl.ALIF(beta=(0.8,) * 8), False)])
def test_on_a_graphics_card_it_is_a_kernel_where_it_can_be(neuron, kernel):
    net, params, current, signal, cotangent = one_layer(neuron)
    record = fused.layer(net, params, 0, rest(neuron), current)[1]
    programs = (
        lambda: fused.layer(net, params, 0, rest(neuron), current),
        lambda: fused.backward(net, params, 0, record, cotangent, signal),
    )
    for program in programs:
        text = lowered_for_cuda(program)
        assert ("triton" in text, "stablehlo.while" in text) == (kernel, not kernel)


def test_gradient_with_kernels_is_that_of_the_tape():
    net = gl.connect([m for n in (8, 8, 4) for m in (nn.Dense(n), gl.LIF(beta=0.8))])
    inputs = trains((10, 4, 6))
    batch = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(4), 4))
    params = living(net, inputs)
    found = jax.jit(lambda p: gpu_fused.fused_gradient(net, LOSS, p, batch))(params)
    grads = gl.gradients(net, params, batch, LOSS, [rules.BPTT(), rules.OSTL()], jax.random.key(0))
    close(found, grads["BPTT"], 1e-5)
    assert differ(found, grads["OSTL"])


def run_toy(tmp_path, *sections):
    results = gpu.main(["--toy", "--json", str(tmp_path / "gpu.json"), "--sections", *sections])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["sections"]) == list(results["sections"]) == list(sections)
    assert written["device"].startswith("cpu") and written["toy"] is True
    for name, section in written["sections"].items():
        assert "error" not in section and "skipped" not in section, f"{name}: {section}"
        for row in section.get("rows", []):
            assert "error" not in row and "skipped" not in row, f"{name}: {row}"
        numbers = [x for x in jax.tree.leaves(section) if isinstance(x, float)]
        assert numbers and all(map(math.isfinite, numbers))
    return written["sections"]


def test_toy_run_is_complete(tmp_path):
    sections = run_toy(tmp_path, "neurons")
    (row,) = sections["neurons"]["rows"]
    for way in ("forward", "backward"):
        assert row[way]["difference"] < 1e-5 and row[way]["failures"] == {}
        assert row[way]["times"]["scan, 1 at once"]["over scan, 1 at once"] == 1.0


@pytest.mark.slow
def test_whole_toy_run_is_complete(tmp_path):
    sections = run_toy(tmp_path, *gpu.SHARES)
    (row,) = sections["products"]["rows"]
    errors = {name: found["error"] for name, found in row["forward"].items()}
    assert errors["3 parts"] < 2 * max(errors["highest"], 2.0**-25) < errors["2 parts"] < errors["1 parts"]
    (row,) = sections["w1"]["rows"]
    assert {"tape", "fused", "autodiff", "scan", "tape, 3 parts"} <= set(row["times"]["floor default"])
    own = {way: found["BPTT"]["to itself in float32"] for way, found in sections["precision"]["cosines"].items()}
    assert own["float32"] == pytest.approx(1, abs=1e-12) and 1 - own["3 parts"] < 1e-6 < 1 - own["1 parts"]


def test_what_fails_or_takes_too_long_is_written_down_and_the_rest_runs():
    def build(case):
        if case == "fails":
            raise RuntimeError("no such kernel")
        return {"value": case}

    assert gpu_timing.cases(gpu_timing.Clock(100.0, 0.1), ["fails", 2], build) == [
        {"case": "fails", "error": "RuntimeError: no such kernel"},
        {"case": 2, "value": 2},
    ]
    late = gpu_timing.Clock(-1.0, 0.1)
    assert gpu_timing.cases(late, [1], build) == [{"case": 1, "skipped": "time"}]
    failures = {}
    assert gpu_timing.buildable(late, {"a": lambda: None}, failures) == {} and failures == {"a": "skipped: time"}


def test_a_section_that_fails_leaves_its_error_and_the_others_their_results(tmp_path, monkeypatch):
    import gpu_sections

    def broken(clock, toy):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu_sections.SECTIONS, "w2", broken)
    monkeypatch.setitem(gpu_sections.SECTIONS, "w3", lambda clock, toy: {"value": 1})
    results = gpu.run(["w2", "w3"], True, tmp_path / "gpu.json", 1.0)["sections"]
    assert "out of memory" in results["w2"]["error"] and results["w3"]["value"] == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"] == results
