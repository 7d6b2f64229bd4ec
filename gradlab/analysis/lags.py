"""Lag profiles: how much credit a rule gives over each delay between a weight's action and the error.

Every gradient is a sum over pairs of steps: the step s at which the weight acted and the step t whose loss is blamed on
it. Sorted by their distance,

    (1)  g = sum_lag g_lag            g_lag = sum_t (the share of g that the loss of step t owes to the weights of step
                                              t - lag)
    (2)  credit_lag = <g_lag, g*> / <g*, g*>       g*: the whole gradient of the reference

The reference's credits add up to 1, a rule's to its projection on the reference. A rule without memory has credit at
lag 0 only; BPTT's profile says over which delays the task and the network need credit at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import metrics
from gradlab.analysis.timeline import require_steps_of_loss
from gradlab.engine import prepare, shapes_of, with_reference
from gradlab.groups import by_parameter, groups, inner, summed
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params
from gradlab.rules.base import Rule
from gradlab.tape import record

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LagProfile", "lag_profile"]

LIMIT_BYTES = 4 * 2**30
"""How much the gradients of all steps of one rule may take."""
_EVERY = 64
"""Sequences up to this length get one entry per lag, longer ones lags that double."""


@dataclass(frozen=True, eq=False)
class LagProfile:
    """Credit by delay, of rules against a reference.

    Attributes:
        rules: names, the reference first.
        lags: [bins, 2], the first and the last lag of each bin, in steps.
        gram: parameter path -> [bins, rules, rules], inner products of the rules' g_lag.
        credit: parameter path -> [bins, rules], <g_lag, g*>.
        square: parameter path -> <g*, g*>.
        refusals: rules left out -> the sentence why.
    """

    rules: tuple[str, ...]
    lags: np.ndarray
    gram: Mapping[str, np.ndarray]
    credit: Mapping[str, np.ndarray]
    square: Mapping[str, np.ndarray]
    refusals: Mapping[str, str]

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: lag, last_lag, rule, layer, metric, value, flag.

        Metrics: "credit", equation (2); "norm", ||g_lag|| / ||g*||; "cosine" with the reference's own g_lag.
        """
        import pandas as pd

        rows = []
        for group, paths in groups(self.gram).items():
            gram, square = summed(self.gram, paths), float(summed(self.square, paths))
            unit = square if 0 < square < np.inf else np.nan
            found = {
                "credit": summed(self.credit, paths) / unit,
                "norm": np.sqrt(np.diagonal(gram, axis1=1, axis2=2) / unit),
                "cosine": metrics.from_gram(gram)["cosine"],
            }
            for metric, table in found.items():
                for (first, last), values in zip(self.lags.tolist(), table, strict=True):
                    for rule, value in zip(self.rules, values.tolist(), strict=True):
                        rows.append((first, last, rule, group, metric, value, self._flag(metric, value, square)))
        return pd.DataFrame(rows, columns=["lag", "last_lag", "rule", "layer", "metric", "value", "flag"])

    def _flag(self, metric: str, value: float, square: float) -> str:
        if square == 0:
            return f"the gradient of {self.rules[0]} is zero"
        if not np.isfinite(square) or (metric != "cosine" and not np.isfinite(value)):
            return "a gradient is not finite"
        return "no credit at this lag" if np.isnan(value) else ""

    def plot(self, layer: str = "network", metric: str = "credit", ax: Any = None) -> Any:
        """Credit by lag, one line per rule; returns the Axes."""
        from gradlab.report import plots_time

        return plots_time.lags(self.to_frame(), layer, metric, ax=ax, reference=self.rules[0])


