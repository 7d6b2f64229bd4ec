"""The tape: one forward pass, recorded once, that every rule reads; and the neurons' local Jacobians."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab import plan
from gradlab.losses import Batch, Loss, PerStep
from gradlab.network import INPUT, Link, Network, NetworkState, Params
from gradlab.plan import LayerRecord


class Slices(NamedTuple):
    """A stretch of recorded time. On the tape every array leads with [time, batch]; one step of it leads with [batch].

    Attributes:
        inputs: x, [time, batch, features...].
        layers: per layer the state h_{t-1}, the current I_t, the output s_t and the operating point (`LayerRecord`).
        delayed: per layer s_{t-1} where a delayed link reads it, else None.
        error: d loss / d s_t at the output layer, the loss's scale included.
        target, weight: what `PerStep.error_at` needs to put the loss elsewhere; weight is w_tb of `Loss.weights`.
    """

    inputs: Array
    layers: tuple[LayerRecord, ...]
    delayed: tuple[Array | None, ...]
    error: Array
    target: Array
    weight: Array

    def link_input(self, link: Link) -> Array:
        """The input of a link as it was used: of the same step, or of the step before for a delayed link."""
        if link.source == INPUT:
            return self.inputs
        if link.delay:
            return self.delayed[link.source]  # type: ignore[return-value]
        return self.layers[link.source].output


class Part(NamedTuple):
    """Where a tape lies when it holds a window of a longer sequence, and what goes on around it.

    Attributes:
        start: the state before the window's first step.
        first_step: how many steps of the sequence come before the window.
        total_steps: how many steps the sequence has.
        continues: [batch], 1 for the samples of which a later step of the sequence counts, 0 for the others.
    """

    start: NetworkState
    first_step: Array | int
    total_steps: Array | int
    continues: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slices", "batch", "end", "chunk_starts", "part"],
    meta_fields=["loss", "chunk"],
)
@dataclasses.dataclass(frozen=True)
class Tape:
    """One forward pass of a network on a batch. Rules read it; only BPTT with a limited memory runs parts of it again.

    Attributes:
        slices: everything recorded, time-major.
        batch: the batch it was recorded on.
        loss: the loss whose gradient is asked for.
        end: the state after the last step.
        chunk_starts: the state before each chunk of steps of the execution plan, [chunks, ...].
        chunk: steps per chunk.
        part: None when the tape holds a whole sequence from rest, else where its window lies in the sequence.
    """

    slices: Slices
    batch: Batch
    loss: Loss
    end: NetworkState
    chunk_starts: NetworkState
    chunk: int
    part: Part | None = None

    @property
    def n_steps(self) -> int:
        return self.slices.inputs.shape[0]

    def with_error(self, error: Array) -> Tape:
        """The same pass with another error at the output."""
        return dataclasses.replace(self, slices=self.slices._replace(error=error))

    def only_step(self, step: Array | int) -> Tape:
        """The same pass when only the loss of one step counts."""

        def at_step(values: Array) -> Array:
            chosen = jnp.arange(values.shape[0]) == step
            return jnp.where(chosen.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)

        slices = self.slices._replace(error=at_step(self.slices.error), weight=at_step(self.slices.weight))
        return dataclasses.replace(self, slices=slices)

    def error_at(self, prediction: Array) -> Array:
        """(1) error_t = w_t d loss_t / d prediction_t with the loss put on another signal than the outputs.

        Raises TypeError for a loss that is not a sum over steps.
        """
        if not isinstance(self.loss, PerStep):
            raise TypeError(
                f"{type(self.loss).__name__} is not a sum over steps: put it on the outputs only, or use gl.PerStep"
            )
        return self.loss.error_at(prediction, self.slices.target, self.slices.weight)


def record(net: Network, params: Params, batch: Batch, loss: Loss, part: Part | None = None) -> Tape:
    """Run the network once and record it, from rest or, for a window of a longer sequence, from `part.start`."""
    start = net.initial_state(params, batch.inputs) if part is None else part.start
    end, layers, chunk_starts = plan.run_marked(net, params, batch.inputs, start)
    output = layers[-1].output
    n_steps, size = output.shape[:2]
    slices = Slices(
        inputs=batch.inputs,
        layers=layers,
        delayed=delayed_outputs(start, layers),
        error=loss.errors(output, batch),
        target=loss.step_targets(batch.targets, n_steps),
        weight=loss.weights(batch.mask, n_steps, size, output.dtype),
    )
    return Tape(slices, batch, loss, end, chunk_starts, plan.chunk_for(net, params, batch.inputs), part)


def delayed_outputs(start: NetworkState, layers: Sequence[LayerRecord]) -> tuple[Array | None, ...]:
    """Per layer s_{t-1}, [time, batch, ...], where a delayed link reads it, else None; `start` holds the first."""
    return tuple(
        None if first is None else jnp.concatenate([first[None], layer.output[:-1]])
        for first, layer in zip(start.outputs, layers, strict=True)
    )


class Jacobians(NamedTuple):
    """A neuron's local derivatives at its operating point; nested tuples over its k states, arrays of the unit's shape.

    (1) dh_t = A dh_{t-1} + B dI_t
    (2) ds_t = C dh_{t-1} + D dI_t
    """

    A: tuple[tuple[Array, ...], ...]
    B: tuple[Array, ...]
    C: tuple[Array, ...]
    D: Array


def operating_point(net: Network, layer: int, record: LayerRecord) -> tuple[Any, Array]:
    """(state, current) at which the layer's neuron steps as it did on the record, from as little of it as will do."""
    return net.neurons[layer].at_point(record.point) if record.point else (record.state, record.current)


def replayed(net: Network, params: Params, slices: Slices) -> Slices:
    """The same slices with the outputs taken anew from the operating points, so that the tape need not keep them."""
    layers = list(slices.layers)
    for layer, record in enumerate(layers):
        if record.point:
            layers[layer] = record._replace(
                output=net.neuron_step(params, layer, *operating_point(net, layer, record))[1]
            )
    return slices._replace(layers=tuple(layers))


def jacobians(net: Network, params: Params, layer: int, record: LayerRecord, cut: str = "nothing") -> Jacobians:
    """Linearise a layer's neuron at a record with any leading axes, by k+1 jvps of its own step.

    The neuron is elementwise, so a tangent of ones gives every unit's own derivative. `cut` linearises a variant of the
    neuron at the same operating point (`Neuron.cut`).
    """

    def step(state: Any, current: Array) -> tuple[Any, Array]:
        return net.neuron_step(params, layer, state, current, cut)

    state, current = operating_point(net, layer, record)
    _, push = jax.linearize(step, state, current)
    k = len(state)
    ones, zeros = jnp.ones_like(current), jnp.zeros_like(current)
    columns = [push(tuple(ones if i == j else zeros for i in range(k)), zeros) for j in range(k)]
    B, D = push(tuple(zeros for _ in range(k)), ones)
    A = tuple(tuple(columns[j][0][i] for j in range(k)) for i in range(k))
    return Jacobians(A, tuple(B), tuple(column[1] for column in columns), D)
