"""Spyx: `spyx.nn.run` over Flax NNX modules, compiled by `jax.jit`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax
import spyx
import spyx.nn
from flax import nnx

from benchmarks.peers.serve import Case, Program, serve


class Layers(nnx.Module):
    """Dense layers and neurons in turn."""

    def __init__(self, case: Case):
        rngs = nnx.Rngs(0)
        slope = spyx.axn.superspike(case.slope)
        dense, neurons = [], []
        for kernel, bias in zip(case.kernels, case.biases, strict=True):
            layer = nnx.Linear(*kernel.shape, rngs=rngs)
            layer.kernel = nnx.Param(jnp.asarray(kernel))
            layer.bias = nnx.Param(jnp.asarray(bias))
            dense.append(layer)
            neurons.append(spyx.nn.LIF((kernel.shape[1],), beta=case.beta, activation=slope, rngs=rngs))
        self.dense, self.neurons = nnx.List(dense), nnx.List(neurons)

    def by_layer(self, x: Any) -> list[Any]:
        """Each layer over all steps at once."""
        found = []
        for layer, neuron in zip(self.dense, self.neurons, strict=True):
            x, _ = spyx.nn.run(neuron, layer(x))
            found.append(x)
        return found

    def by_step(self, x: Any) -> list[Any]:
        """All layers step by step, as in the documentation; the output's spikes only."""
        pairs = zip(self.dense, self.neurons, strict=True)
        return [spyx.nn.run(spyx.nn.Sequential(*[part for pair in pairs for part in pair]), x)[0]]


def build(case: Case, variant: str) -> Program:
    """`steps`: all layers step by step, as in the documentation; `layers`: each layer over all steps at once."""
    definition, weights, rest = nnx.split(
        Layers(case), lambda path, value: isinstance(value, nnx.Param) and "dense" in path, ...
    )
    inputs = jnp.asarray(case.inputs)
    targets = jnp.broadcast_to(jnp.asarray(case.labels), inputs.shape[:2])

    def spikes(weights: Any, x: Any) -> list[Any]:
        model = nnx.merge(definition, weights, rest)
        return model.by_layer(x) if variant == "layers" else model.by_step(x)

    def loss(weights: Any, x: Any) -> Any:
        output = spikes(weights, x)[-1]
        return optax.softmax_cross_entropy_with_integer_labels(output, targets).mean()

    compiled = jax.jit(jax.grad(loss)).lower(weights, inputs).compile()

    def look() -> tuple[list[float], list[Any]]:
        model = nnx.merge(definition, weights, rest)
        grads = compiled(weights, inputs)
        kernels = [grads["dense"][i]["kernel"][...] for i in range(len(case.kernels))]
        return [float(each.mean()) for each in model.by_layer(inputs)], kernels

    note = "a spike is sent one step after the membrane crosses the threshold"
    run = lambda: jax.block_until_ready(compiled(weights, inputs))  # noqa: E731
    return Program(run, importlib.metadata.version("spyx"), look, note)


if __name__ == "__main__":
    serve(build)
