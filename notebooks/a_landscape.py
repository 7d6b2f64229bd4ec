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
# # A loss landscape, and how not to read it
#
# Two learning rules train the same network from the same start. Where do they go, do they end in the same place, and
# what does the loss look like around it? A picture of a landscape shows two directions out of thousands, so every
# picture here comes with the numbers that say how far to believe it.

# %%
# %matplotlib inline
import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax

import gradlab as gl
from gradlab.analysis.landscape import landscape
from gradlab.report import plots

matplotlib.rcParams.update(gl.report.style.settings("nature"))

# %% [markdown]
# ## Two runs from one start
#
# With the same seed, two rules get the same initial weights and the same batches. `Run.trajectory` holds the
# parameters at the probes, with the axes [probes, seeds, ...]; we take the only seed.

# %%
task = gl.tasks.Randman(classes=4, units=20, steps=25, manifold_dim=1, alpha=2.0, code="rate")
net = gl.connect([nn.Dense(30), gl.LIF(beta=0.9), nn.Dense(20), gl.LIF(beta=0.9), nn.Dense(4), gl.LI(beta=0.9)])
loss = gl.PerStep(optax.softmax_cross_entropy)
adamax = gl.Optimizer("adamax", learning_rate=5e-3)

chosen = (gl.rules.BPTT(), gl.rules.EProp(feedback="random"))
paths, ends = {}, {}
for rule in chosen:
    run = gl.train(net, task, loss, rule, adamax, steps=120, batch_size=32, probe_every=10)
    paths[rule.name] = jax.tree.map(lambda leaf: leaf[:, 0], run.trajectory)
    ends[rule.name] = run.params_of(0)

# %% [markdown]
# ## The plane of the paths
#
# The loss is measured on one batch that training did not see. The plane goes through the end of BPTT's path, along
# the two principal directions of both paths; paths are projected on it by least squares.

# %%
test = task.batch(jax.random.key(1000), 64)
loss_of_params = gl.analysis.loss_function(net, test, loss)
plane = gl.analysis.pca_plane(paths, origin=ends["BPTT"])
seen = landscape(loss_of_params, plane, paths, points=21)
seen.plot().get_figure()

# %% [markdown]
# First question to any such picture: **how much of the paths does it show?** The legend gives the share of each
# path's squared displacement that lies in the plane, the axes the shares of the two directions. A point is filled
# with the *true* loss there: where its colour is not that of the ground around it, the path runs above or below the
# plane, and the ground is not where training was. The next two figures say the same in numbers.

# %%
plots.path_losses(seen, label="test loss").get_figure()

# %%
frame = seen.to_frame()
plots.out_of_plane(frame).get_figure()

# %% [markdown]
# Missing values carry a reason in `flag`, as everywhere in gradlab: a point outside the grid has no ground below it.

# %%
frame.groupby("path").agg(least_captured=("captured", "min"), farthest=("distance", "max"), flags=("flag", "unique"))

# %% [markdown]
# ## A random plane
#
# Principal directions are chosen to show the paths. A random plane shows the surroundings of one point instead. Its
# directions are scaled filter by filter to the weights (Li et al. 2018), so that one unit is "as large as the weights
# themselves". Among so many dimensions, two random ones capture next to nothing of a path: compare the shares.

# %%
around = gl.analysis.random_plane(ends["BPTT"], jax.random.key(5))
scenery = landscape(loss_of_params, around, paths, points=15)
scenery.plot().get_figure()

# %% [markdown]
# ## From one solution to the other
#
# On the straight line between two solutions (0 and 1), a hill says that they lie in different valleys. No hill on
# this line does not say that there is one valley only: it is one line.

# %%
bptt, other = ends
line = gl.analysis.line_between(ends[bptt], ends[other], names=(bptt, other))
fresh = task.batch(jax.random.key(1001), 64)
losses = {"one test batch": loss_of_params, "another": gl.analysis.loss_function(net, fresh, loss)}
profile = gl.analysis.line_profile(losses, line, np.linspace(-0.5, 1.5, 31))
profile.plot().get_figure()

# %% [markdown]
# ## Curvature
#
# A spike is a jump, so the loss of a spiking network has no second derivative in the usual sense; what software gives
# is that of the surrogate. gradlab measures how far to trust it: `mismatch` is the error with which it foretells how
# the gradient changes over a short step. **Above 1 it is worse than saying "not at all"**, and then the curvature
# along a direction is better read from gradients on both sides, `measured_curvature`.

# %%
grads = gl.gradients(net, ends[bptt], test, loss, list(chosen), jax.random.key(0))
curvature = gl.analysis.curvature_along(loss_of_params, ends[bptt], grads)
curvature.to_frame().query("layer == 'network'")

# %%
curvature.plot().get_figure()

# %% [markdown]
# The largest eigenvalues say how sharp the point is, with the same reservation; `residual` is how exactly each was
# found.

# %%
gl.analysis.top_eigenvalues(loss_of_params, ends[bptt], k=3).to_frame()

# %% [markdown]
# ## Keep it
#
# A landscape is stored without pickle, and drawn again from the file: `seen.save("landscape.npz")`, then
# `Landscape.load("landscape.npz").plot()`; `plot(view="surface")` draws it in three dimensions. A study does all this
# by itself, with `landscape=gl.LandscapeSpec()`.
