"""Bias and variance of gradient estimators, the randomness of the data and that of the rule apart.

A rule's gradient g_ij on batch i, with the rule's own noise drawn for the j-th time, is random twice over. With n
batches of B samples, m draws of the rule's noise for each, and g*_i the reference's gradient on batch i:

    (1)  Var_rule = mean over i of the sample variance over j of g_ij                    0 for a deterministic rule
    (2)  Var_data = sample variance over i of (mean over j of g_ij)  -  Var_rule / m     unbiased; may be negative
    (3)  Var      = Var_data + Var_rule                                                  of one g_ij
    (4)  bias^2   = ||mean_i d_i||^2 - tr Var_i(d_i) / n,   d_i = mean_j g_ij - g*_i     unbiased; may be negative
    (5)  ||E g||^2 = ||mean_ij g_ij||^2 - tr Var_i(mean_j g_ij) / n                      unbiased; may be negative

Pairing by batch in (4) takes out of the bias what the data do to both alike.

    (6)  signal-to-noise      = ||E g|| / sqrt(tr Var)
    (7)  gradient noise scale = B tr Var / ||E g||^2            samples

are of one gradient of one batch. For a deterministic rule (7) is the two-batch form of McCandlish et al. (2018, An
Empirical Model of Large-Batch Training, arXiv:1812.06162, appendix A.1), one batch the small one and all n together the
large one: top and bottom are unbiased, their ratio is not. It counts a rule's noise like the data's, as if it shrank
with the batch, which it does when every sample has noise of its own.

    (8)  GSNR = E[g_p]^2 / Var[g_p] of one parameter p, averaged over the parameters whose gradient varies

is the gradient signal-to-noise ratio of Liu et al. (2020, Understanding Why Neural Networks Generalize Well Through
GSNR of Parameters, arXiv:2001.07384), over batches. Put in from samples it would be too large by about 1 / n; what is
given, (n - 3) / (n - 1) mean^2 / variance - 1 / n, is unbiased for normal gradients. It needs four batches, and is
steady from about eight.

The cosine of the mean gradients and the mean of the cosines differ: noise that a mean gets rid of lowers every single
cosine. Both are given, by these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from gradlab.analysis.noise_result import EstimatorNoise
from gradlab.analysis.trees import flat
from gradlab.engine import check_key, evaluate, gradients, with_reference
from gradlab.losses import Batch, Loss
from gradlab.network import Network, Params
from gradlab.rules.base import Rule
from gradlab.tasks.base import Task

__all__ = ["EstimatorNoise", "estimator_noise"]


def estimator_noise(
    net: Network,
    params: Params,
    batches: Sequence[Batch] | Task,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    draws: int = 8,
    reference: Rule | None = None,
    *,
    n_batches: int | None = None,
    size: int | None = None,
) -> EstimatorNoise:
    """Bias, variance and signal-to-noise ratio of every rule's gradient: equations (1) to (8) of this module.

    Args:
        net, params, loss: as in `gl.compare`.
        batches: two or more batches of one shape, drawn independently of each other; or a task, of which `n_batches`
            batches of `size` samples are drawn.
        rules: the rules. The reference comes first in the result, whether it stands among them or not.
        key: for the rules' noise (and a task's batches); every batch, draw and rule has noise of its own.
        draws: how often a rule's own noise is drawn on each batch, at least 2. A rule whose draws on the first batch
            are all equal to the last bit, and not zero, is deterministic and computed once on each of the others.
        reference: the rule that bias is measured against; None: BPTT.
        n_batches, size: for a task only.

    Returns:
        An `EstimatorNoise`. Gradients are folded into running sums in float64: about 3 draws + 8 vectors of the
        parameters' size per rule, however many batches there are.

    Raises:
        TypeError, ValueError: too few batches or of different shapes, fewer than two draws, and what `gl.gradients`
            refuses.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws={draws!r}: a variance over draws needs a whole number of them, at least 2")
    chosen = with_reference(rules, reference)
    names = [rule.name for rule in chosen]
    check_key(key)
    noise_key, data_key = jax.random.split(key)
    batches = _batches(batches, data_key, n_batches, size)
    starts, sizes = _places(params)
    sums: dict[str, _Sums] = {}
    dead = []
    for i, batch in enumerate(batches):
        own_key = jax.random.fold_in(noise_key, i)
        drawn = [rule for rule in chosen if rule.name not in sums or sums[rule.name].draws > 1]
        rows = _rows(net, params, batch, loss, chosen, drawn, own_key, draws)
        sums = sums or {name: _Sums(1 if _same(rows[name]) else draws, starts) for name in names}
        target = rows[names[0]][: sums[names[0]].draws].mean(0)
        for name in names:
            sums[name].add(rows[name][: sums[name].draws], target)
        dead.append(_dead(evaluate(net, params, batch, loss)))
    return _result(names, sums, sizes, dead, batches[0].inputs.shape[1])


def _batches(batches: Sequence[Batch] | Task, key: Array, n_batches: int | None, size: int | None) -> Sequence[Batch]:
    if isinstance(batches, Task):
        if n_batches is None or size is None:
            raise ValueError("a task needs n_batches=... and size=...: how many batches of how many samples to draw")
        batches = [batches.batch(k, size) for k in jax.random.split(key, n_batches)]
    elif n_batches is not None or size is not None:
        raise ValueError("n_batches and size are for a task; a list of batches has both already")
    if isinstance(batches, Batch) or not all(isinstance(batch, Batch) for batch in batches):
        raise TypeError("batches: give a list of gl.Batch, at least two, or a task with n_batches and size")
    if len(batches) < 2:
        raise ValueError(f"{len(batches)} batch: a variance over batches needs at least two, drawn independently")
    shapes = [tuple(np.shape(batch.inputs)) for batch in batches]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"batch {i} has inputs of shape {shape}, batch 0 of {shapes[0]}: gradients of batches of different "
                "sizes have different variances; give equal batches, padded and masked where lengths differ"
            )
    return batches


