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
# # Reading a study's results
#
# A study trains networks with several rules and seeds, compares all rules' gradients along the way, and stores
# everything. Usually it is a file, run with `gradlab study my_study.py`, and ends with a report. This notebook runs a
# tiny one, and shows how to get at the numbers behind the report: with as few seeds and updates as here, **its
# results mean nothing**.

# %%
# %matplotlib inline
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import matplotlib
import numpy as np
import optax

import gradlab as gl
from gradlab.analysis import similarity, statistics
from gradlab.report import plots, plots_statistics, style
from gradlab.study.runner import run_study
from gradlab.study.summary import load_results

matplotlib.rcParams.update(style.settings("nature"))

# %% [markdown]
# ## A study
#
# It says everything and computes nothing. A *profile* changes some of its fields: "smoke" is for trying out.

# %%
dense = [nn.Dense(units, kernel_init=gl.Initializer("lecun_normal")) for units in (24, 20, 4)]
neurons = [gl.LIF(beta=0.9), gl.LIF(beta=0.9), gl.LI(beta=0.9)]
net = gl.connect([module for pair in zip(dense, neurons, strict=True) for module in pair])

STUDY = gl.Study(
    name="tiny",
    task=gl.tasks.Randman(classes=4, units=20, steps=25, manifold_dim=1, alpha=2.0, code="rate"),
    networks={"lif-24": net},
    loss=gl.PerStep(optax.softmax_cross_entropy),
    reference=gl.rules.BPTT(),
    compared=(gl.rules.BPTT(), gl.rules.OTPE(), gl.rules.SLTT()),
    trained=(gl.rules.BPTT(), gl.rules.SLTT()),
    optimizer=gl.Optimizer("adamax", learning_rate=5e-3),
    seeds=(0, 1, 2, 3, 4),
    profiles={"smoke": {"iterations": 60, "probes": 4, "batch_size": 32, "test_size": 128}},
)
study = STUDY.with_profile("smoke")

# %% [markdown]
# `run_study` computes what is not stored yet, and writes tables, figures and the report. By default each cell (a
# network and the rule that it is trained with) has a process of its own; for a run of seconds, a thread of this
# process is faster.

# %%
kept = tempfile.TemporaryDirectory()
results, figures = Path(kept.name, "results"), Path(kept.name, "figures")
with ThreadPoolExecutor(1) as here:
    report = run_study(study, results, figures, executor=here)
for path in sorted((results / study.folder).rglob("*")):
    if path.is_file() and path.suffix != ".lock":
        print(f"{path.stat().st_size:9} bytes  {path.relative_to(results)}")

# %% [markdown]
# | file | holds |
# |---|---|
# | `report.html` | everything to look at, in one file that can be sent by mail |
# | `tables/` | the report's tables as CSV, Markdown and LaTeX; its figures are in the folder of figures |
# | `cells/<network>/<rule>/metrics.csv` | all numbers of a cell, one a line |
# | `arrays.npz` beside it | inner products of all pairs of gradients, final parameters, the first seed's path |
# | `manifest.json` beside it | versions, device, seeds, times |
# | `spec.json` | the study in full: `gradlab rerun spec.json` runs it again |
#
# ## The frame
#
# `load_results` reads it all. The frame has one row per number: `train_rule` is the rule that the network was trained
# with, `rule` the one whose gradient was measured there (empty for losses and accuracies).

# %%
found = load_results(study, results, figures)
frame = found.frame
frame.sample(5, random_state=0)

# %% [markdown]
# Look at the flags before anything else: which numbers are undefined, and why? (None here, if the table is empty.)

# %%
frame[frame["flag"] != ""].groupby(["metric", "layer", "flag"]).size()

# %% [markdown]
# ## Means and intervals over seeds
#
# `summarise` averages over seeds only. Its interval is Student's: honestly wide for few seeds. Undefined values are
# counted in `n_undefined`, never averaged. The mean of cosines is not the cosine of the mean gradient.

# %%
gradients = frame[(frame["train_rule"] == "BPTT") & frame["metric"].isin(["cosine", "norm_ratio"])]
summary = similarity.summarise(gradients)
summary.query("metric == 'cosine' and layer == 'layer_0' and step == 60")[["rule", "mean", "low", "high", "n"]]

# %%
plots.similarity_trace(summary, "cosine", layer="layer_0").get_figure()

# %% [markdown]
# Which of two rules is closer? Their intervals may overlap although one wins with every seed, because seeds differ
# more than rules do. Seeds are shared, so look at the difference, seed by seed.

# %%
paired = similarity.paired_difference(gradients[gradients["rule"] != "BPTT"], "SLTT")
paired.query("metric == 'cosine' and step == 60 and layer in ['network', 'layer_0']")[
    ["rule", "layer", "mean", "low", "high"]
]

# %% [markdown]
# ## Does it matter for training?
#
# `summary_table` has a row per rule trained with: the interquartile mean of its accuracy, the difference to the
# reference, and the probability that a run of it is better than one of the reference. **Read the column `warning`.**

# %%
table = gl.analysis.summary_table(frame, "BPTT", "accuracy")
table.set_index("rule")[["iqm", "low", "high", "difference", "difference_low", "difference_high", "improvement"]]

# %%
dict(zip(table["rule"], table["warning"], strict=True))

# %%
plots_statistics.intervals(table).get_figure()

# %% [markdown]
# A mean hides failed runs. The performance profile shows all of them: the share of runs above each accuracy.

# %%
scores = {rule: own.values for rule, own in statistics.collect_scores(frame, "accuracy").items()}
gl.analysis.performance_profile(scores, np.linspace(0, 1, 51)).plot(label="test accuracy").get_figure()

# %% [markdown]
# ## A figure for your paper
#
# Every drawing function takes the axes to draw on, so that you can put your own figure together. `style.style` sets
# the width, the fonts and the font size of a journal ("nature", "ieee" or "neurips"); `save` writes text as text, and
# the same bytes each time.

# %%
with style.style("ieee", columns=2):
    figure, (left, right) = style.new_figure(1, 2, height=2.6)
    plots.similarity_trace(summary, "cosine", layer="layer_0", ax=left)
    plots.similarity_trace(summary, "norm_ratio", layer="layer_0", ax=right, legend=False)
    paths = style.save(figure, Path(kept.name, "my_figure"), ("pdf", "png"))
left.get_figure()

# %% [markdown]
# ## Questions that nobody asked in advance
#
# The inner products of all pairs of gradients are stored for every probe and seed, so any pair can be compared later:
# here OTPE with SLTT, in the whole network, after training, per seed.

# %%
with np.load(results / study.folder / "cells/lif-24/BPTT/arrays.npz") as arrays:
    names = list(arrays["rules"])
    gram = sum(arrays[name] for name in arrays.files if name.startswith("gram/"))  # [probes, seeds, rules, rules]
i, j = names.index("OTPE"), names.index("SLTT")
gram[-1, :, i, j] / np.sqrt(gram[-1, :, i, i] * gram[-1, :, j, j])

# %%
json.loads((results / study.folder / "cells/lif-24/BPTT/manifest.json").read_text())["provenance"]
