"""Why a rule's gradient differs from BPTT's: the gap, split over the paths of credit that the rule drops.

`gradlab.rules.paths` lists the paths and puts any of them back. With v(S) the gradient of the rule after the paths S
are put back, v({}) is the rule's gradient and v(all) is the reference's; the gap is

    (1)  gap = v(all) - v({})
    (2)  phi_p = sum over S without p of  |S|! (n - |S| - 1)! / n!  (v(S and p) - v(S))      the Shapley value of path p
    (3)  sum_p phi_p = gap                                                                  exactly, by construction
    (4)  share_p = <phi_p, gap> / <gap, gap>,   sum_p share_p = 1

after Shapley (1953, A value for n-person games, doi:10.1515/9781400881970-018). The same weights split the gap of any
metric, m(v(all)) - m(v({})). The ladder puts the paths back one after the other: what a step of it gains depends on the
order, which is why the Shapley value averages over all orders. A negative share says that putting the path back leads
away from the reference in the mean over all orders, often because it comes last in some of them, where another path put
back has overshot: errors of two dropped paths may cancel. What a path does by itself stand in the rows "alone".

Links back to earlier layers are no part of any composed rule. What they add to the reference is the same for every S:
their value is the rest, reference - v(all others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from gradlab import metrics
from gradlab.engine import compiled, prepare, with_reference
from gradlab.groups import by_parameter, groups, inner, summed
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params
from gradlab.rules import ComposedRule, LocalRule, adjoint, paths
from gradlab.rules.adjoint import Learner
from gradlab.tape import record

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "Attribution", "attribute", "shapley"]

METRICS = ("cosine", "relative_error", "norm_ratio", "projection")
"""The metrics whose gap is split."""

REST = "links back to earlier layers"
_ROUND_OFF = 1e-6
"""Gaps below this share of the reference are round-off: gradients may be of 32 bits."""
_TOGETHER = 8
"""How many rules share one compiled program: compilation grows faster than their number."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """The gap between a rule and the reference, by path.

    Attributes:
        rule, reference: names.
        paths: what the rule drops, in the order of the ladder.
        values: parameter path -> [paths, entries], the Shapley values phi_p, equation (2).
        gram: parameter path -> [values, values], inner products of all v(S) and, last, of the reference.
        row: for each S, as a tuple of places in `paths`, its row in `gram`.
    """

    rule: str
    reference: str
    paths: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    gram: Mapping[str, np.ndarray]
    row: Mapping[tuple[int, ...], int]

    def metric(self, subset: Sequence[str], metric: str = "cosine", layer: str = "network") -> float:
        """A metric of v(subset) against the reference; NaN where one of them is zero."""
        if isinstance(subset, str) or not set(subset) <= set(self.paths):
            raise ValueError(f"subset={subset!r}: give a list of paths among {list(self.paths)}")
        place = self.row[tuple(sorted(self.paths.index(path) for path in set(subset)))]
        return float(self._values(metric, layer)[place])

    def share(self, layer: str = "network") -> dict[str, float]:
        """Equation (4): {path: share of the gap}; NaN where there is no gap."""
        members = self._members(layer)
        gap = {path: self.values[path].sum(0) for path in members}
        total = sum(float(inner(gap[path], gap[path])) for path in members)
        if self._flag(layer) or total <= self._square(layer) * _ROUND_OFF**2:
            return dict.fromkeys(self.paths, float("nan"))
        dots = sum(self.values[path] @ gap[path] for path in members)
        return dict(zip(self.paths, (dots / total).tolist(), strict=True))  # type: ignore[union-attr]

    def split(self, metric: str = "cosine", layer: str = "network") -> dict[str, float]:
        """{path: its Shapley value of a metric}; they add up to m(v(all)) - m(v({}))."""
        table = self._values(metric, layer)
        values = {subset: np.asarray(table[place]) for subset, place in self.row.items()}
        return dict(zip(self.paths, shapley(values, len(self.paths)).tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, path, kind, metric, value, flag.

        Kinds: "share", equation (4), with path "" for a rule that drops nothing; "shapley", the split of each of
        `METRICS`; "ladder", the metric after this path and all before it are put back (path "": the rule itself);
        "alone", the metric with this path alone put back.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for layer in groups(self.values):
            flag = self._flag(layer)
            for path, value in (self.share(layer) or {"": float("nan")}).items():
                reason = flag or ("the rule equals the reference here" if math.isnan(value) else "")
                rows.append((layer, path, "share", "share", value, reason))
            for metric in METRICS:
                split = self.split(metric, layer)
                rows += [
                    (layer, path, "shapley", metric, float("nan") if flag else v, flag) for path, v in split.items()
                ]
                rows.append((layer, "", "ladder", metric, self.metric((), metric, layer), flag))
                for place, path in enumerate(self.paths):
                    rung = self.metric(self.paths[: place + 1], metric, layer)
                    rows.append((layer, path, "ladder", metric, rung, flag))
                    rows.append((layer, path, "alone", metric, self.metric([path], metric, layer), flag))
        frame = pd.DataFrame(rows, columns=["layer", "path", "kind", "metric", "value", "flag"])
        frame.insert(0, "rule", self.rule)
        undefined = frame["value"].isna() & (frame["flag"] == "")
        frame.loc[undefined, "flag"] = "a gradient along the way is zero"
        return frame

    def plot(self, metric: str = "cosine", layer: str = "network", kind: str = "ladder", ax: Any = None) -> Any:
        """The ladder (steps) or the Shapley values (bars) of a metric; returns the Axes."""
        from gradlab.report import plots_attribution

        return plots_attribution.attribution(self.to_frame(), metric, layer, kind, ax=ax, reference=self.reference)

    def _values(self, metric: str, layer: str) -> np.ndarray:
        if metric not in metrics.GRAM_METRICS:
            raise ValueError(f"metric={metric!r}: choose from {', '.join(metrics.GRAM_METRICS)}")
        return metrics.from_gram(summed(self.gram, self._members(layer)), -1)[metric]

    def _square(self, layer: str) -> float:
        return float(summed(self.gram, self._members(layer))[-1, -1])

    def _flag(self, layer: str) -> str:
        gram = summed(self.gram, self._members(layer))
        if not np.isfinite(gram).all():
            return "a gradient is not finite"
        return f"the gradient of {self.reference} is zero" if gram[-1, -1] == 0 else ""

    def _members(self, layer: str) -> list[str]:
        known = groups(self.gram)
        if layer not in known:
            raise ValueError(f"layer={layer!r} is no part of the network; there are {', '.join(known)}")
        return known[layer]


def attribute(
    rule: ComposedRule,
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    key: Array | None = None,
) -> Attribution:
    """Split the gap between a rule and BPTT over the paths that the rule drops, equations (1) to (4).

    Args:
        rule: a composed rule (OSTL, OTTT, e-prop, any `LocalRule`, ...).
        net, params, batch, loss: as `gl.gradients`.
        key: for rules with a stochastic gate, whose v({}) is then `gl.gradients(net, params, batch, loss, [rule],
            key)`; all v(S) draw the same. None: seed 0.

    Raises:
        TypeError: a rule that is not composed, or that computes its gradient otherwise; `lag_profile` splits BPTT's
            truncations by delay instead.
        ValueError: as `gl.gradients`; a neuron that does not say how to cut its reset.
        RuntimeError: the rule drops a path that is not listed, so that the gap could not be split.
    """
    if not isinstance(rule, ComposedRule) or type(rule).gradient is not ComposedRule.gradient:
        shown = getattr(rule, "name", repr(rule))
        raise TypeError(
            f"{shown} is no composed rule, so the paths that it drops cannot be put back one by one: give a rule such "
            "as gl.rules.OSTL() or a LocalRule; for truncations of BPTT use gl.analysis.lag_profile"
        )
    key = jax.random.key(0) if key is None else key
    (reference,) = with_reference([], None)
    params, batch, (held, state) = prepare(net, params, batch, loss, [reference, rule], key)
    point = rule.compose()
    if reason := paths.objection(point, net):
        raise ValueError(f"{rule.name} cannot be split over paths: {reason}")
    names = paths.dropped(point, net)
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(range(len(names)), size)]
    chosen = {subset: paths.restored(point, net, [names[place] for place in subset]) for subset in subsets}
    _require_whole(names, chosen[subsets[-1]])
    distinct = list(dict.fromkeys([*chosen.values(), paths.EXACT]))
    own_key = jax.random.fold_in(key, 0)  # as the engine does for its first rule
    found = [_points(net, loss, tuple(part), params, batch, state, own_key) for part in _parts(distinct)]
    vectors = [by_parameter(tree) for part in found for tree in part]
    exact = compiled(net, loss, (reference,))(params, batch, (held,), key)[0].grad
    target = by_parameter(jax.device_get(exact))
    row = {subset: distinct.index(local) for subset, local in chosen.items()}
    names, row, vectors = _with_rest(net, names, row, vectors, distinct.index(paths.EXACT), target)
    if not names:
        _require_small({path: target[path] - vectors[row[()]][path] for path in target}, target)
    stacked = {path: np.stack([*(tree[path] for tree in vectors), vector]) for path, vector in target.items()}
    weights = np.zeros((len(names), len(vectors) + 1))
    for subset, own in _weights(len(names)).items():
        weights[:, row[subset]] += own
    return Attribution(
        rule.name,
        reference.name,
        tuple(names),
        {path: inner(weights, rows) for path, rows in stacked.items()},
        {path: inner(rows, rows.T) for path, rows in stacked.items()},
        row,
    )


def shapley(values: Mapping[tuple[int, ...], Any], n: int) -> np.ndarray:
    """Equation (2) for the players 0 to n - 1: [n, ...] from {sorted tuple of players: value of v}."""
    total = sum(np.multiply.outer(own, np.asarray(values[subset])) for subset, own in _weights(n).items())
    return np.asarray(total) if n else np.zeros(0)


def _weights(n: int) -> dict[tuple[int, ...], np.ndarray]:
    """Per subset what its value counts in each player's Shapley value, [n]."""
    found = {}
    for size in range(n + 1):
        for subset in combinations(range(n), size):
            own = np.zeros(n)
            for player in range(n):
                others = size - (player in subset)
                weight = math.factorial(others) * math.factorial(n - others - 1) / math.factorial(n)
                own[player] = weight if player in subset else -weight
            found[subset] = own
    return found


