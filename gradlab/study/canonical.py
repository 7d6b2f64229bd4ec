"""Canonical JSON: one text for one specification, in every process and on every machine.

The identity of a study is the SHA-256 of this text: never `hash` (which differs between processes), `repr`
(two different Flax initialisers print alike) or pickle (which stores code and can run it). What is written:

| value                                | text |
|--------------------------------------|---|
| None, bool, int, float, str          | themselves; floats by the shortest exact decimal; 1 is not 1.0 |
| infinite or undefined float          | {"float": "inf"} |
| list                                 | [...] |
| tuple                                | {"tuple": [...]} |
| dict                                 | {"dict": [[key, value], ...]}, sorted; keys may be numbers |
| dataclass or Flax Linen module       | {"type": import path, "fields": {...}} |
| function or class                    | {"function": import path}, which imports back the same object |
| functools.partial of such a function | {"partial": import path, "arguments": [...], "keywords": {...}} |
| type of array entries                | {"dtype": "float32"} |

Of a Flax module, fields that hold their default are left out (their defaults are closures); of any other
dataclass all fields are written, so that a changed default in a later version of the library is a different
specification.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

__all__ = ["CanonicalError", "decode", "dumps", "encode", "identity", "import_path", "loads"]

# Where to look first for functions whose own module is private.
_PUBLIC_MODULES = ("flax.linen", "optax", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.lax")
_LINEN_INTERNAL = ("parent", "name")


class CanonicalError(ValueError):
    """A value that cannot be written as canonical JSON, or text that cannot be read back."""


def dumps(value: Any, where: str = "specification") -> str:
    """Return the canonical text of a value.

    Args:
        value: what to write.
        where: what to call it in an error message.

    Raises:
        CanonicalError: something in it, named by its place, has no canonical form.
    """
    return json.dumps(encode(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(text: str) -> Any:
    """Return the value that a canonical text describes (any layout of white space is accepted).

    Raises:
        CanonicalError: the text is not JSON, or names something that cannot be imported.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise CanonicalError(f"The specification is not valid JSON: {error}.") from error
    return decode(data)


def identity(text: str) -> str:
    """Return the SHA-256, in hexadecimal, of a specification's text without its white space."""
    compact = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(compact.encode()).hexdigest()


