"""Analyses of gradients, training and networks: why a gradient is off, whether it matters, and how sure one can be.

Each computes an object that shows itself: `.to_frame()` gives a tidy frame, `.plot(ax=...)` draws it. The functions can
be called from here, `gl.analysis.attribute(...)`; each module's docstring has the equations.
"""

import importlib
from typing import Any

_FUNCTIONS = {
    "attribute": "attribution",
    "best_steps": "descent",
    "cka": "representation",
    "compare_representations": "representation",
    "curvature_along": "curvature",
    "descent_ratios": "descent",
    "directed_line": "lines",
    "directed_plane": "plane",
    "estimator_noise": "noise",
    "hessian_product": "hessian",
    "interpolation_plane": "plane",
    "lag_profile": "lags",
    "line_between": "lines",
    "line_profile": "lines",
    "loss_function": "objective",
    "network_health": "health",
    "over_time": "timeline",
    "pca_plane": "plane",
    "performance_profile": "statistics",
    "random_line": "lines",
    "random_plane": "plane",
    "spectral_density": "density",
    "summary_table": "statistics",
    "top_eigenvalues": "spectrum",
    "update_alignment": "alignment",
    "updates_to_target": "updates",
}
"""Functions that can be called from here -> their modules."""

_MODULES = (
    "alignment", "attribution", "between", "curvature", "density", "descent", "directions", "health", "hessian",
    "hessian_map", "lags", "landscape", "lines", "noise", "objective", "plane", "representation", "similarity",
    "spectrum", "statistics", "timeline", "updates",
)  # fmt: skip

__all__ = [*_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing gradlab does not pay for pandas and scipy.
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