def _with_rest(
    net: Network,
    names: list[str],
    row: dict[tuple[int, ...], int],
    vectors: list[dict[str, np.ndarray]],
    exact: int,
    target: dict[str, np.ndarray],
) -> tuple[list[str], dict[tuple[int, ...], int], list[dict[str, np.ndarray]]]:
    """The game with the rest as one more player where the network has links back to earlier layers."""
    rest = {path: target[path] - vectors[exact][path] for path in target}
    if not any(link.delay and link.source != link.target for link in net.links):
        _require_small(rest, target)
        vectors = [target if place == exact else vector for place, vector in enumerate(vectors)]
        return names, row, vectors
    count, player = len(vectors), len(names)
    moved = [{path: vector[path] + rest[path] for path in target} for vector in vectors]
    moved[exact] = target
    both = row | {(*subset, player): count + place for subset, place in row.items()}
    return [*names, REST], both, [*vectors, *moved]


def _require_whole(names: list[str], last: LocalRule) -> None:
    """Refuse to go on when a rule with all its paths put back is not `paths.EXACT`."""
    if names and last != paths.EXACT:
        raise RuntimeError(
            f"with {', '.join(names)} put back the rule is {last.name}, not BPTT: it drops a path that gradlab does "
            "not list, and its gap cannot be split"
        )


