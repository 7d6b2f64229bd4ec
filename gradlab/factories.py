"""Initialisers and optimisers that can be written down: a name and keyword arguments instead of a closure.

`flax.linen.initializers.normal(0.1)` is a closure. It prints like `normal(5.0)`, it cannot be stored, and two
equal ones are not equal. The identity of a study is its text, so a study says `Initializer("normal",
stddev=0.1)`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

__all__ = ["Initializer", "Optimizer"]

_PLAIN_INITIALIZERS = ("ones", "zeros")
_INITIALIZERS = (
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    *_PLAIN_INITIALIZERS,
)


class _Named:
    """A name and keyword arguments: equal, hashable, printable and never changed."""

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **arguments: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "arguments", tuple(sorted(arguments.items())))
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def canonical_fields(self) -> dict[str, Any]:
        """Return the keyword arguments that build an equal object (what a study's specification stores)."""
        return {"name": self.name, **dict(self.arguments)}

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: build a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: build a new one instead of deleting {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Named) or type(self) is not type(other):
            return NotImplemented
        return self.name == other.name and self.arguments == other.arguments

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.name, self.arguments))

    def __repr__(self) -> str:
        shown = [repr(self.name), *(f"{key}={value!r}" for key, value in self.arguments)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.canonical_fields())


def _rebuild(cls: Callable[..., Any], fields: dict[str, Any]) -> Any:
    return cls(**fields)


class Initializer(_Named):
    """A weight initialiser by name, for use as `kernel_init` or `bias_init` of a Flax module.

    Args:
        name: the name of an initialiser in `jax.nn.initializers`, such as "lecun_normal", "normal" or
            "zeros".
        **arguments: its keyword arguments, such as `stddev=0.1`.

    Raises:
        ValueError: the name is not known (the message lists near matches) or the arguments do not fit it.

    Example:
        >>> Initializer("normal", stddev=0.1)
        Initializer('normal', stddev=0.1)
    """

    def _check(self) -> None:
        _require_known("initialiser", self.name, _INITIALIZERS)
        self._function()

    def _function(self) -> Callable[..., jax.Array]:
        function = getattr(jax.nn.initializers, self.name)
        if self.name in _PLAIN_INITIALIZERS:
            if self.arguments:
                raise ValueError(f"{self!r}: {self.name!r} takes no arguments.")
            return function
        return _call("Initializer", self, function)

    def __call__(self, key: jax.Array, shape: Iterable[int], dtype: Any = jnp.float32) -> jax.Array:
        """Draw an array.

        Args:
            key: a JAX random key.
            shape: the shape of the array, for a dense kernel (inputs, outputs).
            dtype: the type of its entries.

        Returns:
            An array of that shape and type.
        """
        return self._function()(key, tuple(shape), dtype)


class Optimizer(_Named):
    """An optimiser of optax by name.

    Args:
        name: the name of a function of optax that has a `learning_rate`, such as "adamax" or "sgd".
        **arguments: its keyword arguments, such as `learning_rate=1e-3`.

    Raises:
        ValueError: the name is not known (the message lists near matches) or the arguments do not fit it.

    Example:
        >>> Optimizer("adamax", learning_rate=0.001)
        Optimizer('adamax', learning_rate=0.001)
    """

    def _check(self) -> None:
        _require_known("optimiser", self.name, _optimizer_names())
        self.build()

    def build(self) -> optax.GradientTransformation:
        """Return the optax transformation."""
        return _call("Optimizer", self, getattr(optax, self.name))


def _optimizer_names() -> tuple[str, ...]:
    """Return the functions of optax that take a learning rate and return a transformation."""
    found = []
    for name in dir(optax):
        function = getattr(optax, name)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if "learning_rate" in inspect.signature(function).parameters:
            found.append(name)
    return tuple(found)


def _call(kind: str, named: _Named, function: Callable[..., Any]) -> Any:
    try:
        return function(**dict(named.arguments))
    except TypeError as error:
        expected = ", ".join(inspect.signature(function).parameters)
        raise ValueError(f"{named!r}: {error}. {kind} {named.name!r} takes: {expected}.") from error


def _require_known(kind: str, name: object, known: Iterable[str]) -> None:
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(names)}."
    raise ValueError(f"There is no {kind} called {name!r}. {hint}")
