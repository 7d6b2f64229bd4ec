"""Backpropagation through time, whole and truncated: the reference that every other rule is compared with."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.losses import Loss
from gradlab.network import Network, Params
from gradlab.rules import checkpointing
from gradlab.rules.base import Estimate, Rule, Shapes
from gradlab.rules.checkpointing import Schedule
from gradlab.rules.sweep import backward
from gradlab.tape import Tape


@dataclasses.dataclass(frozen=True)
class BPTT(Rule):
    """Backpropagation through time with surrogate slopes: the exact gradient of the surrogate network.

    (1) delta_t = B_t . p_t + D_t L_t,   p_{t-1} = A_t^T p_t + C_t L_t
    (2) L_t = error_t + sum over same-step links  J^T delta_t of the target + sum over delayed links  J^T delta_{t+1}
    of the target
    (3) grad = sum_t (d current_t / d parameters)^T delta_t

    Drops: nothing. Exact when: always (it is the definition of the surrogate gradient).
    No streaming form: delta_t needs the errors of all later steps.
    Cost: one product per layer for (2) and one for (3); memory grows with the number of steps, unless `memory` limits
    it: the forward pass is then run again, as often as `schedule` says.

    Args:
        form: "tape" computes (1) to (3) from the tape; "autodiff" is `jax.grad` of the whole network. Tests hold them
            equal.
        memory: how much of the forward pass may be kept at once, "1GiB", "500MB" or a number of bytes; None: all.
    """

    reference: ClassVar[str] = (
        "Werbos (1990), Proc. IEEE 78(10), doi 10.1109/5.58337; with surrogates: Neftci, Mostafa & Zenke (2019), "
        "doi 10.1109/MSP.2019.2931595"
    )
    form: str = "tape"
    memory: str | int | None = None

    def __post_init__(self):
        if self.form not in ("tape", "autodiff"):
            raise ValueError(f'BPTT(form={self.form!r}): choose "tape" or "autodiff"')
        if checkpointing.bytes_of("BPTT", self.memory) is not None and self.form == "autodiff":
            raise ValueError('BPTT(form="autodiff", memory=...): only the form "tape" can limit its memory')

    def schedule(self, shapes: Shapes) -> Schedule | None:
        """What is kept of the forward pass, and how often it is run again; None when `memory` is too little.

        `gradlab.engine.shapes_of(net, params, batch, loss)` gives the shapes of a run without running it.
        """
        return checkpointing.schedule(shapes, checkpointing.bytes_of("BPTT", self.memory))

    def supports(self, net: Network, shapes: Shapes, loss: Loss, online: bool = False) -> str | None:
        if self.memory is None or self.schedule(shapes) is not None:
            return None
        least = checkpointing.least_bytes(shapes)
        return self.refuse(
            f"the least that {shapes.n_steps} steps of {shapes.batch_size} samples take is {least / 2**20:.3g} MiB: "
            "give more memory, or take fewer samples"
        )

    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        if self.form == "autodiff":
            start = None if tape.part is None else tape.part.start

            def loss(p: Params) -> Array:
                return tape.loss(plan.run(net, p, tape.batch.inputs, start)[1][-1].output, tape.batch)

            return Estimate(jax.grad(loss)(params))
        if self.memory is None:
            return Estimate(backward(net, params, tape))
        chosen = self.schedule(Shapes.of(params, tape))
        if chosen is None:
            raise ValueError(self.supports(net, Shapes.of(params, tape), tape.loss))
        return Estimate(checkpointing.backward(net, params, tape, chosen))

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
