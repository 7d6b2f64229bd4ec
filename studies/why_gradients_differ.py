"""Why gradients differ and whether it matters: every diagnostic, on a deep and on a recurrent adaptive network."""

import flax.linen as nn
import optax

import gradlab as gl
from gradlab import rules
from gradlab.study.diagnostic_kinds import KINDS

SPIKE = {"reset": "subtract", "surrogate": gl.FastSigmoid(slope=25.0)}
# One spike per input unit is little: wide initial weights keep the recurrent layer firing on some 6 % of its steps.
WIDE = {"scale": 16.0, "mode": "fan_in", "distribution": "normal"}


def networks(width: int) -> dict[str, gl.Network]:
    dense = [nn.Dense(units, kernel_init=gl.Initializer("lecun_normal")) for units in (width, width, 10)]
    deep = gl.connect([module for connection in dense for module in (connection, gl.LIF(beta=0.95, **SPIKE))])
    adaptive = gl.ALIF(beta=0.9, adaptation_decay=0.97, adaptation_strength=0.1, **SPIKE)
    wide = nn.Dense(width, kernel_init=gl.Initializer("variance_scaling", **WIDE))
    recurrent = gl.connect([wide, adaptive, nn.Dense(10), gl.LI(beta=0.95)], links={0: [0]})
    return {"deep": deep, "recurrent": recurrent}


SMALL = {"networks": networks(12), "iterations": 4, "batch_size": 8, "seeds": (0,), "test_size": 16}

STUDY = gl.Study(
    name="why_gradients_differ",
    title="Why gradients differ, and does it matter? Rate code in a deep network, time code in a recurrent one",
    task={
        "deep": gl.tasks.Randman(classes=10, units=50, steps=50, manifold_dim=3, alpha=1.0, code="rate"),
        "recurrent": gl.tasks.Randman(classes=10, units=50, steps=50, manifold_dim=2, alpha=2.0, code="time"),
    },
    networks=networks(100),
    loss=gl.PerStep(optax.softmax_cross_entropy, time="mean"),
    reference=rules.BPTT(),
    compared=(rules.BPTT(), rules.OSTL(), rules.OTTT(), rules.OTPE(), rules.SLTT(), rules.EProp("random")),
    trained=(rules.BPTT(), rules.OTTT(), rules.OTPE(), rules.SLTT(), rules.EProp("random")),
    optimizer=gl.Optimizer("adamax", learning_rate=2e-3),
    seeds=(0, 1, 2, 3, 4),
    iterations=300,
    batch_size=64,
    probes=11,
    landscape=gl.LandscapeSpec(points=31, planes=("pca", "random")),
    diagnostics=tuple(KINDS),
    profiles={"smoke": {**SMALL, "landscape": None}},
)
