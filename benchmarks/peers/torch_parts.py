"""What the peers on PyTorch share: tensors of the case, the loss, and one gradient per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.serve import Case, Program


def linears(case: Case, scale: float = 1.0) -> list[nn.Linear]:
    """The case's layers, their weights multiplied by `scale`."""
    layers = []
    for kernel, bias in zip(case.kernels, case.biases, strict=True):
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T * scale))
            layer.bias.copy_(torch.from_numpy(bias * scale))
        layers.append(layer)
    return layers


def program(
    case: Case,
    layers: Sequence[nn.Linear],
    forward: Callable[[Tensor], list[Tensor]],
    version: str,
    note: str = "",
    scale: float = 1.0,
) -> Program:
    """One gradient per run; `forward` gives the spikes [time, batch, units] of every layer.

    The loss is the mean over steps and samples of the cross-entropy of the output spikes.
    """
    inputs = torch.from_numpy(case.inputs)
    labels = torch.from_numpy(case.labels).long().repeat(case.inputs.shape[0])
    parameters = [p for layer in layers for p in layer.parameters()]

    def run() -> Any:
        output = forward(inputs)[-1]
        loss = nn.functional.cross_entropy(output.flatten(0, 1), labels)
        return torch.autograd.grad(loss, parameters)

    def look() -> tuple[list[float], list[Any]]:
        with torch.no_grad():
            rates = [float(spikes.mean()) for spikes in forward(inputs)]
        return rates, [scale * grad.numpy().T for grad in run()[::2]]

    return Program(run, version, look, note)
