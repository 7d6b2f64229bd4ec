"""Learning signals that do not go down from layer to layer: direct feedback, and read-outs of the layers' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab.losses import Loss, PerStep
from gradlab.network import Link, Network, Params
from gradlab.rules.base import Shapes
from gradlab.rules.signals import Pull, Signal, Sweep, Term, pull_through, require_through
from gradlab.rules.traces import JacobianTrace


@dataclasses.dataclass(frozen=True)
class DirectFeedback(Signal):
    """The read-out's error, or the target itself, sent straight to every hidden layer.

    (1) L_t = B (D_t error_t),   D_t error_t the error on the read-out's current            of="error"
        L_t = - w_t B y*_t,      y* the target (one-hot for labels), w_t the step's weight   of="target":
        the part of the error y - y* that is known before the network answers
    (2) matrix="adaptive", after each optimizer step:  B <- B + dW_out^T - decay (B - W_out^T),
        the change of the weights into the read-out, and the decay that both would share

    Args:
        matrix: "symmetric", B = W_out^T, and "adaptive", B starts random and follows (2), only for layers that feed the
            read-out; "random", fixed entries drawn from N(0, 1 / read-out units).
        of: "error" or "target".
        seed: of the random matrix; each layer's is drawn from the seed and the layer's index only, and stays over a
            run.
        decay: of (2), in [0, 1).
        through: the read-out's time that the error goes through, as in `SpatialBackprop`: D_t error_t is replaced by
            the read-out's delta_t. Only of="error"; no streaming form.
    """

    matrix: str = "symmetric"
    of: str = "error"
    seed: int = 0
    decay: float = 0.0
    through: JacobianTrace | None = None

    def __post_init__(self):
        if self.matrix not in ("symmetric", "random", "adaptive"):
            raise ValueError(f'DirectFeedback(matrix={self.matrix!r}): choose "symmetric", "random" or "adaptive"')
        if self.of not in ("error", "target"):
            raise ValueError(f'DirectFeedback(of={self.of!r}): choose "error" or "target"')
        if not 0 <= self.decay < 1:
            raise ValueError(f"DirectFeedback(decay={self.decay!r}): the decay of an update lies in [0, 1)")
        require_through(self)
        if self.through is not None and self.of == "target":
            raise ValueError('DirectFeedback(of="target", through=...): a target goes through no read-out')

    @property
    def uses_target(self) -> bool:  # type: ignore[override]
        return self.of == "target"

    @property
    def has_state(self) -> bool:
        return self.matrix != "symmetric"

    def supports(self, net: Network, shapes: Shapes, loss: Loss) -> str | None:
        if self.of == "target" and (reason := _no_step_targets(loss)):
            return reason
        if self.matrix == "random":
            return None
        for layer in range(net.last):
            if not _into_readout(net, layer):
                return (
                    f"{self.matrix} feedback follows the weights into the read-out, but layer_{layer} does not feed it "
                    "(layers that do: the last hidden one, and any with a skip link to the output); use "
                    'feedback="random"'
                )
        return None

    def targets(self, net: Network, layer: int) -> list[int]:
        return [net.last] if self.has_state else [k.target for k in _into_readout(net, layer)]

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        if self.matrix == "symmetric":
            return {}
        drawn = {f"layer_{k}": _random_matrix(self.seed, k, shapes) for k in range(net.last)}
        return drawn if self.matrix == "random" else {"matrix": drawn, "weights": self._weights(net, params, drawn)}

    def updated(self, net: Network, params: Params, feedback: Any) -> Any:
        if self.matrix != "adaptive":
            return feedback
        weights = self._weights(net, params, feedback["matrix"])

        def follow(B: Array, new: Array, old: Array) -> Array:
            return B + (new - old) - self.decay * (B - old)

        return {"matrix": jax.tree.map(follow, feedback["matrix"], weights, feedback["weights"]), "weights": weights}

    def _weights(self, net: Network, params: Params, like: Any) -> Any:
        """W_out^T per layer, [read-out units, units...]: the Jacobian of the read-out's current at a silent layer."""
        found = {}
        for name, B in like.items():
            total = jnp.zeros_like(B)
            for link in _into_readout(net, int(name.removeprefix("layer_"))):
                at = jnp.zeros(B.shape[1:], B.dtype)
                jacobian = jax.jacrev(lambda s, k=link: net.current(params, k, s[None], lead=1)[0].ravel())(at)
                total = total + jacobian
            found[name] = total
        return found

    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        error = sweep.readout_error if self.of == "error" else -weighted_target(net, sweep)
        if self.has_state:
            B = (feedback["matrix"] if self.matrix == "adaptive" else feedback)[f"layer_{layer}"]
            return [Term(net.last, error, matrix_pull(B, sweep.lead))]
        return [Term(net.last, error, pull_through(net, params, k, sweep)) for k in _into_readout(net, layer)]


