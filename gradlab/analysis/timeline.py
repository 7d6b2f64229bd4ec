"""How good a gradient is from step to step of the sequence: each step of the loss by itself, and all steps until then.

The loss is a sum over steps, and so is the gradient of every rule that is linear in the error:

    (1)  g = sum_t g_t            g_t: the rule's gradient when only the loss of step t counts
    (2)  G_t = sum_{s <= t} g_s   what the rule knows after step t

g_t is what an online rule adds at step t. A rule whose gradient is no such sum (FPTT's regulariser does not wait for a
loss) is found by comparing the sum with the whole gradient, and left out with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import metrics
from gradlab.engine import compiled, on_tape, prepare, shapes_of, with_reference
from gradlab.groups import by_parameter, groups, inner, summed
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params
from gradlab.rules.base import Rule
from gradlab.tape import record

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Timeline", "over_time"]

_BYTES = 2**26
"""How much the gradients of one stretch of steps may take."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Timeline:
    """Rules against a reference, step by step of one sequence.

    Attributes:
        rules: names, the reference first.
        gram: parameter path -> [steps, rules, rules], inner products of the rules' g_t, equation (1).
        cumulative: the same of G_t, equation (2).
        refusals: rules left out -> the sentence why.
    """

    rules: tuple[str, ...]
    gram: Mapping[str, np.ndarray]
    cumulative: Mapping[str, np.ndarray]
    refusals: Mapping[str, str]

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: step, kind ("step" or "cumulative"), rule, layer, metric, value, flag."""
        import pandas as pd

        parts = []
        for kind, gram in (("step", self.gram), ("cumulative", self.cumulative)):
            for group, paths in groups(gram).items():
                values = summed(gram, paths)
                squares = np.diagonal(values, axis1=1, axis2=2)
                for metric, table in metrics.from_gram(values).items():
                    parts.append(self._rows(kind, group, metric, table, squares))
        return pd.concat(parts, ignore_index=True)

    def _rows(self, kind: str, group: str, metric: str, table: np.ndarray, squares: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        steps, rules = table.shape
        flags = [self._flag(rule, squares[step]) for step in range(steps) for rule in range(rules)]
        value = np.where(np.array(flags) == "", table.ravel(), np.nan)
        where = {"step": np.repeat(np.arange(steps), rules), "kind": kind, "rule": list(self.rules) * steps}
        return pd.DataFrame({**where, "layer": group, "metric": metric, "value": value, "flag": flags})

    def _flag(self, rule: int, squares: np.ndarray) -> str:
        for index in (0, rule):
            if not np.isfinite(squares[index]):
                return f"the gradient of {self.rules[index]} is not finite"
            if squares[index] == 0:
                return f"the gradient of {self.rules[index]} is zero"
        return ""

    def plot(self, metric: str = "cosine", layer: str = "network", ax: Any = None) -> Any:
        """The metric of the single steps (thin) and of all steps until then (thick); returns the Axes."""
        from gradlab.report import plots_time

        return plots_time.timeline(self.to_frame(), metric, layer, ax=ax, reference=self.rules[0])


def over_time(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    reference: Rule | None = None,
) -> Timeline:
    """Compare rules with a reference (BPTT by default) at every step of the sequence, equations (1) and (2).

    It costs as many backward sweeps as there are steps.

    Args:
        net, params, batch, loss, rules, key: as `gl.gradients`.
        reference: the rule that the others are measured against.

    Raises:
        ValueError: as `gl.gradients`; a loss that is no sum over steps.
    """
    chosen = with_reference(rules, reference)
    params, batch, states = prepare(net, params, batch, loss, chosen, key)
    require_steps_of_loss(loss)
    estimates = jax.device_get(compiled(net, loss, tuple(chosen))(params, batch, states, key))
    whole = [by_parameter(estimate.grad) for estimate in estimates]
    names = [rule.name for rule in chosen]
    running = [{path: np.zeros_like(value) for path, value in tree.items()} for tree in whole]
    steps, sums = [], []
    for part in _stretches(net, loss, chosen, params, batch, states, key):
        rows = {path: np.stack([tree[path] for tree in part], axis=1) for path in whole[0]}
        until = {}
        for path, row in rows.items():
            start = np.stack([tree[path] for tree in running])
            until[path] = start + np.cumsum(row, axis=0)
            for index, tree in enumerate(running):
                tree[path] = until[path][-1, index]
        steps.append({path: inner(row, np.swapaxes(row, 1, 2)) for path, row in rows.items()})
        sums.append({path: inner(row, np.swapaxes(row, 1, 2)) for path, row in until.items()})
    kept, refusals = _linear(names, whole, running)

    def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {path: np.concatenate([part[path] for part in parts])[:, kept][:, :, kept] for path in whole[0]}

    return Timeline(tuple(names[index] for index in kept), joined(steps), joined(sums), refusals)


def require_steps_of_loss(loss: Loss) -> None:
    """Raise ValueError for a loss that is no sum over steps, of which no single step can be blamed."""
    if not loss.streams:
        raise ValueError(
            f"{type(loss).__name__} is no sum over steps, so that no step has a loss of its own: use gl.PerStep"
        )


def _stretches(
    net: Network, loss: Loss, rules: Sequence[Rule], params: Params, batch: Batch, states: Any, key: Array
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Per stretch of steps, for each rule {path: [steps of the stretch, entries]}."""
    n_steps = shapes_of(net, params, batch, loss).n_steps
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params)) * len(rules) * 4
    length = int(min(n_steps, max(1, _BYTES // size)))
    run = _split(net, loss, rules)
    for first in range(0, n_steps, length):
        # The last stretch is as long as the others, so that one program serves all; what is beyond the end is dropped.
        found = jax.device_get(run(params, batch, states, key, first + jnp.arange(length)))
        count = min(length, n_steps - first)
        yield [{path: rows[:count] for path, rows in by_parameter(grad, lead=1).items()} for grad in found]


def _contributions(
    net: Network, loss: Loss, rules: tuple[Rule, ...], params: Params, batch: Batch, states: Any, key: Array, at: Array
) -> tuple[Params, ...]:
    tape = record(net, params, batch, loss)

    def one(step: Array) -> tuple[Params, ...]:
        return tuple(found.grad for found in on_tape(net, params, tape.only_step(step), rules, states, key))

    return jax.lax.map(one, at)


_jitted = jax.jit(_contributions, static_argnums=(0, 1, 2))


def _split(net: Network, loss: Loss, rules: Sequence[Rule]) -> Any:
    if is_hashable(net, loss, tuple(rules)):
        return partial(_jitted, net, loss, tuple(rules))
    return jax.jit(partial(_contributions, net, loss, tuple(rules)))


def _linear(names: Sequence[str], whole: Any, sums: Any) -> tuple[list[int], dict[str, str]]:
    """The places of the rules whose gradient is the sum over steps, and why the others are left out."""
    kept, refusals = [], {}
    for index, name in enumerate(names):
        a, b = (np.concatenate(list(tree[index].values())) for tree in (whole, sums))
        with np.errstate(over="ignore", invalid="ignore"):
            error, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
        # What is not finite is kept: the frame flags it.
        if not (np.isfinite(error) and np.isfinite(size)) or error <= _TOLERANCE * size:
            kept.append(index)
        else:
            refusals[name] = (
                f"{name}: its gradient does not follow the errors of single steps, or is no sum over the steps of the "
                f"loss (they differ by {error / max(size, 1e-300):.1e} of it)"
            )
    if 0 not in kept:
        raise ValueError(f"the reference cannot be split into steps. {refusals[names[0]]}: use BPTT as the reference")
    return kept, refusals
