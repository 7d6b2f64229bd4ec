"""Analyses of gradients, training and networks: why a gradient is off, whether it matters, and how sure one can be.

Each computes an object that shows itself: `.to_frame()` gives a tidy frame, `.plot(ax=...)` draws it. The functions can be
called from here, `gl.analysis.attribute(...)`; each module's docstring has the equations.
"""

import importlib
from typing import Any

_FUNCTIONS = {
    "attribute": "attribution",
    "lag_profile": "lags",
    "over_time": "timeline",
    "update_alignment": "alignment",
}
"""Functions that can be called from here -> their modules."""

_MODULES = ("alignment", "attribution", "lags", "landscape", "similarity", "timeline")

__all__ = [*_FUNCTIONS, *_MODULES]  # noqa: PLE0604  names are found by __getattr__


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing gradlab does not pay for pandas and scipy.
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
