# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A learning rule of your own
#
# Three ways to write one, from one line to a class with its own mathematics; how to prove that it is what you think
# it is; and how it compares. Nothing is registered: a rule of yours goes wherever gradlab's own rules go. The page
# `docs/add_a_rule.md` has the same topic at full length.

# %%
# %matplotlib inline
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax

import gradlab as gl
from gradlab import plan, rules
from gradlab.testing import case, check_rule, twins

matplotlib.rcParams.update(gl.report.style.settings("nature"))

# %% [markdown]
# A small network and a task to try rules on: three classes of random manifolds, told by spike counts.

# %%
task = gl.tasks.Randman(classes=3, units=20, steps=25, manifold_dim=1, alpha=2.0, code="rate")
layers = [nn.Dense(30), gl.LIF(beta=0.9), nn.Dense(20), gl.LIF(beta=0.9), nn.Dense(3), gl.LI(beta=0.9)]
net, loss = gl.connect(layers), gl.PerStep(optax.softmax_cross_entropy)
batch = task.batch(jax.random.key(0), 32)
params = net.init(jax.random.key(1), batch.inputs)

# %% [markdown]
# ## One line: a point of the space of local rules
#
# Most published rules differ in a few choices, and a `LocalRule` names them: how a layer remembers its inputs
# (`trace`), who tells it that it erred (`signal`), how long a spike goes on to matter in the layer that reads it
# (`memory`), and more. Here is e-prop with random feedback, but with the reset, which e-prop leaves out. Its name is
# what it is made of.

# %%
direct = rules.LocalRule(rules.JacobianTrace(), rules.DirectFeedback("random", seed=7), rules.ReadoutFilter())
gl.compare(net, params, batch, loss, [direct], jax.random.key(2))

# %% [markdown]
# ## A few lines: a rule with a name
#
# A question to answer with a rule: how far does one get if a hidden layer remembers *nothing* of its own, and only
# takes into account how long the next layer remembers its spikes? A class with `compose` gives such a rule its name,
# its hyper-parameters and its documentation. The docstring is part of the rule: equation, what it drops, when it is
# exact.


# %%
@dataclasses.dataclass(frozen=True)
class MemoryOnly(rules.ComposedRule):
    """Spatial credit, and the next layer's leaky memory; no memory of the layer's own.

    (1) grad = sum_t L_t R_t,   R_t = kappa R_{t-1} + D_t x_t,   kappa the next layer's leak; output layer: OSTL

    Drops: the hidden neurons' own state and reset, and the next layer's reset.
    Exact when: one hidden layer of neurons without memory (leak 0, no reset), below an output without reset.

    Args:
        reset: whether the output layer's own trace follows the reset.
    """

    reference: ClassVar[str] = "an example of gradlab's notebooks, doi none"
    reset: bool = True

    def compose(self):
        output = rules.JacobianTrace("nothing" if self.reset else "reset")
        return rules.LocalRule(
            rules.NoTrace(), rules.SpatialBackprop(), rules.NextLayer(), output=rules.LocalRule(output)
        )


# %% [markdown]
# ## Prove it
#
# `check_rule` gives the checks that gradlab's own rules pass: shapes, masks, one compilation, the form that runs
# forwards in time equal to the fast one to 1e-12, no peeking at the future, and more. The strongest one is yours to
# give: an **oracle**, the same gradient computed in a way that shares no code with the rule. The docstring says when
# the rule is exact, so there plain automatic differentiation (`twins.bptt`) must give the same numbers.
#
# Two checks are left out. "specification": a study stores rules as text and finds their classes by import, which it
# cannot do for a class that stands in a notebook; in a file, it passes. "eager equals compiled" is left out for its
# time only: it runs every step without compilation.


# %%
def prove(rule, **settings):
    with jax.enable_x64(True):
        for check in check_rule(rule, exempt=("specification", "eager equals compiled"), **settings):
            check()  # raises an error that says what differs, and by how much
            print(rule.name, "passes:", check)


def small(**hidden):
    layers = [nn.Dense(5), gl.LIF(**hidden), nn.Dense(3), gl.LIF(beta=0.8, reset="none")]
    return case(gl.connect(layers), n_steps=6)


