"""The result of `gl.compare`: Gram matrices of all rules, metrics against the reference, and flags."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab import metrics
from gradlab.groups import NETWORK, by_parameter
from gradlab.network import Network

if TYPE_CHECKING:
    import pandas as pd

METRICS = (
    "cosine", "angle", "norm_ratio", "relative_error", "projection", "optimal_scale", "optimal_scale_error",
    "sign_agreement", "sign_coverage", "top_overlap", "norm",
)  # fmt: skip
"""Names of the metrics in a frame, defined in `gradlab.metrics`. "norm" is the rule's own gradient norm; "top_overlap"
is counted in each parameter, among the tenth of its entries that are largest (`metrics.TOP_SHARE`).
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rules measured against a reference on one network, batch and parameters.

    Attributes:
        rules: names, the reference first.
        gram: parameter path -> [rules, rules] inner products of the rules' gradients, float64. Any inner-product metric
            between any pair of rules follows from it.
        squared_error: parameter path -> [rules], ||g - reference||^2 (not from the Gram matrix, where it would cancel).
        signs: parameter path -> [rules, 2], entries that agree in sign with the reference, entries that count.
        tops: parameter path -> [rules, 2], of the largest entries those that are the reference's too, and how many they
            are.
        sizes: parameter path -> number of entries.
        health: what `gl.evaluate` gives on the same batch.
        refusals: rules left out -> the sentence why.
    """

    rules: tuple[str, ...]
    gram: Mapping[str, np.ndarray]
    squared_error: Mapping[str, np.ndarray]
    signs: Mapping[str, np.ndarray]
    tops: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]
    health: Mapping[str, Any]
    refusals: Mapping[str, str]

    @classmethod
    def build(
        cls, net: Network, gradients: Mapping[str, Any], health: Mapping[str, Any], refusals: Mapping[str, str]
    ) -> Comparison:
        """Reduce gradients {rule name: pytree of NumPy arrays}, the reference first."""
        rules = tuple(gradients)
        flat = {rule: by_parameter(tree) for rule, tree in gradients.items()}
        gram, error, signs, tops, sizes = {}, {}, {}, {}, {}
        for path, reference in flat[rules[0]].items():
            rows = np.stack([flat[rule][path] for rule in rules])
            with np.errstate(invalid="ignore", over="ignore"):  # infinite gradients: `flag` says so
                gram[path] = rows @ rows.T
                error[path] = np.sum((rows - reference) ** 2, axis=1)
            signs[path] = np.array([metrics.sign_counts(row, reference) for row in rows])
            tops[path] = _top_counts(rows)
            sizes[path] = reference.size
        return cls(rules, gram, error, signs, tops, sizes, dict(health), dict(refusals))

    @property
    def reference(self) -> str:
        return self.rules[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have parameters."""
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.gram))

    def paths(self, group: str) -> list[str]:
        """The parameter paths of "network", a layer or a single parameter."""
        chosen = [p for p in self.gram if group == NETWORK or p == group or p.startswith(group + "/")]
        if not chosen:
            raise KeyError(f"{group!r} is no part of the network; there are {[NETWORK, *self.layers, *self.gram]}")
        return chosen

    def gram_of(self, group: str = NETWORK) -> np.ndarray:
        """[rules, rules] inner products over the whole network, a layer or one parameter."""
        return np.sum([self.gram[path] for path in self.paths(group)], axis=0)

    def cosines(self, group: str = NETWORK) -> np.ndarray:
        """[rules, rules] cosines between all pairs; NaN where a gradient is zero."""
        gram = self.gram_of(group)
        norms = np.sqrt(np.diag(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(np.outer(norms, norms) > 0, gram / np.outer(norms, norms), np.nan)

    def dead_layers(self) -> dict[str, str]:
        """Layer -> why it has no direction: silent (no unit fired) or saturated (every unit fired in every step)."""
        reasons = {}
        for layer, share in self.health.get("silent_units", {}).items():
            if share == 1.0:
                reasons[layer] = f"{layer} is silent: no unit fired on this batch"
        for layer, share in self.health.get("saturated_units", {}).items():
            if share == 1.0:
                reasons[layer] = f"{layer} is saturated: every unit fired at every step of this batch"
        return reasons

    def flag(self, rule: str, group: str) -> str:
        """Why metrics of direction have no value for this rule and group; "" where they have one."""
        dead = self.dead_layers()
        layers = {path.split("/")[0] for path in self.paths(group)}
        if reasons := [dead[layer] for layer in sorted(layers & set(dead))]:
            return "; ".join(reasons)
        squares = np.diag(self.gram_of(group))
        for name, square in ((self.reference, squares[0]), (rule, squares[self.rules.index(rule)])):
            if not np.isfinite(square):
                return f"the gradient of {name} is not finite"
            if square == 0:
                return f"the gradient of {name} is zero"
        return ""

    def metrics(self, rule: str, group: str = NETWORK) -> dict[str, float]:
        """All metrics of one rule for the whole network, a layer or one parameter; NaN where `flag` says why."""
        index, gram, paths = self.rules.index(rule), self.gram_of(group), self.paths(group)
        found = {"norm": float(np.sqrt(gram[index, index]))}
        if self.flag(rule, group):
            return {name: found.get(name, float("nan")) for name in METRICS}
        found |= {name: float(values[index]) for name, values in metrics.from_gram(gram).items()}
        agree, counted = np.sum([self.signs[path][index] for path in paths], axis=0)
        shared, kept = np.sum([self.tops[path][index] for path in paths], axis=0)
        error = np.sum([self.squared_error[path][index] for path in paths])
        found |= {
            "relative_error": float(np.sqrt(error / gram[0, 0])),
            "sign_agreement": float(agree / counted),
            "sign_coverage": float(counted / sum(self.sizes[path] for path in paths)),
            "top_overlap": float(shared / kept) if kept else float("nan"),
        }
        return {name: found[name] for name in METRICS}

    def pair(self, rule: str, other: str, group: str = NETWORK) -> dict[str, float]:
        """What follows from inner products (`metrics.GRAM_METRICS`) of any rule against any other, `other` being the
        one that is measured against; NaN where `flag` of either says why.
        """
        gram = self.gram_of(group)
        if self.flag(rule, group) or self.flag(other, group):
            return dict.fromkeys(metrics.GRAM_METRICS, float("nan"))
        values = metrics.from_gram(gram, self.rules.index(other))
        return {name: float(value[self.rules.index(rule)]) for name, value in values.items()}

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer ("network", "layer_0", "layer_0/connection/kernel", ...), metric, value, flag."""
        import pandas as pd

        rows = []
        for group in (NETWORK, *self.layers, *self.gram):
            for rule in self.rules:
                flag = self.flag(rule, group)
                for metric, value in self.metrics(rule, group).items():
                    rows.append((rule, group, metric, value, "" if metric == "norm" else flag))
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "flag"])

    def plot(self, metric: str = "cosine", ax: Any = None) -> Any:
        """A map of one metric per rule and layer, undefined values hatched; returns the Axes."""
        from gradlab.report import plots

        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: choose from {METRICS}")
        frame = self.to_frame()
        frame = frame[frame["layer"].isin([NETWORK, *self.layers]) & (frame["rule"] != self.reference)]
        frame = frame.rename(columns={"value": "mean"}).assign(n_undefined=0, step=0)
        ax = plots.rule_layer_map(frame, metric, ax=ax, reference=self.reference)
        # One batch, no training: of the map's title only the note on undefined values holds.
        ax.set_title(ax.get_title(loc="left").removeprefix("at training step 0").lstrip(", "), loc="left")
        return ax

    def _repr_html_(self) -> str:
        groups = (NETWORK, *self.layers)
        shown = ("cosine", "norm_ratio", "relative_error")
        head = "".join(f"<th>{html.escape(group)} {metric}</th>" for group in groups for metric in shown)
        body = ""
        for rule in self.rules:
            cells = [self.metrics(rule, group)[metric] for group in groups for metric in shown]
            titles = [self.flag(rule, group) for group in groups for _ in shown]
            row = "".join(
                f'<td title="{html.escape(t)}">{"undefined" if np.isnan(v) else f"{v:.3f}"}</td>'
                for v, t in zip(cells, titles, strict=True)
            )
            body += f"<tr><th>{html.escape(rule)}</th>{row}</tr>"
        notes = "".join(f"<p>{html.escape(n)}: {html.escape(r)}</p>" for n, r in self.refusals.items())
        return f"<table><tr><th>rule (against {html.escape(self.reference)})</th>{head}</tr>{body}</table>{notes}"


def _top_counts(rows: np.ndarray) -> np.ndarray:
    """[rules, 2]: how many of the first row's largest entries are among those of each row, and how many they are."""
    k = max(1, round(metrics.TOP_SHARE * rows.shape[1]))
    return np.array([metrics.top_counts(row, rows[0], k) for row in rows])
