"""The sections of `gpu.py`: each takes a clock and whether sizes are tiny, and returns what JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpu_fused import fused_gradient, neurons
from gpu_timing import Action, Clock, buildable, cases, ratios

import gradlab as gl
from gradlab import rules
from gradlab.spike_products import SpikeProducts

LOSS = gl.PerStep(optax.softmax_cross_entropy)
CLASSES = 10
TEN = (
    *(rules.BPTT(), rules.OSTL(), rules.OTTT(), rules.OTPE(), rules.ApproximateOTPE(), rules.SLTT()),
    *(rules.ESDRTRL(), rules.STLLR(), rules.DECOLLE(), rules.DirectFeedbackAlignment()),
)
DENSE = (((1,), (0,)), ((), ()))
PRESETS = tuple(p for p in jax.lax.DotAlgorithmPreset if p.name.startswith(("BF16", "TF32", "F32")))


def network(width: int, product: Any = None) -> gl.Network:
    """Three Dense layers with leaky integrate-and-fire neurons, the last one with 10 units."""
    layers = (nn.Dense(n, dot_general=product) for n in (width, width, CLASSES))
    return gl.connect([m for layer in layers for m in (layer, gl.LIF(beta=0.9))])


def case(width: int, steps: int, batch: int) -> tuple[gl.Network, Any, gl.Batch, dict[str, float]]:
    """The network, parameters under which layers fire on 3 to 20 % of steps, a batch of spikes, and the rates."""
    net = network(width)
    inputs = (jax.random.uniform(jax.random.key(0), (steps, batch, width)) < 0.1).astype(jnp.float32)
    data = gl.Batch(inputs, jax.nn.one_hot(jnp.arange(batch) % CLASSES, CLASSES))
    params = net.init(jax.random.key(1), inputs)
    few = gl.Batch(inputs[:, : min(batch, 32)], data.targets[: min(batch, 32)])
    rates: dict[str, float] = {}
    for layer in net.layer_names:
        for _ in range(12):
            rates = gl.evaluate(net, params, few, LOSS)["firing_rate"]
            if 0.05 <= rates[layer] <= 0.15:
                break
            factor = 1.25 if rates[layer] < 0.05 else 0.85
            params = {**params, layer: jax.tree.map(lambda leaf, f=factor: leaf * f, params[layer])}
    return net, params, data, rates


def floor(width: int, rows: int, dtype: Any, precision: str | None) -> Action:
    """The matrix products alone: forward, backward through all layers but the first, the weights' gradients."""
    sizes = [(width, width), (width, width), (width, CLASSES)]
    keys = iter(jax.random.split(jax.random.key(2), 9))
    inputs = [jax.random.normal(next(keys), (rows, a), dtype) for a, _ in sizes]
    weights = [jax.random.normal(next(keys), size, dtype) for size in sizes]
    errors = [jax.random.normal(next(keys), (rows, b), dtype) for _, b in sizes]
    dot = partial(jax.lax.dot, precision=precision, preferred_element_type=jnp.float32)

    @jax.jit
    def products(inputs: Any, weights: Any, errors: Any) -> Any:
        forward = [dot(x, w) for x, w in zip(inputs, weights, strict=True)]
        back = [dot(e, w.T) for e, w in zip(errors[1:], weights[1:], strict=True)]
        return forward, back, [dot(x.T, e) for x, e in zip(inputs, errors, strict=True)]

    return partial(products, inputs, weights, errors)


def scan_loss(net: gl.Network, params: Any, batch: gl.Batch) -> Any:
    """The loss of a plain scan over time steps."""

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state, _, outputs = net.step(params, state, x)
        return state, outputs[-1]

    return LOSS(jax.lax.scan(step, net.initial_state(params, batch.inputs), batch.inputs)[1], batch)


def compiled(function: Callable[..., Any], *arguments: Any, precision: str | None = None) -> tuple[Action, int | None]:
    """A compiled program with its arguments, and its temporary memory in bytes."""
    with jax.default_matmul_precision(precision):
        program = jax.jit(function).lower(*arguments).compile()
    analysis = program.memory_analysis()
    return partial(program, *arguments), None if analysis is None else analysis.temp_size_in_bytes


def gradient(net: gl.Network, *chosen: Any) -> Callable[[Any, gl.Batch], Any]:
    return lambda p, b: gl.gradients(net, p, b, LOSS, chosen, jax.random.key(3))


