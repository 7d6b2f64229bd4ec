"""What `estimator_noise` returns: sums per rule and parameter, from which every metric of a group follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "EstimatorNoise"]

METRICS = (
    "rule_variance", "data_variance", "total_variance", "mean_norm_square", "bias_square", "bias", "bias_noise",
    "relative_bias", "relative_rule_noise", "relative_data_noise", "signal_to_noise", "noise_scale", "gsnr",
    "gsnr_coverage", "cosine_of_mean_gradients", "mean_of_cosines", "sd_of_cosines", "undefined_cosines",
)  # fmt: skip
"""Names of the metrics in a frame."""

_DIRECTIONLESS = (*METRICS[:7], "gsnr_coverage", "undefined_cosines")
NETWORK = "network"
NEGATIVE = "negative: smaller than the scatter of its own estimate"


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatorNoise:
    """Bias and variance of each rule's gradient; the equations are those of `gradlab.analysis.noise`.

    Metrics, for the network, a layer or one parameter (variances are traces: sums over its entries):
        rule_variance, data_variance, total_variance: (1), (2), (3).
        mean_norm_square: (5), unbiased ||E g||^2.
        bias_square, bias: (4) and its root; the root is undefined where the unbiased square is negative.
        bias_noise: sqrt(tr Var_i(d_i) / n), the length of mean_i d_i that noise alone would give.
        relative_bias, relative_rule_noise, relative_data_noise: bias, sqrt(rule_variance) and sqrt(data_variance)
            relative to ||E g*|| of the reference. Their squares add up to the expected squared distance of one
            gradient from E g*, relative to ||E g*||^2.
        signal_to_noise, noise_scale (samples): (6), (7).
        gsnr, gsnr_coverage: (8), and the share of entries that vary and so count in it.
        cosine_of_mean_gradients: of the means over all batches and draws, as they are.
        mean_of_cosines, sd_of_cosines: over batches and draws, of single gradients with the reference's on the same
            batch; `undefined_cosines` is the share of them that is left out because a gradient is zero.

    Attributes:
        rules: names, the reference first.
        draws: {rule: draws per batch}; 1 for a deterministic rule.
        n_batches, batch_size: n and B.
        sizes: {parameter path: number of entries}.
        terms: {sum: [rules, paths]}, float64; all metrics but the cosines follow from them.
        products: {rule: [n, 3, draws, paths]}: <g_ij, g*_i>, ||g_ij||^2, ||g*_i||^2.
        dead: per batch {layer: "silent" or "saturated"}.
    """

    rules: tuple[str, ...]
    draws: Mapping[str, int]
    n_batches: int
    batch_size: int
    sizes: Mapping[str, int]
    terms: Mapping[str, np.ndarray]
    products: Mapping[str, np.ndarray]
    dead: tuple[Mapping[str, str], ...]

    @property
    def reference(self) -> str:
        return self.rules[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have parameters."""
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.sizes))

    def metrics(self, rule: str, group: str = NETWORK) -> dict[str, float]:
        """All metrics of one rule for the network, a layer or one parameter; NaN where `flags` says why."""
        return {name: value for name, (value, _) in self._found(rule, group).items()}

    def flags(self, rule: str, group: str = NETWORK) -> dict[str, str]:
        """{metric: why it has no value, or ""}."""
        return {name: flag for name, (_, flag) in self._found(rule, group).items()}

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer ("network", "layer_0", "layer_0/connection/kernel"), metric, value, flag, note.

        `note` says of a value that is defined what to know about it: an unbiased variance may be negative.
        """
        import pandas as pd

        rows = []
        for group in (NETWORK, *self.layers, *self.sizes):
            for rule in self.rules:
                for metric, (value, flag) in self._found(rule, group).items():
                    rows.append((rule, group, metric, value, flag, self._note(rule, metric, value)))
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "flag", "note"])

    def plot(self, ax: Any = None, layer: str = NETWORK) -> Any:
        """Bias, the rule's noise and the data's noise of every rule, relative to ||E g*||; returns the Axes."""
        from gradlab.report import plots_noise

        return plots_noise.draw(self.to_frame(), ax, layer=layer, reference=self.reference)

    def _note(self, rule: str, metric: str, value: float) -> str:
        if metric in ("data_variance", "total_variance", "mean_norm_square", "bias_square") and value < 0:
            return NEGATIVE
        if metric in ("rule_variance", "relative_rule_noise") and self.draws[rule] == 1:
            return "deterministic: all draws are equal"
        return ""

    def _chosen(self, group: str) -> list[int]:
        paths = list(self.sizes)
        chosen = [i for i, p in enumerate(paths) if group == NETWORK or p == group or p.startswith(group + "/")]
        if not chosen:
            raise KeyError(f"{group!r} is no part of the network; there are {[NETWORK, *self.layers, *paths]}")
        return chosen

    def _found(self, rule: str, group: str) -> dict[str, tuple[float, str]]:
        if rule not in self.rules:
            raise KeyError(f"{rule!r} was not measured; there are {', '.join(self.rules)}")
        chosen = self._chosen(group)
        own, target = self._sums(rule, chosen), self._sums(self.reference, chosen)
        if not np.isfinite([*own.values(), *target.values()]).all():
            return dict.fromkeys(METRICS, (np.nan, f"a gradient of {rule} or {self.reference} is not finite"))
        found = self._sizes_of_noise(own) | self._relative(own, target) | self._cosines(rule, own, target, chosen)
        if reason := self._dead_layers(group):
            found |= {name: (np.nan, reason) for name in METRICS if name not in _DIRECTIONLESS}
        return {name: found[name] for name in METRICS}

    def _sums(self, rule: str, chosen: list[int]) -> dict[str, float]:
        """The sums over a group, with equations (2), (3), (4) and (5)."""
        row, n = self.rules.index(rule), self.n_batches
        own = {name: float(values[row, chosen].sum()) for name, values in self.terms.items()}
        own["data_variance"] = own["batch_variance"] - own["rule_variance"] / self.draws[rule]
        own["total_variance"] = own["data_variance"] + own["rule_variance"]
        own["bias_square"] = own["gap_square"] - own["gap_variance"] / n
        own["bias_noise"] = float(np.sqrt(own["gap_variance"] / n))
        own["mean_norm_square"] = own["square_of_mean"] - own["batch_variance"] / n
        own["size"] = float(sum(size for i, size in enumerate(self.sizes.values()) if i in chosen))
        return own

    def _sizes_of_noise(self, own: dict[str, float]) -> dict[str, tuple[float, str]]:
        known = ("rule_variance", "data_variance", "total_variance", "mean_norm_square", "bias_square", "bias_noise")
        found = {name: (own[name], "") for name in known}
        found["bias"] = _root(own["bias_square"], "the unbiased squared bias")
        signal, noise = own["mean_norm_square"], own["total_variance"]
        none = f"the gradient is the same on all {self.n_batches} batches: there is no noise"
        lost = f"the unbiased ||E g||^2 is not positive: no signal among the noise of {self.n_batches} batches"
        reason = none if noise == 0 else lost if signal <= 0 else "the variance is negative" if noise < 0 else ""
        found["signal_to_noise"] = (np.nan, reason) if reason else (float(np.sqrt(signal / noise)), "")
        # Without noise the scale is zero, which is a value; the ratio above would be infinite.
        quiet = noise == 0 and signal > 0
        scale = 0.0 if quiet else np.nan if reason else self.batch_size * noise / signal
        found["noise_scale"] = scale, "" if quiet else reason
        found["gsnr_coverage"] = own["varies"] / own["size"], ""
        few = f"{self.n_batches} batches: the ratio of each parameter needs four" if self.n_batches < 4 else ""
        reason = few or ("" if own["varies"] else none)
        found["gsnr"] = (np.nan, reason) if reason else (own["gsnr"] / own["varies"], "")
        return found

    def _relative(self, own: dict[str, float], target: dict[str, float]) -> dict[str, tuple[float, str]]:
        found, unit = {}, target["mean_norm_square"]
        lost = f"the unbiased ||E g||^2 of {self.reference} is not positive: no unit to measure in"
        squares = (
            ("bias", "bias_square", "squared bias"),
            ("rule_noise", "rule_variance", "variance of the rule"),
            ("data_noise", "data_variance", "variance of the data"),
        )
        for name, square, words in squares:
            value, reason = _root(own[square], f"the unbiased {words}")
            reason = reason or (lost if unit <= 0 else "")
            found[f"relative_{name}"] = (np.nan if reason else value / float(np.sqrt(unit)), reason)
        return found

    def _cosines(
        self, rule: str, own: dict[str, float], target: dict[str, float], chosen: list[int]
    ) -> dict[str, tuple[float, str]]:
        inner, square, reference = np.moveaxis(self.products[rule][..., chosen].sum(-1), 1, 0)
        defined = (square > 0) & (reference > 0)
        # One root after the other: the product of two tiny squares would underflow.
        single = inner[defined] / np.sqrt(square[defined]) / np.sqrt(reference[defined])
        none = "a gradient is zero in every draw" if not single.size else ""
        few = "fewer than two cosines are defined" if single.size < 2 else ""
        zero = [name for name, sums in ((rule, own), (self.reference, target)) if sums["square_of_mean"] == 0]
        of_mean = np.nan if zero else own["cross"] / np.sqrt(own["square_of_mean"]) / np.sqrt(target["square_of_mean"])
        return {
            "cosine_of_mean_gradients": (of_mean, f"the mean gradient of {zero[0]} is zero" if zero else ""),
            "mean_of_cosines": (np.nan if none else float(single.mean()), none),
            "sd_of_cosines": (np.nan if few else float(single.std(ddof=1)), none or few),
            "undefined_cosines": (float(1 - defined.mean()), ""),
        }

    def _dead_layers(self, group: str) -> str:
        layers = self.layers if group == NETWORK else (group.split("/")[0],)
        reasons = []
        for layer in layers:
            for word in ("silent", "saturated"):
                count = sum(batch.get(layer) == word for batch in self.dead)
                if count:
                    reasons.append(f"{layer} is {word} on {count} of {self.n_batches} batches")
        return "; ".join(reasons)


def _root(square: float, what: str) -> tuple[float, str]:
    if square < 0:
        return np.nan, f"{what} is negative: nothing is seen above the scatter of this estimate, give more batches"
    return float(np.sqrt(square)), ""
