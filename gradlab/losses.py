"""Losses over time, their scale, their masks; and spike-count accuracy that cannot hide a dead output."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class Batch(NamedTuple):
    """A batch of sequences, time-major: a pytree of arrays.

    Attributes:
        inputs: [time, batch, features...].
        targets: [batch, ...], or [time, batch, ...] with a loss that says `targets_per_step=True`.
        mask: [time, batch] of 0 and 1, which steps count; None: all do.
    """

    inputs: Array
    targets: Array
    mask: Array | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Loss(abc.ABC):
    """A loss over a batch of sequences: called on outputs [time, batch, units] and a `Batch` it gives a scalar."""

    function: Callable[..., Array]
    time: str = "mean"

    streams: ClassVar[bool] = True
    """True when the loss is a sum over steps, so that an online learner can see its error at each step."""

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(
                f"{type(self).__name__}({self.function!r}): give a loss function such as optax.softmax_cross_entropy"
            )
        if self.time not in ("mean", "sum"):
            raise ValueError(
                f'{type(self).__name__}(time={self.time!r}): choose "mean" or "sum" over the steps that count'
            )

    def __repr__(self) -> str:
        # Not the dataclass's: a function prints with its address in memory, which differs in every process.
        shown = [getattr(self.function, "__name__", repr(self.function))]
        shown += [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.name != "function"]
        return f"{type(self).__name__}({', '.join(shown)})"

    @abc.abstractmethod
    def __call__(self, outputs: Array, batch: Batch) -> Array:
        """The scalar loss."""

    def errors(self, outputs: Float[Array, "time batch *units"], batch: Batch) -> Float[Array, "time batch *units"]:
        """(1) error_t = d loss / d output_t, the scale of the whole loss included."""
        return jax.grad(self.__call__)(outputs, batch)

    def weights(self, mask: Array | None, n_steps: int, batch_size: int, dtype: Any) -> Float[Array, "time batch"]:
        """(1) w_tb = mask_tb / batch, divided by max(sum_t mask_tb, 1) of that sample when time="mean".

        The loss of a batch is therefore the mean of its samples' losses, whatever their lengths.
        """
        mask = jnp.ones((n_steps, batch_size), dtype) if mask is None else jnp.asarray(mask, dtype)
        count = jnp.maximum(mask.sum(0), 1.0) if self.time == "mean" else 1.0
        return mask / (count * batch_size)

    def step_targets(self, targets: Array, n_steps: int) -> Array:
        """Targets with a time axis: [time, batch, ...]."""
        return jnp.broadcast_to(targets, (n_steps, *targets.shape))

    def _evaluate(self, outputs: Array, targets: Array, leading: int) -> Array:
        """The loss function's values, trailing feature axes averaged until `leading` axes are left."""
        values = self.function(outputs, targets)
        return values.mean(tuple(range(leading, values.ndim)))

    def check(self, output_shape: tuple[int, ...], batch: Batch) -> None:
        """Raise ValueError when the targets, the mask or the loss function do not fit outputs [time, batch, units]."""
        n_steps, size, units = output_shape[0], output_shape[1], output_shape[2:]
        per_step = bool(getattr(self, "targets_per_step", False))
        lead = (n_steps, size) if per_step else (size,)
        shape = tuple(jnp.shape(batch.targets))
        axes = "[time, batch, ...]" if per_step else "[batch, ...]"
        if shape[: len(lead)] != lead:
            hint = "" if per_step else "; targets that vary in time need PerStep(..., targets_per_step=True)"
            if shape[:1] == (n_steps,) and not per_step:
                hint = "; inputs are [time, batch, features...]: inputs.swapaxes(0, 1) if the batch came first" + hint
            raise ValueError(f"targets have shape {shape}, but {axes} must begin with {lead}{hint}")
        width = shape[len(lead) :]
        labels = width == () and jnp.issubdtype(jnp.result_type(batch.targets), jnp.integer)
        if width != units and not labels:
            raise ValueError(
                f"targets have width {width}, but the network's output has {units}: give one-hot targets of that "
                "width, or integer labels [batch] with a loss such as optax.softmax_cross_entropy_with_integer_labels"
            )
        if labels:
            _check_labels(batch.targets, units)
        if batch.mask is not None and tuple(jnp.shape(batch.mask)) != (n_steps, size):
            raise ValueError(f"mask has shape {tuple(jnp.shape(batch.mask))}, but [time, batch] is {(n_steps, size)}")
        self._check_function(units, width, jnp.result_type(batch.inputs), jnp.result_type(batch.targets))

    def _check_function(self, units: tuple[int, ...], width: tuple[int, ...], dtype: Any, kind: Any) -> None:
        """Try the function on shapes alone, where no two axes have one size: none can be taken for another."""
        most = max(units, default=1)
        lead = (most + 1, most + 2) if self.streams else (most + 2,)
        name = getattr(self.function, "__name__", repr(self.function))
        fits = "integer labels belong to optax.softmax_cross_entropy_with_integer_labels, one-hot targets to the others"
        what = f"outputs of shape {lead + units} and {kind} targets of shape {lead + width}"
        try:
            probe = (jax.ShapeDtypeStruct(lead + units, dtype), jax.ShapeDtypeStruct(lead + width, kind))
            found = jax.eval_shape(self.function, *probe).shape
        except Exception as error:
            raise ValueError(f"{name} refuses {what}: {error} ({fits})") from error
        if found[: len(lead)] != lead:
            raise ValueError(
                f"{name} turns {what} into {found}: give a function that keeps the leading axes {lead}, one value per "
                f"{'step and ' if self.streams else ''}sample and no mean over them ({fits})"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class PerStep(Loss):
    """A loss at every time step, from any optax loss: the only form that an online learner can see.

    (1) loss = sum_t,b  w_tb function(output_tb, target_tb),   w of `Loss.weights` (1)

    Feature axes that `function` leaves behind are averaged.

    Args:
        function: an optax loss, `function(outputs, targets)`.
        time: "mean" over the steps of each sample that count, or "sum".
        targets_per_step: declare targets [time, batch, ...]; it is never guessed.
    """

    targets_per_step: bool = False

    def __call__(self, outputs: Array, batch: Batch) -> Array:
        weights = self.weights(batch.mask, outputs.shape[0], outputs.shape[1], outputs.dtype)
        return self._weighted(outputs, self.step_targets(batch.targets, outputs.shape[0]), weights)

    def step_targets(self, targets: Array, n_steps: int) -> Array:
        return targets if self.targets_per_step else super().step_targets(targets, n_steps)

    def error_at(self, prediction: Array, target: Array, weight: Array) -> Array:
        """(1) error = w_tb d function(prediction_tb, target_tb) / d prediction_tb, of prediction's shape.

        The leading axes are weight's, [time, batch] or, for one step, [batch]; `target` comes from `step_targets`.
        """
        return jax.grad(self._weighted)(prediction, target, weight)

    def _weighted(self, outputs: Array, targets: Array, weight: Array) -> Array:
        return jnp.sum(weight * self._evaluate(outputs, targets, weight.ndim))


@dataclasses.dataclass(frozen=True, repr=False)
class Accumulated(Loss):
    """A loss on the outputs summed over time, known only at the end of the sequence.

    (1) loss = mean_b function(z_b, target_b),   z_b = sum_t mask_tb output_tb
        with z_b divided by max(sum_t mask_tb, 1) if time="mean"

    Legal for BPTT and every deferred gradient; refused for updates inside the sequence, where its error is not known
    yet.
    """

    time: str = "sum"

    streams: ClassVar[bool] = False

    def __call__(self, outputs: Array, batch: Batch) -> Array:
        weights = self.weights(batch.mask, outputs.shape[0], outputs.shape[1], outputs.dtype) * outputs.shape[1]
        pooled = jnp.sum(outputs * weights.reshape(weights.shape + (1,) * (outputs.ndim - 2)), axis=0)
        return jnp.mean(self._evaluate(pooled, batch.targets, 1))


def _check_labels(labels: Any, units: tuple[int, ...]) -> None:
    if isinstance(labels, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # known labels are looked at also while a caller's function is compiled
        low, high = int(jnp.min(labels)), int(jnp.max(labels))
    if low < 0 or high >= units[-1]:
        raise ValueError(
            f"integer targets run from {low} to {high}, but the network has {units[-1]} outputs: labels are 0 to "
            f"{units[-1] - 1}"
        )


class Accuracy(NamedTuple):
    """Accuracy with what it would hide.

    Attributes:
        accuracy: share of samples whose largest summed output is the target; a sample without any output spike counts
            as wrong.
        silent_outputs: how many output units never fired in the batch.
        classes_never_predicted: how many classes were the prediction of no sample.
        undecided: share of samples whose largest summed output is shared by several units (the first one is taken),
            silent samples included.
    """

    accuracy: Array
    silent_outputs: Array
    classes_never_predicted: Array
    undecided: Array


def spike_count_accuracy(
    outputs: Float[Array, "time batch units"], targets: Array, mask: Array | None = None
) -> Accuracy:
    """(1) prediction_b = argmax_i sum_t mask_tb output_tbi against one-hot or integer targets [batch, ...]."""
    weighted = outputs if mask is None else outputs * mask[..., None]
    counts = weighted.sum(0)
    classes = targets if targets.ndim == 1 else targets.argmax(-1)
    decided = jnp.any(weighted != 0, axis=(0, 2))
    prediction = jnp.where(decided, counts.argmax(-1), -1)
    predicted = (prediction[:, None] == jnp.arange(counts.shape[-1])).any(0)
    ties = (counts == counts.max(-1, keepdims=True)).sum(-1) > 1
    return Accuracy(
        accuracy=jnp.mean(prediction == classes),
        silent_outputs=jnp.sum(~jnp.any(weighted != 0, axis=(0, 1))),
        classes_never_predicted=jnp.sum(~predicted),
        undecided=jnp.mean(ties),
    )
