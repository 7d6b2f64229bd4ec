"""snnTorch: `Leaky`, one product of all steps per layer, then a loop over time."""

from __future__ import annotations

import importlib.metadata

import snntorch
import torch
from snntorch import surrogate
from torch import Tensor

from benchmarks.peers.serve import Case, Program, serve
from benchmarks.peers.torch_parts import linears, program


def build(case: Case, variant: str) -> Program:
    """`layers`: each layer over all steps at once; `steps`: all layers step by step, as in the tutorials."""
    layers = linears(case)
    slope = surrogate.fast_sigmoid(slope=case.slope)
    neurons = [snntorch.Leaky(beta=case.beta, spike_grad=slope, reset_mechanism="subtract") for _ in layers]

    def by_layer(x: Tensor) -> list[Tensor]:
        found = []
        for layer, neuron in zip(layers, neurons, strict=True):
            membrane, spikes = neuron.reset_mem(), []
            for current in layer(x):
                spike, membrane = neuron(current, membrane)
                spikes.append(spike)
            x = torch.stack(spikes)
            found.append(x)
        return found

    def by_step(x: Tensor) -> list[Tensor]:
        membranes = [neuron.reset_mem() for neuron in neurons]
        spikes: list[list[Tensor]] = [[] for _ in layers]
        for now in x:
            for i, (layer, neuron) in enumerate(zip(layers, neurons, strict=True)):
                now, membranes[i] = neuron(layer(now), membranes[i])
                spikes[i].append(now)
        return [torch.stack(each) for each in spikes]

    forward = by_layer if variant == "layers" else by_step
    note = "the reset acts in the next step, without gradient (its default)"
    return program(case, layers, forward, importlib.metadata.version("snntorch"), note)


if __name__ == "__main__":
    serve(build)