def _rows(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    drawn: Sequence[Rule],
    key: Array,
    draws: int,
) -> dict[str, np.ndarray]:
    """{rule: [draws, parameters]} on one batch; one row for rules that are not among the `drawn`."""
    trees = [gradients(net, params, batch, loss, rules, jax.random.fold_in(key, 0))]
    for j in range(1, draws if drawn else 1):
        trees.append(gradients(net, params, batch, loss, drawn, jax.random.fold_in(key, j)))
    found = [{name: flat(tree) for name, tree in one.items()} for one in jax.device_get(trees)]
    return {name: np.stack([one[name] for one in found if name in one]) for name in found[0]}


def _places(params: Params) -> tuple[np.ndarray, dict[str, int]]:
    """Where each parameter begins in the flat vector, and {path: number of entries} in the same order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): int(np.size(leaf)) for path, leaf in leaves}
    ends = np.cumsum(list(sizes.values()))
    return np.concatenate([[0], ends[:-1]]).astype(int), sizes


def _same(rows: np.ndarray) -> bool:
    """True when all draws are one and the same gradient; zeros do not tell, for there noise has nothing to act on."""
    return bool((rows == rows[0]).all() and rows[0].any())


def _dead(health: Mapping[str, Any]) -> dict[str, str]:
    """{layer: "silent" or "saturated"} of one batch."""
    found = {layer: "silent" for layer, share in health["silent_units"].items() if share == 1.0}
    return found | {layer: "saturated" for layer, share in health["saturated_units"].items() if share == 1.0}


class _Moments:
    """Running mean and sum of squared deviations of arrays (Welford): nothing cancels, nothing is kept."""

    def __init__(self) -> None:
        self.n, self.mean, self._squares = 0, np.zeros(()), np.zeros(())

    def add(self, x: np.ndarray) -> None:
        self.n += 1
        before = x - self.mean
        self.mean = self.mean + before / self.n
        self._squares = self._squares + before * (x - self.mean)

    @property
    def variance(self) -> np.ndarray:
        return self._squares / (self.n - 1)


class _Sums:
    """What is kept of one rule's gradients while batches come."""

    def __init__(self, draws: int, starts: np.ndarray) -> None:
        self.draws, self.starts = draws, starts
        self.single, self.centre, self.gap = _Moments(), _Moments(), _Moments()
        self.within: np.ndarray = np.zeros(())
        self.products: list[np.ndarray] = []

    def add(self, rows: np.ndarray, target: np.ndarray) -> None:
        """One batch: gradients [draws, parameters] and the reference's [parameters]."""
        with np.errstate(invalid="ignore", over="ignore"):  # gradients that are not finite: the result says so
            # From the first draw on: equal draws have a variance of exactly zero, not of their mean's rounding.
            apart = rows - rows[0]
            mean = rows[0] + apart.mean(0)
            self.single.add(rows)
            self.centre.add(mean)
            self.gap.add(mean - target)
            if self.draws > 1:
                self.within = self.within + apart.var(0, ddof=1)
            pairs = (rows * target, rows * rows, np.broadcast_to(target * target, rows.shape))
            self.products.append(np.stack([self.per_parameter(pair) for pair in pairs]))

    def per_parameter(self, values: np.ndarray) -> np.ndarray:
        """Sum a vector of the network's parameters [..., parameters] over each parameter's entries: [..., paths]."""
        return np.add.reduceat(values, self.starts, axis=-1)

    def terms(self, target: np.ndarray) -> dict[str, np.ndarray]:
        """Sums of `EstimatorNoise.terms`, [paths] each; `target` is the reference's mean gradient."""
        n, centre, gap = self.centre.n, self.centre, self.gap
        with np.errstate(invalid="ignore", over="ignore"):
            varies = self.single.variance > 0
            safe = np.where(varies, self.single.variance, 1.0)
            ratio = np.where(varies, (n - 3) / (n - 1) * self.single.mean**2 / safe - 1 / n, 0.0).mean(0)
            found = {
                "rule_variance": np.broadcast_to(self.within / n, target.shape),
                "batch_variance": centre.variance,
                "square_of_mean": centre.mean**2,
                "gap_square": gap.mean**2,
                "gap_variance": gap.variance,
                "cross": centre.mean * target,
                "gsnr": ratio,
                "varies": varies.mean(0),
            }
            return {name: self.per_parameter(np.ascontiguousarray(values)) for name, values in found.items()}


def _result(
    names: list[str], sums: dict[str, _Sums], sizes: dict[str, int], dead: list[dict[str, str]], batch_size: int
) -> EstimatorNoise:
    target = sums[names[0]].centre.mean
    terms = [sums[name].terms(target) for name in names]
    return EstimatorNoise(
        rules=tuple(names),
        draws={name: sums[name].draws for name in names},
        n_batches=len(dead),
        batch_size=batch_size,
        sizes=sizes,
        terms={term: np.stack([own[term] for own in terms]) for term in terms[0]},
        products={name: np.stack(sums[name].products) for name in names},
        dead=tuple(dead),
    )