def _require_small(rest: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> None:
    """Refuse to go on when the paths put back do not give the reference: some path would be missing from the list."""
    off, size = (math.sqrt(sum(float(inner(v, v)) for v in tree.values())) for tree in (rest, target))
    if off > 1e-3 * size and math.isfinite(size):
        raise RuntimeError(
            f"with all paths put back the gradient is not BPTT's (it differs by {off / max(size, 1e-300):.1e} of its "
            "length): a neuron's `cut` or a connection has a path that gradlab does not know"
        )


def _parts(rules: list[LocalRule]) -> list[list[LocalRule]]:
    return [rules[first : first + _TOGETHER] for first in range(0, len(rules), _TOGETHER)]


def _run_points(
    net: Network, loss: Loss, rules: tuple[LocalRule, ...], params: Params, batch: Batch, state: Any, key: Array
) -> list[Params]:
    # One key for all: a stochastic gate shuts the same steps out in every v(S).
    learners = [Learner(rule, state if rule.signal.has_state else {}, key) for rule in rules]
    return adjoint.gradients(learners, net, params, record(net, params, batch, loss))


_jitted = jax.jit(_run_points, static_argnums=(0, 1, 2))


def _points(net: Network, loss: Loss, rules: tuple[LocalRule, ...], *data: Any) -> Any:
    """The gradients of composed rules; what was compiled is kept while network and loss are hashable."""
    if is_hashable(net, loss, rules):
        return jax.device_get(_jitted(net, loss, rules, *data))
    return jax.device_get(jax.jit(partial(_run_points, net, loss, rules))(*data))
