"""The checks at the door: everything that must fit before a rule runs, in words."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params, fresh, require_sequence


def check(net: Network, params: Params, batch: Batch, loss: Loss) -> tuple[Params, Batch]:
    """Refuse what cannot be right: axes, widths, types, labels, NaN.

    Values are not looked at inside a compiled function, where they are not known.

    Returns:
        The parameters and the batch as JAX arrays.

    Raises:
        TypeError: batch or loss of another type.
        ValueError: parameters of another network, data that do not fit the network or each other, NaN.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch is a {type(batch).__name__}: give gl.Batch(inputs, targets, mask=None)")
    if not isinstance(loss, Loss):
        raise TypeError(f"loss is {loss!r}: wrap it, gl.PerStep(optax.softmax_cross_entropy)")
    require_sequence(batch.inputs)
    mask = None if batch.mask is None else jnp.asarray(batch.mask)
    batch = Batch(jnp.asarray(batch.inputs), jnp.asarray(batch.targets), mask)
    params = jax.tree.map(jnp.asarray, params)
    _check_params(net, params, batch)
    loss.check((*batch.inputs.shape[:2], *net.unit_shapes(params, batch.inputs)[-1]), batch)
    for name, value in (*batch._asdict().items(), ("parameters", params)):
        _check_finite(name, value)
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        _check_mask(mask)
    return params, batch


def _check_mask(mask: Array) -> None:
    with jax.ensure_compile_time_eval():
        plain = bool(((mask == 0) | (mask == 1)).all())
    if not plain:
        raise ValueError("mask holds other values than 0 and 1: it says which steps count, and is no weight")


def _check_params(net: Network, params: Params, batch: Batch) -> None:
    """Compare the parameters with those that `net.init` makes, in structure, shape and dtype."""
    if not isinstance(params, dict):
        raise ValueError(f"params are a {type(params).__name__}, not a dict: use net.init(key, inputs)")
    inputs = batch.inputs
    expected, found = _paths(_expected(net, inputs.shape[2:], inputs.dtype)), _paths(params)
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"params lack {missing[0]}, which the network has: use params = net.init(key, inputs)")
    if strange := sorted(set(found) - set(expected)):
        raise ValueError(
            f"params hold {strange[0]}, which the network does not have: use params = net.init(key, inputs)"
        )
    for path, leaf in expected.items():
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"parameter {path} has shape {found[path].shape}, but inputs of shape {inputs.shape}, read as [time, "
                f"batch, features...], need {leaf.shape}: are the axes in that order, and were the parameters made by "
                "net.init with inputs of this width?"
            )
        if found[path].dtype != leaf.dtype:
            raise ValueError(
                f"parameter {path} is {found[path].dtype}, but the inputs are {inputs.dtype}: cast one of them, for "
                f"example jax.tree.map(lambda p: p.astype({inputs.dtype.name!r}), params)"
            )


def _expected(net: Network, shape: tuple[int, ...], dtype: Any) -> Any:
    return (_cached_shapes if is_hashable(net) else _shapes)(net, shape, dtype)


def _shapes(net: Network, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.eval_shape(partial(fresh, net), jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), dtype))


_cached_shapes = lru_cache(maxsize=256)(_shapes)


def _paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_finite(name: str, value: Any) -> None:
    for path, leaf in _paths(value).items():
        if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        # Known values are looked at also while a caller's function is compiled.
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.isfinite(leaf).all())
        if not finite:
            where = f"{name} {path}" if path else name
            raise ValueError(
                f"{where}: NaN or infinite values; clean the data, or go back to parameters from before they appeared"
            )
