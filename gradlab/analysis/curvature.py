"""Curvature of the loss: along rules' gradients, and the door to everything that is computed from products H v.

The definitions, and why a spiking network has two second derivatives, are in `gradlab.analysis.hessian`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab.analysis.density import SpectralDensity, spectral_density
from gradlab.analysis.hessian import STEP, Derivative, Products, Trust, hessian_product
from gradlab.analysis.hessian_map import HessianMap, hessian_map
from gradlab.analysis.objective import LossOfParams, loss_function
from gradlab.analysis.spectrum import Eigenvalues, Trace, top_eigenvalues, trace, trust_rows
from gradlab.analysis.trees import Params, flat, layer_slices, require_same_shapes
from gradlab.groups import NETWORK

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CurvatureAlong", "Derivative", "Eigenvalues", "HessianMap", "Products", "SpectralDensity", "Trace", "Trust",
    "curvature_along", "hessian_map", "hessian_product", "loss_function", "spectral_density", "top_eigenvalues",
    "trace",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class CurvatureAlong:
    """What `curvature_along` found.

    Attributes:
        rules: names, in the order given.
        layers: "network", then the layers.
        values: [rules, layers], the curvature, equation (1); NaN where `flags` says why.
        measured: [rules, layers], that of the gradients on both sides, equation (2).
        flags: {(rule, layer): why there is no value}.
        derivative, trust: of `gradlab.analysis.hessian`.
    """

    rules: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray
    measured: np.ndarray
    flags: Mapping[tuple[str, str], str]
    derivative: Derivative
    trust: Trust

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, metric ("curvature", "measured_curvature"; without a rule "asymmetry" and
        "mismatch"), value, flag.
        """
        import pandas as pd  # loaded here: not needed to compute

        rows = [
            (rule, layer, metric, values[i, j], self.flags.get((rule, layer), ""))
            for metric, values in (("curvature", self.values), ("measured_curvature", self.measured))
            for i, rule in enumerate(self.rules)
            for j, layer in enumerate(self.layers)
        ]
        rows += trust_rows(self.trust)
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "flag"])

    def plot(self, ax: Any = None) -> Any:
        """Draw it (`gradlab.report.plots_curvature.curvature_along`); returns the matplotlib Axes."""
        from gradlab.report import plots_curvature  # loaded here: matplotlib is not needed to compute

        return plots_curvature.curvature_along(self.to_frame(), ax=ax)


def curvature_along(
    loss_of_params: LossOfParams,
    params: Params,
    directions: Mapping[str, Params],
    seed: int = 0,
    derivative: Derivative = "surrogate",
    step: float = STEP,
) -> CurvatureAlong:
    """The curvature of the loss along each rule's gradient, whole and layer by layer.

        (1)  curvature          = g^T H g / g^T g
        (2)  measured curvature = u^T [G(params + e u) - G(params - e u)] / (2 e),   u = g / ||g||

    with G the gradient of the loss and e = step * ||params||. Without spikes (2) tends to (1) for small steps. With
    them it also counts the jumps of G, which no second derivative sees, and even the sign of (1) may be another:
    believe (2). For a layer, g is the part of the gradient in that layer and zero elsewhere: the curvature met when
    only this layer moves.

    Args:
        loss_of_params: a function from parameters to a scalar; `loss_function(net, batch, loss)` makes one.
        params: the point.
        directions: {rule: gradient}, as `gl.gradients` gives them.
        seed: of the random vectors of `trust`.
        derivative: "surrogate" or "field", see `gradlab.analysis.hessian`; (1) is the same for a matrix and for its
            symmetric part.
        step: of equation (2) and of `trust`, as a share of the length of the parameters.

    Raises:
        ValueError: without directions, for one unlike the parameters, or a second derivative that is not finite.
    """
    if not directions:
        raise ValueError("no directions: give {rule: gradient}, for example gl.gradients(...)")
    for rule, gradient in directions.items():
        require_same_shapes(params, gradient, f"the gradient of {rule}")
    if not 0 < step < np.inf:
        raise ValueError(f"step={step!r}: give a positive share of the length of the parameters, 1e-3 for example")
    products = Products(loss_of_params, params, derivative)
    trust = products.trust(seed, step=step)
    parts = {NETWORK: slice(None), **layer_slices(products.params)}
    flags: dict[tuple[str, str], str] = {}
    found = np.full((2, len(directions), len(parts)), np.nan)
    for i, (rule, gradient) in enumerate(directions.items()):
        whole = flat(gradient)
        for j, (layer, where) in enumerate(parts.items()):
            g = np.zeros_like(whole)
            g[where] = whole[where]
            length = float(np.linalg.norm(g))
            if 0 < length < np.inf:
                unit = g / length
                found[:, i, j] = unit @ products.product(unit), unit @ products.measured(unit, step)
            else:
                flags[rule, layer] = f"the gradient of {rule} is {'zero' if length == 0 else 'not finite'}"
    return CurvatureAlong(tuple(directions), tuple(parts), found[0], found[1], flags, derivative, trust)
