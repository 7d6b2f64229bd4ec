"""The matrix products alone through JAX (`common.floor`), in a process of its own."""

from __future__ import annotations

import jax

from benchmarks import common
from benchmarks.peers.serve import Case, Program, serve


def build(case: Case, variant: str) -> Program:
    """Forward, back through all layers but the first, and the weights' gradients."""
    action = common.floor(case.sizes, case.rows)
    return Program(action, f"jax {jax.__version__}")


if __name__ == "__main__":
    serve(build)
