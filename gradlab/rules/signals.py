"""Learning signals: who tells a hidden layer that it erred. And memories and predictions: where in time the error
counts.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradlab.losses import PerStep
from gradlab.network import Network, Params
from gradlab.neurons import Subthreshold
from gradlab.rules import filters
from gradlab.rules.base import Shapes
from gradlab.tape import Slices, Tape


class Term(NamedTuple):
    """One source of a layer's learning signal: an error on `target`'s current, and the map from it to this layer's
    output.
    """

    target: int
    error: Array
    pull: Callable[[Array], Array]


class Sweep(NamedTuple):
    """What is known when a layer's signal is formed: the slices, the errors q handed down so far, and the read-out's
    error.
    """

    slices: Slices
    handed_down: dict[int, Array]
    readout_error: Array
    lead: int


@dataclasses.dataclass(frozen=True)
class Signal(abc.ABC):
    """A learning signal for hidden layers."""

    slope = "instant"

    @abc.abstractmethod
    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        """The terms of the layer's signal; empty when no error reaches the layer."""

    @abc.abstractmethod
    def targets(self, net: Network, layer: int) -> list[int]:
        """The targets of `terms`, in order, known before any value is."""

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        """Fixed feedback weights, per layer name."""
        return {}

    def supports(self, net: Network) -> str | None:
        return None


@dataclasses.dataclass(frozen=True)
class SpatialBackprop(Signal):
    """Backpropagation through the layers of the same time step.

    (1) L_t = sum over same-step links  W^T q_t,      q_t = slope_t L_t of the layer above

    slope="instant": the surrogate slope D_t of the step (OSTL, OTTT). slope="leaky_mean": its running mean under the
    layer's
    memory, (2) r_t = kappa r_{t-1} + 1,  g_t = (kappa r_{t-1} g_{t-1} + D_t) / r_t  (OTPE).
    """

    slope: str = "instant"

    def __post_init__(self):
        if self.slope not in ("instant", "leaky_mean"):
            raise ValueError(f'SpatialBackprop(slope={self.slope!r}): choose "instant" or "leaky_mean"')

    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        links = [k for k in net.links_from(layer) if not k.delay]
        return [Term(k.target, sweep.handed_down[k.target], _pull(net, params, k, sweep)) for k in links]

    def targets(self, net: Network, layer: int) -> list[int]:
        return [k.target for k in net.links_from(layer) if not k.delay]


@dataclasses.dataclass(frozen=True)
class DirectFeedback(Signal):
    """The read-out's error sent straight to every hidden layer.

    (1) L_t = B (D_t error_t),   D_t error_t the error on the read-out's current

    Args:
        matrix: "symmetric", B = W_out^T (only for layers that feed the read-out), or "random", fixed entries drawn from
            N(0, 1 / read-out units).
        seed: of the random matrix; each layer's is drawn from the seed and the layer's index only, and stays over a
            run.
    """

    matrix: str = "symmetric"
    seed: int = 0

    def __post_init__(self):
        if self.matrix not in ("symmetric", "random"):
            raise ValueError(f'DirectFeedback(matrix={self.matrix!r}): choose "symmetric" or "random"')

    def supports(self, net: Network) -> str | None:
        if self.matrix == "random":
            return None
        for layer in range(net.last):
            if not any(k.target == net.last and not k.delay for k in net.links_from(layer)):
                return (
                    f"symmetric feedback is the transpose of the weights into the read-out, but layer_{layer} "
                    f"does not feed it "
                    "(layers that do: the last hidden one, and any with a skip link to the output); use "
                    'feedback="random"'
                )
        return None

    def targets(self, net: Network, layer: int) -> list[int]:
        if self.matrix == "random":
            return [net.last]
        return [k.target for k in net.links_from(layer) if k.target == net.last and not k.delay]

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        if self.matrix == "symmetric":
            return {}
        n_out = _size(shapes.units[-1])

        def draw(layer: int) -> Array:
            key = jax.random.fold_in(jax.random.key(self.seed), layer)
            drawn = jax.random.normal(key, (n_out, _size(shapes.units[layer])), jnp.float32) / n_out**0.5
            return drawn.reshape(n_out, *shapes.units[layer]).astype(shapes.dtype)

        return {f"layer_{layer}": draw(layer) for layer in range(net.last)}

    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        error = sweep.readout_error
        if self.matrix == "random":
            return [Term(net.last, error, _random_pull(feedback[f"layer_{layer}"], sweep.lead))]
        links = [k for k in net.links_from(layer) if k.target == net.last and not k.delay]
        return [Term(net.last, error, _pull(net, params, k, sweep)) for k in links]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _flat(x: Array, lead: int) -> Array:
    return x.reshape(*x.shape[:lead], -1)


