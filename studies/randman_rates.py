"""Five online rules against BPTT on rate-coded random manifolds, after Summe et al. (arXiv 2311.16151)."""

import flax.linen as nn
import optax

import gradlab as gl
from gradlab import rules


def network(width: int) -> gl.Network:
    # The leak of the published experiments is sigmoid(3).
    neuron = gl.LIF(beta=0.9525741268224334, reset="subtract", surrogate=gl.FastSigmoid(slope=25.0))
    dense = [nn.Dense(units, kernel_init=gl.Initializer("lecun_normal")) for units in (width, width, 10)]
    return gl.connect([module for connection in dense for module in (connection, neuron)])


RULES = (rules.BPTT(), rules.OSTL(), rules.OTTT(), rules.OTPE(), rules.ApproximateOTPE(), rules.SLTT())
SMALL = {"networks": {"lif-16": network(16)}, "trained": RULES[:2], "iterations": 6, "probes": 3, "batch_size": 16}
PAPER = {"networks": {"lif-512": network(512)}, "seeds": (0, 1, 2, 3), "iterations": 5000, "probes": 51}

STUDY = gl.Study(
    name="randman_rates",
    title="Five online learning rules against BPTT on rate-coded random manifolds",
    task=gl.tasks.Randman(classes=10, units=50, steps=50, manifold_dim=3, alpha=1.0, code="rate"),
    networks={"lif-128": network(128)},
    loss=gl.PerStep(optax.softmax_cross_entropy, time="mean"),
    reference=rules.BPTT(),
    compared=RULES,
    trained=RULES,
    spot_checks=(gl.SpotCheck(rules.RTRL(), samples=2),),
    optimizer=gl.Optimizer("adamax", learning_rate=1e-3),
    seeds=(0, 1, 2),
    iterations=300,
    batch_size=128,
    probes=21,
    test_size=1024,
    landscape=gl.LandscapeSpec(points=31, planes=("pca", "random")),
    profiles={"smoke": {**SMALL, "landscape": gl.LandscapeSpec(points=5, samples=16)}, "paper": PAPER},
)
