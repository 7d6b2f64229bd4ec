"""Reports: figures, tables and one self-contained HTML page. Nothing here computes a result."""

import importlib
from typing import Any

__all__ = ["animation", "html", "plots", "style", "tables"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing gradlab does not pay for matplotlib and pandas.
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
