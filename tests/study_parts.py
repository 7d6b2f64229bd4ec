"""A tiny study, and functions that fail on purpose, where worker processes can import them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import flax.linen as nn
import optax

import gradlab as gl
from gradlab.study import LandscapeSpec, SpotCheck, Study


def tiny(**changes) -> Study:
    """A study that takes seconds: 6 inputs, 5 hidden LIF units, 3 classes, 10 time steps."""
    dense = [nn.Dense(units, kernel_init=gl.Initializer("lecun_normal")) for units in (5, 3)]
    fields = {
        "name": "tiny",
        "task": gl.tasks.Randman(classes=3, units=6, steps=10, manifold_dim=1, alpha=2.0, code="rate"),
        "networks": {"lif-5": gl.connect([dense[0], gl.LIF(beta=0.9), dense[1], gl.LIF(beta=0.9)])},
        "loss": gl.PerStep(optax.softmax_cross_entropy),
        "reference": gl.rules.BPTT(),
        "compared": (gl.rules.SLTT(), gl.rules.ApproximateOTPE(), gl.rules.BPTT(), gl.rules.OSTL()),
        "trained": (gl.rules.BPTT(), gl.rules.SLTT()),
        "optimizer": gl.Optimizer("adamax", learning_rate=1e-2),
        "seeds": (0, 1),
        "iterations": 6,
        "batch_size": 8,
        "probes": 4,
        "test_size": 32,
        "spot_checks": (SpotCheck(gl.rules.RTRL(), samples=2),),
        "landscape": LandscapeSpec(points=3, samples=8, planes=("pca", "random")),
        "profiles": {"smoke": {"iterations": 2, "probes": 2}},
    }
    return Study(**{**fields, **changes})


def killed_once(marker: str, answer: str) -> str:
    """End this process as `kill -9` does, the first time; answer the second time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


def fails(message: str) -> str:
    """Fail."""
    raise RuntimeError(message)


def writes(path: str) -> str:
    """Write a file."""
    Path(path).write_text("done")
    return path
