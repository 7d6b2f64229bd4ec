"""Straight lines through the space of weights: rules' gradients as directions, and the true loss along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array

from gradlab import plan
from gradlab.analysis.trees import flat
from gradlab.checks import check
from gradlab.engine import gradients, with_reference
from gradlab.factories import Optimizer
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params
from gradlab.rules.base import Rule

ROUND_OFF = 16
"""A difference of losses counts from this many machine epsilons of the loss on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rays:
    """Gradients of several rules at the same parameters, as directions.

    Attributes:
        rules: names, the reference first.
        origin: the parameters theta.
        norm: ||theta||.
        gradients: [rules, parameters], flat, float64.
        norms: [rules], their lengths.
        flags: {rule: why its gradient has no direction}.
    """

    rules: tuple[str, ...]
    origin: Params
    norm: float
    gradients: np.ndarray
    norms: np.ndarray
    flags: dict[str, str]

    @property
    def known(self) -> np.ndarray:
        """[rules], which gradients have a direction."""
        return np.array([name not in self.flags for name in self.rules])

    @property
    def downhill(self) -> np.ndarray:
        """[rules, parameters], minus each gradient, of length one; zeros where it has no direction."""
        safe = np.where(self.known, self.norms, 1.0)
        # A norm that is exactly twice as large leaves exactly the same direction.
        return np.where(self.known[:, None], -self.gradients, 0.0) / safe[:, None]

    @property
    def epsilon(self) -> float:
        return float(jnp.finfo(jax.tree.leaves(self.origin)[0].dtype).eps)

    def stacked(self, rows: np.ndarray) -> Params:
        """[rays, parameters] as parameters with one leading axis, in their own dtype."""
        leaves, structure = jax.tree.flatten(self.origin)
        ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
        parts = np.split(rows, ends, axis=1)
        shaped = [
            jnp.asarray(part.reshape(len(rows), *np.shape(leaf)), leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, shaped)


def rays(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    reference: Rule | None = None,
) -> Rays:
    """The gradients of the reference (None: BPTT) and the rules; arguments and errors as `gl.gradients`."""
    chosen = with_reference(rules, reference)
    params, batch = check(net, params, batch, loss)
    found = jax.device_get(gradients(net, params, batch, loss, chosen, key))
    rows = np.stack([flat(tree) for tree in found.values()])
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    flags = {name: f"the gradient of {name} is zero" for name, norm in zip(found, norms, strict=True) if norm == 0}
    strange = [name for name, norm in zip(found, norms, strict=True) if not np.isfinite(norm)]
    flags |= {name: f"the gradient of {name} is not finite" for name in strange}
    return Rays(tuple(found), params, float(np.linalg.norm(flat(params))), rows, norms, flags)


Losses = Callable[[Params, Params, Array, Batch], Array]


def losses_on_rays(net: Network, loss: Loss) -> Losses:
    """A compiled function (origin, directions with a leading axis, lengths [k], batch) -> losses [directions, k].

    (1) losses[i, k] = L(origin + lengths[k] * directions[i])

    One point after the other, so that the memory is that of one forward pass; compiled once per shape.
    """
    return partial(_jitted_losses, net, loss) if is_hashable(net, loss) else jax.jit(partial(_losses, net, loss))


def _losses(net: Network, loss: Loss, origin: Params, directions: Params, lengths: Array, batch: Batch) -> Array:
    def along(direction: Params) -> Array:
        def at(length: Array) -> Array:
            point = jax.tree.map(lambda o, d: o + length.astype(o.dtype) * d, origin, direction)
            return loss(plan.outputs(net, point, batch.inputs), batch)

        return jax.lax.map(at, lengths)

    return jax.lax.map(along, directions)


_jitted_losses = jax.jit(_losses, static_argnums=(0, 1))


def updates(optimizer: Optimizer | optax.GradientTransformation, found: Rays) -> np.ndarray:
    """[rules, parameters]: the update that the optimizer makes of each gradient, from a fresh state."""
    if not hasattr(optimizer, "build") and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f'optimizer={optimizer!r}: give gl.Optimizer("adam", learning_rate=1e-3) or an optax one')
    make = partial(_jitted_updates, optimizer) if is_hashable(optimizer) else jax.jit(partial(_updates, optimizer))
    known = np.where(found.known[:, None], found.gradients, 0.0)
    trees = jax.device_get(make(found.origin, found.stacked(known)))
    leaves = [np.asarray(leaf, np.float64).reshape(len(known), -1) for leaf in jax.tree.leaves(trees)]
    return np.concatenate(leaves, axis=1)


def _updates(optimizer: Any, params: Params, stacked: Params) -> Params:
    made = optimizer.build() if hasattr(optimizer, "build") else optimizer
    return jax.lax.map(lambda grad: made.update(grad, made.init(params), params)[0], stacked)


_jitted_updates = jax.jit(_updates, static_argnums=0)


def step_lengths(
    found: Rays, lengths: Sequence[float] | np.ndarray, rates: Sequence[float] | None = None
) -> np.ndarray:
    """Lengths in units of the parameters, from lengths relative to ||theta|| or from learning rates times ||g*||."""
    given, name = (lengths, "lengths") if rates is None else (rates, "rates")
    values = np.atleast_1d(np.asarray(given, np.float64))
    if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name}={given!r}: give one or more positive numbers")
    if rates is not None:
        if found.rules[0] in found.flags:
            raise ValueError(f"rates need a gradient to multiply, but {found.flags[found.rules[0]]}: give lengths")
        return values * found.norms[0]
    if found.norm == 0:
        raise ValueError("the parameters are all zero: lengths relative to their norm mean nothing; give rates=...")
    return values * found.norm


def ratio(own: float, reference: float, loss: float, epsilon: float, name: str) -> tuple[float, str]:
    """own / reference of two decreases of a loss, and why it says nothing, or ""."""
    if not np.isfinite([own, reference, loss]).all():
        return np.nan, "a loss is not finite"
    if reference <= 0:
        return np.nan, f"the step of {name} does not lower the loss"
    if reference <= ROUND_OFF * epsilon * abs(loss):
        return np.nan, f"the decrease by {name} lies within the round-off of the loss"
    return float(own / reference), ""
