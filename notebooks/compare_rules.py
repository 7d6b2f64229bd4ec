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
# # Compare learning rules on your own network
#
# You have a spiking network and data. Which learning rule gives it a gradient close to that of backpropagation
# through time (BPTT), where do the others go wrong, why, and does it matter? This notebook goes through these
# questions in this order, in less than a minute on a laptop. All numbers come out of the cells: change the network
# and run it again.
#
# gradlab draws without `pyplot`, so that nothing appears twice: a figure is shown by ending a cell with
# `....get_figure()`, and the first line below is what makes Jupyter show it. The last line sets the fonts and the
# width of one journal column.

# %%
# %matplotlib inline
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax

import gradlab as gl

matplotlib.rcParams.update(gl.report.style.settings("nature"))

# %% [markdown]
# ## Data and network
#
# A batch is `gl.Batch(inputs, targets)`, inputs in the order **[time, sample, unit]**. Arrays of your own work,
# NumPy's too. To train, gradlab asks for a function from a random key and a size to a batch. Here: two groups of
# inputs burst one after the other, and the class says which group came first. To know that still after the second
# burst, one must remember for 15 steps.


# %%
def order(key, size, steps=40, units=20, pause=15):
    which, when, noise = jax.random.split(key, 3)
    label = jax.random.bernoulli(which, shape=(size, 1)).astype(int)
    second = (jnp.arange(units) >= units // 2) != label  # [sample, unit]: bursts after the pause
    begin = jax.random.randint(when, (size, 1), 2, 10) + pause * second
    now = jnp.arange(steps)[:, None, None]
    rate = jnp.where((now >= begin) & (now < begin + 6), 0.5, 0.02)
    return gl.Batch(jax.random.bernoulli(noise, rate).astype(jnp.float32), jax.nn.one_hot(label[:, 0], 2))


batch = order(jax.random.key(0), 32)
net = gl.connect(
    [nn.Dense(40), gl.LIF(beta=0.9), nn.Dense(30), gl.LIF(beta=0.9), nn.Dense(2), gl.LI(beta=0.9)],
    links={1: [1]},  # layer 1 also hears its own spikes of the step before
)
params = net.init(jax.random.key(1), batch.inputs)
loss = gl.PerStep(optax.softmax_cross_entropy)

# %% [markdown]
# Any Flax Linen module that treats each sample by itself can stand where `nn.Dense` stands. Look at the network's
# health before anything else: a layer that never fires has no gradient to compare.

# %%
gl.evaluate(net, params, batch, loss)

# %% [markdown]
# ## Where do the rules differ?
#
# `gl.compare` computes all gradients on one forward pass: same parameters, same spikes, same batch. An untrained
# network is a special case, so we train it a little with BPTT first. (A rule that cannot treat a network refuses, in
# words that say what to use instead; `skip_unsupported=True` goes on without it and keeps the words in `refusals`.)

# %%
rules = [gl.rules.OSTL(), gl.rules.OTPE(), gl.rules.OTTT(), gl.rules.SLTT(), gl.rules.EProp(feedback="random")]
key = jax.random.key(2)  # for rules that draw random numbers
optimizer = gl.Optimizer("adamax", learning_rate=5e-3)
runs = {"BPTT": gl.train(net, order, loss, gl.rules.BPTT(), optimizer, steps=60, batch_size=32, seeds=(0, 1))}
trained = runs["BPTT"].params_of(0)
found = gl.compare(net, trained, batch, loss, rules, key)
found.plot("cosine").get_figure()

# %% [markdown]
# Read a row as: how much of BPTT's direction does this rule find in each layer? Then do not stop there. **A cosine of
# 1 does not mean a right gradient**: one that is ten times too long has it too. The length is another metric.

# %%
found.plot("norm_ratio").get_figure()

# %% [markdown]
# Everything is in one tidy frame: one row per rule, layer (or single parameter) and metric.
#
# | metric | says | at best |
# |---|---|---|
# | `cosine`, `angle` | direction | 1, 0 degrees |
# | `norm_ratio` | length over BPTT's | 1 |
# | `relative_error` | length of the difference over BPTT's length; 1 is as wrong as no gradient at all | 0 |
# | `optimal_scale_error` | what of that no learning rate could mend | 0 |
# | `sign_agreement` | share of weights pushed to the right side, among those that count (`sign_coverage`) | 1 |
#
# "network" puts all weights into one vector: the layer with the longest gradient decides it. Look at single layers.

# %%
frame = found.to_frame()
wanted = ["cosine", "norm_ratio", "relative_error", "optimal_scale_error", "sign_agreement"]
frame[(frame["layer"] == "layer_0") & frame["metric"].isin(wanted)].pivot(
    index="rule", columns="metric", values="value"
)

# %% [markdown]
# ## What is undefined says so
#
# A silent layer has no direction. gradlab then writes no number but a sentence, in the column `flag`. Here we silence
# the network on purpose. Filter on `flag` before you average anything.

# %%
silent = gl.compare(net, jax.tree.map(jnp.zeros_like, params), batch, loss, rules, key).to_frame()
undefined = silent[(silent["flag"] != "") & ~silent["layer"].str.contains("/")]  # without single parameters
undefined.drop_duplicates("layer").set_index("layer")["flag"].to_dict()

# %% [markdown]
# ## Why does a rule differ?
#
# A local rule leaves out some paths by which a weight reaches the loss. `attribute` puts them back, one by one and in
# every combination. The ladder begins with the rule and ends with BPTT; the step that gains most names the path that
# is missed most. (What a step gains depends on the order of the steps; `kind="shapley"` is the mean over all orders.)

# %%
why = gl.analysis.attribute(gl.rules.OTTT(), net, trained, batch, loss)
why.plot("cosine", layer="layer_0").get_figure()

# %% [markdown]
# The lag profile asks about time: how much of the gradient does a rule owe to weights that acted `lag` steps before
# the error? The sum over lags, in the legend, is the share of BPTT's gradient that the rule contains. A rule without
# memory has credit at lag 0 only. If BPTT's own credit lies there too, this task needs no more.

# %%
lags = gl.analysis.lag_profile(net, trained, batch, loss, rules[:4], key)
lags.plot(layer="layer_0").get_figure()

# %% [markdown]
# ## Does it matter?
#
# Training feels only how far the loss falls. `descent_ratios` takes a step of the same length along each gradient and
# compares the fall with BPTT's: 1 is as good, below 0 the loss rises. Dotted lines are what the gradients promise for
# very short steps. Where not even BPTT's own step lowers the loss (crosses), the step is too long to say anything.
# Hollow points are the step that the optimizer would make, at its own length.

# %%
lengths = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # relative to the norm of all weights
descent = gl.analysis.descent_ratios(net, trained, batch, loss, rules, key, lengths, optimizer)
descent.plot().get_figure()

# %% [markdown]
# And in the end: train with the rules, from the same initial weights and on the same batches, and compare. Two seeds
# are enough for a first look, never for a claim; `reading_a_study.ipynb` shows how to do it properly. Compare with
# the first figure: a rule that goes astray in the lower layers may still learn, because the read-out does much of the
# work.

# %%
for rule in (gl.rules.SLTT(), gl.rules.EProp(feedback="random")):
    runs[rule.name] = gl.train(net, order, loss, rule, optimizer, steps=60, batch_size=32, seeds=(0, 1))
test = order(jax.random.key(99), 256)
for name, run in runs.items():
    print(name, [gl.evaluate(net, run.params_of(i), test, loss)["accuracy"] for i in (0, 1)])

# %% [markdown]
# What to take along: a rule may point far from BPTT and still train well, and the other way round. Report direction,
# length and descent together, per layer, on several seeds, and what was undefined.