def _random_pull(weights: Array, lead: int) -> Callable[[Array], Array]:
    def pull(error: Array) -> Array:
        return jnp.tensordot(_flat(error, lead), weights, axes=1)

    return pull


def _pull(net: Network, params: Params, link: Any, sweep: Sweep) -> Callable[[Array], Array]:
    x = sweep.slices.link_input(link)
    return lambda error: net.input_cotangent(params, link, x, error, sweep.lead)


@dataclasses.dataclass(frozen=True)
class Memory(abc.ABC):
    """The linear memory through which a spike of this layer acts on later errors: R_t = sum over tau of kernel(tau)
    e_{t-tau}.
    """

    @abc.abstractmethod
    def layer(self, net: Network, term_target: int) -> int:
        """The layer whose sub-threshold impulse response is the kernel."""

    def filter(self, net: Network, params: Params, term_target: int, dtype: Any) -> Subthreshold | None:
        """(1) kernel(tau) = c0 A0^tau B0 / (c0 B0); for one state, the leak to the power tau."""
        layer = self.layer(net, term_target)
        own = params[f"layer_{layer}"].get("neuron", {})
        return filters.normalised(net.neurons[layer].subthreshold(own, dtype))


@dataclasses.dataclass(frozen=True)
class NextLayer(Memory):
    """The memory of the layer that this layer feeds (OTPE)."""

    def layer(self, net: Network, term_target: int) -> int:
        return term_target


@dataclasses.dataclass(frozen=True)
class ReadoutFilter(Memory):
    """The memory of the read-out (e-prop's kappa)."""

    def layer(self, net: Network, term_target: int) -> int:
        return net.last


@dataclasses.dataclass(frozen=True)
class Prediction(abc.ABC):
    """Where the loss is put."""

    @abc.abstractmethod
    def filter(self, net: Network, params: Params, dtype: Any) -> Subthreshold | None:
        """The filter from the outputs to the prediction; None: the outputs themselves."""

    def errors(self, net: Network, params: Params, tape: Tape) -> Array:
        """(1) error_t = d loss / d prediction_t over the whole tape."""
        outputs = tape.slices.layers[-1].output
        kernel = self.filter(net, params, outputs.dtype)
        if kernel is None:
            return tape.slices.error
        start = filters.zeros(kernel, outputs[0])
        _, prediction = jax.lax.scan(lambda h, s: filters.forward(kernel, h, s), start, outputs)
        return tape.error_at(prediction)

    def step(self, net: Network, params: Params, h: Any, slices: Slices, loss: Any) -> tuple[Any, Array]:
        """The same, one step at a time."""
        output = slices.layers[-1].output
        kernel = self.filter(net, params, output.dtype)
        if kernel is None:
            return (), slices.error
        h, prediction = filters.forward(kernel, h, output)
        assert isinstance(loss, PerStep)
        return h, loss.error_at(prediction, slices.target, slices.weight)


@dataclasses.dataclass(frozen=True)
class Output(Prediction):
    """The loss on the network's outputs, as the user wrote it."""

    def filter(self, net: Network, params: Params, dtype: Any) -> Subthreshold | None:
        return None


@dataclasses.dataclass(frozen=True)
class LeakySum(Prediction):
    """The loss on a leaky sum of the outputs: (1) o_t = decay o_{t-1} + s_t.

    Args:
        decay: None takes the output neuron's own leak (a neuron with one state).
    """

    decay: float | None = None

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ValueError(f"LeakySum(decay={self.decay!r}): the share that is left after one step lies in [0, 1]")

    def filter(self, net: Network, params: Params, dtype: Any) -> Subthreshold | None:
        one = jnp.ones((), dtype)
        if self.decay is not None:
            return Subthreshold(((jnp.asarray(self.decay, dtype),),), (one,), (one,))
        own = net.neurons[net.last].subthreshold(params[f"layer_{net.last}"].get("neuron", {}), dtype)
        return Subthreshold(own.A, (one,), (one,))


@dataclasses.dataclass(frozen=True)
class PredictionFilter(Memory):
    """The memory of the prediction itself, for the output layer of rules that put the loss on a filtered output."""

    prediction: Prediction = LeakySum()

    def layer(self, net: Network, term_target: int) -> int:
        return net.last

    def filter(self, net: Network, params: Params, term_target: int, dtype: Any) -> Subthreshold | None:
        return self.prediction.filter(net, params, dtype)
