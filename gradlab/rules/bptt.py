"""Backpropagation through time, whole and truncated: the reference that every other rule is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.network import Network, NetworkState, Params
from gradlab.neurons import Neuron
from gradlab.plan import LayerRecord
from gradlab.rules.base import Estimate, Rule
from gradlab.rules.products import add_neuron, add_weights
from gradlab.rules.traces import JacobianTrace, Unit
from gradlab.tape import Slices, Tape, jacobians, replayed


@dataclasses.dataclass(frozen=True)
class BPTT(Rule):
    """Backpropagation through time with surrogate slopes: the exact gradient of the surrogate network.

    (1) delta_t = B_t . p_t + D_t L_t,   p_{t-1} = A_t^T p_t + C_t L_t
    (2) L_t = error_t + sum over same-step links  J^T delta_t of the target + sum over delayed links  J^T delta_{t+1}
    of the target
    (3) grad = sum_t (d current_t / d parameters)^T delta_t

    Drops: nothing. Exact when: always (it is the definition of the surrogate gradient).
    No streaming form: delta_t needs the errors of all later steps.
    Cost: one product per layer for (2) and one for (3); memory grows with the number of steps.

    Args:
        form: "tape" computes (1) to (3) from the tape; "autodiff" is `jax.grad` of the whole network. Tests hold them
            equal.
    """

    reference: ClassVar[str] = (
        "Werbos (1990), Proc. IEEE 78(10), doi 10.1109/5.58337; with surrogates: Neftci, Mostafa & Zenke (2019), "
        "doi 10.1109/MSP.2019.2931595"
    )
    form: str = "tape"

    def __post_init__(self):
        if self.form not in ("tape", "autodiff"):
            raise ValueError(f'BPTT(form={self.form!r}): choose "tape" or "autodiff"')

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        if self.form == "autodiff":
            start = None if tape.part is None else tape.part.start

            def loss(p: Params) -> Array:
                return tape.loss(plan.run(net, p, tape.batch.inputs, start)[1][-1].output, tape.batch)

            return Estimate(jax.grad(loss)(params))
        return Estimate(backward(net, params, tape))

    def by_step(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Params:
        return backward(net, params, tape, by_step=True)


@dataclasses.dataclass(frozen=True)
class TBPTT(Rule):
    """Truncated backpropagation through time: the errors go back over a limited number of steps.

    (1) window="blocks": BPTT with everything that is carried stopped before the steps 0, k, 2k, ...: an error goes back
        to the start of its block, over 0 to k-1 steps.
    (2) window="sliding": grad = sum_t sum_{s=t-k+1..t} (d current_s / d parameters)^T delta_s(t), where delta(t) is
        BPTT's delta of the error of step t alone: every error goes back over k-1 steps.

    Drops: the paths that cross a block's boundary (1), or that are k steps long or longer (2).
    Exact when: k is at least the number of steps. Both equal SLTT for k=1, and differ from one another in between.
    No streaming form: inside a block it runs backwards; `train(update=k)` with it updates after every k steps.
    Cost: (1) as BPTT, with the memory of one block if the blocks are run one after the other; (2) k times BPTT's
        backward sweep, one after the other, each for the errors of every k-th step.

    Args:
        k: steps per block, or steps that each error reaches, its own included; at least 1.
        window: "blocks" or "sliding".
    """

    reference: ClassVar[str] = "Williams & Peng (1990), Neural Computation 2(4), doi 10.1162/neco.1990.2.4.490"
    k: int = 10
    window: str = "blocks"

    def __post_init__(self):
        require_steps("TBPTT", "k", self.k)
        if self.window not in ("blocks", "sliding"):
            raise ValueError(f'TBPTT(window={self.window!r}): choose "blocks" or "sliding"')

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        steps = np.arange(tape.n_steps)
        if self.k >= tape.n_steps:
            return Estimate(backward(net, params, tape))
        if self.window == "blocks":
            return Estimate(backward(net, params, tape, cut_before=steps % self.k == 0))
        return Estimate(_sliding(net, params, tape, self.k))

    def by_step(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Params | None:
        if self.window == "sliding":
            return None
        return backward(net, params, tape, cut_before=np.arange(tape.n_steps) % self.k == 0, by_step=True)


def require_steps(rule: str, name: str, value: Any) -> None:
    """Raise ValueError unless the value is a whole number of steps, at least one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{rule}({name}={value!r}): give a whole number of steps, at least one")


def _sliding(net: Network, params: Params, tape: Tape, k: int) -> Params:
    """(2) of TBPTT in k sweeps: the windows that end at the steps p, p + k, p + 2k, ... do not overlap."""
    steps = jnp.arange(tape.n_steps)

    def add_phase(p: Array, grads: Params) -> Params:
        ends = (steps % k == p).reshape(-1, *(1,) * (tape.slices.error.ndim - 1))
        alone = tape.with_error(jnp.where(ends, tape.slices.error, 0))
        update = backward(net, params, alone, cut_before=steps % k == (p + 1) % k)
        return jax.tree.map(jnp.add, grads, update)

    return jax.lax.fori_loop(0, k, add_phase, jax.tree.map(jnp.zeros_like, params))


def backward(
    net: Network,
    params: Params,
    tape: Tape,
    cut_before: Array | np.ndarray | None = None,
    by_step: bool = False,
) -> Params:
    """The exact backward sweep over a tape; `cut_before` and `by_step` as in `sweep`."""
    end = jax.tree.map(jnp.zeros_like, tape.end)
    return sweep(net, params, tape.slices, end, cut_before, by_step)[0]