with jax.enable_x64(True):
    exact, inexact = small(beta=0.0, reset="none"), small(beta=0.8)

prove(MemoryOnly(), on=exact, oracle=twins.bptt)

# %% [markdown]
# A check that cannot fail proves nothing. So look where the rule should *not* be exact: hidden neurons with memory.

# %%
with jax.enable_x64(True):
    (oracle,) = [check for check in check_rule(MemoryOnly(), on=inexact, oracle=twins.bptt) if str(check) == "oracle"]
    try:
        oracle()
    except AssertionError as error:
        print("as it should be:", error)

# %% [markdown]
# ## A class with mathematics of its own
#
# Simultaneous perturbation (Spall 1992) needs no derivative at all: move all weights a little along random signs,
# there and back, and see how the loss changes. It feels the true loss of the spiking network, jumps included, where
# all other rules follow the surrogate's slope. One method is enough, `gradient`; the tape holds what the network did.


# %%
@dataclasses.dataclass(frozen=True)
class Perturbation(rules.Rule):
    """Simultaneous perturbation: differences of the loss along random signs v.

    (1) grad = mean over n draws of [L(theta + distance v) - L(theta - distance v)] / (2 distance) v

    Drops: nothing on purpose; it is the gradient of the loss averaged over steps of this size, plus noise.
    Exact when: never; the noise falls as 1 / n.
    """

    reference: ClassVar[str] = "Spall (1992), IEEE Transactions on Automatic Control 37(3), doi 10.1109/9.119632"
    n: int = 1
    distance: float = 0.01

    def gradient(self, net, params, tape, state, key):
        def loss(p):
            return tape.loss(plan.run(net, p, tape.batch.inputs)[1][-1].output, tape.batch)

        def add(total, key):
            leaves, tree = jax.tree.flatten(params)
            keys = jax.random.split(key, len(leaves))
            signs = [jax.random.rademacher(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
            v = jax.tree.unflatten(tree, signs)
            there = jax.tree.map(lambda w, s: w + self.distance * s, params, v)
            back = jax.tree.map(lambda w, s: w - self.distance * s, params, v)
            slope = (loss(there) - loss(back)) / (2 * self.distance)
            return jax.tree.map(lambda t, s: t + slope * s / self.n, total, v), None

        zero = jax.tree.map(jnp.zeros_like, params)
        return rules.Estimate(jax.lax.scan(add, zero, jax.random.split(key, self.n))[0], state)


# %%
with jax.enable_x64(True):
    smooth = case(gl.connect([nn.Dense(5), gl.LIF(beta=0.8), nn.Dense(3), gl.LI(beta=0.8)]), n_steps=6)
prove(Perturbation(n=2, distance=0.1), on=smooth)

# %% [markdown]
# ## Use them
#
# Compare them like any rule, beside published ones.

# %%
compared = [rules.OTPE(), rules.OTTT(), rules.SLTT(), MemoryOnly(), Perturbation(n=40)]
gl.compare(net, params, batch, loss, compared, jax.random.key(2)).plot("cosine").get_figure()

# %% [markdown]
# In the hidden layers SLTT remembers nothing and OTPE has both kinds of memory; OTTT has the layer's own,
# `MemoryOnly` the next layer's. Which of the two comes closer to OTPE tells which memory matters here.
#
# The perturbation's low cosine may be noise or bias. `estimator_noise` tells them apart, over batches and draws: the
# rule's noise would vanish in a mean over many directions, its bias would not. (Bias here includes the difference
# between the true loss, which the perturbation feels, and the surrogate, which BPTT follows.)

# %%
noise = gl.analysis.estimator_noise(
    net, params, task, loss, [Perturbation(n=40)], jax.random.key(3), draws=4, n_batches=6, size=32
)
noise.plot().get_figure()

# %% [markdown]
# And train with a rule of your own. With `update="step"` it learns online, inside the sequence: any composed rule
# can, because its form that runs forwards in time comes for free.

# %%
adamax = gl.Optimizer("adamax", learning_rate=1e-3)
gl.train(net, task, loss, MemoryOnly(), adamax, steps=40, batch_size=32, update="step", seeds=(0, 1))
