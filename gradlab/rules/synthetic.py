"""Synthetic gradients: truncated backpropagation whose missing future is predicted from the carried state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.losses import Loss
from gradlab.network import Network, NetworkState, Params
from gradlab.rules.base import Estimate, Rule, Shapes
from gradlab.rules.bptt import require_steps
from gradlab.rules.sweep import sweep
from gradlab.tape import Slices, Tape


@dataclasses.dataclass(frozen=True)
class SyntheticGradient(Rule):
    """Decoupled neural interfaces over time: TBPTT in blocks, with a predicted error on the state at each block's end.

    z_s is everything that is carried into step s: every layer's state, and every output that a delayed link reads; one
    vector of n numbers per sample.

    (1) grad = sum over blocks of the gradient of [ the block's loss + sum_b g_s(b) . z_s(b) ],   s: the step after it
    (2) g_s(b) = (kernel^T z_s(b) + bias) / batch,   and 0 where no step from s on counts for sample b
    (3) target_s(b) = d [ the loss of the block from s on + its end's g . z ] / d z_s(b),   constant
    (4) kernel, bias  <-  (kernel, bias) - learning_rate / curvature  d error / d (kernel, bias)
        error = mean_{s, b} |batch g_s(b) - batch target_s(b)|^2,   curvature = 2 (1 + mean_{s, b} |z_s(b)|^2)

    The means in (4) are over the blocks' starts but for the sequence's first, and over the samples that go on there.
    Everything is said of one sample's own loss (times batch), so that the predictor does not depend on the batch's
    size; the curvature bounds the second derivative of the error, so that one learning rate suits networks of every
    width and scale. The predictor begins at zero, where the rule is TBPTT; each call of `gradient` answers with the
    predictor it was given, and then takes one step of (4). The predictor is the rule's state, {"kernel", "bias"};
    `Estimate.info["prediction_error"]` is the error in (4) before the step.

    Drops: what g does not predict of the errors that cross a block's boundary.
    Exact when: g equals the true errors, or k is at least the number of steps.
    No streaming form: inside a block it runs backwards. With `train(update=k)` each window's end is predicted, but
        for the sequence's last.
    Cost: as TBPTT, and per block three products of the n x n kernel with the batch's states.

    Args:
        k: steps per block, at least 1.
        learning_rate: of the gradient descent in (4), above 0 and below 2; from 2 on it may diverge.
        limit_bytes: largest kernel that is allowed, default 2 GiB.
    """

    reference: ClassVar[str] = (
        "Jaderberg, Czarnecki, Osindero, Vinyals, Graves, Silver & Kavukcuoglu (2017), ICML, PMLR 70, 1627-1635"
    )
    k: int = 10
    learning_rate: float = 0.5
    limit_bytes: int = 2**31

    def __post_init__(self):
        require_steps("SyntheticGradient", "k", self.k)
        if not 0 < self.learning_rate < 2:
            raise ValueError(
                f"SyntheticGradient(learning_rate={self.learning_rate!r}): give a number above 0 and below 2"
            )
        if not self.limit_bytes > 0:
            raise ValueError(
                f"SyntheticGradient(limit_bytes={self.limit_bytes!r}): the limit is a positive number of bytes"
            )

    def supports(self, net: Network, shapes: Shapes, loss: Loss, online: bool = False) -> str | None:
        width = _width(shapes.slices)
        needed = width**2 * jnp.dtype(shapes.dtype).itemsize
        if needed > self.limit_bytes:
            return self.refuse(
                f"it predicts the error on all {width} carried numbers from all of them, a kernel of "
                f"{needed / 2**30:.2f} GiB; the limit is {self.limit_bytes / 2**30:.2f} GiB: take a smaller network, "
                "or raise limit_bytes"
            )
        return None

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        width = _width(shapes.slices)
        return {"kernel": jnp.zeros((width, width), shapes.dtype), "bias": jnp.zeros(width, shapes.dtype)}

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        size = min(self.k, tape.n_steps)
        lives, lessons = _lives(tape), _lessons(tape)
        pairs = jnp.maximum(lessons[::size].sum(), 1)

        def error(predictor: Any, z: Array, target: Array, lesson: Array) -> Array:
            missed = _predict(predictor, z) - lesson.shape[0] * target
            return jnp.sum(lesson[:, None] * missed**2) / pairs

        def block(carry: Any, now: Any) -> tuple[Any, None]:
            sums, end, lives_after = carry
            slices, lives_now, lessons_now = now
            after = _predict(state, _flat(end)) * (lives_after / lives_after.shape[0])[:, None]
            update, target = sweep(net, params, slices, _shaped(after, end))
            begin = carried_into(slices)
            z, lesson = _flat(begin), lessons_now[0]
            missed, slope = jax.value_and_grad(error)(state, z, _flat(target), lesson)
            size_of_z = jnp.sum(lesson * jnp.sum(z**2, 1)) / pairs
            sums = jax.tree.map(jnp.add, sums, (update, slope, missed, size_of_z))
            return (sums, begin, lives_now[0]), None

        zero = jnp.zeros((), lives.dtype)
        sums = (*jax.tree.map(jnp.zeros_like, (params, state)), zero, zero)
        rows = (tape.slices, lives[:-1], lessons)
        (sums, _, _), _ = plan.scan_chunks(block, (sums, tape.end, lives[-1]), rows, size, reverse=True)
        grads, slope, missed, size_of_z = sums
        rate = self.learning_rate / (2 * (1 + size_of_z))
        learned = jax.tree.map(lambda old, down: old - rate * down, state, slope)
        return Estimate(grads, learned, {"prediction_error": missed})


def carried_into(slices: Slices) -> NetworkState:
    """z: what is carried into the first step of slices."""
    states = tuple(jax.tree.map(lambda leaf: leaf[0], layer.state) for layer in slices.layers)
    return NetworkState(states, tuple(None if late is None else late[0] for late in slices.delayed))


def _lives(tape: Tape) -> Array:
    """[time + 1, batch]: 1 where this step of the tape or one after it counts for the sample, the last row after it."""
    counts = (tape.slices.weight > 0).astype(tape.slices.error.dtype)
    after = jnp.zeros_like(counts[0]) if tape.part is None else tape.part.continues.astype(counts.dtype)
    return jax.lax.cummax(jnp.concatenate([counts, after[None]]), axis=0, reverse=True)


def _lessons(tape: Tape) -> Array:
    """[time, batch]: 1 where a block that begins at this step would teach the predictor, that is where steps lie before
    it and the sample goes on.
    """
    first = 0 if tape.part is None else tape.part.first_step
    lives = _lives(tape)[:-1]
    return lives * (jnp.arange(tape.n_steps) + first > 0).astype(lives.dtype)[:, None]


def _predict(predictor: Any, z: Array) -> Array:
    """batch g of (2)."""
    return z @ predictor["kernel"] + predictor["bias"]


def _width(one: Slices) -> int:
    """n, from one step of the tape, [batch, ...]."""
    carried = ([layer.state for layer in one.layers], one.delayed)
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(carried))


def _flat(state: NetworkState) -> Array:
    """[batch, n]: everything that is carried, side by side."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(state)], axis=1)


def _shaped(flat: Array, like: NetworkState) -> NetworkState:
    """The inverse of `_flat`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
    parts = jnp.split(flat, ends[:-1], axis=1)
    return jax.tree.unflatten(structure, [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)])
