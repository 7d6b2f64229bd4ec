"""braintrace: the LIF neuron of its ecosystem, BPTT through `for_loop`, and its own D-RTRL."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import brainpy.state
import brainstate
import braintools
import braintrace
import brainunit as u
import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.serve import Case, Program, serve


class Layers(brainstate.nn.Module):
    """Dense layers and neurons in turn; one call is one step."""

    def __init__(self, case: Case):
        super().__init__()
        slope = braintools.surrogate.InvSquareGrad(alpha=case.slope)
        self.dense, self.neurons = [], []
        for kernel, bias in zip(case.kernels, case.biases, strict=True):
            layer = braintrace.nn.Linear(*kernel.shape)
            layer.weight.value = {"weight": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
            self.dense.append(layer)
            # v = beta v + (1 - beta) R I: with R = 1 / (1 - beta) the current enters with weight one.
            tau, resistance = -1.0 / math.log(case.beta) * u.ms, 1 / (1 - case.beta) * u.ohm
            self.neurons.append(brainpy.state.LIF(kernel.shape[1], R=resistance, tau=tau, spk_fun=slope))

    def update(self, x: Any) -> Any:
        for layer, neuron in zip(self.dense, self.neurons, strict=True):
            x = neuron(layer(x) * u.mA)
        return x


def build(case: Case, variant: str) -> Program:
    """`BPTT`; `D_RTRL`, step by step; `D_RTRL_window`, its closed form for windows of 25 steps."""
    brainstate.environ.set(dt=1.0 * u.ms)
    model = Layers(case)
    compiled = brainstate.transform.jit(
        backpropagation(case, model) if variant == "BPTT" else online(case, model, variant)
    )

    def rates() -> list[float]:
        def step(x: Any) -> list[Any]:
            found = []
            for layer, neuron in zip(model.dense, model.neurons, strict=True):
                x = neuron(layer(x) * u.mA)
                found.append(x.mean())
            return found

        brainstate.nn.reset_all_states(model, batch_size=case.inputs.shape[1])
        return [float(rate.mean()) for rate in brainstate.transform.for_loop(step, jnp.asarray(case.inputs))]

    def look() -> tuple[list[float], list[Any]]:
        grads = [value["weight"] for value in compiled().values()]
        if [grad.shape for grad in grads] != [kernel.shape for kernel in case.kernels]:
            raise RuntimeError("the gradients come in another order than the layers")
        return rates(), grads

    return Program(lambda: jax.block_until_ready(compiled()), importlib.metadata.version("braintrace"), look)


def error(case: Case, output: Any) -> Any:
    """Cross-entropy of each sample, and of each step if the outputs have them."""
    labels = jnp.broadcast_to(jnp.asarray(case.labels), output.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(output, labels)


def backpropagation(case: Case, model: Layers) -> Callable[[], Any]:
    """The gradient by `grad` through `for_loop`, the BPTT of its ecosystem."""
    batch = case.inputs.shape[1]
    brainstate.nn.init_all_states(model, batch_size=batch)
    weights = model.states(brainstate.ParamState)
    inputs = jnp.asarray(case.inputs)

    def loss() -> Any:
        return error(case, brainstate.transform.for_loop(model.update, inputs)).mean()

    def gradient() -> Any:
        brainstate.nn.reset_all_states(model, batch_size=batch)
        return brainstate.transform.grad(loss, weights)()

    return gradient


def online(case: Case, model: Layers, variant: str) -> Callable[[], Any]:
    """The gradient of D-RTRL, accumulated over the sequence."""
    inputs = jnp.asarray(case.inputs)
    steps, batch = inputs.shape[:2]
    size = next(k for k in (25, 10, 6, 4, 3, 2, 1) if steps % k == 0) if variant == "D_RTRL_window" else None
    method = "single-step" if size is None else "multi-step"
    learner: Any = braintrace.compile(model, braintrace.D_RTRL, inputs[0], batch_size=batch, vjp_method=method)

    def step_error(x: Any) -> Any:
        return error(case, learner(x if size is None else braintrace.MultiStepData(x))).mean(-1)

    def gradient() -> Any:
        brainstate.nn.reset_all_states(model, batch_size=batch)
        learner.reset_state(batch_size=batch)
        return learner.etrace_grad(inputs, step_fn=step_error, chunk_size=size)

    return gradient


if __name__ == "__main__":
    serve(build)
