"""Analysis of stored results: intervals over seeds, and loss landscapes with the paths that training took."""

import importlib
from typing import Any

__all__ = ["landscape", "similarity"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing gradlab does not pay for pandas.
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
