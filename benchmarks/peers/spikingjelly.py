"""SpikingJelly: `LIFNode` in multi-step mode."""

from __future__ import annotations

import importlib.metadata

from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from benchmarks.peers.serve import Case, Program, serve
from benchmarks.peers.torch_parts import linears, program


def build(case: Case, variant: str) -> Program:
    """One variant, "layers": each layer over all steps at once."""
    layers = linears(case)
    tau = 1 / (1 - case.beta)
    settings = {"tau": tau, "decay_input": False, "v_reset": None, "step_mode": "m"}
    neurons = nn.ModuleList(
        neuron.LIFNode(surrogate_function=surrogate.SuperSpike(alpha=1.0), **settings) for _ in layers
    )

    def forward(x: Tensor) -> list[Tensor]:
        functional.reset_net(neurons)
        found = []
        for layer, cell in zip(layers, neurons, strict=True):
            x = cell(layer(x))
            found.append(x)
        return found

    note = "its SuperSpike slope takes no factor: 1 / (1 + |x|)^2"
    return program(case, layers, forward, importlib.metadata.version("spikingjelly"), note)


if __name__ == "__main__":
    serve(build)
