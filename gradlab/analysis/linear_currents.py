"""The loss at many points of a line or a plane, from the first layer's currents, computed once for all of them.

A connection that is linear in its parameters delivers currents that are linear in the coordinates c of a point,

    (1)  current(origin + sum_k c_k direction_k, x) = current(origin, x) + sum_k c_k current(direction_k, x)

so that the products of the network's input with the first layer's weights, most of the work in a small network, are
needed once per direction and not once per point. The rest of the network runs forwards step by step, several points
together, and keeps its outputs alone; blocks of points are shared among the processor's threads.

Which connections are linear is known from what they are: `is_linear`. Every other network, and every other function of
the parameters, is evaluated point by point as it is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.analysis.objective import (
    MOST_AT_ONCE,
    LossOfParams,
    NetworkLoss,
    compiled,
    executable,
    memory_to_use,
    points_at_once,
    require_batch_size,
    scalar,
)
from gradlab.analysis.plane import combined, moved
from gradlab.analysis.trees import Params
from gradlab.checks import check
from gradlab.modules import apply_folded, function_of
from gradlab.network import INPUT, Link, Network

LINEAR = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvLocal, nn.ConvTranspose)
"""Modules whose output is linear in their parameters together (the bias is one of them)."""

OWN_ARITHMETIC = (
    *("dtype", "promote_dtype", "dot_general", "dot_general_cls"),
    *("conv_general_dilated", "conv_general_dilated_cls", "preferred_element_type"),
)
"""Fields with which such a module computes in another way than its own, perhaps not linear or more coarsely rounded."""

TOGETHER = 4  # points at once on a CPU: a reading of the shared currents serves all, and all states stay in the cache
SMALL = 2**12  # bytes of one layer's units below which a step costs more than its arithmetic
BLOCKS = 16  # pieces of a surface, at least, that processor threads take in turn
BLOCK_POINTS = 64  # points in a piece, at most


def losses_at(
    loss_of_params: LossOfParams,
    origin: Params,
    directions: Sequence[Params],
    points: np.ndarray,
    batch_size: int | None = None,
) -> np.ndarray:
    """The loss at origin + sum_k c_k direction_k for every row c of `points`: [points], float64.

    Args:
        loss_of_params: a function from parameters to a scalar. Of a `loss_function(net, batch, loss)` whose first
            connection is linear, the currents are shared as in equation (1).
        origin: parameters.
        directions: trees like the origin.
        points: [points, directions], coordinates.
        batch_size: how many points run together (by vmap); None: chosen by memory.

    Raises:
        ValueError: for a batch size below 1, or what the loss itself refuses.
    """
    require_batch_size(batch_size)
    coordinates = jnp.asarray(points)
    directions = tuple(directions)
    if isinstance(loss_of_params, NetworkLoss) and _is_shared(loss_of_params, origin, directions):
        return _from_currents(loss_of_params, origin, directions, coordinates, batch_size)
    size = points_at_once(loss_of_params, origin, len(coordinates), batch_size)
    evaluate = compiled(_one_by_one, loss_of_params, batch_size=size)
    return np.asarray(evaluate(origin, directions, coordinates), dtype=np.float64)


def is_linear(connection: Any, own: Any) -> bool:
    """True for a connection known to be linear in its parameters `own`, whatever its input.

    Known are a link without a connection of its own, Flax's Dense, DenseGeneral, Conv, ConvLocal and ConvTranspose
    with their own arithmetic, and a chain that ends with one of them and has no parameters before it. A subclass may
    do anything and is not known.
    """
    if type(connection) is nn.Sequential and connection.layers:
        last = len(connection.layers) - 1
        return set(own) == {f"layers_{last}"} and is_linear(connection.layers[last], own[f"layers_{last}"])
    if connection is None:
        return True
    if type(connection) not in LINEAR:
        return False
    fields = {f.name: f.default for f in dataclasses.fields(connection)}
    return all(getattr(connection, name) is fields[name] for name in OWN_ARITHMETIC if name in fields)


class _Given(nn.Module):
    """The connection of a layer whose current is the network's input."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x


def _input_link(net: Network) -> Link:
    return net.links_from(INPUT)[0]


def _is_shared(loss: NetworkLoss, origin: Params, directions: tuple[Params, ...]) -> bool:
    """True when the first layer's currents can be shared, and fit into a share of the memory for all steps."""
    if len(loss.net.links_from(INPUT)) != 1:
        return False
    link = _input_link(loss.net)
    try:
        own = origin[f"layer_{link.target}"][link.name]
    except (KeyError, TypeError):
        return False  # parameters of another network: the loss itself says so in words
    if not is_linear(link.connection, own):
        return False
    terms = jax.eval_shape(compiled(_terms, loss), origin, directions)
    return sum(math.prod(term.shape) * term.dtype.itemsize for term in terms) <= memory_to_use()


def _current(link: Link, own: Any, inputs: Array) -> Array:
    return apply_folded(partial(function_of(link, own), own), inputs, 2)


