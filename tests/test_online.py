"""Learning inside the sequence, against a NumPy loop over the time steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, differ
from training_parts import CLASSES, INPUTS, MASKED, ONE_LAYER, SQUARE, TASK, T, Task, begun, fit

import gradlab as gl
from gradlab.rules import FPTT, OTTT, SLTT


def numpy_online(params, batches, rate, kind, fptt=None, masked=False):
    """One LIF layer with a hard reset, learning at every step; the loss of a step is the batch's mean of squares.

    OTTT (kind "trace"):  a_t = beta a_{t-1} + x_t,  dW = a_t (psi_t error_t)^T, the bias a constant input.
    SLTT (kind "none"):   a_t = x_t.
    """
    own = params["layer_0"]["connection"]
    W, b = np.array(own["kernel"]), np.array(own["bias"])
    beta, threshold, slope = 0.8, 0.5, 2.0
    losses, rates = [], []
    average, dual = [W.copy(), b.copy()], [np.zeros_like(W), np.zeros_like(b)]
    for batch in batches:
        x, y = np.asarray(batch.inputs), np.asarray(batch.targets)
        size = x.shape[1]
        mask = np.asarray(batch.mask) if masked else np.ones((T, size))
        u, a, total, values = np.zeros((size, CLASSES)), np.zeros((size, INPUTS)), 0.0, np.zeros((T, size))
        for t in range(T):
            v = beta * u + x[t] @ W + b
            s = (v >= threshold).astype(float)
            psi = 1 / (slope * np.abs(v - threshold) + 1) ** 2
            u = v * (1 - s)
            a = (beta * a if kind == "trace" else 0.0) + x[t]
            total = (beta * total if kind == "trace" else 0.0) + 1.0
            values[t] = (0.5 * (s - y) ** 2).mean(-1)
            delta = psi * (s - y) / CLASSES * mask[t][:, None] / size
            share = 1.0
            if fptt is not None and fptt.weighted:
                share = (t + 1) / T
            grads = [share * a.T @ delta, share * total * delta.sum(0)]
            if not mask[t].any():
                continue
            if fptt is not None:
                weight = mask[t].sum() / size
                grads = [
                    g + weight * (fptt.alpha * (p - m) - d)
                    for g, p, m, d in zip(grads, (W, b), average, dual, strict=True)
                ]
            W, b = W - rate * grads[0], b - rate * grads[1]
            if fptt is not None:
                dual = [d - fptt.alpha * (p - m) for d, p, m in zip(dual, (W, b), average, strict=True)]
                average = [
                    (1 - fptt.beta) * m + fptt.beta * p - fptt.beta / fptt.alpha * d
                    for m, p, d in zip(average, (W, b), dual, strict=True)
                ]
            rates.append(s.mean())
        losses.append(((values * mask).sum(0) / np.maximum(mask.sum(0), 1)).mean())
    assert 0.05 < np.mean(rates) < 0.6
    return {"layer_0": {"connection": {"bias": b, "kernel": W}}}, losses


@pytest.mark.parametrize(
    ("rule", "kind"),
    [(OTTT(), "trace"), (SLTT(), "none"), (FPTT(), "none"), (FPTT(alpha=0.3, beta=0.7, weighted=False), "none")],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("task", [TASK, MASKED], ids=["whole", "masked"])
def test_online_updates_are_a_numpy_loop_over_the_steps(x64, rule, kind, task):
    run = fit(rule, net=ONE_LAYER, task=task, loss=SQUARE, steps=2, update="step", seeds=(1,))
    params, batches = begun(ONE_LAYER, task, 1, 4)
    fptt = rule if isinstance(rule, FPTT) else None
    expected, losses = numpy_online(params, batches[:2], 0.1, kind, fptt, masked=task.masked)
    close(run.params_of(0), expected)
    np.testing.assert_allclose(run.history["loss"], [losses], rtol=1e-12)
    other, _ = numpy_online(params, batches[:2], 0.1, "none" if kind == "trace" else "trace", fptt, masked=task.masked)
    assert differ(run.params_of(0), other, 1e-4)


def test_steps_that_count_for_no_sample_are_no_updates(x64):
    """A momentum would go on moving the weights; the mask of the last steps is empty."""

    def short(key, size):
        batch = TASK.batch(key, size)
        return batch._replace(mask=jnp.zeros((T, size)).at[0].set(1.0))

    momentum = gl.Optimizer("sgd", learning_rate=0.1, momentum=0.9)
    run = fit(SLTT(), net=ONE_LAYER, task=short, loss=SQUARE, optimizer=momentum, steps=1, update="step", seeds=(1,))
    params, batches = begun(ONE_LAYER, Task(), 1, 4)
    # One update, the first of a momentum's run: plain descent on the first step.
    first = gl.Batch(batches[0].inputs[:1], batches[0].targets)
    gradient = gl.gradients(ONE_LAYER, params, first, SQUARE, [SLTT()], jax.random.key(0))["SLTT"]
    close(run.params_of(0), jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