@dataclasses.dataclass(frozen=True)
class LocalReadout(Signal):
    """A read-out of each hidden layer's own, with fixed weights, and the network's loss put on it.

    (1) y_t = G^T s_t,   L_t = G (d loss_t / d y_t)

    Args:
        matrix: "random", entries drawn from N(0, 1 / units) (DECOLLE), or "square_waves", class c of C reads unit j
            (in order, from 0) through a square wave of its own frequency, as in TESS's code:
            (2) G_jc = sign(sin(f_c j)) / units,   f_c = 50 + 462 c / (C - 1) radians
        seed: of the random matrix; each layer's is drawn from the seed and the layer's index only.
    """

    matrix: str = "random"
    seed: int = 0
    uses_target = True

    def __post_init__(self):
        if self.matrix not in ("random", "square_waves"):
            raise ValueError(f'LocalReadout(matrix={self.matrix!r}): choose "random" or "square_waves"')

    @property
    def has_state(self) -> bool:
        return True

    def supports(self, net: Network, shapes: Shapes, loss: Loss) -> str | None:
        return _no_step_targets(loss)

    def targets(self, net: Network, layer: int) -> list[int]:
        return [layer]

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        return {f"layer_{k}": self._matrix(k, shapes) for k in range(net.last)}

    def _matrix(self, layer: int, shapes: Shapes) -> Array:
        n_out, shape = _size(shapes.units[-1]), shapes.units[layer]
        size = _size(shape)
        if self.matrix == "random":
            return _random_matrix(self.seed, layer, shapes) * (n_out / size) ** 0.5
        wave = np.sign(np.sin(np.linspace(50.0, 512.0, n_out)[:, None] * np.arange(size))) / size
        return jnp.asarray(wave, shapes.dtype).reshape(n_out, *shape)

    def terms(self, net: Network, params: Params, layer: int, feedback: Any, sweep: Sweep) -> list[Term]:
        G, slices = feedback[f"layer_{layer}"], sweep.slices
        output = slices.layers[layer].output
        prediction = jnp.tensordot(_flat(output, sweep.lead), G.reshape(G.shape[0], -1), axes=[[-1], [1]])
        shape = slices.layers[-1].output.shape
        assert isinstance(sweep.loss, PerStep)
        error = sweep.loss.error_at(prediction.reshape(shape), slices.target, slices.weight)
        return [Term(layer, matrix_pull(G, sweep.lead)(error), lambda signal: signal)]


def weighted_target(net: Network, sweep: Sweep) -> Array:
    """w_t y*_t: the target of each step in the shape of the outputs, with the step's weight."""
    slices, output = sweep.slices, sweep.slices.layers[-1].output
    target = slices.target
    if target.ndim == sweep.lead:
        target = jax.nn.one_hot(target, output.shape[-1], dtype=output.dtype)
    return target.astype(output.dtype) * slices.weight.reshape(slices.weight.shape + (1,) * (output.ndim - sweep.lead))


def matrix_pull(weights: Array, lead: int) -> Pull:
    """B^T applied to an error: weights [read-out units, units...]."""
    return lambda error: jnp.tensordot(_flat(error, lead), weights, axes=1)


def _no_step_targets(loss: Loss) -> str | None:
    if isinstance(loss, PerStep):
        return None
    return f"its signal needs a target and a loss at each step, and {type(loss).__name__} has none: use gl.PerStep"


def _into_readout(net: Network, layer: int) -> list[Link]:
    return [k for k in net.links_from(layer) if k.target == net.last and not k.delay]


def _random_matrix(seed: int, layer: int, shapes: Shapes) -> Array:
    """Entries of N(0, 1 / read-out units), [read-out units, units...]."""
    n_out = _size(shapes.units[-1])
    key = jax.random.fold_in(jax.random.key(seed), layer)
    drawn = jax.random.normal(key, (n_out, _size(shapes.units[layer])), jnp.float32) / n_out**0.5
    return drawn.reshape(n_out, *shapes.units[layer]).astype(shapes.dtype)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _flat(x: Array, lead: int) -> Array:
    return x.reshape(*x.shape[:lead], -1)