def encode(value: Any, where: str = "specification") -> Any:
    """Return the plain JSON data of a value (None, bool, int, float, str, list, dict): the module's table."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        _refuse_named_tuple(value, where)
        return {"tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [[encode(key, f"a key of {where}"), encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {"dict": sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))}
    if hasattr(value, "canonical_fields") and not isinstance(value, type):
        return _typed(value, value.canonical_fields(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _typed(value, _fields(value, where), where)
    return _encode_other(value, where)


def _encode_other(value: Any, where: str) -> Any:
    dtype = _dtype_name(value)
    if dtype is not None:
        return {"dtype": dtype}
    if isinstance(value, functools.partial):
        return {
            "partial": import_path(value.func, where),
            "arguments": [encode(item, f"{where}.args[{i}]") for i, item in enumerate(value.args)],
            "keywords": {key: encode(item, f"{where}.{key}") for key, item in value.keywords.items()},
        }
    if callable(value):
        return {"function": import_path(value, where)}
    raise CanonicalError(
        f"{where} is a {type(value).__name__}, which has no canonical form. Use numbers, text, tuples, "
        "dictionaries, dataclasses, Flax modules or functions that can be imported, and tuples for arrays."
    )


def _refuse_named_tuple(value: tuple[Any, ...], where: str) -> None:
    if type(value) is not tuple:
        raise CanonicalError(f"{where} is a {type(value).__name__}: use a plain tuple or a frozen dataclass.")


def _typed(value: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    path = import_path(type(value), where)
    return {"type": path, "fields": {name: encode(item, f"{where}.{name}") for name, item in fields.items()}}


def _fields(value: Any, where: str) -> dict[str, Any]:
    """Return the fields to write: those that the constructor takes, without defaults that need no writing."""
    linen = isinstance(value, nn.Module)
    kept = {}
    for field in dataclasses.fields(value):
        if not field.init or (linen and field.name in _LINEN_INTERNAL):
            continue
        item = getattr(value, field.name)
        if linen and _is_default(field, item) and not _worth_writing(value, item):
            continue
        kept[field.name] = item
    return kept


def _worth_writing(module: nn.Module, item: Any) -> bool:
    """Say whether a default is written all the same: in a module that is not Flax's own, if it has a
    canonical form.

    A later version may change the default of its own module, and the text must then still mean the old value.
    """
    if type(module).__module__.partition(".")[0] == "flax":
        return False
    try:
        encode(item)
    except CanonicalError:
        return False
    return True


def _is_default(field: dataclasses.Field[Any], item: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return False
    if item is default:
        return True
    return type(item) is type(default) and not callable(item) and bool(np.all(item == default))


def _dtype_name(value: Any) -> str | None:
    """Return the name of a type of array entries (`jnp.float32`, `np.dtype("float32")`), else None."""
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, type) and issubclass(value, np.generic):
        return np.dtype(value).name
    # jnp.float32 and its like are neither: they are callables with a dtype.
    dtype = getattr(value, "dtype", None)
    known = getattr(jnp, str(getattr(value, "__name__", "")), None) is value
    return dtype.name if known and isinstance(dtype, np.dtype) else None


def _find_path(value: Any) -> str | None:
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if not isinstance(name, str) or not isinstance(module, str) or "<" in name or module == "__main__":
        return None
    parts = module.split(".")
    shorter = [".".join(parts[: i + 1]) for i in range(len(parts))]
    places = [place for place in shorter if not any(part.startswith("_") for part in place.split("."))]
    for place in [*places, *_PUBLIC_MODULES, *shorter]:
        path = f"{place}.{name}"
        try:
            if _import(path) is value:
                return path
        except (ImportError, AttributeError):
            continue
    return None


def import_path(value: Any, where: str = "value") -> str:
    """Return the shortest public path at which a function or class imports back to the same object.

    Raises:
        CanonicalError: there is none (a lambda, a closure, something defined in a script or inside a
        function).
    """
    path = _find_path(value)
    if path is None:
        raise CanonicalError(
            f"{where} is {value!r}, which cannot be imported by name: lambdas, functions made inside "
            "functions, and things defined in the script that is being run mean nothing to another process. "
            "Define it at the top of a module; use gl.Initializer or gl.Optimizer for initialisers and "
            "optimisers, and functools.partial for options."
        )
    return path


def _import(path: str) -> Any:
    """Import `package.module.Class.attribute`, whose module is the longest part that imports as one."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module.startswith(error.name):
                continue
            raise
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"No module named {parts[0]!r}", name=parts[0])


def decode(data: Any) -> Any:
    """Return the value that the plain JSON data describes: the inverse of `encode`.

    Raises:
        CanonicalError: something that the data name cannot be imported, or does not accept the stored fields.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    kind = next((key for key in _DECODERS if key in data), None)
    if kind is None:
        raise CanonicalError(f"Not a canonical form: an object with the keys {sorted(data)}.")
    return _DECODERS[kind](data)


def _decode_type(data: dict[str, Any]) -> Any:
    cls = _import_or_explain(data["type"])
    if not isinstance(cls, type) or not (dataclasses.is_dataclass(cls) or hasattr(cls, "canonical_fields")):
        raise CanonicalError(f"{data['type']} is not a dataclass, so it cannot be part of a specification.")
    fields = {name: decode(item) for name, item in data["fields"].items()}
    try:
        return cls(**fields)
    except TypeError as error:
        raise CanonicalError(f"{data['type']} does not accept the stored fields {sorted(fields)}: {error}") from error


def _decode_partial(data: dict[str, Any]) -> Any:
    function = _import_or_explain(data["partial"])
    keywords = {name: decode(item) for name, item in data["keywords"].items()}
    return functools.partial(function, *(decode(item) for item in data["arguments"]), **keywords)


def _import_or_explain(path: str) -> Any:
    try:
        return _import(path)
    except (ImportError, AttributeError) as error:
        raise CanonicalError(
            f"The specification names {path}, which cannot be imported here ({error}). Install the package "
            "that holds it, or put the folder of its module on PYTHONPATH."
        ) from error


_DECODERS = {
    "type": _decode_type,
    "function": lambda data: _import_or_explain(data["function"]),
    "partial": _decode_partial,
    "tuple": lambda data: tuple(decode(item) for item in data["tuple"]),
    "dict": lambda data: {decode(key): decode(item) for key, item in data["dict"]},
    "dtype": lambda data: getattr(jnp, data["dtype"]),
    "float": lambda data: float(data["float"]),
}
