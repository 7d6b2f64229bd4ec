"""What `network_health` returns, and what may be wrong with a network, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LayerHealth", "NetworkHealth"]

MANY = 0.25
"""Share of silent or of saturated units from which on the layer is named."""
BUSY = 0.6
"""Firing rate above which the layer is named."""
VANISHED, EXPLODED = 1e-4, 1e4
"""Ratios of the error's flow (a layer to the output layer; early steps to others) that are named."""
CLOSED = 0.01
"""Share of open unit-steps below which the layer is named."""

_NO_SPIKES = "the layer does not spike"
_UNCOUNTED = "no sample counts at this step"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerHealth:
    """One layer on one batch. What is about spikes is None for a layer that does not spike.

    Attributes:
        flow: [time], ||delta_t|| of BPTT over batch and units.
        gradient: norm of BPTT's gradient of the layer's parameters.
        rates: [units], mean output per step that counts.
        silent, saturated: shares of units that fire in no step, or in every step, that counts.
        rate_per_step: [time], mean output over units and the samples that count; NaN where none does.
        slope: mean surrogate slope ds/dI.
        peak: the largest |slope| of a unit in a step that counts.
        open: share of unit-steps that count with |slope| > 0.01 peak: where an error can pass through the spike.
    """

    flow: np.ndarray
    gradient: float
    rates: np.ndarray | None
    silent: float | None
    saturated: float | None
    rate_per_step: np.ndarray | None
    slope: float | None
    open: float | None
    peak: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkHealth:
    """Every layer's health, and what may be wrong.

    Attributes:
        layers: {layer: LayerHealth}, first to last.
        counted: [time], how many samples count at each step.
    """

    layers: Mapping[str, LayerHealth]
    counted: np.ndarray

    def advice(self) -> tuple[str, ...]:
        """Suggested causes with ways out, one sentence each; empty where nothing stands out.

        Limits: a quarter of the units silent or saturated; a firing rate above 0.6; less than 1 % of unit-steps with
        an open slope; an error 1e4 times smaller or larger than the output layer's, or 1e4 times smaller in the first
        tenth of the steps than its largest, or larger than in the last tenth. They are rules of thumb: a network beyond
        them may still learn.
        """
        found = []
        for name, layer in self.layers.items():
            found += [f"{name}: {text}" for text in (*_of_spikes(layer), *self._of_flow(name, layer))]
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule (empty), layer, metric, value, flag, unit, step.

        Metrics: "silent_units", "saturated_units", "firing_rate", "slope", "open_slopes", "peak_slope", "gradient_norm"
        of each layer; "unit_rate" per unit; "step_rate" and "error_flow" per step. `unit` and `step` are missing (<NA>)
        where a number is not of one unit or step.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for name, layer in self.layers.items():
            rates = layer.rates
            whole = {
                "firing_rate": None if rates is None else float(rates.mean()), "silent_units": layer.silent,
                "saturated_units": layer.saturated, "slope": layer.slope, "open_slopes": layer.open,
                "peak_slope": layer.peak, "gradient_norm": layer.gradient,
            }  # fmt: skip
            rows += [(name, metric, *_value(value, _NO_SPIKES), None, None) for metric, value in whole.items()]
            rows += [(name, "unit_rate", *_value(r), i, None) for i, r in enumerate(() if rates is None else rates)]
            steps = () if layer.rate_per_step is None else layer.rate_per_step
            rows += [(name, "step_rate", *_value(r, _UNCOUNTED), None, t) for t, r in enumerate(steps)]
            rows += [(name, "error_flow", *_value(e), None, t) for t, e in enumerate(layer.flow)]
        frame = pd.DataFrame(rows, columns=["layer", "metric", "value", "flag", "unit", "step"])
        frame.insert(0, "rule", "")
        return frame.astype({"value": float, "unit": "Int64", "step": "Int64"})

    def plot(self, ax: Any = None, kind: str = "rates") -> Any:
        """Firing rates of the units ("rates"), or the error's flow per layer and step ("flow"); returns the Axes."""
        from gradlab.report import plots_health

        return plots_health.draw(self.to_frame(), ax, kind=kind)

    def _of_flow(self, name: str, layer: LayerHealth) -> list[str]:
        output = list(self.layers.values())[-1]
        if not np.isfinite(layer.flow).all():
            return [
                "its error is not finite: lower the learning rate, clip gradients, or use a wider or lower surrogate"
            ]
        if not layer.flow.any():
            return ["no error reaches it: every path from the loss has slope zero or weight zero"]
        found = []
        strength = float(np.linalg.norm(layer.flow) / np.linalg.norm(output.flow)) if output.flow.any() else 1.0
        depth = f"its error is {strength:.1e} times that of the output layer"
        if strength < VANISHED:
            found.append(
                f"{depth} (vanishing with depth): use a wider surrogate (a smaller slope parameter), larger weights "
                "above it, or fewer layers"
            )
        if strength > EXPLODED:
            found.append(f"{depth} (exploding with depth): use a lower surrogate, or smaller weights above it")
        # After the last step that counts no error can arise.
        flow = layer.flow[: int(np.flatnonzero(self.counted)[-1]) + 1] if self.counted.any() else layer.flow
        tenth = -(-len(flow) // 10)
        early, late = float(flow[:tenth].max()), float(flow[-tenth:].max())
        time = f"its error in the first tenth of the steps is {early / flow.max():.1e} times the largest"
        if early < VANISHED * flow.max():
            found.append(
                f"{time} (vanishing over time): use a slower leak (larger beta), a loss at every step, or shorter "
                "sequences"
            )
        if 0 < late * EXPLODED < early:
            found.append(
                f"its error in the first tenth of the steps is {early / late:.1e} times that in the last (exploding "
                "over time): use smaller recurrent weights, a detached reset, a lower surrogate, or truncated "
                "backpropagation"
            )
        return found


def _of_spikes(layer: LayerHealth) -> list[str]:
    if layer.rates is None or layer.silent is None or layer.saturated is None or layer.open is None:
        return []
    found = []
    if layer.silent == 1.0:
        found.append("no unit fires: raise its input weights, lower its threshold, or use a slower leak (larger beta)")
    elif layer.silent >= MANY:
        found.append(f"{layer.silent:.0%} of its units never fire: raise its input weights or lower its threshold")
    if layer.saturated >= MANY:
        found.append(
            f"{layer.saturated:.0%} of its units fire at every step: lower its input weights or biases, or raise its "
            "threshold"
        )
    elif layer.rates.mean() > BUSY:
        found.append(
            f"it fires on {layer.rates.mean():.0%} of its steps: lower its input weights or raise its threshold"
        )
    if layer.peak == 0:
        found.append("the slope of its surrogate is zero at every step: use a wider surrogate")
    elif layer.open < CLOSED:
        found.append(
            f"only {layer.open:.1%} of its unit-steps have a slope above 1 % of the largest: use a wider surrogate (a "
            "smaller slope parameter)"
        )
    return found


def _value(value: Any, reason: str = "the value is not finite") -> tuple[float, str]:
    return (float(value), "") if value is not None and np.isfinite(value) else (np.nan, reason)
