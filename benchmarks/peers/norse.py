"""Norse: the LIF neuron without a synaptic current, lifted over time."""

from __future__ import annotations

import importlib.metadata

import torch
from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters, lif_box_feed_forward_step
from norse.torch.functional.lift import lift
from norse.torch.functional.reset import reset_subtract
from torch import Tensor

from benchmarks.peers.serve import Case, Program, serve
from benchmarks.peers.torch_parts import linears, program


def build(case: Case, variant: str) -> Program:
    """One variant, "layers": each layer over all steps at once.

    Its neuron takes dt / tau (current - v), so the weights are divided by dt / tau = 1 - beta.
    """
    step = 1e-3
    share = 1 - case.beta
    layers = linears(case, 1 / share)
    parameters = LIFBoxParameters(tau_mem_inv=torch.as_tensor(share / step), reset_method=reset_subtract)
    lifted = lift(lif_box_feed_forward_step, parameters)

    def forward(x: Tensor) -> list[Tensor]:
        found = []
        for layer in layers:
            current = layer(x)
            x, _ = lifted(current, state=LIFBoxFeedForwardState(v=torch.zeros_like(current[0])))
            found.append(x)
        return found

    note = "its SuperSpike slope takes no factor: 1 / (1 + |x|)^2"
    return program(case, layers, forward, importlib.metadata.version("norse"), note, 1 / share)


if __name__ == "__main__":
    serve(build)
