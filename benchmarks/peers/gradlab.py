"""gradlab itself, in a process of its own like every peer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import gradlab as gl
from benchmarks.peers.serve import Case, Program, serve

RULES = {"BPTT": gl.rules.BPTT(), "OSTL": gl.rules.OSTL()}
DENSE = {"sparse": {"dot_general": gl.SparseProducts()}}


def build(case: Case, variant: str) -> Program:
    """A variant is the name of a rule; "BPTT, sparse" with `gl.SparseProducts`; "OSTL, streaming" by traces forwards in
    time, as an online learner computes it.
    """
    name, _, way = variant.partition(", ")
    rule = RULES[name]
    neuron = gl.LIF(beta=case.beta, surrogate=gl.FastSigmoid(case.slope))
    net = gl.connect([m for _, units in case.sizes for m in (nn.Dense(units, **DENSE.get(way, {})), neuron)])
    loss = gl.PerStep(optax.softmax_cross_entropy)
    data = gl.Batch(jnp.asarray(case.inputs), jax.nn.one_hot(case.labels, case.sizes[-1][1]))
    params: dict[str, Any] = dict(net.init(jax.random.key(0), data.inputs))
    for name, kernel, bias in zip(net.layer_names, case.kernels, case.biases, strict=True):
        own = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        params[name] = {link: own for link in params[name]}

    def gradient(params: Any, batch: gl.Batch) -> Any:
        if way == "streaming":
            return rule.stream(net, params, gl.record(net, params, batch, loss), (), jax.random.key(3)).grad
        return gl.gradients(net, params, batch, loss, [rule], jax.random.key(3))[rule.name]

    compiled = jax.jit(gradient).lower(params, data).compile()

    def look() -> tuple[list[float], list[Any]]:
        rates = gl.evaluate(net, params, data, loss)["firing_rate"]
        grads = compiled(params, data)
        kernels = [next(iter(grads[name].values()))["kernel"] for name in net.layer_names]
        return [rates[name] for name in net.layer_names], kernels

    return Program(lambda: jax.block_until_ready(compiled(params, data)), gl.__version__, look)


if __name__ == "__main__":
    serve(build)
