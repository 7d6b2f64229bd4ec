"""Alignment of what the weights do: the optimizer's updates, in the place of the gradients that it was given.

    (1)  update_rule = optimizer(gradient_rule, state_rule)
    (2)  effective_learning_rate = ||update|| / ||weights||

An optimizer that rescales its steps (Adam) hides wrong lengths of gradients, and may hide or make differences of
direction: gradients that agree need not give updates that do, and the other way round. Report both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from gradlab import metrics
from gradlab.comparison import Comparison
from gradlab.engine import evaluate, gradients, with_reference
from gradlab.factories import Optimizer
from gradlab.groups import by_parameter, groups, summed
from gradlab.losses import Batch, Loss
from gradlab.network import Network, Params
from gradlab.rules.base import Rule

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["UpdateAlignment", "update_alignment"]


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateAlignment:
    """Updates of rules against the reference's.

    Attributes:
        comparison: a `gl.Comparison` of the updates.
        weights: parameter path -> ||weights||^2.
    """

    comparison: Comparison
    weights: Mapping[str, np.ndarray]

    def to_frame(self) -> pd.DataFrame:
        """The comparison's tidy frame, with rows of the metric "effective_learning_rate", equation (2)."""
        import pandas as pd

        rows = []
        for layer, paths in groups(self.weights).items():
            weights = float(summed(self.weights, paths))
            for rule in self.comparison.rules:
                update = self.comparison.metrics(rule, layer)["norm"]
                value = update / weights**0.5 if weights > 0 else float("nan")
                flag = "" if weights > 0 else "the weights are zero"
                flag = flag if np.isfinite(update) else f"the update of {rule} is not finite"
                value = value if flag == "" else float("nan")
                rows.append((rule, layer, "effective_learning_rate", value, flag))
        own = pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "flag"])
        frame = pd.concat([self.comparison.to_frame(), own], ignore_index=True)
        frame["flag"] = frame["flag"].str.replace("the gradient of", "the update of")
        return frame

    def plot(self, metric: str = "cosine", ax: Any = None) -> Any:
        """A map of one metric per rule and layer; returns the Axes."""
        return self.comparison.plot(metric, ax=ax)


def update_alignment(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    optimizer: Any,
    states: Mapping[str, Any] | None = None,
    reference: Rule | None = None,
) -> UpdateAlignment:
    """Compare the updates that an optimizer makes of the rules' gradients, equation (1).

    Args:
        net, params, batch, loss, rules, key: as `gl.gradients`.
        optimizer: a `gl.Optimizer` or an optax transformation.
        states: rule name -> the optimizer's state; None, or a rule without one: a fresh state.
        reference: the rule that the others are measured against; BPTT by default.

    Raises:
        ValueError: as `gl.gradients`; states of no rule.
    """
    chosen = with_reference(rules, reference)
    names = [rule.name for rule in chosen]
    if unknown := sorted(set(states or {}) - set(names)):
        raise ValueError(f"states are given for {unknown}, but the rules are {names}")
    transformation = optimizer.build() if isinstance(optimizer, Optimizer) else optimizer
    found = gradients(net, params, batch, loss, chosen, key)
    step = jax.jit(lambda gradient, state, weights: transformation.update(gradient, state, weights)[0])
    fresh = transformation.init(params)
    updates = {name: step(gradient, (states or {}).get(name, fresh), params) for name, gradient in found.items()}
    comparison = Comparison.build(net, jax.device_get(updates), evaluate(net, params, batch, loss), {})
    squares = {path: np.asarray(metrics.norm(vector) ** 2) for path, vector in by_parameter(params).items()}
    return UpdateAlignment(comparison, squares)