def w1(clock: Clock, toy: bool) -> dict[str, Any]:
    """One gradient against its floor, over widths and batches."""
    steps = 8 if toy else 500
    sizes = [(32, 4)] if toy else [(1024, 64), (128, 64), (4096, 64), (512, 256), (512, 1024), (2048, 64), (256, 64)]
    return {"steps": steps, "rows": cases(clock, sizes, lambda size: _w1_case(clock, *size, steps))}


def _w1_case(clock: Clock, width: int, batch: int, steps: int) -> dict[str, Any]:
    net, params, data, rates = case(width, steps, batch)
    bytes_of: dict[str, int | None] = {}

    def program(name: str, function: Any, precision: str | None = None) -> Callable[[], Action]:
        def build() -> Action:
            action, bytes_of[name] = compiled(function, params, data, precision=precision)
            return action

        return build

    rows = steps * batch
    functions = {
        "tape": gradient(net, rules.BPTT()),
        "OSTL": gradient(net, rules.OSTL()),
        "fused": partial(fused_gradient, net, LOSS),
        "autodiff": gradient(net, rules.BPTT(form="autodiff")),
        "scan": jax.grad(lambda p, b: scan_loss(net, p, b)),
        "tape, 1 part": gradient(network(width, SpikeProducts(1)), rules.BPTT()),
        "tape, 3 parts": gradient(network(width, SpikeProducts(3)), rules.BPTT()),
    }
    builders = {
        "floor default": partial(floor, width, rows, jnp.float32, None),
        "floor highest": partial(floor, width, rows, jnp.float32, "highest"),
        "floor bfloat16": partial(floor, width, rows, jnp.bfloat16, None),
        "tape highest": program("tape highest", functions["tape"], "highest"),
        **{name: program(name, function) for name, function in functions.items()},
    }
    failures: dict[str, str] = {}
    times = clock.times(buildable(clock, builders, failures))
    over = {base: ratios(times, base) for base in ("floor default", "floor highest") if base in times}
    return {"firing_rates": rates, "times": over, "temporary_bytes": bytes_of, "failures": failures}


def w2(clock: Clock, toy: bool) -> dict[str, Any]:
    """Each rule's gradient, forward pass included, over BPTT's."""
    width, steps, batch = (16, 6, 4) if toy else (256, 100, 128)
    net, params, data, _ = case(width, steps, batch)
    chosen = TEN[:3] if toy else TEN
    builders = {r.name: lambda r=r: compiled(gradient(net, r), params, data)[0] for r in chosen}
    builders["all on one tape"] = lambda: compiled(gradient(net, *chosen), params, data)[0]
    failures: dict[str, str] = {}
    times = clock.times(buildable(clock, builders, failures))
    return {"width": width, "steps": steps, "batch": batch, "times": ratios(times, "BPTT"), "failures": failures}


def precision(clock: Clock, toy: bool) -> dict[str, Any]:
    """Every rule's cosine to BPTT in float32, with each precision of the products."""
    width, steps, batch = (16, 6, 4) if toy else (512, 100, 64)
    net, params, data, rates = case(width, steps, batch)
    chosen = TEN[:2] if toy else TEN
    ways = {
        "float32": (net, "highest"),
        "default": (net, None),
        **{f"{parts} parts": (network(width, SpikeProducts(parts)), None) for parts in (1, 2, 3)},
    }
    found: dict[str, Any] = {}
    reference: dict[str, np.ndarray] = {}
    for way, (own, level) in ways.items():
        if clock.left < 0:
            found[way] = "skipped: time"
            continue
        grads = {r: flat(g) for r, g in compiled(gradient(own, *chosen), params, data, precision=level)[0]().items()}
        reference = reference or grads
        found[way] = {
            r: {"to BPTT in float32": cosine(g, reference["BPTT"]), "to itself in float32": cosine(g, reference[r])}
            for r, g in grads.items()
        }
    return {"width": width, "steps": steps, "batch": batch, "firing_rates": rates, "cosines": found}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else math.nan


def products(clock: Clock, toy: bool) -> dict[str, Any]:
    """Products of spikes: parts of bfloat16 against JAX's precisions, by time and by error against float64."""
    sizes = [(64, 32, 16)] if toy else [(32000, 1024, 1024), (32000, 4096, 4096), (32000, 256, 256)]
    return {
        "of": "cases are (rows, features, units); errors are relative, of the norm",
        "rows": cases(clock, sizes, lambda size: _products_case(clock, *size)),
    }