def _from_currents(
    loss: NetworkLoss, origin: Params, directions: tuple[Params, ...], points: Array, batch_size: int | None
) -> np.ndarray:
    """Equation (1), in blocks of equal size: what a point's loss is does not depend on how many threads there are."""
    # Arrays of NumPy would be converted by each thread, in its own width of floats.
    loss, origin, directions = jax.tree.map(jnp.asarray, (loss, origin, directions))
    terms = compiled(_terms, loss)(origin, directions)
    small = _is_small(loss, origin)
    together, block = _sizes(loss, origin, len(points), batch_size)
    missing = -len(points) % block
    padded = jnp.concatenate([points, jnp.broadcast_to(points[-1], (missing, points.shape[1]))])
    blocks = list(padded.reshape(-1, block, points.shape[1]))
    # Compiled here: a thread would compile with settings of its own.
    program = executable(_block, loss, terms, origin, directions, blocks[0], together=together, small=small)

    def run(chosen: Array) -> np.ndarray:
        return np.asarray(program(terms, origin, directions, chosen), dtype=np.float64)

    with ThreadPoolExecutor(min(_threads(), len(blocks))) as pool:
        return np.concatenate(list(pool.map(run, blocks)))[: len(points)]


def _terms(loss: NetworkLoss, origin: Params, directions: tuple[Params, ...]) -> tuple[Array, ...]:
    """The currents of (1): of the origin and of every direction, [time, batch, units...]."""
    params, batch = check(loss.net, origin, loss.batch, loss.loss)
    link = _input_link(loss.net)
    dtype = batch.inputs.dtype
    own = [tree[f"layer_{link.target}"][link.name] for tree in (params, *directions)]
    return tuple(_current(link, jax.tree.map(lambda p: jnp.asarray(p, dtype), p), batch.inputs) for p in own)


def _block(
    loss: NetworkLoss,
    terms: tuple[Array, ...],
    origin: Params,
    directions: tuple[Params, ...],
    points: Array,
    together: int,
    small: bool,
) -> Array:
    """The losses at some points, `together` at once; all steps at once where little is done in each."""
    link = _input_link(loss.net)
    links = tuple(dataclasses.replace(k, connection=_Given()) if k is link else k for k in loss.net.links)
    rest = Network(loss.net.neurons, links)
    start, *ways = (_without(link, tree) for tree in (origin, *directions))

    def at(c: Array) -> Array:
        params = moved(start, ways, c)
        outputs = plan.outputs(rest, params, combined(terms, c)) if small else _stepped(rest, params, terms, c)
        return scalar(loss.loss(outputs, loss.batch))

    return jax.lax.map(at, points, batch_size=together) if together > 1 else jax.lax.map(at, points)


def _stepped(rest: Network, params: Params, terms: tuple[Array, ...], c: Array) -> Array:
    """The outputs [time, batch, units...] of a network that is fed with currents (1), which are summed in each step."""

    def step(state: Any, now: tuple[Array, ...]) -> tuple[Any, Array]:
        # One array per direction: slices of one stacked array compile to a program 2.5 times slower.
        state, _, outputs = rest.step(params, state, combined(now, c))
        return state, outputs[-1]

    return jax.lax.scan(step, rest.initial_state(params, terms[0]), terms)[1]


def _without(link: Link, params: Params) -> Params:
    """The parameters without those of a link."""
    layer = f"layer_{link.target}"
    return {**params, layer: {name: own for name, own in params[layer].items() if name != link.name}}


def _one_by_one(
    loss_of_params: LossOfParams,
    origin: Params,
    directions: tuple[Params, ...],
    points: Array,
    batch_size: int | None,
) -> Array:
    # The trees are arguments, or the compiler would try to fold them as constants.
    return jax.lax.map(lambda c: scalar(loss_of_params(moved(origin, directions, c))), points, batch_size=batch_size)


def _sizes(loss: NetworkLoss, origin: Params, points: int, batch_size: int | None) -> tuple[int, int]:
    """How many points run together, few on a CPU, on an accelerator what its memory holds; and how many in a block."""
    n_steps, size = loss.batch.inputs.shape[:2]
    if batch_size is not None:
        together = min(batch_size, points)
    elif jax.default_backend() == "cpu":
        together = 1 if _is_small(loss, origin) else min(TOGETHER, -(-points // BLOCKS))
    else:
        units = [math.prod(shape) for shape in loss.net.unit_shapes(origin, loss.batch.inputs)]
        each = size * loss.batch.inputs.dtype.itemsize * (8 * sum(units) + 2 * n_steps * units[-1])
        together = max(1, min(points, MOST_AT_ONCE, memory_to_use() // each))
    return together, together * max(1, min(-(-points // BLOCKS), BLOCK_POINTS) // together)


def _is_small(loss: NetworkLoss, params: Params) -> bool:
    """True when so little is done in a step that products over all steps at once are the better choice on a CPU."""
    inputs = loss.batch.inputs
    widest = max(math.prod(shape) for shape in loss.net.unit_shapes(params, inputs))
    return jax.default_backend() == "cpu" and widest * inputs.shape[1] * inputs.dtype.itemsize < SMALL


def _threads() -> int:
    """Processor threads that run blocks side by side: XLA runs loops as small as these on one.

    One on an accelerator, and where XLA itself was told to use one (a study's worker processes).
    """
    if jax.default_backend() != "cpu" or "intra_op_parallelism_threads=1" in os.environ.get("XLA_FLAGS", "").split():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