def lag_profile(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    reference: Rule | None = None,
    edges: Sequence[int] | None = None,
) -> LagProfile:
    """Credit by delay of rules and of a reference (BPTT by default), equations (1) and (2).

    Rules whose sweep does not know at which step the weights acted (RTRL and its approximations, FPTT) are left out,
    with the reason in `refusals`. It costs as many backward sweeps as there are steps.

    Args:
        net, params, batch, loss, rules, key: as `gl.gradients`.
        reference: the rule that the others are measured against.
        edges: the first lag of each bin, 0 first; None: every lag for up to 64 steps, 0, 1, 2, 4, 8, ... beyond.

    Raises:
        ValueError: as `gl.gradients`; a loss that is no sum over steps; edges that are not rising whole numbers from
            0; a reference that cannot be split; gradients of all steps above `LIMIT_BYTES`.
    """
    chosen = with_reference(rules, reference)
    params, batch, states = prepare(net, params, batch, loss, chosen, key)
    n_steps = shapes_of(net, params, batch, loss).n_steps
    first = _edges(edges, n_steps)
    require_steps_of_loss(loss)
    _require_memory(params, n_steps)
    kept, held, refusals = _splittable(net, params, batch, loss, chosen, states, key)
    # One rule at a time: each holds a gradient for every step of the sequence.
    found = [
        jax.device_get(_compiled(net, loss, rule, tuple(first))(params, batch, own))
        for rule, own in zip(kept, held, strict=True)
    ]
    trees = [by_parameter(tree, lead=1) for tree in found]
    rows = {path: np.stack([tree[path] for tree in trees], axis=1) for path in trees[0]}
    whole = {path: row[:, 0].sum(0) for path, row in rows.items()}
    last = [*(edge - 1 for edge in first[1:]), n_steps - 1]
    return LagProfile(
        tuple(rule.name for rule in kept),
        np.stack([first, last], axis=1),
        {path: inner(row, np.swapaxes(row, 1, 2)) for path, row in rows.items()},
        {path: inner(row, whole[path]) for path, row in rows.items()},
        {path: np.asarray(inner(total, total)) for path, total in whole.items()},
        refusals,
    )


def _edges(edges: Sequence[int] | None, n_steps: int) -> list[int]:
    if edges is None:
        if n_steps <= _EVERY:
            return list(range(n_steps))
        return [0, *(2**power for power in range(n_steps.bit_length()) if 2**power < n_steps)]
    edges = list(edges)
    whole = all(isinstance(edge, int | np.integer) and not isinstance(edge, bool) for edge in edges)
    rising = whole and all(a < b for a, b in itertools.pairwise(edges))
    if not edges or not rising or edges[0] != 0 or edges[-1] >= n_steps:
        raise ValueError(f"edges={edges}: give rising whole numbers from 0, below the {n_steps} steps of the sequence")
    return edges


def _splittable(
    net: Network, params: Params, batch: Batch, loss: Loss, rules: Sequence[Rule], states: Any, key: Array
) -> tuple[tuple[Rule, ...], tuple[Any, ...], dict[str, str]]:
    """The rules that know at which step the weights acted, their (state, key), and why the others are left out."""
    kept, refusals = [], {}
    for position, (rule, state) in enumerate(zip(rules, states, strict=True)):

        def split(p: Params, b: Batch, rule: Rule = rule, state: Any = state) -> Any:
            return rule.by_step(net, p, record(net, p, b, loss), state, key)

        if jax.eval_shape(split, params, batch) is None:
            refusals[rule.name] = f"{rule.name}: it does not say at which step the weights acted, so it has no lags"
        else:
            kept.append((rule, (state, jax.random.fold_in(key, position))))  # the key that the engine would give it
    if rules[0].name in refusals:
        raise ValueError(f"{refusals[rules[0].name]}: use BPTT as the reference")
    return tuple(rule for rule, _ in kept), tuple(held for _, held in kept), refusals


def _require_memory(params: Params, n_steps: int) -> None:
    needed = n_steps * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    if needed > LIMIT_BYTES:
        raise ValueError(
            f"a gradient for each of {n_steps} steps takes {needed / 2**30:.1f} GiB, above the limit of "
            f"{LIMIT_BYTES / 2**30:.1f} GiB: use a shorter sequence or a smaller network"
        )


def _by_lag(
    net: Network, loss: Loss, rule: Rule, first: tuple[int, ...], params: Params, batch: Batch, own: Any
) -> Params:
    """g_lag of one rule, leaves [bins, ...]; `own` is its (state, key)."""
    tape = record(net, params, batch, loss)
    steps = jnp.arange(tape.n_steps)
    # The bin of each lag; what would act after the error falls out (no rule does).
    bin_of = jnp.asarray(np.searchsorted(first, np.arange(tape.n_steps), side="right") - 1)

    def add(t: Array, total: Params) -> Params:
        bins = jnp.where(steps <= t, bin_of[jnp.clip(t - steps, 0)], len(first))
        split = rule.by_step(net, params, tape.only_step(t), *own)
        return jax.tree.map(lambda a, c: a + jax.ops.segment_sum(c, bins, len(first)), total, split)

    empty = jax.tree.map(lambda leaf: jnp.zeros((len(first), *leaf.shape), leaf.dtype), params)
    return jax.lax.fori_loop(0, tape.n_steps, add, empty)


_jitted = jax.jit(_by_lag, static_argnums=(0, 1, 2, 3))


def _compiled(net: Network, loss: Loss, rule: Rule, first: tuple[int, ...]) -> Any:
    if is_hashable(net, loss, rule):
        return partial(_jitted, net, loss, rule, first)
    return jax.jit(partial(_by_lag, net, loss, rule, first))