def sweep(
    net: Network,
    params: Params,
    slices: Slices,
    cotangent: NetworkState,
    cut_before: Array | np.ndarray | None = None,
    by_step: bool = False,
) -> tuple[Params, NetworkState]:
    """Back over slices, from the error on the state after them to the error on the state before them.

    Args:
        net, params, slices: what was run.
        cotangent: the error on the state after the last step: of every state, and of every output that is read later.
        cut_before: [time], the steps whose past is stopped; None: none.
        by_step: split the gradient by the step at which the weights acted.

    Returns:
        The gradient (leaves [time, ...] with `by_step`), and the error on the state before the first step.
    """
    dtype = slices.error.dtype
    n_steps = slices.inputs.shape[0]
    keep = jnp.ones(n_steps, dtype) if cut_before is None else 1 - jnp.asarray(cut_before, dtype)

    def chunk(carry: Any, now: Any) -> tuple[Any, None]:
        grads, held = carry
        update, held = _chunk(net, params, held, *now)
        if by_step:
            return (grads, held), jax.tree.map(lambda leaf: leaf[None], update)
        return (jax.tree.map(jnp.add, grads, update), held), None

    pending = {layer: s for layer, s in enumerate(cotangent.outputs) if s is not None}
    zero = () if by_step else jax.tree.map(jnp.zeros_like, params)
    start = (zero, (tuple(cotangent.states), pending))
    size = 1 if by_step else plan.chunk_of(slices.layers)
    (grads, (states, pending)), steps = plan.scan_chunks(chunk, start, (slices, keep), size, reverse=True)
    before = NetworkState(states, tuple(pending.get(layer) for layer in range(len(net.neurons))))
    return (steps if by_step else grads), before


def _chunk(net: Network, params: Params, held: Any, slices: Slices, keep: Array) -> tuple[Params, Any]:
    """One chunk backwards; held is (p per layer, error on the last output of the chunk before, per delayed source)."""
    slices = replayed(net, params, slices)
    grads = jax.tree.map(jnp.zeros_like, params)
    p, pending = list(held[0]), dict(held[1])
    deltas: dict[int, Array] = {}
    for block in reversed(plan.blocks(net)):
        outside = {layer: _signal(net, params, layer, slices, deltas, block) for layer in block}
        step = _block_step(net, params, block)
        trained = {layer for layer in block if "neuron" in params[f"layer_{layer}"]}
        start = ({k: p[k] for k in block}, {k: pending[k] for k in block if net.delays(k)})
        rows = (_rows(net, block, slices), outside, keep)
        (end, waiting), found = jax.lax.scan(step, start, rows, reverse=True)
        pending |= waiting
        for layer in reversed(block):
            p[layer] = end[layer]
            deltas[layer], *cotangents = found[layer]
            add_weights(grads, net, params, layer, slices, deltas[layer])
            if layer in trained:
                add_neuron(grads, net, params, layer, slices, "nothing", *cotangents)
    return grads, (tuple(p), pending)


def _signal(
    net: Network, params: Params, layer: int, slices: Slices, deltas: dict[int, Array], block: tuple[int, ...]
) -> Array:
    """The error on a layer's output from the loss and from later blocks, time-batched."""
    output = slices.layers[layer].output
    signal = slices.error if layer == net.last else jnp.zeros_like(output)
    for link in net.links_from(layer):
        if not link.delay and link.target not in block:
            signal = signal + net.input_cotangent(params, link, output, deltas[link.target], lead=2)
    return signal


def _rows(net: Network, block: tuple[int, ...], slices: Slices) -> Any:
    """What the block's backward step reads at each time: the layers' records, and the inputs of the links inside."""
    inside = [link for layer in block for link in net.links_into(layer) if link.source in block]
    inputs = {(link.source, link.target): slices.link_input(link) for link in inside}
    return {layer: slices.layers[layer] for layer in block}, inputs


def _block_step(net: Network, params: Params, block: tuple[int, ...]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One step backwards through the layers of a block."""

    def step(held: Any, row: Any) -> tuple[Any, Any]:
        p, pending = held
        (records, inputs), outside, keep = row
        before: dict[int, Any] = {}
        found: dict[int, Any] = {}
        waiting = {k: jnp.zeros_like(v) for k, v in pending.items()}
        for layer in reversed(block):
            signal = outside[layer] + pending[layer] if layer in pending else outside[layer]
            for link in net.links_from(layer):
                if not link.delay and link.target in block:
                    x = inputs[(link.source, link.target)]
                    signal = signal + net.input_cotangent(params, link, x, found[link.target][0], lead=1)
            before[layer], delta = _neuron_back(net, params, layer, records[layer], p[layer], signal)
            # The cotangents are kept only where a neuron's own constants are trained.
            found[layer] = (delta, p[layer], signal) if "neuron" in params[f"layer_{layer}"] else (delta,)
            for link in net.links_into(layer):
                if link.delay:
                    x = inputs[(link.source, link.target)]
                    waiting[link.source] = waiting[link.source] + net.input_cotangent(params, link, x, delta, lead=1)
        stop = (jax.tree.map(lambda leaf: leaf * keep, before), jax.tree.map(lambda leaf: leaf * keep, waiting))
        return stop, found

    return step


def _neuron_back(
    net: Network, params: Params, layer: int, record: LayerRecord, p: Any, signal: Array
) -> tuple[Any, Array]:
    """(1): the cotangents of h_{t-1} and of the current, from those of h_t and s_t.

    The neuron is linearised here, step by step, because its Jacobians would not stay in the processor's cache.
    """
    if not isinstance(net.neurons[layer], Neuron):
        _, pull = jax.vjp(lambda h, i: net.neuron_step(params, layer, h, i), record.state, record.current)
        return pull((p, signal))
    before, delta, _ = JacobianTrace().transpose(Unit(jacobians(net, params, layer, record)), p, signal)
    return before, delta
