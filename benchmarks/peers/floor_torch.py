"""The matrix products alone through PyTorch, of all steps and samples at once."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.serve import Case, Program, serve


def build(case: Case, variant: str) -> Program:
    """Forward, back through all layers but the first, and the weights' gradients."""
    inputs = [torch.randn(case.rows, a) for a, _ in case.sizes]
    weights = [torch.randn(size) for size in case.sizes]
    errors = [torch.randn(case.rows, b) for _, b in case.sizes]

    def run() -> Any:
        forward = [torch.mm(x, w) for x, w in zip(inputs, weights, strict=True)]
        back = [torch.mm(e, w.T) for e, w in zip(errors[1:], weights[1:], strict=True)]
        gradients = [torch.mm(x.T, e) for x, e in zip(inputs, errors, strict=True)]
        return forward, back, gradients

    return Program(run, f"torch {torch.__version__}")


if __name__ == "__main__":
    serve(build)