def _products_case(clock: Clock, rows: int, features: int, units: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = (jax.random.uniform(keys[0], (rows, features)) < 0.1).astype(jnp.float32)
    w, delta = jax.random.normal(keys[1], (features, units)), jax.random.normal(keys[2], (rows, units))
    levels = {"default": None, "highest": "highest"}
    levels |= {preset.name: preset for preset in PRESETS}
    ways = {n: partial(jax.lax.dot_general, dimension_numbers=DENSE, precision=p) for n, p in levels.items()}
    for parts in (1, 2, 3):
        ways[f"{parts} parts"] = partial(SpikeProducts(parts), dimension_numbers=DENSE)
        ways[f"{parts} parts, analog"] = partial(SpikeProducts(parts, exact_inputs=False), dimension_numbers=DENSE)
    few = min(rows, 64)
    exact = {
        "forward": np.asarray(x[:few], np.float64) @ np.asarray(w, np.float64),
        "weights": np.asarray(x.T[:few], np.float64) @ np.asarray(delta, np.float64),
        "inputs": np.asarray(delta[:few], np.float64) @ np.asarray(w, np.float64).T,
    }
    result: dict[str, Any] = {"failures": {}}
    for pull in exact:
        actions = {n: partial(jax.jit(partial(_one_product, way, pull)), x, w, delta) for n, way in ways.items()}
        failures: dict[str, str] = {}
        actions = buildable(clock, {n: (lambda a=a: a) for n, a in actions.items()}, failures)
        found = ratios(clock.times(actions), "default")
        for name, action in actions.items():
            difference = np.asarray(action()[:few], np.float64) - exact[pull]
            found[name]["error"] = float(np.linalg.norm(difference) / np.linalg.norm(exact[pull]))
        result[pull], result["failures"][pull] = found, failures
    return result


def _one_product(way: Any, pull: str, x: Any, w: Any, delta: Any) -> Any:
    if pull == "forward":
        return way(x, w)
    if pull == "weights":
        return jax.vjp(lambda w: way(x, w), w)[1](delta)[0]
    return jax.vjp(lambda x: way(x, w), x)[1](delta)[0]


def w3(clock: Clock, toy: bool) -> dict[str, Any]:
    """A loss surface: time of one point over that of one forward pass."""
    from gradlab.analysis import loss_function, random_plane
    from gradlab.analysis.landscape import surface

    width, steps, batch, points = (16, 6, 4, 3) if toy else (128, 100, 64, 31)
    net, params, data, _ = case(width, steps, batch)
    plane = random_plane(params, jax.random.key(5))
    loss, axis = loss_function(net, data, LOSS), np.linspace(-1, 1, points)
    forward = jax.jit(lambda p: loss(p))
    times = clock.times(
        {
            "forward": lambda: forward(params),
            "surface": lambda: surface(loss, plane, axis, axis).loss,
        }
    )
    found = ratios(times, "forward")
    found["surface"]["one point over forward"] = found["surface"]["over forward"] / points**2
    return {"width": width, "steps": steps, "batch": batch, "points": points**2, "times": found}


@dataclasses.dataclass(frozen=True)
class RandomSpikes:
    """A task of random spikes, drawn on the device: what is timed is the training."""

    steps: int
    width: int

    def batch(self, key: Any, size: int) -> gl.Batch:
        inputs = (jax.random.uniform(key, (self.steps, size, self.width)) < 0.1).astype(jnp.float32)
        return gl.Batch(inputs, jax.nn.one_hot(jnp.arange(size) % CLASSES, CLASSES))


def w4(clock: Clock, toy: bool) -> dict[str, Any]:
    """Iterations of training per second, and sequences, for one seed and for eight side by side."""
    width, steps, batch, iterations = (16, 6, 4, 2) if toy else (128, 100, 128, 50)
    optimizer = gl.Optimizer("adamax", learning_rate=1e-3)

    def training(rule: Any, seeds: Sequence[int]) -> Action:
        train = partial(gl.train, network(width), RandomSpikes(steps, width), LOSS, rule, optimizer)
        return lambda: train(steps=iterations, batch_size=batch, seeds=seeds, probe_every=iterations).params

    actions = {f"{r.name}, {n} seeds": training(r, range(n)) for r in (rules.BPTT(), rules.OSTL()) for n in (1, 8)}
    found = ratios(clock.times(actions), "BPTT, 1 seeds")
    for name, own in found.items():
        own["sequences per second"] = int(name.split()[1]) * iterations * batch / (own["ms"] / 1e3)
    return {"width": width, "steps": steps, "batch": batch, "iterations": iterations, "times": found}


SECTIONS: dict[str, Callable[[Clock, bool], dict[str, Any]]] = {
    "products": products,
    "neurons": neurons,
    "w1": w1,
    "w2": w2,
    "precision": precision,
    "w3": w3,
    "w4": w4,
}
